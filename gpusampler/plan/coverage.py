"""What an epoch covers: samples seen once, repeated and missed, by patch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_bins import reduce_by_patch
from gpusampler.core.arrays import Int64
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.mixture_coverage import repeated_and_missed_of_mixture

_COUNT_NAMES = ("counts", "seen_once", "repeated", "missed", "batches")


@dataclass(frozen=True, eq=False)
class Coverage:
    """How often an epoch hands out the samples of each patch, over all ranks.

    Attributes
    ----------
    patch_ids : int64 array, or array of str where patches have names, shape (G,)
        The patches, ascending.
    counts : int64 array, shape (G,)
        Their samples.
    seen_once, repeated, missed : int64 arrays, shape (G,)
        Samples handed out exactly once, more than once, not at all; they add up to ``counts``.
    batches : int64 array, shape (G,)
        Batches of each patch that are handed out, repeated ones included.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([1, 1, 1, 2, 2], 2, seed=0, partial="drop")
    >>> coverage = sampler.coverage()
    >>> coverage.missed.tolist(), coverage.exact
    ([1, 0], False)
    """

    patch_ids: NDArray[Any]
    counts: Int64
    seen_once: Int64
    repeated: Int64
    missed: Int64
    batches: Int64

    @property
    def exact(self) -> bool:
        """Whether every sample is handed out exactly once."""
        return bool((self.seen_once == self.counts).all())

    def totals(self) -> dict[str, int]:
        """Return the sums over all patches, as plain integers."""
        return {name: int(getattr(self, name).sum()) for name in _COUNT_NAMES}

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yield one mapping a patch."""
        for group, patch_id in enumerate(self.patch_ids.tolist()):
            row = {name: int(getattr(self, name)[group]) for name in _COUNT_NAMES}
            yield {"patch_id": patch_id, **row}

    def __len__(self) -> int:
        """Return the number of patches."""
        return int(self.patch_ids.size)

    def __eq__(self, other: object) -> bool:
        """Return whether the other counts the same."""
        if not isinstance(other, Coverage):
            return NotImplemented
        return all(np.array_equal(value, vars(other)[name]) for name, value in vars(self).items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return the totals."""
        listed = ", ".join(f"{name}={value}" for name, value in self.totals().items())
        return f"Coverage({len(self)} patches, {listed})"


def coverage_of(plan: EpochPlan, epoch: int, slots_handed_out: int) -> Coverage:
    """Return what an epoch covers when its first ``slots_handed_out`` slots are handed out.

    Parameters
    ----------
    plan : EpochPlan
    epoch : int
    slots_handed_out : int
        All ranks together. Fewer than M leaves the last slots out; more starts again at slot 0.

    Returns
    -------
    Coverage
        In closed form: only batches that are left out or come again are looked at. Where weights
        mix patches, those that an epoch goes through more than once, or from one pass into the
        next, are worked out sample by sample.
    """
    tables, groups, total = plan.tables, plan.groups, plan.num_batches
    first_changed, end_changed = sorted((slots_handed_out, total))
    changed = plan.locate(epoch, np.arange(first_changed, end_changed, dtype=np.int64) % total)
    change = 1 if slots_handed_out > total else -1
    batches = tables.batches.copy()
    np.add.at(batches, changed.group, change)
    if tables.slot_shares is not None:
        repeated, missed = repeated_and_missed_of_mixture(plan, epoch, changed, change)
    else:
        repeated, missed = _repeated_and_missed(plan)
        for group in np.unique(changed.group).tolist():
            j, times = np.unique(changed.j[changed.group == group], return_counts=True)
            changes = dict(zip(j.tolist(), (change * times).tolist(), strict=True))
            segments = _patch_segments(plan, group, changes)
            num_covered = sum(size for size, _ in segments)
            repeated[group] = sum(size for size, times in segments if times > 1)
            missed[group] = int(tables.counts[group]) - num_covered
            missed[group] += sum(size for size, times in segments if times == 0)
    repeated, missed, batches = (
        reduce_by_patch(values, tables.patch_of_bin, np.add)
        for values in (repeated, missed, batches)
    )
    return Coverage(
        patch_ids=groups.labels,
        counts=groups.counts,
        seen_once=groups.counts - repeated - missed,
        repeated=repeated,
        missed=missed,
        batches=batches,
    )


def _repeated_and_missed(plan: EpochPlan) -> tuple[Int64, Int64]:
    """Samples of each patch that all slots of an epoch repeat, and those that they miss."""
    tables = plan.tables
    counts, size, own_batches = tables.counts, tables.sizes, tables.own_batches
    # Under "drop" some samples are in no batch at all; under "pad" the last batch is filled up.
    num_dropped = np.maximum(counts - own_batches * size, 0)
    num_padded = np.maximum(own_batches * size - counts, 0) * (plan.partial == "pad")
    # A patch's batches are handed out this often, the first few once more.
    rounds, extra = np.divmod(tables.batches, np.maximum(own_batches, 1))
    missed = np.where(rounds == 0, counts - extra * size, num_dropped)
    # What the last batch is filled up with is of the first, as is what is handed out once more.
    repeated = np.maximum(np.minimum(num_padded, counts), extra * size)
    repeated[rounds == 0] = 0
    return np.where(rounds > 1, counts - num_dropped, repeated), missed


def _patch_segments(plan: EpochPlan, group: int, changes: dict[int, int]) -> list[tuple[int, int]]:
    """Cut a patch into segments whose samples are all handed out equally often.

    ``changes`` says how much oftener, or less often, some batches of the patch are handed out than
    the plan has them. Returns (samples, times) of each segment. Samples that no batch holds (under
    "drop") are in none.
    """
    tables = plan.tables
    count, size = int(tables.counts[group]), int(tables.sizes[group])
    own_batches = int(tables.own_batches[group])
    rounds, extra = divmod(int(tables.batches[group]), own_batches)

    def times_of(j: int) -> int:
        return rounds + (j < extra) + changes.get(j, 0)

    filled = plan.partial == "pad"
    last = own_batches - 1
    if last == 0 and filled:
        # The only batch goes round the patch, perhaps several times.
        full_turns, remainder = divmod(size, count)
        times = times_of(0)
        return [(remainder, times * (full_turns + 1)), (count - remainder, times * full_turns)]
    num_padded = own_batches * size - count if filled else 0
    # The last batch is filled up with the first samples of batch 0.
    segments = [
        (num_padded, times_of(0) + times_of(last)),
        (min(size, count) - num_padded, times_of(0)),
    ]
    if last > 0:
        segments.append((min(size, count - last * size), times_of(last)))
    between = [j for j in changes if 0 < j < last]
    segments += [(size, times_of(j)) for j in between]
    # The others, of which the first few are handed out once more.
    oftener = max(min(extra, last) - 1, 0)
    unchanged = oftener - sum(j < extra for j in between)
    others = max(last - 1, 0) - oftener - sum(j >= extra for j in between)
    return [*segments, (unchanged * size, rounds + 1), (others * size, rounds)]
