"""How long ranks wait for the slowest rank: ``python -m docs.figures.steps [--picture PATH]``.

Nothing is trained. A batch costs its samples times its patch's cost per sample, and a step takes as
long as the most expensive batch of its ranks. The time of an epoch is the sum over its steps,
divided by the time if the ranks divided the epoch's cost evenly and never waited. Steps of one
patch repeat some batches, which is included in their time.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import markdown
from gpusampler import EpochPlan, PatchGroups
from gpusampler.plan.epoch_plan import STEPS

EPOCHS = 5
DRAWS = 5
BATCH_SIZE = 32
SIGMAS = (0.5, 1.0)
PATCHES = (50, 500)
RANKS = (8, 64)
BLOCK = 8192
"""Slots per call, as in iteration."""


class Workload(NamedTuple):
    """Patches with their sizes, and the cost of a sample of each."""

    groups: PatchGroups
    costs: np.ndarray
    batch_size: int

    def plan(self, steps: str, ranks: int) -> EpochPlan:
        return EpochPlan(
            self.groups,
            self.batch_size,
            seed=0,
            steps=steps,
            step_width=1 if steps == "free" else ranks,
            patch_costs=self.costs if steps == "balanced" else None,
        )


class Waiting(NamedTuple):
    """Time of an epoch, 1 if no rank ever waits; and the fraction of repeated batches."""

    time: float
    padding: float


class Case(NamedTuple):
    """A row of the table: the mean of several workloads."""

    name: str
    workloads: list[Workload]
    ranks: int


def lognormal(patches: int, sigma: float, drawn: int = 0) -> Workload:
    """Patches of 200 to 1,800 samples, with lognormal costs per sample."""
    rng = np.random.default_rng([patches, round(10 * sigma), drawn])
    counts = rng.integers(200, 1801, patches)
    return Workload(PatchGroups.from_counts(counts), rng.lognormal(0, sigma, patches), BATCH_SIZE)


def groundwater() -> Workload:
    """The groundwater patches in the package; a sample costs its number of points."""
    from gpusampler.demo.embedded import small_data
    from gpusampler.groundwater import GWPatchDataset

    dataset = GWPatchDataset(small_data(), 6, 1)
    groups = PatchGroups.from_ids(dataset.get_all_patch_ids())
    costs = dataset.patch_costs()
    return Workload(groups, np.array([costs[int(p)] for p in groups.patch_ids], np.float64), 4)


def waiting(workload: Workload, steps: str, ranks: int, epochs: int = EPOCHS) -> Waiting:
    """Return the mean time over a few epochs, and the fraction of repeated batches."""
    plan = workload.plan(steps, ranks)
    own = int(plan.own_batches_by_patch.sum())
    ideal = float((workload.groups.counts * workload.costs).sum()) / ranks
    # As with uneven="pad": the first slots are repeated, so that all ranks have equally many.
    slots = np.arange(-(-plan.num_batches // ranks) * ranks) % plan.num_batches
    took = []
    for epoch in range(epochs):
        at = plan.evaluator.locate(epoch, slots)
        costs = workload.costs[at.group] * at.size
        took.append(float(costs.reshape(-1, ranks).max(axis=1).sum()) / ideal)
    return Waiting(float(np.mean(took)), plan.num_batches / own - 1)


def microseconds(workload: Workload, steps: str, ranks: int) -> float:
    """Return the time to locate a slot, the best of several rounds."""
    plan = workload.plan(steps, ranks)
    slots = np.arange(BLOCK) % plan.num_batches
    plan.evaluator.locate(0, slots)
    rounds = []
    for epoch in range(15):
        start = time.perf_counter()
        plan.evaluator.locate(epoch, slots)
        rounds.append(time.perf_counter() - start)
    return min(rounds) / BLOCK * 1e6


def cases(sizes: tuple[int, ...] = PATCHES) -> list[Case]:
    """Return the rows of the table."""
    rows = []
    for sigma in SIGMAS:
        for patches in sizes:
            workloads = [lognormal(patches, sigma, drawn) for drawn in range(DRAWS)]
            name = f"lognormal, sigma {sigma}, {patches} patches"
            rows += [Case(name, workloads, ranks) for ranks in RANKS]
    own = groundwater()
    low, high = own.costs.min(), own.costs.max()
    name = f"groundwater, {low:.0f} to {high:.0f} points, {own.costs.size} patches"
    return rows + [Case(name, [own], ranks) for ranks in (2, 4, 8)]


def table(rows: list[Case]) -> list[tuple[Case, dict[str, Waiting]]]:
    """Measure every row."""
    out = []
    for case in rows:
        by_steps = {}
        for steps in STEPS:
            found = [waiting(workload, steps, case.ranks) for workload in case.workloads]
            by_steps[steps] = Waiting(*np.mean(found, axis=0).tolist())
        out.append((case, by_steps))
    return out


def row_of(case: Case, by_steps: dict[str, Waiting]) -> str:
    """Return a row of the table as Markdown."""
    times = [f"{one.time:.2f}" for one in by_steps.values()]
    repeated = f"{by_steps['same_patch'].padding:.0%}"
    return markdown.row([case.name, case.ranks, *times, repeated])


def draw(found: list[tuple[Case, dict[str, Waiting]]], path: Path) -> None:
    """Draw the table as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"free": "#c44e52", "balanced": "#2a7f62", "same_patch": "#4c72b0"}
    figure, axes = plt.subplots(figsize=(7.5, 6.2), layout="constrained")
    height = 0.26
    labels = []
    for row, (case, by_steps) in enumerate(found):
        labels.append(f"{case.name}\non {case.ranks} ranks")
        for place, (steps, one) in enumerate(by_steps.items()):
            y = row + (place - 1) * height
            # From 1, which is no waiting at all, to the right.
            axes.barh(y, one.time - 1, height, left=1, color=colours[steps])
            axes.text(one.time + 0.02, y, f"{one.time:.2f}", va="center", fontsize=7)
    for steps, colour in colours.items():
        axes.barh(0, 0, color=colour, label=f'steps="{steps}"')
    axes.set(
        xlabel="time (1 = no rank ever waits)",
        title="Time of an epoch, with the time that ranks wait",
        xlim=(1, None),
    )
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and draw the first with ``--picture``."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.steps", description=__doc__)
    parser.add_argument("--picture", type=Path, help="draw the first table there (PNG or SVG)")
    asked = parser.parse_args(arguments)
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    print("time of an epoch, 1 = no rank ever waits")
    print(f"mean of {EPOCHS} epochs, and of {DRAWS} draws of lognormal costs\n")
    print(markdown.head(("patches", "ranks", *STEPS, "same_patch: repeated batches")))
    found = table(cases())
    print(*(row_of(*row) for row in found), sep="\n")
    print(f"\nmicroseconds per slot, {BLOCK:,} slots per call, 8 ranks\n")
    print(markdown.head(("patches", *STEPS)))
    for patches in PATCHES:
        workload = lognormal(patches, 1.0)
        took = [f"{microseconds(workload, steps, 8):.3f}" for steps in STEPS]
        print(markdown.row([patches, *took]))
    if asked.picture:
        draw(found, asked.picture)


if __name__ == "__main__":
    main()
