"""The pictures of the pages on real data; `docs.figures.real_data` draws them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np

from docs.figures.real_data import WIDTH, Padding, Shares, buckets, load, quarters, sizes_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#9bd3c0", "#4c9f86", "#2a7f62", "#17503d")
WASTES = ("#c44e52", "#7d2a2e")
DPI = 110


def panels() -> tuple[Any, Any, Any]:
    """Return a figure of two panels side by side."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.5, 3.6), layout="constrained", width_ratios=(1, 1.15)
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure, left, right


def shares_of_padding(axes: Any, rows: list[Padding], powers: dict[int, str]) -> None:
    """Draw the fraction of padding of each row, one bar per power."""
    height = 0.8 / len(powers)
    for number, (power, label) in enumerate(powers.items()):
        for place, row in enumerate(rows):
            share = row.share(power)
            y = place + (number - (len(powers) - 1) / 2) * height
            axes.barh(y, share, height, color=WASTES[number], label=label if place == 0 else None)
            axes.text(share + 0.01, y, f"{share:.1%}", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    most = max(row.share(power) for row in rows for power in powers)
    axes.set(xlabel="padding / all entries", xlim=(0, 1.15 * most), title="Padding of batches")
    axes.legend(frameon=False, loc="lower right")


def draw_lengths(rows: list[Padding], path: Path) -> None:
    """Draw the lengths of the utterances, and the padding of batches."""
    lengths = sizes_of("vowels")
    figure, left, right = panels()
    values, counts = np.unique(lengths, return_counts=True)
    for value, count, bucket in zip(values, counts, buckets(values), strict=True):
        left.bar(value, count, color=COLOURS[bucket % 2 * 2], width=0.85)
    left.set(
        xlabel=f"frames (shades: buckets of {WIDTH} lengths)",
        ylabel="utterances",
        title=f"{lengths.size} utterances by length",
    )
    shares_of_padding(right, rows, {1: "frames"})
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_atoms(rows: list[Padding], path: Path) -> None:
    """Draw the number of molecules of each size, and the padding of batches."""
    atoms = sizes_of("molecules")
    figure, left, right = panels()
    values, counts = np.unique(atoms, return_counts=True)
    left.bar(values, counts, color=COLOURS[2], width=0.85)
    for value, count in zip(values, counts, strict=True):
        left.text(value, count + 0.4, str(count), ha="center", fontsize=8)
    left.set(xlabel="atoms", ylabel="molecules", title="G2: molecules by size")
    left.set_xticks(values)
    shares_of_padding(right, rows, {1: "atoms", 2: "pairs of atoms"})
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_storms(rows: list[Shares], path: Path) -> None:
    """Draw the lengths of the storms, and the quarters that an epoch's batches come from."""
    counts = np.bincount(load("storms")["storm"])
    figure, left, right = panels()
    edges = np.arange(0, counts.max() + 6, 5) + 0.5
    parts = quarters(counts)
    left.hist([counts[part] for part in parts], edges, stacked=True, color=COLOURS[: len(parts)])
    left.set(
        xlabel="observations per storm (shades: quarters)",
        ylabel="storms",
        title=f"{counts.size} storms by length",
    )
    for place, row in enumerate(rows):
        begin = 0.0
        for quarter, share in enumerate(row.by_quarter):
            right.barh(place, share, left=begin, color=COLOURS[quarter])
            ink = "white" if quarter else "black"
            middle = begin + share / 2
            right.text(
                middle, place, f"{share:.0%}", ha="center", va="center", fontsize=8, color=ink
            )
            begin += share
    right.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    right.invert_yaxis()
    right.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    right.set(
        xlabel="shortest quarter … longest quarter",
        xlim=(0, 1),
        title="Batches per epoch, by length of the storm",
    )
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
