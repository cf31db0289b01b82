"""State: going on from any point equals never having stopped."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.sampler.state import EpochTracker
from support.strategies import (
    draw,
    epoch_of,
    make,
    mid_epoch_state,
    patchy_ids,
    plan_settings,
    quiet,
    seeds,
    through_json,
)


@given(data=st.data(), seed=seeds)
def test_resuming_anywhere_equals_never_having_stopped(library, data, seed):
    ids = data.draw(patchy_ids())
    settings = data.draw(plan_settings(ids, steps_of=1))
    epoch = data.draw(st.integers(0, 4))
    whole = quiet(ids, seed=seed, **settings)
    stop = data.draw(st.integers(0, len(whole)))
    whole.set_epoch(epoch)
    iterator = iter(whole)
    before = draw(iterator, stop)
    state = through_json(whole.state_dict())
    # Another process on another device, that has drawn another seed.
    resumed = quiet(library.array(ids), **settings)
    resumed.load_state_dict(state)
    assert resumed.seed == seed
    assert resumed.state_dict() == state
    if stop == len(whole):
        # A finished epoch leads to the next.
        assert resumed.epoch == epoch + 1
        assert list(resumed) == epoch_of(whole, epoch + 1)
    else:
        assert resumed.epoch == epoch
        remaining = iter(resumed)
        assert len(remaining) == len(whole) - stop
        assert len(resumed) == len(whole)
        assert before + list(remaining) == epoch_of(whole, epoch)
        assert list(resumed) == epoch_of(whole, epoch + 1)


def test_stopping_after_every_batch():
    expected = epoch_of(make(), 0) + epoch_of(make(), 1)
    state, actual = make().state_dict(), []
    while len(actual) < len(expected):
        sampler = make()
        sampler.load_state_dict(through_json(state))
        actual.append(next(iter(sampler)))
        state = sampler.state_dict()
    assert actual == expected


def test_a_state_may_be_loaded_again_and_again():
    sampler = make()
    iterator = iter(sampler)
    draw(iterator, 5)
    state = sampler.state_dict()
    remaining = list(iterator)
    for _ in range(2):
        sampler.load_state_dict(state)
        assert list(sampler) == remaining
    assert list(sampler) == epoch_of(sampler, 1)


def test_states_are_fresh_plain_and_never_changed():
    sampler = make()
    iterator = iter(sampler)
    next(iterator)
    first = sampler.state_dict()
    kept = json.dumps(first)
    second = sampler.state_dict()
    assert first == second
    assert first is not second
    assert first["fingerprint"] is not second["fingerprint"]
    next(iterator)
    other = make()
    other.load_state_dict(first)
    list(other)
    assert json.dumps(first) == kept
    assert sampler.state_dict() != first

    def kinds(value) -> set[type]:
        if isinstance(value, dict):
            return set().union(*map(kinds, value.values()))
        return {type(value)}

    assert kinds(first) <= {int, str, bool}
    assert {"version", "epoch", "slot", "seed", "fingerprint"} <= set(first)


def test_the_largest_state_is_small():
    groups = PatchGroups.from_counts([2**31 - 1] * 1000)
    sampler = PatchBatchSampler(groups, 2**31 - 1, seed=2**64 - 1)
    sampler.set_epoch(2**63 - 2)
    state = through_json({**sampler.state_dict(), "slot": sampler.plan.num_batches})
    assert state["seed"] == 2**64 - 1


def test_states_of_sampler_and_iterator_are_interchangeable():
    sampler = make()
    iterator = iter(sampler)
    draw(iterator, 4)
    state = iterator.state_dict()
    assert state == sampler.state_dict()
    remaining = list(iterator)
    # StatefulDataLoader loads the sampler, calls iter, and loads the iterator.
    other = make()
    other.load_state_dict(state)
    resumed = iter(other)
    resumed.load_state_dict(state)
    assert len(resumed) == len(remaining)
    assert resumed.state_dict() == state
    assert list(resumed) == remaining
    assert list(other) == epoch_of(sampler, 1)
    # The iterator alone.
    other = make()
    resumed = iter(other)
    resumed.load_state_dict(state)
    assert other.epoch == 1
    assert list(resumed) == remaining
    # The sampler alone, and an iterator that is begun already.
    other = make()
    resumed = iter(other)
    next(resumed)
    resumed.load_state_dict(state)
    assert list(resumed) == remaining


def test_an_iterators_state_is_its_own():
    sampler = make()
    first, second = iter(sampler), iter(sampler)
    draw(first, 3)
    draw(second, 5)
    states = first.state_dict(), second.state_dict()
    assert [(state["epoch"], state["slot"]) for state in states] == [(0, 3), (1, 5)]
    for iterator, state in zip((first, second), states, strict=True):
        other = make()
        other.load_state_dict(state)
        assert list(other) == list(iterator)


def test_an_iterator_of_a_given_epoch_has_a_state_of_its_own():
    sampler = make()
    for count in (0, 3):
        iterator = sampler.batches(6)
        draw(iterator, count)
        state = iterator.state_dict()
        assert (state["epoch"], state["slot"]) == (6, count)
    assert sampler.state_dict()["epoch"] == 0


@pytest.mark.parametrize("drawn", [0, 3, 24])
def test_the_state_of_an_unused_iterator_leads_to_what_it_would_hand_out(drawn):
    sampler = make()
    draw(iter(sampler), drawn)
    unused = iter(sampler)
    other = make()
    other.load_state_dict(unused.state_dict())
    assert list(other) == list(unused)


def test_at_the_end_of_an_epoch_the_slot_is_the_number_of_batches():
    sampler = make()
    iterator = iter(sampler)
    draw(iterator, len(sampler))
    before_stop = sampler.state_dict()
    assert next(iterator, None) is None
    assert before_stop == sampler.state_dict()
    assert (before_stop["epoch"], before_stop["slot"]) == (0, sampler.plan.num_batches)


@pytest.mark.parametrize("step", [0, 1, 4, 23, 24])
def test_state_after_a_step_whatever_was_prefetched(step):
    sampler, careful = make(), make()
    list(sampler)
    list(careful)
    draw(iter(sampler), 24)
    draw(iter(careful), step) if step else careful.set_epoch(1)
    assert sampler.state_dict(step=step) == careful.state_dict()


def test_the_next_pass_has_no_more_steps_than_batches():
    with pytest.raises(ValueError, match=r"step must be <= 24, the number of .*, got 25"):
        make().state_dict(step=25)


@pytest.mark.parametrize("drawn", [1, 12, 24])
def test_a_pass_has_no_more_steps_than_were_drawn(drawn):
    sampler = make()
    iterator = iter(sampler)
    draw(iterator, drawn)
    for stateful in (sampler, iterator):
        with pytest.raises(ValueError, match=rf"step must be <= {drawn}, the number of batches dr"):
            stateful.state_dict(step=drawn + 1)


def test_a_counter_of_the_whole_epoch_is_refused_after_a_resume():
    first, resumed = make(), make()
    draw(iter(first), 10)
    resumed.load_state_dict(first.state_dict())
    draw(iter(resumed), 5)
    with pytest.raises(ValueError, match=r"<= 5, .*, got 15\. The pass resumed at slot 10: count "):
        resumed.state_dict(step=15)
    assert resumed.state_dict(step=5)["slot"] == 15


def test_state_after_a_step_before_the_first_batch():
    sampler, ahead = make(), make()
    draw(iter(ahead), 3)
    assert sampler.state_dict(step=3) == ahead.state_dict()
    # After a load, steps are counted from where the pass goes on.
    sampler.load_state_dict(ahead.state_dict())
    assert sampler.state_dict(step=2)["slot"] == 5
    draw(iter(sampler), 7)
    assert sampler.state_dict(step=2)["slot"] == 5
    assert sampler.state_dict()["slot"] == 10


@pytest.mark.parametrize(
    ("step", "error", "match"),
    [
        (-1, ValueError, "step must be >= 0, got -1"),
        (1.0, TypeError, "step must be an int"),
        (True, TypeError, "step must be an int"),
    ],
)
def test_bad_steps(step, error, match):
    with pytest.raises(error, match=match):
        make().state_dict(step=step)


def test_setting_the_loaded_epoch_keeps_the_position():
    sampler = make()
    sampler.load_state_dict(mid_epoch_state(3))
    for _ in range(2):
        sampler.set_epoch(3)
    assert list(sampler) == epoch_of(sampler, 3)[5:]
    # Once it is handed out, the position is gone.
    sampler.set_epoch(3)
    assert list(sampler) == epoch_of(sampler, 3)


@pytest.mark.parametrize("through", [lambda s: s, lambda s: s.sampler])
def test_setting_another_epoch_drops_the_position_and_says_so(through):
    sampler = make()
    sampler.load_state_dict(mid_epoch_state(3))
    with pytest.warns(
        UserWarning, match=r"set_epoch\(0\) drops the loaded position: epoch 3, slot 5"
    ) as caught:
        through(sampler).set_epoch(0)
    assert caught[0].filename == __file__
    assert list(sampler) == epoch_of(sampler, 0)
    sampler.set_epoch(3)
    assert list(sampler) == epoch_of(sampler, 3)


@pytest.mark.parametrize("drawn", [0, 24])
def test_no_warning_where_no_position_is_lost(drawn):
    state = mid_epoch_state(3, drawn) if drawn else {**mid_epoch_state(3), "slot": 0}
    sampler = make()
    sampler.load_state_dict(state)
    sampler.set_epoch(7)
    assert list(sampler) == epoch_of(sampler, 7)


def test_no_warning_where_too_few_batches_are_left_for_the_ranks():
    state = {**mid_epoch_state(3), "slot": 22}
    sampler = make(num_replicas=3, rank=0, uneven="drop")
    sampler.load_state_dict(state)
    assert sampler.epoch == 4
    sampler.set_epoch(4)
    assert list(sampler) == epoch_of(make(), 4)[::3]


def test_setting_a_finished_epoch_that_was_loaded_hands_out_nothing_more():
    sampler = make()
    sampler.load_state_dict(mid_epoch_state(3, 24))
    sampler.set_epoch(3)
    assert list(sampler) == []
    assert list(sampler) == epoch_of(sampler, 4)


def test_leaving_a_finished_epoch_warns_of_nothing():
    sampler = make()
    sampler.load_state_dict(mid_epoch_state(3, 24))
    sampler.set_epoch(3)
    sampler.set_epoch(4)
    assert list(sampler) == epoch_of(sampler, 4)


def test_reshuffle_after_a_load_goes_on_with_the_next_epoch():
    sampler = make()
    sampler.load_state_dict(mid_epoch_state(3))
    sampler.reshuffle()
    assert list(sampler) == epoch_of(sampler, 4)


def test_threads_that_begin_at_once_have_epochs_of_their_own(monkeypatch):
    sampler, pending_shard = make(), EpochTracker.pending_shard
    barrier = threading.Barrier(8)

    def slow(tracker):
        shard = pending_shard(tracker)
        time.sleep(0.005)  # other threads run here
        return shard

    def begin(_):
        batches = iter(sampler)
        barrier.wait()
        next(batches)
        return batches.state_dict()["epoch"]

    monkeypatch.setattr(EpochTracker, "pending_shard", slow)
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(begin, range(8))) == list(range(8))
