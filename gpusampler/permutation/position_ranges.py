"""Permute ranges of positions in NumPy, and look up their samples: `permutation.host` without C.

A row is one range of one patch. Rows with the same number of rounds are processed together, in
tiles.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.arrays import Int64, are_indices
from gpusampler.core.devices import HOST
from gpusampler.permutation.numpy_impl import TILE, WORK, permute_grid, permute_small
from gpusampler.permutation.reference import MAX_ROUNDS, ROUNDS_FROM, SMALL, Grid, grids_of

_LANES = np.arange(TILE, dtype=np.int64)


class PositionRanges(NamedTuple):
    """Rows of consecutive positions, one patch per row; int64 arrays of shape (K,).

    ``first`` is the first position and ``lengths`` the number of positions. ``n`` and ``base`` are
    the size and start of the patch; the other fields are key and grid of its permutation.
    """

    first: Int64
    lengths: Int64
    n: Int64
    base: Int64
    k0: Int64
    k1: Int64
    a: Int64
    b: Int64
    rem: Int64

    def rows(self, index: Any) -> PositionRanges:
        """Return the rows at ``index``."""
        return PositionRanges(*(column[index] for column in self))


def permute_ranges(
    first: Int64,
    lengths: Int64,
    n: Int64,
    key: tuple[Int64, Int64] | None,
    base: Int64,
    order: NDArray[Any] | None,
) -> Int64:
    """`permutation.host.permute_ranges` in NumPy."""
    k0, k1 = (first, first) if key is None else key
    grid = grids_of(arrays.namespace(HOST), n)
    ranges = PositionRanges(first, lengths, n, base, k0, k1, *grid)
    rounds = np.full(n.shape, -1) if key is None else _rounds_of(n)
    in_order = bool((rounds[1:] >= rounds[:-1]).all()) and bool((lengths > 0).all())
    rows: Any = slice(None)
    if not in_order:
        rows = np.argsort(rounds, kind="stable")
        rows = rows[lengths[rows] > 0]
        ranges, rounds = ranges.rows(rows), rounds[rows]
    ends = np.cumsum(ranges.lengths)
    samples = np.empty(int(ends[-1]) if ends.size else 0, np.int64)
    bounds = [0, *(np.flatnonzero(np.diff(rounds)) + 1).tolist(), rounds.size]
    for low, high in pairwise(bounds if rounds.size else []):
        out = samples[int(ends[low - 1]) if low else 0 : int(ends[high - 1])]
        _permute_rows(out, ranges.rows(slice(low, high)), int(rounds[low]), order)
    if in_order:
        return samples
    in_row_order = np.empty_like(samples)
    starts = np.cumsum(lengths) - lengths
    offsets = starts[rows] - (ends - ranges.lengths)
    in_row_order[np.repeat(offsets, ranges.lengths) + np.arange(samples.size)] = samples
    return in_row_order


def _rounds_of(n: Int64) -> Int64:
    """Return `rounds_for(n)` for every element of an array."""
    rounds = np.where(n <= SMALL, 0, MAX_ROUNDS)
    for min_n, num_rounds in ROUNDS_FROM:
        rounds[n >= min_n] = num_rounds
    return rounds


def _permute_rows(
    out: Int64, ranges: PositionRanges, rounds: int, order: NDArray[Any] | None
) -> None:
    """Permute non-empty rows with the same number of rounds, tile by tile.

    ``rounds`` is 0 for patches of up to 32 samples and -1 for no permutation.
    """
    if int(ranges.lengths.max()) > TILE:
        # Split rows longer than a tile into rows with the same key.
        num_tiles = -(-ranges.lengths // TILE)
        row = np.repeat(np.arange(num_tiles.size), num_tiles)
        first_tile = np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
        offset = (np.arange(row.size) - first_tile) * TILE
        ranges = ranges.rows(row)
        ranges = ranges._replace(
            first=ranges.first + offset, lengths=np.minimum(ranges.lengths - offset, TILE)
        )
    ends = np.cumsum(ranges.lengths)
    start = begin = 0
    while start < ends.size:
        stop = int(np.searchsorted(ends, begin + TILE, side="right"))
        end = int(ends[stop - 1])
        _permute_tile(out[begin:end], ranges.rows(slice(start, stop)), rounds, order)
        start, begin = stop, end


def _permute_tile(
    out: Int64, ranges: PositionRanges, rounds: int, order: NDArray[Any] | None
) -> None:
    """Do what `_permute_rows` does, for rows with at most `TILE` positions in total."""
    x, lane_row = WORK.i64[:, : out.size]
    starts = np.cumsum(ranges.lengths) - ranges.lengths
    lane_row.fill(0)
    lane_row[starts[1:]] = 1
    np.cumsum(lane_row, out=lane_row)

    def spread(values: NDArray[Any], target: NDArray[Any]) -> None:
        # Indices are in range, and np.take writes to `out` without a buffer only with "clip".
        np.take(values.astype(target.dtype, copy=False), lane_row, out=target, mode="clip")

    spread(ranges.first - starts, x)
    np.add(x, _LANES[: out.size], out=x)
    if bool((ranges.first + ranges.lengths > ranges.n).any()):
        np.remainder(x, ranges.n[lane_row], out=x)
    key = (ranges.k0, ranges.k1)
    if rounds == 0:
        np.copyto(x, permute_small(x.astype(np.uint8), ranges.lengths, ranges.n, key))
    elif rounds > 0:
        grid = Grid(ranges.a, ranges.b, ranges.rem)
        np.copyto(x, permute_grid(x, key, grid, rounds, spread))
    # Adding the start of the patch gives indices into `order`, or samples without one.
    spread(ranges.base, out)
    np.add(x, out, out=x if order is not None else out)
    if order is not None:
        _look_up(order, x, out)


def check_positions(positions: Int64, size: int) -> None:
    """Raise ValueError unless positions, int64 of shape (T,), are in 0 .. size - 1."""
    if not are_indices(positions, size):
        raise ValueError(f"a position is not in 0 .. {size - 1}, the order's last")


def _look_up(order: NDArray[Any], positions: Int64, out: Int64) -> None:
    """Compute ``out = order[positions]`` for at most `TILE` positions."""
    check_positions(positions, order.size)
    # np.take writes to `out` without a buffer only with "clip".
    if order.dtype == np.int32:
        samples = WORK.i32[: out.size]
        np.take(order, positions, out=samples, mode="clip")
        np.copyto(out, samples)
    else:
        np.take(order, positions, out=out, mode="clip")
