"""Select samples or patches of groups, and split them into parts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.core.validation import as_array, as_int64, check_real
from gpusampler.groups.counting_sort import group_on_host
from gpusampler.permutation.host import permute_one, permute_ranges
from gpusampler.permutation.reference import (
    PURPOSE_SPLIT_PATCHES,
    PURPOSE_SPLIT_SAMPLES,
    derive_key,
)
from gpusampler.sources.base import HostIds

_GOLDEN = 0.6180339887498949


class Selection(NamedTuple):
    """Selected samples by group: int64 arrays of shape (G',), as in `PatchGroups`.

    ``groups`` are the indices of the groups with selected samples; ``order`` is None if every group
    is one run.
    """

    groups: Int64
    counts: Int64
    starts: Int64
    order: Int64 | None


def check_indices(indices: Any, source_size: int) -> Int64:
    """Return the distinct, ascending samples of an index list or a mask, or raise."""
    samples = arrays.to_numpy(as_array(indices, "indices"))
    if samples.dtype == np.bool_:
        if samples.shape != (source_size,):
            raise ValueError(
                f"a boolean mask in indices must have shape ({source_size},), one value per "
                f"sample, got {samples.shape}"
            )
        samples = np.flatnonzero(samples)
    samples = np.sort(as_int64(samples, "indices"))
    if samples.size == 0:
        raise ValueError("indices must contain at least one sample, got none")
    repeats = np.flatnonzero(samples[1:] == samples[:-1])
    if repeats.size:
        raise ValueError(f"indices must be distinct, got {int(samples[repeats[0]])} twice")
    for extreme in (int(samples[0]), int(samples[-1])):
        if not 0 <= extreme < source_size:
            raise ValueError(f"indices must be in 0 .. {source_size - 1}, got {extreme}")
    return samples


def find_groups(
    samples: Int64, counts: Int64, starts: Int64, order: NDArray[Any] | None, source_size: int
) -> Int64:
    """Return the group of each sample: int64, shape (K,). ``samples`` must be ascending.

    Raise ValueError if a sample is in no group.
    """
    if order is None:
        start_order = np.argsort(starts)
        run_numbers = np.searchsorted(starts[start_order], samples, side="right") - 1
        group = start_order[np.maximum(run_numbers, 0)]
        is_member = (run_numbers >= 0) & (samples < starts[group] + counts[group])
    else:
        group_of_sample = np.full(source_size, -1, np.int32)
        group_of_sample[order] = np.repeat(np.arange(counts.size, dtype=np.int32), counts)
        group = group_of_sample[samples].astype(np.int64)
        is_member = group >= 0
    if not is_member.all():
        raise ValueError(
            f"indices must be samples of these groups, got {int(samples[~is_member][0])}"
        )
    return group.astype(np.int64)


def sort_by_group(samples: Int64, group: Int64) -> Selection:
    """Return the selection of ascending ``samples``, where ``group`` is the group of each."""
    groups, counts, starts, order, *_ = group_on_host(HostIds(group))
    samples = samples[expand_runs(starts, counts) if order is None else order]
    offsets = np.cumsum(counts) - counts
    first_samples, last_samples = samples[offsets], samples[offsets + counts - 1]
    if bool((last_samples - first_samples + 1 == counts).all()):
        return Selection(groups, counts, first_samples, None)
    return Selection(groups, counts, offsets, samples)


def expand_runs(starts: Int64, counts: Int64) -> Int64:
    """Return the concatenated elements of runs: int64, shape (sum of counts,)."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(starts - offsets, counts) + np.arange(int(counts.sum()))


def check_fractions(fractions: Iterable[float]) -> NDArray[np.float64]:
    """Return fractions as an array, shape (P,), or raise TypeError or ValueError."""
    shares: NDArray[np.float64] = check_real(
        fractions,
        "fractions",
        "each be > 0",
        lambda x: x.size and np.isfinite(x) & (x > 0),
        is_sequence=True,
    )
    if abs(float(shares.sum()) - 1.0) > 1e-6:
        raise ValueError(f"fractions must add up to 1, got {float(shares.sum()):g}")
    return shares


def split_patches(num_patches: int, fractions: NDArray[np.float64], seed: int) -> list[Int64]:
    """Return the ascending patch indices of each part."""
    key = derive_key(seed, PURPOSE_SPLIT_PATCHES, 0, 0)
    patches = np.arange(num_patches, dtype=np.int64)
    shuffled = permute_one(patches, num_patches, key)
    bounds = np.rint(np.cumsum(fractions)[:-1] * num_patches).astype(np.int64)
    return [np.sort(part) for part in np.split(shuffled, bounds)]


def split_samples(
    counts: Int64, starts: Int64, order: Any, fractions: NDArray[np.float64], seed: int
) -> list[Int64]:
    """Return the samples of each part, unsorted; every patch is divided within one sample."""
    bounds = _part_bounds(counts, fractions)
    group = np.arange(counts.size, dtype=np.int64)
    key = derive_key(seed, PURPOSE_SPLIT_SAMPLES, 0, group)
    return [
        permute_ranges(low, high - low, counts, key, starts, order)
        for low, high in pairwise(bounds)
    ]


def _part_bounds(counts: Int64, fractions: NDArray[np.float64]) -> Int64:
    """Return the bounds of the parts in each shuffled patch: int64, shape (P + 1, G).

    Sizes are rounded down, and leftover samples go to different parts. A low-discrepancy sequence
    over the patches chooses these parts, so that the totals of the parts match the fractions too.
    """
    # Rounded, because products such as 0.7 * 10 may be just below an integer.
    exact_sizes = np.round(np.multiply.outer(fractions, counts), 6)
    sizes = np.floor(exact_sizes).astype(np.int64)
    num_left = counts - sizes.sum(axis=0)
    running_totals = np.cumsum(exact_sizes - sizes, axis=0)
    running_totals[-1] = num_left
    offsets = (np.arange(1, counts.size + 1) * _GOLDEN) % 1.0
    rounded_totals = np.floor(running_totals + offsets).astype(np.int64)
    extra_samples = np.diff(rounded_totals, axis=0, prepend=np.zeros((1, counts.size), np.int64))
    bounds = np.zeros((fractions.size + 1, counts.size), np.int64)
    np.cumsum(sizes + extra_samples, axis=0, out=bounds[1:])
    bounds[-1] = counts
    return bounds
