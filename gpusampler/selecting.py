"""Some of the samples of groups: which patch each is of, and groups of what is kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler import arrays
from gpusampler.arrays import Int64
from gpusampler.ids import HostIds
from gpusampler.sorting import group_on_host
from gpusampler.validation import as_array, as_int64


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
