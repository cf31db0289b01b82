"""What all tests share: one thread, reproducible examples, tiers, and devices as fixtures."""

from __future__ import annotations

import os

# Read by BLAS, OpenMP and torch when they are loaded, so it comes before them.
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from gpusampler.core.devices import Device
from gpusampler.permutation import _native
from support.libraries import Library, has_cupy_cuda, has_torch_cuda, make_library
from support.paths import ROOT

if find_spec("torch"):
    import torch

    torch.set_num_threads(1)

# Benchmarks and examples are not installed. Last, so that an installed package is found before the
# source tree.
sys.path.append(str(ROOT))

settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    database=None,
    derandomize=bool(os.environ.get("CI")),
    # The machine is shared: a slow draw says nothing about the test.
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")

# Triton decides whether it interprets when it is first imported, which nothing above does.
if not has_torch_cuda():
    os.environ["TRITON_INTERPRET"] = "1"

TIERS = ("slow", "battery", "serial", "expensive")
MAX_SECONDS = 5.0
"""What a test without a mark of a tier may take."""


def pytest_runtest_setup(item: pytest.Item) -> None:
    check_tiers(item)
    if item.get_closest_marker("gpu") and not (has_torch_cuda() or has_cupy_cuda()):
        pytest.skip("no CUDA device")


def check_tiers(item: pytest.Item) -> None:
    """Fail a test that is in two tiers, or whose mark gives no reason."""
    marks = [mark for mark in item.iter_markers() if mark.name in TIERS]
    for mark in marks:
        if not (mark.args and mark.args[0] and isinstance(mark.args[0], str)):
            pytest.fail(f'{mark.name} needs a reason: {mark.name}("why")', pytrace=False)
    if len(tiers := {mark.name for mark in marks}) > 1:
        pytest.fail(f"a test must be in one tier, got {sorted(tiers)}", pytrace=False)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Use one process where tests measure or share a GPU."""
    expression = config.option.markexpr
    measures = not expression or re.search(r"(?<!not )\b(serial|gpu)\b", expression)
    return 0 if measures or has_torch_cuda() or has_cupy_cuda() else None


def pytest_collection_finish() -> None:
    """Freeze what was imported: garbage collection is quicker, and forked children copy less."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Record whether the test has no mark of a tier: the controller sees reports, not tests."""
    report = yield
    report.should_be_quick = not any(map(item.get_closest_marker, TIERS))
    return report


def slow_unmarked(reports: Iterable[Any]) -> list[tuple[str, float]]:
    """Return the tests without a mark that took more than MAX_SECONDS, slowest first."""
    seconds_by_test: Counter[str] = Counter()
    for report in reports:
        if getattr(report, "should_be_quick", False):
            seconds_by_test[report.nodeid] += report.duration
    return [(test, took) for test, took in seconds_by_test.most_common() if took > MAX_SECONDS]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """List the tests that make the default tier slow; machines differ, so none of them fails."""
    slow_tests = slow_unmarked(
        report for reports in terminalreporter.stats.values() for report in reports
    )
    if slow_tests:
        terminalreporter.section(
            f"slower than {MAX_SECONDS:g} s and unmarked: make it smaller, or mark it"
        )
        for test, took in slow_tests:
            terminalreporter.write_line(f"{took:6.1f} s  {test}")


@pytest.fixture(scope="module", params=["C", "NumPy"])
def host_form(request: pytest.FixtureRequest) -> Iterator[str]:
    """The host evaluates in C, where it was compiled, and in NumPy."""
    if request.param == "C" and _native.module is None:
        pytest.skip(_native.describe())
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "NumPy":
            patch.setattr(_native, "module", None)
        yield request.param


@pytest.fixture(name="torch")
def torch_with_cuda() -> Iterator[Any]:
    """torch, where it sees a GPU; what was begun there is done when the test is."""
    if not has_torch_cuda():
        pytest.skip("torch sees no CUDA device")
    yield torch
    torch.cuda.synchronize()


@pytest.fixture
def cpu_as_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's "cpu" count as a device that NumPy does not see."""
    monkeypatch.setattr(Device, "on_host", property(lambda device: device.library == "numpy"))


@pytest.fixture(
    scope="session",
    params=[
        "numpy",
        "torch",
        pytest.param("torch-cuda", marks=pytest.mark.gpu),
        pytest.param("cupy", marks=pytest.mark.gpu),
    ],
)
def library(request: pytest.FixtureRequest) -> Library:
    """Each array library that the package runs on."""
    return make_library(request.param)
