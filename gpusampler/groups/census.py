"""First pass over patch ids: find the distinct ids and their counts.

The pass also finds out whether every id has a single run: consecutive samples with the same id. Ids
are read in blocks, in order, so memory does not grow with the dataset. Dense ids are counted in a
window with one counter per value, sparse ids in a hash table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.groups import fingerprint
from gpusampler.groups.hash_table import IdTable
from gpusampler.sources.base import BLOCK

CHUNK = 1 << 16
"""Number of ids processed at once, so that they stay in cache."""

RADIX = 1 << 16
MAX_WINDOW = 1 << 26
"""Maximum number of counters in a window: half a GiB."""

MAX_TABLE_IDS = 1 << 18
"""Maximum number of ids in a table; a table larger than the cache is slower than sorting."""

MAX_PATCH_SAMPLES = 1 << 31
"""Exclusive limit on the number of samples of a patch: positions fit in 31 bits."""

_EMPTY = np.zeros(0, np.int64)

StateArrays = dict[str, NDArray[Any]]


class CensusResult(NamedTuple):
    """Distinct ids, ascending, and their counts: int64, shape (G,).

    ``starts`` is the first sample of each patch if every patch is a single run, else None.
    """

    patch_ids: Int64
    counts: Int64
    starts: Int64 | None
    fingerprint: int

    def group_lookup(self) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """Return a function from ids to their indices in ``patch_ids``, in the narrowest dtype."""
        ids = self.patch_ids
        dtype = np.dtype(arrays.narrowest_dtype("numpy", ids.size)[0])
        first_id, span = int(ids[0]), int(ids[-1]) - int(ids[0]) + 1
        if span == ids.size:
            return lambda x: np.subtract(x, first_id, dtype=np.int64).astype(dtype)
        if span <= max(RADIX, min(int(self.counts.sum()) // 8, MAX_WINDOW)):
            group = np.zeros(span, dtype)
            group[ids - first_id] = np.arange(ids.size)
            return lambda x: group[np.subtract(x, first_id, dtype=np.int64)]
        return IdTable(ids).lookup_all


def check_patch_sizes(patch_ids: Int64, counts: Int64, names: tuple[Any, ...] | None) -> None:
    """Raise ValueError if a patch has 2**31 samples or more."""
    largest = int(counts.argmax())
    if int(counts[largest]) >= MAX_PATCH_SAMPLES:
        raise ValueError(
            f"a patch must have fewer than 2**31 samples, got {int(counts[largest])} "
            f"in patch {label_of(patch_ids[largest], names)!r}"
        )


def label_of(patch_id: Any, names: tuple[Any, ...] | None) -> Any:
    """Return the name of a patch, or its id if patches have no names."""
    return int(patch_id) if names is None else names[int(patch_id)]


class Census:
    """Counts ids block by block, in sample order.

    While every id has a single run, only the runs are stored; once an id has a second run, counters
    replace them. ``size`` is the number of samples N. Pass ``state``, from `Census.state`
    of the same ids, to resume.
    """

    def __init__(self, size: int, state: Mapping[str, NDArray[Any]] | None = None) -> None:
        self.size = size
        self.num_seen = 0
        self._max_window = max(RADIX, min(size // 8, MAX_WINDOW))
        self._id_sum = fingerprint.IdSum()
        self._runs: IdRuns | None = IdRuns()
        self._counts: CounterWindow | CounterTable | None = None
        if state is not None:
            self.num_seen = int(state["seen"])
            self._id_sum.total = int(state["sum"])
            if "run_ids" in state:
                self._runs = IdRuns(state["run_ids"], state["run_starts"])
            else:
                self._runs, self._counts = None, self._new_counters(state["ids"], state["counts"])

    def add(self, ids: NDArray[Any]) -> None:
        """Count the next block of ids: any integer dtype, shape (K,)."""
        for first in range(0, ids.size, CHUNK):
            chunk = ids[first : first + CHUNK].astype(np.int64, copy=False)
            self._id_sum.add(self.num_seen, chunk)
            if self._runs is not None:
                self._add_to_runs(chunk)
            elif self._counts is not None and not self._counts.add(chunk):
                self._counts = CounterTable(*self._counts.ids_and_counts())
                self._counts.add(chunk)
            self.num_seen += chunk.size

    def state(self) -> StateArrays:
        """Return the state after the last `add` as arrays."""
        state: StateArrays = {
            "seen": np.array(self.num_seen),
            "sum": np.array(self._id_sum.total, np.uint64),
        }
        if self._runs is not None:
            ids, starts = self._runs.ids_and_starts()
            return {**state, "run_ids": ids, "run_starts": starts}
        assert self._counts is not None
        ids, counts = self._counts.ids_and_counts()
        return {**state, "ids": ids, "counts": counts}

    def result(self) -> CensusResult:
        """Return the result. Call this after the last block."""
        id_fingerprint = self._id_sum.value(self.size)
        if self._runs is not None and not self._runs.are_distinct():
            self._switch_to_counters(self.size)
        if self._runs is not None:
            ids, starts = self._runs.ids_and_starts()
            counts = np.diff(starts, append=self.size)
            id_order = np.argsort(ids, kind="stable")
            return CensusResult(ids[id_order], counts[id_order], starts[id_order], id_fingerprint)
        assert self._counts is not None
        return CensusResult(*self._counts.ids_and_counts(), None, id_fingerprint)

    def _add_to_runs(self, chunk: Int64) -> None:
        assert self._runs is not None
        self._runs.add(self.num_seen, chunk)
        # Shuffled ids repeat within the first chunk. The check runs again each time the number of
        # runs doubles, so runs are sorted only a few times.
        if self._runs.size >= self._runs.check_size and not self._runs.are_distinct():
            self._switch_to_counters(self.num_seen + chunk.size)

    def _switch_to_counters(self, num_seen: int) -> None:
        """Replace the runs by counters, because an id has repeated."""
        assert self._runs is not None
        ids, starts = self._runs.ids_and_starts()
        lengths = np.diff(starts, append=num_seen)
        id_order = np.argsort(ids, kind="stable")
        ids = ids[id_order]
        first_runs = first_occurrences(ids)
        self._counts = self._new_counters(
            ids[first_runs], np.add.reduceat(lengths[id_order], first_runs)
        )
        self._runs = None

    def _new_counters(self, ids: Int64, counts: Int64) -> CounterWindow | CounterTable:
        window = CounterWindow(self._max_window)
        return window if window.load(ids, counts) else CounterTable(ids, counts)


class CounterWindow:
    """One counter per value in a range that grows with the ids, up to ``max_size`` values."""

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._low = 0
        self._histogram = _EMPTY
        # Smallest and largest id so far; the window may be wider.
        self._first, self._last = (1 << 63) - 1, -(1 << 63)

    def add(self, ids: Int64) -> bool:
        """Count ids, or return False and count none if the window would be too wide."""
        low, high = int(ids.min()), int(ids.max())
        if not self._extend_to(low, high):
            return False
        np.add.at(self._histogram, ids - self._low, np.int64(1))
        return True

    def load(self, ids: Int64, counts: Int64) -> bool:
        """Load counts of ascending ids, or return False if the window would be too wide."""
        if not self._extend_to(int(ids[0]), int(ids[-1])):
            return False
        self._histogram[ids - self._low] = counts
        return True

    def ids_and_counts(self) -> tuple[Int64, Int64]:
        """Return the distinct ids, ascending, and their counts."""
        offsets = np.flatnonzero(self._histogram)
        return offsets + self._low, self._histogram[offsets]

    def _extend_to(self, low: int, high: int) -> bool:
        first_id, last_id = min(low, self._first), max(high, self._last)
        span = last_id - first_id + 1
        if span > self._max_size:
            return False
        if not self._low <= low <= high < self._low + self._histogram.size:
            # Spare room: without it, ascending ids would reallocate the window at every chunk.
            margin = min(self._max_size - span, span // 2) if self._histogram.size else 0
            start = max(first_id - margin, -(1 << 63)) if low < self._low else first_id
            histogram = np.zeros(span + margin, np.int64)
            if self._histogram.size:
                counts = self._histogram[self._first - self._low : self._last - self._low + 1]
                histogram[self._first - start : self._last - start + 1] = counts
            self._low, self._histogram = start, histogram
        self._first, self._last = first_id, last_id
        return True


class CounterTable:
    """Counters of arbitrary 64-bit ids, starting from ascending ``ids`` and their ``counts``."""

    def __init__(self, ids: Int64 = _EMPTY, counts: Int64 = _EMPTY) -> None:
        self._ids, self._counts = ids, counts.copy()
        self._id_table: IdTable | None = None
        self._pending_ids: list[Int64] = []
        self._pending_size = 0
        self._rebuild_table()

    def add(self, ids: Int64) -> bool:
        """Count ids; always return True."""
        if self._id_table is None:
            # Copied: the caller may reuse the buffer of the block.
            unknown_ids = ids.copy()
        else:
            group = self._id_table.lookup(ids)
            is_known = group >= 0
            if is_known.all():
                np.add.at(self._counts, group, np.int64(1))
                return True
            np.add.at(self._counts, group[is_known], np.int64(1))
            unknown_ids = ids[~is_known]
        self._pending_ids.append(unknown_ids)
        self._pending_size += unknown_ids.size
        # Merging is expensive, so it waits for many more ids than are known already.
        merge_size = CHUNK if self._id_table is not None or not self._ids.size else 4 * BLOCK
        if self._pending_size >= max(merge_size, 2 * self._ids.size):
            self._merge()
        return True

    def ids_and_counts(self) -> tuple[Int64, Int64]:
        """Return the distinct ids, ascending, and their counts."""
        self._merge()
        return self._ids, self._counts

    def _merge(self) -> None:
        if not self._pending_ids:
            return
        values = np.sort(np.concatenate(self._pending_ids))
        self._pending_ids, self._pending_size = [], 0
        distinct, counts = arrays.unique_consecutive(values)
        positions = np.searchsorted(self._ids, distinct)
        # Without a table, known ids are pending like unknown ones.
        is_known = np.zeros(distinct.shape, np.bool_)
        if self._ids.size:
            is_known = self._ids[np.minimum(positions, self._ids.size - 1)] == distinct
        self._counts[positions[is_known]] += counts[is_known]
        if not is_known.all():
            self._ids = np.insert(self._ids, positions[~is_known], distinct[~is_known])
            self._counts = np.insert(self._counts, positions[~is_known], counts[~is_known])
            self._rebuild_table()

    def _rebuild_table(self) -> None:
        self._id_table = IdTable(self._ids) if 0 < self._ids.size <= MAX_TABLE_IDS else None


class IdRuns:
    """Runs of equal ids: the id and the first sample of each run.

    ``size`` counts the runs so far. When it reaches ``check_size``, call `are_distinct`.
    """

    def __init__(self, ids: Int64 = _EMPTY, starts: Int64 = _EMPTY) -> None:
        self._ids, self._starts = [ids], [starts]
        self.size = ids.size
        self.check_size = 2 * max(ids.size, 1)

    def add(self, first: int, ids: Int64) -> None:
        """Add the ids of consecutive samples that start at ``first``."""
        start = np.flatnonzero(ids[1:] != ids[:-1]) + 1
        if self.size == 0 or int(ids[0]) != int(self._ids[-1][-1]):
            start = np.append(0, start)
        if start.size:
            self._ids.append(ids[start])
            self._starts.append(start + first)
            self.size += start.size

    def ids_and_starts(self) -> tuple[Int64, Int64]:
        """Return the ids and starts of all runs, in sample order."""
        self._ids, self._starts = [np.concatenate(self._ids)], [np.concatenate(self._starts)]
        return self._ids[0], self._starts[0]

    def are_distinct(self) -> bool:
        """Whether no id has more than one run."""
        self.check_size = 2 * self.size
        sorted_ids = np.sort(self.ids_and_starts()[0])
        return not bool((sorted_ids[1:] == sorted_ids[:-1]).any())


def first_occurrences(values: Int64) -> Int64:
    """Return where each value starts in an ascending array: int64, shape (G,)."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))
