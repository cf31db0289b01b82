"""Devices that are not there, and plans that are not on the host, as far as a CPU can show it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.core import arrays, devices
from gpusampler.core.devices import Device

torch = pytest.importorskip("torch")

GROUPS = PatchGroups.from_counts([5, 40, 3])


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_a_device_that_is_not_there_is_refused_at_once(name):
    module = getattr(torch, name, None)
    if module is not None and module.is_available():
        pytest.skip(f"{name} is there")
    with pytest.raises(RuntimeError, match=f"device='{name}' requested, but torch cannot use it"):
        PatchBatchSampler([1, 1, 2], 2, device=name)


def test_a_device_without_values_is_refused():
    with pytest.raises(ValueError, match="device must not be 'meta', which stores no data"):
        PatchBatchSampler([1, 1, 2], 2, device="meta")


def test_cpu_with_an_index_is_the_host():
    assert devices.parse_device("cpu:0") == devices.parse_device("cpu") == Device("torch", "cpu")


@pytest.mark.usefixtures("cpu_as_device")
class TestPlanElsewhere:
    def test_takes_what_the_host_takes(self):
        plan = EpochPlan(GROUPS, 4, 1, device="cpu")
        slots = np.arange(plan.num_batches)[::-1]
        expected = EpochPlan(GROUPS, 4, 1).evaluate(3, slots)
        for slot_argument in (slots, torch.from_numpy(slots.astype(np.int32)), slots.tolist()):
            result = plan.evaluate(3, slot_argument)
            for field, expected_field in zip(result, expected, strict=True):
                assert isinstance(field, torch.Tensor)
                np.testing.assert_array_equal(field.numpy(), expected_field)

    def test_refuses_what_the_host_refuses(self):
        plan = EpochPlan(GROUPS, 4, 1, device="cpu")
        with pytest.raises(TypeError, match="slots must be integers, got dtype float32"):
            plan.evaluate(0, torch.zeros(2))
        with pytest.raises(ValueError, match=r"slots must be 1-D, got shape \(1, 1\)"):
            plan.evaluate(0, torch.zeros((1, 1), dtype=torch.int64))

    def test_order_of_the_patches_is_uploaded_once(self, monkeypatch):
        plan = EpochPlan(GROUPS, 4, 1, interleave=False, device="cpu")
        slots = torch.arange(plan.num_batches)
        plan.evaluate(0, slots)
        sent = []
        original = arrays.upload
        monkeypatch.setattr(arrays, "upload", lambda *args: sent.append(args) or original(*args))
        plan.evaluate(0, slots)
        assert sent == []
        plan.evaluate(1, slots)
        assert len(sent) == 2

    @pytest.mark.parametrize("interleave", [True, False])
    def test_hands_out_the_same_batches(self, interleave):
        ids = np.random.default_rng(0).integers(0, 9, 500)
        sampler = PatchBatchSampler(ids, 8, seed=5, device="cpu", interleave=interleave)
        host = PatchBatchSampler(ids, 8, seed=5, interleave=interleave)
        assert list(sampler) == list(host)

    def test_a_worker_makes_them_on_the_host(self, monkeypatch):
        plan = EpochPlan(GROUPS, 4, 1, device="cpu")
        expected = EpochPlan(GROUPS, 4, 1).evaluate(0, [0, 1])
        monkeypatch.setattr(devices, "is_in_worker", lambda: True)
        result = pickle.loads(pickle.dumps(plan)).evaluate(0, [0, 1])
        for field, expected_field in zip(result, expected, strict=True):
            assert isinstance(field, np.ndarray)
            np.testing.assert_array_equal(field, expected_field)


def test_a_tensor_batch_takes_only_itself_along():
    batch = next(iter(PatchBatchSampler([1] * 5000, 8, seed=0, output="tensor")))
    assert batch.untyped_storage().nbytes() == 8 * 8


def test_two_epochs_of_patch_order_are_kept():
    plan = EpochPlan(PatchGroups.from_counts([3] * 50), 2, 0, interleave=False)
    first = plan.evaluator.host.patch_order(0)
    plan.evaluator.host.patch_order(1)
    assert plan.evaluator.host.patch_order(0) is first
    plan.evaluator.host.patch_order(2)
    plan.evaluator.host.patch_order(3)
    second = plan.evaluator.host.patch_order(0)
    assert second is not first
    np.testing.assert_array_equal(second[0], first[0])


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([2**64], ValueError, "ids must fit in int64, got 18446744073709551616"),
        ([2**63, -1], ValueError, "ids must fit in int64, got 9223372036854775808"),
        (np.array([1, 2**63], np.uint64), ValueError, "ids must fit in int64, got 9223372036854"),
        (torch.tensor([1, 2**63], dtype=torch.uint64), ValueError, "ids must fit in int64, got 92"),
        (np.ma.array([1, 2], mask=[0, 1]), ValueError, "ids must have a value .* in sample 1"),
        ([[1], [1, 2]], ValueError, "ids must be a 1-D array of int64 integers"),
    ],
)
def test_ids_that_cannot_be(ids, error, text):
    with pytest.raises(error, match=text):
        PatchBatchSampler(ids, 2)


def test_wide_spans_need_no_wide_tables():
    ids = np.random.default_rng(0).choice(np.arange(100) * 10_000, 1_000_000)
    groups = PatchGroups.from_ids(ids)
    np.testing.assert_array_equal(groups.order, np.argsort(ids, kind="stable"))
    np.testing.assert_array_equal(groups.patch_ids, np.arange(100) * 10_000)


class TestDefaultDevice:
    """Where a dataset's batches are made; the sampler may be made before a process forks."""

    @pytest.fixture
    def two_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    @pytest.mark.usefixtures("two_gpus")
    def test_is_found_out_without_cuda_being_initialised(self, monkeypatch):
        def initialises():
            raise AssertionError("this initialises CUDA, and no fork may use it any more")

        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "current_device", initialises)
        # On a build without CUDA this would only ask; elsewhere it may initialise.
        monkeypatch.setattr(torch.cuda, "is_available", initialises)
        assert devices.default_device() == Device("torch", "cuda:0")
        # Ranks of one machine will each take a GPU of their own; or see only that one.
        for local_rank, device in (("1", "cuda:1"), ("2", "cuda:0"), ("x", "cuda:0")):
            monkeypatch.setenv("LOCAL_RANK", local_rank)
            assert devices.default_device() == Device("torch", device)

    @pytest.mark.usefixtures("two_gpus")
    def test_is_the_gpu_that_the_process_uses(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        assert devices.default_device() == Device("torch", "cuda:1")

    @pytest.mark.usefixtures("two_gpus")
    def test_is_the_host_in_a_worker(self, monkeypatch):
        monkeypatch.setattr(devices, "is_in_worker", lambda: True)
        assert devices.default_device() == devices.HOST

    def test_is_the_host_where_there_is_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        assert devices.default_device() == devices.HOST
