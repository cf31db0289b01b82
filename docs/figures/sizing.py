"""How full a budget's batches are, as bars: ``python -m docs.figures.sizing FILE PICTURE``.

FILE is what ``python -m benchmarks.sizing --out DIR`` has written; memory and peers must be in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.sizing import SHOWN


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw the fill of the budget: fixed beside budget, and the peers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    cases = [(name, case) for name, case in found["memory"].items() if ", core," in name]
    for row, (_, case) in enumerate(cases):
        one = next(one for one in case["by_size"] if one["fixed"] == SHOWN)
        for shift, key, colour in ((-0.2, "fill_fixed", "#c44e52"), (0.2, "fill", "#2a7f62")):
            left.barh(row + shift, one[key], 0.38, color=colour)
            left.text(one[key] + 0.01, row + shift, f"{one[key]:.2f}", va="center", fontsize=8)
    names = [
        f"{name.split(', ')[0]}, {case['points'][0]} to {case['points'][-1]:,} points,\n"
        f"{case['samples']:,} samples a patch"
        for name, case in cases
    ]
    left.set_yticks(range(len(cases)), names, fontsize=8)
    left.barh(0, 0, color="#c44e52", label=f"batch size {SHOWN}")
    left.barh(0, 0, color="#2a7f62", label="CostBudget of the same peak")
    left.set(xlim=(0, 1.02), xlabel="mean use of the budget", title="Groundwater patches")
    # Both bars are long at the bottom and short at the top, so the legend is below.
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.12))

    workload = found["peers"]["workloads"][1]
    there = [peer for peer in workload["peers"] if "missing" not in peer]
    for row, peer in enumerate(there):
        right.barh(row, peer["fill_padded"], 0.7, color="#d8d8d8")
        right.barh(row, peer["fill"], 0.7, color="#2a7f62" if row == 0 else "#4c72b0")
        text = f"{peer['fill']:.2f}, padded {peer['fill_padded']:.2f}, "
        text += f"{peer['mixed'] / peer['batches']:.0%} mixed" if peer["mixed"] else "one patch"
        right.text(max(peer["fill_padded"], 1) + 0.05, row, text, va="center", fontsize=7)
    right.axvline(1, color="black", linewidth=0.8)
    right.set_yticks(range(len(there)), [peer["name"] for peer in there], fontsize=7)
    right.set_xticks([0, 1, 2, 3])
    right.set(
        xlabel="use of the budget (grey: padded)",
        title=f"{workload['samples']:,} lengths in {workload['patches']} patches",
        xlim=(0, 5.5),
    )
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Draw a file of figures."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.sizing", description=__doc__)
    parser.add_argument("file", type=Path, help="figures, as JSON")
    parser.add_argument("picture", type=Path, help="PNG or SVG")
    asked = parser.parse_args(arguments)
    draw(json.loads(asked.file.read_text()), asked.picture)


if __name__ == "__main__":
    main()
