"""The first pass over patch ids: which there are, how many of each, and whether they lie in runs.

Ids come in blocks, in order, so nothing is as large as the dataset. Ids that lie close together are
counted in a window, one counter for every value; ids from anywhere in a table of those met.
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
"""Ids worked on at once, so that they stay in cache."""

RADIX = 1 << 16
MAX_WINDOW = 1 << 26
"""Counters in a window at most: half a GiB of them."""

MAX_TABLE_IDS = 1 << 18
"""Ids in a table at most; one that leaves the cache is slower than sorting."""

MAX_PATCH_SAMPLES = 1 << 31
"""A patch holds fewer samples than this, so that its positions fit in 31 bits."""

_EMPTY = np.zeros(0, np.int64)

StateArrays = dict[str, NDArray[Any]]


class CensusResult(NamedTuple):
    """What a pass over the ids has found.

    Attributes
    ----------
    patch_ids, counts : int64 arrays, shape (G,)
        The ids that there are, ascending, and the samples of each.
    starts : int64 array, shape (G,), or None
        Where each patch's only run starts; None where a patch has several.
    fingerprint : int
    """

    patch_ids: Int64
    counts: Int64
    starts: Int64 | None
    fingerprint: int

    def group_lookup(self) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """Return the function from ids, all of these, to their groups in the narrowest type."""
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


def check_patch_sizes(patch_ids: Int64, counts: Int64, names: tuple[str, ...] | None) -> None:
    """Raise ValueError if a patch has 2**31 samples or more."""
    largest = int(counts.argmax())
    if int(counts[largest]) >= MAX_PATCH_SAMPLES:
        raise ValueError(
            f"a patch must have fewer than 2**31 samples, got {int(counts[largest])} "
            f"in patch {label_of(patch_ids[largest], names)!r}"
        )


def label_of(patch_id: Any, names: tuple[str, ...] | None) -> int | str:
    """Return what the user calls a patch."""
    return int(patch_id) if names is None else names[int(patch_id)]


class Census:
    """Counts ids that come in blocks, from the first sample to the last.

    As long as every id has had one run only, the runs tell all; then ids are counted.

    Parameters
    ----------
    size : int
        Samples N in all.
    state : mapping of arrays, optional
        From `state` of a census of the same ids, to go on from there.
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
        """Count the next block of ids: integers of any type, shape (K,)."""
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
        """Return all that `add` has found, in arrays."""
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
        """Return what was found, after the last block."""
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
        # Shuffled ids give themselves away in the first chunk; asked again as their number doubles,
        # runs are sorted a few times in all.
        if self._runs.size >= self._runs.check_size and not self._runs.are_distinct():
            self._switch_to_counters(self.num_seen + chunk.size)

    def _switch_to_counters(self, num_seen: int) -> None:
        """Go on with counters, as ids have come again."""
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
    """Counters of all values between two, which move apart as ids ask for it.

    Parameters
    ----------
    max_size : int
        Counters at most.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._low = 0
        self._histogram = _EMPTY
        # The smallest and the largest id met: the window may be wider.
        self._first, self._last = (1 << 63) - 1, -(1 << 63)

    def add(self, ids: Int64) -> bool:
        """Count ids; False, and nothing is counted, if the window would be too wide."""
        low, high = int(ids.min()), int(ids.max())
        if not self._extend_to(low, high):
            return False
        np.add.at(self._histogram, ids - self._low, np.int64(1))
        return True

    def load(self, ids: Int64, counts: Int64) -> bool:
        """Begin with ids, ascending, that were counted; False if the window would be too wide."""
        if not self._extend_to(int(ids[0]), int(ids[-1])):
            return False
        self._histogram[ids - self._low] = counts
        return True

    def ids_and_counts(self) -> tuple[Int64, Int64]:
        """Return the ids met, ascending, and how often each was."""
        offsets = np.flatnonzero(self._histogram)
        return offsets + self._low, self._histogram[offsets]

    def _extend_to(self, low: int, high: int) -> bool:
        first_id, last_id = min(low, self._first), max(high, self._last)
        span = last_id - first_id + 1
        if span > self._max_size:
            return False
        if not self._low <= low <= high < self._low + self._histogram.size:
            # With room to spare where it grows, or ids that rise would move it at every chunk.
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
    """Counters of the ids that were met, from anywhere among the 64-bit integers.

    Parameters
    ----------
    ids, counts : int64 arrays, shape (G,), optional
        Ids met before, ascending, and how often.
    """

    def __init__(self, ids: Int64 = _EMPTY, counts: Int64 = _EMPTY) -> None:
        self._ids, self._counts = ids, counts.copy()
        self._id_table: IdTable | None = None
        self._pending_ids: list[Int64] = []
        self._pending_size = 0
        self._rebuild_table()

    def add(self, ids: Int64) -> bool:
        """Count ids; always True."""
        if self._id_table is None:
            # Copied: it may be a part of a block that is read into anew.
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
        # Far more than are known already: what a merge costs is shared by those that wait for it.
        merge_size = CHUNK if self._id_table is not None or not self._ids.size else 4 * BLOCK
        if self._pending_size >= max(merge_size, 2 * self._ids.size):
            self._merge()
        return True

    def ids_and_counts(self) -> tuple[Int64, Int64]:
        """Return the ids met, ascending, and how often each was."""
        self._merge()
        return self._ids, self._counts

    def _merge(self) -> None:
        if not self._pending_ids:
            return
        values = np.sort(np.concatenate(self._pending_ids))
        self._pending_ids, self._pending_size = [], 0
        distinct, counts = arrays.unique_consecutive(values)
        positions = np.searchsorted(self._ids, distinct)
        # Where no table is, ids that are known wait like others.
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
    """Runs of equal ids: the id and the first sample of each.

    Parameters
    ----------
    ids, starts : int64 arrays, shape (R,), optional
        Runs that were followed before.

    Attributes
    ----------
    size : int
        Runs so far.
    check_size : int
        At how many it is time to ask whether they are of distinct ids.
    """

    def __init__(self, ids: Int64 = _EMPTY, starts: Int64 = _EMPTY) -> None:
        self._ids, self._starts = [ids], [starts]
        self.size = ids.size
        self.check_size = 2 * max(ids.size, 1)

    def add(self, first: int, ids: Int64) -> None:
        """Follow the ids of samples from ``first`` on."""
        start = np.flatnonzero(ids[1:] != ids[:-1]) + 1
        if self.size == 0 or int(ids[0]) != int(self._ids[-1][-1]):
            start = np.append(0, start)
        if start.size:
            self._ids.append(ids[start])
            self._starts.append(start + first)
            self.size += start.size

    def ids_and_starts(self) -> tuple[Int64, Int64]:
        """Return the ids and the starts of all runs, in order."""
        self._ids, self._starts = [np.concatenate(self._ids)], [np.concatenate(self._starts)]
        return self._ids[0], self._starts[0]

    def are_distinct(self) -> bool:
        """Whether no id has had two runs."""
        self.check_size = 2 * self.size
        sorted_ids = np.sort(self.ids_and_starts()[0])
        return not bool((sorted_ids[1:] == sorted_ids[:-1]).any())


def first_occurrences(values: Int64) -> Int64:
    """Return where each value starts in an ascending array: int64, shape (G,)."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))
