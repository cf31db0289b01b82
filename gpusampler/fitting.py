"""A line through measured peaks: bytes = fixed + batch size * (per_sample + per_cost * cost)."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Fit(NamedTuple):
    """What a batch takes above what is held.

    Attributes
    ----------
    fixed : float
        Bytes of any batch, >= 0.
    per_cost : float
        Bytes a unit of cost, > 0.
    per_sample : float
        Bytes a sample, whatever it costs, >= 0.
    """

    fixed: float
    per_cost: float
    per_sample: float = 0.0

    def predict(self, costs: Floats | float, sizes: Floats | float) -> Floats:
        """Return bytes of batches of ``sizes`` samples that cost ``costs`` each."""
        each = np.asarray(costs, np.float64) * self.per_cost + self.per_sample
        return self.fixed + each * np.asarray(sizes, np.float64)


def fit_peaks(costs: Floats, sizes: Floats, peaks: Floats, per_sample: bool = False) -> Fit:
    """Return the line that is off by the least share of each peak (least squares).

    Parameters
    ----------
    costs, sizes, peaks : float64 array, shape (n,)
        Of each probe: the cost of a sample, the samples, the bytes; all > 0.
    per_sample : bool
        Whether a sample may take some bytes that do not go with its cost.

    Returns
    -------
    Fit

    Examples
    --------
    >>> costs, sizes = np.array([10.0, 10, 40]), np.array([1.0, 8, 8])
    >>> fit = fit_peaks(costs, sizes, 500 + 3 * costs * sizes)
    >>> [round(value, 3) for value in fit]
    [500.0, 3.0, 0.0]
    """
    columns = np.stack([costs * sizes, np.ones_like(sizes), sizes], axis=1) / peaks[:, None]
    # Scaled, so that bytes and costs of any unit are solved for alike.
    scales = np.abs(columns).max(axis=0)
    best, least = None, np.inf
    free = (1, 2) if per_sample else (1,)
    # Coefficients must not be negative: of so few, every choice of those above zero is tried.
    for count in range(len(free) + 1):
        for others in combinations(free, count):
            chosen = [0, *others]
            scaled = columns[:, chosen] / scales[chosen]
            found, _, rank, _ = np.linalg.lstsq(scaled, np.ones_like(peaks), rcond=1e-9)
            off = float(np.square(scaled @ found - 1).sum())
            if rank == len(chosen) and found[0] > 0 and found.min() >= 0 and off < least * 0.999:
                best, least = dict(zip(chosen, found / scales[chosen], strict=True)), off
    if best is None:
        raise ValueError("peaks must be > 0 and finite to be fitted")
    return Fit(*(float(best.get(place, 0.0)) for place in (1, 0, 2)))


def residuals(fit: Fit, costs: Floats, sizes: Floats, peaks: Floats) -> Floats:
    """Return by which share of each peak a fit is off: predicted / measured - 1."""
    return np.asarray(fit.predict(costs, sizes) / peaks - 1)
