"""Which evaluation a plan on a device takes: the kernel's, or array operations where it fails.

Torch's "cpu" counts as a device here, and the kernel on it is one that is broken on purpose, or
Triton's in its interpreter.
"""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.core import devices
from gpusampler.plan.evaluators import device as device_module
from gpusampler.plan.evaluators.kernels.fused import KernelEvaluator
from gpusampler.plan.evaluators.kernels.kernel_spec import triton_geometry
from support.kernels import TRITON, device_of_kernel, kernel_evaluator_of
from support.strategies import ragged_of, rows_of

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("cpu_as_device")

GROUPS = PatchGroups.from_counts([5, 40, 3])
SLOTS = np.arange(12)
HOST_PLAN = EpochPlan(GROUPS, 4, 1)


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(device_module, "_warned", set())


def launching(monkeypatch, launch) -> None:
    """Give every plan a kernel that does this."""

    def kernel_evaluator_on(tables, device, shuffles):
        return KernelEvaluator(tables, device, shuffles, launch, launch, triton_geometry)

    monkeypatch.setattr(device_module, "kernel_evaluator_on", kernel_evaluator_on)


def raising(*errors: BaseException | None):
    """A launch that raises one error after the other; None for a launch that does nothing."""
    remaining = list(errors)

    def launch(form, geometry, args):
        error = remaining.pop(0)
        if error is not None:
            raise error

    launch.left = remaining
    return launch


def there(seed: int = 1) -> EpochPlan:
    return EpochPlan(GROUPS, 4, seed, device="cpu")


def assert_block_of_the_host(plan: EpochPlan, epoch: int = 0) -> None:
    for actual, desired in zip(
        plan.evaluate(epoch, SLOTS), HOST_PLAN.evaluate(epoch, SLOTS), strict=True
    ):
        assert isinstance(actual, torch.Tensor)
        np.testing.assert_array_equal(actual.numpy(), desired)


def assert_ragged_of_the_host(plan: EpochPlan) -> None:
    actual, desired = (ragged_of(which, 0, SLOTS) for which in (plan, HOST_PLAN))
    assert isinstance(actual.samples, torch.Tensor)
    assert rows_of(actual) == rows_of(desired)


FAILED = "the kernel for cpu could not be built; .*: RuntimeError: no compiler$"


def test_a_kernel_that_cannot_be_built_is_given_up_with_one_warning(monkeypatch):
    launch = raising(*[RuntimeError("no\ncompiler")] * 2)
    launching(monkeypatch, launch)
    plan = there()
    with pytest.warns(UserWarning, match=FAILED) as warned:
        assert_block_of_the_host(plan)
    assert len(warned) == 1
    # Whatever is said from here on is an error. This plan does not try again,
    assert_block_of_the_host(plan, epoch=1)
    assert_ragged_of_the_host(plan)
    assert len(launch.left) == 1
    # another one does, and says nothing.
    assert_ragged_of_the_host(there())
    assert launch.left == []


def test_a_kernel_whose_library_is_not_there_is_given_up_with_one_warning(monkeypatch):
    def kernel_evaluator_on(*_):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(device_module, "kernel_evaluator_on", kernel_evaluator_on)
    plan = there()
    with pytest.warns(UserWarning, match="ImportError: No module named 'triton'") as warned:
        assert_block_of_the_host(plan)
    assert len(warned) == 1
    for asked in (plan, there()):
        assert_ragged_of_the_host(asked)
        assert not asked.evaluator.device_evaluator().has_kernel


def test_an_error_without_words_is_named(monkeypatch):
    launching(monkeypatch, raising(RuntimeError()))
    with pytest.warns(UserWarning, match="RuntimeError: $"):
        assert_block_of_the_host(there())


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.cuda.OutOfMemoryError("no room")], ids=lambda e: type(e).__name__
)
def test_running_out_of_memory_is_no_reason_to_give_the_kernel_up(monkeypatch, error):
    launching(monkeypatch, raising(error))
    plan = there()
    # The host goes on instead, with one warning that is of memory and not of the kernel.
    with pytest.warns(UserWarning, match="cpu has run out of memory") as warned:
        result = plan.evaluate(0, SLOTS)
    assert len(warned) == 1
    for actual, desired in zip(result, HOST_PLAN.evaluate(0, SLOTS), strict=True):
        np.testing.assert_array_equal(actual.numpy(), desired)
    assert device_module._warned == set()


@pytest.mark.parametrize(
    "evaluate", [EpochPlan.evaluate, ragged_of], ids=["evaluate", "evaluate_ragged"]
)
def test_a_kernel_that_has_run_may_not_fail(monkeypatch, evaluate):
    launching(monkeypatch, raising(None, RuntimeError("illegal memory access")))
    plan = there()
    evaluate(plan, 0, SLOTS)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        evaluate(plan, 0, SLOTS)
    assert plan.evaluator.device_evaluator().has_kernel


def test_an_interrupt_is_no_failure(monkeypatch):
    launching(monkeypatch, raising(KeyboardInterrupt()))
    plan = there()
    with pytest.raises(KeyboardInterrupt):
        plan.evaluate(0, SLOTS)
    assert plan.evaluator.device_evaluator().has_kernel


def test_what_a_device_has_no_kernel_for_is_done_by_array_operations():
    plan = there()
    assert_block_of_the_host(plan)
    assert_ragged_of_the_host(plan)
    assert not plan.evaluator.device_evaluator().has_kernel


def test_larger_blocks_are_made_at_once_where_a_kernel_makes_them(monkeypatch):
    without = there().evaluator.block_samples
    launching(monkeypatch, raising())
    assert HOST_PLAN.evaluator.block_samples < without < there().evaluator.block_samples


@pytest.mark.parametrize("kind", [TRITON])
class TestThroughAKernel:
    """Plans and samplers whose batches a working kernel makes."""

    @pytest.fixture(autouse=True)
    def working(self, monkeypatch, kind):
        self.launches = 0
        self.device = device_of_kernel(kind)

        def kernel_evaluator_on(tables, device, shuffles):
            result = kernel_evaluator_of(tables, device, shuffles, kind)
            launch = result._launch

            def counted(*args):
                self.launches += 1
                launch(*args)

            result._launch = counted
            return result

        monkeypatch.setattr(device_module, "kernel_evaluator_on", kernel_evaluator_on)

    @pytest.mark.parametrize("interleave", [True, False])
    def test_a_plan_evaluates(self, interleave):
        plan = EpochPlan(GROUPS, 4, 1, interleave=interleave, device=self.device)
        expected = EpochPlan(GROUPS, 4, 1, interleave=interleave).evaluate(3, SLOTS, "int32")
        for actual, desired in zip(plan.evaluate(3, SLOTS, "int32"), expected, strict=True):
            assert str(actual.dtype).endswith(str(desired.dtype))
            np.testing.assert_array_equal(actual.cpu().numpy(), desired)
        assert self.launches == 1

    @pytest.mark.parametrize("interleave", [True, False])
    def test_a_plan_makes_one_batch_of_tensors(self, interleave):
        plan = EpochPlan(GROUPS, 4, 1, interleave=interleave, device=self.device)
        expected = EpochPlan(GROUPS, 4, 1, interleave=interleave).evaluate(2**40, [7])
        numbers = (torch.tensor(value, device=self.device.name) for value in (2**40, 7))
        for actual, desired in zip(plan.evaluator.batch(*numbers), expected, strict=True):
            assert actual.tolist() == desired[0].tolist()
        assert self.launches == 1

    @pytest.mark.parametrize(
        "given",
        [
            {"partial": "keep"},
            {"partial": "pad"},
            {"partial": "keep", "interleave": False},
            {"partial": "pad", "interleave": False},
            {"partial": "even"},
            {"costliest_first": True},
            {"epoch_batches": 2},
            {"weights": [1, 0, 2]},
        ],
        ids=str,
    )
    def test_a_sampler_hands_out_the_batches_of_the_host(self, given):
        ids = np.random.default_rng(0).permutation(np.repeat([4, -1, 9], [4, 40, 20]))
        settings = {"seed": 5, **given}
        for output in ("list", "numpy", "tensor"):
            actual, desired = (
                PatchBatchSampler(ids, 8, device=device, output=output, **settings)
                for device in (self.device.name, "numpy")
            )
            for mine, its in zip(actual, desired, strict=True):
                assert type(mine) is type(its)
                assert np.array_equal(mine, its)
            assert self.launches > 0
            self.launches = 0
        for mine, its in zip(actual.batches(epoch=2), desired.batches(epoch=2), strict=True):
            assert mine.indices.device.type == self.device.name.split(":")[0]
            assert mine.indices.tolist() == its.indices.tolist()
            assert (mine.patch_id, mine.valid) == (its.patch_id, its.valid)
        assert self.launches > 0

    def test_a_cursor_runs_from_epoch_to_epoch(self):
        ids = np.random.default_rng(0).integers(0, 2, 60)
        cursor = PatchBatchSampler(ids, 9, seed=5, device=self.device.name).cursor()
        host = PatchBatchSampler(ids, 9, seed=5, device="numpy").plan
        for epoch in range(2):
            block = host.evaluate(epoch, np.arange(host.num_batches))
            for indices, length, group in zip(*block, strict=True):
                result = cursor()
                assert result.indices.tolist() == indices.tolist()
                assert (int(result.valid), int(result.group)) == (length, group)
        assert self.launches == 2 * host.num_batches


def test_the_warning_keeps_what_a_compiler_says_last(monkeypatch):
    text = "at 3:4:\n" + "code\n" * 500 + "Loop-carried variable has another type"
    launching(monkeypatch, raising(RuntimeError(text)))
    with pytest.warns(
        UserWarning, match=r"RuntimeError: at 3:4: code .* has another type$"
    ) as warned:
        assert_block_of_the_host(there())
    assert len(str(warned[0].message)) < 800


def test_another_reason_is_another_warning(monkeypatch):
    launching(monkeypatch, raising(RuntimeError("one"), RuntimeError("two")))
    for reason in ("one", "two"):
        with pytest.warns(UserWarning, match=f"RuntimeError: {reason}$"):
            assert_block_of_the_host(there())


def test_where_the_warning_is_an_error_no_use_falls_back_silently(monkeypatch):
    launching(monkeypatch, raising(*[RuntimeError("no compiler")] * 3))
    plan = there()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the kernel for")
        for asked in (plan, plan, there()):
            with pytest.raises(UserWarning, match="no compiler"):
                assert_block_of_the_host(asked)


def test_a_library_that_ends_its_own_import_is_given_up_too(monkeypatch):
    def kernel_evaluator_on(*_):
        raise TypeError("jit() got an unexpected keyword argument")

    monkeypatch.setattr(device_module, "kernel_evaluator_on", kernel_evaluator_on)
    with pytest.warns(UserWarning, match="TypeError: jit"):
        assert_block_of_the_host(there())


def test_tables_are_shared_by_plans_of_other_seeds(cpu_as_device):
    plan = there()
    plan.evaluate(0, [0])
    other = plan.with_seed(99)
    assert other.evaluator._device_evaluator is plan.evaluator._device_evaluator
    expected = EpochPlan(plan.groups, plan.batch_size, 99).evaluate(0, [0, 1])
    for actual, desired in zip(other.evaluate(0, [0, 1]), expected, strict=True):
        np.testing.assert_array_equal(actual.numpy(), desired)
    assert plan.on("numpy").evaluator._device_evaluator is None


def test_a_forked_worker_is_told_that_it_cannot_read_the_order(cpu_as_device, monkeypatch):
    ids = torch.tensor([3, 1, 3, 1, 2])
    sampler = PatchBatchSampler(ids, 2, seed=0, device="cpu")
    monkeypatch.setattr(devices, "is_in_worker", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"Forked workers cannot read the samples' order on cpu\. Use device='n"
    ):
        next(iter(sampler))
    # One that was sent to a worker has its order on the host.
    assert len(list(pickle.loads(pickle.dumps(sampler)))) == 3
