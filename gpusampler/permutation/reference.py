"""The keyed permutation of 0 .. n-1, version 1: the reference that every other form must equal.

A permutation here is a function of (key, n) that is evaluated only at the positions asked for.
``x`` goes in, its image comes out; nothing of size n is ever built. Above 32 elements the n
positions are laid out as a ragged grid of about sqrt(n) by sqrt(n) cells whose columns and rows
are rotated in turn by keyed amounts. Every round maps the n cells onto themselves, so there is no
cycle walking: the number of operations depends on n alone, never on the data. Up to 32 elements it
is an exact Fisher-Yates shuffle, followed along the trajectory of one element.

Hash values are unsigned 32-bit numbers carried in int64 lanes: every multiplier and every side of
a grid is below 2**31, so no product leaves int64 and no shift meets a negative number. That is
what makes the bits the same on NumPy, torch and CuPy, none of whose unsigned types torch can
shift. The functions take plain Python integers as well as arrays of any of these libraries.

A change of anything in this file changes every user's batches: it needs another ``VERSION``, and
the golden vectors in ``tests/golden`` hold it in place.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

VERSION = 1

# Purposes keep the streams of one (seed, epoch) apart.
PURPOSE_BATCHES = 1
PURPOSE_PATCHES = 2
PURPOSE_SAMPLES = 3
PURPOSE_SPLIT_SAMPLES = 4
PURPOSE_SPLIT_PATCHES = 5
PURPOSE_BUCKETS = 6

SMALL = 32
"""Largest n that is shuffled by Fisher-Yates; larger ones go through the grid."""

MASK = 0xFFFFFFFF
MIX_1 = 0x21F0AAAD
MIX_2 = 0x735A2D97
SPREAD = 0x2C1B3C6D
KEY_START = (0x243F6A88, 0x85A308D3)
COIN_ROUND = 63

MAX_ROUNDS = 12
ROUNDS_FROM = ((1024, 8), (65536, 6))
"""From this n on, that many rounds: the bias falls as n**(1 - rounds / 2)."""


class Grid(NamedTuple):
    """A ragged grid of n cells: ``a`` rows of ``b`` cells, the last row of ``rem``.

    Each field is a Python integer or an int64 array of one shape.
    """

    a: Any
    b: Any
    rem: Any


def mix(h: Any) -> Any:
    """Scramble a 32-bit value: a bijection of 0 .. 2**32 - 1 (xorshift-multiply, three steps).

    The multipliers are those of C. Wellons' hash prospector for 32 bits (`low bias`).
    """
    h = h ^ (h >> 16)
    h = (h * MIX_1) & MASK
    h = h ^ (h >> 15)
    h = (h * MIX_2) & MASK
    return h ^ (h >> 15)


def absorb(state: tuple[Any, Any], word: Any) -> tuple[Any, Any]:
    """Take a 32-bit ``word`` into the 64-bit ``state``: a bijection of the states."""
    s0 = mix(state[0] ^ word)
    return s0, mix(((state[1] + s0) & MASK) ^ ((word * SPREAD) & MASK))


def absorb_pair(state: tuple[Any, Any], value: Any) -> tuple[Any, Any]:
    """Take a non-negative 64-bit ``value`` into ``state``, low word first."""
    return absorb(absorb(state, value & MASK), (value >> 32) & MASK)


def seed_state(seed: int, purpose: int) -> tuple[int, int]:
    """State of the keys of one (seed, purpose): what `key_of` goes on from."""
    return absorb(absorb_pair(KEY_START, seed), purpose)


def key_of(state: tuple[Any, Any], pass_: Any, group: Any) -> tuple[Any, Any]:
    """Key of one permutation, from its `seed_state`; arguments as for `derive_key`."""
    return absorb_pair(absorb_pair(state, pass_), group)


def derive_key(seed: int, purpose: int, pass_: Any, group: Any) -> tuple[Any, Any]:
    """Key of one permutation.

    Parameters
    ----------
    seed : int
        0 .. 2**64 - 1.
    purpose : int
        One of the ``PURPOSE_*`` constants.
    pass_ : int or int64 array
        The epoch (or, for a patch that is mixed up or down, its own pass), 0 .. 2**63 - 1.
    group : int or int64 array
        The position of the patch among the sorted patch ids, 0 .. 2**63 - 1.

    Returns
    -------
    k0, k1 : int or int64 array
        Two 32-bit words, of the broadcast shape of ``pass_`` and ``group``. Seed and epoch are
        absorbed one after the other, never added: (seed, epoch + 1) and (seed + 1, epoch) have
        nothing in common.
    """
    return key_of(seed_state(seed, purpose), pass_, group)


class Streams(NamedTuple):
    """The `seed_state` of each purpose of a plan: pairs of 32-bit integers."""

    batches: tuple[int, int]
    patches: tuple[int, int]
    samples: tuple[int, int]
    buckets: tuple[int, int]

    @classmethod
    def of(cls, seed: int) -> Streams:
        """Return the streams of a seed."""
        purposes = (PURPOSE_BATCHES, PURPOSE_PATCHES, PURPOSE_SAMPLES, PURPOSE_BUCKETS)
        return cls(*(seed_state(seed, purpose) for purpose in purposes))


def keyed_hash(key: tuple[Any, Any], r: int, v: Any) -> Any:
    """Round function: 32 bits from round ``r`` and value ``v`` (below 2**31) under ``key``."""
    k0, k1 = key
    return mix(((v * SPREAD) ^ (k0 + r * (k1 | 1))) & MASK)


def rounds_for(n: int) -> int:
    """Rounds of the grid permutation of ``n`` elements; 0 where Fisher-Yates takes over."""
    if n <= SMALL:
        return 0
    # A plain loop: torch.compile of torch 2.6 traces no `next` of a generator.
    for start, rounds in reversed(ROUNDS_FROM):
        if n >= start:
            return rounds
    return MAX_ROUNDS


def grid_of(n: int) -> Grid:
    """Sides of the grid of ``n >= 1`` cells, ``n`` below 2**62 (so that both stay below 2**31)."""
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    return Grid(a, b, n - (a - 1) * b)


def grids_of(xp: Any, n: Any) -> Grid:
    """Sides of many grids at once.

    Parameters
    ----------
    xp : module
        Array namespace.
    n : int64 array
        Numbers of elements, 1 .. 2**62 - 1.

    Returns
    -------
    Grid
        Of int64 arrays of the shape of ``n``. Exact: the floating-point root is only a first
        guess, and integers correct it.
    """
    m = n - 1
    root = xp.astype(xp.sqrt(xp.astype(m, xp.float64)), xp.int64)
    root = root - xp.astype(root * root > m, xp.int64)
    root = root + xp.astype((root + 1) * (root + 1) <= m, xp.int64)
    a = root + 1
    b = (n + a - 1) // a
    return Grid(a, b, n - (a - 1) * b)


def _permute_small(xp: Any, x: Any, n: Any, key: tuple[Any, Any], largest: int) -> Any:
    """Image of ``x`` under Fisher-Yates: the transpositions (i, j_i), from i = n-1 down to 1."""
    for i in range(largest - 1, 0, -1):
        j = (keyed_hash(key, i, i) * (i + 1)) >> 32
        j = xp.where(i < n, j, i)
        x = xp.where(x == i, j, xp.where(x == j, i, x))
    return x


def _permute_grid(
    xp: Any, x: Any, n: Any, key: tuple[Any, Any], grid: Grid, min_rounds: int, max_rounds: int
) -> Any:
    """Image of ``x`` on the grid; rounds from ``min_rounds`` on only where n needs them."""
    a, b, rem = grid
    row = x // b
    col = x - row * b
    last = a - 1
    for r in range(max_rounds):
        if r % 2 == 0:
            # Columns beyond the last row's cells are one cell shorter.
            side = xp.where(col >= rem, last, a)
            moved = row + ((keyed_hash(key, r, col) * side) >> 32)
        else:
            side = xp.where(row == last, rem, b)
            moved = col + ((keyed_hash(key, r, row) * side) >> 32)
        moved = xp.where(moved >= side, moved - side, moved)
        if r >= min_rounds:
            needs_round = n < ROUNDS_FROM[0][0] if r >= ROUNDS_FROM[0][1] else n < ROUNDS_FROM[1][0]
            moved = xp.where(needs_round, moved, row if r % 2 == 0 else col)
        if r % 2 == 0:
            row = moved
        else:
            col = moved
    x = row * b + col
    # Rotations of rows and columns alone reach only some parities; a coin reaches both.
    coin = keyed_hash(key, COIN_ROUND, 0) >> 31
    return xp.where(x < 2, x ^ coin, x)


def permute(
    xp: Any,
    x: Any,
    n: Any,
    key: tuple[Any, Any],
    grid: Grid,
    smallest: int,
    largest: int,
) -> Any:
    """Images of positions under keyed permutations of 0 .. n-1.

    Parameters
    ----------
    xp : module
        Array namespace of the arguments (array-api-compat).
    x : int64 array
        Positions, ``0 <= x < n``.
    n : int64 array
        Number of elements of each position's permutation; broadcasts against ``x``.
    key : pair of int64 arrays
        From `derive_key`; broadcast against ``x``.
    grid : Grid
        From `grids_of` (or `grid_of`), for the same ``n``.
    smallest, largest : int
        Bounds of ``n`` known beforehand: forms and rounds that no ``n`` in between needs are left
        out. They decide what is computed, never the result.

    Returns
    -------
    int64 array
        Of the broadcast shape, on the device of ``x``; no value is ever inspected on the host.
    """
    x = xp.broadcast_arrays(x, n)[0]
    if largest <= SMALL:
        return _permute_small(xp, x, n, key, largest)
    min_rounds, max_rounds = rounds_for(largest), rounds_for(max(smallest, SMALL + 1))
    image = _permute_grid(xp, x, n, key, grid, min_rounds, max_rounds)
    if smallest > SMALL:
        return image
    return xp.where(n <= SMALL, _permute_small(xp, x, n, key, SMALL), image)
