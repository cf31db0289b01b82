"""Formatting of byte counts, of values in error messages, and of tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_bytes(count: int) -> str:
    """Return a number of bytes with a binary unit.

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
    """Return the repr of a value for an error message, truncated to 200 characters."""
    # Python raises for the repr of an integer with more than a few thousand digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an int of {value.bit_length()} bits"
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]} ..."


def format_table(
    rows: Sequence[Sequence[str]],
    align: str,
    *,
    header: Sequence[str] | None = None,
    rule: bool = False,
    indent: int = 0,
) -> str:
    """Return rows of cells as aligned columns, with ``indent`` spaces before each line.

    ``align`` has one character for each column, "<" or ">", or one for all columns. ``rule`` adds a
    line of dashes below the header.

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
