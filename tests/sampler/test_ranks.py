"""Ranks: shares of one epoch, without a word between them."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections import Counter
from itertools import chain, zip_longest

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from support.processes import environment, run_python
from support.strategies import (
    IDS,
    batches_of_largest_patch,
    draw,
    epoch_of,
    make,
    patchy_ids,
    plan_settings,
    quiet,
    seeds,
    through_json,
)


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
    settings = data.draw(plan_settings(ids, steps_of=num_replicas, uneven=uneven))
    settings["uneven"] = uneven
    whole = epoch_of(quiet(ids, seed=seed, **settings), epoch)
    assume(uneven == "pad" or num_replicas <= len(whole))
    ranks = ranks_of(num_replicas, library.array(ids), seed=seed, **settings)
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
@pytest.mark.filterwarnings("ignore:Until epoch 2 ends")
def test_another_number_of_ranks_goes_on_with_the_rest(data, seed, before, after, uneven):
    ids = data.draw(patchy_ids())
    settings = data.draw(plan_settings(ids, steps_of=before, uneven=uneven))
    settings["uneven"] = uneven
    epoch_batches = epoch_of(quiet(ids, seed=seed, **settings), 2)
    assume(uneven == "pad" or max(before, after) <= len(epoch_batches))
    first = ranks_of(before, ids, seed=seed, **settings)
    # In whole steps, all slots of which are the epoch's own.
    steps = data.draw(st.integers(0, len(epoch_batches) // before))
    drawn, states = [], []
    for sampler in first:
        sampler.set_epoch(2)
        drawn.append(draw(iter(sampler), steps))
        states.append(through_json(sampler.state_dict()))
    drawn = in_turn(drawn)
    assert drawn == epoch_batches[: steps * before]
    assert all(state == states[0] for state in states)
    # What the epoch was begun with goes on; the steps of the next may be of another width.
    settings.pop("step_width", None)
    if settings.get("steps") == "same_patch" and uneven == "drop":
        assume(batches_of_largest_patch(ids, settings) >= after)
    second = ranks_of(after, ids, seed=seed, **settings)
    for sampler in second:
        sampler.load_state_dict(states[0])
    remaining = len(epoch_batches) - states[0]["slot"]
    # Fewer slots than ranks are left out under "drop", so that epoch is finished too.
    if remaining == 0 or (uneven == "drop" and remaining < after):
        assert [sampler.epoch for sampler in second] == [3] * after
        return
    expected = epoch_batches[len(drawn) :]
    iterators = list(map(iter, second))
    lengths = {len(iterator) for iterator in iterators}
    remaining = in_turn(map(list, iterators))
    assert lengths == {len(remaining) // after}
    if uneven == "drop":
        assert remaining == expected[: len(expected) - len(expected) % after]
    else:
        assert remaining[: len(expected)] == expected
        assert len(remaining) - len(expected) < after
        assert Counter(map(tuple, drawn + remaining[: len(expected)])) == Counter(
            map(tuple, epoch_batches)
        )
        assert all(batch in epoch_batches for batch in remaining[len(expected) :])
    # The next epoch is in steps of the new ranks' own width.
    in_steps = "steps" in settings
    assert {sampler.plan.step_width for sampler in second} == {after if in_steps else 1}
    for sampler in second:
        sampler.set_epoch(3)
    drawn = in_turn(map(list, second))
    following = epoch_of(second[0], 3)
    assert drawn == (following * after)[: len(drawn)]
    assert len(second[0]) * after == len(drawn)


def test_changing_ranks_again_and_again_covers_the_epoch_once():
    whole = epoch_of(make(), 0)
    state, actual = make().state_dict(), []
    for num_replicas in (3, 1, 4, 2, 5, 1, 2, 3):
        ranks = ranks_of(num_replicas)
        for sampler in ranks:
            sampler.load_state_dict(state)
        actual += in_turn(draw(iter(sampler), 1) for sampler in ranks)
        state = ranks[0].state_dict()
    assert actual == whole[: len(actual)]
    assert len(actual) == 21


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


def test_ranks_without_a_group_or_a_seed_are_refused():
    match = (
        r"seed must be given .* got None with num_replicas=2: .*PatchBatchSampler\(\.\.\., seed=0"
    )
    with pytest.raises(ValueError, match=match):
        make(seed=None, num_replicas=2, rank=0)


def test_a_launched_process_without_a_group_or_a_seed_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"seed must be given .* got None with WORLD_SIZE=4"):
        make(seed=None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert make(seed=None).seed != make(seed=None).seed


IN_A_GROUP = """
import sys
import torch.distributed as dist
rank, path = int(sys.argv[1]), sys.argv[2]
from gpusampler import PatchBatchSampler
import numpy as np
ids = np.repeat([3, 1, 2], 9)
early = PatchBatchSampler(ids, 4, seed=1)
dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{path}")
if rank == 0:
    # Who makes how many, and when, is of no matter: nobody waits for anybody.
    assert PatchBatchSampler(ids, 4, num_replicas=1, rank=0).num_replicas == 1
sampler = PatchBatchSampler(ids, 4)
assert (sampler.num_replicas, sampler.rank) == (2, rank), sampler
half = PatchBatchSampler(ids, 4, num_replicas=2)
assert (half.num_replicas, half.rank) == (2, rank)
whole = PatchBatchSampler(ids, 4, num_replicas=1, rank=0)
assert (whole.num_replicas, whole.rank) == (1, 0)
assert len(whole) == 9
assert len(sampler) == 5
other = PatchBatchSampler(ids, 4, num_replicas=4, rank=3)
assert (other.num_replicas, other.rank) == (4, 3)
# Accelerate shards by itself what every process hands out, so the seeds must agree here too.
assert sampler.seed == half.seed == whole.seed == other.seed
# It was drawn: a loaded one wins.
sampler.load_state_dict(PatchBatchSampler(ids, 4, seed=9, num_replicas=1, rank=0).state_dict())
assert sampler.seed == 9
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    iterator = iter(early)
    next(iterator)  # here
    next(iterator)
    list(early)
    list(whole)
assert len(caught) == 1, caught
assert "each of the 2 ranks yields the whole epoch: create it after" in str(caught[0].message)
# Where the first batch is drawn.
import inspect
assert caught[0].lineno == [*open(sys.argv[0])].index("    next(iterator)  # here\\n") + 1
print("seed", whole.seed)
"""


def test_a_process_group_gives_ranks_and_one_drawn_seed(tmp_path):
    pytest.importorskip("torch")
    script = tmp_path / "in_a_group.py"
    script.write_text(IN_A_GROUP)
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], outputs
    seeds = [text.splitlines()[-1] for text in outputs]
    assert seeds[0] == seeds[1]
    assert re.fullmatch(r"seed \d+", seeds[0])


WITHOUT_A_STORE = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
from gpusampler import PatchBatchSampler
try:
    PatchBatchSampler([1, 1, 2], 2)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow("a process that imports torch, for one error")
def test_a_group_that_cannot_agree_on_a_seed_is_told_to_give_one():
    pytest.importorskip("torch")
    done = run_python("-W", "ignore", "-c", WITHOUT_A_STORE, check=False)
    assert done.stdout.startswith("seed must be given where the process group's store"), done
    assert done.stdout.strip().endswith("on every rank, such as PatchBatchSampler(..., seed=0)")


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
