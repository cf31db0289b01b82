"""``pytest benchmarks --benchmark-enable``: ours and baselines, a report without limits.

Times are those of the processor, on one thread. Without ``--benchmark-enable`` each benchmark runs
once, on few samples, to see that it runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import forms, markdown
from benchmarks.machine import line, machine
from benchmarks.timing import PAIRS, seconds, summary

LONG = 2.0
FEW_PAIRS = 3
"""Pairs where the two sides take longer than `LONG` seconds."""
FEW_SAMPLES = 20_000

HEAD = ("what", "ours, ms", "baseline, ms", "ours / baseline", "lowest", "highest", "baseline")
_ROWS: list[tuple[str, ...]] = []
_LINES: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Choose what evaluates ours where a benchmark does not compare forms."""
    parser.addoption("--form", choices=forms.names(), default=forms.FORMS[-1])


def pytest_xdist_auto_num_workers() -> int:
    """Measure alone."""
    return 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count processor time, so that other work on the machine does not count."""
    for item in items:
        group = item.name.partition("[")[0]
        item.add_marker(pytest.mark.benchmark(group=group, timer=time.process_time))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def scaled(benchmark: Any) -> Callable[[int], int]:
    """Cut a number of samples down where nothing is timed."""
    return lambda samples: min(samples, FEW_SAMPLES) if benchmark.disabled else samples


@pytest.fixture
def against(benchmark: Any) -> Callable[..., None]:
    """Compare ours with a baseline, and put the line into the table.

    A round of pytest-benchmark times ours; its set-up has just timed the baseline. The ratio is the
    median of those of all pairs. Of ``repeats`` calls in a row the time of one counts. Of a
    baseline that is measured in part only, the time is multiplied by ``scale``.
    """

    def run(
        what: str,
        ours: Callable[[], Any],
        name: str,
        baseline: Callable[[], Any],
        repeats: int = 1,
        scale: float = 1.0,
    ) -> None:
        repeats = 1 if benchmark.disabled else repeats
        took: list[float] = []

        def again(call: Callable[[], Any]) -> None:
            for _ in range(repeats):
                call()

        def before() -> None:
            took.append(seconds(lambda: again(baseline)))

        rounds = 1
        if not benchmark.disabled:
            before()
            warming = took.pop() + seconds(lambda: again(ours))
            rounds = FEW_PAIRS if warming > LONG else PAIRS
        benchmark.pedantic(again, args=(ours,), setup=before, rounds=rounds)
        if benchmark.disabled:
            return
        pairs = zip(benchmark.stats.stats.data, took, strict=True)
        found = summary([(one / repeats, scale * base / repeats) for one, base in pairs])
        benchmark.extra_info |= {"what": what, "baseline": name, **found._asdict()}
        times = (f"{1e3 * value:.4g}" for value in found[:2])
        _ROWS.append((what, *times, *(f"{value:.3g}" for value in found[2:]), name))

    return run


@pytest.fixture
def say() -> Callable[[str], None]:
    """Put a line below the table."""
    return _LINES.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    if not _ROWS and not _LINES:
        return
    terminalreporter.section("medians of adjacent pairs, processor time of one thread")
    terminalreporter.write_line(line(machine()))
    if _ROWS:
        terminalreporter.write_line(markdown.table(HEAD, _ROWS))
    for text in _LINES:
        terminalreporter.write_line(text)
