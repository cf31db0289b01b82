"""The same permutation on the host, fast: NumPy in native 32-bit lanes, in place.

Bit for bit `gpusampler.permutation`, which stays its reference. What makes it several times
faster than the reference on a CPU: unsigned 32-bit numbers (they wrap by themselves, and a vector
register holds twice as many), eight-bit ones for small patches, buffers that are reused, and tiles
that stay in the second-level cache. The range reduction ``hash * m >> 32`` needs no 64-bit lane
while ``m <= 2**16``, that is while n <= 2**32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.arrays import Int64
from gpusampler.permutation import (
    COIN_ROUND,
    MAX_ROUNDS,
    MIX_1,
    MIX_2,
    ROUNDS_FROM,
    SMALL,
    SPREAD,
    Grid,
    keyed_hash,
    rounds_for,
)

TILE = 1 << 15
"""Lanes worked on at a time: a buffer of them is 128 KiB."""

_LANES = np.arange(TILE, dtype=np.int64)

WIDEST = 1 << 32
"""Largest n of these forms: the sides of its grid are 2**16."""

U32 = np.uint32
NDU32 = NDArray[np.uint32]
_HALF = U32(0xFFFF)
_S15, _S16 = U32(15), U32(16)
_MIX_1, _MIX_2, _SPREAD = U32(MIX_1), U32(MIX_2), U32(SPREAD)


def _hash_into(out: NDU32, value: NDU32, round_key: NDU32, scratch: NDU32) -> None:
    """``out = mix(value * SPREAD ^ round_key)``."""
    np.multiply(value, _SPREAD, out=out)
    np.bitwise_xor(out, round_key, out=out)
    np.right_shift(out, _S16, out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    np.multiply(out, _MIX_1, out=out)
    np.right_shift(out, _S15, out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    np.multiply(out, _MIX_2, out=out)
    np.right_shift(out, _S15, out=scratch)
    np.bitwise_xor(out, scratch, out=out)


def _rotate(line: NDU32, amount: NDU32, side: NDU32, scratch: NDU32) -> None:
    """``line = (line + (amount * side >> 32)) mod side``, for sides up to 2**16."""
    np.right_shift(amount, _S16, out=scratch)
    np.bitwise_and(amount, _HALF, out=amount)
    np.multiply(amount, side, out=amount)
    np.right_shift(amount, _S16, out=amount)
    np.multiply(scratch, side, out=scratch)
    np.add(scratch, amount, out=scratch)
    np.right_shift(scratch, _S16, out=scratch)
    np.add(line, scratch, out=line)
    # Below `side` the subtraction wraps to something huge, so the minimum is the conditional.
    np.subtract(line, side, out=scratch)
    np.minimum(line, scratch, out=line)


class Workspace(threading.local):
    """Buffers of one tile, one set a thread.

    Buffers of this size made anew for every tile would go back to the operating system each time,
    and the page faults on the way in cost as much as the arithmetic.
    """

    def __init__(self) -> None:
        self.u32 = np.empty((11, TILE), U32)
        self.i64 = np.empty((2, TILE), np.int64)
        self.i32 = np.empty(TILE, np.int32)
        self.flag = np.empty(TILE, np.bool_)


_WORK = Workspace()


def permute_grid(
    x: NDArray[Any],
    key: tuple[NDArray[Any], NDArray[Any]],
    grid: Grid,
    rounds: int,
    spread: Callable[[NDArray[Any], NDU32], None] | None = None,
) -> NDU32:
    """Images of ``x`` under grid permutations that all have the same number of rounds.

    Parameters
    ----------
    x : integer array, shape (T,)
        Positions, at most `TILE` of them, each below its n, with ``32 < n <= 2**32``.
    key : pair of integer arrays, shape (K,)
    grid : Grid of integer arrays, shape (K,)
        From `gpusampler.permutation.grids_of`.
    rounds : int
        `gpusampler.permutation.rounds_for` of every n.
    spread : callable, optional
        ``spread(row_values, out)`` writes to every position its row's value. Default: there is one
        row, K = 1.

    Returns
    -------
    uint32 array, shape (T,)
        A buffer of this thread's, good until the next call.
    """
    if spread is None:
        spread = _spread_one
    col, row, hashed, scratch, side, round_key, step, a, b, rem, last = _WORK.u32[:, : x.size]
    flag = _WORK.flag[: x.size]
    spread(key[0], round_key)
    spread(key[1] | 1, step)
    spread(grid.a, a)
    spread(grid.b, b)
    spread(grid.rem, rem)
    np.copyto(col, x, casting="unsafe")
    np.floor_divide(col, b, out=row)
    np.multiply(row, b, out=hashed)
    np.subtract(col, hashed, out=col)
    np.subtract(a, U32(1), out=last)
    for r in range(rounds):
        if r % 2 == 0:
            _hash_into(hashed, col, round_key, scratch)
            np.greater_equal(col, rem, out=flag)
            np.subtract(a, flag.view(np.uint8), out=side)
            _rotate(row, hashed, side, scratch)
        else:
            _hash_into(hashed, row, round_key, scratch)
            np.equal(row, last, out=flag)
            # The last row is `b - rem` shorter.
            np.subtract(b, rem, out=side)
            np.multiply(side, flag.view(np.uint8), out=side)
            np.subtract(b, side, out=side)
            _rotate(col, hashed, side, scratch)
        np.add(round_key, step, out=round_key)
    np.multiply(row, b, out=row)
    np.add(row, col, out=row)
    np.less(row, U32(2), out=flag)
    low = np.flatnonzero(flag)
    if low.size:
        coin_key = round_key[low] + step[low] * U32(COIN_ROUND - rounds)
        zero = np.zeros(low.size, U32)
        coin = np.empty_like(zero)
        _hash_into(coin, zero, coin_key, np.empty_like(zero))
        row[low] ^= coin >> U32(31)
    image: NDU32 = row
    return image


def _spread_one(values: NDArray[Any], out: NDU32) -> None:
    out.fill(values[0])


def permute_small(
    x: NDArray[np.uint8],
    lengths: Int64,
    n: Int64,
    key: tuple[Int64, Int64],
) -> NDArray[np.uint8]:
    """Images of ``x`` under Fisher-Yates permutations of at most 32 elements.

    Parameters
    ----------
    x : uint8 array, shape (T,)
        Positions, row after row. Overwritten.
    lengths, n : int64 arrays, shape (K,)
        Positions of each row (their sum is T), and the size of its permutation.
    key : pair of int64 arrays, shape (K,)

    Returns
    -------
    uint8 array, shape (T,)
    """
    largest = int(n.max(initial=1))
    first, second = np.empty(x.shape, np.bool_), np.empty(x.shape, np.bool_)
    swap = np.empty_like(x)
    for i in range(largest - 1, 0, -1):
        j = (keyed_hash(key, i, i) * (i + 1)) >> 32
        # A row that is too short for this step swaps i with itself, which is no change.
        j = np.where(n > i, j, i).astype(np.uint8)
        j_lane = np.repeat(j, lengths)
        np.equal(x, np.uint8(i), out=first)
        np.equal(x, j_lane, out=second)
        np.logical_or(first, second, out=first)
        np.bitwise_xor(j_lane, np.uint8(i), out=swap)
        np.multiply(swap, first.view(np.uint8), out=swap)
        np.bitwise_xor(x, swap, out=x)
    return x


def permute_one(x: Int64, n: int, key: tuple[int, int], grid: Grid) -> Int64:
    """Images of ``x`` under one permutation.

    Parameters
    ----------
    x : int64 array, shape (T,)
        Positions below n.
    n : int
        1 .. `WIDEST`.
    key : pair of int
    grid : Grid of int
        From `gpusampler.permutation.grid_of`.

    Returns
    -------
    int64 array, shape (T,)
    """
    out = np.empty(x.size, np.int64)
    rounds = rounds_for(n)
    for first in range(0, x.size, TILE):
        tile = x[first : first + TILE]
        keys = (np.array([key[0]]), np.array([key[1]]))
        if rounds == 0:
            size = np.array([tile.size])
            out[first : first + TILE] = permute_small(
                tile.astype(np.uint8), size, np.array([n]), keys
            )
        else:
            sides = Grid(*(np.array([side]) for side in grid))
            out[first : first + TILE] = permute_grid(tile, keys, sides, rounds)
    return out


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
        From `gpusampler.permutation.grids_of`, of ``n``.
    base : int64 array, shape (K,)
        Where each row's patch starts.
    order : integer array or None
        Samples sorted by patch; None where a patch's samples are contiguous.

    Returns
    -------
    samples : int64 array, shape (T,)
        The runs end to end, those with equally many rounds side by side.
    starts : int64 array, shape (K,)
        Where each row's run starts in ``samples``.
    """
    k0, k1 = (first, first) if key is None else key
    runs = Runs(first, lengths, n, base, k0, k1, *grid)
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
    x, lane_row = _WORK.i64[:, : out.size]
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
    if order is not None and order.dtype == np.int32:
        samples = _WORK.i32[: out.size]
        np.take(order, x, out=samples, mode="clip")
        np.copyto(out, samples)
    elif order is not None:
        np.take(order, x, out=out, mode="clip")
