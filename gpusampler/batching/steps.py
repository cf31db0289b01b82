"""Steps: what the batches that are worked on at one time have in common.

A step is a run of slots, one for each rank (or micro-batch) that works on it. Under "free" a step
is a single slot and batches come in any order. Under "same_patch" the batches of a step are of one
patch. Under "balanced" they cost nearly the same: the grouped plan one level up, where batches are
the samples, classes of cost the patches, and a step is the batch.
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

CLASS_BITS = 3
"""Classes of cost in an octave, as a power of two: costs of a class differ by 1/8 at most.

Measured with lognormal costs of 50 to 500 patches on 8 ranks, the slowest rank's time is 3 % above
the mean's with 3 bits, 6 % with 2, and 1 % with 4, where a class holds half as many patches.
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
    def has_an_order(self) -> bool:
        """Whether there are steps to be permuted."""
        return self.full > 1 or (self.full == 1 and self.short > 0)

    def places(
        self,
        xp: Any,
        slots: Any,
        key: tuple[Any, Any],
        permute_steps: Callable[[Any], Any],
    ) -> Any:
        """Return the places in the natural order of batches that slots lead to.

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
        # each place is as often among them as any other, and so bears as often what uneven="drop"
        # leaves out. The full steps are cut from the others.
        total = self.full * self.width + self.short
        first = keyed_hash(key, SHORT_STEP_ROUND, 0) * min(total, (1 << 31) - 1) >> 32
        beyond = first + self.short - total
        place = image * self.width + within + beyond * (beyond > 0)
        place = place + xp.where(place >= first, self.short, 0)
        return xp.where(step == self.full, (first + within) % total, place)


@dataclass(frozen=True)
class CostClasses:
    """Batches in the order of what they cost; int64 arrays on one device.

    The natural order goes class by class, from the cheapest on, and run by run: a run is the whole
    batches of a patch, or its short one.

    Attributes
    ----------
    offsets, counts : arrays, shape (C,)
        Batches before each class, and in it.
    grid : Grid of arrays
        Sides of each class's permutation.
    run_offsets, run_groups, run_first : arrays, shape (R,)
        Batches before each run, the patch it is of, and its first batch of that patch.
    smallest, largest : int
        Batches of the smallest and of the largest class.
    fingerprint : int
        Of which batches are in which class: 64 bits.
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
    ) -> CostClasses:
        """Sort a plan's batches by cost.

        Parameters
        ----------
        counts, sizes, batches : int64 arrays, shape (G,)
            Samples, batch size and batches of each patch.
        partial : {"keep", "drop", "pad"}
        costs : float64 array, shape (G,)
            Of a sample of each patch.
        """
        group = np.flatnonzero(batches)
        size, number = sizes[group], batches[group]
        last = size
        if partial == "keep":
            last = np.minimum(size, counts[group] - (number - 1) * size)
        short = (last < size).astype(np.int64)
        # Two runs a patch, one of which may be empty.
        run_groups = np.repeat(group, 2)
        run_first = np.stack([np.zeros_like(number), number - short], axis=1).ravel()
        run_counts = np.stack([number - short, short], axis=1).ravel()
        length = np.stack([size, last], axis=1).ravel()
        there = run_counts > 0
        run_groups, run_first, run_counts = run_groups[there], run_first[there], run_counts[there]
        kind = class_of(length[there] * costs[run_groups])
        order = np.argsort(kind, kind="stable")
        run_groups, run_first, run_counts = run_groups[order], run_first[order], run_counts[order]
        first_run = np.flatnonzero(np.diff(kind[order], prepend=-1))
        number_of_class = np.zeros(order.size, np.int64)
        number_of_class[first_run[1:]] = 1
        class_counts = np.add.reduceat(run_counts, first_run)
        return cls(
            offsets=np.cumsum(class_counts) - class_counts,
            counts=class_counts,
            grid=grids_of(arrays.namespace(HOST), class_counts),
            run_offsets=np.cumsum(run_counts) - run_counts,
            run_groups=run_groups,
            run_first=run_first,
            smallest=int(class_counts.min()),
            largest=int(class_counts.max()),
            # What they cost is of no matter, only who shares a class.
            fingerprint=of_order(np.cumsum(number_of_class), np.ones_like(order), order),
        )

    def members(self) -> list[Any]:
        """Return the arrays."""
        runs = (self.run_offsets, self.run_groups, self.run_first)
        return [self.offsets, self.counts, *self.grid, *runs]

    def on(self, there: Callable[[Any], Any]) -> CostClasses:
        """Return the same, each array taken elsewhere."""
        return replace(
            self,
            offsets=there(self.offsets),
            counts=there(self.counts),
            grid=Grid(*map(there, self.grid)),
            run_offsets=there(self.run_offsets),
            run_groups=there(self.run_groups),
            run_first=there(self.run_first),
        )

    def batch_at(self, xp: Any, place: Any) -> tuple[Any, Any]:
        """Return the patch, and which batch of it, that stand at places of the natural order."""
        run = last_at_most(xp, self.run_offsets, place)
        return self.run_groups[run], self.run_first[run] + place - self.run_offsets[run]

    def class_at(self, xp: Any, place: Any) -> Any:
        """Return the class that places of the natural order are in."""
        return last_at_most(xp, self.offsets, place)


def last_at_most(xp: Any, before: Any, place: Any) -> Any:
    """Return the last index of ``before``, which ascends from 0, whose entry is not above a place.

    It is an index whatever the place, as must be where places of a device are not inspected.
    """
    return xp.searchsorted(before[1:], place, side="right")


def class_of(cost: NDArray[np.float64]) -> Int64:
    """Return a number that orders batches by cost, equal where costs are nearly equal.

    The leading bits of a floating-point number, read as an integer: exact, so that every machine
    sorts alike, which a logarithm would not be.
    """
    return np.asarray(cost, np.float64).view(np.int64) >> (52 - CLASS_BITS)
