"""The same permutation on the host, fast: NumPy in native 32-bit lanes, in place.

Bit for bit `permutation.reference`, which stays its reference. What makes it several times faster
than the reference on a CPU: unsigned 32-bit numbers (they wrap by themselves, and a vector
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

from gpusampler.core.arrays import Int64
from gpusampler.permutation.numba import jit
from gpusampler.permutation.reference import (
    COIN_ROUND,
    MIX_1,
    MIX_2,
    SPREAD,
    Grid,
    keyed_hash,
    rounds_for,
)

TILE = 1 << 15
"""Lanes worked on at a time: a buffer of them is 128 KiB."""

_COMPILED_BATCH = 1 << 12
"""Ranges that the compiled form is given at a time: nine numbers for each, 288 KiB."""

MAX_N = 1 << 32
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


WORK = Workspace()


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
        From `gpusampler.permutation.reference.grids_of`.
    rounds : int
        `gpusampler.permutation.reference.rounds_for` of every n.
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
    col, row, hashed, scratch, side, round_key, step, a, b, rem, last = WORK.u32[:, : x.size]
    flag = WORK.flag[: x.size]
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
        1 .. `MAX_N`.
    key : pair of int
    grid : Grid of int
        From `gpusampler.permutation.reference.grid_of`.

    Returns
    -------
    int64 array, shape (T,)
    """
    out = np.empty(x.size, np.int64)
    rounds = rounds_for(n)
    compiled = jit.compiled_form(x.size)
    if compiled is not None:
        for first in range(0, x.size, _COMPILED_BATCH):
            # As many ranges of one position.
            tile = x[first : first + _COMPILED_BATCH]
            table = np.empty((9, tile.size), np.int64)
            table[0] = tile
            table[1:] = np.array([1, n, 0, *key, *grid], np.int64)[:, None]
            compiled.runs(out[first : first + _COMPILED_BATCH], table, True)
        return out
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
