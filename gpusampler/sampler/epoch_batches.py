"""The patch, size and cost of each batch of an epoch, as `plot_epoch` draws them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_budget import CostBudget
from gpusampler.core.arrays import Int64
from gpusampler.sampler.batches import MAX_LOCATED_SLOTS, locate_slots
from gpusampler.sampler.passes import RankShard

Float64 = NDArray[np.float64]

MAX_LOCATED = 1 << 22
"""Maximum number of batches that are located: about 150 MB, and 3 seconds with a million patches.
Of a longer epoch, between half and all of this number are drawn."""


class Binning(NamedTuple):
    """Division of ``total`` numbers from 0 on into ranges of ``width``; the last may be shorter."""

    total: int
    width: int

    @classmethod
    def at_most(cls, bins: int, total: int) -> Binning:
        """Return the division into as many equal ranges as possible, at most ``bins``."""
        return cls(total, -(-total // bins))

    @property
    def num_bins(self) -> int:
        """Number of ranges."""
        return -(-self.total // self.width)

    @property
    def edges(self) -> Int64:
        """Bounds of the ranges: int64, shape (num_bins + 1,)."""
        first = np.arange(self.num_bins, dtype=np.int64) * self.width
        return np.append(first, self.total)


class EpochBatches(NamedTuple):
    """Batches of an epoch over all ranks, all of them or a sample.

    ``slot``, ``patch``, ``length`` (samples that count) and ``padding`` (further samples) have
    shape (K,); so have ``cost``, the cost of a sample in each batch, and None without a budget.
    The epoch has ``num_slots`` batches.
    """

    num_slots: int
    slot: Int64
    patch: Int64
    length: Int64
    padding: Int64
    cost: Float64 | None

    @classmethod
    def of(cls, shard: RankShard) -> EpochBatches:
        """Locate the batches of all ranks, not their samples; ``shard`` is a whole epoch's."""
        num_slots = shard.steps * shard.num_replicas
        # One batch from each stretch of slots, at random, so that no regular pattern is missed.
        stretches = Binning.at_most(MAX_LOCATED, num_slots)
        slots = stretches.edges[:-1]
        if stretches.width > 1:
            slots = np.random.default_rng(0).integers(slots, stretches.edges[1:])
        parts = []
        for start in range(0, slots.size, MAX_LOCATED_SLOTS):
            located = locate_slots(shard, slots[start : start + MAX_LOCATED_SLOTS])
            parts.append((located.group, located.length, located.size))
        group, length, size = (np.concatenate(column) for column in zip(*parts, strict=True))
        units = shard.plan.units
        return cls(
            num_slots=num_slots,
            slot=slots,
            patch=shard.plan.tables.patches_of(group),
            length=length,
            padding=size - length,
            cost=None if units.costs is None else units.costs[group],
        )

    @property
    def scale(self) -> float:
        """Number of batches of the epoch for each of these."""
        return self.num_slots / self.slot.size


class FixedSize(NamedTuple):
    """The same samples in batches of one size, the largest that never exceeds the budget.

    ``costs`` and ``times``: cost of the samples of batches, and how many have this cost.
    """

    size: int
    costs: Float64
    times: Float64

    @classmethod
    def of(cls, batches: EpochBatches, costs: Float64, max_cost: float) -> FixedSize:
        """Return it for ``costs``, shape (K,): the costs of the samples of each batch."""
        assert batches.cost is not None
        size = int(CostBudget(max_cost).sizes_for(batches.cost.max(keepdims=True))[0])
        scale = batches.scale
        samples = np.rint(np.bincount(batches.patch, batches.length) * scale)
        has_samples = samples > 0
        samples = samples[has_samples]
        mean_costs = scale * np.bincount(batches.patch, costs)[has_samples] / samples
        full, rest = np.divmod(samples, size)
        return cls(
            size,
            np.concatenate([size * mean_costs, rest * mean_costs]),
            np.concatenate([full, rest > 0]).astype(np.float64),
        )

    @property
    def num_batches(self) -> int:
        """Number of batches."""
        return int(self.times.sum())
