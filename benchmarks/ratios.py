"""Ours against a named baseline: interleaved, best of several, a ratio with a stated limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROUNDS = 5
ATTEMPTS = 3


@dataclass(frozen=True)
class Ratio:
    """One line of the table: seconds of ours and of the baseline, and the limit on their ratio."""

    what: str
    baseline: str
    ours_s: float
    baseline_s: float
    limit: float

    @property
    def ratio(self) -> float:
        return self.ours_s / self.baseline_s

    @property
    def held(self) -> bool:
        return self.ratio <= self.limit

    def __str__(self) -> str:
        return (
            f"{self.what:<46} {self.ours_s * 1e3:>10.3f} ms  {self.ratio:>8.4f} of "
            f"{self.baseline_s * 1e3:>10.3f} ms  {self.baseline:<44} limit {self.limit:.4g}"
        )


def seconds(call: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    benchmark: Any,
    what: str,
    ours: Callable[[], Any],
    baseline_name: str,
    baseline: Callable[[], Any],
    limit: float,
    scale: float = 1.0,
) -> Ratio:
    """Measure both in turn and return their ratio.

    A round of pytest-benchmark times ours; its set-up has just timed the baseline. On a machine
    that other work shares, one of the rounds is undisturbed: the best of each counts. Where the
    limit is missed more rounds follow, since noise only ever adds time; a real slowdown stays.

    Parameters
    ----------
    benchmark : pytest-benchmark's fixture
    limit : float
        On ours / baseline.
    scale : float
        The baseline's time is multiplied by this: a part of it was measured.
    """
    base: list[float] = []

    def before() -> None:
        base.append(seconds(baseline))

    benchmark.extra_info["baseline"] = baseline_name
    ours()
    benchmark.pedantic(ours, setup=before, rounds=ROUNDS, iterations=1)
    if benchmark.disabled:
        return Ratio(what, baseline_name, 0.0, 1.0, limit)
    best = float(benchmark.stats.stats.min)
    result = Ratio(what, baseline_name, best, min(base) * scale, limit)
    for _ in range(ATTEMPTS - 1):
        if result.held:
            break
        for _ in range(ROUNDS):
            before()
            best = min(best, seconds(ours))
        result = Ratio(what, baseline_name, best, min(base) * scale, limit)
    benchmark.extra_info["ratio"] = result.ratio
    benchmark.extra_info["limit"] = limit
    return result
