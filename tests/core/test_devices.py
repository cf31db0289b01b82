"""Devices that are not there, and plans that are not on the host, as far as a CPU can show it."""

from __future__ import annotations

import ctypes
import pickle
import warnings
from types import SimpleNamespace

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
    def test_is_the_host_in_a_worker(self, monkeypatch):
        monkeypatch.setattr(devices, "is_in_worker", lambda: True)
        assert devices.default_device() == devices.HOST

    def test_is_the_host_where_there_is_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        assert devices.default_device() == devices.HOST


class Nvml:
    """libnvidia-ml, as far as it is asked; ``failing`` returns an error."""

    def __init__(self, driver=13000, failing=""):
        self.driver, self.failing = driver, failing

    def __getattr__(self, name):
        def call(*args):
            if name == self.failing:
                return 999
            if name == "nvmlSystemGetCudaDriverVersion_v2":
                args[0]._obj.value = self.driver
            else:
                assert name == "nvmlInit"
            return 0

        return call


@pytest.fixture
def cuda(monkeypatch):
    """torch as it was built for CUDA 13.2, on a machine with two GPUs; nothing is initialized."""
    state = SimpleNamespace(nvml=Nvml(), available=True, error=None, initialized=False)
    state.capability = (9, 0)

    def initialize():
        if state.error is not None:
            raise state.error
        state.initialized = True

    def initializing(value):
        def ask(*args):
            initialize()
            return value() if callable(value) else value

        return ask

    def open_library(name):
        assert name == "libnvidia-ml.so.1"
        if state.nvml is None:
            raise OSError(name)
        return state.nvml

    for name, function in {
        "init": initialize,
        "is_initialized": lambda: state.initialized,
        "device_count": lambda: 2,
        # All of these keep forked children from using CUDA.
        "is_available": lambda: state.available and initializing(True)(),
        "current_device": initializing(1),
        "get_device_capability": initializing(lambda: state.capability),
        "get_arch_list": initializing(["sm_75", "sm_90"]),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.__config__, "show", initializing(""))
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(ctypes, "CDLL", open_library)
    caches = devices._host_instead_of, devices._default_fault
    for cached in caches:
        cached.cache_clear()
    yield state
    for cached in caches:
        cached.cache_clear()


DATASET = [{"patch_id": i % 3} for i in range(9)]
OLD_DRIVER = "its driver supports CUDA 12.4, and torch was built for CUDA 13.2"
NO_CODE = r"its compute capability is 7.0, and torch was built for sm_75, sm_90"
FORKED = RuntimeError("Cannot re-initialize CUDA in forked subprocess.")


class TestADeviceThatCannotBeUsed:
    def test_a_usable_one_is_the_default_and_nothing_is_initialized(self, cuda, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = PatchBatchSampler(DATASET, 2)
            iter(sampler)
            len(sampler)
        assert sampler.plan.device == Device("torch", "cuda:1")
        assert not cuda.initialized

    def test_an_old_driver_leaves_the_host_with_one_warning(self, cuda):
        cuda.nvml = Nvml(driver=12040)
        with pytest.warns(UserWarning, match="device='auto' uses the host") as said:
            samplers = [PatchBatchSampler(DATASET, 2) for _ in range(2)]
        assert [str(warning.message) for warning in said] == [
            f"device='auto' uses the host instead of cuda:0: {OLD_DRIVER}"
        ]
        assert said[0].filename == __file__
        assert samplers[0].plan.device == samplers[1].plan.device == devices.HOST
        assert not cuda.initialized

    @pytest.mark.parametrize("fault", ["architecture", "initialization"])
    def test_what_shows_at_the_first_batch_leaves_the_host_with_one_warning(self, cuda, fault):
        reason = NO_CODE
        if fault == "architecture":
            cuda.capability = (7, 0)
        else:
            cuda.error, reason = FORKED, rf"CUDA cannot be initialized \({FORKED}\)"
        samplers = [PatchBatchSampler(DATASET, 2, seed=0) for _ in range(2)]
        assert samplers[0].plan.device == Device("torch", "cuda:0")
        host = PatchBatchSampler(DATASET, 2, seed=0, device="numpy")
        with pytest.warns(UserWarning, match=f"'auto' uses .* of cuda:0: {reason}$") as said:
            batches = [list(sampler) for sampler in samplers]
        assert len(said) == 1
        assert said[0].filename == __file__
        assert batches[0] == batches[1] == list(host)
        for _ in range(2):
            for batch, expected in zip(samplers[0].batches(), host.batches(), strict=True):
                assert isinstance(batch.indices, np.ndarray)
                np.testing.assert_array_equal(batch.indices, expected.indices)
        assert samplers[0].plan.device == devices.HOST

    def test_a_worker_initializes_nothing(self, cuda, monkeypatch):
        sampler = PatchBatchSampler(DATASET, 2, seed=0)
        monkeypatch.setattr(devices, "is_in_worker", lambda: True)
        assert len(list(sampler)) == 6
        assert not cuda.initialized

    def test_a_warning_that_is_an_error_stays_one(self, cuda):
        cuda.nvml = Nvml(driver=12040)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                with pytest.raises(UserWarning, match=OLD_DRIVER):
                    devices.default_device()

    def test_a_default_that_is_in_use_is_checked_at_once(self, cuda):
        cuda.initialized, cuda.nvml, cuda.capability = True, None, (7, 5)
        assert devices.default_device() == Device("torch", "cuda:1")
        devices._default_fault.cache_clear()
        cuda.capability = (7, 0)
        with pytest.warns(UserWarning, match=f"instead of cuda:1: {NO_CODE}"):
            assert devices.default_device() == devices.HOST

    @pytest.mark.parametrize(
        "nvml",
        [
            None,
            Nvml(driver=12040, failing="nvmlInit"),
            Nvml(driver=12040, failing="nvmlSystemGetCudaDriverVersion_v2"),
            Nvml(driver=13020),
            Nvml(driver=14000),
        ],
    )
    def test_what_is_new_or_not_known_is_nothing_against_a_driver(self, cuda, nvml):
        cuda.nvml = nvml
        assert devices.default_device() == Device("torch", "cuda:0")

    def test_versions_of_rocm_are_not_compared(self, cuda, monkeypatch):
        cuda.nvml, cuda.capability = Nvml(driver=12040), (7, 0)
        monkeypatch.setattr(torch.version, "cuda", None)
        assert devices.default_device() == Device("torch", "cuda:0")
        assert devices.parse_device("cuda") == Device("torch", "cuda:1")

    def test_one_that_was_asked_for_raises(self, cuda):
        with pytest.raises(RuntimeError, match="torch finds 2 CUDA device"):
            PatchBatchSampler([1, 1, 2], 2, device="cuda:2")
        assert devices.parse_device("cuda") == Device("torch", "cuda:1")
        cuda.capability = (7, 0)
        expected = f"device='cuda' requested, but torch cannot use it: {NO_CODE}. Check"
        with pytest.raises(RuntimeError, match=expected):
            PatchBatchSampler([1, 1, 2], 2, device="cuda")

    def test_one_that_was_asked_for_in_a_fork_raises(self, cuda, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        cuda.error = FORKED
        expected = rf"device='cuda:0' requested, but .*cannot be initialized \({FORKED}\)"
        with pytest.raises(RuntimeError, match=expected):
            devices.parse_device("cuda:0")

    def test_one_that_was_asked_for_and_is_not_available_raises(self, cuda):
        cuda.available, cuda.nvml = False, Nvml(driver=12040)
        expected = f"device='cuda' requested, but torch finds no CUDA .* can use: {OLD_DRIVER}. Che"
        with pytest.raises(RuntimeError, match=expected):
            PatchBatchSampler([1, 1, 2], 2, device="cuda")
        cuda.nvml = None
        with pytest.raises(
            RuntimeError, match=r"'cuda' requested, but torch finds no CUDA device\."
        ):
            PatchBatchSampler([1, 1, 2], 2, device="cuda")

    @pytest.mark.parametrize(
        ("capability", "architectures", "runs"),
        [
            ((9, 0), ["sm_90"], True),
            ((9, 0), ["sm_90a"], True),
            ((8, 9), ["sm_86"], True),
            ((8, 0), ["sm_86"], False),
            ((8, 0), ["compute_86"], False),
            ((12, 0), ["sm_90", "sm_100"], False),
            ((12, 0), ["sm_75", "compute_90"], True),
            ((10, 0), ["sm_100"], True),
            ((7, 0), ["sm_75", "compute_75"], False),
        ],
    )
    def test_machine_code_runs_within_a_major_version_and_ptx_later(
        self, capability, architectures, runs
    ):
        assert (devices._architecture_fault(capability, architectures) is None) == runs
