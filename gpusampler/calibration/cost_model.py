"""What a batch takes, fitted to measured peaks: what is fixed, and what grows with the batch."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Values = NDArray[np.float64] | NDArray[np.int64] | float
FitForm = Literal["proportional", "affine"]

MAX_ERROR_RATIO = 0.999
"""A term more has to make the sum of squares smaller than this much of what it was."""


class Fit(NamedTuple):
    """What a batch takes above what is held, in bytes.

    ``fixed + per_patch * cost + (per_sample + per_cost * cost) * batch_size``

    Attributes
    ----------
    fixed : float
        Of any batch, >= 0.
    per_cost : float
        A unit of cost of each sample, >= 0.
    per_sample : float
        A sample, whatever it costs, >= 0; 0 in a proportional fit.
    per_patch : float
        A unit of cost of the patch, once for all samples of a batch (a graph that they share),
        >= 0; 0 in a proportional fit.
    """

    fixed: float
    per_cost: float
    per_sample: float = 0.0
    per_patch: float = 0.0

    def bytes_per_batch(self, costs: Values) -> Floats:
        """Return the bytes of a batch of each patch that its size does not change."""
        return np.asarray(self.fixed + self.per_patch * np.asarray(costs, np.float64))

    def bytes_per_sample(self, costs: Values) -> Floats:
        """Return the bytes of a sample of each patch."""
        return np.asarray(self.per_sample + self.per_cost * np.asarray(costs, np.float64))

    def predict(self, costs: Values, sizes: Values) -> Floats:
        """Return the bytes of batches of ``sizes`` samples that cost ``costs`` each."""
        per_batch, per_sample = self.bytes_per_batch(costs), self.bytes_per_sample(costs)
        return np.asarray(per_batch + per_sample * np.asarray(sizes, np.float64))


def fit_peaks(costs: Floats, sizes: Floats, peaks: Floats, form: FitForm = "proportional") -> Fit:
    """Return the fit that is off by the least share of each peak, by least squares.

    Parameters
    ----------
    costs, sizes, peaks : float64 array, shape (n,)
        Of each probe: the cost of a sample, the samples, the bytes; all > 0.
    form : {"proportional", "affine"}
        What grows with the size goes with the cost alone (``fixed + per_cost * cost * size``), or
        all terms of `Fit` are taken that help.

    Returns
    -------
    Fit

    Examples
    --------
    >>> costs, sizes = np.array([10.0, 10, 40]), np.array([1.0, 8, 8])
    >>> fit = fit_peaks(costs, sizes, 500 + 3 * costs * sizes)
    >>> [round(value, 3) for value in fit]
    [500.0, 3.0, 0.0, 0.0]
    """
    # In the order of `Fit`.
    terms = np.stack([np.ones_like(costs), costs * sizes, sizes, costs], axis=1) / peaks[:, None]
    # Scaled, so that bytes and costs of any unit are solved for alike.
    scales = np.abs(terms).max(axis=0)
    terms = terms / scales
    best, min_error = np.zeros(4), np.inf
    # Nothing is below zero: of so few terms, every choice of those above it is tried.
    for count in range(1, 5 if form == "affine" else 3):
        for columns in combinations(range(4 if form == "affine" else 2), count):
            if not {1, 2} & set(columns):
                continue
            chosen = terms[:, columns]
            solution, _, rank, _ = np.linalg.lstsq(chosen, np.ones_like(peaks), rcond=1e-9)
            error = float(np.square(chosen @ solution - 1).sum())
            if rank == count and solution.min() > 0 and error < min_error * MAX_ERROR_RATIO:
                best, min_error = np.zeros(4), error
                best[list(columns)] = solution / scales[list(columns)]
    return Fit(*best.tolist())


def residuals(fit: Fit, costs: Floats, sizes: Floats, peaks: Floats) -> Floats:
    """Return by which share of each peak a fit is off: predicted / measured - 1."""
    return np.asarray(fit.predict(costs, sizes) / peaks - 1)
