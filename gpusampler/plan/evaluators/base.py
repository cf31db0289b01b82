"""What evaluators take and return: batches in blocks, and where slots lead."""

from __future__ import annotations

from typing import Any, NamedTuple

from gpusampler.core.arrays import Int64


class EvaluatorSettings(NamedTuple):
    """What a plan permutes, and how its batches are filled.

    ``shuffle_samples``: inside every patch; ``shuffle_batches``: of an epoch (or its steps), or its
    patches where the batches of a patch come in a row, which is what ``interleave`` being false
    means; ``pad``: a short batch is filled up to its patch's size.
    """

    shuffle_samples: bool
    shuffle_batches: bool
    interleave: bool
    pad: bool


class BatchLocations(NamedTuple):
    """Where slots lead: int64 NumPy arrays of shape (K,).

    ``slot`` leads to batch ``j`` of patch ``group``, of which ``length`` samples count and ``size``
    are handed out. ``passes``: which pass over the patch it is of; None where that is the epoch.
    (A patch that is cut into cost bins is as many groups.)
    """

    slot: Int64
    group: Int64
    j: Int64
    length: Int64
    size: Int64
    passes: Int64 | None

    def rows(self, rows: slice) -> BatchLocations:
        """Return some of the rows."""
        passes = None if self.passes is None else self.passes[rows]
        slot, group, j, length, size = (column[rows] for column in self[:5])
        return BatchLocations(slot, group, j, length, size, passes)


class BatchBlock(NamedTuple):
    """Some batches of a plan.

    Attributes
    ----------
    indices : int64 array, shape (K, B)
        Samples. A row beyond its length repeats samples of the same patch, so that gathering with
        the whole block is always safe.
    lengths : int64 array, shape (K,)
        Samples of each batch that count, 1 .. B.
    groups : int64 array, shape (K,)
        The batch's patch, as a place among the sorted patch ids.

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
    """Some batches of a plan, each of its own size, side by side.

    Attributes
    ----------
    samples : int64 array, shape (T,)
        On the plan's device (a NumPy array where that is the host); the rest is NumPy.
    starts, sizes, lengths, groups : int64 arrays, shape (K,)
        Batch k is ``samples[starts[k] : starts[k] + sizes[k]]``, of which ``lengths[k]`` count.
    """

    samples: Any
    starts: Int64
    sizes: Int64
    lengths: Int64
    groups: Int64

    def split(self, count: int) -> tuple[RaggedBlock, RaggedBlock | None]:
        """Return the first batches and the rest, None where there is none.

        Batches that do not lie in their order stay together.
        """
        starts = self.starts
        if count >= starts.size or bool((starts[1:] < starts[:-1]).any()):
            return self, None
        rows = self[1:]
        end = int(starts[count])
        head = RaggedBlock(self.samples[:end], *(column[:count] for column in rows))
        tail = RaggedBlock(self.samples[end:], *(column[count:] for column in rows))
        return head, tail._replace(starts=tail.starts - end)
