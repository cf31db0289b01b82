"""What was found, as one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import markdown
from benchmarks.peers.cases import Case
from benchmarks.peers.ours import LISTED, UNGROUPED

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
