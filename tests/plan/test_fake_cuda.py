"""torch's CUDA paths without a GPU: nothing waits, all is on one device, launches are few."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups, PatchTensorLoader

if not find_spec("torch") or not find_spec("triton"):
    pytest.skip("torch or triton is not installed", allow_module_level=True)

import torch

from support.fake_cuda import (
    DEVICE,
    DOWNLOAD,
    KERNEL,
    OPERATION,
    UPLOAD,
    WAIT,
    Entry,
    FakeCuda,
    fake_cuda,
)
from support.paths import SUPPORT
from support.processes import run_python

# Kernels and array operations on the device, at most: of a block of batches whose slots are on the
# device, and of a call of a cursor.
LAUNCHES = {
    "interleaved": (1, 1),
    "sizes by patch": (1, 1),
    "cost bins": (1, 1),
    # The order of the epoch's patches, and the batches.
    "in a row": (2, 2),
    "balanced": (1, 1),
    "same patch": (1, 1),
    "weights": (1, 1),
    "costliest first": (1, 1),
    "fewer slots than patches": (1, 1),
}
COMPILED_LAUNCHES = {name: launches + 1 for name, (launches, _) in LAUNCHES.items()}
"""Of a call of a cursor that inductor has compiled, at most: its own kernel moves the counters."""
LAUNCHES_A_GATHER = 1
"""Array operations per block of a loader whose one tensor is on the device."""

COUNTS = np.array([40, 2000, 3000, 33, 1500, 7])
IDS = np.random.default_rng(0).permutation(np.repeat(np.arange(COUNTS.size), COUNTS))
SIZES = {0: 8, 1: 100, 2: 64, 3: 3, 4: 33, 5: 2}
COSTS = [1, 2, 3, 4, 5, 6]
SETTINGS: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "sizes by patch": {"batch_size": SIZES},
    "cost bins": {"batch_size": CostBudget(400, sample_costs=IDS + 1, max_batch_size=64)},
    "in a row": {"interleave": False},
    "balanced": {"steps": "balanced", "step_width": 4},
    "same patch": {"steps": "same_patch", "step_width": 4},
    "weights": {"epoch_batches": 200},
    "costliest first": {"costliest_first": True, "step_width": 4, "patch_costs": COSTS},
    "fewer slots than patches": {"epoch_batches": 4},
}
every_plan = pytest.mark.parametrize("name", LAUNCHES)


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as cuda:
        yield cuda


@pytest.fixture(params=["contiguous", "gathered"])
def groups(request) -> PatchGroups:
    return groups_of(request.param)


def groups_of(layout: str) -> PatchGroups:
    return PatchGroups.from_ids(np.sort(IDS) if layout == "contiguous" else IDS)


def plan_of(name: str, groups: PatchGroups) -> EpochPlan:
    settings = {"batch_size": 64, **SETTINGS[name]}
    return EpochPlan(groups, settings.pop("batch_size"), 3, device=DEVICE, **settings)


def sampler_of(name: str, groups: PatchGroups) -> PatchBatchSampler:
    settings = {"batch_size": 64, **SETTINGS[name]}
    return PatchBatchSampler(groups, settings.pop("batch_size"), seed=3, device=DEVICE, **settings)


def check(log: list[Entry]) -> Counter[str]:
    """Nothing made the host wait, and everything ran on the one device; return counts by kind."""
    waits = [entry.name for entry in log if entry.kind == WAIT]
    assert not waits, waits
    for entry in log:
        if entry.kind == KERNEL:
            assert entry.current_device == 1, "the kernel would be launched on another device"
        if entry.kind in (KERNEL, OPERATION):
            assert entry.devices == {DEVICE}, entry
    return Counter(entry.kind for entry in log)


def run(cuda: FakeCuda, function: Callable[[], Any]) -> Counter[str]:
    cuda.take()
    function()
    return check(cuda.take())


def exhaust(batches: Any) -> None:
    deque(batches, maxlen=0)


@every_plan
def test_launches_of_a_block(cuda, groups, name):
    plan = plan_of(name, groups)
    slots = torch.zeros(plan.num_batches, dtype=torch.int64, device=DEVICE)
    run(cuda, lambda: plan.evaluate(0, slots))
    for epoch in (0, 1):
        counts = run(cuda, lambda epoch=epoch: plan.evaluate(epoch, slots))
        assert 1 <= counts[KERNEL] + counts[OPERATION] <= LAUNCHES[name][0]
        assert counts[UPLOAD] == 0


@pytest.mark.filterwarnings("ignore:every row of a cursor has")
@every_plan
def test_launches_of_a_call_of_a_cursor(cuda, groups, name):
    cursor = sampler_of(name, groups).cursor()
    for _ in range(3):
        counts = run(cuda, cursor)
        assert 1 <= counts[KERNEL] + counts[OPERATION] <= LAUNCHES[name][1]
        assert counts[UPLOAD] + counts[DOWNLOAD] == 0


@every_plan
def test_iteration_over_batches_on_the_device(cuda, groups, name):
    sampler = sampler_of(name, groups)
    exhaust(sampler.batches())
    counts = run(cuda, lambda: exhaust(sampler.batches()))
    # What is on the host goes over in one piece per launch.
    assert counts[KERNEL] == LAUNCHES[name][0] * counts[UPLOAD] > 0
    assert counts[OPERATION] + counts[DOWNLOAD] == 0


@every_plan
def test_iteration_over_a_loader_of_a_tensor_on_the_device(cuda, groups, name):
    sampler = sampler_of(name, groups)
    loader = PatchTensorLoader(sampler, x=torch.empty((IDS.size, 3), device=DEVICE))
    exhaust(loader)
    counts = run(cuda, lambda: exhaust(loader))
    assert counts[KERNEL] == LAUNCHES[name][0] * counts[UPLOAD] > 0
    assert counts[OPERATION] <= LAUNCHES_A_GATHER * counts[KERNEL]
    assert counts[DOWNLOAD] == 0


@pytest.mark.slow("inductor compiles a step, in a process of its own")
@pytest.mark.parametrize("name", [name for name in LAUNCHES if "batch_size" not in SETTINGS[name]])
def test_launches_of_a_compiled_step(name, tmp_path):
    script, settings = SUPPORT / "inductor_launches.py", json.dumps(SETTINGS[name])
    variables = {"TRITON_INTERPRET": None, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    launched = json.loads(run_python(script, settings, **variables).stdout)
    assert 1 <= len(launched) <= COMPILED_LAUNCHES[name], launched


class TestRecord:
    """What would be a fault is recorded, and `check` notices."""

    @pytest.mark.parametrize(
        "read", [int, bool, lambda x: x.tolist(), lambda x: torch.empty(3, device=DEVICE)[x]]
    )
    def test_a_value_that_the_host_reads(self, cuda, read):
        tensor = torch.zeros((), dtype=torch.int64, device=DEVICE)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            read(tensor)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            check(cuda.take())

    @pytest.mark.parametrize("non_blocking", [False, True])
    @pytest.mark.parametrize("pinned", [False, True])
    def test_a_copy_waits_unless_it_is_asynchronous_and_pinned(self, cuda, pinned, non_blocking):
        source = torch.empty(3, pin_memory=pinned)
        source.to(DEVICE, non_blocking=non_blocking)
        torch.empty(6, device=DEVICE)[3:].copy_(source, non_blocking=non_blocking)
        source.copy_(torch.empty(3, device=DEVICE), non_blocking=non_blocking)
        is_fine = pinned and non_blocking
        expected = [UPLOAD, UPLOAD, DOWNLOAD] if is_fine else [WAIT] * 3
        assert [entry.kind for entry in cuda.take()] == expected

    def test_a_stream_that_the_host_waits_for(self, cuda):
        torch.cuda.current_stream(DEVICE).synchronize()
        with pytest.raises(AssertionError, match="synchronize"):
            check(cuda.take())

    def test_operands_on_two_devices(self, cuda):
        torch.zeros(3, device=DEVICE) + torch.zeros(())
        with pytest.raises(AssertionError, match="add"):
            check(cuda.take())

    def test_an_array_on_the_current_device(self, cuda):
        torch.zeros(3, device="cuda")
        with pytest.raises(AssertionError, match="cuda:0"):
            check(cuda.take())

    def test_a_kernel_on_the_current_device(self, cuda, monkeypatch):
        plan = plan_of("interleaved", groups_of("contiguous"))
        slots = torch.zeros(plan.num_batches, dtype=torch.int64, device=DEVICE)
        monkeypatch.setattr(torch.cuda, "device", lambda device: cuda.device("cuda:0"))
        plan.evaluate(0, slots)
        with pytest.raises(AssertionError, match="launched on another device"):
            check(cuda.take())

    def test_views_and_memory_are_no_operations(self, cuda):
        tensor = torch.empty((4, 3), dtype=torch.int64, device=DEVICE)
        rows = tensor[1:, None, ..., 0].reshape(-1)
        assert rows.shape == (3,)
        assert cuda.take() == []
        assert tensor[rows].shape == (3, 3)
        tensor[0] = 1
        tensor[1] = tensor[2]
        assert [entry.name for entry in cuda.take()] == ["index", "fill_", "copy_"]
