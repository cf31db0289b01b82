"""The search of `calibrate`: choose the next probe, fit the peaks, find the budget."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from gpusampler.batching.batch_sizes import batch_sizes_of
from gpusampler.batching.cost_budget import MAX_BATCH_SIZE, CostBudget
from gpusampler.calibration.cost_model import Fit, FitForm, Floats, fit_peaks, residuals
from gpusampler.calibration.memory_meter import Meter, Probe
from gpusampler.core import devices, log
from gpusampler.core.arrays import Int64
from gpusampler.core.text import format_bytes
from gpusampler.plan.epoch_plan import EpochPlan

MIN_MEASURABLE_SIZES = 4
"""Number of sizes per patch whose peaks must be large enough to measure."""

MIN_PEAK_RATIO = 3.0
"""Minimum ratio of the largest to the smallest of these peaks, else the fixed part dominates."""

MAX_GROWTH = 16
"""Largest factor between sizes while peaks are too small to measure; afterwards sizes double."""

PROBE_SAMPLES = 4096
"""Small patches may be oversampled up to this many samples while peaks are too small to measure."""

MAX_PROBE_SAMPLES = 1 << 20
"""Maximum number of samples of a probe."""

MAX_RESIDUAL = 0.15
"""Relative error of a peak above which the cost does not predict the memory of the step."""

MAX_BUDGETS = 12
"""Number of budgets to try before calibration fails."""

SEQUENCE_LENGTH = 12
"""Number of batches in a row per budget: they show most of the freed memory that malloc keeps."""

MAX_REFITS = 2
"""Maximum number of refits; each follows a most expensive batch off by over `MAX_RESIDUAL`."""


class Measurement(NamedTuple):
    """A probe (None if out of memory), with the group and cost of its patch and its batch size."""

    group: int
    cost: float
    size: int
    probe: Probe | None


class Search:
    """The measurements so far, the fit, and the choice of the next probe."""

    def __init__(
        self,
        meter: Meter,
        plan: EpochPlan,
        costs: Floats,
        bounds: CostBudget,
        share: float,
        fit: str,
    ) -> None:
        self._meter, self._plan, self._costs = meter, plan, costs
        self._bounds, self._share, self._fit_choice = bounds, share, fit
        self.fit = Fit(0.0, 0.0)
        self.measurements: list[Measurement] = []
        self.verified: list[tuple[Measurement, float]] = []
        """Most expensive batch of each budget, with its predicted bytes."""
        self.sequence_peaks: list[int | None] = []
        """Peak of batches in a row, for each budget whose most expensive batch fits."""
        self.sizes: Int64 = np.zeros(costs.size, np.int64)
        unbounded = np.full(costs.size, MAX_BATCH_SIZE, np.int64)
        allowed = replace(bounds, max_cost=float(MAX_BATCH_SIZE)).sizes_for(np.ones(1))[0]
        self._useful_sizes = bounds.sizes_of_use(
            np.minimum(unbounded, allowed), plan.groups.counts, plan.partial
        )
        self._min_size = int(bounds.sizes_of_use(unbounded[:1], np.ones(1, np.int64), "keep")[0])

    @property
    def usable_memory(self) -> float:
        """Bytes that a batch and the memory in use may take together."""
        return self._share * self._meter.limit

    def run_probes(self) -> None:
        """Measure a few patches at doubling sizes."""
        cheapest, most_expensive = int(np.argmin(self._costs)), int(np.argmax(self._costs))
        # The geometric mean, because the fit minimizes relative errors.
        mean_cost = math.sqrt(self._costs[cheapest] * self._costs[most_expensive])
        middle = int(np.argmin(np.abs(self._costs - mean_cost)))
        first_cost = 0.0
        for group in dict.fromkeys((cheapest, middle, most_expensive)):
            measurable_cost = self._probe_patch(group, first_cost)
            # The next patch is measurable from about the same cost of a batch.
            first_cost = first_cost or measurable_cost
        if not self._succeeded():
            raise RuntimeError(
                f"step ran out of memory in all {len(self.measurements)} probes, even with "
                f"batch size {self._min_size}: free memory, raise memory_limit (now "
                f"{format_bytes(self._meter.limit)}), or lower min_batch_size or multiple_of"
            )

    def _probe_patch(self, group: int, first_cost: float) -> float:
        """Measure one patch; return the cost of its smallest batch with a measurable peak, or 0."""
        cost = float(self._costs[group])
        max_size = min(max(int(self._useful_sizes[group]), PROBE_SAMPLES), MAX_PROBE_SAMPLES)
        size = max(self._round_down(min(first_cost / cost, max_size)), self._min_size)
        succeeded: list[Measurement] = []
        measurable: list[Measurement] = []
        failed_size = MAX_BATCH_SIZE
        while size <= max_size and size < failed_size and self._fits(group, size, succeeded):
            measurement = self._measure(group, size)
            if measurement.probe is None:
                # Try half the size, unless a size at least as large has already succeeded.
                failed_size, size = size, self._round_down(size / 2)
                if size < self._min_size or (succeeded and size <= succeeded[-1].size):
                    break
                continue
            succeeded.append(measurement)
            peak = measurement.probe.peak
            factor = 2.0
            if peak >= self._meter.min_measurable:
                measurable.append(measurement)
                has_sizes = len(measurable) >= MIN_MEASURABLE_SIZES
                if has_sizes and peak >= MIN_PEAK_RATIO * _peak(measurable[0]):
                    break
            else:
                factor = min(max(self._meter.min_measurable / peak, 2.0), MAX_GROWTH)
            size = self._grow(size, factor)
        return measurable[0].cost * measurable[0].size if measurable else 0.0

    def _fits(self, group: int, size: int, succeeded: list[Measurement]) -> bool:
        """Whether the measurements so far predict that a batch fits; True with too few of them."""
        if len(succeeded) >= 2:
            first, last = succeeded[-2:]
            slope = max(_peak(last) - _peak(first), 0) / (last.size - first.size)
            peak = _peak(last) + slope * (size - last.size)
        elif len(self._succeeded()) >= 3:
            peak = float(self._choose_fit()[0].predict(self._costs[group], size))
        else:
            return True
        return peak + self._baseline() <= self.usable_memory

    def _measure(self, group: int, size: int) -> Measurement:
        probe = self._meter.measure(group, size)
        self.measurements.append(Measurement(group, float(self._costs[group]), size, probe))
        return self.measurements[-1]

    def _succeeded(self) -> list[Measurement]:
        return [measurement for measurement in self.measurements if measurement.probe is not None]

    def _measurable(self) -> list[Measurement]:
        return [m for m in self._succeeded() if _peak(m) >= self._meter.min_measurable]

    def _baseline(self) -> int:
        return max((m.probe.baseline for m in self._succeeded() if m.probe), default=0)

    def _fitted(self) -> list[Measurement]:
        """Return the measurements to fit: the measurable ones if they suffice, else all."""
        measurable = self._measurable()
        return measurable if len({m.cost * m.size for m in measurable}) >= 3 else self._succeeded()

    def _choose_fit(self) -> tuple[Fit, FitForm]:
        fitted = self._fitted()
        arrays = _arrays_of(fitted)
        proportional = fit_peaks(*arrays)
        # With as few measurements as terms, any form would fit exactly.
        if self._fit_choice == "proportional" or (self._fit_choice == "auto" and len(fitted) < 8):
            return proportional, "proportional"
        affine = fit_peaks(*arrays, "affine")
        residual = _worst_residual(proportional, fitted)
        if self._fit_choice == "affine" or (
            residual > MAX_RESIDUAL and _worst_residual(affine, fitted) < residual / 2
        ):
            return affine, "affine"
        return proportional, "proportional"

    def find_budget(self) -> CostBudget:
        """Return the budget of the fit, reduced until its most expensive batches fit."""
        refits = 0
        shrink = 1.0
        self.fit, self.fit_form = self._choose_fit()
        for _ in range(MAX_BUDGETS):
            costs, max_cost = self._budget_costs()
            budget = replace(
                self._bounds,
                max_cost=max_cost * shrink,
                cost=dict(zip(self._plan.groups.labels.tolist(), costs.tolist(), strict=True)),
            )
            self.sizes = self._batch_sizes(budget)
            predicted = np.where(self.sizes > 0, self.fit.predict(self._costs, self.sizes), 0)
            group = int(np.argmax(predicted))
            size = int(self.sizes[group])
            measurement = self._measure(group, size)
            self.verified.append((measurement, float(predicted[group])))
            if measurement.probe is None:
                shrink = size * float(costs[group]) / max_cost / 2
                continue
            baseline, peak = measurement.probe
            excess = baseline + peak - self.usable_memory
            if abs(predicted[group] / peak - 1) > MAX_RESIDUAL and refits < MAX_REFITS:
                # The measured most expensive batch improves the fit.
                refits += 1
                self.fit, self.fit_form = self._choose_fit()
                continue
            if excess <= 0:
                sequence_peak = self._measure_sequence(group)
                if sequence_peak is not None and sequence_peak <= self.usable_memory:
                    return budget
                factor = 0.5 if sequence_peak is None else self._shrink_factor(sequence_peak)
                shrink = min(float((self.sizes * costs).max()) / max_cost, shrink) * factor
                continue
            # Interpolate between the per-batch bytes and the peak; remove at least one sample.
            per_batch = min(float(self.fit.bytes_per_batch(self._costs[group])), peak - 1.0)
            factor = max(peak - excess - per_batch, 0.0) / (peak - per_batch)
            shrink = min(size * factor, math.nextafter(size, 0)) * float(costs[group]) / max_cost
        raise RuntimeError(
            f"none of the {MAX_BUDGETS} budgets tried fits share={self._share:g} of memory_limit="
            f"{format_bytes(self._meter.limit)}: cost does not predict the memory of step. Pass "
            "costs proportional to the memory of a sample."
        )

    def _measure_sequence(self, most_expensive: int) -> int | None:
        """Measure batches in a row: of the most expensive group, then of random groups."""
        drawn = np.random.default_rng(0).choice(np.flatnonzero(self.sizes), SEQUENCE_LENGTH - 1)
        groups = [most_expensive, *drawn.tolist()]
        peak = self._meter.measure_sequence([(group, int(self.sizes[group])) for group in groups])
        self.sequence_peaks.append(peak)
        return peak

    def _shrink_factor(self, sequence_peak: int) -> float:
        """Return the factor for a budget whose batches in a row reached this peak."""
        baseline = self._baseline()
        return 0.98 * max(self.usable_memory - baseline, 0.0) / max(sequence_peak - baseline, 1)

    def _budget_costs(self) -> tuple[Floats, float]:
        """Return the budget's cost of a sample of each patch, and its ``max_cost``."""
        baseline = self._baseline()
        available_bytes = self.usable_memory - baseline
        growing_bytes = available_bytes - self.fit.fixed
        if not growing_bytes > 0:
            raise ValueError(
                f"too little memory: {format_bytes(baseline)} is in use and even the smallest "
                f"batch needs {format_bytes(int(self.fit.fixed))}, but only "
                f"{format_bytes(int(self.usable_memory))} may be used (memory_limit="
                f"{format_bytes(self._meter.limit)} * share={self._share:g}). Free memory, or "
                "raise memory_limit or share."
            )
        if self.fit_form == "proportional":
            return self._costs, growing_bytes / self.fit.per_cost
        # Spread the per-batch bytes of a patch over as many of its samples as fit.
        sample_bytes = available_bytes - self.fit.bytes_per_batch(self._costs)
        per_sample = self.fit.bytes_per_sample(self._costs)
        spread = per_sample * growing_bytes / np.maximum(sample_bytes, per_sample)
        return np.where(sample_bytes > per_sample, spread, 2 * growing_bytes), growing_bytes

    def _batch_sizes(self, budget: CostBudget) -> Int64:
        try:
            return batch_sizes_of(budget, self._plan.groups, self._plan.partial).sizes
        except ValueError as error:
            # The last sentence advises to change max_cost, which is not an argument of calibrate.
            cause = str(error).rsplit(". ", 1)[0]
            advice = ", or pass over_budget='skip'" if budget.over_budget == "error" else ""
            raise ValueError(
                f"share={self._share:g} of memory_limit={format_bytes(self._meter.limit)} is too "
                f"small: {cause}. Raise memory_limit or share{advice}."
            ) from error

    def worst_residual(self) -> float:
        """Return the largest relative error of the fit at a measurable peak."""
        return _worst_residual(self.fit, self._measurable())

    def warn_if_inaccurate(self) -> None:
        """Warn if the cost does not predict the measured peaks."""
        residual = self.worst_residual()
        if residual <= MAX_RESIDUAL:
            return
        advice = "pass costs proportional to the memory of a sample"
        if self._fit_choice == "proportional":
            fitted = self._fitted()
            affine_residual = _worst_residual(fit_peaks(*_arrays_of(fitted), "affine"), fitted)
            if affine_residual < residual / 2:
                advice = f"pass fit='affine', which is off by at most {affine_residual:.0%}"
        log.warn(
            f"cost does not predict the memory of step: the fit is off by {residual:.0%} of a "
            f"measured peak; {advice}"
        )

    def record(self, device: str) -> dict[str, Any]:
        """Return all measurements as plain values."""
        labels = self._plan.groups.labels.tolist()
        median = np.argsort(self._costs, kind="stable")[self._costs.size // 2]
        groups = dict.fromkeys(
            (int(np.argmin(self._costs)), int(median), int(np.argmax(self._costs)))
        )
        fitted = {id(measurement) for measurement in self._fitted()}
        verified = {id(measurement) for measurement, _ in self.verified}

        def to_dict(measurement: Measurement, predicted: float) -> dict[str, Any]:
            probe = measurement.probe
            return {
                "patch_id": labels[measurement.group],
                "cost": measurement.cost,
                "batch_size": measurement.size,
                "held": None if probe is None else probe.baseline,
                "peak": None if probe is None else probe.peak,
                "predicted": predicted,
            }

        return {
            **self.fit._asdict(),
            "fit": self.fit_form,
            "held": self._baseline(),
            "memory_limit": int(self._meter.limit),
            "share": self._share,
            "device": device,
            "worst_residual": self.worst_residual(),
            "points": [
                {**to_dict(m, float(self.fit.predict(m.cost, m.size))), "fitted": id(m) in fitted}
                for m in self.measurements
                if id(m) not in verified
            ],
            "verified": [to_dict(*measurement) for measurement in self.verified],
            "walks": list(self.sequence_peaks),
            "sizes": [
                {
                    "patch_id": labels[group],
                    "cost": float(self._costs[group]),
                    "batch_size": int(self.sizes[group]),
                    "samples": int(self._plan.groups.counts[group]),
                }
                for group in groups
            ],
            "versions": _versions(),
        }

    def _round_down(self, size: float) -> int:
        """Return the largest allowed size up to ``size``; 0 if there is none."""
        if size < 1:
            return 0
        return int(replace(self._bounds, max_cost=float(size)).sizes_for(np.ones(1))[0])

    def _grow(self, size: int, factor: float) -> int:
        """Return an allowed size about ``factor`` times as large, else `MAX_BATCH_SIZE`."""
        larger = self._round_down(size * factor)
        return larger if larger > size else MAX_BATCH_SIZE


def _peak(measurement: Measurement) -> int:
    assert measurement.probe is not None
    return measurement.probe.peak


def _worst_residual(fit: Fit, measurements: Sequence[Measurement]) -> float:
    """Return the largest relative error of a fit."""
    return float(np.abs(residuals(fit, *_arrays_of(measurements))).max(initial=0.0))


def _arrays_of(measurements: Sequence[Measurement]) -> tuple[Floats, Floats, Floats]:
    """Return costs, sizes and peaks."""
    return (
        np.array([m.cost for m in measurements], np.float64),
        np.array([m.size for m in measurements], np.float64),
        np.array([_peak(m) for m in measurements], np.float64),
    )


def _versions() -> dict[str, str]:
    versions = {
        # Importing the package here would be circular; it is already loaded.
        "gpusampler": str(getattr(sys.modules.get("gpusampler"), "__version__", "unknown")),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.platform(),
    }
    for name in ("torch", "cupy"):
        module = devices.loaded_module(name)
        if module is not None:
            versions[name] = str(module.__version__)
    return versions
