"""torch on CUDA, CuPy and both kernels make the batches that NumPy makes, for every setting.

Without a GPU, torch's CPU plays the device and Triton's interpreter the kernel, for small patches.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.core import arrays
from gpusampler.core.devices import Device
from gpusampler.plan.evaluators import device as device_module
from support.identity_cases import MIXES, SETTINGS, Case, make_case, quiet
from support.kernels import is_interpreted, kernel_evaluator_of
from support.libraries import has_cupy_cuda, has_torch_cuda

NUM_SLOTS = 200
NUM_BATCHES = 100


def play_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's CPU be a device, with Triton's interpreter for its kernels."""
    if not is_interpreted():
        pytest.skip("Triton is not installed, or compiles for the GPU that is there")

    def kernel_evaluator_on(tables, device, settings):
        if device.library == "numpy":
            return None
        return kernel_evaluator_of(tables, device, settings, "triton")

    monkeypatch.setattr(Device, "on_host", property(lambda device: device.library == "numpy"))
    monkeypatch.setattr(device_module, "kernel_evaluator_on", kernel_evaluator_on)


def check_groups(found: PatchGroups, wanted: PatchGroups) -> None:
    for name in ("patch_ids", "counts", "starts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    assert found.fingerprint == wanted.fingerprint
    assert found.source_size == wanted.source_size
    if wanted.order is None:
        assert found.order is None
    else:
        np.testing.assert_array_equal(arrays.to_numpy(found.order), wanted.order)


def check_block(found: Any, wanted: Any, what: str) -> None:
    for name, part, desired in zip(wanted._fields, found, wanted, strict=True):
        part = arrays.to_numpy(part)
        assert part.dtype == desired.dtype, (what, name)
        np.testing.assert_array_equal(part, desired, err_msg=f"{what}: {name}")


def check_plan(plan: EpochPlan, host: EpochPlan, case: Case, rng: np.random.Generator) -> None:
    total = host.num_batches
    assert plan.num_batches == total
    # In any order, repeated, and at both ends.
    slots = np.append(rng.integers(0, total, min(total, NUM_SLOTS)), [0, total - 1])
    device_slots = arrays.to_device(slots, plan.device)
    wanted = host.evaluate(case.epoch, slots)
    check_block(plan.evaluate(case.epoch, device_slots), wanted, "kernel")
    check_block(plan.evaluator.block_by_arrays(case.epoch, device_slots), wanted, "arrays")
    narrow = plan.evaluate(case.epoch, device_slots, dtype="int32")
    check_block(narrow, host.evaluate(case.epoch, slots, dtype="int32"), "int32")


def check_iteration(found: PatchBatchSampler, wanted: PatchBatchSampler) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(
        islice(found.batches(), NUM_BATCHES), islice(wanted.batches(), NUM_BATCHES), strict=True
    ):
        assert (ours.patch_id, ours.valid) == (theirs.patch_id, theirs.valid)
        np.testing.assert_array_equal(arrays.to_numpy(ours.indices), theirs.indices)
    assert list(islice(found, NUM_BATCHES)) == list(islice(wanted, NUM_BATCHES))


def check_cursor(sampler: PatchBatchSampler, host: EpochPlan, epoch: int) -> None:
    """Single steps through the end of an epoch; a cursor is torch's."""
    cursor, total = sampler.cursor(), host.num_batches
    first = max(total - 2, 0)
    cursor.seek(epoch, first)
    for step in range(first, first + 4):
        wanted = host.evaluate(epoch + step // total, [step % total])
        for name, part, desired in zip(wanted._fields, cursor(), wanted, strict=True):
            part = part.cpu().numpy().reshape(desired[0].shape)
            np.testing.assert_array_equal(part, desired[0], err_msg=f"cursor: {name}")


@pytest.mark.parametrize("mix", MIXES)
def test_every_case_is_a_plan(mix):
    """A GPU, once it is there, is not asked for what no plan can be."""
    for name in SETTINGS:
        for gathered in (False, True):
            case, _ = make_case(mix, name, gathered)
            with quiet():
                host = case.sampler(case.groups("numpy"), "numpy")
            assert host.plan.num_batches > 0
            # Patches of 2 to 5 samples are too small to be divided.
            is_divided = host.plan.tables.patch_of_bin is not None
            assert is_divided == (name.startswith("cost bins") and mix != "few")


@pytest.mark.parametrize(
    ("device", "mix"),
    [
        ("cpu", "few"),
        *(
            pytest.param(device, mix, marks=pytest.mark.gpu)
            for device in ("cuda", "cupy")
            for mix in MIXES
        ),
    ],
)
@pytest.mark.parametrize("name", SETTINGS)
def test_batches_are_those_of_numpy(monkeypatch, device, mix, name):
    if device == "cpu":
        play_device(monkeypatch)
        # The interpreter is slow, so patches are no larger than they must be.
        mix = "one" if name.startswith("cost bins") else mix
    elif not (has_torch_cuda() if device == "cuda" else has_cupy_cuda()):
        pytest.skip(f"{device} is not installed or sees no CUDA device")
    for gathered in (False, True):
        case, rng = make_case(mix, name, gathered)
        host_groups, device_groups = case.groups("numpy"), case.groups(device)
        check_groups(device_groups, host_groups)
        with quiet():
            host = case.sampler(host_groups, "numpy")
            sampler = case.sampler(device_groups, device)
            check_plan(sampler.plan, host.plan, case, rng)
            check_iteration(sampler, host)
            if device != "cupy" and case.epoch < (1 << 62):
                check_cursor(sampler, host.plan, case.epoch)
        assert sampler.plan.evaluator.device_evaluator().has_kernel
