"""Steps: what the batches that are worked on at one time have in common.

A step is a run of slots, one for each rank (or micro-batch) that works on it. Under "free" a step
is a single slot and batches come in any order. Under "same_patch" the batches of a step are of one
patch. Under "balanced" they cost nearly the same: the grouped plan one level up, where batches are
the samples, cost buckets the patches, and a step is the batch.
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
"""Cost buckets in an octave, as a power of two: costs in a bucket differ by 1/8 at most.

Measured with lognormal costs of 50 to 500 patches on 8 ranks, the slowest rank's time is 3 % above
the mean's with 3 bits, 6 % with 2, and 1 % with 4, where a bucket holds half as many patches.
"""

SHORT_STEP_ROUND = 62
"""Round number of the hash that places the short step; no permutation has so many rounds."""


class StepLayout(NamedTuple):
    """How the slots of an epoch are cut into steps.

    Attributes
    ----------
    width : int
        Slots of a step.
    full : int
        Steps that have all of them; they come first.
    short : int
        Slots of one more step, the last; 0 if there is none.
    """

    width: int
    full: int
    short: int

    @classmethod
    def of(cls, num_slots: int, width: int) -> StepLayout:
        """Cut an epoch into steps."""
        full, short = divmod(num_slots, width)
        return cls(width, full, short)

    @property
    def has_step_order(self) -> bool:
        """Whether there are steps to be permuted."""
        return self.full > 1 or (self.full == 1 and self.short > 0)

    def batch_indices(
        self,
        xp: Any,
        slots: Any,
        key: tuple[Any, Any],
        permute_steps: Callable[[Any], Any],
    ) -> Any:
        """Return the indices, in the natural order of batches, that slots lead to.

        Parameters
        ----------
        xp : module
            Array namespace of ``slots``.
        slots : int64 array
        key : pair of int or int64 arrays
            Of the epoch's order of batches.
        permute_steps : callable
            Takes numbers of full steps to their images under the permutation of that key.
        """
        if self.width == 1:
            return permute_steps(slots)
        step = slots // self.width
        within = slots - step * self.width
        # The short step, whose number is `full`, has no image; any will do.
        image = permute_steps(step % self.full)
        if not self.short:
            return image * self.width + within
        # The short step's batches begin anywhere in the natural order, and go on round its end:
        # each batch is as often among them as any other, and so bears as often what uneven="drop"
        # leaves out. The full steps are cut from the others.
        total = self.full * self.width + self.short
        short_start = keyed_hash(key, SHORT_STEP_ROUND, 0) * min(total, (1 << 31) - 1) >> 32
        overflow = short_start + self.short - total
        index = image * self.width + within + overflow * (overflow > 0)
        index = index + xp.where(index >= short_start, self.short, 0)
        return xp.where(step == self.full, (short_start + within) % total, index)


@dataclass(frozen=True)
class CostBuckets:
    """Batches in the order of what they cost; int64 arrays on one device.

    The natural order goes bucket by bucket, cheapest first, and run by run: a run is the whole
    batches of a patch, or its short one.

    Attributes
    ----------
    offsets, counts : arrays, shape (C,)
        Batches before each bucket, and in it.
    grid : Grid of arrays
        Sides of each bucket's permutation.
    run_offsets, run_groups, run_first : arrays, shape (R,)
        Batches before each run, the patch it is of, and its first batch of that patch.
    smallest, largest : int
        Batches of the smallest and of the largest bucket.
    fingerprint : int
        Of which batches are in which bucket: 64 bits.
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
    def build(
        cls, counts: Int64, sizes: Int64, batches: Int64, partial: str, costs: NDArray[np.float64]
    ) -> CostBuckets:
        """Sort a plan's batches by cost.

        Parameters
        ----------
        counts, sizes, batches : int64 arrays, shape (G,)
            Samples, batch size and batches of each patch.
        partial : {"keep", "drop", "pad"}
        costs : float64 array, shape (G,)
            Of a sample of each patch.
        """
        groups = np.flatnonzero(batches)
        size, num_batches = sizes[groups], batches[groups]
        last_size = size
        if partial == "keep":
            last_size = np.minimum(size, counts[groups] - (num_batches - 1) * size)
        has_short = (last_size < size).astype(np.int64)
        # Two runs a patch, one of which may be empty.
        run_groups = np.repeat(groups, 2)
        run_first = np.stack([np.zeros_like(num_batches), num_batches - has_short], axis=1).ravel()
        run_counts = np.stack([num_batches - has_short, has_short], axis=1).ravel()
        run_sizes = np.stack([size, last_size], axis=1).ravel()
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
            # What they cost is of no matter, only who shares a bucket.
            fingerprint=of_order(bucket_of_run, np.ones_like(order), order),
        )

    def members(self) -> list[Any]:
        """Return the arrays."""
        return [*(getattr(self, name) for name in _BUCKET_ARRAYS), *self.grid]

    def map_arrays(self, convert: Callable[[Any], Any]) -> CostBuckets:
        """Return the same buckets with each array converted."""
        converted = {name: convert(getattr(self, name)) for name in _BUCKET_ARRAYS}
        return replace(self, grid=Grid(*map(convert, self.grid)), **converted)

    def locate(self, xp: Any, index: Any) -> tuple[Any, Any]:
        """Return the patch, and which batch of it, at indices in the natural order."""
        run = search_offsets(xp, self.run_offsets, index)
        return self.run_groups[run], self.run_first[run] + index - self.run_offsets[run]

    def bucket_of(self, xp: Any, index: Any) -> Any:
        """Return the bucket of batches at indices in the natural order."""
        return search_offsets(xp, self.offsets, index)


_BUCKET_ARRAYS = ("offsets", "counts", "run_offsets", "run_groups", "run_first")


def search_offsets(xp: Any, offsets: Any, values: Any) -> Any:
    """Return the last index of ``offsets``, which ascend from 0, whose entry is not above a value.

    It is an index whatever the value, as must be where values of a device are not inspected.
    """
    return xp.searchsorted(offsets[1:], values, side="right")


def leading_bits(values: NDArray[np.float64]) -> Int64:
    """Return numbers that order values as they are, equal where values are nearly equal.

    The leading bits of a floating-point number, read as an integer: exact, so that every machine
    sorts alike, which a logarithm would not be.
    """
    return np.asarray(values, np.float64).view(np.int64) >> (52 - MANTISSA_BITS)
