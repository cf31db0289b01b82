"""How often an epoch returns each sample if weights let passes continue across epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.mixture import pass_and_batch
from gpusampler.core.arrays import Int64
from gpusampler.groups.subsets import expand_runs
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.evaluators.base import BatchLocations

CHUNK = 1 << 22
"""Maximum number of samples or positions in a block, which takes tens of megabytes. A patch whose
samples are counted one by one is never divided, so a larger patch is a larger block."""


class PositionRanges(NamedTuple):
    """Ranges of positions in passes over groups, returned ``times`` times; int64, shape (K,)."""

    group: Int64
    passes: Int64
    first: Int64
    length: Int64
    times: Int64

    def select(self, ranges: Int64 | slice) -> PositionRanges:
        """Return the ranges at these indices."""
        return PositionRanges(*(column[ranges] for column in self))


def repeated_and_missed_of_mixture(
    plan: EpochPlan, epoch: int, changed: BatchLocations, change: int
) -> tuple[Int64, Int64]:
    """Return how many samples of each group an epoch repeats and misses: int64, shape (G,).

    The batches ``changed`` are returned ``change`` times more often than planned. Counts have a
    closed form if an epoch stays within one pass over a group, or consists of complete passes.
    Where parts of several passes meet, samples are counted one by one.
    """
    tables = plan.tables
    counts = tables.counts
    assert tables.batches_per_pass is not None
    assert changed.passes is not None
    own_batches, slots = np.maximum(tables.batches_per_pass, 1), tables.batches
    first_pass, first_batch = pass_and_batch(epoch, np.zeros_like(slots), slots, own_batches)
    num_ended, end = np.divmod(first_batch + slots, own_batches)
    is_within = num_ended == 0
    full = np.maximum(num_ended - (first_batch > 0), 0)
    # At most two incomplete passes: the first of the epoch (head) and the last (tail).
    head_end = np.where(is_within, end, own_batches)
    group = np.arange(counts.size, dtype=np.int64)
    first_position, _ = tables.first_position_and_size(np, group, first_batch)
    head_length = num_positions(plan, head_end) - first_position
    head_length = np.where(is_within | (first_batch > 0), head_length, 0)
    tail_length = np.where(is_within, 0, num_positions(plan, end))
    zeros, ones = np.zeros_like(group), np.ones_like(group)
    head = PositionRanges(group, first_pass, first_position, head_length, ones)
    tail = PositionRanges(group, first_pass + num_ended, zeros, tail_length, ones)

    covered = num_positions(plan, own_batches)
    is_exact = covered == counts
    partial = head_length + tail_length
    exact, inexact = np.where(is_exact, full, 0), np.where(is_exact, 0, full)
    # No counting if a sample is in at most one range besides passes over all samples.
    is_closed = (inexact + (head_length > 0) + (tail_length > 0) <= 1) & (covered <= counts)
    # Two passes over all samples (some of them twice, by padding) repeat every sample.
    is_closed |= (covered >= counts) & (full > 1)
    is_closed[changed.group] = False
    missed = np.maximum(counts - np.where(full > 0, covered, partial), 0)
    repeated = np.where(full > 1, counts, np.where(is_exact & (full == 1), partial, 0))

    counted = np.flatnonzero(~is_closed)
    between = PositionRanges(group, zeros, zeros, covered, ones).select(np.repeat(group, inexact))
    between = between._replace(passes=expand_runs(first_pass + (first_batch > 0), inexact))
    extra = _ranges_of(plan, changed, change)
    ranges = PositionRanges(*map(np.concatenate, zip(head, tail, between, extra, strict=True)))
    ranges = ranges.select(np.flatnonzero(~is_closed[ranges.group] & (ranges.length > 0)))
    repeated[counted], missed[counted] = _count_samples(plan, counted, exact[counted], ranges)
    return repeated, missed


def repeated_and_missed_of_visits(
    plan: EpochPlan, epoch: int, num_slots: int
) -> tuple[Int64, Int64, Int64]:
    """Return how many samples of each group the first slots repeat and miss, and the batches.

    For epochs with fewer batches than groups, where slots from the number of batches on start again
    at slot 0. The arrays are int64, shape (G,).
    """
    slots = np.arange(num_slots, dtype=np.int64) % plan.num_batches
    located = plan.evaluator.locate(epoch, slots)
    missed = plan.tables.counts.copy()
    repeated = np.zeros_like(missed)
    counted, times = np.unique(located.group, return_counts=True)
    repeated[counted], missed[counted] = _count_samples(
        plan, counted, np.zeros_like(counted), _ranges_of(plan, located, 1)
    )
    batches = np.zeros_like(missed)
    batches[counted] = times
    return repeated, missed, batches


def _ranges_of(plan: EpochPlan, located: BatchLocations, times: int) -> PositionRanges:
    """Return the positions of batches, each returned ``times`` times."""
    assert located.passes is not None
    first, _ = plan.tables.first_position_and_size(np, located.group, located.j)
    return PositionRanges(
        located.group, located.passes, first, located.size, np.full_like(located.group, times)
    )


def _count_samples(
    plan: EpochPlan, groups: Int64, exact_passes: Int64, ranges: PositionRanges
) -> tuple[Int64, Int64]:
    """Return how many samples of ascending ``groups`` are repeated and missed, counted one by one.

    Each group is returned ``exact_passes`` times as a whole, besides the ``ranges``.
    """
    counts = plan.tables.counts[groups]
    repeated, missed = np.zeros_like(counts), np.zeros_like(counts)
    # Sorted by group, so that a search finds the ranges of a block of groups.
    ranges = ranges.select(np.argsort(ranges.group, kind="stable"))
    for first, last in _blocks(counts):
        block = groups[first:last]
        start = np.searchsorted(ranges.group, block[0])
        stop = np.searchsorted(ranges.group, block[-1], side="right")
        in_block = ranges.select(slice(start, stop))
        times = _times_by_sample(plan, block, exact_passes[first:last], in_block)
        starts = np.cumsum(counts[first:last]) - counts[first:last]
        repeated[first:last] = np.add.reduceat(times > 1, starts, dtype=np.int64)
        missed[first:last] = np.add.reduceat(times == 0, starts, dtype=np.int64)
    return repeated, missed


def num_positions(plan: EpochPlan, batches: Int64) -> Int64:
    """Return the number of positions in the first ``batches`` batches of each group.

    With padding, the last batch may have positions beyond the group's samples.
    """
    tables = plan.tables
    groups = np.arange(batches.size, dtype=np.int64)
    positions: Int64 = tables.first_position_and_size(np, groups, batches)[0]
    return positions if plan.partial == "pad" else np.minimum(positions, tables.counts)


def _blocks(counts: Int64) -> Iterator[tuple[int, int]]:
    """Yield bounds of slices of ``counts``, each with a sum of at most `CHUNK` or one element."""
    ends = np.cumsum(counts)
    first = 0
    while first < counts.size:
        limit = ends[first] - counts[first] + CHUNK
        last = max(first + 1, int(np.searchsorted(ends, limit, side="right")))
        yield first, last
        first = last


def _times_by_sample(
    plan: EpochPlan, groups: Int64, exact_passes: Int64, ranges: PositionRanges
) -> NDArray[np.int32]:
    """Return how often an epoch returns each sample of ascending ``groups``, group by group."""
    counts = plan.tables.counts[groups]
    starts = np.cumsum(counts) - counts
    # The exact number of many passes does not matter: changes remove at most one per rank.
    times = np.repeat(np.minimum(exact_passes, 1 << 30).astype(np.int32), counts)
    # Long ranges are split and short ones joined, so that no array is much longer than CHUNK.
    num_pieces = -(-ranges.length // CHUNK)
    skipped = expand_runs(np.zeros_like(num_pieces), num_pieces) * CHUNK
    ranges = ranges.select(np.repeat(np.arange(num_pieces.size), num_pieces))
    lengths = np.minimum(ranges.length - skipped, CHUNK)
    ranges = ranges._replace(first=ranges.first + skipped, length=lengths)
    for first, last in _blocks(ranges.length):
        block = ranges.select(slice(first, last))
        base = starts[np.searchsorted(groups, block.group)]
        samples = plan.evaluator.host.permute_positions(
            block.group, block.passes, block.first, block.length, base
        )
        np.add.at(times, samples, np.repeat(block.times, block.length).astype(np.int32))
    return times
