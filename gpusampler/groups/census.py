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

DIGIT = 1 << 16
WIDEST = 1 << 26
"""Counters in a window at most: half a GiB of them."""

TABLE_MOST = 1 << 18
"""Ids in a table at most; one that leaves the cache is slower than sorting."""

MAX_PATCH = 1 << 31
"""A patch holds fewer samples than this, so that its positions fit in 31 bits."""

_NONE = np.zeros(0, np.int64)

State = dict[str, NDArray[Any]]


class Counted(NamedTuple):
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

    def numbering(self) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """Return the function from ids, all of these, to their groups in the narrowest type."""
        ids = self.patch_ids
        dtype = np.dtype(arrays.narrowest("numpy", ids.size)[0])
        low, span = int(ids[0]), int(ids[-1]) - int(ids[0]) + 1
        if span == ids.size:
            return lambda part: np.subtract(part, low, dtype=np.int64).astype(dtype)
        if span <= max(DIGIT, min(int(self.counts.sum()) // 8, WIDEST)):
            group = np.zeros(span, dtype)
            group[ids - low] = np.arange(ids.size)
            return lambda part: group[np.subtract(part, low, dtype=np.int64)]
        table = IdTable(ids)
        return table.lookup_all


def check_patch_sizes(patch_ids: Int64, counts: Int64, names: tuple[str, ...] | None) -> None:
    """Raise ValueError if a patch has 2**31 samples or more."""
    large = int(counts.argmax())
    if int(counts[large]) >= MAX_PATCH:
        raise ValueError(
            f"a patch must have fewer than 2**31 samples, got {int(counts[large])} "
            f"in patch {label_of(patch_ids[large], names)!r}"
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
        self.seen = 0
        self._widest = max(DIGIT, min(size // 8, WIDEST))
        self._sum = fingerprint.IdSum()
        self._runs: Runs | None = Runs()
        self._counts: Window | Table | None = None
        if state is not None:
            self.seen = int(state["seen"])
            self._sum.total = int(state["sum"])
            self._runs = Runs(state["run_ids"], state["run_starts"]) if "run_ids" in state else None
            if self._runs is None:
                self._counts = self._counters(state["ids"], state["counts"])

    def add(self, ids: NDArray[Any]) -> None:
        """Count the next block of ids: integers of any type, shape (K,)."""
        for first in range(0, ids.size, CHUNK):
            chunk = ids[first : first + CHUNK].astype(np.int64, copy=False)
            self._sum.add(self.seen, chunk)
            if self._runs is not None:
                self._follow(chunk)
            elif self._counts is not None and not self._counts.add(chunk):
                self._counts = Table(*self._counts.counted())
                self._counts.add(chunk)
            self.seen += chunk.size

    def state(self) -> State:
        """Return all that `add` has found, in arrays."""
        found: State = {"seen": np.array(self.seen), "sum": np.array(self._sum.total, np.uint64)}
        if self._runs is not None:
            ids, starts = self._runs.all()
            return {**found, "run_ids": ids, "run_starts": starts}
        assert self._counts is not None
        ids, counts = self._counts.counted()
        return {**found, "ids": ids, "counts": counts}

    def result(self) -> Counted:
        """Return what was found, after the last block."""
        mark = self._sum.value(self.size)
        if self._runs is not None and not self._runs.distinct():
            self._count_runs(self.size)
        if self._runs is not None:
            ids, starts = self._runs.all()
            counts = np.diff(starts, append=self.size)
            by_id = np.argsort(ids, kind="stable")
            return Counted(ids[by_id], counts[by_id], starts[by_id], mark)
        assert self._counts is not None
        return Counted(*self._counts.counted(), None, mark)

    def _follow(self, chunk: Int64) -> None:
        assert self._runs is not None
        self._runs.add(self.seen, chunk)
        # Shuffled ids give themselves away in the first chunk; asked again as their number doubles,
        # runs are sorted a few times in all.
        if self._runs.number >= self._runs.ask_at and not self._runs.distinct():
            self._count_runs(self.seen + chunk.size)

    def _count_runs(self, seen: int) -> None:
        """Go on with counters, as ids have come again."""
        assert self._runs is not None
        ids, starts = self._runs.all()
        lengths = np.diff(starts, append=seen)
        by_id = np.argsort(ids, kind="stable")
        ids = ids[by_id]
        first = first_of_each(ids)
        self._counts = self._counters(ids[first], np.add.reduceat(lengths[by_id], first))
        self._runs = None

    def _counters(self, ids: Int64, counts: Int64) -> Window | Table:
        window = Window(self._widest)
        return window if window.take(ids, counts) else Table(ids, counts)


class Window:
    """Counters of all values between two, which move apart as ids ask for it.

    Parameters
    ----------
    most : int
        Counters at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._low = 0
        self._histogram = _NONE
        # The smallest and the largest id met: the window may be wider.
        self._first, self._last = (1 << 63) - 1, -(1 << 63)

    def add(self, ids: Int64) -> bool:
        """Count ids; False, and nothing is counted, if the window would be too wide."""
        low, high = int(ids.min()), int(ids.max())
        if not self._reaches(low, high):
            return False
        np.add.at(self._histogram, ids - self._low, np.int64(1))
        return True

    def take(self, ids: Int64, counts: Int64) -> bool:
        """Begin with ids, ascending, that were counted; False if the window would be too wide."""
        if not self._reaches(int(ids[0]), int(ids[-1])):
            return False
        self._histogram[ids - self._low] = counts
        return True

    def counted(self) -> tuple[Int64, Int64]:
        """Return the ids met, ascending, and how often each was."""
        places = np.flatnonzero(self._histogram)
        return places + self._low, self._histogram[places]

    def _reaches(self, low: int, high: int) -> bool:
        first, last = min(low, self._first), max(high, self._last)
        span = last - first + 1
        if span > self._most:
            return False
        if not self._low <= low <= high < self._low + self._histogram.size:
            # With room to spare where it grows, or ids that rise would move it at every chunk.
            room = min(self._most - span, span // 2) if self._histogram.size else 0
            start = max(first - room, -(1 << 63)) if low < self._low else first
            wider = np.zeros(span + room, np.int64)
            if self._histogram.size:
                met = self._histogram[self._first - self._low : self._last - self._low + 1]
                wider[self._first - start : self._last - start + 1] = met
            self._low, self._histogram = start, wider
        self._first, self._last = first, last
        return True


class Table:
    """Counters of the ids that were met, from anywhere among the 64-bit integers.

    Parameters
    ----------
    ids, counts : int64 arrays, shape (G,), optional
        Ids met before, ascending, and how often.
    """

    def __init__(self, ids: Int64 = _NONE, counts: Int64 = _NONE) -> None:
        self._ids, self._counts = ids, counts.copy()
        self._table: IdTable | None = None
        self._waiting: list[Int64] = []
        self._waiting_size = 0
        self._look_up()

    def add(self, ids: Int64) -> bool:
        """Count ids; always True."""
        if self._table is None:
            # Copied: it may be a part of a block that is read into anew.
            unknown = ids.copy()
        else:
            group = self._table.lookup(ids)
            known = group >= 0
            if known.all():
                np.add.at(self._counts, group, np.int64(1))
                return True
            np.add.at(self._counts, group[known], np.int64(1))
            unknown = ids[~known]
        self._waiting.append(unknown)
        self._waiting_size += unknown.size
        # Far more than are known already: what a merge costs is shared by those that wait for it.
        most = CHUNK if self._table is not None or not self._ids.size else 4 * BLOCK
        if self._waiting_size >= max(most, 2 * self._ids.size):
            self._merge()
        return True

    def counted(self) -> tuple[Int64, Int64]:
        """Return the ids met, ascending, and how often each was."""
        self._merge()
        return self._ids, self._counts

    def _merge(self) -> None:
        if not self._waiting:
            return
        values = np.sort(np.concatenate(self._waiting))
        self._waiting, self._waiting_size = [], 0
        new, counts = arrays.unique_consecutive(values)
        place = np.searchsorted(self._ids, new)
        # Where no table is, ids that are known wait like others.
        known = self._ids[np.minimum(place, self._ids.size - 1)] == new if self._ids.size else False
        known = np.broadcast_to(known, new.shape)
        self._counts[place[known]] += counts[known]
        if not known.all():
            self._ids = np.insert(self._ids, place[~known], new[~known])
            self._counts = np.insert(self._counts, place[~known], counts[~known])
            self._look_up()

    def _look_up(self) -> None:
        self._table = IdTable(self._ids) if 0 < self._ids.size <= TABLE_MOST else None


class Runs:
    """Runs of equal ids: the id and the first sample of each.

    Parameters
    ----------
    ids, starts : int64 arrays, shape (R,), optional
        Runs that were followed before.

    Attributes
    ----------
    number : int
        Runs so far.
    ask_at : int
        At how many it is time to ask whether they are of distinct ids.
    """

    def __init__(self, ids: Int64 = _NONE, starts: Int64 = _NONE) -> None:
        self._ids, self._starts = [ids], [starts]
        self.number = ids.size
        self.ask_at = 2 * max(ids.size, 1)

    def add(self, first: int, ids: Int64) -> None:
        """Follow the ids of samples from ``first`` on."""
        start = np.flatnonzero(ids[1:] != ids[:-1]) + 1
        if self.number == 0 or int(ids[0]) != int(self._ids[-1][-1]):
            start = np.append(0, start)
        if start.size:
            self._ids.append(ids[start])
            self._starts.append(start + first)
            self.number += start.size

    def all(self) -> tuple[Int64, Int64]:
        """Return the ids and the starts of all runs, in order."""
        self._ids, self._starts = [np.concatenate(self._ids)], [np.concatenate(self._starts)]
        return self._ids[0], self._starts[0]

    def distinct(self) -> bool:
        """Whether no id has had two runs."""
        self.ask_at = 2 * self.number
        ordered = np.sort(self.all()[0])
        return not bool((ordered[1:] == ordered[:-1]).any())


def first_of_each(values: Int64) -> Int64:
    """Return where each value starts in an ascending array: int64, shape (G,)."""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))
