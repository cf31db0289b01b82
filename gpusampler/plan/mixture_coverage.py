"""How often an epoch hands out samples where weights mix patches: passes go on between epochs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.mixture import pass_and_batch
from gpusampler.core.arrays import Int64
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.evaluators.base import BatchLocations

LANES = 1 << 22
"""Samples, or positions, looked at together: tens of megabytes. (A patch's samples are counted as
one: 4 bytes each, where an epoch goes from one pass over it into the next.)"""


class Rows(NamedTuple):
    """Runs of positions in passes over groups, handed out ``times``; int64 arrays, shape (K,)."""

    group: Int64
    passes: Int64
    first: Int64
    length: Int64
    times: Int64

    def where(self, which: Int64 | slice) -> Rows:
        """Return some of the rows."""
        return Rows(*(column[which] for column in self))


def counted_of_mixed(
    plan: EpochPlan, epoch: int, changed: BatchLocations, change: int
) -> tuple[Int64, Int64]:
    """Return the samples of each group that an epoch repeats, and those that it misses.

    Parameters
    ----------
    plan : EpochPlan
    epoch : int
    changed : BatchLocations
        Batches that are handed out ``change`` times more often than the plan has them.
    change : int

    Returns
    -------
    int64 arrays, shape (G,)
        In closed form for groups that an epoch is within one pass of, or hands out whole passes
        of; where two passes meet, their samples are counted.
    """
    tables = plan.tables
    counts, sizes = tables.counts, tables.sizes
    assert tables.own is not None  # as there are shares
    own, slots = np.maximum(tables.own, 1), tables.batches
    begun, b0 = pass_and_batch(epoch, np.zeros_like(slots), slots, own)
    turns, b1 = np.divmod(b0 + slots, own)
    one = turns == 0
    whole = np.where(one, 0, turns - (b0 > 0))
    # Begun by the epoch before, or by this one and left to the next: at most two parts of passes.
    head_end = np.where(one, b1, own)
    head_length = np.where(one | (b0 > 0), _positions(plan, head_end) - b0 * sizes, 0)
    tail_length = np.where(one, 0, _positions(plan, b1))
    group = np.arange(counts.size, dtype=np.int64)
    head = Rows(group, begun, b0 * sizes, head_length, np.ones_like(group))
    tail = Rows(group, begun + turns, np.zeros_like(group), tail_length, np.ones_like(group))

    covered = _positions(plan, own)
    even = covered == counts
    parts = (head_length > 0).astype(np.int64) + (tail_length > 0)
    part = head_length + tail_length
    # Nothing is counted where a sample is in one run at most besides whole passes of all samples.
    inside = np.where(even, parts <= 1, (parts + whole <= 1) & (covered <= counts))
    # Two passes that hold all samples, some of them twice as "pad" fills up, repeat all.
    inside |= (covered >= counts) & (whole > 1)
    inside[changed.group] = False
    once = np.where(whole > 0, covered, part)
    missed = np.where(inside, np.maximum(counts - once, 0), 0)
    repeated = np.where(whole > 1, counts, np.where(even & (whole == 1), part, 0))
    repeated = np.where(inside, repeated, 0)

    left = np.flatnonzero(~inside)
    every = np.where(even, whole, 0)
    several = np.where(even, 0, whole)
    more = np.repeat(group, several)
    nth = np.arange(more.size) - np.repeat(np.cumsum(several) - several, several)
    between = Rows(
        more,
        begun[more] + (b0[more] > 0) + nth,
        np.zeros_like(more),
        covered[more],
        np.ones_like(more),
    )
    extra = Rows(
        changed.group,
        _passes(changed, epoch),
        changed.j * sizes[changed.group],
        changed.size,
        np.full(changed.group.shape, change, np.int64),
    )
    rows = Rows(*map(np.concatenate, zip(head, tail, between, extra, strict=True)))
    rows = rows.where(np.flatnonzero(~inside[rows.group] & (rows.length > 0)))
    # By group, so that the rows of some groups are found without a look at all others.
    rows = rows.where(np.argsort(rows.group, kind="stable"))
    for first, last in _blocks(counts[left]):
        these = left[first:last]
        begin = np.searchsorted(rows.group, these[0])
        end = np.searchsorted(rows.group, these[-1], side="right")
        times = _times(plan, these, every[these], rows.where(slice(begin, end)))
        starts = np.cumsum(counts[these]) - counts[these]
        repeated[these] = np.add.reduceat(times > 1, starts, dtype=np.int64)
        missed[these] = np.add.reduceat(times == 0, starts, dtype=np.int64)
    return repeated, missed


def _passes(at: BatchLocations, epoch: int) -> Int64:
    return np.full(at.group.shape, epoch, np.int64) if at.passes is None else at.passes


def _positions(plan: EpochPlan, batches: Int64) -> Int64:
    """Return the positions that the first ``batches`` of each group hold."""
    tables = plan.tables
    held: Int64 = batches * tables.sizes
    return np.minimum(held, tables.counts) if plan.partial == "keep" else held


def _blocks(counts: Int64) -> list[tuple[int, int]]:
    """Cut groups into runs of about `LANES` samples, of a group at least."""
    ends = np.cumsum(counts)
    found, first = [], 0
    while first < counts.size:
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + LANES, side="right")))
        found.append((first, last))
        first = last
    return found


def _times(plan: EpochPlan, groups: Int64, every: Int64, mine: Rows) -> NDArray[np.int32]:
    """Return how often the samples of some groups, ascending, are handed out, end to end.

    ``mine`` are the rows of these groups.
    """
    counts = plan.tables.counts[groups]
    starts = np.cumsum(counts) - counts
    # How many more than a few there are is of no matter; changes take off one a rank at most.
    times = np.repeat(np.minimum(every, 1 << 30).astype(np.int32), counts)
    # Long runs are cut, and runs are taken together, so that no array is much longer than that.
    pieces = -(-mine.length // LANES)
    nth = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    mine = mine.where(np.repeat(np.arange(pieces.size), pieces))
    skipped = nth * LANES
    mine = mine._replace(
        first=mine.first + skipped, length=np.minimum(mine.length - skipped, LANES)
    )
    for first, last in _blocks(mine.length):
        some = mine.where(np.arange(first, last))
        base = starts[np.searchsorted(groups, some.group)]
        places, at = plan.places_of_runs(some.group, some.passes, some.first, some.length, base)
        ends = np.argsort(at, kind="stable")
        np.add.at(times, places, np.repeat(some.times[ends], some.length[ends]).astype(np.int32))
    return times
