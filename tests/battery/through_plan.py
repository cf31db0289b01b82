"""The same questions put to `EpochPlan`: do its own keys keep its permutations apart?"""

from __future__ import annotations

from math import factorial

import numpy as np

from gpusampler import EpochPlan, PatchGroups

from . import statistics
from .single import rank
from .statistics import Result

SIZE = 3
"""Patches, and samples in each: one batch a patch, so M = 3 slots."""

SEEDS = 8


def orders(samples: int, interleave: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the batches' order and of patch 0's samples, along the epochs of a few seeds.

    Both int64, shape (SEEDS, samples // SEEDS).
    """
    groups = PatchGroups.from_counts([SIZE] * SIZE)
    epochs = samples // SEEDS
    slots = np.arange(SIZE)
    order = np.empty((SEEDS * epochs, SIZE), np.int64)
    inside = np.empty_like(order)
    for k in range(SEEDS * epochs):
        seed, epoch = divmod(k, epochs)
        if epoch == 0:
            plan = EpochPlan(groups, SIZE, seed, interleave=interleave)
        block = plan.evaluate(epoch, slots)
        order[k] = block.groups
        inside[k] = block.indices[np.flatnonzero(block.groups == 0)[0]]
    return rank(order).reshape(SEEDS, epochs), rank(inside).reshape(SEEDS, epochs)


def through_plan(samples: int) -> list[Result]:
    """Order against samples of one epoch, and of the next epoch, and of the next seed."""
    out = []
    for interleave in (True, False):
        order, inside = orders(samples, interleave)
        couples = {
            "order | samples": (order, inside),
            "order, e | e+1": (order[:, :-1:2], order[:, 1::2]),
            "samples, e | e+1": (inside[:, :-1:2], inside[:, 1::2]),
            "order, s,e+1 | s+1,e": (order[::2, 1:], order[1::2, :-1]),
            "samples, s,e+1 | s+1,e": (inside[::2, 1:], inside[1::2, :-1]),
        }
        ways = factorial(SIZE)
        for name, (one, other) in couples.items():
            counts = np.bincount((one * ways + other).ravel(), minlength=ways * ways)
            form = "interleaved" if interleave else "in a row"
            chances = np.full(counts.size, 1 / counts.size)
            out.append(statistics.chi_squared(f"plan: {name}, {form}", SIZE, counts, chances))
    return out
