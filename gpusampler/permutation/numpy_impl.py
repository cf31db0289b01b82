"""Fast host implementation of the permutation: in-place NumPy on unsigned 32-bit integers.

Its results equal those of `permutation.reference` bit for bit. It is several times faster on a CPU.
uint32 arithmetic wraps on overflow, so it needs no masks. A vector register holds twice as many
uint32 as int64. Patches of up to 32 samples use uint8. Buffers are reused, and tiles stay in the L2
cache. ``hash * m >> 32`` fits in 32-bit integers for ``m <= 2**16``, that is for n <= 2**32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.arrays import Int64
from gpusampler.permutation.reference import (
    COIN_ROUND,
    MIX_1,
    SPREAD,
    Grid,
    keyed_hash,
    rounds_for,
)

TILE = 1 << 15
"""Number of positions per tile: 128 KiB in uint32."""

FEW_ROWS = 10
"""Number of rows of up to 32 samples that Python permutes faster than NumPy: 10 take 0.2 ms."""

MAX_N = 1 << 32
"""Largest supported n; the sides of its grid are 2**16."""

U32 = np.uint32
NDU32 = NDArray[np.uint32]
_HALF = U32(0xFFFF)
_S16 = U32(16)
_MIX_1, _SPREAD = U32(MIX_1), U32(SPREAD)


def _hash_into(out: NDU32, value: NDU32, round_key: NDU32, scratch: NDU32) -> None:
    """`reference.keyed_hash`, from ``k0 + r * (k1 | 1)``."""
    np.multiply(value, _SPREAD, out=out)
    np.bitwise_xor(out, round_key, out=out)
    np.right_shift(out, _S16, out=scratch)
    np.bitwise_xor(out, scratch, out=out)
    np.multiply(out, _MIX_1, out=out)


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
    # Where line < side, the subtraction wraps to a huge value, so the minimum keeps line.
    np.subtract(line, side, out=scratch)
    np.minimum(line, scratch, out=line)


class Workspace(threading.local):
    """Buffers for one tile, separate for each thread.

    If they were not reused, the operating system would take the memory back after every tile, and
    the page faults of the next tile would take as long as the arithmetic.
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
    """Permute positions ``x`` of K ranges, each on its own grid, in the same number of rounds.

    ``x`` has shape (T,) with T <= `TILE` and ``x < n``, where ``32 < n <= 2**32``. Arrays of
    ``key`` and ``grid`` have shape (K,). ``spread(values, out)`` expands one value per range
    to one value per position; without it, K must be 1. Returns a uint32 buffer of this
    thread, shape (T,), valid until the next call.
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
            # The last row is shorter by `b - rem`.
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
    """Permute positions ``x``, row after row, by Fisher-Yates shuffles of ``n <= 32`` elements.

    ``x`` has shape (T,) and is overwritten; ``lengths`` (number of positions per row, sum T),
    ``n`` and the arrays of ``key`` have shape (K,). Returns ``x``.
    """
    if n.size <= FEW_ROWS:
        start = 0
        columns = (column.tolist() for column in (lengths, n, *key))
        for length, size, k0, k1 in zip(*columns, strict=True):
            row = x[start : start + length]
            row[:] = _small_images(size, (k0, k1))[row]
            start += length
        return x
    largest = int(n.max(initial=1))
    first, second = np.empty(x.shape, np.bool_), np.empty(x.shape, np.bool_)
    swap = np.empty_like(x)
    for i in range(largest - 1, 0, -1):
        j = (keyed_hash(key, i, i) * (i + 1)) >> 32
        # A row with n <= i swaps i with itself, which changes nothing.
        j = np.where(n > i, j, i).astype(np.uint8)
        j_lane = np.repeat(j, lengths)
        np.equal(x, np.uint8(i), out=first)
        np.equal(x, j_lane, out=second)
        np.logical_or(first, second, out=first)
        np.bitwise_xor(j_lane, np.uint8(i), out=swap)
        np.multiply(swap, first.view(np.uint8), out=swap)
        np.bitwise_xor(x, swap, out=x)
    return x


def _small_images(n: int, key: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the images of 0 .. n-1, computed with Python integers."""
    positions = list(range(n))
    for i in range(n - 1, 0, -1):
        j = keyed_hash(key, i, i) * (i + 1) >> 32
        positions[i], positions[j] = positions[j], positions[i]
    images = np.empty(n, np.uint8)
    images[positions] = np.arange(n)
    return images


def permute_one(x: Int64, n: int, key: tuple[int, int], grid: Grid) -> Int64:
    """Apply one permutation of 0 .. n-1 to positions ``x``; int64, shape (T,). n <= `MAX_N`."""
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
