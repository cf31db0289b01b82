"""What all tests share: one thread, reproducible examples, tiers, and devices as fixtures."""

from __future__ import annotations

import os

# Read by BLAS, OpenMP and torch when they are loaded, so it comes before them.
os.environ["OMP_NUM_THREADS"] = "1"

import faulthandler
import gc
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScheduling

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


GPU_SECONDS = 120.0
"""What a test on a GPU may take before its process is ended."""

LENIENT_ON_A_GPU = (
    # Modules that are not ours, and torch's C++, whose warnings name the line that called it. What
    # is installed beside a GPU differs from machine to machine.
    r"default:::(?!(gpusampler|tests|support|benchmarks|docs|groundwater_simulation|_pytest)\b)",
    r"default:[\s\S]*\(Triggered internally at",
)

_device_lost_in: list[str] = []
"""The test that lost the device of this process, if one did."""


def has_gpu() -> bool:
    return has_torch_cuda() or has_cupy_cuda()


def is_gpu_run(config: pytest.Config) -> bool:
    """Whether only tests that need a GPU are asked for: by ``-m gpu`` or by their folder."""
    if re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        return True
    return all("gpu" in re.split(r"[/\\:]", argument) for argument in config.args)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu":
        # The other tiers are left out unless they are named, as without -m.
        config.option.markexpr = " and not ".join(["gpu", *TIERS[:3]])
    if has_gpu():
        # One message instead of hundreds of failed tests, where minutes on a GPU are lent.
        if find_spec("array_api_compat") is None:
            raise pytest.UsageError("array_api_compat is not installed: arrays on a GPU need it")
        for line in LENIENT_ON_A_GPU:
            config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run first what matters most on a GPU, which may be lent for minutes: kernels come last."""
    if is_gpu_run(config):
        items.sort(key=lambda item: gpu_rank(item.nodeid))


def gpu_rank(nodeid: str) -> int:
    if nodeid.startswith("tests/gpu/"):
        return 0 if "test_identity" in nodeid else 1
    return 3 if "test_kernels" in nodeid else 2


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScheduling | None:
    """Distribute single tests on a GPU: most of their time is compiling, and few files hold all."""
    return LoadScheduling(config, log) if is_gpu_run(config) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End a process whose test on a GPU hangs; pytest-xdist fails the test and starts another."""
    if not (item.get_closest_marker("gpu") and has_gpu()):
        return (yield)
    stderr = item.config.stash[fault_handler_stderr_fd_key]
    faulthandler.dump_traceback_later(GPU_SECONDS, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_setup(item: pytest.Item) -> None:
    check_tiers(item)
    if item.get_closest_marker("gpu"):
        if not has_gpu():
            pytest.skip("no CUDA device")
        if _device_lost_in:
            pytest.skip(f"not run: this process lost its device in {_device_lost_in[0]}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Wait for the device, so that an error which arrives late fails the test that made it."""
    yield
    if item.get_closest_marker("gpu") and has_gpu() and not _device_lost_in:
        synchronize_devices()


def synchronize_devices() -> None:
    if has_torch_cuda():
        torch.cuda.synchronize()
    if has_cupy_cuda():
        import cupy

        cupy.cuda.runtime.deviceSynchronize()


def is_device_lost() -> bool:
    """Whether nothing works on the device any more: an illegal access ends it for a process."""
    try:
        synchronize_devices()
    except RuntimeError:
        return True
    return False


def check_tiers(item: pytest.Item) -> None:
    """Fail a test that is in two tiers, or whose mark gives no reason."""
    marks = [mark for mark in item.iter_markers() if mark.name in TIERS]
    for mark in marks:
        if not (mark.args and mark.args[0] and isinstance(mark.args[0], str)):
            pytest.fail(f'{mark.name} needs a reason: {mark.name}("why")', pytrace=False)
    if len(tiers := {mark.name for mark in marks}) > 1:
        pytest.fail(f"a test must be in one tier, got {sorted(tiers)}", pytrace=False)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use one process where tests measure or share a GPU, else one per CPU, but 8 at most."""
    expression = config.option.markexpr
    measures = not expression or re.search(r"(?<!not )\b(serial|gpu)\b", expression)
    return 0 if measures or has_gpu() else min(8, os.cpu_count() or 1)


def pytest_collection_finish() -> None:
    """Freeze what was imported: garbage collection is quicker, and forked children copy less."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Record whether the test has no mark of a tier: the controller sees reports, not tests."""
    report = yield
    report.should_be_quick = not any(map(item.get_closest_marker, TIERS))
    if report.failed and item.get_closest_marker("gpu") and has_gpu() and is_device_lost():
        _device_lost_in.append(item.nodeid)
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport() -> None:
    """End one of pytest-xdist's processes that lost its device, when the failure was reported.

    pytest-xdist fails the test once more, as one that crashed, and runs the rest in a new process.
    """
    if _device_lost_in and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


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
