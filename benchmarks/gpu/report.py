"""The table at the end, in short lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST_CHARACTERS = 11_000
"""What reads the output may keep its end only."""

MOST_ERROR_LINES = 6
WIDTH = 100
BEST_TILES = 6
NOISY = 0.1
"""Timings whose extremes are further apart than this part of their median are marked by a ~."""


def collect(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the lines of a results' file by kind; cases in the order in which they ended."""
    found: dict[str, Any] = {"machine": {}, "checks": [], "goals": [], "timings": [], "notes": []}
    cases: dict[str, dict[str, Any]] = {}
    for line in lines:
        kind = line["kind"]
        if kind == "machine":
            found["machine"] = line
        elif kind in ("end", "skipped"):
            cases[line["case"]] = {"status": kind, "warnings": [], **line}
        elif kind != "begin":
            found[f"{kind}s"].append(line)
    return {**found, "cases": list(cases.values())}


def has_failed(found: dict[str, Any]) -> bool:
    """Whether a check does not hold, or a case broke off or was lost."""
    statuses = {case["status"] for case in found["cases"]}
    return not all(check["ok"] for check in found["checks"]) or bool(statuses & {"error", "lost"})


def table(found: dict[str, Any]) -> str:
    """Return everything that was found in short lines, what matters most at the end."""
    timings = _timings(found["timings"])
    rest = [*_machine(found), *_checks(found), *_cases(found), *_goals(found)]
    room = MOST_CHARACTERS - sum(len(line) + 1 for line in rest)
    kept: list[str] = []
    for line in timings:
        room -= len(line) + 1
        if room < 60:
            kept.append(f"... {len(timings) - len(kept)} more lines: see the results' file")
            break
        kept.append(line)
    return "\n".join([*kept, *rest])


def _timings(rows: list[dict[str, Any]]) -> list[str]:
    """Return a paragraph for each case, dataset and type, of all that was timed with it."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        about = [str(row[key]) for key in ("mix", "layout", "dtype", "batch") if row.get(key)]
        found.setdefault((row["case"], *about), []).append(row)
    lines = []
    for (case, *about), several in found.items():
        if case.startswith("tiles"):
            several = sorted(several, key=lambda row: row["ms"])[:BEST_TILES]
        head = " ".join([case, *about])
        lines += _wrapped(map(_timed, several), "; ", f"{head}: ")
    return lines


def _timed(row: dict[str, Any]) -> str:
    if "us_per_step" in row:
        value = f"{row['us_per_step']:.2f} us"
    elif "us_per_batch" in row:
        value = f"{row['us_per_batch']:.2f} us"
    else:
        value = f"{row['ms']:.3f} ms ({row['ns_per_index']:.4f} ns)"
    noisy = "~" if row["most"] - row["least"] > NOISY * row["ms"] else ""
    return f"{row['what']} {noisy}{value}"


def _machine(found: dict[str, Any]) -> list[str]:
    values = [f"{name}={value}" for name, value in found["machine"].items() if name != "kind"]
    notes = [f"in {note['case']}: {note['text'][:300]}" for note in found["notes"]]
    return ["== machine", *_wrapped(values), *notes]


def _wrapped(parts: Iterable[str], between: str = "  ", head: str = "") -> list[str]:
    lines = [head]
    for part in parts:
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH:
            lines.append("  ")
        lines[-1] += part + between
    return [line.rstrip(" ;") for line in lines]


def _checks(found: dict[str, Any]) -> list[str]:
    checks = found["checks"]
    wrong = [check for check in checks if not check["ok"]]
    lines = [f"== checks: {len(checks) - len(wrong)} hold, {len(wrong)} do not"]
    lines += [f"FAILED {check['name']}: {str(check['detail'])[:500]}" for check in wrong[:8]]
    return lines


def _cases(found: dict[str, Any]) -> list[str]:
    lines = ["== cases"]
    lines += _wrapped(f"{case['case']}: {case['status']};" for case in found["cases"])
    for case in found["cases"]:
        if case["status"] in ("error", "lost"):
            lines.append(f"{case['status'].upper()} in {case['case']}:")
            lines += [f"  {line[:160]}" for line in case["error"].splitlines()[-MOST_ERROR_LINES:]]
        lines += [f"warned in {case['case']}: {text[:110]}" for text in case["warnings"][:3]]
        if case["status"] in ("skipped", "partial"):
            lines.append(f"{case['status']}: {case['case']}: {case['error'][:120]}")
    return lines


def _goals(found: dict[str, Any]) -> list[str]:
    lines = ["== goals (they do not change the exit status)"]
    for goal in found["goals"]:
        met = "met    " if goal["met"] else "NOT MET"
        sign = ">=" if goal["least"] else "<="
        value, unit = goal["value"], goal["unit"]
        lines.append(f"{met} {value:8.2f} {unit} ({sign} {goal['limit']:g}) {goal['name']}")
    return lines
