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
from gpusampler.core.memory import check_room
from gpusampler.core.validation import checked_ids
from gpusampler.groups import fingerprint
from gpusampler.groups.census import (
    CHUNK,
    DIGIT,
    Census,
    Counted,
    State,
    check_patch_sizes,
    first_of_each,
)
from gpusampler.sources.base import BLOCK, PatchIds

INT32_SAMPLES = 1 << 31


class IdsChanged(RuntimeError):
    """The second pass found other ids than the first."""

    def __init__(self) -> None:
        super().__init__(
            "ids must stay as they are while they are grouped, got others in the second pass"
        )


class Grouped(NamedTuple):
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


class Work(Protocol):
    """Where grouping keeps its result, and how far it has come."""

    def resumed(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the state that was kept last, if this work was broken off."""

    def checkpoint(self, state: Callable[[], State], now: bool) -> None:
        """Keep the state, now or if it is time to, with all that was written to the order."""

    def order(self, counted: Counted, size: int, dtype: Any) -> NDArray[Any]:
        """Return room for the order: int32 or int64, shape (size,)."""


class InMemory:
    """Work whose result is in memory, and that is lost with the process."""

    def resumed(self) -> None:
        """Return None: there is nothing to go on with."""

    def checkpoint(self, state: Callable[[], State], now: bool) -> None:
        """Do nothing."""

    def order(self, counted: Counted, size: int, dtype: Any) -> NDArray[Any]:
        """Return a new array."""
        needed = size * np.dtype(dtype).itemsize
        check_room(
            needed,
            HOST,
            f"the order of {size} samples",
            "PatchGroups.from_ids(ids, path=...) keeps it in a file that is mapped into memory",
        )
        return np.empty(size, dtype)


def group_on_host(ids: PatchIds, work: Work | None = None, *, progress: bool = False) -> Grouped:
    """Group patch ids that NumPy can read, wherever they lie.

    Parameters
    ----------
    ids : PatchIds
    work : Work, optional
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
    work = InMemory() if work is None else work
    state = work.resumed()
    census = Census(ids.size, state)
    with progress_bar.Bar(ids.size, "counting patches", "samples", progress) as shown:
        if census.seen < ids.size:
            keep = partial(work.checkpoint, census.state)
            _in_blocks(ids, census.seen, census.add, keep, shown)
    found = census.result()
    check_patch_sizes(found.patch_ids, found.counts, ids.names)
    if found.starts is not None:
        return Grouped(found.patch_ids, found.counts, found.starts, None, found.fingerprint)
    dtype = np.int32 if ids.size < INT32_SAMPLES else np.int64
    order = work.order(found, ids.size, dtype)
    scatter = Scatter(found, order, state, checked=not ids.in_memory)
    with progress_bar.Bar(ids.size, "sorting samples", "samples", progress) as shown:
        keep = partial(work.checkpoint, lambda: {**census.state(), **scatter.state()})
        _in_blocks(ids, scatter.written, scatter.add, keep, shown)
    starts = scatter.finish()
    return Grouped(found.patch_ids, found.counts, starts, scatter.order, found.fingerprint)


def _in_blocks(
    ids: PatchIds,
    first: int,
    add: Callable[[NDArray[Any]], None],
    kept: Callable[[bool], None],
    shown: Any,
) -> None:
    """Add all ids from ``first`` on, block by block, and keep the state between blocks."""
    shown.update(first)
    for _, block in ids.blocks(first):
        add(block)
        kept(False)
        shown.update(block.size)
    kept(True)


class Scatter:
    """Writes samples to their places, patch by patch, as their ids come.

    Parameters
    ----------
    counted : Counted
    order : integer array, shape (N,)
        Where to.
    state : mapping of arrays, optional
        From `state`, to go on from there; what was written since is written again.
    checked : bool
        Whether the ids may have changed since they were counted.
    """

    def __init__(
        self,
        counted: Counted,
        order: NDArray[Any],
        state: Mapping[str, NDArray[Any]] | None,
        *,
        checked: bool = True,
    ) -> None:
        self.order = order
        self.written = 0
        self._ends = np.cumsum(counted.counts)
        self._cursor = self._ends - counted.counts
        self._group = counted.numbering()
        self._fingerprint = counted.fingerprint
        # Samples that have changed places leave every count as it was.
        self._sum = fingerprint.IdSum()
        self._checked = checked
        if state is not None and "written" in state:
            self.written = int(state["written"])
            self._cursor = state["cursor"].copy()
            self._sum.total = int(state["written_sum"])

    def add(self, ids: NDArray[Any]) -> None:
        """Write the next block of samples."""
        many = self._cursor.size > DIGIT
        # A chunk pays for a pass over all patches, or for two sorts: so it is larger where there
        # are many.
        step = BLOCK if many else max(CHUNK, 2 * self._cursor.size)
        for first in range(0, ids.size, step):
            part = ids[first : first + step]
            if self._checked:
                self._sum.add(self.written, part.astype(np.int64, copy=False))
            try:
                group = self._group(part)
                target, ranked = self._among_many(group) if many else self._among_few(group)
                ranked += self.written
                self.order[target] = ranked
            except (IndexError, ValueError) as error:
                # No place was counted for an id: it was not there in the first pass.
                raise IdsChanged from error
            self.written += group.size

    def state(self) -> State:
        """Return how far this is, in arrays."""
        return {
            "written": np.array(self.written),
            "written_sum": np.array(self._sum.total, np.uint64),
            "cursor": self._cursor,
        }

    def finish(self) -> Int64:
        """Return where each patch starts in the order, once all samples are written.

        Raises
        ------
        IdsChanged
            If there were other ids than were counted, or the same ones elsewhere.
        """
        same = not self._checked or self._sum.value(self.order.size) == self._fingerprint
        if not same or not np.array_equal(self._cursor, self._ends):
            raise IdsChanged
        return np.append(0, self._ends[:-1])

    def _among_few(self, group: NDArray[Any]) -> tuple[Int64, Int64]:
        """Return where the samples of a chunk go, and which they are, patch by patch."""
        ranked = group.argsort(kind="stable")
        found = np.bincount(group, minlength=self._cursor.size)
        # Within the chunk a patch's samples end up side by side: their targets are consecutive.
        target = np.repeat(self._cursor - (np.cumsum(found) - found), found)
        target += np.arange(group.size)
        self._cursor += found
        return target, ranked

    def _among_many(self, group: NDArray[Any]) -> tuple[Int64, Int64]:
        """`_among_few` for more patches than a radix sort of 16 bits can tell apart."""
        # The low digit first, then, stably, the high one.
        ranked = (group & (DIGIT - 1)).astype(np.uint16).argsort(kind="stable")
        high = (group >> 16).astype(np.uint16)[ranked]
        ranked = ranked[high.argsort(kind="stable")]
        ordered = group[ranked]
        start = first_of_each(ordered)
        found = np.diff(start, append=group.size)
        here = ordered[start]
        target = np.repeat(self._cursor[here] - start, found)
        target += np.arange(group.size)
        self._cursor[here] += found
        return target, ranked


def group_on_device(ids: Any) -> Grouped:
    """Group an integer array, shape (N,) with N >= 1, of torch or CuPy, where it lies.

    Only tables as long as the number of patches come to the host.

    Raises
    ------
    ValueError
        If there are 2**31 samples or more: a device's sort takes no more at once; or if an id does
        not fit in int64.
    """
    device = arrays.device_of(ids)
    with devices.on(device):
        return _group_on(device, ids)


def _group_on(device: Device, ids: Any) -> Grouped:
    xp = arrays.namespace(device)
    size = int(ids.shape[0])
    # About what torch's and CuPy's radix sorts hold at once, with keys of up to four bytes.
    check_room(
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
    ids = xp.astype(checked_ids(ids), xp.int64, copy=False)
    mark = fingerprint.of_ids_on(xp, ids, devices.device_handle(device))
    if _distinct_on(xp, arrays.unique_consecutive(ids[:CHUNK])[0]):
        values, counts = arrays.unique_consecutive(ids)
        if _distinct_on(xp, values):
            host_values, host_counts = arrays.to_numpy(values), arrays.to_numpy(counts)
            starts = np.cumsum(host_counts) - host_counts
            by_id = np.argsort(host_values, kind="stable")
            return Grouped(host_values[by_id], host_counts[by_id], starts[by_id], None, mark)
    low, high = int(xp.min(ids)), int(xp.max(ids))
    if high - low < DIGIT:
        distinct, keys, span = None, ids - low, high - low + 1
    else:
        distinct = arrays.unique_consecutive(xp.sort(ids))[0]
        keys, span = xp.searchsorted(distinct, ids), int(distinct.shape[0])
    name, shift = arrays.narrowest(device.library, span)
    keys = xp.astype(keys + shift if shift else keys, getattr(xp, name))
    order = arrays.stable_argsort(keys)
    values, counts = arrays.unique_consecutive(keys[order])
    host_values = arrays.to_numpy(values).astype(np.int64) - shift
    host_counts = arrays.to_numpy(counts).astype(np.int64)
    if distinct is None:
        patch_ids = host_values + low
    else:
        patch_ids = arrays.to_numpy(distinct)
    return Grouped(
        patch_ids,
        host_counts,
        np.cumsum(host_counts) - host_counts,
        xp.astype(order, xp.int32),
        mark,
    )


def _distinct_on(xp: Any, values: Any) -> bool:
    ordered = xp.sort(values)
    return not bool(xp.any(ordered[1:] == ordered[:-1]))
