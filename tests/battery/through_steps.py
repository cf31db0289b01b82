"""Are steps in random order, and batches inside their classes? Asked of small epochs.

An epoch here is cut into classes of given sizes, one patch each, of batches of one sample. What is
looked at is the order of the batches, each named by its place in the natural order.
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial, prod
from typing import NamedTuple

import numpy as np

from gpusampler import EpochPlan, PatchGroups
from gpusampler.core.devices import HOST
from gpusampler.plan.evaluators.array import ArrayEvaluator
from gpusampler.plan.evaluators.base import EvaluatorSettings

from . import statistics
from .single import rank
from .statistics import Result

SEEDS = 4
LANES = 1 << 18
"""Slots evaluated at a time."""


class Epoch(NamedTuple):
    """Batches of each class, cheapest class first, and the slots of a step."""

    sizes: tuple[int, ...]
    width: int

    @property
    def total(self) -> int:
        return sum(self.sizes)

    @property
    def full(self) -> int:
        return self.total // self.width

    @property
    def short(self) -> int:
        return self.total % self.width

    def plan(self, seed: int) -> EpochPlan:
        return EpochPlan(
            PatchGroups.from_counts(self.sizes),
            1,
            seed,
            steps="balanced",
            step_width=self.width,
            patch_costs=[2.0**c for c in range(len(self.sizes))],
        )


Orders = Callable[[Epoch, int, np.ndarray], np.ndarray]
"""Takes an epoch's shape, a seed and epochs (K,) to orders (K, M)."""


def of_the_package(shape: Epoch, seed: int, epochs: np.ndarray) -> np.ndarray:
    """The orders that the package has, many epochs at once by its array form."""
    plan = shape.plan(seed)
    settings = EvaluatorSettings(
        shuffle_samples=True, shuffle_batches=True, interleave=True, pad=False
    )
    reference = ArrayEvaluator(plan._tables, HOST, settings)
    before = np.cumsum([0, *shape.sizes[:-1]])
    out = np.empty((epochs.size, shape.total), np.int64)
    slots = np.arange(shape.total)
    step = max(LANES // shape.total, 1)
    for first in range(0, epochs.size, step):
        some = epochs[first : first + step]
        group, j, _ = reference.locate(
            plan.evaluator.streams, np.repeat(some, shape.total), np.tile(slots, some.size), None
        )
        out[first : first + step] = (before[group] + j).reshape(some.size, shape.total)
    return out


def by_sorting(shape: Epoch, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Orders that sorted random numbers make, of the same structure."""
    rng = np.random.default_rng([seed, int(epochs[0]), shape.total, shape.width])
    number = epochs.size
    full, width, short = shape.full, shape.width, shape.short
    steps = rng.random((number, full)).argsort(axis=1)
    last = (rng.integers(0, shape.total, (number, 1)) + np.arange(short)) % shape.total
    places = (steps[:, :, None] * width + np.arange(width)).reshape(number, full * width)
    # What is left of the natural order, in order.
    taken = np.zeros((number, shape.total), bool)
    np.put_along_axis(taken, last, True, axis=1)
    left = taken.argsort(axis=1, kind="stable")
    order = np.concatenate([np.take_along_axis(left, places, axis=1), last], axis=1)
    inside = np.empty((number, shape.total), np.int64)
    first = 0
    for size in shape.sizes:
        inside[:, first : first + size] = first + rng.random((number, size)).argsort(axis=1)
        first += size
    return np.take_along_axis(inside, order, axis=1)


def uniform(name: str, n: int, codes: np.ndarray, cells: int) -> Result:
    """Are all codes equally frequent, of which there are so many?"""
    _, counts = np.unique(codes, return_counts=True)
    if counts.size > cells:
        return Result(name, n, int(codes.size), 0.0, np.inf)
    counts = np.concatenate([counts, np.zeros(cells - counts.size, np.int64)])
    return statistics.chi_squared(name, n, counts, np.full(cells, 1 / cells))


# Orders that are all equally likely, and how many there are.
WHOLE = {
    "a class": (Epoch((5,), 5), 120),
    "a class over steps": (Epoch((4,), 2), 24),
    "a class and a short step": (Epoch((5,), 2), 120),
    "steps of one": (Epoch((1,) * 4, 1), 24),
    "steps and a short one": (Epoch((1,) * 7, 2), 6 * 7),
    "one step and a short one": (Epoch((1,) * 5, 3), 5),
    "a class a step": (Epoch((2, 2, 2), 2), 6 * 8),
    "classes of a step": (Epoch((3, 3), 6), 36),
    "steps and large classes": (Epoch((3, 3, 3), 3), 6 * 6**3),
}


def whole(orders: Orders, samples: int) -> list[Result]:
    """All orders of an epoch are equally likely: nothing in them depends on anything else."""
    out = []
    each = np.arange(samples // SEEDS)
    for name, (shape, cells) in WHOLE.items():
        assert cells == expected_cells(shape)
        found = np.concatenate([orders(shape, seed, each) for seed in range(SEEDS)])
        out.append(uniform(f"whole: {name}", shape.total, rank(found), cells))
    return out


def expected_cells(shape: Epoch) -> int:
    """Orders that an epoch can have; a class in several steps has all of its own."""
    if len(shape.sizes) == 1:
        return factorial(shape.total)
    places_of_short = shape.total if shape.short else 1
    return factorial(shape.full) * places_of_short * prod(map(factorial, shape.sizes))


def couples(orders: Orders, samples: int) -> list[Result]:
    """Neighbouring epochs and seeds have nothing to do with one another."""
    out = []
    each = np.arange(samples // SEEDS)
    for name, shape in {"class": Epoch((3,), 3), "steps": Epoch((1,) * 3, 1)}.items():
        found = np.stack([rank(orders(shape, seed, each)) for seed in range(2 * SEEDS)])
        pairs = {
            "e | e+1": (found[:, :-1:2], found[:, 1::2]),
            "s | s+1": (found[::2], found[1::2]),
            "s,e+1 | s+1,e": (found[::2, 1:], found[1::2, :-1]),
        }
        for pair, (one, other) in pairs.items():
            out.append(uniform(f"couple: {name}, {pair}", 3, (one * 6 + other).ravel(), 36))
    return out


GRID = 40
"""Beyond the small form of the permutation."""


def grids(orders: Orders, samples: int) -> list[Result]:
    """Large classes: two places of one, and the same place of two."""
    each = np.arange(samples // SEEDS)

    def found(shape: Epoch) -> np.ndarray:
        return np.concatenate([orders(shape, seed, each) for seed in range(SEEDS)])

    one, steps = found(Epoch((GRID,), GRID)), found(Epoch((1,) * GRID, 1))
    two = found(Epoch((GRID, GRID), 2 * GRID))
    return [
        uniform("grid: a class", GRID, one[:, 0] * GRID + one[:, 1], GRID * (GRID - 1)),
        uniform("grid: steps", GRID, steps[:, 0] * GRID + steps[:, 1], GRID * (GRID - 1)),
        uniform("grid: two classes", GRID, two[:, 0] * GRID + two[:, GRID] - GRID, GRID * GRID),
    ]


MIXED = Epoch((5, 1, 9, 8), 4)
"""Classes that steps straddle, one smaller than a step, and a short step."""


def chances_at(shape: Epoch, slot: int) -> np.ndarray:
    """How likely each batch is to be at a slot, by the rule: shape (M,)."""
    step, p = divmod(slot, shape.width)
    at_place = np.zeros(shape.total)
    for first in range(shape.total):
        taken = {(first + q) % shape.total for q in range(shape.short)}
        if step == shape.full:
            at_place[(first + p) % shape.total] += 1 / shape.total
            continue
        left = [place for place in range(shape.total) if place not in taken]
        for image in range(shape.full):
            at_place[left[image * shape.width + p]] += 1 / shape.total / shape.full
    ends = np.cumsum(shape.sizes)
    parts = np.split(at_place, ends[:-1])
    return np.concatenate([np.full(part.size, part.mean()) for part in parts])


def slots(orders: Orders, samples: int) -> list[Result]:
    """Batches are at a slot as often as the rule has it."""
    each = np.arange(samples // SEEDS)
    found = np.concatenate([orders(MIXED, seed, each) for seed in range(SEEDS)])
    out = []
    for slot in (0, 6, 19, 20, MIXED.total - 1):
        counts = np.bincount(found[:, slot], minlength=MIXED.total)
        chances = chances_at(MIXED, slot)
        out.append(statistics.chi_squared(f"slot: {slot}", MIXED.total, counts, chances))
    return out


def samples_too(samples: int) -> list[Result]:
    """The order inside a class tells nothing of the order inside a patch."""
    groups = PatchGroups.from_counts([3] * 3)
    plan = EpochPlan(groups, 3, 0, steps="balanced", step_width=3)
    pairs = np.empty((samples, 2, 3), np.int64)
    for epoch in range(samples):
        block = plan.evaluate(epoch, np.arange(3))
        pairs[epoch, 0] = block.groups
        pairs[epoch, 1] = block.indices[np.flatnonzero(block.groups == 0)[0]]
    ranks = rank(pairs[:, 0]) * 6 + rank(pairs[:, 1])
    return [uniform("samples: class | inside a patch", 3, ranks, 36)]


def of_one_patch(samples: int) -> list[Result]:
    """Steps of one patch come in all orders; in a row, the patches do."""
    out = []
    for name, interleave in (("interleaved", True), ("in a row", False)):
        plan = EpochPlan(
            PatchGroups.from_counts([5, 6, 4, 6]),
            1,
            0,
            steps="same_patch",
            step_width=3,
            interleave=interleave,
        )
        slots = np.arange(0, plan.num_batches, 3)
        groups = np.stack([plan.evaluator.locate(epoch, slots).group for epoch in range(samples)])
        # Two steps of each patch: the order in which patches are first met.
        first = np.stack([(groups == patch).argmax(axis=1) for patch in range(4)], axis=1)
        out.append(uniform(f"one patch: {name}", 4, rank(first.argsort(axis=1)), 24))
    return out


def through_steps(orders: Orders, samples: int) -> list[Result]:
    """Everything that orders tell."""
    parts = (whole, couples, grids, slots)
    return [result for part in parts for result in part(orders, samples)]
