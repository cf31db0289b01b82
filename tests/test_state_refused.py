"""State: what may differ where it is loaded, and what is refused by name."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from expected import (
    IDS,
    draw,
    epoch_of,
    make,
    mid_epoch,
)

from gpusampler import PatchBatchSampler


def test_a_drawn_seed_gives_way_and_a_given_one_does_not():
    state = make(seed=5).state_dict()
    drawn = PatchBatchSampler(IDS, 4)
    drawn.load_state_dict(state)
    assert drawn.seed == 5
    assert list(drawn) == epoch_of(make(seed=5), 0)
    # It was not given here, so another state may replace it again.
    drawn.load_state_dict(make(seed=6).state_dict())
    assert drawn.seed == 6
    given_one = make(seed=4)
    with pytest.raises(ValueError, match="must be of seed 4, which was given here, got seed 5"):
        given_one.load_state_dict(state)
    assert given_one.seed == 4
    assert list(given_one) == epoch_of(make(seed=4), 0)


def test_a_seed_of_zero_is_a_given_seed():
    with pytest.raises(ValueError, match="must be of seed 0, which was given here"):
        make(seed=0).load_state_dict(make(seed=5).state_dict())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"batch_size": 5}, "batch_size is 4 there and 5 here"),
        ({"partial": "pad"}, "partial is 'keep' there and 'pad' here"),
        ({"interleave": False}, "interleave is True there and False here"),
        ({"shuffle_patches": False}, "shuffle_patches is True there and False here"),
        ({"shuffle_within_batches": False}, "shuffle_within_batches is True there and False here"),
        ({"batch_size": 5, "partial": "pad"}, "batch_size is .*; partial is "),
    ],
)
def test_other_settings_are_refused_by_name(settings, names):
    sampler = make(**settings)
    with pytest.raises(ValueError, match=f"state_dict must be of the same .*{names}"):
        sampler.load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match=names):
        iter(sampler).load_state_dict(make().state_dict())
    assert list(sampler) == epoch_of(sampler, 0)


def test_other_ids_are_refused_by_name():
    state = make().state_dict()
    swapped = IDS.copy()
    first, second = 0, int(np.flatnonzero(IDS[0] != IDS)[0])
    swapped[[first, second]] = IDS[[second, first]]
    for ids, names in [
        (swapped, "ids is "),
        (np.append(IDS, 5), "num_samples is 90 there and 91 here"),
        (np.where(IDS == 40, 9, IDS), "num_patches is 4 there and 3 here"),
    ]:
        with pytest.raises(ValueError, match=names):
            PatchBatchSampler(ids, 4).load_state_dict(state)


def test_what_does_not_change_batches_may_differ(library):
    sampler = PatchBatchSampler(
        library.array(IDS.astype(np.int8)),
        4,
        seed=1,
        output="numpy",
        num_replicas=2,
        rank=1,
        uneven="drop",
        progress=False,
        device=library.device,
    )
    sampler.load_state_dict(mid_epoch(3, 5))
    expected = epoch_of(make(), 3)[5:]
    # Nineteen slots are left: rank 1 of 2 has the second of each pair.
    assert [batch.tolist() for batch in sampler] == expected[1::2]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"version": 2}, ValueError, "format version 1, got 2"),
        ({"epoch": -1}, ValueError, "state_dict epoch must be >= 0"),
        ({"epoch": 1.5}, TypeError, "state_dict epoch must be an int"),
        ({"slot": 25}, ValueError, "state_dict slot must be < 25, got 25"),
        ({"slot": -1}, ValueError, "state_dict slot must be >= 0"),
        ({"seed": "5"}, TypeError, "seed must be an int, got '5'"),
        ({"fingerprint": 12}, TypeError, "fingerprint must be a mapping, got int"),
        ({"fingerprint": {}}, ValueError, "ids is None there"),
    ],
)
def test_broken_states(change, error, match):
    sampler = PatchBatchSampler(IDS, 4)
    seed = sampler.seed
    state = {**mid_epoch(3), **change}
    with pytest.raises(error, match=match):
        sampler.load_state_dict(state)
    # A state that is refused leaves everything as it was.
    assert (sampler.seed, sampler.epoch) == (seed, 0)
    assert sampler.state_dict()["slot"] == 0


@pytest.mark.parametrize("lacking", ["version", "epoch", "slot", "seed", "fingerprint"])
def test_states_that_lack_something(lacking):
    state = mid_epoch()
    del state[lacking]
    with pytest.raises(TypeError, match=f"it lacks \\['{lacking}'\\]"):
        make().load_state_dict(state)


@pytest.mark.parametrize("state", [None, 5, [1, 2], "state"])
def test_states_that_are_no_mapping(state):
    with pytest.raises(TypeError, match="state_dict must be a mapping, got"):
        make().load_state_dict(state)


def test_loading_forgets_the_pass_in_progress():
    sampler = make()
    iterator = iter(sampler)
    draw(iterator, 9)
    sampler.load_state_dict(mid_epoch(3, 5))
    assert sampler.state_dict() == mid_epoch(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(sampler) == epoch_of(sampler, 3)[5:]
