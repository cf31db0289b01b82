"""Pictures of the batches of an epoch: ``python -m docs.figures.epochs --out docs/img``.

The sampler makes all batches that are drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from gpusampler import PatchBatchSampler, Temperature

NAMES = ("clay", "sand", "silt")
COLOURS = ("#b3502e", "#d9a441", "#2a7f77")
GREY = "#e4e4e4"
COUNTS = (56, 40, 24)
BATCH_SIZE = 8
SEED = 42
DPI = 110


def tutorial_ids() -> np.ndarray:
    """Return the ids of the tutorial: three soils, in no order."""
    return np.random.default_rng(0).permutation(np.repeat(NAMES, COUNTS))


def sampler_of(ids: np.ndarray, **settings: Any) -> PatchBatchSampler:
    return PatchBatchSampler(ids, BATCH_SIZE, seed=SEED, **settings)


def places_of(ids: np.ndarray) -> np.ndarray:
    """Return each sample's place among the samples of its patch."""
    places = np.empty(ids.size, np.int64)
    for name in np.unique(ids):
        places[ids == name] = np.arange(np.count_nonzero(ids == name))
    return places


def shades(ids: np.ndarray) -> np.ndarray:
    """Return a colour for each sample: its patch's, the darker the later it is in the patch."""
    from matplotlib.colors import to_rgb

    names = sorted(set(ids.tolist()))
    counts = {name: np.count_nonzero(ids == name) for name in names}
    out = np.empty((ids.size, 3))
    for sample, (name, place) in enumerate(zip(ids.tolist(), places_of(ids), strict=True)):
        colour = np.array(to_rgb(COLOURS[names.index(name)]))
        light = 0.75 * (1 - place / counts[name])
        out[sample] = colour + (1 - colour) * light
    return out


def box(axes: Any, x: float, y: float, colour: Any, width: float = 1, height: float = 1) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", lw=0.8))


def epoch_picture(path: Path) -> None:
    """Draw the effect of the shuffles: the batches of an epoch as columns of samples."""
    ids = tutorial_ids()
    colour = shades(ids)
    plt = pyplot()
    rows = [
        ("epoch 0", sampler_of(ids), 0),
        ("epoch 1", sampler_of(ids), 1),
        ("epoch 0, interleave=False", sampler_of(ids, interleave=False), 0),
        (
            "shuffle_within_batches=False, shuffle_patches=False",
            sampler_of(ids, shuffle_within_batches=False, shuffle_patches=False),
            0,
        ),
    ]
    figure, axes = plt.subplots(
        5, 1, figsize=(7.5, 8.2), height_ratios=[0.42, 1, 1, 1, 1], layout="constrained"
    )
    strip = axes[0]
    width = 15 / ids.size
    for sample in range(ids.size):
        box(strip, sample * width, 0, colour[sample], width)
    strip.set_ylim(0, 1)
    strip.set_title("dataset: 120 samples; darker: later in the patch", fontsize=9)
    for axis, (title, sampler, epoch) in zip(axes[1:], rows, strict=True):
        for slot, batch in enumerate(sampler.batches(epoch)):
            for row, sample in enumerate(batch.indices):
                box(axis, slot, BATCH_SIZE - 1 - row, colour[sample])
            axis.text(slot + 0.5, -0.35, str(slot), ha="center", va="top", fontsize=7)
        axis.set_ylim(-1.6, BATCH_SIZE)
        axis.set_title(title, fontsize=9)
    for axis in axes:
        axis.set_xlim(-0.1, 15.1)
        axis.axis("off")
    note = "slot; one column is one batch of 8 samples"
    axes[-1].text(7.5, -1.9, note, ha="center", va="top", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=one) for one in COLOURS]
    figure.legend(handles, NAMES, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def idea_picture(path: Path, slot: int = 12, epoch: int = 0) -> None:
    """Draw how a slot leads to samples, through two keyed permutations and two tables."""
    ids = tutorial_ids()
    plan = sampler_of(ids).plan
    groups = plan.groups
    at = plan.evaluator.locate(epoch, np.array([slot]))
    group, j = int(at.group[0]), int(at.j[0])
    first = np.concatenate([[0], np.cumsum(plan.batches_by_patch)])
    batch = int(first[group]) + j
    block = plan.evaluate(epoch, [slot])
    samples = np.asarray(block.indices)[0, : int(block.lengths[0])]
    # A patch's samples stand in the order by patch from its offset on.
    offset, count = int(groups.offsets[group]), int(groups.counts[group])
    drawn = offset + places_of(ids)[samples]
    asked = offset + j * BATCH_SIZE + np.arange(samples.size)

    figure, axes = pyplot().subplots(figsize=(7.5, 6.6), layout="constrained")
    colour = COLOURS[group]
    total, wide = plan.num_batches, 120 / plan.num_batches
    of_patch = np.repeat(range(3), COUNTS)
    names = sorted(set(ids.tolist()))

    def row(y: float, title: str, cells: list[Any], width: float) -> None:
        for x, cell in enumerate(cells):
            box(axes, x * width, y, cell, width, 4)
        on_white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.9}
        axes.text(0, y + 5, title, fontsize=9, va="bottom", bbox=on_white, zorder=5)

    def arrow(x: float, y: float, to: float, below: float, thin: bool = False) -> None:
        style = {"color": colour, "lw": 0.9 if thin else 1.8, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (to, below), (x, y), arrowprops={"arrowstyle": "->", **style})

    def rule(y: float, text: str) -> None:
        axes.text(124, y, text, fontsize=8.5, va="center", style="italic")

    slots = [colour if x == slot else GREY for x in range(total)]
    row(72, f"slots 0 to {total - 1} of epoch {epoch}: slot {slot} is requested", slots, wide)

    def marked(patches: Any, which: Any) -> list[Any]:
        return [COLOURS[g] if x in which else light(COLOURS[g]) for x, g in enumerate(patches)]

    of_batch = np.repeat(range(3), plan.batches_by_patch)
    title = f"batches, ordered by patch: number {batch} is batch {j} of {names[group]}"
    row(54, title, marked(of_batch, [batch]), wide)
    row(36, "positions, ordered by patch: the 8 of this batch", marked(of_patch, asked), 1)
    row(18, "the 8 positions after the permutation of the patch", marked(of_patch, drawn), 1)
    of_sample = [names.index(name) for name in ids.tolist()]
    row(0, "samples of the dataset", marked(of_sample, samples), 1)
    arrow((slot + 0.5) * wide, 72, (batch + 0.5) * wide, 58)
    arrow((batch + 0.5) * wide, 54, float(asked.mean()) + 0.5, 40)
    for place, image, sample in zip(asked, drawn, samples, strict=True):
        arrow(place + 0.5, 36, image + 0.5, 22, thin=True)
        arrow(image + 0.5, 18, sample + 0.5, 4, thin=True)
    rule(65, "1. permutation\nkeyed by seed, epoch")
    rule(47, "2. search in the\ncumulative counts\nof batches")
    rule(29, f"3. permutation of {count}\nkeyed by seed,\nepoch, patch")
    rule(11, "lookup in the\norder by patch,\ncomputed once")
    axes.set(xlim=(-1, 152), ylim=(-1, 80))
    axes.axis("off")
    save(figure, path)


def light(colour: str) -> np.ndarray:
    from matplotlib.colors import to_rgb

    return 1 - (1 - np.array(to_rgb(colour))) * 0.22


def slots_picture(path: Path) -> None:
    """Draw the rank of each slot: one rank, two ranks, and two ranks resumed as three."""
    ids = tutorial_ids()
    names = sorted(set(ids.tolist()))
    whole = list(sampler_of(ids).batches(0))
    slot_of = {tuple(batch.indices.tolist()): slot for slot, batch in enumerate(whole)}

    def taken_by(ranks: list[Iterator[list[int]]], steps: int | None = None) -> dict[int, int]:
        """Return which rank takes each slot."""
        return {
            slot_of[tuple(batch)]: rank
            for rank, batches in reversed([*enumerate(ranks)])
            for batch in islice(batches, steps)
        }

    def world(ranks: int, state: dict[str, Any] | None = None) -> list[Iterator[list[int]]]:
        samplers = [sampler_of(ids, num_replicas=ranks, rank=rank) for rank in range(ranks)]
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
        return [iter(sampler) for sampler in samplers]

    two = world(2)
    begun = taken_by(two, steps=3)
    state = two[0].state_dict()
    stop = state["slot"]
    lines = {
        "one rank": taken_by(world(1)),
        "two ranks": taken_by(world(2)),
        "two ranks stop after 3 steps, three ranks resume": begun | taken_by(world(3, state)),
    }
    figure, axes = pyplot().subplots(figsize=(7.5, 3.3), layout="constrained")
    for line, (title, taken) in enumerate(lines.items()):
        y = 2 * (len(lines) - 1 - line)
        for slot, batch in enumerate(whole):
            box(axes, slot, y, COLOURS[names.index(batch.patch_id)])
            axes.text(slot + 0.5, y + 0.5, taken[slot], ha="center", va="center", color="white")
        axes.text(0, y + 1.1, title, fontsize=9, va="bottom")
        if line == 2:
            axes.plot([stop, stop], [y - 0.15, y + 1.15], color="black", lw=2)
    axes.text(0, -0.25, "slots 0 to 14 of epoch 0; color: patch, number: rank",
              fontsize=8.5, va="top")  # fmt: skip
    axes.set(xlim=(-0.1, 15.1), ylim=(-0.9, 5.7))
    axes.axis("off")
    save(figure, path)


def mixture_picture(path: Path) -> None:
    """Draw epochs of 60 batches from three datasets, by temperature."""
    ids = np.repeat(["river", "rain", "well"], [8000, 1200, 160])
    names = sorted(set(ids.tolist()))
    figure, axes = pyplot().subplots(figsize=(7.5, 3.0), layout="constrained")
    temperatures = (1, 2, 5, float("inf"))
    for line, temperature in enumerate(temperatures):
        y = 2 * (len(temperatures) - 1 - line)
        sampler = sampler_of(ids, weights=Temperature(temperature), epoch_batches=60)
        taken = [names.index(batch.patch_id) for batch in sampler.batches(0)]
        for slot, group in enumerate(taken):
            box(axes, slot, y, COLOURS[group])
        shares = ", ".join(f"{taken.count(g)} {name}" for g, name in enumerate(names))
        axes.text(0, y + 1.1, f"Temperature({temperature}): {shares}", fontsize=9, va="bottom")
    axes.set(xlim=(-0.1, 60.1), ylim=(-0.1, 8))
    axes.axis("off")
    save(figure, path)


SHAPES = ((16, 16), (16, 24), (24, 16), (16, 32), (32, 16))
OFTEN = (0.1, 0.4, 0.3, 0.12, 0.08)
SHAPE_COLOURS = ("#7a5195", "#2a7f77", "#d9a441", "#b3502e", "#4c72b0")


def shapes_picture(path: Path, rows: int = 6) -> None:
    """Draw images of several shapes in batches: random and padded, and one shape per batch."""
    # The images of how-to/aspect-ratio-buckets.md.
    kinds = np.random.default_rng(0).choice(len(SHAPES), 403, p=OFTEN)
    names = np.array([f"{height}x{width}" for height, width in SHAPES])[kinds]
    freely = np.random.default_rng(SEED).permutation(kinds.size)
    sides = {
        "random batches, padded": [freely[i : i + 8] for i in range(0, 8 * rows, 8)],
        "one shape per batch": list(islice(sampler_of(names), rows)),
    }
    figure, both = pyplot().subplots(1, 2, figsize=(7.5, 3.6), layout="constrained")
    for axes, (title, batches) in zip(both, sides.items(), strict=True):
        used = padded = 0
        for line, batch in enumerate(batches):
            high, wide = np.array([SHAPES[k] for k in kinds[batch]]).max(axis=0).tolist()
            for column, k in enumerate(kinds[batch].tolist()):
                x, y = 36 * column, -36 * line
                height, width = SHAPES[k]
                box(axes, x, y - high, "#c9c9c9", wide, high)
                box(axes, x, y - height, SHAPE_COLOURS[k], width, height)
                used, padded = used + height * width, padded + high * wide
        axes.set_title(f"{title}: {1 - used / padded:.0%} padding", fontsize=9)
        axes.set(xlim=(-2, 36 * 8), ylim=(-36 * rows, 2), aspect="equal")
        axes.axis("off")
    save(figure, path)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    pyplot().close(figure)


PICTURES = {
    "epoch": epoch_picture,
    "idea": idea_picture,
    "slots": slots_picture,
    "mixture": mixture_picture,
    "shapes": shapes_picture,
}


def main(arguments: list[str] | None = None) -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.figures.epochs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    folder = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(folder / f"{name}.png")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
