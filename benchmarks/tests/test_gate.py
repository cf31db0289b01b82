"""``python -m benchmarks.gate``: it fails on what got twice as slow, and on nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.paths import ROOT

PAGE = ROOT / "docs" / "explanation" / "gate.md"

ORDER = "find that ids are in order"
VIEWS = "cut into views of 8"

PLANTED = [
    ("gpusampler.permutation.ranges:permute_runs", "evaluate 2,048 batches of 64", ORDER),
    ("gpusampler.plan.epoch_plan:EpochPlan.locate", 'look slots up, steps="balanced"', ORDER),
    ("gpusampler.plan.epoch_plan:EpochPlan.locate", "look slots up, weights", ORDER),
    ("gpusampler.sampler.iterator:_as_lists", "cut into lists of 64", ORDER),
    ("gpusampler.sampler.iterator:_as_numpy", VIEWS, ORDER),
    ("gpusampler.sampler.iterator:Blocks.read", "first batch, N = 1e6", ORDER),
    ("gpusampler.groups.counting_sort:Scatter.add", "sort samples by patch", VIEWS),
    ("gpusampler.groups.census:Census.add", ORDER, VIEWS),
    (
        "gpusampler.sampler.batch_sampler:PatchBatchSampler.load_state_dict",
        "save a state and load it",
        ORDER,
    ),
    ("gpusampler.sampler.tensor_loader:TensorReader.read", "PatchTensorLoader, 64 of 8", ORDER),
]
"""Where the time doubles, a case that must miss its limit, and one that must hold it."""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a program in the repository's root."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    print(done.stdout, done.stderr)
    return done


@contextmanager
def busy_loops(number: int) -> Iterator[None]:
    """Have processes that do nothing but take time."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
        assert all(one.poll() is None for one in spinning)
    finally:
        for one in spinning:
            one.kill()
            one.wait()


@pytest.mark.parametrize(("place", "slower", "other"), PLANTED)
@pytest.mark.serial("measures time")
def test_twice_the_time_is_found(place, slower, other):
    asked = [part for name in (slower, other) for part in ("--case", name)]
    done = run("-m", "benchmarks.tests.slow_down", place, "--", *asked)
    assert done.returncode == 1, done.stderr
    assert f"in each of 5 attempts: {slower}\n" in done.stdout
    assert f"attempts: {other}\n" not in done.stdout


@pytest.mark.serial("measures time")
def test_the_package_as_it_is_holds_beside_busy_loops():
    with busy_loops(os.cpu_count() or 1):
        done = run("-m", "benchmarks.gate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all limits are held" in done.stdout
    assert done.stdout.count("| held |") >= 20


@pytest.mark.serial("measures time")
def test_nothing_planted_is_nothing_found():
    done = run("-m", "benchmarks.tests.slow_down", "--", "--case", "look slots up", "--case", ORDER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| held |") == 5


def test_a_case_that_is_not_there():
    done = run("-m", "benchmarks.gate", "--case", "nothing like it")
    assert done.returncode == 2
    assert "no case is named so: nothing like it" in done.stdout


@pytest.fixture
def gate(monkeypatch):
    from benchmarks import gate

    return gate


@pytest.fixture
def cases(gate):
    from benchmarks.gate_cases import CASES

    return CASES


def test_a_case_without_its_module_is_left_out_visibly(gate, cases, capsys):
    from dataclasses import replace

    assert gate.hold([replace(cases[0], needs=("no_such_module",))])
    assert "| no no_such_module |" in capsys.readouterr().out


def test_a_limit_is_below_twice_its_reference(cases):
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    # Were a ratio a third below its reference elsewhere, doubling it would still be seen.
    assert all(1.2 <= case.slack <= 1.5 for case in cases)


def test_the_page_has_the_limits(gate, cases):
    assert gate.limits(cases) in PAGE.read_text()
