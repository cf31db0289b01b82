"""What an epoch covers: samples seen once, repeated and missed, by patch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.batch_units import by_parent
from gpusampler.core.arrays import Int64
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.mixture_coverage import counted_of_mixed

_COUNTED = ("counts", "seen_once", "repeated", "missed", "batches")


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
        return {name: int(getattr(self, name).sum()) for name in _COUNTED}

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yield one mapping a patch."""
        for group, patch_id in enumerate(self.patch_ids.tolist()):
            row = {name: int(getattr(self, name)[group]) for name in _COUNTED}
            yield {"patch_id": patch_id, **row}

    def __len__(self) -> int:
        """Return the number of patches."""
        return int(self.patch_ids.size)

    def __eq__(self, other: object) -> bool:
        """Return whether the other counts the same."""
        if not isinstance(other, Coverage):
            return NotImplemented
        mine, theirs = vars(self), vars(other)
        return all(np.array_equal(mine[name], theirs[name]) for name in mine)

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
    few, many = sorted((slots_handed_out, total))
    changed = plan.locate(epoch, np.arange(few, many, dtype=np.int64) % total)
    change = 1 if slots_handed_out > total else -1
    batches = tables.batches.copy()
    np.add.at(batches, changed.group, change)
    if tables.shares is not None:
        repeated, missed = counted_of_mixed(plan, epoch, changed, change)
    else:
        repeated, missed = _counted(plan)
        for group in np.unique(changed.group).tolist():
            j, times = np.unique(changed.j[changed.group == group], return_counts=True)
            changes = dict(zip(j.tolist(), (change * times).tolist(), strict=True))
            parts = _parts_of_patch(plan, group, changes)
            held = sum(size for size, _ in parts)
            repeated[group] = sum(size for size, times in parts if times > 1)
            missed[group] = int(tables.counts[group]) - held
            missed[group] += sum(size for size, times in parts if times == 0)
    repeated, missed, batches = (
        by_parent(part, tables.parents, np.add) for part in (repeated, missed, batches)
    )
    return Coverage(
        patch_ids=groups.labels,
        counts=groups.counts,
        seen_once=groups.counts - repeated - missed,
        repeated=repeated,
        missed=missed,
        batches=batches,
    )


def _counted(plan: EpochPlan) -> tuple[Int64, Int64]:
    """Samples of each patch that all slots of an epoch repeat, and those that they miss."""
    tables = plan.tables
    counts, size, slots = tables.counts, tables.sizes, tables.batches
    own = slots if tables.own is None else tables.own
    # Under "drop" some samples are in no batch at all; under "pad" the last batch is filled up.
    outside = np.maximum(counts - own * size, 0)
    over = np.maximum(own * size - counts, 0) if plan.partial == "pad" else np.zeros_like(counts)
    # A patch's batches are handed out this often, the first few once more.
    rounds, more = np.divmod(slots, np.maximum(own, 1))
    missed = np.where(rounds == 0, counts - more * size, outside)
    # What the last batch is filled up with is of the first, as is what is handed out once more.
    repeated = np.maximum(np.minimum(over, counts), more * size)
    repeated[rounds == 0] = 0
    return np.where(rounds > 1, counts - outside, repeated), missed


def _parts_of_patch(plan: EpochPlan, group: int, changes: dict[int, int]) -> list[tuple[int, int]]:
    """Cut a patch into parts whose samples are all handed out equally often.

    ``changes`` says how much oftener, or less often, some batches of the patch are handed out than
    the plan has them. Returns (samples, times) of each part. Samples that no batch holds (under
    "drop") are in none.
    """
    tables = plan.tables
    count, size = int(tables.counts[group]), int(tables.sizes[group])
    own = int((tables.batches if tables.own is None else tables.own)[group])
    rounds, more = divmod(int(tables.batches[group]), own)

    def times_of(j: int) -> int:
        return rounds + (j < more) + changes.get(j, 0)

    filled = plan.partial == "pad"
    last = own - 1
    if last == 0 and filled:
        # The only batch goes round the patch, perhaps several times.
        turns, rest = divmod(size, count)
        times = times_of(0)
        return [(rest, times * (turns + 1)), (count - rest, times * turns)]
    over = own * size - count if filled else 0
    # The last batch is filled up with the first samples of batch 0.
    parts = [
        (over, times_of(0) + times_of(last)),
        (min(size, count) - over, times_of(0)),
    ]
    if last > 0:
        parts.append((min(size, count - last * size), times_of(last)))
    between = [j for j in changes if 0 < j < last]
    parts += [(size, times_of(j)) for j in between]
    # The others, of which the first few are handed out once more.
    oftener = max(min(more, last) - 1, 0)
    unchanged = oftener - sum(j < more for j in between)
    parts.append((unchanged * size, rounds + 1))
    parts.append(((max(last - 1, 0) - oftener - sum(j >= more for j in between)) * size, rounds))
    return parts
