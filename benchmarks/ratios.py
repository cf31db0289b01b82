"""Ours beside a named baseline: in turn, the best of several, one thread. A report without limits.

What must not get slower is held by `benchmarks.gate`, against baselines that are chosen for that;
those here are what users would otherwise run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROUNDS = 5


@dataclass(frozen=True)
class Ratio:
    """One line of the table: seconds of ours and of the baseline."""

    what: str
    baseline: str
    ours_s: float
    baseline_s: float

    @property
    def ratio(self) -> float:
        return self.ours_s / self.baseline_s

    def __str__(self) -> str:
        return (
            f"{self.what:<46} {self.ours_s * 1e3:>10.3f} ms  {self.ratio:>8.4f} of "
            f"{self.baseline_s * 1e3:>10.3f} ms  {self.baseline}"
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
    scale: float = 1.0,
) -> Ratio | None:
    """Measure both in turn and return their ratio; None where benchmarks are disabled.

    A round of pytest-benchmark times ours; its set-up has just timed the baseline. On a machine
    that other work shares, one of the rounds is undisturbed: the best of each counts.

    Parameters
    ----------
    benchmark : pytest-benchmark's fixture
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
        return None
    best = float(benchmark.stats.stats.min)
    result = Ratio(what, baseline_name, best, min(base) * scale)
    benchmark.extra_info["ratio"] = result.ratio
    return result
