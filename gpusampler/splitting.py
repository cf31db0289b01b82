"""Dividing patches, or the samples of every patch, among parts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler import arrays, lanes
from gpusampler.arrays import HOST, Int64
from gpusampler.permutation import (
    PURPOSE_SPLIT_PATCHES,
    PURPOSE_SPLIT_SAMPLES,
    derive_key,
    grid_of,
    grids_of,
)
from gpusampler.runs import permute_runs

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
    shuffled = lanes.permute_one(every, patches, key, grid_of(patches))
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
