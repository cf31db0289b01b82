"""The table at the end, in short lines."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.record import Record

MOST_ERROR_LINES = 6
BEST_TILES = 6
NOISY = 0.1
"""Timings whose extremes are further apart than this part of their median are marked by a ~."""


def ended(record: Record) -> dict[str, dict[str, Any]]:
    """Return how each case has ended, in that order: a case that was skipped may run later."""
    lines = record.lines("end", "skipped")
    return {line["case"]: {"status": "skipped", "warnings": [], **line} for line in lines}


def has_failed(record: Record) -> bool:
    """Whether a check does not hold, or a case broke off or was lost."""
    statuses = {case["status"] for case in ended(record).values()}
    return bool(statuses & {"error", "lost"}) or not all(c["ok"] for c in record.lines("check"))


def table(record: Record) -> str:
    """Return everything that was found in short lines, what matters most at the end."""
    lines = _timings(record.lines("timing"))
    lines.append("== machine")
    for machine in record.lines("machine")[-1:]:
        lines += [f"{name}={value}" for name, value in machine.items() if name != "kind"]
    lines += [f"in {note['case']}: {note['text'][:300]}" for note in record.lines("note")]
    checks = record.lines("check")
    wrong = [check for check in checks if not check["ok"]]
    lines.append(f"== checks: {len(checks) - len(wrong)} hold, {len(wrong)} do not")
    lines += [f"FAILED {check['name']}: {str(check['detail'])[:500]}" for check in wrong[:8]]
    lines.append("== cases")
    for name, case in ended(record).items():
        *_, last = ["", *case.get("error", "").splitlines()]
        lines.append(f"{name}: {case['status']}" + (f": {last[:120]}" if last else ""))
        if case["status"] in ("error", "lost"):
            lines += [f"  {line[:160]}" for line in case["error"].splitlines()[-MOST_ERROR_LINES:]]
        lines += [f"  warned: {text[:110]}" for text in case["warnings"][:3]]
    lines.append("== goals (they do not change the exit status)")
    for goal in record.lines("goal"):
        met = "met    " if goal["met"] else "NOT MET"
        limit = f"{'>=' if goal['least'] else '<='} {goal['limit']:g}"
        lines.append(f"{met} {goal['value']:8.2f} {goal['unit']} ({limit}) {goal['name']}")
    return "\n".join(lines)


def _timings(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each case, dataset and type, of all that was timed with it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        about = [str(row[key]) for key in ("mix", "layout", "dtype", "batch") if row.get(key)]
        found.setdefault(" ".join([row["case"], *about]), []).append(row)
    lines = []
    for head, several in found.items():
        if head.startswith("tiles"):
            several = sorted(several, key=lambda row: row["ms"])[:BEST_TILES]
        lines.append(f"{head}: {'; '.join(map(_timed, several))}")
    return lines


def _timed(row: dict[str, Any]) -> str:
    value = f"{row['ms']:.3f} ms" + (
        f" ({row['ns_per_index']:.4f} ns)" if "ns_per_index" in row else ""
    )
    for unit in ("us_per_step", "us_per_batch"):
        value = f"{row[unit]:.2f} us" if unit in row else value
    noisy = "~" if row["most"] - row["least"] > NOISY * row["ms"] else ""
    return f"{row['what']} {noisy}{value}"
