"""Text for people: values in errors, bytes, tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_bytes(count: int) -> str:
    """Return a number of bytes as a person says it.

    Examples
    --------
    >>> format_bytes(999), format_bytes(4_000_000), format_bytes(-(5 << 30))
    ('999 B', '3.8 MiB', '-5.0 GiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def short_repr(value: Any) -> str:
    """Return a value as it is shown in an error; long ones are cut."""
    # Python refuses to write out an integer of more than a few thousand digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def format_table(
    rows: Sequence[Sequence[str]],
    align: str,
    *,
    header: Sequence[str] | None = None,
    rule: bool = False,
    indent: int = 0,
) -> str:
    """Return rows of cells in columns that are two spaces apart.

    Parameters
    ----------
    rows : sequence of sequence of str
    align : str
        "<" or ">" for each column; one alone is for all of them.
    header : sequence of str, optional
        The names of the columns.
    rule : bool
        Whether a line of dashes stands below the header.
    indent : int
        Spaces before each line.

    Examples
    --------
    >>> print(format_table([("a", "1"), ("long", "23")], "<>", header=("name", "n"), rule=True))
    name   n
    ----  --
    a      1
    long  23
    """
    lines = list(rows) if header is None else [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if rule:
        lines.insert(1, ["-" * width for width in widths])
    sides = align * len(widths) if len(align) == 1 else align
    columns = list(zip(sides, widths, strict=True))
    return "\n".join(
        " " * indent
        + "  ".join(
            f"{cell:{side}{width}}" for cell, (side, width) in zip(line, columns, strict=True)
        ).rstrip()
        for line in lines
    )
