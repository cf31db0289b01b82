"""Passes that begin while another one runs: which of them a state is of."""

from __future__ import annotations

import pytest

from support.strategies import draw, make


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("peek_at", [1, 6])
def test_a_look_at_a_batch_leaves_the_state_to_the_loop(num_workers, peek_at):
    data = pytest.importorskip("torch.utils.data")
    sampler = make()
    rows = range(sampler.plan.groups.source_size)
    loader = data.DataLoader(rows, batch_sampler=sampler, num_workers=num_workers)
    for done, _ in enumerate(loader, 1):
        if done == peek_at:
            next(iter(loader))
        if done >= peek_at:
            state = sampler.state_dict(step=done)
            assert (state["epoch"], state["slot"]) == (0, done)
        if done >= peek_at and num_workers == 0:
            assert sampler.state_dict() == state
    assert sampler.state_dict()["slot"] == 24


def test_of_passes_that_were_left_the_latest_counts():
    sampler = make()
    for epoch, steps in enumerate([5, 7, 3]):
        for done, _ in enumerate(sampler, 1):
            if done == steps:
                break
        assert sampler.state_dict(step=done) == sampler.state_dict()
        assert (sampler.state_dict()["epoch"], sampler.state_dict()["slot"]) == (epoch, steps)


def test_a_pass_that_has_ended_does_not_count_as_running():
    sampler = make()
    ended, second = iter(sampler), iter(sampler)
    draw(ended, 24)
    draw(second, 2)
    assert sampler.state_dict() == second.state_dict()


def test_passes_that_run_beside_one_another_are_told_apart_by_step_or_refused():
    sampler = make()
    first, second = iter(sampler), iter(sampler)
    draw(first, 6)
    draw(second, 2)
    assert sampler.state_dict(step=3) == first.state_dict(step=3)
    match = r"passes over epoch 0 \(6 batches drawn\) and epoch 1 \(2 batches drawn\) are running"
    for step in (None, 2):
        with pytest.raises(RuntimeError, match=match):
            sampler.state_dict(step)
    with pytest.raises(ValueError, match="step must be <= 2"):
        sampler.state_dict(step=7)
    del second
    assert sampler.state_dict() == first.state_dict()
    sampler.set_epoch(4)
    third = iter(sampler)
    draw(third, 1)
    assert sampler.state_dict() == third.state_dict()
    first.load_state_dict(third.state_dict())
    del third
    assert sampler.state_dict() == first.state_dict()


def test_a_pass_in_a_reference_cycle_is_not_running():
    sampler = make()
    cycle = [iter(sampler)]
    draw(cycle[0], 3)
    cycle.append(cycle)
    del cycle
    second = iter(sampler)
    draw(second, 2)
    assert sampler.state_dict() == second.state_dict()
