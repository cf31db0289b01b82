"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def row(cells: Iterable[object]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(names: Sequence[object]) -> str:
    """Return a table's first two lines."""
    return f"{row(names)}\n|{'---|' * len(names)}"


def table(names: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a whole table."""
    return "\n".join([head(names), *map(row, rows)])


def records(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of dicts: a column is a name and the format of its cells.

    A row that says why it is ``missing`` has that in place of its figures.
    """
    lines = []
    for row in rows:
        cells = [] if "missing" in row else [text.format_map(row) for text in columns.values()]
        lines.append(cells or [row["name"], row["missing"], *["-"] * (len(columns) - 2)])
    return table(list(columns), lines)
