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
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    lengths: NDArray[np.int64],
    n: NDArray[np.int64],
    key: tuple[NDArray[np.int64], NDArray[np.int64]],
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


def permute_one(
    x: NDArray[np.int64], n: int, key: tuple[int, int], grid: Grid
) -> NDArray[np.int64]:
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


def permute_runs(
    first: NDArray[np.int64],
    lengths: NDArray[np.int64],
    n: NDArray[np.int64],
    key: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    grid: Grid,
    base: NDArray[np.int64],
    order: NDArray[Any] | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Permute runs of positions of patches of any sizes, and look the samples up.

    Parameters
    ----------
    first, lengths, n, key, grid, base, order
        As `permute_rows` takes them; ``key`` is None where nothing is to be permuted.

    Returns
    -------
    samples : int64 array, shape (T,)
        The runs end to end, those with equally many rounds side by side.
    starts : int64 array, shape (K,)
        Where each row's run starts in ``samples``.
    """
    samples = np.empty(int(lengths.sum()), np.int64)
    if key is None:
        kinds, spans = np.array([-1]), [slice(None)]
        rows: Any = None
    else:
        rounds = np.where(n <= SMALL, 0, MAX_ROUNDS)
        for start, fewer in ROUNDS_FROM:
            rounds[n >= start] = fewer
        kinds = np.unique(rounds)
        rows = None if kinds.size == 1 else np.argsort(rounds, kind="stable")
        cuts = np.searchsorted(rounds if rows is None else rounds[rows], [*kinds, MAX_ROUNDS + 1])
        spans = [slice(int(cuts[i]), int(cuts[i + 1])) for i in range(kinds.size)]
    if rows is not None:
        first, lengths, n, base = first[rows], lengths[rows], n[rows], base[rows]
        grid = Grid(*(side[rows] for side in grid))
        key = None if key is None else (key[0][rows], key[1][rows])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    for kind, span in zip(kinds.tolist(), spans, strict=True):
        if not lengths[span].size:
            continue
        permute_rows(
            samples[int(starts[span][0]) : int(ends[span][-1])],
            first[span],
            lengths[span],
            n[span],
            (first[span], first[span]) if key is None else (key[0][span], key[1][span]),
            Grid(*(side[span] for side in grid)),
            kind,
            base[span],
            order,
        )
    if rows is not None:
        unsorted = np.empty_like(starts)
        unsorted[rows] = starts
        starts = unsorted
    return samples, starts


def permute_rows(
    out: NDArray[np.int64],
    first: NDArray[np.int64],
    lengths: NDArray[np.int64],
    n: NDArray[np.int64],
    key: tuple[NDArray[np.int64], NDArray[np.int64]],
    grid: Grid,
    rounds: int,
    base: NDArray[np.int64],
    order: NDArray[Any] | None,
) -> None:
    """Permute runs of consecutive positions, one run a row, and look the samples up.

    Parameters
    ----------
    out : int64 array, shape (T,)
        Receives the samples, row after row.
    first, lengths : int64 arrays, shape (K,)
        Each row's first position and number of positions; the lengths add up to T. Positions at
        or beyond n start again at 0.
    n : int64 array, shape (K,)
        Size of each row's patch, below 2**31.
    key : pair of int64 arrays, shape (K,)
    grid : Grid of int64 arrays, shape (K,)
    rounds : int
        The same for all rows; 0 for patches of up to 32, -1 for no permutation at all.
    base : int64 array, shape (K,)
        Where each row's patch starts.
    order : integer array or None
        Samples sorted by patch; None where a patch's samples are contiguous.
    """
    if lengths.size and int(lengths.max()) > TILE:
        # A row longer than a tile is cut into rows that share its key.
        pieces = -(-lengths // TILE)
        row = np.repeat(np.arange(lengths.size), pieces)
        piece = np.arange(row.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = first[row] + piece * TILE
        lengths = np.minimum(lengths[row] - piece * TILE, TILE)
        n, base = n[row], base[row]
        key = (key[0][row], key[1][row])
        grid = Grid(*(side[row] for side in grid))
    ends = np.cumsum(lengths)
    start = done = 0
    while start < lengths.size:
        stop = max(start + 1, int(np.searchsorted(ends, done + TILE, side="right")))
        rows = slice(start, stop)
        end = int(ends[stop - 1])
        tile_key = (key[0][rows], key[1][rows])
        tile_grid = Grid(*(side[rows] for side in grid))
        _permute_tile(
            out[done:end],
            first[rows],
            lengths[rows],
            n[rows],
            tile_key,
            tile_grid,
            rounds,
            base[rows],
            order,
        )
        start, done = stop, end


def _permute_tile(
    out: NDArray[np.int64],
    first: NDArray[np.int64],
    lengths: NDArray[np.int64],
    n: NDArray[np.int64],
    key: tuple[NDArray[np.int64], NDArray[np.int64]],
    grid: Grid,
    rounds: int,
    base: NDArray[np.int64],
    order: NDArray[Any] | None,
) -> None:
    """`permute_rows` of at most `TILE` positions."""
    x, lane_row = _WORK.i64[:, : out.size]
    starts = np.cumsum(lengths) - lengths
    lane_row.fill(0)
    lane_row[starts[1:]] = 1
    np.cumsum(lane_row, out=lane_row)

    def spread(values: NDArray[Any], to: NDArray[Any]) -> None:
        # Row numbers are in range, and only with "clip" does take write without a buffer.
        np.take(values.astype(to.dtype, copy=False), lane_row, out=to, mode="clip")

    spread(first - starts, x)
    np.add(x, _LANES[: out.size], out=x)
    if bool((first + lengths > n).any()):
        np.remainder(x, n[lane_row], out=x)
    if rounds == 0:
        np.copyto(x, permute_small(x.astype(np.uint8), lengths, n, key))
    elif rounds > 0:
        np.copyto(x, permute_grid(x, key, grid, rounds, spread))
    # Positions become places in the order, or samples, by where their patch starts.
    spread(base, out)
    np.add(x, out, out=x if order is not None else out)
    if order is not None and order.dtype == np.int32:
        samples = _WORK.i32[: out.size]
        np.take(order, x, out=samples, mode="clip")
        np.copyto(out, samples)
    elif order is not None:
        np.take(order, x, out=out, mode="clip")
