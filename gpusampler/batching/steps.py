"""Steps: consecutive slots that the ranks (or micro-batches) process at the same time.

Under "free", a step is a single slot, and batches are in random order. Under "same_patch",
all batches of a step are from one patch. Under "balanced", they cost nearly the same: batches are
grouped by cost into cost buckets, as samples are grouped by patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST
from gpusampler.groups.fingerprint import of_order
from gpusampler.permutation.reference import Grid, grids_of, keyed_hash

StepsKind = Literal["free", "balanced", "same_patch"]
STEPS = ("free", "balanced", "same_patch")
Uneven = Literal["pad", "drop"]
UNEVENS = ("pad", "drop")

MANTISSA_BITS = 3
"""log2 of the number of cost buckets per octave: costs in one bucket differ by at most 1/8.

Measured with lognormal costs of 50 to 500 patches on 8 ranks: the slowest rank takes 3 % longer
than the mean with 3 bits, 6 % with 2, and 1 % with 4, where a bucket has half as many patches.
"""

SHORT_STEP_ROUND = 62
"""Number of the hash round that places the short step; permutations use lower numbers."""


class StepLayout(NamedTuple):
    """Steps of an epoch: ``full`` of ``width`` slots and, if ``short > 0``, one of ``short``."""

    width: int
    full: int
    short: int

    @classmethod
    def of(cls, num_slots: int, width: int) -> StepLayout:
        """Divide the slots of an epoch into steps."""
        full, short = divmod(num_slots, width)
        return cls(width, full, short)

    @property
    def has_step_order(self) -> bool:
        """Whether there are at least two steps to permute."""
        return self.full > 1 or (self.full == 1 and self.short > 0)

    def batch_indices(
        self,
        xp: Any,
        slots: Any,
        key: tuple[Any, Any],
        permute_steps: Callable[[Any], Any],
    ) -> Any:
        """Return the index of the batch of each slot, in the natural order of batches.

        ``key`` is the key of the epoch's batch order; ``permute_steps`` maps indices of full steps
        (0 .. ``full - 1``) to their images under the permutation with that key.
        """
        if self.width == 1:
            return permute_steps(slots)
        step = slots // self.width
        within = slots - step * self.width
        # The short step, number `full`, has no image; its value is replaced below.
        image = permute_steps(step % self.full)
        if not self.short:
            return image * self.width + within
        # The short step takes consecutive batches, cyclically, from a random start in the natural
        # order, so uneven="drop" drops every batch equally often if batches are shuffled. Full
        # steps use the other batches.
        total = self.full * self.width + self.short
        short_start = keyed_hash(key, SHORT_STEP_ROUND, 0) * min(total, (1 << 31) - 1) >> 32
        overflow = short_start + self.short - total
        index = image * self.width + within + overflow * (overflow > 0)
        index = index + xp.where(index >= short_start, self.short, 0)
        return xp.where(step == self.full, (short_start + within) % total, index)


class BatchRuns(NamedTuple):
    """Runs of equally large batches: int64, shape (G,) each.

    The first ``num_first`` batches of a group are returned with ``first_size`` samples, the others
    with ``last_size``.
    """

    num_first: Int64
    first_size: Int64
    last_size: Int64


@dataclass(frozen=True)
class CostBuckets:
    """Batches sorted by cost, in buckets of nearly equal cost; int64 arrays on one device.

    The natural order is sorted by bucket, cheapest first, then by run. A run is either the first
    batches of a patch, which are equally large, or its smaller ones (see `BatchRuns`).

    Attributes
    ----------
    offsets, counts : arrays, shape (C,)
        Number of batches before each bucket, and in it.
    grid : Grid of arrays
        Grid of each bucket's permutation.
    run_offsets, run_groups, run_first : arrays, shape (R,)
        Number of batches before each run, its patch, and its first batch in that patch.
    smallest, largest : int
        Number of batches in the smallest and in the largest bucket.
    fingerprint : int
        64-bit hash of the bucket of every batch.
    """

    offsets: Any
    counts: Any
    grid: Grid
    run_offsets: Any
    run_groups: Any
    run_first: Any
    smallest: int
    largest: int
    fingerprint: int

    @classmethod
    def build(cls, runs: BatchRuns, batches: Int64, costs: NDArray[np.float64]) -> CostBuckets:
        """Sort batches into buckets by cost.

        Arrays have one element per patch, shape (G,); ``costs`` is the cost of one sample.
        """
        groups = np.flatnonzero(batches)
        num_first, first_size, last_size = (column[groups] for column in runs)
        # Two runs per patch; empty ones are removed below.
        run_groups = np.repeat(groups, 2)
        run_first = np.stack([np.zeros_like(num_first), num_first], axis=1).ravel()
        run_counts = np.stack([num_first, batches[groups] - num_first], axis=1).ravel()
        run_sizes = np.stack([first_size, last_size], axis=1).ravel()
        nonempty = np.flatnonzero(run_counts)
        cost_keys = leading_bits(run_sizes * costs[run_groups])[nonempty]
        order = np.argsort(cost_keys, kind="stable")
        run_groups, run_first, run_counts = (
            column[nonempty[order]] for column in (run_groups, run_first, run_counts)
        )
        is_start = np.diff(cost_keys[order], prepend=-1) > 0
        bucket_of_run = np.cumsum(is_start, dtype=np.int64) - 1
        bucket_counts = np.add.reduceat(run_counts, np.flatnonzero(is_start))
        return cls(
            offsets=np.cumsum(bucket_counts) - bucket_counts,
            counts=bucket_counts,
            grid=grids_of(arrays.namespace(HOST), bucket_counts),
            run_offsets=np.cumsum(run_counts) - run_counts,
            run_groups=run_groups,
            run_first=run_first,
            smallest=int(bucket_counts.min()),
            largest=int(bucket_counts.max()),
            # Depends only on the assignment of batches to buckets, not on costs.
            fingerprint=of_order(bucket_of_run, np.ones_like(order), order),
        )

    def first_batches(self, num_groups: int, run: int) -> Int64:
        """Return the natural index of the first batch in run 0 or 1 of each group: shape (G,)."""
        first_batches = np.zeros(num_groups, np.int64)
        is_chosen = (self.run_first > 0) == run
        first_batches[self.run_groups[is_chosen]] = self.run_offsets[is_chosen]
        return first_batches

    def members(self) -> list[Any]:
        """Return all arrays."""
        return [*(getattr(self, name) for name in _BUCKET_ARRAYS), *self.grid]

    def map_arrays(self, convert: Callable[[Any], Any]) -> CostBuckets:
        """Return these buckets with ``convert`` applied to each array."""
        converted = {name: convert(getattr(self, name)) for name in _BUCKET_ARRAYS}
        return replace(self, grid=Grid(*map(convert, self.grid)), **converted)

    def locate(self, xp: Any, index: Any) -> tuple[Any, Any]:
        """Return the patch, and the batch in it, at indices in the natural order."""
        run = search_offsets(xp, self.run_offsets, index)
        return self.run_groups[run], self.run_first[run] + index - self.run_offsets[run]

    def bucket_of(self, xp: Any, index: Any) -> Any:
        """Return the bucket of each batch, given by its index in the natural order."""
        return search_offsets(xp, self.offsets, index)


_BUCKET_ARRAYS = ("offsets", "counts", "run_offsets", "run_groups", "run_first")


def search_offsets(xp: Any, offsets: Any, values: Any) -> Any:
    """Return the last index with ``offsets[index] <= value``; offsets ascend from 0.

    The index is in range for every value, so device values need no check.
    """
    return xp.searchsorted(offsets[1:], values, side="right")


def leading_bits(values: NDArray[np.float64]) -> Int64:
    """Return the leading bits of values as int64: equal for nearly equal values, in their order.

    Unlike a logarithm, this is exact and equal on every machine.
    """
    return np.asarray(values, np.float64).view(np.int64) >> (52 - MANTISSA_BITS)
