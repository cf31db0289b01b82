"""Coverage: what it says against a count of everything that all ranks hand out."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpusampler import PatchBatchSampler
from gpusampler.plan.coverage import omitted_samples
from support.strategies import (
    epochs,
    expected_by_patch,
    patchy_ids,
    plan_settings,
    quiet,
    seeds,
    times_seen,
)


def samplers(ids, num_replicas, **settings) -> list[PatchBatchSampler]:
    return [
        quiet(ids, **settings, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)
    ]


@given(data=st.data(), seed=seeds, epoch=epochs)
@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
def test_coverage_is_what_happens(partial, uneven, data, seed, epoch):
    ids = data.draw(patchy_ids())
    num_replicas = data.draw(st.sampled_from([1, 2, 3, 5, 11, 40]))
    settings = data.draw(
        plan_settings(ids, steps_of=num_replicas, uneven=uneven, partials=(partial,))
    )
    try:
        ranks = samplers(ids, num_replicas, seed=seed, uneven=uneven, **settings)
    except ValueError as error:
        if "num_replicas must be at most the number of batches" not in str(error):
            raise
        assume(False)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    handed_out = [batch for sampler in ranks for batch in sampler]
    times_by_sample = times_seen(handed_out, ids.size)
    first_of = np.array([ids[batch[0]] for batch in handed_out])
    result = ranks[-1].coverage(epoch)
    assert len(result) == len(expected_by_patch(ids))
    for row, (patch_id, samples) in zip(result, expected_by_patch(ids).items(), strict=True):
        times = times_by_sample[samples]
        assert row == {
            "patch_id": patch_id,
            "counts": len(samples),
            "seen_once": int((times == 1).sum()),
            "repeated": int((times > 1).sum()),
            "missed": int((times == 0).sum()),
            "batches": int((first_of == patch_id).sum()),
        }
    assert result.exact == bool((times_by_sample == 1).all())
    assert result.totals() == {
        "counts": ids.size,
        "seen_once": int((times_by_sample == 1).sum()),
        "repeated": int((times_by_sample > 1).sum()),
        "missed": int((times_by_sample == 0).sum()),
        "batches": len(handed_out),
    }


def test_coverage_is_of_the_next_epoch_by_default():
    # Seven batches on two ranks: which one comes twice depends on the epoch.
    sampler = PatchBatchSampler(
        np.repeat(range(7), 3), 3, seed=0, num_replicas=2, rank=0, uneven="pad"
    )
    by_epoch = [sampler.coverage(epoch).repeated.tolist() for epoch in range(8)]
    assert len(set(map(tuple, by_epoch))) > 1
    sampler.set_epoch(5)
    assert sampler.coverage().repeated.tolist() == by_epoch[5]
    assert sampler.epoch == 5


def test_coverage_tells_its_totals():
    sampler = PatchBatchSampler([4, 4, 4, 9], 2, seed=0, partial="pad")
    assert repr(sampler.coverage()) == (
        "Coverage(2 patches, counts=4, seen_once=2, repeated=2, missed=0, batches=3)"
    )
    assert sampler.coverage() == sampler.coverage()


@pytest.mark.parametrize(
    ("epoch", "error", "match"),
    [(-1, ValueError, "epoch must be >= 0"), (1.5, TypeError, "epoch must be an int")],
)
def test_bad_epochs(epoch, error, match):
    with pytest.raises(error, match=match):
        PatchBatchSampler([1, 1], 1).coverage(epoch)


# ---------------------------------------------------------------------------------------------
# Samples that no epoch returns


def never_seen(ids, ranks: list[PatchBatchSampler], epochs: int = 30) -> set[int]:
    """Samples that no batch of some epochs holds."""
    seen = {
        sample
        for sampler in ranks
        for epoch in range(epochs)
        for batch in sampler.batches(epoch)
        for sample in batch.indices.tolist()
    }
    return set(range(len(ids))) - seen


@pytest.mark.parametrize(
    ("num_replicas", "settings", "lost"),
    [
        (1, {"partial": "drop"}, 0),
        (1, {"partial": "drop", "shuffle_within_batches": False}, 3),
        (1, {"partial": "keep", "shuffle_within_batches": False}, 0),
        (1, {"min_partial": 2, "shuffle_within_batches": False}, 3),
        (1, {"min_partial": 2, "partial": "even", "shuffle_within_batches": False}, 3),
        (1, {"partial": "drop", "weights": [1, 2, 1], "shuffle_within_batches": False}, 3),
        (1, {"partial": "drop", "epoch_batches": 2, "shuffle_within_batches": False}, 3),
        (2, {"steps": "same_patch"}, 0),
        (2, {"steps": "same_patch", "shuffle_within_batches": False}, 1),
        (2, {"shuffle_within_batches": False}, 0),
        (2, {"shuffle_patches": False}, 0),
        (2, {"shuffle_patches": False, "shuffle_within_batches": False}, 1),
        (7, {"shuffle_patches": False}, 3),
        (7, {"shuffle_patches": False, "shuffle_within_batches": False}, 3),
        (2, {"shuffle_patches": False, "weights": [1, 1, 1]}, 0),
        (2, {"shuffle_patches": False, "shuffle_within_batches": False, "steps": "balanced"}, 2),
    ],
)
def test_samples_that_are_never_seen_are_warned_of(num_replicas, settings, lost):
    ids = np.repeat([0, 1, 2], [7, 5, 3])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ranks = [
            PatchBatchSampler(
                ids, 2, seed=0, uneven="drop", num_replicas=num_replicas, rank=rank, **settings
            )
            for rank in range(num_replicas)
        ]
    counted = [
        int(number)
        for warning in caught
        for number in re.findall(r"leaves out the same (\d+) samples", str(warning.message))
    ]
    assert len(never_seen(ids, ranks)) == lost
    assert sum(counted) == num_replicas * lost


@given(data=st.data())
@pytest.mark.parametrize("uneven", ["pad", "drop"])
def test_without_shuffling_what_an_epoch_misses_is_omitted_for_ever(uneven, data):
    ids = data.draw(patchy_ids())
    num_replicas = data.draw(st.sampled_from([1, 2, 3, 5]))
    settings = data.draw(plan_settings(ids, steps_of=num_replicas, uneven=uneven))
    settings |= {"shuffle_within_batches": False, "shuffle_patches": False}
    try:
        sampler = samplers(ids, num_replicas, seed=0, uneven=uneven, **settings)[0]
    except ValueError as error:
        if "num_replicas must be at most the number of batches" not in str(error):
            raise
        assume(False)
    omitted = omitted_samples(sampler.plan, len(sampler) * num_replicas)
    missed = sampler.coverage(data.draw(epochs)).missed
    assert sum(omitted).tolist() == missed.tolist()
