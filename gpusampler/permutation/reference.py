"""The keyed permutation of 0 .. n-1, version 1: the reference for all other implementations.

A permutation is a function of (key, n) that maps a position ``x`` to its image; no array of size n
is ever built. For n > 32, the n positions form a ragged grid of about sqrt(n) by sqrt(n) cells
whose columns and rows are rotated in turn by keyed amounts. Every round maps the n cells onto
themselves, so there are no retries (cycle walking): the number of operations depends only on n. For
n <= 32, it is an exact Fisher-Yates shuffle, evaluated for one position without shuffling an array.

Hash values are unsigned 32-bit integers stored in int64: every multiplier and every side of a grid
is below 2**31, so no product overflows int64 and no negative number is shifted. Results are
therefore identical on NumPy, torch (which cannot shift wide unsigned integers) and CuPy. The
functions take Python integers as well as arrays of these libraries.

Any change of the results changes every user's batches and needs a new ``VERSION``; the golden
vectors in ``tests/golden`` detect it.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

VERSION = 1

# Different purposes give independent keys for the same (seed, epoch).
PURPOSE_BATCHES = 1
PURPOSE_PATCHES = 2
PURPOSE_SAMPLES = 3
PURPOSE_SPLIT_SAMPLES = 4
PURPOSE_SPLIT_PATCHES = 5
PURPOSE_BUCKETS = 6

SMALL = 32
"""Largest n for the Fisher-Yates shuffle; a larger n uses the grid."""

MASK = 0xFFFFFFFF
MIX_1 = 0x21F0AAAD
MIX_2 = 0x735A2D97
SPREAD = 0x2C1B3C6D
KEY_START = (0x243F6A88, 0x85A308D3)
COIN_ROUND = 63

MAX_ROUNDS = 12
ROUNDS_FROM = ((128, 10), (1024, 8), (65536, 6))
"""Pairs (smallest n, number of rounds from this n on): the bias falls as n**(1 - rounds / 2)."""


class Grid(NamedTuple):
    """A ragged grid of n cells: ``a`` rows of ``b`` cells, but ``rem`` cells in the last row.

    Fields are Python integers or int64 arrays of the same shape.
    """

    a: Any
    b: Any
    rem: Any


def mix(h: Any) -> Any:
    """Hash a 32-bit value by xorshifts and multiplications: a bijection of 0 .. 2**32 - 1.

    The multipliers are those of C. Wellons' hash prospector for 32 bits (`low bias`).
    """
    h = h ^ (h >> 16)
    h = (h * MIX_1) & MASK
    h = h ^ (h >> 15)
    h = (h * MIX_2) & MASK
    return h ^ (h >> 15)


def absorb(state: tuple[Any, Any], word: Any) -> tuple[Any, Any]:
    """Absorb a 32-bit ``word`` into the 64-bit ``state``; for every word, a bijection of states."""
    s0 = mix(state[0] ^ word)
    return s0, mix(((state[1] + s0) & MASK) ^ ((word * SPREAD) & MASK))


def absorb_pair(state: tuple[Any, Any], value: Any) -> tuple[Any, Any]:
    """Absorb a non-negative 64-bit ``value`` into ``state``, low word first."""
    return absorb(absorb(state, value & MASK), (value >> 32) & MASK)


def seed_state(seed: int, purpose: int) -> tuple[int, int]:
    """Return the state of one (seed, purpose) from which `key_of` derives keys."""
    return absorb(absorb_pair(KEY_START, seed), purpose)


def key_of(state: tuple[Any, Any], pass_: Any, group: Any) -> tuple[Any, Any]:
    """Return the key of one permutation from its `seed_state`; arguments as for `derive_key`."""
    return absorb_pair(absorb_pair(state, pass_), group)


def derive_key(seed: int, purpose: int, pass_: Any, group: Any) -> tuple[Any, Any]:
    """Return the key of one permutation: two 32-bit words, shaped like ``pass_`` and ``group``.

    ``seed`` is below 2**64 and ``purpose`` one of ``PURPOSE_*``. ``pass_`` is the epoch or,
    with weights, the number of the patch's own pass; ``group`` is the index of the patch among the
    sorted patch ids. Both are ints or int64 arrays, at least 0. Seed and epoch are absorbed one
    after the other, never added, so that (seed, epoch + 1) and (seed + 1, epoch) have independent
    keys.
    """
    return key_of(seed_state(seed, purpose), pass_, group)


class Streams(NamedTuple):
    """Random-number states derived from one seed, one `seed_state` per purpose of a plan."""

    batches: tuple[int, int]
    patches: tuple[int, int]
    samples: tuple[int, int]
    buckets: tuple[int, int]

    @classmethod
    def of(cls, seed: int) -> Streams:
        """Return the states derived from a seed."""
        purposes = (PURPOSE_BATCHES, PURPOSE_PATCHES, PURPOSE_SAMPLES, PURPOSE_BUCKETS)
        return cls(*(seed_state(seed, purpose) for purpose in purposes))


def keyed_hash(key: tuple[Any, Any], r: int, v: Any) -> Any:
    """Return the 32-bit hash of round ``r`` and value ``v < 2**31`` under ``key``.

    Callers use the high bits, which depend on all bits of the product. Several rounds follow one
    another, so one multiplication fewer than in `mix` is enough.
    """
    k0, k1 = key
    h = ((v * SPREAD) ^ (k0 + r * (k1 | 1))) & MASK
    return ((h ^ (h >> 16)) * MIX_1) & MASK


def rounds_for(n: int) -> int:
    """Return the number of rounds of the grid permutation; 0 if n is small (Fisher-Yates)."""
    if n <= SMALL:
        return 0
    # A plain loop, because torch.compile of torch 2.6 cannot trace `next` of a generator.
    for start, rounds in reversed(ROUNDS_FROM):
        if n >= start:
            return rounds
    return MAX_ROUNDS


def grid_of(n: int) -> Grid:
    """Return the grid of ``1 <= n < 2**62`` cells; both sides are then below 2**31."""
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    return Grid(a, b, n - (a - 1) * b)


def grids_of(xp: Any, n: Any) -> Grid:
    """`grid_of` for an int64 array ``n`` in the array namespace ``xp``."""
    m = n - 1
    # The floating-point root may be off by one; integer arithmetic corrects it.
    root = xp.astype(xp.sqrt(xp.astype(m, xp.float64)), xp.int64)
    root = root - xp.astype(root * root > m, xp.int64)
    root = root + xp.astype((root + 1) * (root + 1) <= m, xp.int64)
    a = root + 1
    b = (n + a - 1) // a
    return Grid(a, b, n - (a - 1) * b)


def _permute_small(xp: Any, x: Any, n: Any, key: tuple[Any, Any], largest: int) -> Any:
    """Fisher-Yates: for i = n-1 down to 1, swap i with a hashed j <= i."""
    for i in range(largest - 1, 0, -1):
        j = (keyed_hash(key, i, i) * (i + 1)) >> 32
        j = xp.where(i < n, j, i)
        x = xp.where(x == i, j, xp.where(x == j, i, x))
    return x


def _permute_grid(
    xp: Any, x: Any, n: Any, key: tuple[Any, Any], grid: Grid, min_rounds: int, max_rounds: int
) -> Any:
    """Permute ``x`` on the grid: ``min_rounds`` everywhere, further rounds where n needs them."""
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
            # (A list, because torch.compile of torch 2.6 cannot trace generators.)
            enough_from = min([start for start, rounds in ROUNDS_FROM if rounds <= r])
            moved = xp.where(n < enough_from, moved, row if r % 2 == 0 else col)
        if r % 2 == 0:
            row = moved
        else:
            col = moved
    x = row * b + col
    # Rotations alone reach only some parities, so a keyed coin may swap positions 0 and 1.
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
    """Permute positions ``0 <= x < n`` by keyed permutations of 0 .. n-1 without GPU-to-CPU sync.

    ``x``, ``n``, the arrays of ``key`` (from `derive_key`) and of ``grid`` (from `grids_of` for
    ``n``) are int64 arrays of the namespace ``xp`` and must broadcast. The result is an int64
    array on the device of ``x``. ``smallest`` and ``largest`` are bounds of ``n``; they only
    serve to skip rounds that are not needed, and do not change the result.
    """
    x = xp.broadcast_arrays(x, n)[0]
    if largest <= SMALL:
        return _permute_small(xp, x, n, key, largest)
    min_rounds, max_rounds = rounds_for(largest), rounds_for(max(smallest, SMALL + 1))
    image = _permute_grid(xp, x, n, key, grid, min_rounds, max_rounds)
    if smallest > SMALL:
        return image
    return xp.where(n <= SMALL, _permute_small(xp, x, n, key, SMALL), image)


def permute_all(xp: Any, x: Any, n: int, key: tuple[Any, Any]) -> Any:
    """Permute positions ``x`` of 0 .. n-1; the words of ``key`` may be arrays, for one key each."""
    if n == 1:
        return x
    # Broadcast to x's shape, because the key is an array if the epoch is one.
    zero = x * 0
    grid = Grid(*(zero + side for side in grid_of(n)))
    return permute(xp, x, zero + n, (zero + key[0], zero + key[1]), grid, n, n)
