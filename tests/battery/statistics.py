"""From counts to p-values, and from p-values to a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

ALPHA = 1e-3
"""Chance that a whole run of the battery fails a perfect permutation."""


class Result(NamedTuple):
    """Outcome of one test.

    Attributes
    ----------
    test : str
        Kind of test, and what tells it from others of its kind.
    n : int
        Size of the permutation.
    samples : int
        Permutations (or pairs of them) looked at.
    p : float
        Two-sided: a fit that is too good counts too.
    z : float
        Distance from expectation in standard deviations of the statistic.
    """

    test: str
    n: int
    samples: int
    p: float
    z: float

    @property
    def kind(self) -> str:
        return self.test.partition(":")[0]


def chi_squared(test: str, n: int, counts: np.ndarray, chances: np.ndarray) -> Result:
    """Pearson's test of counts against chances; cells of chance 0 must be empty."""
    counts, chances = counts.ravel(), chances.ravel()
    samples = int(counts.sum())
    possible = chances > 0
    if counts[~possible].any():
        return Result(test, n, samples, 0.0, np.inf)
    observed, expected = _merged(counts[possible], chances[possible] * samples)
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = observed.size - 1
    if freedom == 0:
        raise ValueError(f"{test} at n={n}: {samples} samples leave one cell, nothing to test")
    tails = stats.chi2.sf(statistic, freedom), stats.chi2.cdf(statistic, freedom)
    z = (statistic - freedom) / (2 * freedom) ** 0.5
    return Result(test, n, samples, min(1.0, 2 * float(min(tails))), z)


def _merged(
    counts: np.ndarray, expected: np.ndarray, least: float = 5.0
) -> tuple[np.ndarray, np.ndarray]:
    """Pool cells that expect too little for the chi-squared distribution to hold."""
    rare = expected < least
    if not rare.any():
        return counts, expected
    pool, share = counts[rare].sum(), expected[rare].sum()
    counts, expected = counts[~rare], expected[~rare]
    if share >= least or counts.size == 0:
        return np.append(counts, pool), np.append(expected, share)
    counts, expected = counts.copy(), expected.copy()
    lowest = expected.argmin()
    counts[lowest] += pool
    expected[lowest] += share
    return counts, expected


def normal(test: str, n: int, samples: int, z: float) -> Result:
    """Test of a sum of many independent terms."""
    return Result(test, n, samples, 2 * float(stats.norm.sf(abs(z))), float(z))


def mean(test: str, n: int, values: np.ndarray, expected: float, variance: float) -> Result:
    """Mean of independent values of known variance."""
    z = (values.mean() - expected) / (variance / values.size) ** 0.5
    return normal(test, n, values.size, z)


def mean_estimated(test: str, n: int, values: np.ndarray, expected: float) -> Result:
    """Mean of independent values whose variance is taken from themselves."""
    spread = float(values.std(ddof=1))
    off = float(values.mean()) - expected
    if spread == 0.0:
        same = abs(off) < 1e-9
        return Result(test, n, values.size, float(same), 0.0 if same else np.inf)
    return normal(test, n, values.size, off / spread * values.size**0.5)


def variance(test: str, n: int, values: np.ndarray, expected: float) -> Result:
    """Variance of independent values, its own error taken from their fourth moment."""
    squares = (values - values.mean()) ** 2
    return mean_estimated(test, n, squares, expected * (1 - 1 / values.size))


def coin(test: str, n: int, heads: int, samples: int) -> Result:
    """Exact test of a fair coin."""
    p = float(stats.binomtest(heads, samples).pvalue)
    return Result(test, n, samples, p, (2 * heads - samples) / samples**0.5)


def rare_events(test: str, n: int, samples: int, seen: int, expected: float) -> Result:
    """Poisson test of a number of events; none is no surprise where few are expected."""
    law = stats.poisson(expected)
    p = min(1.0, 2 * float(min(law.sf(seen - 1), law.cdf(seen))))
    return Result(test, n, samples, p, (seen - expected) / expected**0.5)


def bound(results: Sequence[Result]) -> float:
    """Bonferroni's bound for one p-value of a run."""
    return ALPHA / len(results)


def failures(results: Sequence[Result], limit: float) -> list[Result]:
    return [result for result in results if not result.p >= limit]
