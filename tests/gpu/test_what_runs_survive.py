"""Runs of tests on a GPU survive a lost device, a crash, a hang and warnings of other packages.

pytest runs here in processes of its own, over tests that play a GPU.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from support import plugin
from support.processes import run_python

DEVICE = """
from support import plugin

class device:
    is_lost = False

def synchronize_devices():
    if device.is_lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

plugin.device = device
plugin.has_torch_cuda = lambda: True
plugin.has_cupy_cuda = lambda: False
plugin.synchronize_devices = synchronize_devices
plugin.GPU_SECONDS = 2.0
"""

TESTS = """
import os, signal, time, warnings
import pytest
from support import plugin

pytestmark = pytest.mark.gpu
only_where_others_go_on = pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="-n0")

def test_before():
    pass

def test_fails():
    assert False, "an ordinary failure"

@only_where_others_go_on
def test_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

@only_where_others_go_on
def test_hangs():
    time.sleep(60)

@only_where_others_go_on
def test_loses_the_device_unseen():
    plugin.device.is_lost = True

def test_another_package_warns():
    exec("import warnings; warnings.warn('theirs')", {"__name__": "cupy._environment"})
    # torch's C++ names the line that called it.
    warnings.warn("This is old. (Triggered internally at /pytorch/aten/x.cpp:1.)")

@pytest.mark.parametrize("module", ["gpusampler.core", "support.plugin", __name__])
def test_ours_warn(module):
    exec("import warnings; warnings.warn('ours')", {"__name__": module})

def test_loses_the_device():
    plugin.device.is_lost = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("number", range(20))
def test_after(number):
    plugin.synchronize_devices()

@pytest.mark.slow("because")
def test_of_another_tier():
    raise AssertionError
"""

CONFIG = """
[pytest]
addopts = --import-mode=importlib -p support.plugin -p no:cacheprovider --junitxml=report.xml
filterwarnings = error
markers =
    gpu
    slow(why)
"""


def run_pytest(folder, *arguments) -> SimpleNamespace:
    """Run TESTS, and return the outcomes by test, why any was skipped, and what was printed."""
    (folder / "tests" / "gpu").mkdir(parents=True)
    (folder / "pytest.ini").write_text(CONFIG)
    (folder / "tests" / "conftest.py").write_text(DEVICE)
    (folder / "tests" / "gpu" / "test_played.py").write_text(TESTS)
    process = run_python(
        *("-m", "pytest", "-m", "gpu", "tests/gpu", *arguments),
        cwd=folder,
        check=False,
        timeout=200,
        PYTEST_XDIST_WORKER=None,
        PYTEST_ADDOPTS=None,
    )
    outcomes, texts = defaultdict(list), defaultdict(str)
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        name = case.get("name")
        outcomes[name] += [outcome.tag for outcome in case] or ["passed"]
        texts[name] += "".join(f"{part.get('message')}{part.text}" for part in case)
    printed = process.stdout + process.stderr
    return SimpleNamespace(outcomes=dict(outcomes), texts=texts, printed=printed)


AFTER = [f"test_after[{number}]" for number in range(20)]
FAILS = {
    "test_fails",
    *(
        f"test_ours_warn[{name}]"
        for name in ("gpusampler.core", "support.plugin", "tests.gpu.test_played")
    ),
}


@pytest.mark.slow("starts pytest's processes, which import torch, again and again")
def test_with_processes_that_can_be_replaced(tmp_path):
    run = run_pytest(tmp_path, "-n", "2", "--dist", "loadfile")
    lost = {"test_loses_the_device", "test_loses_the_device_unseen", "test_crashes", "test_hangs"}
    passed = {name for name, outcomes in run.outcomes.items() if outcomes == ["passed"]}
    assert passed == {"test_before", "test_another_package_warns", *AFTER}, run.printed
    assert set(run.outcomes) - passed == FAILS | lost, run.printed
    assert "illegal memory access" in run.texts["test_loses_the_device"]
    assert "illegal memory access" in run.texts["test_loses_the_device_unseen"]
    for name in lost:
        assert "crashed while running" in run.texts[name]
    assert "theirs" in run.printed


@pytest.mark.slow("starts pytest, which imports torch")
def test_in_one_process_what_cannot_run_says_so(tmp_path):
    run = run_pytest(tmp_path, "-n", "0")
    assert run.outcomes["test_loses_the_device"] == ["failure"]
    failed = {name for name, outcomes in run.outcomes.items() if outcomes == ["failure"]}
    assert failed == FAILS | {"test_loses_the_device"}, run.printed
    for name in AFTER:
        assert run.outcomes[name] == ["skipped"]
        assert "lost its device in tests/gpu/test_played.py::test_loses" in run.texts[name]
    assert "test_of_another_tier" not in run.outcomes


# What decides


def config_of(markexpr: str, *args: str) -> SimpleNamespace:
    return SimpleNamespace(option=SimpleNamespace(markexpr=markexpr), args=list(args))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of("gpu", "tests"), True),
        (config_of("gpu and not slow", "tests"), True),
        (config_of("not slow", "tests/gpu"), True),
        (config_of("", "/home/me/tests/gpu/test_device.py::test_name"), True),
        (config_of("not gpu", "tests"), False),
        (config_of("not slow", "tests", "tests/gpu"), False),
        (config_of("slow", "tests/plan/test_gpu_like.py"), False),
    ],
)
def test_what_is_a_run_on_a_gpu(config, expected):
    assert plugin.is_gpu_run(config) is expected


def test_identity_comes_first_and_kernels_last():
    items = [
        SimpleNamespace(nodeid=nodeid)
        for nodeid in (
            "tests/core/test_transfer.py::test_streams",
            "tests/gpu/test_device.py::test_graph",
            "tests/gpu/test_identity.py::test_batches",
            "tests/plan/test_kernels.py::test_rows[cupy]",
            "tests/plan/test_plan.py::test_any[cupy]",
        )
    ]
    ordered = list(items)
    plugin.pytest_collection_modifyitems(config_of("gpu"), ordered)
    assert ordered == [items[place] for place in (2, 1, 0, 4, 3)]
    ordered = list(items)
    plugin.pytest_collection_modifyitems(config_of("not slow", "tests"), ordered)
    assert ordered == items


def test_single_tests_are_distributed_on_a_gpu_and_files_elsewhere(monkeypatch):
    monkeypatch.setattr(plugin, "LoadScheduling", lambda config, log: "single tests")
    assert plugin.pytest_xdist_make_scheduler(config_of("gpu"), None) == "single tests"
    assert plugin.pytest_xdist_make_scheduler(config_of("not slow", "tests"), None) is None


@pytest.mark.parametrize("gpu", [True, False])
def test_what_is_missing_on_a_gpu_is_said_before_anything_runs(monkeypatch, gpu):
    monkeypatch.setattr(plugin, "has_gpu", lambda: gpu)
    monkeypatch.setattr(plugin, "find_spec", lambda name: None)
    if gpu:
        with pytest.raises(pytest.UsageError, match="array_api_compat is not installed"):
            plugin.pytest_configure(config_of("gpu"))
    else:
        plugin.pytest_configure(config_of("gpu"))
