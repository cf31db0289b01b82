"""The one exact test: every n elements go to n different places."""

from __future__ import annotations

import numpy as np

from gpusampler.permutation.host import permute_ranges
from gpusampler.permutation.reference import derive_key

from .subjects import Subject
from .walks import Keys

SMALL_SIZES = range(1, 4097)


def exhaustive(seed: int, sizes: range = SMALL_SIZES) -> list[int]:
    """Sizes at which the permutation is no bijection; one group a size, as a plan calls it."""

    n = np.array(sizes, np.int64)
    ends = np.cumsum(n)
    bad = []
    # A few million positions at a time.
    for part in np.split(np.arange(n.size), np.searchsorted(ends, np.arange(1, 5) * 2_000_000)):
        if not part.size:
            continue
        size, base = n[part], np.cumsum(n[part]) - n[part]
        key = derive_key(seed, 3, 0, part)
        zero = np.zeros_like(size)
        samples = permute_ranges(zero, size, size, key, zero, None)
        # Each row's places are put where that row's n begin: a bijection fills every one once.
        lane_row = np.repeat(np.arange(size.size), size)
        inside = samples < size[lane_row]
        filled = np.bincount((samples + base[lane_row])[inside], minlength=int(size.sum()))
        holes = np.add.reduceat(filled != 1, base)
        bad += size[holes > 0].tolist()
    return bad


def large_sizes(most: int) -> list[int]:
    """Around squares, around k(k+1), and around powers of two, from 4096 up to ``most``."""
    sides = {1 << k for k in range(6, 12)} | {65, 99, 255, 257, 500, 1000, 2047, 2999, 3162}
    corners = {side * side for side in sides} | {side * (side + 1) for side in sides}
    corners |= {1 << k for k in range(12, 24)} | {65536, 10**6, most}
    around = {corner + step for corner in corners for step in (-1, 0, 1)}
    return sorted(n for n in around if 4096 < n <= most)


def is_bijection(subject: Subject, n: int, seed: int) -> bool:
    """Whether one whole permutation hits every place once."""
    images = subject.whole(n, Keys(seed, 3, 0, 0))[0]
    if images.min() < 0 or images.max() >= n:
        return False
    hit = np.zeros(n, np.bool_)
    hit[images] = True
    return bool(hit.all())
