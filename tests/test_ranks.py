"""Ranks: shares of one epoch, without a word between them."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from itertools import chain, zip_longest

import numpy as np
import pytest
from expected import (
    IDS,
    draw,
    epoch_of,
    make,
    patchy_ids,
    plan_settings,
    quiet,
    seeds,
    through_json,
)
from hypothesis import assume, given
from hypothesis import strategies as st


def ranks_of(num_replicas: int, ids=IDS, batch_size=4, **settings):
    settings = {"seed": 1, **settings}
    return [
        quiet(ids, batch_size, num_replicas=num_replicas, rank=rank, **settings)
        for rank in range(num_replicas)
    ]


def in_turn(parts) -> list:
    """Step by step, rank by rank, as the ranks draw them."""
    return list(chain.from_iterable(zip(*parts, strict=True)))


@given(
    data=st.data(),
    seed=seeds,
    num_replicas=st.integers(1, 9),
    uneven=st.sampled_from(["pad", "drop"]),
    epoch=st.integers(0, 5),
)
def test_ranks_share_the_epoch_out(library, data, seed, num_replicas, uneven, epoch):
    ids = data.draw(patchy_ids())
    settings = data.draw(plan_settings(ids))
    whole = epoch_of(quiet(ids, seed=seed, **settings), epoch)
    assume(uneven == "pad" or num_replicas <= len(whole))
    ranks = ranks_of(num_replicas, library.array(ids), seed=seed, uneven=uneven, **settings)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    lengths = {len(sampler) for sampler in ranks}
    assert len(lengths) == 1
    drawn = in_turn(map(list, ranks))
    assert len(drawn) == lengths.pop() * num_replicas
    if uneven == "drop":
        assert drawn == whole[: len(whole) - len(whole) % num_replicas]
    else:
        # Whole, and then from the start again, as far as the last step asks for.
        assert drawn[: len(whole)] == whole
        assert drawn == (whole * num_replicas)[: len(drawn)]
        assert len(drawn) - len(whole) < num_replicas


@given(
    data=st.data(),
    seed=seeds,
    before=st.integers(1, 5),
    after=st.integers(1, 5),
    uneven=st.sampled_from(["pad", "drop"]),
)
def test_another_number_of_ranks_goes_on_with_the_rest(data, seed, before, after, uneven):
    ids = data.draw(patchy_ids())
    settings = {**data.draw(plan_settings(ids)), "uneven": uneven}
    whole = epoch_of(quiet(ids, seed=seed, **settings), 2)
    assume(uneven == "pad" or max(before, after) <= len(whole))
    first = ranks_of(before, ids, seed=seed, **settings)
    # In whole steps, all slots of which are the epoch's own.
    steps = data.draw(st.integers(0, len(whole) // before))
    seen, states = [], []
    for sampler in first:
        sampler.set_epoch(2)
        seen.append(draw(iter(sampler), steps))
        states.append(through_json(sampler.state_dict()))
    seen = in_turn(seen)
    assert seen == whole[: steps * before]
    assert all(state == states[0] for state in states)
    second = ranks_of(after, ids, seed=None, **settings)
    for sampler in second:
        sampler.load_state_dict(states[0])
    remaining = len(whole) - states[0]["slot"]
    # Fewer slots than ranks are left out under "drop", so that epoch is finished too.
    if remaining == 0 or (uneven == "drop" and remaining < after):
        assert [sampler.epoch for sampler in second] == [3] * after
        return
    left = whole[len(seen) :]
    iterators = list(map(iter, second))
    lengths = {len(iterator) for iterator in iterators}
    rest = in_turn(map(list, iterators))
    assert lengths == {len(rest) // after}
    if uneven == "drop":
        assert rest == left[: len(left) - len(left) % after]
    else:
        assert rest[: len(left)] == left
        assert len(rest) - len(left) < after
        assert Counter(map(tuple, seen + rest[: len(left)])) == Counter(map(tuple, whole))
        assert all(batch in whole for batch in rest[len(left) :])


def test_changing_ranks_again_and_again_covers_the_epoch_once():
    whole = epoch_of(make(), 0)
    state, found = make().state_dict(), []
    for num_replicas in (3, 1, 4, 2, 5, 1, 2, 3):
        ranks = ranks_of(num_replicas)
        for sampler in ranks:
            sampler.load_state_dict(state)
        found += in_turn(draw(iter(sampler), 1) for sampler in ranks)
        state = ranks[0].state_dict()
    assert found == whole[: len(found)]
    assert len(found) == 21


def test_the_end_is_saved_as_the_number_of_batches():
    # 24 batches on 5 ranks: the last step runs over the end.
    for uneven in ("pad", "drop"):
        for sampler in ranks_of(5, uneven=uneven):
            sampler.set_epoch(0)
            list(sampler)
            assert sampler.state_dict()["slot"] == sampler.plan.num_batches == 24


def test_more_ranks_than_batches():
    ranks = ranks_of(7, np.array([1, 1, 2]), 2)
    drawn = in_turn(map(list, ranks))
    assert [len(sampler) for sampler in ranks] == [1] * 7
    whole = epoch_of(ranks[0], 0)
    assert drawn == [*whole, *whole, *whole, whole[0]]


def test_a_rank_sees_its_own_device_batches():
    for rank, sampler in enumerate(ranks_of(3)):
        expected = epoch_of(sampler, 0)[rank::3]
        assert [batch.indices.tolist() for batch in sampler.batches(0)] == expected


def second_pass_warning():
    return pytest.warns(UserWarning, match="a second pass on 2 ranks without set_epoch")


def test_a_second_pass_without_set_epoch_warns_once():
    sampler = ranks_of(2)[0]
    list(sampler)
    with second_pass_warning() as caught:
        iterator = iter(sampler)
        next(iterator)
    assert caught[0].filename == __file__
    list(sampler)
    list(sampler)


def test_a_pass_without_set_epoch_warns_whenever_it_comes():
    sampler = ranks_of(2)[0]
    for epoch in range(3):
        sampler.set_epoch(epoch)
        list(sampler)
    with second_pass_warning():
        list(sampler)


def test_set_epoch_before_each_pass_is_silent():
    sampler = ranks_of(2)[0]
    for epoch in range(4):
        sampler.set_epoch(epoch)
        list(sampler)


def test_given_epochs_and_one_rank_are_silent():
    sampler = ranks_of(2)[0]
    for epoch in range(3):
        list(sampler.batches(epoch))
    alone = make(num_replicas=1, rank=0)
    for _ in range(3):
        list(alone)


def test_ranks_without_a_seed_agree():
    ranks = ranks_of(2, seed=None)
    assert [sampler.seed for sampler in ranks] == [0, 0]
    # It was not given: a loaded one wins.
    state = make(seed=9).state_dict()
    for sampler in ranks:
        sampler.load_state_dict(state)
        assert sampler.seed == 9


IN_A_GROUP = """
import warnings
warnings.simplefilter("ignore")
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
from gpusampler import PatchBatchSampler
import numpy as np
ids = np.repeat([3, 1, 2], 9)
sampler = PatchBatchSampler(ids, 4)
assert (sampler.num_replicas, sampler.rank, sampler.seed) == (2, 1, 0), sampler
half = PatchBatchSampler(ids, 4, num_replicas=2)
assert (half.num_replicas, half.rank) == (2, 1)
whole = PatchBatchSampler(ids, 4, num_replicas=1, rank=0)
assert (whole.num_replicas, whole.rank) == (1, 0)
assert len(whole) == 9
assert len(sampler) == 5
other = PatchBatchSampler(ids, 4, num_replicas=4, rank=3)
assert (other.num_replicas, other.rank) == (4, 3)
print("ranks are right")
# Accelerate shards by itself what every process hands out, so the seeds must agree here too.
assert whole.seed == 0, whole
print("seed is right")
"""


@pytest.fixture(scope="module")
def said_in_a_group() -> str:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_GROUP], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_the_process_group_gives_the_ranks(said_in_a_group):
    pytest.importorskip("torch")
    assert "ranks are right" in said_in_a_group


def test_a_world_of_more_than_one_rank_draws_no_seed(said_in_a_group):
    pytest.importorskip("torch")
    assert "seed is right" in said_in_a_group


def test_environment_variables_alone_do_not_shard(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    sampler = make()
    assert (sampler.num_replicas, sampler.rank) == (1, 0)


def test_ranks_interleave_without_gaps_over_many_blocks():
    ids = np.repeat(np.arange(100), 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = [list(sampler) for sampler in ranks_of(3, ids, 7)]
    whole = epoch_of(ranks_of(1, ids, 7)[0], 0)
    drawn = [batch for step in zip_longest(*parts) for batch in step]
    assert drawn[: len(whole)] == whole
