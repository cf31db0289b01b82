"""The evaluator protocol, its settings, and the types it returns."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from gpusampler.core.arrays import Int64


class EvaluatorSettings(NamedTuple):
    """What a plan permutes, and whether it pads.

    ``shuffle_samples``: permute inside every patch. ``shuffle_batches``: permute the batches (or
    steps) of an epoch; if ``interleave`` is False, which makes the batches of a patch consecutive,
    permute the patches. ``pad``: fill a short batch up to its patch's batch size.
    """

    shuffle_samples: bool
    shuffle_batches: bool
    interleave: bool
    pad: bool


class BatchLocations(NamedTuple):
    """The batches that slots map to: int64 NumPy arrays of shape (K,).

    ``slot`` maps to batch ``j`` of ``group``, a patch or a cost bin. The batch returns ``size``
    samples, of which the first ``length`` count. ``passes`` is the number of the batch's pass over
    the group; None if this is the number of the epoch.
    """

    slot: Int64
    group: Int64
    j: Int64
    length: Int64
    size: Int64
    passes: Int64 | None

    def rows(self, rows: slice) -> BatchLocations:
        """Return a slice of the rows."""
        passes = None if self.passes is None else self.passes[rows]
        slot, group, j, length, size = (column[rows] for column in self[:5])
        return BatchLocations(slot, group, j, length, size, passes)


class BatchBlock(NamedTuple):
    """Batches of a plan, all of the same width, on the plan's device.

    Attributes
    ----------
    indices : int64 or int32 array, shape (K, B)
        Samples. Past its length, a row repeats samples of the same patch, so that gathering the
        whole block is always safe.
    lengths : int64 array, shape (K,)
        Number of samples of each batch that count, 1 .. B.
    groups : int64 array, shape (K,)
        Patch of each batch, as an index into the sorted patch ids.

    Examples
    --------
    >>> from gpusampler import EpochPlan, PatchGroups
    >>> plan = EpochPlan(PatchGroups.from_counts([2, 3]), 2, seed=0, shuffle_patches=False)
    >>> block = plan.evaluate(epoch=0, slots=[2, 0])
    >>> block.lengths.tolist(), block.groups.tolist()
    ([1, 2], [1, 0])
    """

    indices: Any
    lengths: Any
    groups: Any


class RaggedBlock(NamedTuple):
    """Batches of a plan, each of its own size, end to end in one array.

    Batch k has the next ``sizes[k]`` samples, of which the first ``lengths[k]`` count; its patch is
    ``groups[k]``. ``samples`` is int64, of shape (T,), and on the evaluator's device; the other
    fields are int64 NumPy arrays of shape (K,).
    """

    samples: Any
    sizes: Int64
    lengths: Int64
    groups: Int64

    @property
    def ends(self) -> Int64:
        """Index after the last sample of each batch: int64, shape (K,)."""
        return np.cumsum(self.sizes)

    def split(self, count: int) -> tuple[RaggedBlock, RaggedBlock | None]:
        """Return the first ``count`` batches, and the remaining ones or None."""
        if count >= self.sizes.size:
            return self, None
        num_samples = int(self.sizes[:count].sum())
        return (
            RaggedBlock(self.samples[:num_samples], *(column[:count] for column in self[1:])),
            RaggedBlock(self.samples[num_samples:], *(column[count:] for column in self[1:])),
        )


class Evaluator(Protocol):
    """Evaluates a plan's batches; all evaluators return the same integers."""

    def locate(self, epoch: int, slots: Int64) -> BatchLocations:
        """Return the batches that slots (int64, shape (K,), in 0 .. M-1) map to."""

    def block(self, epoch: int, slots: Any, dtype: str = "int64") -> BatchBlock:
        """Return the batches at slots, each padded to the largest batch size."""

    def ragged(self, epoch: int, locations: BatchLocations) -> RaggedBlock:
        """Return located batches, each of its own size."""
