"""CuPy on several GPUs: everything runs on the device of the arrays, whatever is current."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.core import arrays, devices
from gpusampler.core.devices import Device
from gpusampler.core.transfer import ReadyArrays
from gpusampler.plan.evaluators import device as device_module
from support import fake_cupy
from support.fake_cupy import WrongDeviceError
from support.optional_torch import torch

DEVICE = Device("cupy", "1")
IDS = np.random.default_rng(2).integers(-20, 20, 5000)
SETTINGS = [
    {},
    {"interleave": False},
    {"partial": "even"},
    {"steps": "balanced", "step_width": 4},
    {"steps": "same_patch", "step_width": 4},
    {"epoch_batches": 70},
    {"epoch_batches": 13},
    {"costliest_first": True, "step_width": 2},
]


@pytest.fixture(autouse=True)
def cupy(monkeypatch):
    """Two GPUs without a kernel; device 0 is current."""
    monkeypatch.setattr(device_module, "kernel_evaluator_on", lambda *args: None)
    with fake_cupy.two_gpus(monkeypatch) as module:
        yield module


def on_device(values) -> fake_cupy.Array:
    return fake_cupy.Array(np.asarray(values), 1)


def check(array, expected) -> None:
    assert arrays.device_of(array) == DEVICE
    np.testing.assert_array_equal(array.get(), expected)


def test_the_fake_notices_another_current_device(cupy):
    for use in (
        lambda a: a[a],
        lambda a: a + 1,
        lambda a: a.copy(),
        arrays.namespace(DEVICE).sort,
    ):
        with pytest.raises(WrongDeviceError, match="device 0 reads an array of 1"):
            use(on_device([0, 1]))
    with pytest.raises(TypeError, match="Unsupported type"):
        arrays.namespace(DEVICE).sort(np.arange(3))
    assert arrays.device_of(cupy.arange(3)) == Device("cupy", "0")


def test_array_functions_run_where_their_array_is():
    check(arrays.repeat_rows(on_device([2, 0, 3]), 5), [0, 0, 2, 2, 2])
    check(arrays.stable_argsort(on_device([3, 1, 3, 1])), [1, 3, 0, 2])
    check(arrays.as_contiguous(on_device(np.arange(6))[::2]), [0, 2, 4])
    check(arrays.take_rows(on_device([5, 6, 7]), on_device([2, 0])), [7, 5])
    for values, runs, counts in (([4, 4, 2, 4], [4, 2, 4], [2, 1, 1]), ([], [], [])):
        found = arrays.unique_consecutive(on_device(np.array(values, np.int64)))
        check(found[0], runs)
        check(found[1], counts)


def test_torch_waits_for_the_stream_of_the_device_of_an_array(monkeypatch):
    current = []

    def from_dlpack(array):
        current.append(fake_cupy.Device.current)
        return SimpleNamespace(to=lambda name: name)

    monkeypatch.setattr(torch.utils.dlpack, "from_dlpack", from_dlpack)
    assert arrays.to_device(on_device([1]), Device("torch", "cuda:0")) == "cuda:0"
    assert current == [1]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_ids_of_the_host_are_grouped_on_the_device_that_is_named(kind):
    host = PatchGroups.from_ids(IDS)
    ids = IDS if kind == "numpy" else torch.tensor(IDS)
    sampler = PatchBatchSampler(ids, 8, seed=1, device="cupy:1")
    groups = sampler.plan.groups
    assert sampler.stats().grouped_on == "cupy:1"
    check(groups.order, host.order)
    np.testing.assert_array_equal(groups.patch_ids, host.patch_ids)
    assert groups.fingerprint == host.fingerprint
    assert groups.samples_of(3).tolist() == host.samples_of(3).tolist()
    assert PatchBatchSampler(np.sort(IDS), 8, device="cupy:1").plan.groups.order is None


def test_ids_of_a_subset_stay_on_the_device():
    data = pytest.importorskip("torch.utils.data")

    class Samples:
        patch_ids = on_device(IDS)

        def __len__(self) -> int:
            return IDS.size

        def __getitem__(self, i):
            raise AssertionError("no sample is read")

    indices = range(1, 5000, 3)
    sampler = PatchBatchSampler(data.Subset(Samples(), indices), 8, seed=1)
    assert sampler.plan.device == DEVICE
    check(sampler.plan.groups.order, PatchGroups.from_ids(IDS[1::3]).order)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_batches_are_evaluated_on_the_device(settings):
    host = PatchBatchSampler(IDS, 8, seed=1, device="numpy", **settings)
    sampler = PatchBatchSampler(IDS, 8, seed=1, device="cupy:1", **settings)
    for batch, expected in zip(sampler.batches(2), host.batches(2), strict=True):
        check(batch.indices, expected.indices)
    slots = np.arange(host.plan.num_batches)[::-1]
    expected_block = host.plan.evaluate(2, slots)
    for field, expected_field in zip(sampler.plan.evaluate(2, slots), expected_block, strict=True):
        check(field, expected_field)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_slots_may_be_on_the_device(dtype):
    slots = np.arange(40, dtype=dtype)
    host = EpochPlan(PatchGroups.from_ids(IDS), 8, 1)
    plan = EpochPlan(PatchGroups.from_ids(IDS), 8, 1, device=DEVICE)
    block = plan.evaluate(2, on_device(slots)[::2])
    for field, expected in zip(block, host.evaluate(2, slots[::2]), strict=True):
        check(field, expected)


def test_patches_of_cost_bins_are_found_on_the_device():
    costs = np.random.default_rng(0).integers(1, 100, IDS.size).astype(float)
    budget = CostBudget(400, sample_costs=costs)
    host = EpochPlan(PatchGroups.from_ids(IDS), budget, 1)
    plan = EpochPlan(PatchGroups.from_ids(IDS), budget, 1, device=DEVICE)
    assert host.tables.patch_of_bin is not None
    for field, expected in zip(plan.evaluate(2, [5, 3]), host.evaluate(2, [5, 3]), strict=True):
        check(field, expected)


class TestPerThreadStream:
    """CuPy gives the per-thread default streams of all threads the same pointer."""

    @pytest.fixture
    def ready(self, cupy):
        cupy.cuda.stream = fake_cupy.Stream(2)
        return ReadyArrays(DEVICE, [])

    def test_every_thread_waits(self, cupy, ready):
        for _ in range(2):
            # The stream of another thread.
            cupy.cuda.stream = fake_cupy.Stream(2)
            ready.wait()
            assert cupy.cuda.stream.waited == [("event", 2)]

    def test_other_streams_wait_once(self, cupy, ready):
        cupy.cuda.stream = fake_cupy.Stream(4)
        ready.wait()
        ready.wait()
        assert cupy.cuda.stream.waited == [("event", 2)]


def test_a_plan_is_moved_between_devices():
    plan = EpochPlan(PatchGroups.from_ids(IDS), 8, 1, device=DEVICE)
    here = plan.on("cupy:0")
    assert here.device == Device("cupy", "0")
    np.testing.assert_array_equal(
        here.evaluate(0, [3]).indices.get(), plan.evaluate(0, [3])[0].get()
    )
    devices.synchronize(DEVICE)
