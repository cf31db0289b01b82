"""`position_ranges` and `numpy_impl` compiled by Numba, with bit-identical results.

This is faster than array operations. A tile of 512 positions (lanes) stays in the L1 cache through
all rounds, products are widened to 64 bits in registers, and values shared by the lanes of a long
run are scalars. Lanes of short runs are first collected in a common tile. LLVM vectorizes the loops
over lanes for the current processor.

Only `jit` imports this module, because the import loads Numba and compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from gpusampler.permutation.reference import (
    COIN_ROUND,
    MAX_ROUNDS,
    MIX_1,
    ROUNDS_FROM,
    SMALL,
    SPREAD,
)

_TILE = 512
"""Number of lanes permuted at once; a tile of them takes 22 KiB."""

_FROM_1, _FROM_2, _FROM_3 = (start for start, _ in ROUNDS_FROM)
_ROUNDS = (MAX_ROUNDS, *(rounds for _, rounds in ROUNDS_FROM))
_KINDS = len(_ROUNDS)
"""Number of tiles in use: one for each number of rounds."""

_LONG = 16
"""Smallest number of lanes of one patch that are permuted in a tile of their own."""

_U32, _U64 = np.uint32, np.uint64
_MIX_1, _SPREAD = _U32(MIX_1), _U32(SPREAD)
_S16, _S31, _S32 = _U32(16), _U32(31), _U64(32)
_ZERO, _ONE, _TWO = _U32(0), _U32(1), _U32(2)
_COIN_ROUND = _U32(COIN_ROUND)

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}

# What each column of a tile holds.
_COL, _ROW, _KEY, _STEP, _A, _B, _REM = range(7)


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function immediately, for one signature, or load it from Numba's cache."""

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, cache=True, **_OPTIONS)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            # Neither this folder nor the user's own can be written to.
            return njit(signature, **_OPTIONS)(function)

    return compiled


@njit(inline="always")
def _hash(value, round_key):
    h = _U32(_U32(value * _SPREAD) ^ round_key)
    return _U32(_U32(h ^ (h >> _S16)) * _MIX_1)


@njit(inline="always")
def _turned(line, value, round_key, side):
    """``(line + (hash * side >> 32)) mod side``."""
    moved = _U32(line + _U32((_U64(_hash(value, round_key)) * _U64(side)) >> _S32))
    # Below `side` the subtraction wraps to something huge.
    return min(moved, _U32(moved - side))


@_compiled("void(" + "u4[::1], " * 7 + "i8[::1], i8[::1], i8[::1], i8, i8)")
def _permute_tile(col, row, key, step, a, b, rem, places, bases, out, lanes, rounds):
    """Permute the lanes of a tile, and write ``bases[i]`` plus the image to ``out[places[i]]``."""
    for r in range(rounds):
        if r % 2 == 0:
            for i in range(lanes):
                side = _U32(a[i] - _U32(col[i] >= rem[i]))
                row[i] = _turned(row[i], col[i], key[i], side)
                key[i] = _U32(key[i] + step[i])
        else:
            for i in range(lanes):
                side = rem[i] if row[i] == _U32(a[i] - _ONE) else b[i]
                col[i] = _turned(col[i], row[i], key[i], side)
                key[i] = _U32(key[i] + step[i])
    for i in range(lanes):
        x = _U32(row[i] * b[i] + col[i])
        if x < _TWO:
            coin_key = _U32(key[i] + _U32(step[i] * _U32(_COIN_ROUND - _U32(rounds))))
            x = _U32(x ^ (_hash(_ZERO, coin_key) >> _S31))
        out[places[i]] = bases[i] + np.int64(x)


@_compiled("void(u4[::1], u4[::1], u4, u4, u4, u4, u4, i8, i8[::1], i8)")
def _permute_run(col, row, key, step, a, b, rem, base, out, rounds):
    """Permute the lanes of one run, and write ``base`` plus each image to ``out``, one per lane."""
    last = _U32(a - _ONE)
    for r in range(rounds):
        if r % 2 == 0:
            for i in range(out.size):
                row[i] = _turned(row[i], col[i], key, _U32(a - _U32(col[i] >= rem)))
        else:
            for i in range(out.size):
                col[i] = _turned(col[i], row[i], key, rem if row[i] == last else b)
        key = _U32(key + step)
    coin_key = _U32(key + _U32(step * _U32(_COIN_ROUND - _U32(rounds))))
    coin = _U32(_hash(_ZERO, coin_key) >> _S31)
    for i in range(out.size):
        x = _U32(row[i] * b + col[i])
        out[i] = base + np.int64(_U32(x ^ coin) if x < _TWO else x)


@njit(inline="always")
def _columns(tile):
    return tile[0], tile[1], tile[2], tile[3], tile[4], tile[5], tile[6]


@njit(inline="always")
def _small_images(images, inverse, n, k0, k1):
    """Fill ``images[:n]`` with a Fisher-Yates permutation of at most 32 elements."""
    for x in range(n):
        inverse[x] = x
    step = _U32(k1 | _ONE)
    for i in range(n - 1, 0, -1):
        hashed = _hash(_U32(i), _U32(k0 + _U32(_U32(i) * step)))
        j = np.int64((_U64(hashed) * _U64(i + 1)) >> _S32)
        inverse[i], inverse[j] = inverse[j], inverse[i]
    for image in range(n):
        images[inverse[image]] = image


@_compiled("void(i8[::1], i8[:, ::1], b1)")
def runs(out, table, permuted):
    """Permute runs of consecutive positions; write base plus image of each to ``out``, end to end.

    Parameters
    ----------
    out : int64 array, shape (T,)
    table : int64 array, shape (9, K)
        One row per field of `gpusampler.permutation.position_ranges.PositionRanges`, one column
        per run; the sum of the lengths is T.
    permuted : bool
        Whether to permute the positions; if False, keys and grids are not used.
    """
    first, lengths, n, base, k0, k1, a, b, rem = (
        table[0],
        table[1],
        table[2],
        table[3],
        table[4],
        table[5],
        table[6],
        table[7],
        table[8],
    )
    tiles = np.empty((_KINDS, 7, _TILE), np.uint32)
    places = np.empty((_KINDS, _TILE), np.int64)
    bases = np.empty((_KINDS, _TILE), np.int64)
    filled = np.zeros(_KINDS, np.int64)
    cols, rows = np.empty(_TILE, np.uint32), np.empty(_TILE, np.uint32)
    images, inverse = np.empty(SMALL, np.int64), np.empty(SMALL, np.int64)
    start = 0
    for k in range(lengths.size):
        length, size, before = lengths[k], n[k], base[k]
        x = first[k] % size
        if not permuted:
            for place in range(start, start + length):
                out[place] = before + x
                x = x + 1 if x + 1 < size else 0
        elif size <= SMALL:
            _small_images(images, inverse, size, _U32(k0[k]), _U32(k1[k]))
            for place in range(start, start + length):
                out[place] = before + images[x]
                x = x + 1 if x + 1 < size else 0
        else:
            key, step = _U32(k0[k]), _U32(k1[k] | 1)
            sides = _U32(a[k]), _U32(b[k]), _U32(rem[k])
            row = x // b[k]
            col = x - row * b[k]
            kind = np.int64(size >= _FROM_1) + np.int64(size >= _FROM_2)
            kind += np.int64(size >= _FROM_3)
            tile = tiles[kind]
            done = 0
            while length - done >= _LONG:
                # Enough lanes of one patch: what they have in common stays in registers.
                many = min(length - done, _TILE)
                at = 0
                while at < many:
                    width = rem[k] if row == a[k] - 1 else b[k]
                    lanes = min(many - at, width - col)
                    for i in range(lanes):
                        cols[at + i] = _U32(col + i)
                        rows[at + i] = _U32(row)
                    at += lanes
                    col += lanes
                    if col == width:
                        col = 0
                        row = 0 if row == a[k] - 1 else row + 1
                place = start + done
                _permute_run(
                    cols, rows, key, step, *sides, before, out[place : place + many], _ROUNDS[kind]
                )
                done += many
            while done < length:
                # As many lanes as stand side by side on the grid, and fit into the tile.
                width = rem[k] if row == a[k] - 1 else b[k]
                at = filled[kind]
                lanes = min(length - done, width - col, _TILE - at)
                for i in range(lanes):
                    tile[_COL, at + i] = _U32(col + i)
                    tile[_ROW, at + i] = _U32(row)
                    tile[_KEY, at + i] = key
                    tile[_STEP, at + i] = step
                    tile[_A, at + i], tile[_B, at + i], tile[_REM, at + i] = sides
                    places[kind, at + i] = start + done + i
                    bases[kind, at + i] = before
                done += lanes
                col += lanes
                if col == width:
                    col = 0
                    row = 0 if row == a[k] - 1 else row + 1
                filled[kind] = at + lanes
                if filled[kind] == _TILE:
                    _permute_tile(
                        *_columns(tile), places[kind], bases[kind], out, _TILE, _ROUNDS[kind]
                    )
                    filled[kind] = 0
        start += length
    for kind in range(_KINDS):
        lanes = filled[kind]
        if lanes:
            _permute_tile(
                *_columns(tiles[kind]), places[kind], bases[kind], out, lanes, _ROUNDS[kind]
            )


COMPILES = hasattr(runs, "signatures")
"""Whether Numba compiles these functions. Under ``NUMBA_DISABLE_JIT``, Python runs them, a thousand
times slower."""
