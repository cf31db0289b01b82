"""torch on CUDA, CuPy and both kernels make the batches that NumPy makes, for every setting.

Without a GPU, torch's CPU plays the device and Triton's interpreter the kernel, for small patches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.core import arrays, devices
from gpusampler.core.devices import Device
from gpusampler.plan.evaluators import device as device_module
from support.kernels import is_interpreted, kernel_evaluator_of
from support.libraries import has_cupy_cuda, has_torch_cuda

SEEDS = (0, 1 << 31, 1 << 63, (1 << 64) - 1)
EPOCHS = (0, 1, 1 << 31, (1 << 32) + 5, (1 << 63) - 2)
DTYPES = ("int64", "int32", "int16")
NUM_SLOTS = 200
NUM_BATCHES = 100

# Smallest and largest patch, number of patches, and batch size. Both sizes occur, so that a mix is
# one form of a kernel.
MIXES = {
    "few": (2, 5, 40, 2),
    "small": (1, 32, 300, 5),
    "one": (100, 100, 1, 10),
    "slots": (33, 100, 3, 16),
    "medium": (33, 1000, 60, 7),
    "mixed": (1, 2000, 40, 48),
    "large": (1024, 5000, 12, 64),
    "wide": (1024, 70_000, 5, 256),
}

BALANCED = {"steps": "balanced", "step_width": 8}
SAME_PATCH = {"steps": "same_patch", "step_width": 3}
IN_A_ROW = {"interleave": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "in a row": IN_A_ROW,
    "drop": {"partial": "drop"},
    "pad": {"partial": "pad"},
    "even": {"partial": "even"},
    "min_partial": {"min_partial": 2},
    "even, min_partial": {"partial": "even", "min_partial": 2},
    "samples in order": {"shuffle_within_batches": False},
    "batches in order": {"shuffle_patches": False},
    "balanced": BALANCED,
    "balanced, by costs, pad": {**BALANCED, "patch_costs": True, "partial": "pad"},
    "same patch": SAME_PATCH,
    "same patch, drop": {**SAME_PATCH, "uneven": "drop"},
    "same patch, in a row": {**SAME_PATCH, **IN_A_ROW},
    "costliest first": {"costliest_first": True, "step_width": 4, "patch_costs": True},
    "costliest first, balanced": {**BALANCED, "costliest_first": True, "patch_costs": True},
    "weights": {"weights": True},
    "weights, some 0": {"weights": 0},
    "weights, some 0, even": {"weights": 0, "partial": "even"},
    "weights, in a row": {"weights": True, **IN_A_ROW},
    "weights, balanced": {"weights": True, **BALANCED},
    "weights, same patch": {"weights": True, **SAME_PATCH},
    "fewer batches than patches": {"epoch_batches": True},
    "sizes by patch": {"batch_size": "by patch"},
    "sizes by patch, weights": {"batch_size": "by patch", "weights": True},
    "budget": {"batch_size": "budget"},
    "budget, balanced": {"batch_size": "budget", **BALANCED},
    "cost bins": {"batch_size": "cost bins"},
    "cost bins, weights, even": {"batch_size": "cost bins", "weights": True, "partial": "even"},
}


class Case(NamedTuple):
    """A plan's arguments; ids are None where the samples of a patch are contiguous."""

    counts: np.ndarray
    ids: np.ndarray | None
    batch_size: Any
    seed: int
    epoch: int
    settings: dict[str, Any]

    def groups(self, device: str) -> PatchGroups:
        if self.ids is None:
            return PatchGroups.from_counts(self.counts)
        return PatchGroups.from_ids(arrays.to_device(self.ids, devices.parse_device(device)))

    def sampler(self, groups: PatchGroups, device: str) -> PatchBatchSampler:
        sampler = PatchBatchSampler(
            groups, self.batch_size, seed=self.seed, device=device, **self.settings
        )
        sampler.set_epoch(self.epoch)
        return sampler


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings about samples that a plan leaves out or repeats, and about wide rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".* (leaves? out|makes batches|row of a cursor)", category=UserWarning
        )
        yield


def make_case(mix: str, name: str, gathered: bool) -> tuple[Case, np.random.Generator]:
    """Return a case, the same one in every run, and a generator to draw its slots with."""
    rng = np.random.default_rng([list(SETTINGS).index(name), list(MIXES).index(mix), gathered])
    smallest, largest, patches, batch_size = MIXES[mix]
    counts = rng.integers(smallest, largest + 1, patches)
    counts[[0, -1]] = smallest, largest
    settings: dict[str, Any] = dict(SETTINGS[name])
    ids = patch_ids = None
    if gathered:
        dtype = DTYPES[rng.integers(len(DTYPES))]
        bounds = np.iinfo(dtype)
        names = rng.integers(bounds.min, bounds.max, 4 * patches, dtype=np.int64)
        patch_ids = np.sort(rng.permutation(np.unique(names))[:patches])
        ids = rng.permutation(np.repeat(patch_ids, counts)).astype(dtype)
    sizes: Any = settings.pop("batch_size", batch_size)
    if sizes == "by patch":
        keys = range(patches) if patch_ids is None else patch_ids.tolist()
        sizes = dict(zip(keys, rng.integers(1, batch_size + 1, patches).tolist(), strict=True))
    elif sizes == "budget":
        sizes = CostBudget(4.0 * batch_size, cost=rng.uniform(1, 4, patches))
    elif sizes == "cost bins":
        sizes = CostBudget(8.0 * batch_size, sample_costs=rng.choice([1.0, 3, 8], counts.sum()))
    if settings.get("patch_costs"):
        settings["patch_costs"] = rng.choice([0.5, 1, 1.05, 7], patches)
    if "weights" in settings:
        weights = rng.choice([0.1, 1, 30], patches)
        if not settings["weights"]:
            weights[1::2] = 0
        settings |= {"weights": weights, "epoch_batches": 1000}
    elif "epoch_batches" in settings:
        settings["epoch_batches"] = max(1, patches // 3)
    seed, epoch = SEEDS[rng.integers(len(SEEDS))], EPOCHS[rng.integers(len(EPOCHS))]
    return Case(counts, ids, sizes, seed, epoch, settings), rng


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
