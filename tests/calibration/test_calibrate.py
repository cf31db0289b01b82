"""calibrate: what it foretells is what is measured, and nothing is left changed or running."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import json
import math
import mmap
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from gpusampler import CostBudget, GWPatchDataset, PatchBatchSampler, calibrate
from gpusampler.calibration import forked_child, memory_meter
from gpusampler.calibration.cost_model import Fit, fit_peaks, residuals
from gpusampler.calibration.forked_child import (
    StepTraceback,
    call_in_child,
    high_water_mark,
    is_out_of_memory,
)
from gpusampler.calibration.memory_meter import HostMeter, batch_of
from gpusampler.core import memory
from gpusampler.core.text import format_bytes
from gpusampler.demo.embedded import small_data
from support.processes import run_python

linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are told on Linux only")


def measured(test):
    """Mark a test of peaks, which show only where little memory was freed before."""
    return pytest.mark.serial("compares peaks of memory")(linux(test))


needs_torch = pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed")

MIB = 1 << 20
POINTS = {3: 300, 5: 2000, 8: 900, 9: 5000}
IDS = np.repeat(list(POINTS), [400, 300, 350, 200])


def sampler(batch_size=4, ids=IDS, **settings):
    return PatchBatchSampler(ids, batch_size, seed=0, device="numpy", **settings)


SHARE = 0.9


def limit_above(mib, share=1.0):
    """A limit whose share leaves so many MiB above what this process holds, however much it is."""
    gc.collect()
    return int((memory.resident_bytes() + mib * MIB) / share)


def child_limit_above(mib):
    """`limit_above`, exact in a forked child, which does not inherit pages of files."""
    return limit_above(mib) - memory.file_backed_bytes()


def allocating(batch, bytes_per_point=128):
    """A step that takes `bytes_per_point` bytes a point."""
    np.ones(len(batch.indices) * POINTS[batch.patch_id] * bytes_per_point, np.uint8)


def calibrate_quietly(step, plan=None, **settings):
    limit = limit_above(140, settings.get("share", SHARE))
    settings = {"cost": POINTS, "memory_limit": limit, "progress": False, **settings}
    return calibrate(step, sampler() if plan is None else plan, **settings)


# The fit


def some_batches():
    costs = np.repeat([10.0, 60.0, 300.0], 4)
    return costs, np.tile([1.0, 2.0, 4.0, 8.0], 3)


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e12])
@pytest.mark.parametrize(("fixed", "per_cost"), [(0.0, 3.0), (1e6, 5000.0), (1e9, 2000.0)])
def test_a_line_is_found_again_in_any_unit_of_cost(unit, fixed, per_cost):
    costs, sizes = some_batches()
    fit = fit_peaks(costs * unit, sizes, fixed + per_cost * costs * sizes)
    assert fit.per_cost == pytest.approx(per_cost / unit, rel=1e-6)
    assert fit.fixed == pytest.approx(fixed, rel=1e-6, abs=1e-6)
    assert (fit.per_sample, fit.per_patch) == (0, 0)


def test_an_affine_fit_finds_all_terms():
    costs, sizes = some_batches()
    truth = Fit(2e6, 700.0, 3e5, 9e4)
    fit = fit_peaks(costs, sizes, truth.predict(costs, sizes), "affine")
    assert fit == pytest.approx(truth, rel=1e-6)


def test_nothing_fitted_is_negative():
    costs, sizes = some_batches()
    fit = fit_peaks(costs, sizes, 5.0 * costs * sizes * (costs * sizes) ** 0.2)
    assert fit.fixed == 0
    assert fit.per_cost > 0


def test_residuals_are_relative():
    costs, sizes = some_batches()
    peaks = 1e6 + 300.0 * costs * sizes
    # The smallest peak is as near the line as the largest, which an absolute fit would not see to.
    relative = residuals(
        fit_peaks(costs, sizes, peaks * np.tile([1.1, 0.9], 6)), costs, sizes, peaks
    )
    assert np.abs(relative).max() < 0.1


# The child


@linux
def test_what_a_child_returns_comes_back():
    assert call_in_child(lambda: {"a": [1, 2]}) == (True, {"a": [1, 2]})


@linux
def test_a_child_changes_nothing_here():
    values = np.zeros(10)

    def work():
        values[:] = 1
        random.seed(5)
        return float(values.sum())

    before = random.getstate()
    assert call_in_child(work) == (True, 10.0)
    assert values.sum() == 0
    assert random.getstate() == before


@linux
def test_an_error_is_raised_here_with_the_traceback_of_there():
    def broken_step():
        raise KeyError("no such point")

    with pytest.raises(KeyError, match="no such point") as raised:
        call_in_child(broken_step)
    assert isinstance(raised.value.__cause__, StepTraceback)
    assert "broken_step" in str(raised.value.__cause__)


class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


@linux
def test_an_error_that_cannot_be_pickled_is_told_in_words():
    def work():
        raise Odd(1, 2)

    with pytest.raises(RuntimeError, match="step raised Odd: 1 and 2") as raised:
        call_in_child(work)
    assert "raise Odd(1, 2)" in str(raised.value.__cause__)


def raising(error):
    def work():
        raise error

    return work


@linux
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_every_way_to_say_that_memory_ran_out(error):
    assert is_out_of_memory(error)
    assert call_in_child(raising(error)) == (False, None)


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("mat1 and mat2 shapes"), OSError(errno.ENOENT, "x"), ValueError()):
        assert not is_out_of_memory(error)


@linux
def test_a_child_that_is_killed_has_run_out_of_memory():
    assert call_in_child(lambda: os.kill(os.getpid(), signal.SIGKILL)) == (False, None)


@contextlib.contextmanager
def process_left_behind():
    """A function that starts a process, which outlives its child and is ended here."""
    with tempfile.TemporaryFile() as file:

        def start():
            # Forked, it holds every file of the child.
            process = os.fork()
            if process == 0:
                time.sleep(30)
                os._exit(0)
            os.pwrite(file.fileno(), b"%d" % process, 0)

        try:
            yield start
        finally:
            os.kill(int(os.pread(file.fileno(), 20, 0)), signal.SIGKILL)


@linux
@pytest.mark.parametrize("ends", [False, True])
def test_a_process_that_step_started_is_not_waited_for(ends):
    with process_left_behind() as start:

        def work():
            start()
            if ends:
                os._exit(3)
            return "done"

        begun = time.monotonic()
        if ends:
            with pytest.raises(RuntimeError, match="exit status 3"):
                call_in_child(work)
        else:
            assert call_in_child(work) == (True, "done")
        assert time.monotonic() - begun < 15


@linux
def test_a_process_that_returns_from_step_has_no_answer():
    def work():
        process = os.fork()
        if process:
            os.waitpid(process, 0)
        return process > 0

    assert call_in_child(work) == (True, True)


@linux
def test_half_an_answer_is_none(monkeypatch):
    real = pickle.dumps

    class Truncated(bytes):
        def __len__(self):
            return super().__len__() + 3

    stand_in = SimpleNamespace(dumps=lambda value: Truncated(real(value)[:-3]), loads=pickle.loads)
    monkeypatch.setattr(forked_child, "pickle", stand_in)
    with pytest.raises(RuntimeError, match="ended with exit status 0, without a Python error"):
        call_in_child(lambda: [1, 2, 3])


def abort():
    # pytest would print where, to the terminal.
    faulthandler.disable()
    os.abort()


@linux
@pytest.mark.parametrize(
    ("end", "message"), [(lambda: os._exit(3), "exit status 3"), (abort, "with signal SIGABRT")]
)
def test_a_child_that_ends_by_itself_is_an_error(end, message):
    with pytest.raises(RuntimeError, match=message):
        call_in_child(end, limit_above(1000))


@measured
def test_allocations_beyond_the_limit_fail_in_the_child():
    def work():
        np.ones(400 * MIB, np.uint8)

    assert call_in_child(work, child_limit_above(200)) == (False, None)
    assert call_in_child(work, limit_above(800)) == (True, None)


@linux
@needs_torch
def test_so_do_those_of_torch():
    import torch

    assert call_in_child(lambda: torch.ones(400 * MIB).sum().item(), child_limit_above(200)) == (
        False,
        None,
    )


@measured
def test_what_no_limit_covers_is_seen_and_the_child_killed():
    def work():
        # Shared pages count in no limit of a process.
        shared = mmap.mmap(-1, 400 * MIB)
        for offset in range(0, len(shared), 4096):
            shared[offset] = 1
        time.sleep(20)

    start = time.monotonic()
    assert call_in_child(work, child_limit_above(150)) == (False, None)
    assert time.monotonic() - start < 15


@linux
@pytest.mark.serial("no other test may have left a child")
def test_a_child_that_waits_for_ever_is_ended_and_told_of(monkeypatch):
    monkeypatch.setattr(forked_child, "HANG_TIMEOUT", 0.3)
    with pytest.raises(RuntimeError, match=r"used no CPU time .* waits for a thread, a lock"):
        call_in_child(lambda: time.sleep(60))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@measured
def test_work_is_not_taken_for_waiting(monkeypatch):
    monkeypatch.setattr(forked_child, "HANG_TIMEOUT", 0.3)

    def work():
        start = time.monotonic()
        while time.monotonic() - start < 1:
            sum(range(1000))
        return "done"

    assert call_in_child(work) == (True, "done")


@linux
@pytest.mark.serial("no other test may have left a child")
def test_an_interrupted_wait_leaves_no_child(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(forked_child, "_wait_for_end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call_in_child(lambda: time.sleep(60))
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@linux
def test_what_was_printed_before_is_printed_once():
    code = (
        "import atexit; atexit.register(print, 'end')\n"
        "from gpusampler.calibration.forked_child import call_in_child\n"
        "print('before', end=' ')\n"
        "call_in_child(lambda: print('inside', end=' '))\n"
        "print('after')"
    )
    process = run_python("-c", code, PYTHONUNBUFFERED="")
    assert process.stdout == "before inside after\nend\n"


@measured
@pytest.mark.parametrize("size", [8, 64])
def test_a_peak_is_told_within_tenths_of_a_mib(size):
    def work():
        np.ones(size * MIB, np.uint8)
        forked_child.release_freed_memory()
        before = high_water_mark(reset=True)
        np.ones(size * MIB, np.uint8)
        return high_water_mark() - before

    assert call_in_child(work)[1] == pytest.approx(size * MIB, abs=0.4 * MIB)


# What is probed


@pytest.mark.parametrize("ids", [IDS, np.random.default_rng(0).permutation(IDS)])
def test_a_batch_is_of_its_patch_and_goes_round(ids):
    plan = sampler(ids=ids).plan
    samples = plan.groups.samples_of(9)
    batch = batch_of(plan, 3, 450)
    assert (batch.patch_id, batch.valid, len(batch.indices)) == (9, 450, 450)
    np.testing.assert_array_equal(batch.indices, np.concatenate([samples, samples, samples[:50]]))


@needs_torch
def test_a_batch_is_where_the_sampler_is_and_has_its_names():
    import torch

    plan = PatchBatchSampler(["b", "a", "b"], 1, seed=0, device="cpu").plan
    batch = batch_of(plan, 1, 3)
    assert batch.patch_id == "b"
    assert isinstance(batch.indices, torch.Tensor)
    assert batch.indices.tolist() == [0, 2, 0]


# calibrate on the CPU


@measured
def test_a_known_step_is_measured_and_fills_its_share():
    limit = limit_above(200, 0.8)
    budget = calibrate_quietly(allocating, memory_limit=limit, share=0.8)
    record = budget.calibration
    assert record["fit"] == "proportional"
    assert record["per_cost"] == pytest.approx(128, rel=0.05)
    assert record["device"] == "cpu"
    assert record["memory_limit"] == limit
    usable = 0.8 * limit - record["held"] - record["fixed"]
    # What is held differs by a page or two from probe to probe.
    assert budget.max_cost <= usable / record["per_cost"] * 1.001
    plan = sampler(budget).plan
    verified = record["verified"][-1]
    assert verified["held"] + verified["peak"] <= 0.8 * limit
    # As much as there is use for, and no batch over the budget.
    sizes = dict(zip(POINTS, plan.sizes_by_patch.tolist(), strict=True))
    assert all(size * POINTS[patch] <= budget.max_cost for patch, size in sizes.items())
    assert verified["batch_size"] == sizes[verified["patch_id"]]
    assert {p["patch_id"] for p in record["points"]} == {3, 8, 9}


@measured
def test_a_budget_survives_json():
    budget = calibrate_quietly(allocating)
    loaded = CostBudget.from_dict(json.loads(json.dumps(budget.to_dict())))
    assert loaded == budget
    assert loaded.calibration == budget.calibration
    assert budget.cost == POINTS
    assert budget.calibration["versions"]["numpy"] == np.__version__
    assert list(sampler(loaded)) == list(sampler(budget))


def torch_case(dropout=0.1):
    import torch

    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 64),
        torch.nn.GELU(),
        torch.nn.Dropout(dropout),
        torch.nn.BatchNorm1d(64),
        torch.nn.Linear(64, 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def step(batch):
        model.train()
        x = torch.rand(len(batch.indices) * POINTS[batch.patch_id], 6)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()
        random.random()
        np.random.random()  # noqa: NPY002

    return model, optimizer, schedule, step


def full_state(model, optimizer, schedule):
    """All that a step may change, as bytes and plain values."""
    import torch

    def plain(value):
        if isinstance(value, torch.Tensor):
            return (str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(
        {
            "model": dict(model.state_dict()),
            "grads": [p.grad for p in model.parameters()],
            "modes": [part.training for part in model.modules()],
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
            "torch": torch.get_rng_state(),
            "called": getattr(optimizer, "_opt_called", None),
        }
    )


@measured
@needs_torch
def test_peaks_of_unseen_patches_and_sizes_are_foretold_within_a_seventh():
    model, optimizer, schedule, step = torch_case()
    limit = limit_above(500, SHARE)
    plan = sampler().plan
    state = (model, optimizer, schedule)
    budget = calibrate_quietly(step, state=state, memory_limit=limit, max_batch_size=32)
    record = budget.calibration
    fit = Fit(*(record[name] for name in Fit._fields))
    meter = HostMeter(step, plan, limit)
    for group, size in ((0, 60), (0, 131), (1, 9), (1, 17), (2, 31), (3, 3)):
        cost = float(list(POINTS.values())[group])
        peak = meter.measure(group, size).peak
        assert float(fit.predict(cost, size)) == pytest.approx(peak, rel=0.15)
    assert record["worst_residual"] < 0.15


@measured
@needs_torch
@pytest.mark.parametrize("warm", [False, True])
def test_on_the_cpu_all_is_as_it_was(warm):
    model, optimizer, schedule, step = torch_case()
    if warm:
        step(batch_of(sampler().plan, 0, 2))
    model.eval()
    before = full_state(model, optimizer, schedule)
    calibrate_quietly(
        step,
        state=(model, optimizer, schedule),
        memory_limit=limit_above(320, SHARE),
        max_batch_size=8,
    )
    assert full_state(model, optimizer, schedule) == before


@linux
def test_an_error_of_the_step_comes_through():
    def step(batch):
        raise ZeroDivisionError("in the loss")

    with pytest.raises(ZeroDivisionError, match="in the loss") as raised:
        calibrate_quietly(step)
    assert "in step" in str(raised.value.__cause__)


@measured
def test_the_groundwater_costs_come_from_the_dataset():
    dataset = GWPatchDataset(small_data(), 6, 1)
    costs = dataset.patch_costs()

    def step(batch):
        np.ones((len(batch.indices), costs[batch.patch_id], 4000), np.uint8)

    plan = sampler(ids=dataset)
    budget = calibrate_quietly(step, plan, cost=dataset)
    assert budget.cost == {patch: float(cost) for patch, cost in costs.items()}
    assert budget.calibration["per_cost"] == pytest.approx(4000, rel=0.05)


@measured
def test_the_costs_of_the_samplers_own_budget_are_taken():
    plan = sampler(CostBudget(10_000, cost=POINTS))
    assert calibrate_quietly(allocating, plan, cost=None).cost == POINTS


@measured
def test_sizes_are_probed_and_chosen_within_the_bounds():
    sizes = []
    budget = calibrate_quietly(allocating, min_batch_size=3, multiple_of=4, max_batch_size=20)
    for point in (*budget.calibration["points"], *budget.calibration["verified"]):
        sizes.append(point["batch_size"])
    assert min(sizes) == 4
    assert max(sizes) == 20
    assert all(size % 4 == 0 for size in sizes)
    budget = calibrate_quietly(allocating, power_of_two=True)
    sizes = [point["batch_size"] for point in budget.calibration["points"]]
    assert all(size & (size - 1) == 0 for size in sizes)
    assert len(set(sizes)) > 3


@measured
def test_no_probe_is_foreseen_to_exceed_the_share():
    record = calibrate_quietly(
        allocating, memory_limit=limit_above(35, 0.95), share=0.95, over_budget="skip"
    ).calibration
    usable = 0.95 * record["memory_limit"]
    assert max(point["held"] + point["peak"] for point in record["points"]) < usable


def graph_and_grid(batch):
    """A step that takes something once for a patch, and something for each sample."""
    points = POINTS[batch.patch_id]
    graph = np.ones(points * 8000, np.uint8)
    grids = np.ones(len(batch.indices) * (600_000 + points * 300), np.uint8)
    return graph, grids


@measured
def test_what_a_patch_or_a_sample_takes_by_itself_is_fitted_where_that_is_needed(monkeypatch):
    monkeypatch.setattr(HostMeter, "measure_sequence", lambda self, batches: 0)
    budget = calibrate_quietly(graph_and_grid, memory_limit=limit_above(190, SHARE))
    record = budget.calibration
    assert record["fit"] == "affine"
    assert record["worst_residual"] < 0.1
    assert record["per_sample"] == pytest.approx(600_000, rel=0.1)
    assert record["per_patch"] == pytest.approx(8000, rel=0.2)
    assert record["per_cost"] == pytest.approx(300, rel=0.2)
    # Every patch's batches are what fits, though the parts have other proportions in each.
    usable = 0.9 * record["memory_limit"] - record["held"]
    plan = PatchBatchSampler(IDS, CostBudget(budget.max_cost, cost=budget.cost), seed=0).plan
    for (patch, points), size in zip(POINTS.items(), plan.sizes_by_patch, strict=True):
        peak = points * 8000 + size * (600_000 + points * 300)
        assert peak <= usable * 1.02, patch
        # All samples of a patch, or what fits.
        assert size in (400, 300, 350, 200) or peak > 0.9 * usable


@measured
def test_a_cost_that_describes_nothing_is_warned_of():
    def step(batch):
        np.ones(len(batch.indices) * {3: 40, 5: 1, 8: 9, 9: 3}[batch.patch_id] * 100_000, np.uint8)

    with pytest.warns(UserWarning, match="cost does not predict the memory of step.* is off by"):
        calibrate_quietly(step, memory_limit=limit_above(230, SHARE))


@measured
def test_the_warning_says_what_would_describe_it():
    with pytest.warns(UserWarning, match="pass fit='affine', which is off by at most [0-9]%"):
        calibrate_quietly(graph_and_grid, fit="proportional", memory_limit=limit_above(230, SHARE))


@measured
def test_a_dearest_batch_that_takes_more_than_foretold_makes_the_budget_smaller(monkeypatch):
    # What malloc has come to hold in this process is no matter here.
    monkeypatch.setattr(HostMeter, "measure_sequence", lambda self, batches: 0)

    def step(batch):
        cost = len(batch.indices) * POINTS[batch.patch_id]
        np.ones(int(cost * (128 if cost < 700_000 else 256)), np.uint8)

    with pytest.warns(UserWarning, match="does not predict"):
        budget = calibrate_quietly(step, memory_limit=limit_above(110, SHARE))
    record = budget.calibration
    verified = record["verified"]
    usable = record["share"] * record["memory_limit"]
    assert len(verified) > 1
    assert verified[0]["peak"] is None or verified[0]["held"] + verified[0]["peak"] > usable
    assert verified[-1]["held"] + verified[-1]["peak"] <= usable
    # No dozen of batches is made with a budget whose dearest does not fit.
    assert len(record["walks"]) == 1


@measured
def test_batches_in_a_row_that_hold_more_make_the_budget_smaller():
    leftovers = []

    def step(batch):
        allocating(batch)
        # What one batch leaves stays for the next three, as pieces in malloc do.
        leftovers.append(np.ones(len(batch.indices) * POINTS[batch.patch_id] * 16, np.uint8))
        del leftovers[:-8]

    budget = calibrate_quietly(step, memory_limit=limit_above(70, SHARE))
    peaks = budget.calibration["walks"]
    usable = 0.9 * budget.calibration["memory_limit"]
    assert len(peaks) > 1
    assert peaks[0] is None or peaks[0] > usable
    assert peaks[-1] <= usable


@measured
def test_memory_that_runs_out_while_probing_is_halved():
    def step(batch):
        if len(batch.indices) >= 100:
            raise MemoryError
        allocating(batch)

    record = calibrate_quietly(step, max_batch_size=99).calibration
    assert all(point["peak"] for point in record["points"])
    budget = calibrate_quietly(step)
    points = [p for p in budget.calibration["points"] if p["patch_id"] == 3]
    failed = [point["batch_size"] for point in points if point["peak"] is None]
    assert failed
    after = points[[point["peak"] for point in points].index(None) + 1 :]
    assert after == [] or after[0]["batch_size"] == failed[0] // 2
    assert max(sampler(budget).plan.sizes_by_patch) < 100


@linux
def test_a_step_that_fits_nowhere_is_an_error():
    with pytest.raises(RuntimeError, match=r"step ran out of memory in all .* raise memory_limit"):
        calibrate_quietly(raising_step(MemoryError))


def raising_step(error):
    def step(batch):
        raise error

    return step


@measured
def test_a_patch_that_cannot_fit_is_refused_or_skipped_as_told():
    points = {**POINTS, 9: 3_000_000}

    def step(batch):
        np.ones(len(batch.indices) * points[batch.patch_id] * 128, np.uint8)

    with pytest.raises(
        ValueError,
        match=r"memory_limit=.* is too small.*patch 9.*\. Raise memory_limit or share, .*'skip'",
    ):
        calibrate_quietly(step, cost=points)
    budget = calibrate_quietly(step, cost=points, over_budget="skip")
    with pytest.warns(UserWarning, match="over_budget='skip' leaves out 200 samples"):
        plan = sampler(budget).plan
    assert plan.sizes_by_patch[3] == 0


@measured
def test_a_step_that_takes_nothing_is_bounded_by_its_use(recwarn):
    budget = calibrate_quietly(lambda batch: None)
    assert budget.max_cost > 1e6
    assert not recwarn


# What is said


@measured
def test_the_table_is_printed_and_only_where_asked_for(capsys):
    calibrate_quietly(allocating)
    assert capsys.readouterr().out == ""
    budget = calibrate_quietly(allocating, progress=True)
    output = capsys.readouterr().out
    assert f"90% of {format_bytes(budget.calibration['memory_limit'])}" in output
    assert "tried" in output
    assert "line: " in output
    assert "B * cost * batch size; off by" in output
    verified = budget.calibration["verified"][-1]
    assert f"{verified['batch_size']:,}" in output


@measured
def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "fit.png"
    calibrate_quietly(allocating, picture=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


# Bad input


def unused_step(batch):
    raise AssertionError("the step must not run")


async def coroutine(batch):
    raise AssertionError


def generator(batch):
    yield from unused_step(batch)


def sampler_of_sample_costs():
    return sampler(CostBudget(10, sample_costs=np.ones(IDS.size)))


BAD = [
    ({"step": 3}, TypeError, "step must be a function of a batch, got 3"),
    ({"step": coroutine}, TypeError, "step must be a plain function, got a"),
    ({"step": generator}, TypeError, "step must be a plain function, got a"),
    (
        {"sampler": sampler_of_sample_costs(), "cost": None},
        ValueError,
        "sampler must not use sample_costs: calibration needs one cost per patch",
    ),
    ({"sampler": [1]}, TypeError, "sampler must be a PatchBatchSampler"),
    ({"share": 0}, ValueError, r"share must be in \(0, 1\], got 0"),
    ({"share": 1.01}, ValueError, r"share must be in \(0, 1\], got 1.01"),
    ({"share": math.nan}, ValueError, "share must be in"),
    ({"share": "all"}, TypeError, "share must be a number, got 'all'"),
    ({"memory_limit": 0}, ValueError, "memory_limit must be > 0 bytes"),
    ({"memory_limit": -5.0}, ValueError, "memory_limit must be > 0 bytes"),
    ({"memory_limit": "8 GB"}, TypeError, "memory_limit must be a number of bytes, got '8 GB'"),
    ({"memory_limit": True}, TypeError, "memory_limit must be a number"),
    (
        {"memory_limit": 1000},
        ValueError,
        r"too little memory: .* in use, but only .* may be used \(memory_limit=",
    ),
    ({"cost": None}, ValueError, "cost is missing: pass a mapping from patch ids"),
    ({"cost": {3: 1.0}}, ValueError, "cost must have a number for every patch, got none for 5"),
    ({"cost": {**POINTS, 3: 0}}, ValueError, "cost must be > 0"),
    ({"fit": "cubic"}, ValueError, "fit must be one of 'auto', 'proportional', 'affine'"),
    ({"state": 5}, TypeError, "state must be a tuple such as"),
    ({"state": (5,)}, TypeError, r"state\[0\] must have state_dict\(\) .* got 5"),
    ({"max_batch_size": 0}, ValueError, "max_batch_size must be >= 1, got 0"),
    ({"multiple_of": 3, "power_of_two": True}, ValueError, "multiple_of must be a power of two"),
    ({"over_budget": "drop"}, ValueError, "over_budget must be one of"),
    ({"progress": 1}, TypeError, "progress must be a bool"),
    ({"picture": 3}, TypeError, "picture must be a str"),
]


@linux
@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input_is_refused_before_anything_runs(wrong, error, message):
    arguments = {
        "step": unused_step,
        "sampler": sampler(),
        "cost": POINTS,
        "progress": False,
        **wrong,
    }
    with pytest.raises(error, match=message):
        calibrate(arguments.pop("step"), arguments.pop("sampler"), **arguments)


@linux
def test_a_picture_without_matplotlib_is_refused_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"picture needs matplotlib, .* pip install matplotlib"):
        calibrate_quietly(unused_step, picture=tmp_path / "fit.png")
    with pytest.raises(FileNotFoundError, match="picture must be in an existing folder"):
        calibrate_quietly(unused_step, picture=tmp_path / "no" / "fit.png")


@linux
@needs_torch
def test_state_that_cannot_be_put_back_is_refused():
    import torch

    with pytest.raises(ValueError, match=r"state\[0\] has uninitialized lazy parameters"):
        calibrate_quietly(unused_step, state=(torch.nn.Sequential(torch.nn.LazyLinear(3)),))
    shared = torch.nn.Linear(2, 2).share_memory()
    with pytest.raises(ValueError, match="state must not be in shared memory"):
        calibrate_quietly(unused_step, state=(shared,))
    with pytest.raises(ValueError, match="state must be on the CPU or CUDA, got meta"):
        calibrate_quietly(unused_step, state=(torch.nn.Linear(2, 2, device="meta"),))


def test_where_there_is_no_linux_that_is_said(monkeypatch):
    monkeypatch.setattr(forked_child.sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match=r"calibrate can measure .* only on Linux.*: darwin\)"):
        calibrate_quietly(unused_step, memory_limit=1e12)


@linux
def test_cuda_in_a_child_is_explained():
    with pytest.raises(RuntimeError, match="Pass CUDA models in state="):
        calibrate_quietly(
            raising_step(RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use"))
        )


# CUDA, by a device that only counts


FAKED_FUNCTIONS = (
    "mem_get_info",
    "memory_reserved",
    "memory_allocated",
    "max_memory_allocated",
    "reset_peak_memory_stats",
    "synchronize",
    "empty_cache",
)


@pytest.fixture
def few_objects():
    """Let garbage be looked for among what a test makes, and not among all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class FakeCuda:
    """Stands for torch.cuda: a step says what it holds; more than there is runs out."""

    def __init__(self, monkeypatch, total, baseline=50 * MIB):
        import torch

        self.torch, self.total = torch, total
        self.baseline = self.in_use = self.peak = baseline
        self.cache_clears = self.synchronized = 0
        for name in FAKED_FUNCTIONS:
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(memory_meter, "device_of", lambda plan, state: "cuda:0")

    def allocate(self, size):
        self.in_use += size
        if self.in_use > self.total:
            raise self.torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.peak = max(self.peak, self.in_use)

    def release(self):
        self.in_use = self.baseline

    def mem_get_info(self, device):
        return self.total - self.in_use, self.total

    def memory_reserved(self, device):
        return self.in_use

    def memory_allocated(self, device):
        return self.in_use

    def max_memory_allocated(self, device):
        return self.peak

    def reset_peak_memory_stats(self, device):
        self.peak = self.in_use

    def synchronize(self, device):
        self.synchronized += 1

    def empty_cache(self):
        self.cache_clears += 1
        self.in_use = self.baseline


def on_fake_cuda(cuda, fail_at=None, error=None):
    model, optimizer, schedule, step = torch_case()
    sizes = []

    def there(batch):
        sizes.append(len(batch.indices))
        small_batch = batch._replace(indices=batch.indices[:2])
        step(small_batch)
        if fail_at is not None and len(sizes) > fail_at:
            raise error
        cuda.allocate(5 * MIB + len(batch.indices) * POINTS[batch.patch_id] * 1000)
        cuda.release()

    return (model, optimizer, schedule), there, sizes


@pytest.mark.usefixtures("few_objects")
@needs_torch
@pytest.mark.parametrize("warm", [False, True])
def test_on_cuda_all_is_put_back_and_the_share_is_kept(monkeypatch, warm):
    cuda = FakeCuda(monkeypatch, 1000 * MIB)
    state, step, _ = on_fake_cuda(cuda)
    model, optimizer, _ = state
    if warm:
        step(batch_of(sampler().plan, 0, 2))
        assert optimizer.state
    model.eval()
    model[2].train()
    before = full_state(*state)
    groups = [id(group) for group in optimizer.param_groups]
    budget = calibrate_quietly(step, state=state, memory_limit=None)
    assert full_state(*state) == before
    assert [id(group) for group in optimizer.param_groups] == groups
    record = budget.calibration
    assert record["device"] == "cuda:0"
    assert record["memory_limit"] == 1000 * MIB
    assert record["per_cost"] == pytest.approx(1000, rel=0.01)
    assert record["fixed"] == pytest.approx(5 * MIB, rel=0.05)
    assert record["held"] == 50 * MIB
    verified = record["verified"][-1]
    assert 0.8 * 900 * MIB < verified["held"] + verified["peak"] <= 900 * MIB
    assert cuda.synchronized > 2 * len(record["points"])


@pytest.mark.usefixtures("few_objects")
@needs_torch
def test_on_cuda_running_out_is_a_finding(monkeypatch):
    cuda = FakeCuda(monkeypatch, 120 * MIB)
    state, step, _ = on_fake_cuda(cuda)
    before = full_state(*state)
    # A limit that is wrong: the device has less.
    budget = calibrate_quietly(step, state=state, memory_limit=4000 * MIB, share=1.0)
    assert full_state(*state) == before
    record = budget.calibration
    points = [*record["points"], *record["verified"]]
    failed = [point for point in points if point["peak"] is None]
    assert failed
    assert record["verified"][-1]["peak"] is not None
    assert cuda.cache_clears > len(failed)
    assert cuda.in_use == cuda.baseline


@pytest.mark.usefixtures("few_objects")
@needs_torch
def test_on_cuda_memory_that_libraries_take_at_first_is_no_ones(monkeypatch):
    cuda = FakeCuda(monkeypatch, 1000 * MIB)
    state, step, sizes = on_fake_cuda(cuda)

    def first_takes_more(batch):
        if not sizes:
            cuda.total -= 200 * MIB
        step(batch)

    budget = calibrate_quietly(first_takes_more, state=state, memory_limit=None)
    assert budget.calibration["memory_limit"] == 800 * MIB


@pytest.mark.usefixtures("few_objects")
@needs_torch
@pytest.mark.parametrize("after", [0, 1, 7])
def test_on_cuda_all_is_put_back_when_the_step_raises(monkeypatch, after):
    cuda = FakeCuda(monkeypatch, 1000 * MIB)
    state, step, sizes = on_fake_cuda(cuda, after, ZeroDivisionError("in the loss"))
    before = full_state(*state)
    with pytest.raises(ZeroDivisionError, match="in the loss"):
        calibrate_quietly(step, state=state, memory_limit=None)
    assert len(sizes) == after + 1
    assert full_state(*state) == before


@pytest.mark.usefixtures("few_objects")
@needs_torch
def test_everything_else_with_a_state_is_put_back(monkeypatch):
    import torch

    cuda = FakeCuda(monkeypatch, 1000 * MIB)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    generators = (
        torch.Generator().manual_seed(4),
        np.random.default_rng(4),
        random.Random(4),
    )
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))

    # As wrappers of optimizers keep counts on them.
    optimizer.steps = 3

    def step(batch):
        optimizer.steps += 1
        optimizer.zero_grad()
        scaler.scale((weight**2).sum()).backward()
        scaler.unscale_(optimizer)
        torch.rand(1, generator=generators[0])
        generators[1].random()
        generators[2].random()
        averaged.update_parameters(torch.nn.Linear(2, 2))
        # On one step in two it ends between unscale_ and update.
        cuda.allocate(len(batch.indices) * POINTS[batch.patch_id] * 1000)
        cuda.release()
        scaler.step(optimizer)
        scaler.update()

    def look():
        return (
            scaler.get_scale(),
            weight.detach().tolist(),
            weight.grad,
            (len(optimizer.state), optimizer.steps),
            generators[0].get_state().tolist(),
            generators[1].bit_generator.state,
            generators[2].getstate(),
            {name: value.tolist() for name, value in averaged.state_dict().items()},
        )

    before = look()
    cuda.total = 120 * MIB
    calibrate_quietly(
        step,
        state=(scaler, weight, optimizer, *generators, averaged),
        memory_limit=4000 * MIB,
        share=1.0,
    )
    assert look() == before


@pytest.mark.usefixtures("few_objects")
@needs_torch
def test_a_buffer_that_the_step_replaces_is_the_old_one_again(monkeypatch):
    import torch

    cuda = FakeCuda(monkeypatch, 1000 * MIB)
    model = torch.nn.Linear(2, 2)
    model.register_buffer("seen", torch.zeros(2))
    model.register_buffer("hidden", torch.ones(2), persistent=False)
    model.weight.grad = torch.full_like(model.weight, 7.0)

    def step(batch):
        model.seen = model.seen + 1
        model.hidden = None
        model.register_buffer("new", torch.ones(1))
        model.weight.grad = None
        model.bias.requires_grad_(False)
        allocating_on(cuda, batch)

    calibrate_quietly(step, state=(model,), memory_limit=None)
    assert model.seen.tolist() == [0, 0]
    assert model.hidden.tolist() == [1, 1]
    assert "new" not in dict(model.named_buffers())
    assert model.weight.grad.tolist() == [[7, 7], [7, 7]]
    assert model.bias.requires_grad


def allocating_on(cuda, batch):
    cuda.allocate(len(batch.indices) * POINTS[batch.patch_id] * 1000)
    cuda.release()


# On a GPU


@pytest.mark.gpu
def test_on_a_gpu_unseen_peaks_are_foretold_within_a_tenth_and_all_is_put_back(torch):
    model, optimizer, schedule, _ = torch_case()
    model.cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def step(batch):
        x = torch.rand(len(batch.indices) * POINTS[batch.patch_id], 6, device="cuda")
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.cuda.get_rng_state()
    limit = torch.cuda.memory_reserved() + (2 << 30)
    budget = calibrate_quietly(step, state=(model, optimizer, schedule), memory_limit=limit)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(optimizer.state) == 0
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    record = budget.calibration
    assert record["device"].startswith("cuda")
    fit = Fit(*(record[name] for name in Fit._fields))
    plan = sampler().plan
    meter = memory_meter.CudaMeter(step, plan, (model, optimizer, schedule), "cuda:0", limit)
    for group, size in ((0, 131), (1, 23), (2, 51), (3, 30)):
        predicted = float(fit.predict(float(list(POINTS.values())[group]), size))
        assert predicted == pytest.approx(meter.measure(group, size).peak, rel=0.1)
    verified = record["verified"][-1]
    assert verified["held"] + verified["peak"] <= 0.9 * limit


@pytest.mark.gpu
def test_a_gpu_that_runs_out_is_a_finding(torch):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * MIB) / total)
    weight = torch.nn.Parameter(torch.ones(8, device="cuda"))

    def step(batch):
        torch.ones(len(batch.indices) * POINTS[batch.patch_id] * 100, device="cuda")

    try:
        budget = calibrate_quietly(step, state=(weight,), memory_limit=float(total), share=1.0)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    points = [*budget.calibration["points"], *budget.calibration["verified"]]
    assert any(point["peak"] is None for point in points)
