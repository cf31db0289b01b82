"""A rank's batches of an epoch: evaluated in blocks, moved to the host, cut into single batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Generic, NamedTuple

import numpy as np

from gpusampler.core import arrays, devices
from gpusampler.core.arrays import Int64
from gpusampler.core.tracing import EVALUATE, TRANSFER, Range
from gpusampler.core.transfer import Ahead, ToHost, side_of
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.evaluators.base import BatchLocations, RaggedBlock
from gpusampler.sampler.iterator import T
from gpusampler.sampler.state import RankShard

FIRST_LANES = 1 << 11
"""Indices evaluated at first, so that the first batch comes at once."""
GROWTH = 7
"""A block is at most so many times all before it: few small ones, whose cost is that of calls."""
MOST_CUT = 512
"""Batches made at once. With 700 lists more than before the garbage collector sets out, and walks
through them and, now and then, all that the program holds."""
FIRST_SLOTS = 1 << 8
MOST_SLOTS = 1 << 13
"""Slots looked up at once; far cheaper than their indices, so further ahead."""


class Batch(NamedTuple):
    """One batch.

    Attributes
    ----------
    patch_id : int, or str where patches have names
        Patch of all its samples.
    indices : int64 array, shape (size,)
        On the sampler's device.
    valid : int
        How many of them count; the rest, under ``partial="pad"``, fills the batch up. 0 where a
        sampler `for_evaluation` hands a batch out again.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([7, 7, 7], 2, seed=0, partial="pad")
    >>> [(batch.patch_id, len(batch.indices), batch.valid) for batch in sampler.batches(epoch=1)]
    [(7, 2, 2), (7, 2, 1)]
    """

    patch_id: int | str
    indices: Any
    valid: int


class Blocks:
    """A rank's batches of one epoch, evaluated a block at a time.

    Parameters
    ----------
    share : RankShard
        Its plan is evaluated where it is.
    """

    def __init__(self, share: RankShard) -> None:
        self.plan = share.plan
        self._share = share
        self._evaluating = share.recorder.range(EVALUATE)
        self._at: BatchLocations | None = None
        self._ends = np.zeros(0, np.int64)
        self._row = 0
        self._looked_up = 0
        self._lanes = 0

    def read(self) -> RaggedBlock | None:
        """Return the next block of batches, None after the last."""
        if self.plan.needs_upload:
            with self._share.recorder.range(TRANSFER):
                self.plan.upload_tables()
        with self._evaluating:
            return self._evaluate()

    def _evaluate(self) -> RaggedBlock | None:
        at = self._at
        if at is None or self._row == at.group.size:
            at = self._look_up()
            if at is None:
                return None
        # A batch at least.
        before = int(self._ends[self._row - 1]) if self._row else 0
        most = before + min(max(FIRST_LANES, GROWTH * self._lanes), self.plan.block_lanes)
        stop = max(self._row + 1, int(np.searchsorted(self._ends, most, side="right")))
        block = self.plan.batches_at(self._share.epoch, at.rows(slice(self._row, stop)))
        self._row = stop
        self._lanes += int(self._ends[stop - 1]) - before
        return block

    def _look_up(self) -> BatchLocations | None:
        """Find out which batches the next slots of this rank are."""
        left = self._share.steps - self._looked_up
        if left <= 0:
            return None
        steps = min(left, max(FIRST_SLOTS, min(GROWTH * self._looked_up, MOST_SLOTS)))
        slots = self._share.slots(self._looked_up, self._looked_up + steps)
        self._at = located_slots(self._share, slots)
        self._ends = np.cumsum(self._at.size)
        self._row = 0
        self._looked_up += steps
        return self._at


def located_slots(share: RankShard, slots: Int64) -> BatchLocations:
    """Return the batches of a share at global slots, ascending; those beyond the last come again.

    Where repeats do not count, their length is 0, but they are handed out like the others.
    """
    total = share.plan.num_batches
    if int(slots[-1]) < total:
        return share.plan.locate(share.epoch, slots)
    at = share.plan.locate(share.epoch, slots % total)
    return at if share.repeats_count else at._replace(length=np.where(slots < total, at.length, 0))


def valid_counts(share: RankShard) -> Int64:
    """Return how many samples count in each batch of a share: int64, shape (steps,)."""
    counts = np.empty(share.steps, np.int64)
    for first in range(0, share.steps, MOST_SLOTS):
        counts[first : first + MOST_SLOTS] = located_slots(
            share, share.slots(first, min(first + MOST_SLOTS, share.steps))
        ).length
    return counts


class BlocksToHost:
    """`Blocks` of a plan on a device, whose samples travel to the host a block ahead.

    What `read` returns is good until the next call. Blocks that are there already, as the device's
    memory has run out, are passed on.
    """

    def __init__(self, blocks: Blocks, pipe: ToHost, travelling: Range) -> None:
        self._blocks = blocks
        self._pipe = pipe
        self._travelling = travelling
        self._ahead: Ahead[RaggedBlock] = Ahead()

    def read(self) -> RaggedBlock | None:
        """Return the next block of batches, with its samples in NumPy; None after the last."""
        # The one after it has been evaluated and sent before this one is waited for.
        block = self._ahead.read(self._send)
        if block is None or arrays.library_of(block.samples) == "numpy":
            return block
        with self._travelling:
            return block._replace(samples=self._pipe.take())

    def _send(self) -> RaggedBlock | None:
        block = self._blocks.read()
        if block is None or arrays.library_of(block.samples) == "numpy":
            return block
        with self._travelling:
            try:
                self._pipe.send(block.samples)
            except Exception as error:
                # There may be no more pinned memory either.
                if not devices.is_out_of_memory(error):
                    raise
                self._blocks.plan.fall_back_to_host(error)
                return block._replace(samples=arrays.to_numpy(block.samples))
        return block


class BatchReader(Generic[T]):
    """A rank's batches of one epoch, in one of the forms that are handed out.

    Parameters
    ----------
    share : RankShard
    output : {"list", "numpy", "tensor", "batch"}

    Raises
    ------
    RuntimeError
        If arrays of a GPU are asked for in a worker of a DataLoader.
    """

    def __init__(self, share: RankShard, output: str) -> None:
        plan = share.plan
        self._plan = plan
        self._output = output
        self._blocks: Blocks | BlocksToHost = Blocks(share)
        self._travelling = share.recorder.range(TRANSFER)
        self._overwritten = False
        self._rest: RaggedBlock | None = None
        if output == "batch":
            devices.check_not_in_worker(plan.device)
        elif not plan.works_on_host:
            side = side_of(plan.device)
            if side is not None:
                self._blocks = BlocksToHost(self._blocks, ToHost(side), self._travelling)
                self._overwritten = True

    def read(self) -> list[T] | None:
        """Return the next batches, None after the last."""
        if self._rest is None:
            self._rest = self._read_block()
            if self._rest is None:
                return None
        block, self._rest = self._rest.split(MOST_CUT)
        batches: list[T] = _SPLITTERS[self._output](self._plan, block)
        return batches

    def _read_block(self) -> RaggedBlock | None:
        """Return the next block, its samples where they are handed out; None after the last."""
        block = self._blocks.read()
        if block is None:
            return None
        if self._output == "batch":
            if arrays.device_of(block.samples) != self._plan.device:
                with self._travelling:
                    block = block._replace(samples=arrays.upload(block.samples, self._plan.device))
        elif arrays.library_of(block.samples) != "numpy":
            with self._travelling:
                block = block._replace(samples=arrays.to_numpy(block.samples))
        elif self._overwritten and self._output == "numpy":
            # What is handed out may be kept; pinned memory is used again.
            block = block._replace(samples=block.samples.copy())
        return block


def _cut(samples: Any, block: RaggedBlock, rows_of: Callable[[Any], list[Any]]) -> list[Any]:
    """Cut the samples of a block into its batches.

    Parameters
    ----------
    samples : NumPy array, shape (T,)
    block : RaggedBlock
    rows_of : callable
        Makes batches of the rows of a matrix, all at once: half the price of one by one. It is
        called for each row of batches of one size, where there are few such rows.
    """
    starts, sizes = block.starts, block.sizes
    at = None
    if bool((starts[1:] < starts[:-1]).any()):
        at = np.argsort(starts)
        sizes = sizes[at]
    ends = np.cumsum(sizes)
    cuts = [0, *(np.flatnonzero(sizes[1:] != sizes[:-1]) + 1).tolist(), sizes.size]
    batches: list[Any] = []
    if 4 * len(cuts) > sizes.size + 8:
        flat = rows_of(samples[None, :])[0]
        batches = list(map(flat.__getitem__, map(slice, (ends - sizes).tolist(), ends.tolist())))
    else:
        for low, high in pairwise(cuts):
            size, end = int(sizes[low]), int(ends[high - 1])
            batches += rows_of(samples[end - (high - low) * size : end].reshape(-1, size))
    if at is None:
        return batches
    places = np.empty_like(at)
    places[at] = np.arange(at.size)
    return list(map(batches.__getitem__, places.tolist()))


def _lists_of_rows(matrix: Any) -> list[list[int]]:
    rows: list[list[int]] = matrix.tolist()
    return rows


def _as_lists(plan: EpochPlan, block: RaggedBlock) -> list[list[int]]:
    return _cut(arrays.to_numpy(block.samples), block, _lists_of_rows)


def _views(samples: Any, block: RaggedBlock) -> list[Any]:
    if arrays.library_of(samples) == "numpy":
        return _cut(samples, block, list)
    ends = block.starts + block.sizes
    if bool((block.starts[1:] == ends[:-1]).all()):
        return arrays.split(samples, block.sizes.tolist())
    pairs = zip(block.starts.tolist(), ends.tolist(), strict=True)
    return [samples[start:end] for start, end in pairs]


def _as_numpy(plan: EpochPlan, block: RaggedBlock) -> list[Any]:
    return _views(arrays.to_numpy(block.samples), block)


def _as_tensors(plan: EpochPlan, block: RaggedBlock) -> list[Any]:
    # Each has memory of its own: a tensor that is sent to a worker takes its whole storage along.
    views = _views(arrays.to_numpy(block.samples), block)
    return [arrays.tensor_from_numpy(view.copy()) for view in views]


def _as_batches(plan: EpochPlan, block: RaggedBlock) -> list[Batch]:
    patch_ids = plan.labels[block.groups].tolist()
    return list(map(Batch, patch_ids, _views(block.samples, block), block.lengths.tolist()))


_SPLITTERS: dict[str, Any] = {
    "list": _as_lists,
    "numpy": _as_numpy,
    "tensor": _as_tensors,
    "batch": _as_batches,
}
