"""Sort samples by patch, for `PatchGroups`.

The host uses a stable counting sort in two passes over the ids, which are read in order, block by
block. The first pass (`census`) counts; the second writes samples to their final places: in C where
it was compiled, else after sorting each chunk in cache. Only the result is as large as the dataset,
and it may be a memory-mapped file (see `index_format`). A device uses one stable argsort of the
narrowest keys that hold the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays, devices, progress_bar
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST, Device
from gpusampler.core.log import warn
from gpusampler.core.memory import check_free_memory
from gpusampler.core.validation import check_ids
from gpusampler.groups import fingerprint
from gpusampler.groups.census import (
    CHUNK,
    RADIX,
    Census,
    CensusResult,
    StateArrays,
    check_patch_sizes,
    first_occurrences,
)
from gpusampler.permutation import _native
from gpusampler.permutation._native import address
from gpusampler.permutation.host import order_address
from gpusampler.sources.base import BLOCK, PatchIds
from gpusampler.sources.in_memory import ArrayIds

INT32_SAMPLES = 1 << 31
DEVICE_DTYPES = ("uint8", "int8", "int16", "int32", "int64")
"""dtypes that both torch and CuPy sort."""


class IdsChanged(RuntimeError):
    """The second pass read different ids than the first."""

    def __init__(self) -> None:
        super().__init__(
            "ids changed while they were grouped: the second pass read different values than the "
            "first. Do not modify them until grouping has finished."
        )


class GroupingResult(NamedTuple):
    """Patches by ascending id: ``patch_ids``, ``counts`` and ``starts`` are int64, shape (G,).

    ``order`` holds the samples sorted by patch, int32 below 2**31 samples, else int64, and
    ``starts`` are offsets into it. If every patch is one run, ``order`` is None and ``starts`` are
    sample indices. ``device`` is where the ids were grouped.
    """

    patch_ids: Int64
    counts: Int64
    starts: Int64
    order: Any
    fingerprint: int
    device: Device = HOST


class GroupingStorage(Protocol):
    """Where grouping stores its result and its checkpoints."""

    def saved_state(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the last checkpoint of an interrupted run, or None."""

    def checkpoint(self, state: Callable[[], StateArrays], is_last: bool) -> None:
        """Save the state and flush the order, if a checkpoint is due or ``is_last``."""

    def allocate_order(self, size: int, dtype: Any) -> NDArray[Any]:
        """Return storage for the order: int32 or int64, shape (size,)."""


class MemoryStorage:
    """Stores the result in memory, without checkpoints."""

    def saved_state(self) -> None:
        """Return None."""

    def checkpoint(self, state: Callable[[], StateArrays], is_last: bool) -> None:
        """Do nothing."""

    def allocate_order(self, size: int, dtype: Any) -> NDArray[Any]:
        """Return a new array."""
        needed = size * np.dtype(dtype).itemsize
        check_free_memory(
            needed,
            HOST,
            f"the order of {size} samples",
            "PatchGroups.from_ids(ids, path=...) stores it in a memory-mapped file",
        )
        return np.empty(size, dtype)


def group_on_host(
    ids: PatchIds, storage: GroupingStorage | None = None, *, progress: bool = False
) -> GroupingResult:
    """Group patch ids on the host, into ``storage`` (default: memory).

    Raise IdsChanged if the ids changed between the two passes.
    """
    arrays.reuse_temporaries()
    storage = MemoryStorage() if storage is None else storage
    state = storage.saved_state()
    census = Census(ids.size, state)
    if census.num_seen < ids.size:
        checkpoint = partial(storage.checkpoint, census.state)
        _add_blocks(ids, census.num_seen, census.add, checkpoint, "counting patches", progress)
    patch_ids, counts, starts, id_fingerprint = result = census.result()
    check_patch_sizes(patch_ids, counts, ids.names)
    if starts is not None:
        return GroupingResult(patch_ids, counts, starts, None, id_fingerprint)
    dtype = np.int32 if ids.size < INT32_SAMPLES else np.int64
    order = storage.allocate_order(ids.size, dtype)
    writer = OrderWriter(result, order, state, verify=not ids.in_memory)
    checkpoint = partial(storage.checkpoint, lambda: {**census.state(), **writer.state()})
    _add_blocks(ids, writer.num_written, writer.add, checkpoint, "sorting samples", progress)
    return GroupingResult(patch_ids, counts, writer.finish(), order, id_fingerprint)


def _add_blocks(
    ids: PatchIds,
    first: int,
    add: Callable[[NDArray[Any]], None],
    checkpoint: Callable[[bool], None],
    label: str,
    progress: bool,
) -> None:
    """Add all ids from ``first`` on, block by block, with a checkpoint between blocks."""
    with progress_bar.ProgressBar(ids.size, label, "samples", progress) as bar:
        bar.update(first)
        for _, block in ids.blocks(first):
            add(block)
            checkpoint(False)
            bar.update(block.size)
        checkpoint(True)


class OrderWriter:
    """Writes samples, block by block, to their places in ``order``, shape (N,).

    Pass ``state``, from `OrderWriter.state`, to resume: samples written after that state are
    written again. With ``verify``, `finish` raises if the ids changed since they were counted.
    """

    def __init__(
        self,
        census_result: CensusResult,
        order: NDArray[Any],
        state: Mapping[str, NDArray[Any]] | None,
        *,
        verify: bool = True,
    ) -> None:
        self.order = order
        self.num_written = 0
        self._ends = np.cumsum(census_result.counts)
        self._next_locations = self._ends - census_result.counts
        self._group_lookup = census_result.group_lookup()
        self._fingerprint = census_result.fingerprint
        # Counts alone would not reveal samples that swapped their ids.
        self._id_sum = fingerprint.IdSum()
        self._verify = verify
        self._order_address = 0 if _native.module is None else order_address(order)
        if state is not None and "written" in state:
            self.num_written = int(state["written"])
            if state["cursor"].shape != self._ends.shape:
                raise IdsChanged
            self._next_locations = state["cursor"].astype(np.int64)
            self._id_sum.total = int(state["written_sum"])

    def add(self, ids: NDArray[Any]) -> None:
        """Write the next block of samples."""
        num_groups = self._next_locations.size
        # A sort's cost per chunk (a pass over all patches, or two sorts) grows with the number of
        # patches, so chunks grow too.
        if self._order_address:
            chunk_size, place = CHUNK, self._place_compiled
        elif num_groups <= RADIX:
            chunk_size = max(CHUNK, 2 * num_groups)
            place = partial(self._place_sorted, self._sort_few)
        else:
            chunk_size, place = BLOCK, partial(self._place_sorted, self._sort_many)
        for first in range(0, ids.size, chunk_size):
            chunk = ids[first : first + chunk_size]
            if self._verify:
                self._id_sum.add(self.num_written, chunk.astype(np.int64, copy=False))
            try:
                place(self._group_lookup(chunk))
            except (IndexError, ValueError) as error:
                # The census has no group or no free place for an id.
                raise IdsChanged from error
            self.num_written += chunk.size

    def _place_compiled(self, group: NDArray[Any]) -> None:
        """Write the samples of a chunk in compiled code."""
        num_placed = _native.module.place(
            address(group),
            group.itemsize,
            group.size,
            self.num_written,
            address(self._next_locations),
            address(self._ends),
            self._ends.size,
            self._order_address,
            self.order.itemsize,
            self.order.size,
        )
        if num_placed < group.size:
            raise IdsChanged

    def _place_sorted(
        self, sort: Callable[[NDArray[Any]], tuple[Int64, Int64]], group: NDArray[Any]
    ) -> None:
        """Write the samples of a chunk after sorting them by patch in cache."""
        locations, samples = sort(group)
        samples += self.num_written
        self.order[locations] = samples

    def state(self) -> StateArrays:
        """Return the state after the last `add` as arrays."""
        return {
            "written": np.array(self.num_written),
            "written_sum": np.array(self._id_sum.total, np.uint64),
            "cursor": self._next_locations,
        }

    def finish(self) -> Int64:
        """Return the start of each patch in the order, or raise IdsChanged.

        Call this after all samples are written.
        """
        has_changed = self._verify and self._id_sum.value(self.order.size) != self._fingerprint
        if has_changed or not np.array_equal(self._next_locations, self._ends):
            raise IdsChanged
        return np.append(0, self._ends[:-1])

    def _sort_few(self, group: NDArray[Any]) -> tuple[Int64, Int64]:
        """Return the target locations and the samples of a chunk, sorted by patch."""
        samples = group.argsort(kind="stable")
        counts = np.bincount(group, minlength=self._next_locations.size)
        # Samples of one patch in a chunk have consecutive targets.
        locations = np.repeat(self._next_locations - (np.cumsum(counts) - counts), counts)
        locations += np.arange(group.size)
        self._next_locations += counts
        return locations, samples

    def _sort_many(self, group: NDArray[Any]) -> tuple[Int64, Int64]:
        """`_sort_few` for more than 2**16 patches: a radix sort with two 16-bit digits."""
        samples = (group & (RADIX - 1)).astype(np.uint16).argsort(kind="stable")
        high_digits = (group >> 16).astype(np.uint16)[samples]
        samples = samples[high_digits.argsort(kind="stable")]
        sorted_groups = group[samples]
        first = first_occurrences(sorted_groups)
        counts = np.diff(first, append=group.size)
        groups_in_chunk = sorted_groups[first]
        locations = np.repeat(self._next_locations[groups_in_chunk] - first, counts)
        locations += np.arange(group.size)
        self._next_locations[groups_in_chunk] += counts
        return locations, samples


def group_ids(ids: PatchIds, *, progress: bool = False) -> GroupingResult:
    """Group patch ids on their `grouping_device`, or on the host if it runs out of memory."""
    device = ids.grouping_device
    if not device.on_host:
        try:
            if isinstance(ids, ArrayIds):
                # Approximate peak of the radix sorts of torch and CuPy with keys of four bytes.
                check_free_memory(
                    40 * ids.size,
                    device,
                    f"sorting {ids.size} ids",
                    "use narrower ids (int32, int16), or pass ids on the host to sort them there",
                )
            return group_on_device(ids.array)  # type: ignore[attr-defined]
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            warn(
                f"not enough memory on {device} to sort {ids.size} ids; sorting on the host "
                f"(identical result, slower): {' '.join(str(error).split())[:200]}"
            )
    return group_on_host(ids, progress=progress)


def group_on_device(ids: Any) -> GroupingResult:
    """Group a torch or CuPy integer array, shape (N,) with N >= 1, on its device.

    Only arrays of shape (G,) are copied to the host. Raise ValueError for 2**31 samples or more,
    the limit of the device sorts.
    """
    device = arrays.device_of(ids)
    with devices.device_context(device):
        return _group_array(device, ids)


def _group_array(device: Device, ids: Any) -> GroupingResult:
    xp = arrays.namespace(device)
    size = int(ids.shape[0])
    if size >= INT32_SAMPLES:
        raise ValueError(
            f"ids on {device} must have fewer than 2**31 elements, got {size}; pass them as a "
            "NumPy array or a CPU tensor"
        )
    ids = check_ids(ids)
    if arrays.dtype_name(ids) not in DEVICE_DTYPES:
        # torch has no arithmetic for unsigned dtypes beyond uint8.
        ids = xp.astype(ids, xp.int64, copy=False)
    id_fingerprint = fingerprint.of_device_ids(xp, ids, devices.device_handle(device))
    if _are_distinct(xp, arrays.unique_consecutive(ids[:CHUNK])[0]):
        values, counts = arrays.unique_consecutive(ids)
        if _are_distinct(xp, values):
            patch_ids, host_counts = _on_host(values), _on_host(counts)
            starts = np.cumsum(host_counts) - host_counts
            id_order = np.argsort(patch_ids, kind="stable")
            return GroupingResult(
                patch_ids[id_order],
                host_counts[id_order],
                starts[id_order],
                None,
                id_fingerprint,
                device,
            )
    keys, an_id, its_key = _narrow_keys(xp, device, ids)
    order = arrays.stable_argsort(keys)
    values, counts = arrays.unique_consecutive(keys[order])
    # Before the copies to the host, which wait for it: another stream may then read the order.
    order = xp.astype(order, xp.int32)
    patch_ids, host_counts = _on_host(values) - its_key + an_id, _on_host(counts)
    starts = np.cumsum(host_counts) - host_counts
    return GroupingResult(patch_ids, host_counts, starts, order, id_fingerprint, device)


def _narrow_keys(xp: Any, device: Device, ids: Any) -> tuple[Any, int, int]:
    """Return keys, in the narrowest dtype, that sort like ``ids``, with an id and its key."""
    min_id, max_id = int(xp.min(ids)), int(xp.max(ids))
    name, shift = arrays.narrowest_dtype(device.library, max_id - min_id + 1)
    if np.dtype(name).itemsize >= ids.itemsize:
        return ids, 0, 0
    # No overflow: the differences fit in a narrower dtype than that of the ids.
    keys = ids - min_id
    return xp.astype(keys + shift if shift else keys, getattr(xp, name)), min_id, shift


def _on_host(array: Any) -> Int64:
    return arrays.to_numpy(array).astype(np.int64)


def _are_distinct(xp: Any, values: Any) -> bool:
    sorted_values = xp.sort(values)
    return not bool(xp.any(sorted_values[1:] == sorted_values[:-1]))
