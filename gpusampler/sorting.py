"""Sorting samples by patch: the work behind `PatchGroups`.

On the host it is a stable counting sort in chunks: every chunk is sorted by an 8- or 16-bit key
while it lies in cache, then written to where its samples belong. Up to 65,536 patches of dense ids
nothing but the result is as large as the input, and the input is read in order, so a memory map
will do. Sparse ids are first numbered, in one to four bytes a sample; above 65,536 keys a second
pass sorts by the high digit, with another order of the result's size.

On a device it is one stable argsort of the narrowest type, and unique_consecutive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler import arrays, fingerprint
from gpusampler.arrays import Device, Int64
from gpusampler.idtable import IdTable, distinct_ids

DIGIT = 1 << 16
CHUNK = 1 << 16
INT32_SAMPLES = 1 << 31


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


def group_on_host(ids: NDArray[Any]) -> Grouped:
    """Group integer ids, shape (N,) with N >= 1, of any integer dtype; memory maps too."""
    mark = fingerprint.of_ids(ids)
    runs = _runs_of_distinct(ids)
    if runs is not None:
        values, counts = runs
        starts = np.cumsum(counts) - counts
        by_id = np.argsort(values, kind="stable")
        return Grouped(values[by_id], counts[by_id], starts[by_id], None, mark)
    low, high = int(ids.min()), int(ids.max())
    span = high - low + 1
    keys: NDArray[Any] = ids
    # The histogram of a wide span costs more than a table of the ids that are there.
    if span <= DIGIT or span <= min(ids.size // 8, 1 << 32):
        histogram, order = counting_sort(ids, low, span)
        patch_ids = np.flatnonzero(histogram)
        counts = histogram[patch_ids]
        patch_ids = patch_ids + low
    else:
        patch_ids = distinct_ids(ids)
        keys = IdTable(patch_ids).lookup_all(ids)
        counts, order = counting_sort(keys, 0, patch_ids.size)
    return Grouped(patch_ids, counts, np.cumsum(counts) - counts, order, mark)


def _runs_of_distinct(ids: NDArray[Any]) -> tuple[Int64, Int64] | None:
    """Values and lengths of the runs of equal ids, or None if a value has more than one run."""
    # Shuffled ids give themselves away in the first chunk.
    if not _distinct(arrays.unique_consecutive(ids[:CHUNK])[0]):
        return None
    starts = [np.zeros(1, np.int64)]
    for first in range(0, ids.size - 1, CHUNK):
        chunk = ids[first : first + CHUNK + 1]
        starts.append(np.flatnonzero(chunk[1:] != chunk[:-1]) + (first + 1))
    start = np.concatenate(starts)
    values = np.asarray(ids[start]).astype(np.int64)
    if not _distinct(values):
        return None
    return values, np.diff(start, append=ids.size)


def _distinct(values: NDArray[Any]) -> bool:
    ordered = np.sort(values)
    return not bool((ordered[1:] == ordered[:-1]).any())


def counting_sort(ids: NDArray[Any], low: int, span: int) -> tuple[Int64, NDArray[Any]]:
    """Sort samples stably by id, for ids in ``low .. low + span - 1``.

    Parameters
    ----------
    ids : integer array, shape (N,)
    low, span : int
        The span is at most 2**32.

    Returns
    -------
    histogram : int64 array, shape (span,)
        Samples of each id, zeros included.
    order : int32 or int64 array, shape (N,)
    """
    histogram = np.zeros(span, np.int64)
    step = max(CHUNK, span)
    for first in range(0, ids.size, step):
        keys = ids[first : first + step].astype(np.int64, copy=False)
        histogram += np.bincount(keys - low if low else keys, minlength=span)

    def keys_at(chunk: NDArray[Any]) -> Int64:
        return np.asarray(np.subtract(chunk, low, dtype=np.int64))

    dtype = np.int32 if ids.size < INT32_SAMPLES else np.int64
    if span <= DIGIT:
        order = _scatter(ids.size, histogram, lambda at: keys_at(ids[at]), lambda at: None, dtype)
        return histogram, order
    digits = np.zeros((-(-span // DIGIT), DIGIT), np.int64)
    digits.ravel()[:span] = histogram
    by_low = _scatter(
        ids.size,
        digits.sum(axis=0),
        lambda at: keys_at(ids[at]) & (DIGIT - 1),
        lambda at: None,
        dtype,
    )
    order = _scatter(
        ids.size,
        digits.sum(axis=1),
        lambda at: keys_at(ids[by_low[at]]) >> 16,
        lambda at: by_low[at],
        dtype,
    )
    return histogram, order


def _scatter(
    size: int,
    histogram: Int64,
    keys_at: Callable[[slice], Int64],
    samples_at: Callable[[slice], NDArray[Any] | None],
    dtype: type,
) -> NDArray[Any]:
    """One pass of a counting sort: samples by a key below 2**16, stably.

    ``keys_at`` gives the keys of a slice of the samples, in the order in which ``samples_at``
    names them (None: the slice itself).
    """
    order: NDArray[Any] = np.empty(size, dtype)
    cursor = np.cumsum(histogram) - histogram
    # A chunk pays for a pass over all keys, so it is not much smaller than their number.
    step = max(CHUNK, 2 * histogram.size)
    narrow = np.uint8 if histogram.size <= 1 << 8 else np.uint16
    place = np.arange(step, dtype=np.int64)
    for first in range(0, size, step):
        at = slice(first, min(first + step, size))
        keys = keys_at(at).astype(narrow)
        ranked = keys.argsort(kind="stable")
        found = np.bincount(keys, minlength=histogram.size)
        # Within the chunk a key's samples end up side by side: their targets are consecutive.
        target = np.repeat(cursor - (np.cumsum(found) - found), found)
        target += place[: keys.size]
        samples = samples_at(at)
        order[target] = ranked + first if samples is None else samples[ranked]
        cursor += found
    return order


def group_on_device(ids: Any) -> Grouped:
    """Group an integer array, shape (N,) with N >= 1, of torch or CuPy, where it lies.

    Only tables as long as the number of patches come to the host.

    Raises
    ------
    ValueError
        If there are 2**31 samples or more: a device's sort takes no more at once.
    """
    device = arrays.device_of(ids)
    with arrays.on(device):
        return _group_on(device, ids)


def _group_on(device: Device, ids: Any) -> Grouped:
    xp = arrays.namespace(device)
    size = int(ids.shape[0])
    if size >= INT32_SAMPLES:
        raise ValueError(
            f"ids on {device} must be fewer than 2**31, got {size}; pass them on the host"
        )
    # torch has no arithmetic on unsigned types beyond uint8.
    ids = xp.astype(ids, xp.int64, copy=False)
    mark = fingerprint.of_ids_on(xp, ids, arrays.device_handle(device))
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
