"""Some of the samples or patches of groups: selecting them, and dividing them among parts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST
from gpusampler.core.validation import as_array, as_int64
from gpusampler.groups.counting_sort import group_on_host
from gpusampler.permutation import numpy_impl
from gpusampler.permutation.ranges import permute_runs
from gpusampler.permutation.reference import (
    PURPOSE_SPLIT_PATCHES,
    PURPOSE_SPLIT_SAMPLES,
    derive_key,
    grid_of,
    grids_of,
)
from gpusampler.sources.base import HostIds


class Selected(NamedTuple):
    """Samples that are kept, by group: int64 arrays of shape (G',).

    ``groups`` are those of which something is kept; ``counts`` and ``starts`` as in `PatchGroups`;
    ``order``, the samples by group, is None where every group is a run.
    """

    groups: Int64
    counts: Int64
    starts: Int64
    order: Int64 | None


def checked_indices(indices: Any, source_size: int) -> Int64:
    """Return the samples that a list or a mask names, ascending.

    Raises
    ------
    TypeError
        If it is neither integers nor a mask.
    ValueError
        If it is empty, repeats, or names a sample that is not there.
    """
    chosen = arrays.to_numpy(as_array(indices, "indices"))
    if chosen.dtype == np.bool_:
        if chosen.shape != (source_size,):
            raise ValueError(
                f"indices must be a mask of shape ({source_size},), got {chosen.shape}"
            )
        chosen = np.flatnonzero(chosen)
    chosen = np.sort(as_int64(chosen, "indices"))
    if chosen.size == 0:
        raise ValueError("indices must name at least one sample, got none")
    same = np.flatnonzero(chosen[1:] == chosen[:-1])
    if same.size:
        raise ValueError(f"indices must be distinct, got {int(chosen[same[0]])} twice")
    for extreme in (int(chosen[0]), int(chosen[-1])):
        if not 0 <= extreme < source_size:
            raise ValueError(f"indices must be in 0 .. {source_size - 1}, got {extreme}")
    return chosen


def group_of(
    samples: Int64, counts: Int64, starts: Int64, order: NDArray[Any] | None, source_size: int
) -> Int64:
    """Return the group of each of some samples, ascending; int64, shape (K,).

    Parameters
    ----------
    samples : int64 array, shape (K,)
    counts, starts, order, source_size
        As in `PatchGroups`, on the host.

    Raises
    ------
    ValueError
        If a sample is of none.
    """
    if order is None:
        by_start = np.argsort(starts)
        at = np.searchsorted(starts[by_start], samples, side="right") - 1
        group = by_start[np.maximum(at, 0)]
        held = (at >= 0) & (samples < starts[group] + counts[group])
    else:
        of_sample = np.full(source_size, -1, np.int32)
        of_sample[order] = np.repeat(np.arange(counts.size, dtype=np.int32), counts)
        group = of_sample[samples].astype(np.int64)
        held = group >= 0
    if not held.all():
        raise ValueError(f"indices must be samples of these groups, got {int(samples[~held][0])}")
    return group.astype(np.int64)


def by_group(samples: Int64, group: Int64) -> Selected:
    """Return samples, ascending, by their groups."""
    found = group_on_host(HostIds(group))
    if found.order is None:
        samples = samples[places_of(found.starts, found.counts)]
    else:
        samples = samples[found.order]
    offsets = np.cumsum(found.counts) - found.counts
    first, last = samples[offsets], samples[offsets + found.counts - 1]
    if bool((last - first + 1 == found.counts).all()):
        return Selected(found.patch_ids, found.counts, first, None)
    return Selected(found.patch_ids, found.counts, offsets, samples)


def places_of(starts: Int64, counts: Int64) -> Int64:
    """Return the places of runs, end to end: int64, shape (sum of counts,)."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(starts - offsets, counts) + np.arange(int(counts.sum()))


_GOLDEN = 0.6180339887498949


def checked_fractions(fractions: Iterable[float]) -> NDArray[np.float64]:
    """Return the parts' shares, shape (P,), or raise TypeError or ValueError."""
    try:
        parts = np.asarray(list(fractions), np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"fractions must be a sequence of numbers, got {fractions!r}") from None
    if parts.size == 0 or not (np.isfinite(parts).all() and (parts > 0).all()):
        raise ValueError(f"fractions must each be > 0, got {parts.tolist()}")
    if abs(float(parts.sum()) - 1.0) > 1e-6:
        raise ValueError(f"fractions must add up to 1, got {float(parts.sum()):g}")
    return parts


def split_patches(patches: int, fractions: NDArray[np.float64], seed: int) -> list[Int64]:
    """Return each part's patches, ascending: int64 arrays of numbers below ``patches``."""
    key = derive_key(seed, PURPOSE_SPLIT_PATCHES, 0, 0)
    every = np.arange(patches, dtype=np.int64)
    shuffled = numpy_impl.permute_one(every, patches, key, grid_of(patches))
    bounds = np.rint(np.cumsum(fractions)[:-1] * patches).astype(np.int64)
    return [np.sort(part) for part in np.split(shuffled, bounds)]


def split_samples(
    counts: Int64, starts: Int64, order: Any, fractions: NDArray[np.float64], seed: int
) -> list[Int64]:
    """Return each part's samples: every patch gives each part its share, within one sample.

    Parameters
    ----------
    counts, starts : int64 arrays, shape (G,)
        As in `gpusampler.PatchGroups`.
    order : integer array, shape (N,), or None
    fractions : float64 array, shape (P,)
    seed : int

    Returns
    -------
    list of P int64 arrays
        Samples, in no particular order.
    """
    bounds = _bounds(counts, fractions)
    group = np.arange(counts.size, dtype=np.int64)
    key = derive_key(seed, PURPOSE_SPLIT_SAMPLES, 0, group)
    grid = grids_of(arrays.namespace(HOST), counts)
    return [
        permute_runs(low, high - low, counts, key, grid, starts, order)[0]
        for low, high in pairwise(bounds)
    ]


def _bounds(counts: Int64, fractions: NDArray[np.float64]) -> Int64:
    """Return where each part begins and ends in each (shuffled) patch: int64, shape (P + 1, G).

    A patch's share of a part is rounded down, and the samples left over go to different parts.
    Which ones is settled by a sequence that is spread evenly over the patches, so that the parts'
    totals stay true to the fractions too.
    """
    # Products such as 0.7 * 10 must not miss the integer that they stand for.
    shares = np.round(np.multiply.outer(fractions, counts), 6)
    whole = np.floor(shares).astype(np.int64)
    left = counts - whole.sum(axis=0)
    running = np.cumsum(shares - whole, axis=0)
    running[-1] = left
    offset = (np.arange(1, counts.size + 1) * _GOLDEN) % 1.0
    steps = np.floor(running + offset).astype(np.int64)
    extra = np.diff(steps, axis=0, prepend=np.zeros((1, counts.size), np.int64))
    bounds = np.zeros((fractions.size + 1, counts.size), np.int64)
    np.cumsum(whole + extra, axis=0, out=bounds[1:])
    bounds[-1] = counts
    return bounds
