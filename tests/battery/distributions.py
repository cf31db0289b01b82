"""What a uniformly random permutation of n elements does, exactly."""

from __future__ import annotations

from functools import cache
from math import comb, factorial

import numpy as np

from gpusampler.permutation.reference import Grid, grid_of


@cache
def derangements(n: int) -> int:
    """Permutations of n elements without a fixed point."""
    before, now = 0, 1
    for k in range(1, n + 1):
        before, now = now, (k - 1) * (now + before)
    return now


def _with_tail(ways: list[int], n: int) -> np.ndarray:
    total = factorial(n)
    return np.array([way / total for way in [*ways, total - sum(ways)]])


def fixed_points(n: int, most: int) -> np.ndarray:
    """Chances of 0, 1, .. most-1 fixed points, and of ``most`` or more."""
    return _with_tail([comb(n, k) * derangements(n - k) for k in range(most)], n)


def successions(n: int, most: int) -> np.ndarray:
    """Chances of 0, 1, .. most-1 (and more) places i with image(i+1) = image(i) + 1.

    Riordan, Introduction to Combinatorial Analysis, chapter 8: C(n-1, k) (D_{n-k} + D_{n-k-1}).
    """
    ways = [comb(n - 1, k) * (derangements(n - k) + derangements(n - k - 1)) for k in range(most)]
    return _with_tail(ways, n)


def footrule(n: int) -> tuple[float, float]:
    """Mean and variance of the summed absolute displacement (Diaconis and Graham 1977)."""
    return (n * n - 1) / 3, (n + 1) * (2 * n * n + 7) / 45


def rank_product(n: int) -> tuple[float, float]:
    """Mean and variance of the sum of x * image(x), on which Spearman's rho rests."""
    spread = n * (n * n - 1) / 12
    return n * ((n - 1) / 2) ** 2, spread**2 / (n - 1)


def line_mates(n: int) -> tuple[float, float]:
    """Chances that two distinct cells of the grid share a row, and a column."""
    a, b, rem = grid_of(n)
    rows = (a - 1) * b * (b - 1) + rem * (rem - 1)
    columns = rem * a * (a - 1) + (b - rem) * (a - 1) * (a - 2)
    return rows / (n * (n - 1)), columns / (n * (n - 1))


def blocks(n: int, count: int) -> np.ndarray:
    """Elements in each of ``count`` blocks x * count // n."""
    edges = -(-np.arange(count + 1, dtype=np.int64) * n // count)
    return np.diff(edges)


def ordered_pairs(n: int, count: int) -> np.ndarray:
    """Chance that two distinct elements lie in blocks (i, j): shape (count, count)."""
    sizes = blocks(n, count)
    ways = np.multiply.outer(sizes, sizes) - np.diag(sizes)
    return ways / (n * (n - 1))


BLOCKS = 8


def line_cells(grid: Grid, row_step: np.ndarray, column_step: np.ndarray) -> np.ndarray:
    """Cell of a pair of images by their cyclic distance in rows and in columns.

    A pair that shares a row is told apart by its distance along it, a pair that shares a column
    likewise; all others fall into 8 x 8 blocks. Rotations of rows and columns move whole lines, so
    what too few of them leave behind is seen here first, in few cells at any n.
    """
    a, b, _ = grid
    rest = a + b + row_step * BLOCKS // a * BLOCKS + column_step * BLOCKS // b
    return np.where(row_step == 0, column_step, np.where(column_step == 0, b + row_step, rest))


def line_chances(n: int) -> np.ndarray:
    """Chance of each of `line_cells` for two distinct random cells."""
    grid = grid_of(n)
    a, b, rem = grid
    cells = np.ones((a, b))
    cells[-1, rem:] = 0
    spectrum = np.fft.rfft2(cells)
    # Cells that lie (row step, column step) apart: the cyclic autocorrelation of the ragged grid.
    ways = np.rint(np.fft.irfft2(np.abs(spectrum) ** 2, s=(a, b)))
    ways[0, 0] = 0
    row_step, column_step = np.indices((a, b))
    labels = line_cells(grid, row_step, column_step)
    size = a + b + BLOCKS * BLOCKS
    return np.bincount(labels.ravel(), ways.ravel(), minlength=size) / (n * (n - 1))
