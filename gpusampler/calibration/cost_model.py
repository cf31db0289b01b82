"""Memory model of a batch, fitted to measured peaks: a fixed part and parts that grow."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Values = NDArray[np.float64] | NDArray[np.int64] | float
FitForm = Literal["proportional", "affine"]

MAX_ERROR_RATIO = 0.999
"""A new best fit must reduce the sum of squares below this fraction of the previous best."""


class Fit(NamedTuple):
    """Bytes that a batch takes in addition to the memory in use before it; all terms are >= 0.

    ``fixed + per_patch * cost + (per_sample + per_cost * cost) * batch_size``

    ``cost`` is the cost of one sample. ``per_patch`` counts once per batch (a graph that its
    samples share), ``per_sample`` once per sample; both are 0 in a proportional fit.
    """

    fixed: float
    per_cost: float
    per_sample: float = 0.0
    per_patch: float = 0.0

    def bytes_per_batch(self, costs: Values) -> Floats:
        """Return the bytes of a batch of each patch that do not depend on its size."""
        return np.asarray(self.fixed + self.per_patch * np.asarray(costs, np.float64))

    def bytes_per_sample(self, costs: Values) -> Floats:
        """Return the bytes per sample of each patch."""
        return np.asarray(self.per_sample + self.per_cost * np.asarray(costs, np.float64))

    def predict(self, costs: Values, sizes: Values) -> Floats:
        """Return the bytes of batches with ``sizes`` samples of ``costs`` each."""
        per_batch, per_sample = self.bytes_per_batch(costs), self.bytes_per_sample(costs)
        return np.asarray(per_batch + per_sample * np.asarray(sizes, np.float64))


def fit_peaks(costs: Floats, sizes: Floats, peaks: Floats, form: FitForm = "proportional") -> Fit:
    """Fit peaks by least squares of relative errors, without negative terms.

    ``costs`` (of a sample), ``sizes`` and ``peaks`` (bytes) have shape (n,), one value per probe,
    all > 0. "proportional" uses ``fixed`` and ``per_cost``; "affine" every term that helps.
    """
    terms = np.stack([np.ones_like(costs), costs * sizes, sizes, costs], axis=1) / peaks[:, None]
    # Scaling makes the solution independent of the units of bytes and costs.
    scales = np.abs(terms).max(axis=0)
    terms = terms / scales
    best, min_error = np.zeros(4), np.inf
    # Non-negative least squares: with at most four terms, try every subset of positive terms.
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
    """Return the relative error of a fit at each peak: predicted / measured - 1."""
    return np.asarray(fit.predict(costs, sizes) / peaks - 1)
