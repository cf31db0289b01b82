"""Ours and a baseline, timed in turn: what slows the machine for a while slows both of a pair."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

PAIRS = 9


class Paired(NamedTuple):
    """Seconds of ours and of the baseline, and their ratio: medians over pairs, and extremes."""

    ours_s: float
    baseline_s: float
    ratio: float
    lowest: float
    highest: float


def drain(batches: Iterable[Any]) -> None:
    """Draw them all and forget them."""
    deque(batches, maxlen=0)


def seconds(call: Callable[[], Any]) -> float:
    """Return the processor time of a call, of all threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def summary(pairs: Sequence[tuple[float, float]]) -> Paired:
    """Return the medians of pairs of ours and the baseline, not the ratio of two medians."""
    ratios = [ours / baseline for ours, baseline in pairs]
    medians = map(statistics.median, (*zip(*pairs, strict=True), ratios))
    return Paired(*medians, min(ratios), max(ratios))


def in_pairs(ours: Callable[[], Any], baseline: Callable[[], Any], pairs: int = PAIRS) -> Paired:
    """Time both in turn."""
    return summary([(seconds(ours), seconds(baseline)) for _ in range(pairs)])
