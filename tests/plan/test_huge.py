"""Plans of 1e9 to 1e12 samples, given by counts: random slots, since nobody can see them all."""

from __future__ import annotations

import tracemalloc
from time import process_time

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.permutation.reference import PURPOSE_BATCHES, PURPOSE_SAMPLES, derive_key
from support.strategies import grid_preimage

TOP = (1 << 31) - 1


def batch_of(plan: EpochPlan, slots: np.ndarray, epoch: int) -> np.ndarray:
    """Running number, over all patches, of the batches that slots lead to."""
    location = plan.evaluator.locate(epoch, slots)
    return (np.cumsum(plan.batches_by_patch) - plan.batches_by_patch)[location.group] + location.j


@pytest.mark.parametrize(
    ("counts", "batch_size"),
    [
        ([10**9] * 1000, 7),  # M = 1.4e11
        ([10**9] * 1000, 1),  # M = 1e12
        ([TOP, TOP, 2], 1),  # M = 2**32, the last that fits 32-bit lanes
        ([TOP, TOP, 3], 1),  # M = 2**32 + 1
        ([TOP], 64),
        ([1, 33, 2000, 70_000, TOP, 5 * 10**8], 100),
    ],
)
def test_random_slots_are_valid_and_distinct(library, counts, batch_size):
    plan = EpochPlan(PatchGroups.from_counts(counts), batch_size, 11, device=library.device)
    total = plan.num_batches
    assert total == sum(-(-count // batch_size) for count in counts)
    rng = np.random.default_rng(7)
    slots = np.unique(np.concatenate([rng.integers(0, total, 3000), [0, 1, total - 2, total - 1]]))
    rng.shuffle(slots)
    block = plan.evaluate(3, slots)
    indices, lengths, groups = map(library.host, block)
    offsets = plan.groups.offsets
    assert (indices >= offsets[groups][:, None]).all()
    assert (indices < offsets[groups + 1][:, None]).all()
    valid = np.concatenate([row[:n] for row, n in zip(indices, lengths, strict=True)])
    assert np.unique(valid).size == valid.size
    reference = plan.evaluator.block_by_arrays(3, library.array(slots))
    for part, expected in zip(
        map(library.host, reference), (indices, lengths, groups), strict=True
    ):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize(
    ("counts", "batch_size"), [([10**9] * 1000, 7), ([TOP, TOP, 2], 1), ([TOP, TOP, 3], 1)]
)
def test_the_way_back_leads_from_every_batch_to_its_slot(counts, batch_size):
    plan = EpochPlan(PatchGroups.from_counts(counts), batch_size, 2**63 + 5)
    total = plan.num_batches
    slots = np.random.default_rng(1).integers(0, total, 500)
    slots = np.concatenate([slots, [0, 1, 2**31 - 1, 2**31, total - 1]])
    key = derive_key(plan.seed, PURPOSE_BATCHES, 12, 0)
    recovered = [grid_preimage(batch, total, key) for batch in batch_of(plan, slots, 12).tolist()]
    assert recovered == slots.tolist()


def test_the_way_back_leads_from_every_sample_to_its_place():
    plan = EpochPlan(PatchGroups.from_counts([5, TOP]), 50, 4)
    slots = np.random.default_rng(2).integers(0, plan.num_batches, 40)
    locations, block = plan.evaluator.locate(6, slots), plan.evaluate(6, slots)
    key = derive_key(4, PURPOSE_SAMPLES, 6, 1)
    checked = 0
    for row, group, j in zip(
        block.indices.tolist(), locations.group, locations.j.tolist(), strict=True
    ):
        if group == 1:
            positions = [grid_preimage(sample - 5, TOP, key) for sample in row]
            assert positions == [(j * 50 + k) % TOP for k in range(50)]
            checked += 1
    assert checked > 30


def test_slots_do_not_cluster():
    # The mean of uniform numbers, within five standard deviations.
    plan = EpochPlan(PatchGroups.from_counts([10**9] * 1000), 7, 0)
    batches = batch_of(plan, np.arange(20_000), 0) / plan.num_batches
    assert abs(batches.mean() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5
    assert abs(np.corrcoef(batches[:-1], batches[1:])[0, 1]) < 5 / 20_000**0.5


def test_a_sampler_of_a_trillion_starts_and_resumes_anywhere():
    groups = PatchGroups.from_counts([10**9] * 1000)
    tracemalloc.start()
    sampler = PatchBatchSampler(groups, 10, seed=3)
    iterator = iter(sampler)
    first = [next(iterator) for _ in range(3)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert len(sampler) == 10**11
    assert first == sampler.plan.evaluate(0, [0, 1, 2]).indices.tolist()
    state = {**sampler.state_dict(), "slot": 10**11 - 2}
    sampler.load_state_dict(state)
    remaining = list(iter(sampler))  # list(sampler) would make room for len(sampler)
    assert remaining == sampler.plan.evaluate(0, [10**11 - 2, 10**11 - 1]).indices.tolist()


@pytest.mark.parametrize("num_replicas", [1, 7])
@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
def test_coverage_of_huge_patches_takes_no_memory_of_their_size(num_replicas, partial):
    groups = PatchGroups.from_counts([10**7 + 3, 10**7 + 1])
    sampler = PatchBatchSampler(
        groups, 10, seed=0, partial=partial, num_replicas=num_replicas, rank=0
    )
    tracemalloc.start()
    totals = sampler.coverage(0).totals()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert totals["counts"] == 2 * 10**7 + 4
    assert totals["batches"] == len(sampler) * num_replicas
    assert peak < 10_000_000


@pytest.mark.serial("measures time")
def test_one_large_patch_does_not_slow_down_all_the_small_ones():
    def seconds(sizes: list[int]) -> float:
        sampler = PatchBatchSampler(PatchGroups.from_counts(sizes), 50_000, seed=0)
        start = process_time()
        assert sum(1 for _ in sampler) >= 20_000
        return process_time() - start

    small = [3] * 20_000
    alone = max(min(seconds(small) for _ in range(3)), 1e-3)
    assert min(seconds([100_000, *small]) for _ in range(2)) < 10 * alone
