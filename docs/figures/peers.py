"""Pictures and tables of the comparison with other samplers: ``python -m docs.figures.peers FILE``.

FILE holds the results of ``python -m benchmarks --out DIR``. The command prints all of them in one
table. ``--pictures`` draws time, memory, and speed with correctness; ``--markdown`` puts the tables
into the page.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import Case
from benchmarks.peers.ours import OURS
from benchmarks.peers.samplers.restated import UNGROUPED
from docs.figures.peer_tables import (
    SERIES_HEAD,
    Row,
    everything,
    length,
    looked_up,
    machine,
    members,
    of_page,
    put_into,
    ratio,
    to_the_first_batch,
    why_not,
)

# From the palette of Okabe and Ito, for colour-blind readers; markers and lines differ, too.
OURS_COLOUR = "#0072B2"
COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F")
MARKS = "sD^vPX<>*hp"
OK, NOT = OURS_COLOUR, "#D55E00"


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the three pictures into a folder and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure in (
        ("peers-time", time_against_samples(found)),
        ("peers-memory", memory_against_samples(found)),
        ("peers-correctness", time_and_correctness(found)),
    ):
        made.append(folder / f"{name}.png")
        figure.savefig(made[-1], dpi=120)
    return made


def _figure(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=kwargs.pop("figsize"))
    return figure, figure.subplots(*args, **kwargs)


def _shown(found: Mapping[str, Any]) -> list[str]:
    return [peer["name"] for peer in found["peers"] if peer["drawn"]]


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the line style of each sampler: ours thick, the baseline dashed."""
    own = [peer.name for peer in OURS if peer.name in names]
    others = [name for name in names if name not in (*own, UNGROUPED.name)]
    styles: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(own):
        line = ("-", "--", ":", "-.")[place]
        styles[name] = {"color": OURS_COLOUR, "linewidth": 2.4, "linestyle": line, "marker": "o"}
    styles[UNGROUPED.name] = {"color": "black", "linestyle": "--", "marker": "."}
    for place, name in enumerate(others):
        styles[name] = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": "-" if place < len(COLOURS) else "-.",
            "linewidth": 1.1,
            "marker": MARKS[place % len(MARKS)],
        }
    return styles


def _lines(
    axes: Any, found: Mapping[str, Any], series: str, value: Callable[[Row], float | None]
) -> None:
    """Draw one line per sampler along a series."""
    rows = looked_up(found)
    cases = [Case(**case) for case in found["series"].get(series, ())]
    for name, style in _styles(_shown(found)).items():
        points = [
            (getattr(case, series), figure)
            for case in cases
            if (name, case) in rows and (figure := value(rows[name, case])) is not None
        ]
        if points:
            axes.loglog(*zip(*points, strict=True), markersize=5, label=name, **style)
    axes.grid(which="major", alpha=0.3)


def _seconds(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def time_against_samples(found: Mapping[str, Any]) -> Any:
    """Return the figure of an epoch, and of the time from ids to the first batch."""
    figure, (left, right) = _figure(1, 2, figsize=(10, 5.6))
    _lines(left, found, "samples", _seconds("epoch_s"))
    _lines(
        right,
        found,
        "samples",
        lambda row: None if (ms := to_the_first_batch(row)) is None else ms / 1e3,
    )
    for axes, what in ((left, "first epoch"), (right, "from ids to the first batch")):
        axes.set(xlabel=SERIES_HEAD["samples"], ylabel="CPU seconds", title=what)
    _legend(figure, left)
    return figure


def memory_against_samples(found: Mapping[str, Any]) -> Any:
    """Return the figure of memory by samples and by patches."""
    figure, (left, right) = _figure(1, 2, figsize=(10, 5.6), sharey=False)
    for axes, series in ((left, "samples"), (right, "patches")):
        _lines(axes, found, series, _seconds("peak_mb"))
        axes.set(xlabel=SERIES_HEAD[series], ylabel="peak memory, MB")
    middle = Case(**found["middle"])
    left.set_title(f"{middle.patches:,} patches")
    right.set_title(f"{middle.samples:,} samples")
    _legend(figure, left)
    return figure


def time_and_correctness(found: Mapping[str, Any]) -> Any:
    """Return the figure of an epoch of the shared case: its time, and whether it is correct."""
    rows, middle = looked_up(found), Case(**found["middle"])
    there = [rows[name, middle] for name in _shown(found) if (name, middle) in rows]
    there = [row for row in there if "batches" in row and not why_not(row)]
    there.sort(key=lambda row: row["epoch_s"], reverse=True)
    figure, (left, right) = _figure(
        1, 2, figsize=(9.5, 1.6 + 0.36 * len(there)), sharey=True, width_ratios=(2, 4)
    )
    own = [peer.name for peer in OURS]
    for place, row in enumerate(there):
        against = ratio(rows, row, UNGROUPED.name)
        shown = row["epoch_s"] * 1e3 if against is None else against
        left.barh(place, shown, 0.62, color=OURS_COLOUR if row["peer"] in own else "0.72")
        left.text(shown * 1.06, place, f"{shown:.2f}", va="center", fontsize=8)
        for column, (text, good) in enumerate(_judged(row)):
            right.text(
                column,
                place,
                f"{'✓' if good else '✗'} {text}".rstrip(),
                ha="center",
                va="center",
                fontsize=8,
                color=OK if good else NOT,
                fontweight="normal" if good else "bold",
            )
    left.set_yticks(range(len(there)), [row["peer"] for row in there], fontsize=8)
    left.set_xscale("log")
    left.margins(x=0.2)
    left.set_xlabel(f"first epoch / {UNGROUPED.name}")
    left.set_title("time (less is better)", fontsize=10)
    for side in ("top", "right"):
        left.spines[side].set_visible(False)
    heads = "one patch\nper batch", "each sample\nonce", "len()\nexact", "new batches\nper epoch"
    right.set(xlim=(-0.6, len(heads) - 0.4), ylim=(-0.6, len(there) - 0.4))
    right.xaxis.tick_top()
    right.set_xticks(range(len(heads)), heads, fontsize=8)
    right.tick_params(length=0, labelleft=False)
    right.set_frame_on(False)
    right.set_xlabel(str(middle), fontsize=8)
    return figure


def _judged(row: Row) -> list[tuple[str, bool]]:
    """Return the text of each check, and whether the sampler passed it."""
    uncovered = [f"{row[name]:,} {name}" for name in ("missed", "repeated") if row[name]]
    found_length = length(row)
    changed = members(row)
    return [
        (f"{row['mixed']:,} mixed" if row["mixed"] else "", not row["mixed"]),
        ("\n".join(uncovered), not uncovered),
        ("" if found_length == "exact" else found_length, found_length == "exact"),
        ("" if changed == "new" else changed, changed == "new"),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Print the table; draw pictures and fill the page if asked to."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.peers", description=__doc__)
    parser.add_argument("file", type=Path, help="results, as JSON")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="page with marks for tables")
    asked = parser.parse_args(arguments)
    found = json.loads(asked.file.read_text())
    print(everything(found))
    print(machine(found))
    if asked.pictures:
        for path in draw(found, asked.pictures):
            print(f"wrote {path}")
    if asked.markdown:
        put_into(asked.markdown, of_page(found))
        print(f"wrote {asked.markdown}")


if __name__ == "__main__":
    main()
