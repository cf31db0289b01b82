"""Plans on the host, in C and in NumPy, are the oracle's, however their batches are asked for."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.core.tracing import Recorder
from gpusampler.plan.evaluators.native import SlotEvaluator
from gpusampler.sampler import batches as batches_module
from gpusampler.sampler.batches import BlockReader, locate_slots
from gpusampler.sampler.passes import RankShard
from gpusampler.sampler.state import remaining_steps
from support import oracle
from support.cases import cases, short_batch_cases, whole
from support.strategies import epochs, patchy_ids, rows_of, seeds

PLAIN = [{}, {}, {"interleave": False}]


@st.composite
def plain_cases(draw):
    """Cases whose slots the compiled module locates itself."""
    ids = draw(patchy_ids())
    sizes = oracle.Settings(
        draw(st.sampled_from([1, 2, 5, 16, 17, 64, 100])),
        draw(st.sampled_from(["keep", "drop", "pad", "even"])),
        shuffle_patches=draw(st.sampled_from([True, True, False])),
        shuffle_within_batches=draw(st.sampled_from([True, True, False])),
    )._replace(**draw(st.sampled_from(PLAIN)))
    return ids, sizes


def read_all(shard: RankShard) -> list[tuple[int, list[int], int]]:
    """The group, samples and number of samples that count, of each batch that a rank reads."""
    reader = BlockReader(shard)
    batches = []
    while (block := reader.read()) is not None:
        rows = zip(block.groups.tolist(), rows_of(block), block.lengths.tolist(), strict=True)
        batches += rows
    return batches


@settings(max_examples=150)
@given(st.one_of(cases(), short_batch_cases()), epochs)
def test_every_plan_is_the_oracles(host_form, case, epoch):
    expected = oracle.epoch(case.ids.tolist(), case.seed, epoch, case.oracle)
    plan = case.plan
    assert whole(plan, epoch) == expected
    reference = plan.evaluator.block_by_arrays(epoch, np.arange(plan.num_batches))
    for actual, desired in zip(
        plan.evaluate(epoch, range(plan.num_batches)), reference, strict=True
    ):
        np.testing.assert_array_equal(actual, desired)


@settings(max_examples=150)
@given(plain_cases(), seeds, epochs, st.data())
def test_ranks_read_their_slots(host_form, case, seed, epoch, data):
    ids, given_settings = case
    counts = np.unique(ids, return_counts=True)[1].tolist()
    if not any(map(len, oracle.own_batches(counts, given_settings))):
        return
    plan = EpochPlan(
        PatchGroups.from_ids(ids),
        given_settings.batch_size,
        seed,
        interleave=given_settings.interleave,
        partial=given_settings.partial,
        shuffle_patches=given_settings.shuffle_patches,
        shuffle_within_batches=given_settings.shuffle_within_batches,
    )
    assert SlotEvaluator.can_evaluate(plan.tables)
    expected = oracle.epoch(ids.tolist(), seed, epoch, given_settings)
    patch_ids = plan.groups.patch_ids.tolist()
    num_replicas = data.draw(st.integers(1, 5))
    rank = data.draw(st.integers(0, num_replicas - 1))
    slot = data.draw(st.integers(0, plan.num_batches))
    repeats_count = data.draw(st.booleans())
    uneven = data.draw(st.sampled_from(["pad", "drop"]))
    steps = remaining_steps(slot, plan.num_batches, num_replicas, uneven)
    shard = RankShard(plan, epoch, slot, steps, num_replicas, rank, repeats_count, Recorder())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "FIRST_BLOCK_SAMPLES", data.draw(st.integers(1, 300)))
        patch.setattr(batches_module, "MAX_LOCATED_SLOTS", data.draw(st.integers(1, 30)))
        batches = read_all(shard)
    slots = [slot + step * num_replicas + rank for step in range(steps)]
    assert [(patch_ids[group], samples) for group, samples, _ in batches] == [
        expected[s % plan.num_batches] for s in slots
    ]
    if slots:
        lengths = locate_slots(shard, np.array(slots)).length
        assert [length for _, _, length in batches] == lengths.tolist()


def test_iteration_evaluates_slots_in_c(host_form, monkeypatch):
    """The way that the figures on speed are of is the one taken."""
    expected = 1 if host_form == "C" else 0
    calls = []
    evaluate = SlotEvaluator.evaluate
    monkeypatch.setattr(
        SlotEvaluator, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k)
    )
    sampler = PatchBatchSampler(np.arange(1000) % 7, 8, seed=0)
    list(sampler)
    assert len(calls) == expected
    # Passes over weighted patches are located by NumPy, and their samples permuted in C.
    weighted = PatchBatchSampler(np.arange(1000) % 7, 8, seed=0, weights=[1] * 7)
    list(weighted)
    assert len(calls) == expected


def test_copies_of_an_evaluator_build_their_own_tables():
    ids = np.random.default_rng(0).integers(0, 5, 500)
    sampler = PatchBatchSampler(ids, 8, seed=3)
    expected = [list(sampler), list(sampler)]
    copied = pickle.loads(pickle.dumps(sampler))
    copied.set_epoch(0)
    assert [list(copied), list(copied)] == expected
    other = sampler.plan.with_seed(4)
    assert whole(other, 0) == whole(EpochPlan(sampler.plan.groups, 8, 4), 0)
    assert whole(sampler.plan, 0) == whole(EpochPlan(sampler.plan.groups, 8, 3), 0)


def test_patch_orders_of_several_epochs(host_form):
    """Each epoch's order of patches reaches the compiled module, in any order of asking."""
    plan = EpochPlan(PatchGroups.from_counts([5, 9, 1, 30]), 4, seed=1, interleave=False)
    expected = {epoch: whole(plan, epoch) for epoch in range(4)}
    assert len({str(batches) for batches in expected.values()}) == 4
    for epoch in (3, 0, 0, 2, 1, 3):
        assert whole(plan, epoch) == expected[epoch]
        block = plan.evaluate(epoch, range(plan.num_batches))
        samples = [
            row[:length] for row, length in zip(block.indices.tolist(), block.lengths, strict=True)
        ]
        assert samples == [samples for _, samples in expected[epoch]]


def test_threads_that_read_different_epochs(host_form):
    """A thread keeps the tables that its call reads, whatever another thread asks for meanwhile."""
    plan = EpochPlan(PatchGroups.from_counts([3000] * 40), 4, seed=1, interleave=False)
    slots = np.arange(plan.num_batches)
    expected = {epoch: plan.evaluate(epoch, slots).indices.copy() for epoch in range(4)}
    copied = pickle.loads(pickle.dumps(plan))

    def read(epoch: int) -> bool:
        return all(
            np.array_equal(copied.evaluate(epoch, slots).indices, expected[epoch]) for _ in range(5)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_one_patch_of_huge_batches_does_not_enlarge_the_blocks_of_others(host_form):
    groups = PatchGroups.from_counts([300_000, 4000])
    plan = EpochPlan(groups, {0: 150_000, 1: 4}, seed=0, shuffle_patches=False)
    shard = RankShard(plan, 0, 0, plan.num_batches, 1, 0, True, Recorder())
    reader = BlockReader(shard)
    sizes = []
    while (block := reader.read()) is not None:
        sizes.append((block.sizes.max(), block.samples.size))
    assert sum(size for _, size in sizes) == 304_000
    assert all(total <= 1 << 15 for largest, total in sizes if largest == 4)


def test_slots_and_columns_of_any_layout(host_form):
    ids = np.random.default_rng(0).integers(0, 5, 500)
    plan = EpochPlan(PatchGroups.from_ids(ids), 8, seed=3)
    expected = plan.evaluate(0, [3, 1, 0]).indices
    unaligned = np.frombuffer(b"\0" + np.array([3, 1, 0]).tobytes(), np.int64, 3, 1)
    strided = np.array([3, 9, 1, 9, 0, 9])[::2]
    for slots in (unaligned, strided, np.array([3, 1, 0], ">i8"), np.array([3, 1, 0], np.int16)):
        np.testing.assert_array_equal(plan.evaluate(0, slots).indices, expected)


def test_the_last_epoch_of_all_is_followed_by_an_error(host_form):
    sampler = PatchBatchSampler([1, 1, 2], 2, seed=0)
    sampler.set_epoch(2**63 - 1)
    assert len(list(sampler)) == 2
    with pytest.raises(ValueError, match="epoch must be"):
        list(sampler)
