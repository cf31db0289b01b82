"""What an epoch covers: samples seen once, repeated and missed, by patch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gpusampler.arrays import Int64
from gpusampler.plan import EpochPlan


@dataclass(frozen=True)
class Coverage:
    """How often an epoch hands out the samples of each patch, over all ranks.

    Attributes
    ----------
    patch_ids, counts : int64 arrays, shape (G,)
        The patches, ascending, and their samples.
    seen_once, repeated, missed : int64 arrays, shape (G,)
        Samples handed out exactly once, more than once, not at all; they add up to ``counts``.
    batches : int64 array, shape (G,)
        Batches of each patch that are handed out, repeated ones included.
    """

    patch_ids: Int64
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
        names = ("counts", "seen_once", "repeated", "missed", "batches")
        return {name: int(getattr(self, name).sum()) for name in names}

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yield one mapping a patch."""
        names = ("counts", "seen_once", "repeated", "missed", "batches")
        for group, patch_id in enumerate(self.patch_ids.tolist()):
            row = {name: int(getattr(self, name)[group]) for name in names}
            yield {"patch_id": patch_id, **row}

    def __len__(self) -> int:
        """Return the number of patches."""
        return int(self.patch_ids.size)

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
        Counted batch by batch for the few patches whose batches are left out or come again, in
        closed form for all others.
    """
    groups, batches = plan.groups, plan.batches_by_patch.copy()
    counts = groups.counts
    handed = batches * plan.sizes_by_patch
    # Places beyond the patch's samples start again at its first ones.
    missed = np.maximum(counts - handed, 0)
    over = np.maximum(handed - counts, 0) if plan.partial == "pad" else np.zeros_like(counts)
    repeated = np.minimum(over, counts)
    total = plan.num_batches
    if slots_handed_out != total:
        few, many = sorted((slots_handed_out, total))
        at = plan.locate(epoch, np.arange(few, many, dtype=np.int64) % total)
        change = 1 if slots_handed_out > total else -1
        for group in np.unique(at.group).tolist():
            times = np.ones(int(batches[group]), np.int64)
            np.add.at(times, at.j[at.group == group], change)
            seen = _times_seen(plan, group, times)
            repeated[group] = int((seen > 1).sum())
            missed[group] = int((seen == 0).sum())
            batches[group] = int(times.sum())
    return Coverage(
        patch_ids=groups.patch_ids,
        counts=counts,
        seen_once=counts - repeated - missed,
        repeated=repeated,
        missed=missed,
        batches=batches,
    )


def _times_seen(plan: EpochPlan, group: int, times: Int64) -> Int64:
    """How often each place of a patch is handed out, if batch j is handed out ``times[j]``."""
    count, size = int(plan.groups.counts[group]), int(plan.sizes_by_patch[group])
    places = (
        np.arange(times.size * size)
        if plan.partial == "pad"
        else np.arange(min(times.size * size, count))
    )
    weights = times[places // size]
    return np.bincount(places % count, weights=weights, minlength=count).astype(np.int64)
