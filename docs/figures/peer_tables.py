"""The tables of the page beside others, made of what ``python -m benchmarks`` has written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.peers.cases import SERIES, Case
from benchmarks.peers.ours import UNGROUPED
from benchmarks.peers.tables import (
    HEAD,
    Row,
    case_of,
    cells,
    looked_up,
    machine,
    number,
    ratio,
    why_not,
)


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    return markdown.table(head, rows) + "\n"


def of_middle(found: Mapping[str, Any]) -> str:
    """Return what was found where the series meet."""
    rows, middle = looked_up(found), Case(**found["middle"])
    return _table(HEAD, [cells(rows, row) for row in found["rows"] if case_of(row) == middle])


def of_series(found: Mapping[str, Any], series: str, value: Callable[[Row], float | None]) -> str:
    """Return a figure of each peer along a series of cases."""
    rows = looked_up(found)
    cases = [Case(**case) for case in found["series"].get(series, ())]
    field = "batch_size" if series == "batch" else series
    lines = []
    for peer in found["peers"]:
        line = [peer["name"]]
        for case in cases:
            row = rows.get((peer["name"], case))
            figure = None if row is None else value(row)
            skipped = row is not None and ("over" in row or "skipped" in row)
            line.append(number(figure) if figure is not None else "over" if skipped else "-")
        lines.append(line)
    return _table([series, *(f"{getattr(case, field):,}" for case in cases)], lines)


def to_the_first_batch(row: Row) -> float | None:
    """Return the milliseconds from ids to the first batch."""
    if "first_s" not in row:
        return None
    return float((row["construct_s"] + row["first_s"]) * 1e3)


def of_page(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the page, by name."""
    rows = looked_up(found)

    def against_torch(row: Row) -> float | None:
        return ratio(rows, row, UNGROUPED.name)

    called = [
        [
            peer["name"],
            f"{peer['package']} {peer['version'] or ''}" if peer["package"] else "-",
            peer["given"],
            peer["note"] or "-",
        ]
        for peer in found["peers"]
    ]
    return {
        "machine": machine(found),
        "called": _table(("sampler", "package", "given", "how"), called),
        "middle": of_middle(found),
        **{f"epoch by {name}": of_series(found, name, against_torch) for name in SERIES},
        "first batch by samples": of_series(found, "samples", to_the_first_batch),
        "peak by samples": of_series(found, "samples", lambda row: row.get("peak_mb")),
        "peak by patches": of_series(found, "patches", lambda row: row.get("peak_mb")),
        "not measured": unmeasured(found),
    }


def unmeasured(found: Mapping[str, Any]) -> str:
    """Return which figures are not there, and why."""
    lines = []
    for row in found["rows"]:
        if why := why_not(row):
            lines.append([row["peer"], "all" if "missing" in row else str(case_of(row)), why])
    return _table(("sampler", "case", "why"), dict.fromkeys(map(tuple, lines)))


def put_into(page: Path, named: Mapping[str, str]) -> None:
    """Put tables between their marks in a page, or write a page of them where there is none.

    Raises
    ------
    ValueError
        A mark names a table that there is not.
    """
    if not page.exists():
        page.write_text("\n".join(f"## {name}\n\n{text}" for name, text in named.items()))
        return

    def replaced(mark: re.Match[str]) -> str:
        if mark[2] not in named:
            raise ValueError(f"a mark must be one of {', '.join(named)}, got {mark[2]}")
        return f"{mark[1]}\n\n{named[mark[2]]}\n{mark[3]}"

    marks = re.compile(r"(<!-- table: (.+?) -->).*?(<!-- end -->)", re.DOTALL)
    page.write_text(marks.sub(replaced, page.read_text()))
