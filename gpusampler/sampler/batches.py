"""Readers of a rank's batches: evaluate blocks, copy them to the host, split them into batches."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, Generic, NamedTuple

import numpy as np

from gpusampler.core import arrays, devices
from gpusampler.core.arrays import Int64
from gpusampler.core.tracing import EVALUATE, LOAD_IDS, TRANSFER, Range
from gpusampler.core.transfer import HostTransfer, Prefetcher, side_stream
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.evaluators.base import BatchLocations, RaggedBlock
from gpusampler.plan.evaluators.host import HostEvaluator
from gpusampler.sampler.iterator import T
from gpusampler.sampler.passes import RankShard

FIRST_BLOCK_SAMPLES = 1 << 11
"""Number of indices in the first block: few, so that the first batch is ready immediately."""
MAX_BLOCK_GROWTH = 7
"""Largest ratio of a block to all blocks before it, so that there are few small, slow blocks."""
FEW_BATCHES = 16
MIN_RUN = 16
"""Batches are cut one by one if there are at most `FEW_BATCHES`, or if runs of equally large
batches are shorter than `MIN_RUN` on average: cutting a run takes as long as ten single batches."""
MAX_OBJECTS_AT_ONCE = 680
"""Maximum number of lists, dictionaries and tensors created at once. 700 of them trigger Python's
garbage collector, which visits them and sometimes all objects of the program."""
FIRST_LOCATED_SLOTS = 1 << 8
MAX_LOCATED_SLOTS = 1 << 13
"""Maximum number of slots located at once. Slots are located further ahead than samples are
evaluated, because this is far cheaper."""

_NO_ENDS = np.zeros(0, np.int64)


class Batch(NamedTuple):
    """One batch: its patch id, the indices of its samples, and how many of them count.

    Attributes
    ----------
    patch_id : int, or the patch's name if patches have names
        Id or name of the patch of all samples.
    indices : int64 array, shape (size,)
        Sample indices, on the sampler's device.
    valid : int
        Number of leading samples that count; the remaining ones fill the batch up under
        ``partial="pad"``. 0 if the batch is a repeat from a sampler made by `for_evaluation`.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([7, 7, 7], 2, seed=0, partial="pad")
    >>> [(batch.patch_id, len(batch.indices), batch.valid) for batch in sampler.batches(epoch=1)]
    [(7, 2, 2), (7, 2, 1)]
    """

    patch_id: Any
    indices: Any
    valid: int


class BlockReader:
    """A rank's batches of one epoch, evaluated block by block on the plan's device."""

    def __init__(self, shard: RankShard) -> None:
        self.plan = shard.plan
        self._shard = shard
        self._evaluate_range = shard.recorder.range(EVALUATE)
        evaluator = shard.plan.evaluator
        self._slot_evaluator: HostEvaluator | None = None
        if evaluator.works_on_host and evaluator.host.evaluates_slots:
            self._slot_evaluator = evaluator.host
        self._locations: BatchLocations | None = None
        self._sample_ends = _NO_ENDS
        self._row = 0
        self._num_located = 0
        self._num_samples = 0

    def read(self) -> RaggedBlock | None:
        """Return the next block of batches; None after the last."""
        evaluator = self.plan.evaluator
        if self._slot_evaluator is None and evaluator.needs_upload:
            if evaluator.needs_verification:
                with self._shard.recorder.range(LOAD_IDS):
                    evaluator.verify_order()
            with self._shard.recorder.range(TRANSFER):
                evaluator.upload_tables()
        with self._evaluate_range:
            return self._evaluate()

    def _evaluate(self) -> RaggedBlock | None:
        if self._slot_evaluator is not None:
            return self._evaluate_slots(self._slot_evaluator)
        locations = self._locations
        if locations is None or self._row == locations.group.size:
            locations = self._locate_next()
            if locations is None:
                return None
        # A block has at least one batch.
        start = int(self._sample_ends[self._row - 1]) if self._row else 0
        max_samples = max(FIRST_BLOCK_SAMPLES, MAX_BLOCK_GROWTH * self._num_samples)
        max_end = start + min(max_samples, self.plan.evaluator.block_samples)
        stop = max(self._row + 1, int(np.searchsorted(self._sample_ends, max_end, side="right")))
        rows = locations.rows(slice(self._row, stop))
        block = self.plan.evaluator.ragged(self._shard.epoch, rows)
        self._row = stop
        self._num_samples += int(self._sample_ends[stop - 1]) - start
        return block

    def _evaluate_slots(self, evaluator: HostEvaluator) -> RaggedBlock | None:
        """Locate and evaluate the batches of this rank's next slots in one call."""
        shard, plan = self._shard, self.plan
        start = self._num_located
        count = min(shard.steps - start, MAX_LOCATED_SLOTS)
        if count <= 0:
            return None
        max_samples = max(FIRST_BLOCK_SAMPLES, MAX_BLOCK_GROWTH * self._num_samples)
        max_samples = min(max_samples, evaluator.block_samples, count * plan.max_batch_size)
        first, step = shard.slot + start * shard.num_replicas + shard.rank, shard.num_replicas
        slots = range(first, first + count * step, step)
        block = evaluator.slot_range(shard.epoch, slots, max_samples)
        if block.sizes.size == 0:
            # The first batch is larger than a block.
            block = evaluator.slot_range(shard.epoch, slots[:1], plan.max_batch_size)
        num_batches = block.sizes.size
        self._num_located += num_batches
        self._num_samples += block.samples.size
        if not shard.repeats_count and slots[num_batches - 1] >= plan.num_batches:
            # Only the rank's last slot can be a repeat.
            block.lengths[-1] = 0
        return block

    def _locate_next(self) -> BatchLocations | None:
        """Locate the batches of this rank's next slots."""
        start = self._num_located
        steps = max(FIRST_LOCATED_SLOTS, min(MAX_BLOCK_GROWTH * start, MAX_LOCATED_SLOTS))
        stop = min(start + steps, self._shard.steps)
        if stop <= start:
            return None
        self._locations = locate_slots(self._shard, self._shard.slots(start, stop))
        self._sample_ends = np.cumsum(self._locations.size)
        self._row = 0
        self._num_located = stop
        return self._locations


def locate_slots(shard: RankShard, slots: Int64) -> BatchLocations:
    """Return the batches at ascending global slots; slots beyond the last repeat the first batches.

    If repeats do not count, their ``length`` is 0, but they are still returned.
    """
    num_slots = shard.plan.num_batches
    if int(slots[-1]) < num_slots:
        return shard.plan.evaluator.locate(shard.epoch, slots)
    locations = shard.plan.evaluator.locate(shard.epoch, slots % num_slots)
    if shard.repeats_count:
        return locations
    return locations._replace(length=np.where(slots < num_slots, locations.length, 0))


def valid_counts(shard: RankShard) -> Int64:
    """Return the number of samples that count in each batch of a shard: int64, shape (steps,)."""
    counts = np.empty(shard.steps, np.int64)
    for start in range(0, shard.steps, MAX_LOCATED_SLOTS):
        stop = min(start + MAX_LOCATED_SLOTS, shard.steps)
        counts[start:stop] = locate_slots(shard, shard.slots(start, stop)).length
    return counts


class HostBlockReader:
    """Copies the samples of a `BlockReader` from a device to the host, one block ahead.

    A block is valid until the next `read`. After device memory has run out, blocks are already on
    the host and are returned unchanged.
    """

    def __init__(
        self, block_reader: BlockReader, transfer: HostTransfer, transfer_range: Range
    ) -> None:
        self._block_reader = block_reader
        self._transfer = transfer
        self._transfer_range = transfer_range
        self._prefetcher: Prefetcher[RaggedBlock] = Prefetcher()

    def read(self) -> RaggedBlock | None:
        """Return the next block of batches, with its samples in NumPy; None after the last."""
        # The prefetcher evaluates and sends the next block before waiting for this one.
        block = self._prefetcher.get_next(self._send)
        if block is None or arrays.is_numpy(block.samples):
            return block
        with self._transfer_range:
            return block._replace(samples=self._transfer.take())

    def _send(self) -> RaggedBlock | None:
        block = self._block_reader.read()
        if block is None or arrays.is_numpy(block.samples):
            return block
        with self._transfer_range:
            try:
                self._transfer.send(block.samples)
            except Exception as error:
                # Pinned memory can run out, too.
                if not devices.is_out_of_memory(error):
                    raise
                self._block_reader.plan.evaluator.fall_back_to_host(error)
                return block._replace(samples=arrays.to_numpy(block.samples))
        return block


class BatchReader(Generic[T]):
    """A rank's batches of one epoch; ``output`` is "list", "numpy", "tensor" or "batch".

    Creating it raises RuntimeError if a DataLoader worker would have to return GPU arrays.
    """

    def __init__(self, shard: RankShard, output: str) -> None:
        plan = shard.plan
        self._plan = plan
        self._output = output
        self._block_reader: BlockReader | HostBlockReader = BlockReader(shard)
        self._transfer_range = shard.recorder.range(TRANSFER)
        self._reuses_memory = False
        self._remaining_block: RaggedBlock | None = None
        if output == "batch":
            devices.check_not_in_worker(plan.device)
        elif not plan.evaluator.works_on_host:
            stream = side_stream(plan.device)
            if stream is not None:
                self._block_reader = HostBlockReader(
                    self._block_reader, HostTransfer(stream), self._transfer_range
                )
                self._reuses_memory = True

    def read(self) -> list[T] | None:
        """Return the next batches; None after the last."""
        if self._remaining_block is None:
            self._remaining_block = self._read_block()
            if self._remaining_block is None:
                return None
        block, self._remaining_block = self._remaining_block.split(MAX_OBJECTS_AT_ONCE)
        batches: list[T] = _SPLITTERS[self._output](self._plan, block)
        return batches

    def _read_block(self) -> RaggedBlock | None:
        """Return the next block, its samples on the output's device; None after the last."""
        block = self._block_reader.read()
        if block is None:
            return None
        if self._output == "batch":
            if arrays.device_of(block.samples) != self._plan.device:
                with self._transfer_range:
                    block = block._replace(samples=arrays.upload(block.samples, self._plan.device))
        elif not arrays.is_numpy(block.samples):
            with self._transfer_range:
                block = block._replace(samples=arrays.to_numpy(block.samples))
        elif self._reuses_memory and self._output == "numpy":
            # The caller may keep the arrays, but pinned memory is reused.
            block = block._replace(samples=block.samples.copy())
        return block


def _cut_rows(
    samples: Any, sizes: Int64, split_rows: Callable[[Any], list[Any]]
) -> list[Any] | None:
    """Cut samples (NumPy, shape (T,)) into batches, run of equally large batches by run.

    ``split_rows`` turns the rows of a matrix into batches, in half the time of one call per batch.
    Return None if there are few batches, or runs are short.
    """
    if sizes.size <= FEW_BATCHES:
        return None
    changes = np.flatnonzero(sizes[1:] != sizes[:-1]) + 1
    if MIN_RUN * changes.size > sizes.size:
        return None
    batches: list[Any] = []
    start = 0
    for low, high in pairwise([0, *changes.tolist(), sizes.size]):
        size = int(sizes[low])
        end = start + (high - low) * size
        batches += split_rows(samples[start:end].reshape(-1, size))
        start = end
    return batches


def _cut(flat: Any, sizes: Int64) -> list[Any]:
    """Cut a sequence into consecutive slices of the given sizes."""
    return [flat[start:end] for start, end in pairwise(accumulate(sizes.tolist(), initial=0))]


def _rows_to_lists(matrix: Any) -> list[list[int]]:
    rows: list[list[int]] = matrix.tolist()
    return rows


def _to_lists(plan: EpochPlan, block: RaggedBlock) -> list[list[int]]:
    batches = _cut_rows(block.samples, block.sizes, _rows_to_lists)
    return _cut(block.samples.tolist(), block.sizes) if batches is None else batches


def _split_views(samples: Any, block: RaggedBlock) -> list[Any]:
    if not arrays.is_numpy(samples):
        return arrays.split_rows(samples, block.sizes.tolist())
    batches = _cut_rows(samples, block.sizes, list)
    return _cut(samples, block.sizes) if batches is None else batches


def _to_arrays(plan: EpochPlan, block: RaggedBlock) -> list[Any]:
    return _split_views(block.samples, block)


def _to_tensors(plan: EpochPlan, block: RaggedBlock) -> list[Any]:
    # Copies: pickling a view of a tensor for another process would send its whole storage.
    views = _split_views(block.samples, block)
    return [arrays.tensor_from_numpy(view.copy()) for view in views]


def _to_batches(plan: EpochPlan, block: RaggedBlock) -> list[Batch]:
    patch_ids = plan.labels[block.groups].tolist()
    return list(map(Batch, patch_ids, _split_views(block.samples, block), block.lengths.tolist()))


_SPLITTERS: dict[str, Any] = {
    "list": _to_lists,
    "numpy": _to_arrays,
    "tensor": _to_tensors,
    "batch": _to_batches,
}
