"""What the battery calls chance, against all permutations of a few elements, one by one."""

from __future__ import annotations

from itertools import permutations
from math import factorial

import numpy as np
import pytest

from gpusampler.permutation.reference import grid_of

from . import distributions, single, statistics


def everything(n: int) -> np.ndarray:
    return np.array(list(permutations(range(n))))


def shares(values: np.ndarray, most: int) -> np.ndarray:
    return np.bincount(np.minimum(values, most), minlength=most + 1) / values.size


@pytest.mark.parametrize("n", [5, 7])
@pytest.mark.parametrize("most", [2, 4])
def test_fixed_points_and_successions(n, most):
    images = everything(n)
    fixed = (images == np.arange(n)).sum(axis=1)
    after = (np.diff(images, axis=1) == 1).sum(axis=1)
    np.testing.assert_allclose(distributions.fixed_points(n, most), shares(fixed, most))
    np.testing.assert_allclose(distributions.successions(n, most), shares(after, most))


@pytest.mark.parametrize("n", [4, 7])
def test_footrule_and_rank_product(n):
    images = everything(n)
    moved = np.abs(images - np.arange(n)).sum(axis=1)
    product = images @ np.arange(n)
    assert distributions.footrule(n) == pytest.approx((moved.mean(), moved.var()))
    assert distributions.rank_product(n) == pytest.approx((product.mean(), product.var()))


@pytest.mark.parametrize("n", [17, 33, 64, 100, 257])
def test_pairs_of_cells(n):
    a, b, _ = grid = grid_of(n)
    u, v = (part.ravel() for part in np.meshgrid(np.arange(n), np.arange(n)))
    u, v = u[u != v], v[u != v]
    steps = (u // b - v // b) % a, (u % b - v % b) % b
    chances = distributions.line_chances(n)
    seen = np.bincount(distributions.line_cells(grid, *steps), minlength=chances.size)
    np.testing.assert_allclose(chances, seen / u.size, atol=1e-12)
    rows, columns = distributions.line_mates(n)
    assert rows == pytest.approx((u // b == v // b).mean())
    assert columns == pytest.approx((u % b == v % b).mean())
    for side in (7, 16):
        cell = np.bincount(u * side // n * side + v * side // n, minlength=side * side)
        expected = distributions.ordered_pairs(n, side).ravel()
        np.testing.assert_allclose(expected, cell / u.size, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_rank_and_cycles(n):
    images = everything(n)
    assert np.unique(single.rank(images)).tolist() == list(range(factorial(n)))
    found = single.cycles(images)
    for image, count in zip(images.tolist(), found.tolist(), strict=True):
        left, loops = set(range(n)), 0
        while left:
            loops += 1
            x = min(left)
            while x in left:
                left.remove(x)
                x = image[x]
        assert count == loops


def test_p_values_of_a_fair_source_are_uniform():
    rng = np.random.default_rng(7)
    chances = distributions.ordered_pairs(20, 8)
    p = [
        statistics.chi_squared("fair", 20, rng.multinomial(5000, chances.ravel()), chances).p
        for _ in range(2000)
    ]
    # 2000 p-values: a share of 0.1 has a standard deviation of 0.0067.
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.03)
    assert min(p) > 1e-3 / 2000


def test_a_fit_that_is_too_good_fails():
    counts = np.full(1000, 100)
    result = statistics.chi_squared("perfect", 5, counts, np.full(1000, 1e-3))
    assert result.p < 1e-12


def test_an_impossible_cell_fails():
    counts = np.array([[1, 100], [100, 0]])
    assert statistics.chi_squared("two", 2, counts, np.array([[0, 0.5], [0.5, 0]])).p == 0


def test_one_cell_is_no_test():
    with pytest.raises(ValueError, match="nothing to test"):
        statistics.chi_squared("none", 5, np.full(10, 1), np.full(10, 0.1))
