"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(cells: Iterable[object]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(names: Sequence[object]) -> str:
    """Return a table's first two lines."""
    return f"{row(names)}\n|{'---|' * len(names)}"


def table(names: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a whole table."""
    return "\n".join([head(names), *map(row, rows)])
