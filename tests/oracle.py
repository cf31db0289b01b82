"""The permutation and the plan, transcribed from DESIGN.md into Python integers.

Written from the text alone and sharing nothing with the package: no array library, no import of
``gpusampler``. It is what the golden vectors are made from, so that a slip in the package cannot
pin itself.
"""

from __future__ import annotations

from itertools import pairwise
from math import isqrt
from typing import NamedTuple

WORD = 0xFFFFFFFF
ORDER_OF_BATCHES, ORDER_OF_PATCHES, INSIDE_A_PATCH = 1, 2, 3

Key = tuple[int, int]


def mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x21F0AAAD & WORD
    h ^= h >> 15
    h = h * 0x735A2D97 & WORD
    return h ^ h >> 15


def keyed(r: int, v: int, key: Key) -> int:
    k0, k1 = key
    return mix((v * 0x2C1B3C6D & WORD) ^ ((k0 + r * (k1 | 1)) & WORD))


def absorb(state: Key, w: int) -> Key:
    s0, s1 = state
    s0 = mix(s0 ^ w)
    s1 = mix(((s1 + s0) & WORD) ^ (w * 0x2C1B3C6D & WORD))
    return s0, s1


def derive(seed: int, purpose: int, pass_: int, group: int) -> Key:
    state = (0x243F6A88, 0x85A308D3)
    for w in (
        seed & WORD,
        seed >> 32,
        purpose,
        pass_ & WORD,
        pass_ >> 32,
        group & WORD,
        group >> 32,
    ):
        state = absorb(state, w)
    return state


def rounds(n: int) -> int:
    if n < 1024:
        return 12
    return 8 if n < 65536 else 6


def fisher_yates(x: int, n: int, key: Key) -> int:
    for i in range(n - 1, 0, -1):
        j = keyed(i, i, key) * (i + 1) >> 32
        if x == i:
            x = j
        elif x == j:
            x = i
    return x


def sheared(x: int, n: int, key: Key) -> int:
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    rem = n - (a - 1) * b
    row, column = divmod(x, b)
    for r in range(rounds(n)):
        if r % 2 == 0:
            h = a - (column >= rem)
            row = (row + (keyed(r, column, key) * h >> 32)) % h
        else:
            w = rem if row == a - 1 else b
            column = (column + (keyed(r, row, key) * w >> 32)) % w
    x = row * b + column
    if x < 2 and keyed(63, 0, key) >> 31:
        x ^= 1
    return x


def permuted(x: int, n: int, key: Key) -> int:
    """Image of position x under the permutation of 0 .. n-1 that the key names."""
    return fisher_yates(x, n, key) if n <= 32 else sheared(x, n, key)


class Settings(NamedTuple):
    """What an epoch depends on besides the seed, the epoch and the patches."""

    batch_size: int
    partial: str = "keep"
    interleave: bool = True
    shuffle_patches: bool = True
    shuffle_within_batches: bool = True


def epoch(ids: list[int], seed: int, epoch: int, settings: Settings) -> list[tuple[int, list[int]]]:
    """All batches of one epoch in order, each as (patch id, samples).

    Settings are those of the public constructor; one batch size for all patches.
    """
    size = settings.batch_size
    patch_ids = sorted(set(ids))
    members = [[i for i, p in enumerate(ids) if p == patch] for patch in patch_ids]
    places = [batches_of(len(m), size, settings.partial) for m in members]

    if settings.interleave:
        natural = [(g, place) for g in range(len(patch_ids)) for place in places[g]]
        key = derive(seed, ORDER_OF_BATCHES, epoch, 0)
        total = len(natural)
        order = [
            natural[permuted(slot, total, key) if settings.shuffle_patches else slot]
            for slot in range(total)
        ]
    else:
        key = derive(seed, ORDER_OF_PATCHES, epoch, 0)
        count = len(patch_ids)
        patches = [
            permuted(place, count, key) if settings.shuffle_patches else place
            for place in range(count)
        ]
        order = [(g, place) for g in patches for place in places[g]]

    out = []
    for g, positions in order:
        n = len(members[g])
        key = derive(seed, INSIDE_A_PATCH, epoch, g)
        inside = [p % n for p in positions]
        if settings.shuffle_within_batches:
            inside = [permuted(p, n, key) for p in inside]
        out.append((patch_ids[g], [members[g][i] for i in inside]))
    return out


def batches_of(n: int, size: int, partial: str) -> list[range]:
    """Positions that each batch of a patch of n samples covers; past n they start again."""
    edges = list(range(0, n, size))
    if partial == "drop":
        return [range(p, p + size) for p in edges if p + size <= n]
    if partial == "pad":
        return [range(p, p + size) for p in edges]
    return [range(p, q) for p, q in pairwise([*edges, n])]
