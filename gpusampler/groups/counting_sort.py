"""Sorting samples by patch: the work behind `PatchGroups`.

On the host it is a stable counting sort in two passes over the ids, which are read in order, block
by block, from wherever they lie: `census` finds what there is, then every chunk is sorted by
patch while it lies in cache and written to where its samples belong. Nothing but the result is as
large as the dataset, and the result may lie in a file (see `index_format`).

On a device it is one stable argsort of the narrowest type, and unique_consecutive.
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
from gpusampler.sources.base import BLOCK, PatchIds

INT32_SAMPLES = 1 << 31


class IdsChanged(RuntimeError):
    """The second pass found other ids than the first."""

    def __init__(self) -> None:
        super().__init__(
            "ids must stay as they are while they are grouped, got others in the second pass"
        )


class GroupingResult(NamedTuple):
    """What grouping finds.

    ``patch_ids``, ``counts`` and ``starts`` are int64 NumPy arrays of shape (G,), by ascending
    patch id. ``order`` is int32 below 2**31 samples, else int64, or None where every patch is a
    run; ``starts`` then counts samples, otherwise places in ``order``.
    """

    patch_ids: Int64
    counts: Int64
    starts: Int64
    order: Any
    fingerprint: int


class GroupingStorage(Protocol):
    """Where grouping keeps its result, and how far it has come."""

    def saved_state(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the state that was kept last, if grouping was broken off."""

    def checkpoint(self, state: Callable[[], StateArrays], is_last: bool) -> None:
        """Keep the state, if it is time to or the last one, with all written to the order."""

    def allocate_order(self, size: int, dtype: Any) -> NDArray[Any]:
        """Return room for the order: int32 or int64, shape (size,)."""


class MemoryStorage:
    """Keeps the result in memory; it is lost with the process."""

    def saved_state(self) -> None:
        """Return None: there is nothing to go on with."""

    def checkpoint(self, state: Callable[[], StateArrays], is_last: bool) -> None:
        """Do nothing."""

    def allocate_order(self, size: int, dtype: Any) -> NDArray[Any]:
        """Return a new array."""
        needed = size * np.dtype(dtype).itemsize
        check_free_memory(
            needed,
            HOST,
            f"the order of {size} samples",
            "PatchGroups.from_ids(ids, path=...) keeps it in a file that is mapped into memory",
        )
        return np.empty(size, dtype)


def group_on_host(
    ids: PatchIds, storage: GroupingStorage | None = None, *, progress: bool = False
) -> GroupingResult:
    """Group patch ids that NumPy can read, wherever they lie.

    Parameters
    ----------
    ids : PatchIds
    storage : GroupingStorage, optional
        Default: in memory.
    progress : bool
        Show a bar if it takes more than a second.

    Raises
    ------
    ValueError
        If a patch has 2**31 samples or more.
    IdsChanged
        If the ids changed between the two passes.
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
    """Add all ids from ``first`` on, block by block, and keep the state between blocks."""
    with progress_bar.ProgressBar(ids.size, label, "samples", progress) as bar:
        bar.update(first)
        for _, block in ids.blocks(first):
            add(block)
            checkpoint(False)
            bar.update(block.size)
        checkpoint(True)


class OrderWriter:
    """Writes samples to their places, patch by patch, as their ids come.

    Parameters
    ----------
    census_result : CensusResult
    order : integer array, shape (N,)
        Where to.
    state : mapping of arrays, optional
        From `state`, to go on from there; what was written since is written again.
    verify : bool
        Whether the ids may have changed since they were counted.
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
        # Samples that have changed places leave every count as it was.
        self._id_sum = fingerprint.IdSum()
        self._verify = verify
        if state is not None and "written" in state:
            self.num_written = int(state["written"])
            self._next_locations = state["cursor"].copy()
            self._id_sum.total = int(state["written_sum"])

    def add(self, ids: NDArray[Any]) -> None:
        """Write the next block of samples."""
        num_groups = self._next_locations.size
        sort = self._sort_few if num_groups <= RADIX else self._sort_many
        # A chunk pays for a pass over all patches, or for two sorts: so it is larger where there
        # are many.
        chunk_size = max(CHUNK, 2 * num_groups) if num_groups <= RADIX else BLOCK
        for first in range(0, ids.size, chunk_size):
            chunk = ids[first : first + chunk_size]
            if self._verify:
                self._id_sum.add(self.num_written, chunk.astype(np.int64, copy=False))
            try:
                group = self._group_lookup(chunk)
                locations, samples = sort(group)
                samples += self.num_written
                self.order[locations] = samples
            except (IndexError, ValueError) as error:
                # No place was counted for an id: it was not there in the first pass.
                raise IdsChanged from error
            self.num_written += group.size

    def state(self) -> StateArrays:
        """Return how far this is, in arrays."""
        return {
            "written": np.array(self.num_written),
            "written_sum": np.array(self._id_sum.total, np.uint64),
            "cursor": self._next_locations,
        }

    def finish(self) -> Int64:
        """Return where each patch starts in the order, once all samples are written.

        Raises
        ------
        IdsChanged
            If there were other ids than were counted, or the same ones elsewhere.
        """
        has_changed = self._verify and self._id_sum.value(self.order.size) != self._fingerprint
        if has_changed or not np.array_equal(self._next_locations, self._ends):
            raise IdsChanged
        return np.append(0, self._ends[:-1])

    def _sort_few(self, group: NDArray[Any]) -> tuple[Int64, Int64]:
        """Return where the samples of a chunk go, and which they are, patch by patch."""
        samples = group.argsort(kind="stable")
        counts = np.bincount(group, minlength=self._next_locations.size)
        # Within the chunk a patch's samples end up side by side: their targets are consecutive.
        locations = np.repeat(self._next_locations - (np.cumsum(counts) - counts), counts)
        locations += np.arange(group.size)
        self._next_locations += counts
        return locations, samples

    def _sort_many(self, group: NDArray[Any]) -> tuple[Int64, Int64]:
        """`_sort_few` for more patches than a radix sort of 16 bits can tell apart."""
        # The low digit first, then, stably, the high one.
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
    """Group patch ids on their device or, where its memory does not suffice, on the host."""
    if not ids.device.on_host:
        try:
            return group_on_device(ids.array)  # type: ignore[attr-defined]
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            warn(
                f"the memory of {ids.device} does not suffice to sort {ids.size} ids, so the host "
                f"does it, with the same result: {' '.join(str(error).split())[:200]}"
            )
    return group_on_host(ids, progress=progress)


def group_on_device(ids: Any) -> GroupingResult:
    """Group an integer array, shape (N,) with N >= 1, of torch or CuPy, where it lies.

    Only tables as long as the number of patches come to the host.

    Raises
    ------
    ValueError
        If there are 2**31 samples or more: a device's sort takes no more at once; or if an id does
        not fit in int64.
    """
    device = arrays.device_of(ids)
    with devices.device_context(device):
        return _group_array(device, ids)


def _group_array(device: Device, ids: Any) -> GroupingResult:
    xp = arrays.namespace(device)
    size = int(ids.shape[0])
    # About what torch's and CuPy's radix sorts hold at once, with keys of up to four bytes.
    check_free_memory(
        40 * size,
        device,
        f"sorting {size} ids",
        "narrower ids (int32, int16) take less, and ids on the host are sorted there",
    )
    if size >= INT32_SAMPLES:
        raise ValueError(
            f"ids on {device} must be fewer than 2**31, got {size}; pass them on the host"
        )
    # torch has no arithmetic on unsigned types beyond uint8. What does not fit would come out
    # negative.
    ids = xp.astype(check_ids(ids), xp.int64, copy=False)
    id_fingerprint = fingerprint.of_device_ids(xp, ids, devices.device_handle(device))
    if _are_distinct(xp, arrays.unique_consecutive(ids[:CHUNK])[0]):
        values, counts = arrays.unique_consecutive(ids)
        if _are_distinct(xp, values):
            host_values, host_counts = arrays.to_numpy(values), arrays.to_numpy(counts)
            starts = np.cumsum(host_counts) - host_counts
            id_order = np.argsort(host_values, kind="stable")
            return GroupingResult(
                host_values[id_order], host_counts[id_order], starts[id_order], None, id_fingerprint
            )
    min_id, max_id = int(xp.min(ids)), int(xp.max(ids))
    if max_id - min_id < RADIX:
        distinct_ids, keys, span = None, ids - min_id, max_id - min_id + 1
    else:
        distinct_ids = arrays.unique_consecutive(xp.sort(ids))[0]
        keys, span = xp.searchsorted(distinct_ids, ids), int(distinct_ids.shape[0])
    name, shift = arrays.narrowest_dtype(device.library, span)
    keys = xp.astype(keys + shift if shift else keys, getattr(xp, name))
    order = arrays.stable_argsort(keys)
    values, counts = arrays.unique_consecutive(keys[order])
    host_values = arrays.to_numpy(values).astype(np.int64) - shift
    host_counts = arrays.to_numpy(counts).astype(np.int64)
    patch_ids = host_values + min_id if distinct_ids is None else arrays.to_numpy(distinct_ids)
    starts = np.cumsum(host_counts) - host_counts
    order = xp.astype(order, xp.int32)
    return GroupingResult(patch_ids, host_counts, starts, order, id_fingerprint)


def _are_distinct(xp: Any, values: Any) -> bool:
    sorted_values = xp.sort(values)
    return not bool(xp.any(sorted_values[1:] == sorted_values[:-1]))
