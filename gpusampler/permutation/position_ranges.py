"""Runs of positions of many patches, permuted on the host and looked up: what a batch is made of.

Rows with equally many rounds are worked on side by side, in tiles, whatever their lengths are; or,
where Numba is installed and it pays, row after row by the compiled form.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.arrays import Int64
from gpusampler.permutation.numba import jit
from gpusampler.permutation.numpy_impl import TILE, WORK, permute_grid, permute_small
from gpusampler.permutation.reference import MAX_ROUNDS, ROUNDS_FROM, SMALL, Grid

_LANES = np.arange(TILE, dtype=np.int64)


class Runs(NamedTuple):
    """Rows of consecutive positions, one patch a row; int64 arrays of shape (K,).

    ``first`` position and ``lengths``, the size ``n`` of the patch and where it starts (``base``),
    the key and the grid of its permutation.
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

    def rows(self, which: Any) -> Runs:
        """Return some of the rows."""
        return Runs(*(column[which] for column in self))


def permute_runs(
    first: Int64,
    lengths: Int64,
    n: Int64,
    key: tuple[Int64, Int64] | None,
    grid: Grid,
    base: Int64,
    order: NDArray[Any] | None,
) -> tuple[Int64, Int64]:
    """Permute runs of consecutive positions of patches of any sizes, and look the samples up.

    Parameters
    ----------
    first, lengths : int64 arrays, shape (K,)
        Each row's first position and number of positions, 0 or more; the lengths add up to T.
        Positions at or beyond n start again at 0.
    n : int64 array, shape (K,)
        Size of each row's patch, 1 .. 2**31 - 1.
    key : pair of int64 arrays, shape (K,), or None
        None where nothing is to be permuted.
    grid : Grid of int64 arrays, shape (K,)
        From `gpusampler.permutation.reference.grids_of`, of ``n``.
    base : int64 array, shape (K,)
        Where each row's patch starts.
    order : integer array or None
        Samples sorted by patch; None where a patch's samples are contiguous.

    Returns
    -------
    samples : int64 array, shape (T,)
        The runs end to end, in any order.
    starts : int64 array, shape (K,)
        Where each row's run starts in ``samples``.
    """
    k0, k1 = (first, first) if key is None else key
    runs = Runs(first, lengths, n, base, k0, k1, *grid)
    compiled = jit.compiled_form(int(lengths.sum()))
    if compiled is not None:
        return _permute_compiled(compiled, runs, key is not None, order)
    rounds = np.full(n.shape, -1) if key is None else _rounds_of(n)
    in_order = bool((rounds[1:] >= rounds[:-1]).all()) and bool((lengths > 0).all())
    rows: Any = slice(None)
    if not in_order:
        rows = np.argsort(rounds, kind="stable")
        rows = rows[lengths[rows] > 0]
        runs, rounds = runs.rows(rows), rounds[rows]
    ends = np.cumsum(runs.lengths)
    starts = np.zeros(n.shape, np.int64)
    starts[rows] = ends - runs.lengths
    samples = np.empty(int(ends[-1]) if ends.size else 0, np.int64)
    cuts = [0, *(np.flatnonzero(np.diff(rounds)) + 1).tolist(), rounds.size]
    for low, high in pairwise(cuts if rounds.size else []):
        part = slice(int(ends[low - 1]) if low else 0, int(ends[high - 1]))
        _permute_rows(samples[part], runs.rows(slice(low, high)), int(rounds[low]), order)
    return samples, starts


def _permute_compiled(
    compiled: ModuleType, runs: Runs, permuted: bool, order: NDArray[Any] | None
) -> tuple[Int64, Int64]:
    """`permute_runs` by the form that Numba compiled: rows stay in their order."""
    ends = np.cumsum(runs.lengths)
    starts = ends - runs.lengths
    samples = np.empty(int(ends[-1]) if ends.size else 0, np.int64)
    compiled.runs(samples, np.stack(runs), permuted)
    if order is not None:
        for first in range(0, samples.size, TILE):
            tile = samples[first : first + TILE]
            places = WORK.i64[0, : tile.size]
            np.copyto(places, tile)
            _look_up(order, places, tile)
    return samples, starts


def _rounds_of(n: Int64) -> Int64:
    """`rounds_for` of an array."""
    rounds = np.where(n <= SMALL, 0, MAX_ROUNDS)
    for start, fewer in ROUNDS_FROM:
        rounds[n >= start] = fewer
    return rounds


def _permute_rows(out: Int64, runs: Runs, rounds: int, order: NDArray[Any] | None) -> None:
    """Permute rows, each of a position at least, that have equally many rounds, tile by tile.

    ``rounds`` is 0 for patches of up to 32, -1 for no permutation at all.
    """
    if int(runs.lengths.max()) > TILE:
        # A row longer than a tile is cut into rows that share its key.
        pieces = -(-runs.lengths // TILE)
        row = np.repeat(np.arange(pieces.size), pieces)
        skipped = (np.arange(row.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * TILE
        runs = runs.rows(row)
        runs = runs._replace(
            first=runs.first + skipped, lengths=np.minimum(runs.lengths - skipped, TILE)
        )
    ends = np.cumsum(runs.lengths)
    start = done = 0
    while start < ends.size:
        stop = int(np.searchsorted(ends, done + TILE, side="right"))
        end = int(ends[stop - 1])
        _permute_tile(out[done:end], runs.rows(slice(start, stop)), rounds, order)
        start, done = stop, end


def _permute_tile(out: Int64, runs: Runs, rounds: int, order: NDArray[Any] | None) -> None:
    """`_permute_rows` of at most `TILE` positions."""
    x, lane_row = WORK.i64[:, : out.size]
    starts = np.cumsum(runs.lengths) - runs.lengths
    lane_row.fill(0)
    lane_row[starts[1:]] = 1
    np.cumsum(lane_row, out=lane_row)

    def spread(values: NDArray[Any], to: NDArray[Any]) -> None:
        # Row numbers are in range, and only with "clip" does take write without a buffer.
        np.take(values.astype(to.dtype, copy=False), lane_row, out=to, mode="clip")

    spread(runs.first - starts, x)
    np.add(x, _LANES[: out.size], out=x)
    if bool((runs.first + runs.lengths > runs.n).any()):
        np.remainder(x, runs.n[lane_row], out=x)
    key = (runs.k0, runs.k1)
    if rounds == 0:
        np.copyto(x, permute_small(x.astype(np.uint8), runs.lengths, runs.n, key))
    elif rounds > 0:
        grid = Grid(runs.a, runs.b, runs.rem)
        np.copyto(x, permute_grid(x, key, grid, rounds, spread))
    # Positions become places in the order, or samples, by where their patch starts.
    spread(runs.base, out)
    np.add(x, out, out=x if order is not None else out)
    if order is not None:
        _look_up(order, x, out)


def _look_up(order: NDArray[Any], places: Int64, out: Int64) -> None:
    """``out = order[places]`` for at most `TILE` places, all in range."""
    if order.dtype == np.int32:
        samples = WORK.i32[: out.size]
        np.take(order, places, out=samples, mode="clip")
        np.copyto(out, samples)
    else:
        np.take(order, places, out=out, mode="clip")
