"""Memory of a GPU, mapped indexes and profiles."""

from __future__ import annotations

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.core import memory
from gpusampler.core.devices import Device

pytestmark = pytest.mark.gpu

IDS = np.random.default_rng(5).integers(0, 300, 200_000)
EXPECTED = list(PatchBatchSampler(IDS, 64, seed=1))


def test_a_mapped_index_on_a_gpu_gives_the_same_batches(torch, tmp_path):
    groups = PatchGroups.from_ids(torch.from_numpy(IDS).cuda(), path=tmp_path / "ids.index")
    assert groups.device.on_host
    sampler = PatchBatchSampler(groups, 64, seed=1, device="cuda")
    assert list(sampler) == EXPECTED
    assert next(sampler.batches(0)).indices.is_cuda


def test_a_profile_says_what_travels_and_what_a_gpu_holds(torch):
    sampler = PatchBatchSampler(torch.from_numpy(IDS).cuda(), 64, seed=1)
    tensor = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    with sampler.profile() as profile:
        assert list(sampler) == EXPECTED
    rows = {row.name: row for row in profile.rows}
    assert rows["evaluate"].seconds > 0
    assert rows["transfer"].seconds > 0
    assert sum(row.share for row in profile.rows) == pytest.approx(1, abs=0.02)
    assert profile.device_peak_bytes >= tensor.nbytes
    assert any(name.startswith("cuda") for name in sampler.stats().table_bytes)


def test_ranges_are_seen_by_the_profiler_beside_kernels(torch):
    sampler = PatchBatchSampler(torch.from_numpy(IDS).cuda(), 64, seed=1)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        list(sampler)
    seen = {event.key for event in trace.key_averages()}
    assert {"gpusampler.evaluate", "gpusampler.transfer", "gpusampler.hand_out"} <= seen


def test_free_memory_is_what_the_driver_and_the_pool_have(torch):
    device = Device("torch", f"cuda:{torch.cuda.current_device()}")
    before = memory.free_bytes(device)
    assert 0 < before <= torch.cuda.get_device_properties(0).total_memory
    # Larger than what tests in other processes give back meanwhile.
    tensor = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    assert before - memory.free_bytes(device) >= tensor.nbytes // 2


@pytest.mark.parametrize("left", [0, 1 << 20])
def test_a_gpu_that_is_really_full(torch, left):
    ids = torch.from_numpy(IDS).cuda()
    torch.cuda.empty_cache()
    # What this process may take of the GPU is cut to what it has, and very little.
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + left) / total)
    try:
        with pytest.warns(UserWarning, match="not enough memory on .* to sort|has run out"):
            batches = list(PatchBatchSampler(ids, 64, seed=1))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert batches == EXPECTED
