"""The tables of the page beside others, made of what ``python -m benchmarks`` has written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.peers.cases import SERIES, Case
from benchmarks.peers.ours import LISTED
from benchmarks.peers.samplers.restated import UNGROUPED

Row = Mapping[str, Any]
HEAD = (
    "sampler",
    "construct, ms",
    "first batch, ms",
    "epoch, ms",
    "/ ungrouped",
    "/ ours",
    "second epoch, ms",
    "peak, MB",
    "len()",
    "missed",
    "repeated",
    "mixed",
    "members of the second epoch",
)

BY_CHANCE = 0.01
"""So many of the batches, at most, have the members of an old one: some are of two samples only."""


def case_of(row: Row) -> Case:
    """Return the case of a row."""
    return Case(**row["case"])


def looked_up(found: Mapping[str, Any]) -> dict[tuple[str, Case], Row]:
    """Return the rows by peer and case."""
    return {(row["peer"], case_of(row)): row for row in found["rows"]}


def ratio(rows: Mapping[tuple[str, Case], Row], row: Row, baseline: str) -> float | None:
    """Return what an epoch takes, in epochs of the baseline on the same case."""
    base = rows.get((baseline, case_of(row)), {})
    if "epoch_s" not in row or not base.get("epoch_s"):
        return None
    return float(row["epoch_s"] / base["epoch_s"])


def why_not(row: Row) -> str:
    """Return why a row lacks figures; empty where it does not."""
    if "over" in row:
        return f"over {row['over']:g} s"
    return str(row.get("missing") or row.get("skipped") or row.get("error") or "")


def number(value: Any, digits: int = 3) -> str:
    """Return a figure with so many digits that count, - where there is none."""
    if value is None:
        return "-"
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value >= 1e-3 else "0" if value == 0 else f"{value:.1g}"


def count(value: Any) -> str:
    """Return a count, - where there is none."""
    return "-" if value is None else f"{value:,}"


def length(row: Row) -> str:
    """Compare what ``len`` says with what came."""
    if "batches" not in row:
        return "-"
    said = row["len"]
    if not isinstance(said, int):
        return str(said)
    if {row["batches"], row.get("second_batches", row["batches"])} == {said}:
        return "right"
    return f"{said:,}, came {row['batches']:,}"


def members(row: Row) -> str:
    """Say whether the second epoch's batches have other members than the first one's."""
    if row.get("same_epoch"):
        return "the same epoch"
    same = row.get("same_members")
    if same is None:
        return "-"
    if same == 1:
        return "the same"
    return "new" if same < BY_CHANCE else f"{same:.0%} the same"


def cells(rows: Mapping[tuple[str, Case], Row], row: Row) -> list[str]:
    """Return a row of the table of everything."""
    why = why_not(row)
    if "construct_s" not in row:
        return [row["peer"], why or "-", *["-"] * (len(HEAD) - 2)]

    def ms(name: str) -> str:
        # The whole of an error stands in a table of its own.
        lacking = "error" if "error" in row else why or "-"
        return number(row[name] * 1e3) if name in row else lacking

    return [
        row["peer"],
        ms("construct_s"),
        ms("first_s"),
        ms("epoch_s"),
        number(ratio(rows, row, UNGROUPED.name)),
        number(ratio(rows, row, LISTED.name)),
        ms("second_epoch_s"),
        number(row.get("peak_mb")),
        length(row),
        *(count(row.get(name)) for name in ("missed", "repeated", "mixed")),
        members(row),
    ]


def everything(found: Mapping[str, Any]) -> str:
    """Return all that was found in one table, case by case."""
    rows = looked_up(found)
    lines: list[list[str]] = []
    for case in dict.fromkeys(case_of(row) for row in found["rows"]):
        lines.append([f"**{case}**", *[""] * (len(HEAD) - 1)])
        lines += [cells(rows, row) for row in found["rows"] if case_of(row) == case]
    return markdown.table(HEAD, lines) + "\n"


def machine(found: Mapping[str, Any]) -> str:
    """Return where and when all this was measured, in a sentence."""
    on = found["machine"]
    return (
        f"{on['date']}, commit {on['commit']}: {on['processor']}, {on['cores']} cores, "
        f"Python {on['python']}, NumPy {on['numpy']}, torch {on['torch']}; best of up to "
        f"{found['rounds']} rounds, at most {found['limit_s']:g} s of the processor a case.\n"
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
