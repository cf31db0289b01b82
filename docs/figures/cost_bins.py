"""How full cost bins make batches: ``python -m docs.figures.cost_bins``.

One epoch of a plan is evaluated for each rule that divides patches by the costs of their samples.
*used*: the sum of the costs of a batch's samples, divided by the budget. *padded*: the number of
samples times the largest cost, divided by the budget. *bins*: bins per patch. *single*: fraction of
the samples that are in a bin of one batch, which has the same samples in every epoch. *batches*:
batches per bin, weighted by samples. *left out*: fraction of the samples.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from gpusampler import EpochPlan, PatchGroups
from gpusampler.batching import cost_bins, steps
from gpusampler.batching.cost_budget import CostBudget

SIZES = ((1, 5000), (10, 5000), (10, 500), (100, 100), (1000, 20))
MEAN_BATCH = (8, 32)


def lognormal(random: np.random.Generator, size: int) -> np.ndarray:
    return 100 * np.exp(random.normal(0, 0.6, size))


def uniform(random: np.random.Generator, size: int) -> np.ndarray:
    return random.uniform(50, 500, size)


def utterances(random: np.random.Generator, size: int) -> np.ndarray:
    """Lengths of read speech: most recordings were cut at about 15 s, the rest have any length."""
    whole = np.minimum(random.normal(14.3, 1.3, size), 17)
    rest = random.uniform(1.3, 14, size)
    return np.where(random.random(size) < 0.6, whole, rest)


def words(random: np.random.Generator, size: int) -> np.ndarray:
    """Tokens of documents: many short documents, and a long tail."""
    return np.maximum(4, random.gamma(1.2, 180, size)).astype(np.int64)


LENGTHS = {f.__name__: f for f in (lognormal, uniform, utterances, words)}


def merged_upwards(classes: Any, sizes: Any, num_patches: int, *rest: Any) -> Any:
    """Merge a bin into the next more expensive one if it fills no batch of that one's size."""
    last, held = np.zeros(sizes.size, bool), 0
    for row in range(sizes.size):
        held += classes.counts[row]
        ends = row + 1 == sizes.size or classes.patches[row] != classes.patches[row + 1]
        if ends or held >= sizes[row + 1]:
            last[row], held = True, 0
    return last


@contextmanager
def changed(**values: Any) -> Iterator[None]:
    """Change constants of the rule temporarily."""
    # The width of a cost class is a constant of `steps`.
    places = {name: steps if name == "MANTISSA_BITS" else cost_bins for name in values}
    before = {name: getattr(place, name) for name, place in places.items()}
    for name, value in values.items():
        setattr(places[name], name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(places[name], name, value)


RULES: dict[str, dict[str, Any]] = {
    "one size per patch": {"_bin_ends": lambda c, s, *rest: np.diff(c.patches, append=-1) != 0},
    "1/8 octave, merged upwards": {"_bin_ends": merged_upwards},
    "every bin that saves a batch": {"MIN_COUNTED_BATCHES": 1},
    "this rule, 2 bits": {"MANTISSA_BITS": 2},
    "this rule": {},
    "this rule, 4 bits": {"MANTISSA_BITS": 4, "MAX_SIZE_CLASSES": 512},
}


class Found(NamedTuple):
    """A row of the table."""

    used: float
    padded: float
    bins: float
    single: float
    batches: float
    left_out: float


def measured(groups: PatchGroups, costs: np.ndarray, mean_batch: int, partial: str) -> Found:
    """Return the means over the batches of one epoch."""
    most = max(float(costs.mean()) * mean_batch, float(costs.max()))
    budget = CostBudget(most, sample_costs=costs)
    plan = EpochPlan(groups, budget, seed=0, partial=partial)
    locations = plan.evaluator.locate(0, np.arange(plan.num_batches))
    block = plan.evaluator.ragged(0, locations)
    cost = costs[block.samples]
    starts, length = block.ends - block.sizes, block.lengths
    total = np.add.reduceat(cost, starts)
    padded = np.maximum.reduceat(cost, starts) * length
    assert max(total.max(), padded.max()) <= most
    counts, sizes = plan.tables.counts, plan.tables.sizes
    batches = -(-counts // sizes)
    return Found(
        float(total.mean() / most),
        float(padded.mean() / most),
        counts.size / groups.num_patches,
        float(counts[batches == 1].sum() / counts.sum()),
        float((counts * batches).sum() / counts.sum()),
        1 - block.samples.size / counts.sum(),
    )


def table(lengths: Callable[..., np.ndarray], patches: int, size: int, mean: int, partial: str):
    random = np.random.default_rng(1)
    costs = lengths(random, patches * size)
    groups = PatchGroups.from_counts([size] * patches)
    for name, rule in RULES.items():
        with changed(**rule):
            yield name, measured(groups, costs, mean, partial)


def main() -> None:
    """Print a table for each distribution of lengths."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.figures.cost_bins", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--partial", default="keep", choices=("keep", "drop", "pad"))
    partial = parser.parse_args().partial
    print(f"{platform.processor() or platform.machine()}, NumPy {np.__version__}, {partial=}")
    for name, lengths in LENGTHS.items():
        for patches, size in SIZES:
            for mean in MEAN_BATCH:
                if 2 * mean > size:
                    continue
                print(f"\n{name}, {patches} patches of {size}, mean batch of {mean}")
                print(f"{'':28}  used  padded    bins  single  batches  left out")
                for rule, found in table(lengths, patches, size, mean, partial):
                    print(
                        f"{rule:28} {found.used:5.3f}   {found.padded:5.3f} {found.bins:7.1f} "
                        f"{found.single:7.3f} {found.batches:8.1f} {found.left_out:9.3f}"
                    )
    random = np.random.default_rng(1)
    costs = lognormal(random, 10**7)
    for patches in (1, 1000, 100_000, 1_000_000):
        groups = PatchGroups.from_ids(random.integers(0, patches, 10**7))
        budget = CostBudget(max(800.0, float(costs.max())), sample_costs=costs)
        start = time.perf_counter()
        cost_bins.cut_into_bins(groups, budget, partial)
        took = time.perf_counter() - start
        print(f"\n1e7 samples of {patches} patches: {took:.2f} s", end="")
    print()


if __name__ == "__main__":
    main()
