"""PatchTensorLoader: batches of one patch from tensors in memory, or from arrays in files.

A DataLoader reads single samples and stacks them, which takes most of the time if the samples are
rows of a tensor. This loader gathers the rows of many batches at once and splits them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from gpusampler.core import arrays, devices
from gpusampler.core.devices import HOST, Device
from gpusampler.core.tracing import TRANSFER
from gpusampler.core.transfer import Event, Prefetcher, SideStream, finish_copies, side_stream
from gpusampler.core.validation import check_int
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.evaluators.base import RaggedBlock
from gpusampler.sampler.batch_sampler import PatchBatchSampler
from gpusampler.sampler.batches import MAX_OBJECTS_AT_ONCE, BlockReader
from gpusampler.sampler.file_rows import FileRows, in_file
from gpusampler.sampler.iterator import EpochIterator
from gpusampler.sampler.passes import RankShard
from gpusampler.sampler.read_ahead import READ_AHEAD_BYTES, ReadAhead, RowIndex, rows_within

HOST_GATHER_BYTES = 1 << 20
DEVICE_GATHER_BYTES = 1 << 25
"""Number of bytes gathered at once (at least one batch): fits a CPU cache, or keeps a GPU busy."""

RESERVED_NAMES = ("patch_id", "valid")

TensorBatch = dict[str, Any]


class PatchTensorLoader:
    """Loader of batches, each of one patch, from tensors in memory or arrays in files.

    It replaces ``DataLoader(TensorDataset(...), batch_sampler=sampler)``. Tensors on the device of
    the batches are gathered there. If batches are on a GPU and tensors on the host, rows are
    gathered into pinned memory, and the next rows are copied on a side stream while a batch is in
    use. The rows of HDF5 datasets, zarr arrays and memory maps are read for many batches at once,
    in the order of the file, by a thread that reads the next rows while these batches are in use.

    Parameters
    ----------
    sampler : PatchBatchSampler
        Its batches are evaluated where the tensors are (on the host, if any tensor is there),
        whatever the sampler's own device; they are identical.
    device : str or torch.device, optional
        Device of the batches. Default: the GPU of the tensors if one is on a GPU, else the host.
        "cpu" and "numpy" both mean the host, where each array of a batch is of the same library as
        its tensor; rows from files are NumPy arrays.
    read_ahead_bytes : int, default 2**27 (128 MiB)
        Most bytes of rows from files in memory, in use and read ahead; at least two batches are.
        More of them are read faster: a chunk of a file is decoded once for all rows read together.
    **tensors : arrays, shape (N, ...)
        Torch tensors, or NumPy or CuPy arrays, or datasets of h5py, arrays of zarr or memory maps
        of NumPy, with one row per sample of the sampler's dataset. Their names are the keys of the
        batches; "patch_id", "valid", "device" and "read_ahead_bytes" are reserved.

    Attributes
    ----------
    batch_sampler : PatchBatchSampler
    device : Device

    Raises
    ------
    TypeError
        If the sampler is not a `PatchBatchSampler`, or a tensor is not an array of numbers. (NumPy
        arrays may have any dtype if the batches are on the host.)
    ValueError
        If there are no tensors, a tensor does not have one row per sample, tensors are on several
        GPUs or on a GPU that is not ``device``, an HDF5 file is closed, or ``read_ahead_bytes`` is
        not positive.
    RuntimeError
        If ``device`` does not exist.

    Examples
    --------
    >>> import numpy as np
    >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
    >>> loader = PatchTensorLoader(sampler, x=np.arange(10.0).reshape(5, 2), y=np.arange(5))
    >>> len(loader)
    3
    >>> batch = next(iter(loader))
    >>> sorted(batch), batch["x"].shape == (batch["valid"], 2)
    (['patch_id', 'valid', 'x', 'y'], True)
    """

    def __init__(
        self,
        sampler: PatchBatchSampler,
        /,
        *,
        device: Any = None,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
        **tensors: Any,
    ) -> None:
        if not isinstance(sampler, PatchBatchSampler):
            raise TypeError(f"sampler must be a PatchBatchSampler, got {type(sampler).__name__}")
        if not tensors:
            raise ValueError("tensors must be given by name, such as x=x, got none")
        num_samples = sampler.plan.groups.source_size
        tensors = {name: in_file(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            _check_tensor(name, tensor, num_samples)
        self.batch_sampler = sampler
        self._read_ahead_bytes = check_int(read_ahead_bytes, "read_ahead_bytes", low=1)
        self.device = _batch_device(tensors, device)
        # One gather makes many batches, so a gradient could not flow through a single batch.
        self._tensors = {name: _detach(tensor) for name, tensor in tensors.items()}
        self._working_plans: tuple[EpochPlan, EpochPlan] | None = None

    def __len__(self) -> int:
        """Return the number of batches of a full epoch on this rank."""
        return len(self.batch_sampler)

    def __iter__(self) -> EpochIterator[TensorBatch]:
        """Return an iterator over this rank's batches of the next epoch.

        The epoch is chosen when the first batch is drawn. The iterator has ``len``, ``state_dict``
        and ``load_state_dict``. A batch is a dictionary. It has the rows of each tensor, shape
        (size, ...), on `device`, without gradients; ``patch_id``, an int, or a name if patches have
        names; and ``valid``, the number of leading rows that count. Under ``partial="pad"``, the
        remaining rows fill the batch up. Consecutive batches share memory, so keeping one batch
        keeps a few more in memory. They never share memory with the tensors.

        An error of the thread that reads files is raised here; the next batch is then tried again.
        The thread ends with the epoch, or when the iterator is freed.
        """
        return self.batch_sampler._iterate(self._make_reader)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iterator, as `PatchBatchSampler.set_epoch` does.

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is not an integer in 0 .. 2**63 - 1.
        """
        self.batch_sampler.set_epoch(epoch)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the state after the batches returned so far; prefetched batches do not count.

        Parameters
        ----------
        step : int, optional
            As for `PatchBatchSampler.state_dict`, which returns the same state.

        Returns
        -------
        dict

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As `PatchBatchSampler.state_dict` does.
        """
        return self.batch_sampler.state_dict(step)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a saved state, as `PatchBatchSampler.load_state_dict` does.

        Raises
        ------
        TypeError, ValueError
            If ``state_dict`` is not a saved state, or differs in ids, settings or an explicit seed.
        """
        self.batch_sampler.load_state_dict(state_dict)

    def _make_reader(self, shard: RankShard) -> TensorReader:
        # Cached, so that the tables and the order of all samples are uploaded once, not per epoch.
        plans = self._working_plans
        if plans is None or plans[0] is not shard.plan:
            plans = shard.plan, shard.plan.on(working_device(self._tensors, self.device))
            self._working_plans = plans
        shard = shard._replace(plan=plans[1])
        return TensorReader(
            shard, self._tensors, self.device, read_ahead_bytes=self._read_ahead_bytes
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cached plan; the copy makes it at first use."""
        return {**self.__dict__, "_working_plans": None}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={tuple(t.shape)}" for name, t in self._tensors.items())
        return f"PatchTensorLoader({shapes}, device={str(self.device)!r}, {self.batch_sampler!r})"


class TensorReader:
    """Reads the batches of a shard, several at a time, as rows of tensors.

    The shard's plan is on the `working_device`. ``device`` is the device of the batches; ``stream``
    copies host tensors there (default: the device's side stream).
    """

    def __init__(
        self,
        shard: RankShard,
        tensors: Mapping[str, Any],
        device: Device,
        stream: SideStream | None = None,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
    ) -> None:
        devices.check_not_in_worker(device)
        files = {n: t for n, t in tensors.items() if isinstance(t, FileRows)}
        self._resident_tensors = {n: t for n, t in tensors.items() if _is_on(t, device)}
        self._host_tensors = {
            n: t for n, t in tensors.items() if n not in self._resident_tensors and n not in files
        }
        self._names = list(tensors)
        self._plan = shard.plan
        self._device = device
        row_bytes = sum(_row_bytes(tensor) for tensor in tensors.values())
        gather_bytes = HOST_GATHER_BYTES if device.on_host else DEVICE_GATHER_BYTES
        max_rows = max(1, gather_bytes // max(row_bytes, 1))
        window_rows = rows_within(read_ahead_bytes // 2, files)
        if files:
            max_rows = min(max_rows, window_rows)
        # A batch is a dictionary and a view of each tensor.
        max_batches = max(1, MAX_OBJECTS_AT_ONCE // (1 + len(tensors)))
        self._chunk_reader = ChunkReader(BlockReader(shard), max_rows, max_batches)
        self._transfer_range = shard.recorder.range(TRANSFER)
        self._read_ahead: ReadAhead | None = None
        if files:
            self._read_ahead = ReadAhead(
                files, self._chunk_reader, window_rows, self._transfer_range
            )
        self._staging: StagingBuffers | None = None
        if self._host_tensors or (files and not device.on_host):
            stream = side_stream(device) if stream is None else stream
            self._staging = StagingBuffers(device, stream)
        self._prefetcher: Prefetcher[tuple[RaggedBlock, Any]] = Prefetcher()

    def read(self) -> list[TensorBatch] | None:
        """Return the next batches; None after the last."""
        rows: dict[str, Any] = {}
        if self._staging is None:
            chunk, sources = self._read_chunk() or (None, {})
            for name, (tensor, index) in sources.items():
                rows[name] = arrays.take_rows(tensor, index)
        else:
            # The prefetcher sends the next chunk before waiting for this one.
            chunk, sent = self._prefetcher.get_next(self._send) or (None, {})
            with self._transfer_range:
                rows = self._staging.take(sent)
        if chunk is None:
            return None
        if self._resident_tensors:
            index = arrays.to_index(chunk.samples, self._device)
            for name, tensor in self._resident_tensors.items():
                rows[name] = arrays.take_rows(tensor, index)
        return self._make_batches(chunk, rows)

    def _read_chunk(self) -> tuple[RaggedBlock, dict[str, RowIndex]] | None:
        """Return the next chunk, and the rows on the host that it needs; None after the last."""
        if self._read_ahead is not None:
            read = self._read_ahead.read()
        else:
            chunk = self._chunk_reader.read()
            read = None if chunk is None else (chunk, {})
        if read is not None:
            chunk, sources = read
            for name, tensor in self._host_tensors.items():
                sources[name] = tensor, chunk.samples
        return read

    def _send(self) -> tuple[RaggedBlock, Any] | None:
        read = self._read_chunk()
        if read is None or self._staging is None:
            return None
        chunk, sources = read
        with self._transfer_range:
            return chunk, self._staging.send(sources)

    def _make_batches(self, chunk: RaggedBlock, rows: Mapping[str, Any]) -> list[TensorBatch]:
        sizes = chunk.sizes.tolist()
        columns = {name: arrays.split_rows(rows[name], sizes) for name in self._names}
        columns["patch_id"] = self._plan.labels[chunk.groups].tolist()
        columns["valid"] = chunk.lengths.tolist()
        # Column by column takes a quarter of the time of `dict` for each batch.
        batches: list[TensorBatch] = [{} for _ in sizes]
        for name, column in columns.items():
            for batch, value in zip(batches, column, strict=True):
                batch[name] = value
        return batches


class ChunkReader:
    """Splits blocks into chunks of at most ``max_rows`` rows and ``max_batches`` batches.

    A chunk has at least one batch. A block has many indices, whatever the size of a row, so its
    rows may not fit in memory.
    """

    def __init__(self, block_reader: BlockReader, max_rows: int, max_batches: int) -> None:
        self._block_reader = block_reader
        self._max_rows = max_rows
        self._max_batches = max_batches
        self._chunks: Iterator[RaggedBlock] = iter(())

    def read(self) -> RaggedBlock | None:
        """Return the next chunk, None after the last."""
        for chunk in self._chunks:
            return chunk
        block = self._block_reader.read()
        if block is None:
            return None
        self._chunks = iter(self._split(block))
        return next(self._chunks)

    def _split(self, block: RaggedBlock) -> list[RaggedBlock]:
        ends = block.ends
        chunks = []
        start = first = 0
        while start < ends.size:
            stop = int(np.searchsorted(ends, first + self._max_rows, side="right"))
            stop = min(max(stop, start + 1), start + self._max_batches)
            batches, end = slice(start, stop), int(ends[stop - 1])
            chunk = RaggedBlock(
                block.samples[first:end], *(column[batches] for column in block[1:])
            )
            chunks.append(chunk)
            start, first = stop, end
        return chunks


class StagingBuffers:
    """Copies rows of arrays on the host to a device through pinned memory.

    One of two sets of buffers is filled while the copy of the other set may still run. Without a
    stream, copies are synchronous.
    """

    NUM_SETS = 2

    def __init__(self, device: Device, stream: SideStream | None) -> None:
        self._device = device
        self._stream = stream
        self._buffers: list[dict[str, Any]] = [{} for _ in range(self.NUM_SETS)]
        self._copies: list[list[Event]] = [[] for _ in range(self.NUM_SETS)]
        self._next = 0

    def send(self, sources: Mapping[str, RowIndex]) -> dict[str, tuple[Any, Event | None]]:
        """Gather rows and start copying them."""
        buffer_set, self._next = self._next, (self._next + 1) % self.NUM_SETS
        for copy in self._copies[buffer_set]:
            copy.synchronize()
        self._copies[buffer_set] = []
        sent: dict[str, tuple[Any, Event | None]] = {}
        for name, (tensor, index) in sources.items():
            if self._stream is None:
                rows = arrays.take_rows(tensor, arrays.to_index(index, arrays.device_of(tensor)))
                sent[name] = arrays.to_device(rows, self._device), None
                continue
            shape = (index.size, *tensor.shape[1:])
            dtype = arrays.dtype_name(tensor)
            pinned = self._pinned_buffer(self._stream, buffer_set, name, dtype, prod(shape))
            arrays.take_rows_into(pinned, tensor, index)
            device_rows, event = self._stream.copy_to_device(pinned, shape)
            sent[name] = device_rows, event
            self._copies[buffer_set].append(event)
        return sent

    def take(self, sent: Mapping[str, tuple[Any, Event | None]]) -> dict[str, Any]:
        """Return rows from `send`; the current stream waits for their copies, the host does not."""
        for device_rows, event in sent.values():
            if event is not None and self._stream is not None:
                self._stream.wait_for_copy(event, device_rows)
        return {name: device_rows for name, (device_rows, _) in sent.items()}

    def __del__(self) -> None:
        """Wait for running copies before the buffers are freed."""
        finish_copies(self._stream)

    def _pinned_buffer(
        self, stream: SideStream, buffer_set: int, name: str, dtype: str, size: int
    ) -> Any:
        buffer = self._buffers[buffer_set].get(name)
        if buffer is None or int(buffer.shape[0]) < size:
            buffer = stream.allocate_pinned(size, dtype)
            self._buffers[buffer_set][name] = buffer
        return buffer[:size]


def working_device(tensors: Mapping[str, Any], device: Device) -> Device:
    """Return where indices are needed: on the host if any tensor is there or in a file."""
    return device if all(_is_on(tensor, device) for tensor in tensors.values()) else HOST


def _is_on(tensor: Any, device: Device) -> bool:
    if isinstance(tensor, FileRows):
        return False
    tensor_device = arrays.device_of(tensor)
    return tensor_device == device or (tensor_device.on_host and device.on_host)


def _detach(tensor: Any) -> Any:
    return tensor.detach() if hasattr(tensor, "detach") else tensor


def _row_bytes(tensor: Any) -> int:
    size: int = prod(tensor.shape[1:]) * tensor.itemsize
    return size


def _check_tensor(name: str, tensor: Any, num_samples: int) -> None:
    if name in RESERVED_NAMES:
        raise ValueError(f"tensors must not be named {name!r}: every batch has a key of this name")
    if arrays.library_of(tensor) is None and not isinstance(tensor, FileRows):
        raise TypeError(
            f"{name} must be a torch tensor, an array of NumPy, CuPy or zarr, or an HDF5 dataset, "
            f"got {type(tensor).__name__}"
        )
    if arrays.library_of(tensor) == "torch" and not arrays.is_numeric(tensor):
        raise TypeError(
            f"{name} must be a dense tensor, not sparse, nested, quantized or on the meta device, "
            f"got {tensor.layout} of {tensor.dtype} on {tensor.device}"
        )
    num_rows = int(tensor.shape[0]) if len(tensor.shape) else None
    if num_rows != num_samples:
        raise ValueError(
            f"{name} must have a row for each of {num_samples} samples, "
            f"got shape {tuple(tensor.shape)}"
        )


def _batch_device(tensors: Mapping[str, Any], device: Any) -> Device:
    in_memory = {name: t for name, t in tensors.items() if not isinstance(t, FileRows)}
    tensor_devices = {name: arrays.device_of(tensor) for name, tensor in in_memory.items()}
    gpu_devices = {name: d for name, d in tensor_devices.items() if not d.on_host}
    if device is None:
        batch_device = next(iter(gpu_devices.values()), HOST)
    else:
        batch_device = devices.parse_device(device)
    for name, tensor_device in gpu_devices.items():
        if tensor_device != batch_device:
            raise ValueError(
                f"{name} must be on {batch_device} or on the host, as the batches are on "
                f"{batch_device}, got {tensor_device}"
            )
    if batch_device.on_host:
        return batch_device
    # Objects, strings and masked arrays of NumPy cannot leave the host.
    for name, tensor in tensors.items():
        dtype = arrays.dtype_name(tensor)
        if not (arrays.is_numeric(tensor) and arrays.has_dtype(batch_device.library, dtype)):
            raise TypeError(
                f"{name} must have a numeric dtype that {batch_device} supports and no masked "
                f"elements, got {type(tensor).__name__} of {dtype}"
            )
    return batch_device
