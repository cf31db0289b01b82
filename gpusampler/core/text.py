"""Text for people: values in errors, bytes, tables."""

from __future__ import annotations

from typing import Any


def human(count: int) -> str:
    """Return a number of bytes as a person says it.

    Examples
    --------
    >>> human(999), human(4_000_000), human(-(5 << 30))
    ('999 B', '3.8 MiB', '-5.0 GiB')
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def shown(value: Any) -> str:
    """Return a value as it is shown in an error; long ones are cut."""
    # Python refuses to write out an integer of more than a few thousand digits.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
