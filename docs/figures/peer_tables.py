"""The tables of the comparison page, from the results that ``python -m benchmarks`` writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.peers.cases import SERIES, Case
from benchmarks.peers.ours import LISTED, OURS
from benchmarks.peers.samplers.restated import UNGROUPED

Row = Mapping[str, Any]
HEAD = (
    "sampler",
    "construct, ms",
    "first batch, ms",
    "epoch, ms",
    "epoch / ungrouped",
    "epoch / gpusampler",
    "second epoch, ms",
    "peak, MB",
    "len()",
    "missed",
    "repeated",
    "mixed",
    "batches of the second epoch",
)
NOT_IN_SUMMARY = "epoch / gpusampler", "second epoch, ms"
SERIES_HEAD = {
    "samples": "number of samples",
    "patches": "number of patches",
    "batch": "batch size",
}
BY_CHANCE = 0.01
"""Batches of two samples may have the same members by chance: at most this fraction of batches."""
LEAST_MB = 1.0
"""Below this peak, a difference is the allocator's."""


def case_of(row: Row) -> Case:
    """Return the case of a row."""
    return Case(**row["case"])


def looked_up(found: Mapping[str, Any]) -> dict[tuple[str, Case], Row]:
    """Return the rows by peer and case."""
    return {(row["peer"], case_of(row)): row for row in found["rows"]}


def ratio(rows: Mapping[tuple[str, Case], Row], row: Row, baseline: str) -> float | None:
    """Return the time of an epoch relative to the baseline's on the same case."""
    base = rows.get((baseline, case_of(row)), {})
    if "epoch_s" not in row or not base.get("epoch_s"):
        return None
    return float(row["epoch_s"] / base["epoch_s"])


def why_not(row: Row) -> str:
    """Return why a row lacks results, or an empty string."""
    if "over" in row:
        return f"over {row['over']:g} s"
    return str(row.get("missing") or row.get("skipped") or row.get("error") or "")


def number(value: Any, digits: int = 3) -> str:
    """Return a number with so many significant digits, or - for None."""
    if value is None:
        return "-"
    if value >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value >= 1e-3 else "0" if value == 0 else f"{value:.1g}"


def count(value: Any) -> str:
    """Return a count, or - for None."""
    return "-" if value is None else f"{value:,}"


def length(row: Row) -> str:
    """Compare ``len`` with the number of batches yielded."""
    if "batches" not in row:
        return "-"
    said = row["len"]
    if not isinstance(said, int):
        return str(said)
    if {row["batches"], row.get("second_batches", row["batches"])} == {said}:
        return "exact"
    return f"{said:,}, yielded {row['batches']:,}"


def members(row: Row) -> str:
    """Say whether batches of the second epoch have other members than those of the first."""
    if row.get("same_epoch"):
        return "identical epoch"
    same = row.get("same_members")
    if same is None:
        return "-"
    if same == 1:
        return "same members"
    return "new" if same < BY_CHANCE else f"{same:.0%} same members"


def cells(rows: Mapping[tuple[str, Case], Row], row: Row) -> list[str]:
    """Return a row of the table of all results."""
    why = why_not(row)
    if "construct_s" not in row:
        return [row["peer"], why or "-", *["-"] * (len(HEAD) - 2)]

    def ms(name: str) -> str:
        # The message of an error is in the table of cases that were not measured.
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
    """Return all results in one table, case by case."""
    rows = looked_up(found)
    lines: list[list[str]] = []
    for case in dict.fromkeys(case_of(row) for row in found["rows"]):
        lines.append([f"**{case}**", *[""] * (len(HEAD) - 1)])
        lines += [cells(rows, row) for row in found["rows"] if case_of(row) == case]
    return markdown.table(HEAD, lines) + "\n"


def machine(found: Mapping[str, Any]) -> str:
    """Return the machine, the versions and the date of the results."""
    on = found["machine"]
    return (
        f"{on['processor']}, {on['cores']} cores, Python {on['python']}, NumPy {on['numpy']}, "
        f"torch {on['torch']}, compiled backend {on['evaluated by']}; {on['date']}, commit "
        f"{on['commit']}. Best of up to {found['rounds']} rounds, at most {found['limit_s']:g} CPU "
        "seconds per sampler and case."
    )


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    return markdown.table(head, rows) + "\n"


def of_middle(found: Mapping[str, Any]) -> str:
    """Return the results of the case that all series share, without samplers that are missing."""
    rows, middle = looked_up(found), Case(**found["middle"])
    kept = [place for place, name in enumerate(HEAD) if name not in NOT_IN_SUMMARY]
    shown = [row for row in found["rows"] if case_of(row) == middle and "missing" not in row]
    lines = [cells(rows, row) for row in shown]
    return _table([HEAD[n] for n in kept], [[line[n] for n in kept] for line in lines])


def of_series(found: Mapping[str, Any], series: str, value: Callable[[Row], float | None]) -> str:
    """Return a result of each sampler along a series of cases.

    Without samplers that have no result in it, and those that the pictures leave out.
    """
    rows = looked_up(found)
    cases = [Case(**case) for case in found["series"].get(series, ())]
    field = "batch_size" if series == "batch" else series
    lines = []
    for peer in found["peers"]:
        line, measured = [peer["name"]], False
        for case in cases:
            row = rows.get((peer["name"], case))
            result = None if row is None else value(row)
            measured |= result is not None
            skipped = row is not None and ("over" in row or "skipped" in row)
            line.append(number(result) if result is not None else "timeout" if skipped else "-")
        if measured and peer["drawn"]:
            lines.append(line)
    return _table([SERIES_HEAD[series], *(f"{getattr(case, field):,}" for case in cases)], lines)


def to_the_first_batch(row: Row) -> float | None:
    """Return the milliseconds from the ids to the first batch."""
    if "first_s" not in row:
        return None
    return float((row["construct_s"] + row["first_s"]) * 1e3)


MEASURES: dict[str, tuple[Callable[[Row], float | None], float]] = {
    "construct": (lambda row: row.get("construct_s"), 0),
    "ids to first batch": (to_the_first_batch, 0),
    "first epoch": (lambda row: row.get("epoch_s"), 0),
    "second epoch": (lambda row: row.get("second_epoch_s"), 0),
    "peak": (lambda row: row.get("peak_mb"), LEAST_MB),
}
"""The compared measures, and the largest value of each that is noise."""


def losses(found: Mapping[str, Any]) -> str:
    """Return how much more gpusampler needs than each sampler that needs less in some case."""
    rows = looked_up(found)
    own = {peer.name for peer in OURS}
    lines = []
    for peer in found["peers"]:
        if peer["name"] in own:
            continue
        pairs = [
            (rows[LISTED.name, case], row)
            for (name, case), row in rows.items()
            if name == peer["name"] and (LISTED.name, case) in rows
        ]
        line = [
            lost([(value(ours), value(theirs)) for ours, theirs in pairs], least)
            for value, least in MEASURES.values()
        ]
        if any(cell != "-" for cell in line):
            lines.append([peer["name"], *line])
    return _table(("sampler", *MEASURES), lines)


def lost(pairs: Iterable[tuple[float | None, float | None]], least: float) -> str:
    """Return the largest ratio of ours to theirs, and in how many cases it is above 1."""
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    ratios = [
        ours / theirs if theirs else inf for ours, theirs in both if ours > max(theirs, least)
    ]
    return f"{number(max(ratios))} ({len(ratios)} of {len(both)})" if ratios else "-"


def of_page(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of the page by name."""
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
        "machine": f"*{machine(found)}*\n",
        "called": _table(("sampler", "package", "input", "how it was called"), called),
        "middle": of_middle(found),
        "where we lose": losses(found),
        **{f"epoch by {name}": of_series(found, name, against_torch) for name in SERIES},
        "first batch by samples": of_series(found, "samples", to_the_first_batch),
        "peak by samples": of_series(found, "samples", lambda row: row.get("peak_mb")),
        "peak by patches": of_series(found, "patches", lambda row: row.get("peak_mb")),
        "not measured": unmeasured(found),
    }


def unmeasured(found: Mapping[str, Any]) -> str:
    """Return which cases of which samplers were not measured, and why."""
    cases: dict[tuple[str, str], dict[str, None]] = {}
    for row in found["rows"]:
        if why := why_not(row):
            why = "not run: timeout in an easier case" if "skipped" in row else why
            case = "all" if "missing" in row else str(case_of(row))
            cases.setdefault((row["peer"], why), {})[case] = None
    lines = [(peer, "; ".join(names), why) for (peer, why), names in cases.items()]
    return _table(("sampler", "cases", "why"), lines)


def put_into(page: Path, named: Mapping[str, str]) -> None:
    """Put tables between their marks in a page, or write them to a new page.

    Raises
    ------
    ValueError
        A mark names an unknown table.
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
