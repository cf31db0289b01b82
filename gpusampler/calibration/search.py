"""What `calibrate` tries next, by what it has measured so far, and the budget that comes of it."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from gpusampler.batching.batch_sizes import sizes_of
from gpusampler.batching.cost_budget import LARGEST, CostBudget
from gpusampler.calibration.cost_model import Fit, FitForm, Floats, fit_peaks, residuals
from gpusampler.calibration.memory_meter import Meter, Probe
from gpusampler.core import devices, log
from gpusampler.core.arrays import Int64
from gpusampler.core.text import human
from gpusampler.plan.epoch_plan import EpochPlan

ENOUGH = 4
"""Sizes of a patch whose peaks are large enough to tell something."""

RISE = 3.0
"""The largest of them is so many times the smallest, or what is fixed would hide what grows."""

FASTEST = 16
"""Sizes grow by this at most, as long as peaks are too small to tell anything; then they double."""

SAMPLES = 4096
MOST_SAMPLES = 1 << 20
"""Patches of fewer samples than the first are gone through again, as long as peaks are small; of
none are more than the second taken."""

OFF = 0.15
"""By more than this share of a peak, the cost does not describe what the step takes."""

ROUNDS = 12
"""Budgets that are tried before calibration gives up."""

WALK = 12
"""Batches that are made in a row with a budget: most of what malloc holds on to shows by then."""

REFITS = 2
"""Times that a dearest batch which is off by more than `OFF` moves the line."""


class Point(NamedTuple):
    """One measurement: a group's place, its cost, the batch's size, and what it took."""

    group: int
    cost: float
    size: int
    probe: Probe | None


class Search:
    """What was measured so far, and what is tried next."""

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
        self._bounds, self._share, self._form = bounds, share, fit
        self.fit = Fit(0.0, 0.0)
        self.points: list[Point] = []
        self.verified: list[tuple[Point, float]] = []
        """What was tried of budgets, and what was predicted."""
        self.walks: list[int | None] = []
        """What batches in a row held at most, of each budget that its dearest batch fits."""
        self.sizes: Int64 = np.zeros(costs.size, np.int64)
        top = np.full(costs.size, LARGEST, np.int64)
        counts = plan.groups.counts
        allowed = replace(bounds, max_cost=float(LARGEST)).sizes_for(np.ones(1))[0]
        useful = bounds.sizes_of_use(np.minimum(top, allowed), counts, plan.partial)
        self._useful = useful
        self._least = int(bounds.sizes_of_use(top[:1], np.ones(1, np.int64), "keep")[0])

    @property
    def room(self) -> float:
        """Bytes that a batch may fill, with what is held."""
        return self._share * self._meter.limit

    def climb(self) -> None:
        """Measure a few patches at sizes that double."""
        cheapest, dearest = int(np.argmin(self._costs)), int(np.argmax(self._costs))
        # In the middle of what is to be fitted by shares: of the logarithms.
        between = math.sqrt(self._costs[cheapest] * self._costs[dearest])
        middle = int(np.argmin(np.abs(self._costs - between)))
        begin = 0.0
        for group in dict.fromkeys((cheapest, middle, dearest)):
            found = self._climb(group, begin)
            # Where one patch is first seen to take something, the next will be, too.
            begin = begin or found
        if not self._good():
            raise RuntimeError(
                f"step must fit into memory_limit={human(self._meter.limit)} with at least "
                f"one batch of {self._least}, got none that does: "
                f"{len(self.points)} probes, all out of memory"
            )

    def _climb(self, group: int, begin: float) -> float:
        """Measure one patch; return the cost of its smallest batch that tells something."""
        cost = float(self._costs[group])
        most = min(max(int(self._useful[group]), SAMPLES), MOST_SAMPLES)
        size = max(self._rounded(min(begin / cost, most)), self._least)
        own: list[Point] = []
        telling: list[Point] = []
        beyond = LARGEST
        while size <= most and size < beyond and self._fits(group, size, own):
            point = self._measure(group, size)
            if point.probe is None:
                # Half the way back, but not to where it has been.
                beyond, size = size, self._rounded(size / 2)
                if size < self._least or (own and size <= own[-1].size):
                    break
                continue
            own.append(point)
            peak = point.probe.peak
            factor = 2.0
            if peak >= self._meter.measurable:
                telling.append(point)
                if len(telling) >= ENOUGH and peak >= RISE * _peak(telling[0]):
                    break
            else:
                factor = min(max(self._meter.measurable / peak, 2.0), FASTEST)
            size = self._larger(size, factor)
        return telling[0].cost * telling[0].size if telling else 0.0

    def _fits(self, group: int, size: int, own: list[Point]) -> bool:
        """Whether a batch is foreseen to stay within the share, as far as can be told by now."""
        known = self._good()
        if len(own) >= 2:
            first, last = own[-2], own[-1]
            rise = max(_peak(last) - _peak(first), 0) / (last.size - first.size)
            peak = _peak(last) + rise * (size - last.size)
        elif len(known) >= 3:
            peak = float(self._fitted()[0].predict(self._costs[group], size))
        else:
            return True
        return peak + self._held() <= self.room

    def _measure(self, group: int, size: int) -> Point:
        point = Point(group, float(self._costs[group]), size, self._meter.measure(group, size))
        self.points.append(point)
        return point

    def _good(self) -> list[Point]:
        return [point for point in self.points if point.probe is not None]

    def _held(self) -> int:
        return max((point.probe.held for point in self._good() if point.probe), default=0)

    def _telling(self) -> list[Point]:
        """Return the points that are fitted: those large enough, if there are some."""
        good = self._good()
        telling = [point for point in good if _peak(point) >= self._meter.measurable]
        return telling if len({p.cost * p.size for p in telling}) >= 3 else good

    def _fitted(self) -> tuple[Fit, FitForm]:
        points = self._telling()
        columns = _columns(points)
        plain = fit_peaks(*columns)
        if self._form == "proportional":
            return plain, "proportional"
        # As many points as there are terms would be met by any.
        if self._form == "auto" and len(points) < 8:
            return plain, "proportional"
        affine = fit_peaks(*columns, "affine")
        off = _worst(plain, points)
        if self._form == "affine" or (off > OFF and _worst(affine, points) < off / 2):
            return affine, "affine"
        return plain, "proportional"

    def settle(self) -> CostBudget:
        """Return the budget by the fit, made smaller as long as its dearest batch takes more."""
        refits = 0
        shrunk = 1.0
        self.fit, self.form = self._fitted()
        for _ in range(ROUNDS):
            unit, most = self._units()
            budget = replace(
                self._bounds,
                max_cost=most * shrunk,
                cost=dict(zip(self._plan.groups.labels.tolist(), unit.tolist(), strict=True)),
            )
            self.sizes = self._sizes(budget)
            foreseen = np.where(self.sizes > 0, self.fit.predict(self._costs, self.sizes), 0)
            group = int(np.argmax(foreseen))
            size = int(self.sizes[group])
            point = self._measure(group, size)
            self.verified.append((point, float(foreseen[group])))
            if point.probe is None:
                shrunk = size * float(unit[group]) / most / 2
                continue
            peak = point.probe.peak
            over = point.probe.held + peak - self.room
            if abs(foreseen[group] / peak - 1) > OFF and refits < REFITS:
                # Now that its greatest batch is known, the line can be a better one.
                refits += 1
                self.fit, self.form = self._fitted()
                continue
            if over <= 0:
                most_held = self._walk()
                if most_held is not None and most_held <= self.room:
                    return budget
                part = 0.5 if most_held is None else self._part(most_held)
                shrunk = min(float((self.sizes * unit).max()) / most, shrunk) * part
                continue
            # Down the slope from what is there once to what was found; by one sample at least.
            once = min(float(self.fit.once(self._costs[group])), peak - 1.0)
            left = max(peak - over - once, 0.0) / (peak - once)
            shrunk = min(size * left, math.nextafter(size, 0)) * float(unit[group]) / most
        raise RuntimeError(
            f"share={self._share:g} of memory_limit={human(self._meter.limit)} is exceeded "
            f"by the dearest batch, however often ({ROUNDS} times) the budget is made smaller: the "
            "cost does not describe what the step takes"
        )

    def _walk(self) -> int | None:
        """Make a few batches in a row: the dearest, and others as they come."""
        foreseen = np.where(self.sizes > 0, self.fit.predict(self._costs, self.sizes), 0)
        drawn = np.random.default_rng(0).choice(np.flatnonzero(self.sizes), WALK - 1)
        groups = [int(np.argmax(foreseen)), *drawn.tolist()]
        found = self._meter.walk([(group, int(self.sizes[group])) for group in groups])
        self.walks.append(found)
        return found

    def _part(self, most_held: int) -> float:
        """Return to which part a budget is to be cut whose batches in a row held so much."""
        held = self._held()
        return 0.98 * max(self.room - held, 0.0) / max(most_held - held, 1)

    def _units(self) -> tuple[Floats, float]:
        """Return what the budget counts a sample of each patch as, and how much there may be."""
        held = self._held()
        left = self.room - held - self.fit.fixed
        if not left > 0:
            raise ValueError(
                f"memory_limit must be more than what is held ({human(held)}) and what any "
                f"batch takes ({human(int(self.fit.fixed))}), times share={self._share:g}, "
                f"got {human(self._meter.limit)}"
            )
        if self.form == "proportional":
            return self._costs, left / self.fit.per_cost
        # What a batch of the patch takes once is spread over its samples, as many as fit.
        own = self.room - held - self.fit.once(self._costs)
        each = self.fit.each(self._costs)
        return np.where(own > each, each * left / np.maximum(own, each), 2 * left), left

    def _sizes(self, budget: CostBudget) -> Int64:
        try:
            return sizes_of(budget, self._plan.groups, self._plan.partial).sizes
        except ValueError as error:
            raise ValueError(
                f"memory_limit={human(self._meter.limit)} must be enough, at "
                f"share={self._share:g}, for every patch: {error}"
            ) from error

    def off(self) -> float:
        """Return by which share the fit is off at worst, of the peaks that tell something."""
        return _worst(self.fit, [p for p in self._good() if _peak(p) >= self._meter.measurable])

    def warn_if_off(self) -> None:
        """Warn where the cost does not describe what was measured."""
        off = self.off()
        if off <= OFF:
            return
        advice = "give costs that go with what a sample takes"
        if self._form == "proportional":
            better = fit_peaks(*_columns(self._telling()), "affine")
            if _worst(better, self._telling()) < off / 2:
                advice = f"fit='affine' describes it within {_worst(better, self._telling()):.0%}"
        log.warn(
            f"the cost does not describe the memory that the step takes: the line is off by "
            f"{off:.0%} of a measured peak; {advice}"
        )

    def record(self, device: str) -> dict[str, Any]:
        """Return what was measured, as plain values."""
        labels = self._plan.groups.labels.tolist()
        median = np.argsort(self._costs, kind="stable")[self._costs.size // 2]
        chosen = dict.fromkeys(
            (int(np.argmin(self._costs)), int(median), int(np.argmax(self._costs)))
        )
        used = {id(point) for point in self._telling()}
        tried = {id(point) for point, _ in self.verified}

        def plain(point: Point, foreseen: float) -> dict[str, Any]:
            probe = point.probe
            return {
                "patch_id": labels[point.group],
                "cost": point.cost,
                "batch_size": point.size,
                "held": None if probe is None else probe.held,
                "peak": None if probe is None else probe.peak,
                "predicted": foreseen,
            }

        return {
            "fixed": self.fit.fixed,
            "per_cost": self.fit.per_cost,
            "per_sample": self.fit.per_sample,
            "per_patch": self.fit.per_patch,
            "fit": self.form,
            "held": self._held(),
            "memory_limit": int(self._meter.limit),
            "share": self._share,
            "device": device,
            "worst_residual": self.off(),
            "points": [
                {
                    **plain(point, self._predicted(point)),
                    "fitted": id(point) in used,
                }
                for point in self.points
                if id(point) not in tried
            ],
            "verified": [plain(point, foreseen) for point, foreseen in self.verified],
            "walks": list(self.walks),
            "sizes": [
                {
                    "patch_id": labels[group],
                    "cost": float(self._costs[group]),
                    "batch_size": int(self.sizes[group]),
                    "samples": int(self._plan.groups.counts[group]),
                }
                for group in chosen
            ],
            "versions": _versions(),
        }

    def _predicted(self, point: Point) -> float:
        return float(self.fit.predict(point.cost, point.size))

    def _rounded(self, size: float) -> int:
        """Return the largest size that is allowed and no larger, 0 if none is."""
        if size < 1:
            return 0
        return int(replace(self._bounds, max_cost=float(size)).sizes_for(np.ones(1))[0])

    def _larger(self, size: int, factor: float) -> int:
        """Return an allowed size about ``factor`` times as large; beyond all, if there is none."""
        larger = self._rounded(size * factor)
        return larger if larger > size else LARGEST


def _peak(point: Point) -> int:
    assert point.probe is not None
    return point.probe.peak


def _worst(fit: Fit, points: Sequence[Point]) -> float:
    """Return by which share of a peak a fit is off at most."""
    return float(np.abs(residuals(fit, *_columns(points))).max()) if points else 0.0


def _columns(points: Sequence[Point]) -> tuple[Floats, Floats, Floats]:
    """Return costs, sizes and peaks."""
    return (
        np.array([point.cost for point in points]),
        np.array([point.size for point in points], np.float64),
        np.array([_peak(point) for point in points], np.float64),
    )


def _versions() -> dict[str, str]:
    found = {
        # The package's number stands above this room; it is there by now.
        "gpusampler": str(getattr(sys.modules.get("gpusampler"), "__version__", "unknown")),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.platform(),
    }
    for name in ("torch", "cupy"):
        module = devices.loaded(name)
        if module is not None:
            found[name] = str(module.__version__)
    return found
