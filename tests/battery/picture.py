"""Draw bias against rounds: ``python -m tests.battery.picture POWER.json ROUNDS.png``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

NOISE = 3.0
"""Standard deviations below which a measured bias counts as chance."""


def draw(found: dict, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    colours = plt.colormaps["viridis"](np.linspace(0, 0.88, len(found)))
    samples = next(iter(found.values()))["bias"][0]["samples"]
    floor = NOISE * 1e6 / samples
    for colour, curve in zip(colours, found.values(), strict=True):
        seen = [point for point in curve["bias"] if point["z"] > NOISE]
        rounds = [point["rounds"] for point in seen]
        per_million = [point["z"] * 1e6 / point["samples"] for point in seen]
        name = f"n = {curve['n']:,}".replace(",", "\u2009")
        axes.plot(rounds, per_million, "o-", color=colour, label=name, ms=5)
        axes.axvline(curve["chosen"], color=colour, lw=0.8, ls=":")
        last = curve["bias"][-1]
        height = max(abs(last["z"]), 0.3) * 1e6 / last["samples"]
        axes.plot(curve["chosen"], height, "v", color=colour, mfc="white", ms=9)
    axes.axhspan(1e-2, floor, color="0.9", zorder=0)
    axes.text(2.05, floor / 1.25, "not distinguishable from chance", va="top", fontsize=8)
    axes.plot([], [], "v", color="0.3", mfc="white", ms=9, label="chosen rounds R(n)")
    axes.set(
        yscale="log",
        ylim=(1e-2, None),
        xticks=range(2, 13),
        xlabel="rounds",
        ylabel="bias, standard deviations per 10$^6$ permutations",
        title="Distance between the images of two positions in one column",
    )
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0.62, 1.0))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
