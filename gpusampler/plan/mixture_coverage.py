"""How often an epoch hands out samples where weights mix patches: passes go on between epochs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.mixture import pass_and_batch
from gpusampler.core.arrays import Int64
from gpusampler.groups.subsets import expand_runs
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.evaluators.base import BatchLocations

CHUNK = 1 << 22
"""Samples, or positions, looked at together: tens of megabytes. (A patch's samples are counted as
one: 4 bytes each, where an epoch goes from one pass over it into the next.)"""


class PositionRanges(NamedTuple):
    """Ranges of positions in passes over groups, handed out ``times``; int64 arrays, shape (K,)."""

    group: Int64
    passes: Int64
    first: Int64
    length: Int64
    times: Int64

    def select(self, ranges: Int64 | slice) -> PositionRanges:
        """Return some of the ranges."""
        return PositionRanges(*(column[ranges] for column in self))


def repeated_and_missed_of_mixture(
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
    # There are shares.
    assert tables.batches_per_pass is not None
    assert changed.passes is not None
    own_batches, slots = np.maximum(tables.batches_per_pass, 1), tables.batches
    first_pass, first_batch = pass_and_batch(epoch, np.zeros_like(slots), slots, own_batches)
    num_ended, end = np.divmod(first_batch + slots, own_batches)
    is_within = num_ended == 0
    full = np.where(is_within, 0, num_ended - (first_batch > 0))
    # Begun by the epoch before, or by this one and left to the next: at most two parts of passes.
    head_end = np.where(is_within, end, own_batches)
    head_length = _num_positions(plan, head_end) - first_batch * sizes
    head_length = np.where(is_within | (first_batch > 0), head_length, 0)
    tail_length = np.where(is_within, 0, _num_positions(plan, end))
    group = np.arange(counts.size, dtype=np.int64)
    zeros, ones = np.zeros_like(group), np.ones_like(group)
    head = PositionRanges(group, first_pass, first_batch * sizes, head_length, ones)
    tail = PositionRanges(group, first_pass + num_ended, zeros, tail_length, ones)

    covered = _num_positions(plan, own_batches)
    is_exact = covered == counts
    num_partial = (head_length > 0).astype(np.int64) + (tail_length > 0)
    partial = head_length + tail_length
    # Nothing is counted where a sample is in one run at most besides whole passes of all samples.
    exact, inexact = np.where(is_exact, full, 0), np.where(is_exact, 0, full)
    is_closed = (num_partial + inexact <= 1) & (covered <= counts)
    # Two passes that hold all samples, some of them twice as "pad" fills up, repeat all.
    is_closed |= (covered >= counts) & (full > 1)
    is_closed[changed.group] = False
    num_seen = np.where(full > 0, covered, partial)
    missed = np.where(is_closed, np.maximum(counts - num_seen, 0), 0)
    repeated = np.where(full > 1, counts, np.where(is_exact & (full == 1), partial, 0))
    repeated = np.where(is_closed, repeated, 0)

    counted = np.flatnonzero(~is_closed)
    between = PositionRanges(group, zeros, zeros, covered, ones).select(np.repeat(group, inexact))
    between = between._replace(passes=expand_runs(first_pass + (first_batch > 0), inexact))
    extra = PositionRanges(
        changed.group,
        changed.passes,
        changed.j * sizes[changed.group],
        changed.size,
        np.full(changed.group.shape, change, np.int64),
    )
    ranges = PositionRanges(*map(np.concatenate, zip(head, tail, between, extra, strict=True)))
    ranges = ranges.select(np.flatnonzero(~is_closed[ranges.group] & (ranges.length > 0)))
    # By group, so that the rows of some groups are found without a look at all others.
    ranges = ranges.select(np.argsort(ranges.group, kind="stable"))
    for first, last in _blocks(counts[counted]):
        block = counted[first:last]
        start = np.searchsorted(ranges.group, block[0])
        stop = np.searchsorted(ranges.group, block[-1], side="right")
        times = _times_by_sample(plan, block, exact[block], ranges.select(slice(start, stop)))
        starts = np.cumsum(counts[block]) - counts[block]
        repeated[block] = np.add.reduceat(times > 1, starts, dtype=np.int64)
        missed[block] = np.add.reduceat(times == 0, starts, dtype=np.int64)
    return repeated, missed


def _num_positions(plan: EpochPlan, batches: Int64) -> Int64:
    """Return the positions that the first ``batches`` of each group hold."""
    tables = plan.tables
    num_positions: Int64 = batches * tables.sizes
    return np.minimum(num_positions, tables.counts) if plan.partial == "keep" else num_positions


def _blocks(counts: Int64) -> list[tuple[int, int]]:
    """Cut groups into blocks of about `CHUNK` samples, of a group at least."""
    ends = np.cumsum(counts)
    blocks, first = [], 0
    while first < counts.size:
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + CHUNK, side="right")))
        blocks.append((first, last))
        first = last
    return blocks


def _times_by_sample(
    plan: EpochPlan, groups: Int64, exact_passes: Int64, ranges: PositionRanges
) -> NDArray[np.int32]:
    """Return how often the samples of some groups, ascending, are handed out, end to end.

    ``ranges`` are those of these groups.
    """
    counts = plan.tables.counts[groups]
    starts = np.cumsum(counts) - counts
    # How many more than a few there are is of no matter; changes take off one a rank at most.
    times = np.repeat(np.minimum(exact_passes, 1 << 30).astype(np.int32), counts)
    # Long ranges are cut, and ranges are taken together, so that no array is much longer than that.
    num_pieces = -(-ranges.length // CHUNK)
    skipped = expand_runs(np.zeros_like(num_pieces), num_pieces) * CHUNK
    ranges = ranges.select(np.repeat(np.arange(num_pieces.size), num_pieces))
    ranges = ranges._replace(
        first=ranges.first + skipped, length=np.minimum(ranges.length - skipped, CHUNK)
    )
    for first, last in _blocks(ranges.length):
        block = ranges.select(np.arange(first, last))
        base = starts[np.searchsorted(groups, block.group)]
        samples, block_starts = plan.permute_positions(
            block.group, block.passes, block.first, block.length, base
        )
        order = np.argsort(block_starts, kind="stable")
        np.add.at(
            times, samples, np.repeat(block.times[order], block.length[order]).astype(np.int32)
        )
    return times
