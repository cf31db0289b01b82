"""Evaluation: unshuffled, and every sample counts once, however many ranks share the work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import PatchBatchSampler, PatchTensorLoader
from support.strategies import IDS, expected_by_patch, make, patchy_ids

VALUES = np.random.default_rng(5).normal(size=IDS.size)


def ranks_of(num_replicas, ids=IDS, batch_size=4, **settings):
    return [
        PatchBatchSampler.for_evaluation(
            ids, batch_size, num_replicas=num_replicas, rank=rank, **settings
        )
        for rank in range(num_replicas)
    ]


@given(
    ids=patchy_ids(),
    batch_size=st.integers(1, 45),
    num_replicas=st.integers(1, 9),
    partial=st.sampled_from(["keep", "pad"]),
)
def test_every_sample_counts_exactly_once(library, ids, batch_size, num_replicas, partial):
    ranks = ranks_of(num_replicas, library.array(ids), batch_size, partial=partial)
    assert len({len(sampler) for sampler in ranks}) == 1
    counted: list[int] = []
    for sampler in ranks:
        handed_out = list(sampler.batches())
        assert len(handed_out) == len(sampler)
        for batch in handed_out:
            assert len(batch.indices) > 0
            counted += library.host(batch.indices)[: batch.valid].tolist()
        counts = sampler.valid_counts()
        assert counts.dtype == np.int64
        assert counts.tolist() == [batch.valid for batch in handed_out]
    assert sorted(counted) == list(range(ids.size))


def test_nothing_is_shuffled_in_any_epoch():
    sampler = PatchBatchSampler.for_evaluation(IDS, 4)
    expected = [
        samples[first : first + 4]
        for samples in expected_by_patch(IDS).values()
        for first in range(0, len(samples), 4)
    ]
    for _ in range(2):
        assert list(sampler) == expected


def test_ranks_pass_again_without_set_epoch_and_without_a_warning():
    # Every epoch is the same, so none can run ahead of another.
    sampler = ranks_of(2)[0]
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("partial", ["keep", "pad"])
def test_a_metric_over_three_ranks_is_that_of_one(partial):
    def summed(num_replicas):
        total, count = 0.0, 0
        for sampler in ranks_of(num_replicas, partial=partial):
            for indices, valid in zip(sampler, sampler.valid_counts(), strict=True):
                total += VALUES[indices[:valid]].sum()
                count += int(valid)
        return total / count

    assert summed(1) == pytest.approx(VALUES.mean(), rel=1e-12)
    for num_replicas in (2, 3, 7, 40):
        assert summed(num_replicas) == pytest.approx(VALUES.mean(), rel=1e-12)


def test_loaders_of_tensors_say_what_counts():
    rows = 0
    for sampler in ranks_of(5):
        for batch in PatchTensorLoader(sampler, value=VALUES):
            assert batch["value"].size > 0
            rows += batch["valid"]
    assert rows == IDS.size


@pytest.mark.parametrize("num_replicas", [1, 5])
def test_cursors_say_what_counts(num_replicas):
    pytest.importorskip("torch")
    counted = []
    for sampler in ranks_of(num_replicas, partial="pad"):
        cursor = sampler.cursor()
        # Twice round: the next epoch counts all of it again.
        for _ in range(2 * cursor.steps_per_epoch):
            batch = cursor()
            counted += batch.indices[: int(batch.valid)].tolist()
    assert sorted(counted) == sorted([*range(IDS.size)] * 2)


def test_a_resumed_evaluation_counts_the_rest_once():
    sampler = ranks_of(1)[0]
    begun = sampler.batches()
    drawn = [batch.indices[: batch.valid].tolist() for batch in (next(begun) for _ in range(7))]
    for rank in ranks_of(4):
        rank.load_state_dict(sampler.state_dict())
        drawn += [batch.indices[: batch.valid].tolist() for batch in rank.batches()]
    assert sorted(sample for batch in drawn for sample in batch) == list(range(IDS.size))


def test_in_training_what_comes_again_counts():
    # A loss that divides by what is valid must not divide by zero.
    ranks = [make(num_replicas=5, rank=rank) for rank in range(5)]
    assert len(ranks[0]) * 5 > ranks[0].plan.num_batches
    for sampler in ranks:
        assert min(batch.valid for batch in sampler.batches(0)) > 0
        assert sampler.valid_counts(0).min() > 0
        cursor = sampler.cursor()
        assert min(int(cursor().valid) for _ in range(len(sampler))) > 0


@pytest.mark.parametrize("epoch", [0, 3])
def test_valid_counts_follow_the_epoch(epoch):
    sampler = make(partial="pad")
    counts = sampler.valid_counts(epoch)
    assert counts.tolist() == [batch.valid for batch in sampler.batches(epoch)]
    sampler.set_epoch(epoch)
    assert sampler.valid_counts().tolist() == counts.tolist()


def test_valid_counts_of_many_batches():
    # More than are looked up at once.
    sampler = PatchBatchSampler(np.repeat([1, 2], [9_000, 8_001]), 1, seed=0)
    assert sampler.valid_counts().tolist() == [1] * 17_001


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"partial": "drop"},
            ValueError,
            "partial must be one of 'keep', 'pad', 'even', got 'drop'",
        ),
        ({"shuffle_patches": True}, TypeError, "shuffle_patches"),
        ({"num_replicas": 2}, ValueError, "num_replicas and rank must be given together"),
    ],
)
def test_wrong_use(change, error, match):
    with pytest.raises(error, match=match):
        PatchBatchSampler.for_evaluation(IDS, 4, **change)


@pytest.mark.parametrize(
    ("epoch", "error", "match"),
    [(-1, ValueError, "epoch must be >= 0"), (1.5, TypeError, "epoch must be an int")],
)
def test_valid_counts_of_no_epoch(epoch, error, match):
    with pytest.raises(error, match=match):
        make().valid_counts(epoch)
