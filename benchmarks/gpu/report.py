"""The table at the end, in short lines, and the picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 11_000
"""What reads the output may keep its end only."""

MOST_ERROR_LINES = 6
WIDTH = 100
BEST_TILES = 6
NOISY = 0.1
"""Timings whose extremes are further apart than this part of their median are marked by a ~."""


def table(found: dict[str, Any]) -> str:
    """Return everything that was found in short lines, what matters most at the end."""
    timings = _timings(found["timings"])
    rest = [*_header(found), *_checks(found), *_cases(found), *_goals(found)]
    room = MOST_CHARACTERS - sum(len(line) + 1 for line in rest)
    kept: list[str] = []
    for line in timings:
        room -= len(line) + 1
        if room < 60:
            kept.append(f"... {len(timings) - len(kept)} more lines: see the JSON file")
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


def _header(found: dict[str, Any]) -> list[str]:
    header = dict(found["header"])
    lines = ["== machine"]
    for name in ("fresh_waits", "out_of_memory"):
        if name in header:
            lines.append(f"{name}: {str(header.pop(name))[:600]}")
    return [*lines, *_wrapped(f"{name}={value}" for name, value in header.items())]


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
    lines = [f"== cases, {found.get('elapsed_s', 0)} s of {found['budget_s']} s"]
    lines += _wrapped(f"{case['name']}: {case['status']};" for case in found["cases"])
    for case in found["cases"]:
        if case["status"] == "error":
            said = case["error"].splitlines()[-MOST_ERROR_LINES:]
            lines.append(f"ERROR in {case['name']}:")
            lines += [f"  {line[:160]}" for line in said]
        lines += [f"warned in {case['name']}: {text[:110]}" for text in case["warnings"][:3]]
        if case["status"] in ("skipped", "partial"):
            lines.append(f"{case['status']}: {case['name']}: {case['error'][:120]}")
    return lines


def _goals(found: dict[str, Any]) -> list[str]:
    lines = ["== goals (they do not change the exit status)"]
    for goal in found["goals"]:
        met = "met    " if goal["met"] else "NOT MET"
        sign = ">=" if goal["least"] else "<="
        value, unit = goal["value"], goal["unit"]
        lines.append(f"{met} {value:8.2f} {unit} ({sign} {goal['limit']:g}) {goal['name']}")
    return lines


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture: times against sizes, and goals against their limits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (times, goals) = plt.subplots(1, 2, figsize=(15, 7), width_ratios=[3, 2])
    _draw_times(times, found["timings"])
    _draw_goals(goals, found["goals"])
    header = found["header"]
    figure.suptitle(
        f"gpusampler on {header.get('device')}: torch {header.get('torch')}, "
        f"{header.get('date')}, commit {header.get('commit')}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_times(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Milliseconds of an epoch against its samples; ours by solid lines, the rest dashed."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.get("mix") != "large" or not str(row["case"]).startswith("epoch of"):
            continue
        ours = row["what"].startswith("ours")
        name = row["what"].split(",")[0] if ours else row["what"]
        if ours or row["what"] in ("copy", "pure gather"):
            name = f"{name}, {row['layout']}, {row['dtype']}"
        best = lines.setdefault(name, {})
        best[row["n"]] = min(row["ms"], best.get(row["n"], float("inf")))
    for number, (name, points) in enumerate(sorted(lines.items())):
        sizes = sorted(points)
        style = "o-" if name.startswith("ours") else "x--"
        colour = f"C{number % 10}"
        axes.plot(sizes, [points[n] for n in sizes], style, color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="samples", ylabel="ms", title="an epoch of indices")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=8)


def _draw_goals(axes: Any, goals: list[dict[str, Any]]) -> None:
    """How far each goal is reached: beyond the line at 1 it is met."""
    shown = [goal for goal in goals if goal["limit"] > 0 and goal["value"] > 0]
    reached = [
        goal["value"] / goal["limit"] if goal["least"] else goal["limit"] / goal["value"]
        for goal in shown
    ]
    colours = ["tab:green" if goal["met"] else "tab:red" for goal in shown]
    places = range(len(shown))
    axes.barh(places, reached, color=colours)
    axes.set_yticks(places, [goal["name"] for goal in shown], fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="reached / goal", title="goals (right of 1: met)")
    axes.invert_yaxis()
