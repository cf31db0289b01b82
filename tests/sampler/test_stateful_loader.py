"""torchdata's StatefulDataLoader: stopping anywhere, again and again, changes no batch."""

from __future__ import annotations

import io
import json
from itertools import chain, islice

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("torchdata")

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from support.dataloaders import (
    IDS,
    LOADERS,
    BlockRows,
    Rows,
    epoch_of,
    loader_kinds,
    loader_of,
    rows_of,
)
from support.strategies import quiet

# It calls a function of torch that has been deprecated since.
pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital")

BATCHES = 20
STOPS = {"before": 0, "first": 1, "middle": 9, "last": BATCHES, "finished": BATCHES + 1}


class Run:
    """A training run: its sampler, its loader, and what it has handed out.

    ``told`` runs call ``set_epoch`` before every pass. A state is kept with the number of the pass
    that it is of, or, after a pass, of the next one: training loops have to keep that too.
    """

    def __init__(self, workers: str, told: bool = False, dataset=None, **settings):
        settings = {"seed": 5, **settings}
        self.dataset = dataset or Rows()
        self.sampler = quiet(self.dataset, 4, **settings)
        self.by_worker = bool(LOADERS[workers])
        self.loader = loader_of(self.dataset, self.sampler, StatefulDataLoader, **LOADERS[workers])
        self.told = told
        self.passes = 0

    def __iter__(self):
        """Batches without an end, and None after each pass."""
        while True:
            if self.told:
                self.sampler.set_epoch(self.passes)
            for batch in self.loader:
                yield rows_of(batch, self.by_worker)
            self.passes += 1
            yield None

    def save(self):
        return self.loader.state_dict(), self.passes

    def load(self, saved):
        state, self.passes = saved
        self.loader.load_state_dict(state)
        return self


def expected_of(sampler, epochs: int) -> list:
    """What a run that is never stopped hands out."""
    return list(chain.from_iterable([*epoch_of(sampler, epoch), None] for epoch in range(epochs)))


def by_json(saved):
    return json.loads(json.dumps(saved))


def by_torch(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("workers", loader_kinds("none", "two", "persistent"))
def test_stopping_twice_in_an_epoch_changes_nothing(workers, stop, told):
    first = Run(workers, told)
    assert len(first.sampler) == BATCHES
    expected = expected_of(first.sampler, 3)
    actual = list(islice(first, STOPS[stop]))
    second = Run(workers, told).load(by_json(first.save()))
    # Far enough on to be in the same epoch where that is possible, and in the next where not.
    actual += islice(second, 5)
    third = Run(workers, told).load(by_torch(second.save()))
    actual += islice(third, len(expected) - len(actual))
    assert actual == expected


@pytest.mark.parametrize("told", [False, True], ids=["untold", "told"])
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("workers", loader_kinds("none", "two", "persistent"))
def test_a_state_taken_before_the_resumed_run_moves_is_the_same_place(workers, stop, told):
    first = Run(workers, told)
    expected = expected_of(first.sampler, 2)
    actual = list(islice(first, STOPS[stop]))
    second = Run(workers, told).load(by_json(first.save()))
    again = by_json(second.save())
    # Both the run that was asked, and another one that loads what it said, go on.
    for run in (second, Run(workers, told).load(again)):
        assert actual + list(islice(run, len(expected) - len(actual))) == expected


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("workers", loader_kinds("none", "two"))
def test_states_that_were_kept_do_not_move_with_the_run(workers, every):
    # Not one is written down before all are taken.
    run = Run(workers)
    run.loader.snapshot_every_n_steps = every
    expected = expected_of(run.sampler, 2)
    states, actual = [run.save()], []
    for batch in islice(run, BATCHES):
        actual.append(batch)
        states.append(run.save())
    assert actual == expected[:BATCHES]
    for stop in (0, 1, 4, 11, BATCHES - 1, BATCHES):
        resumed = Run(workers).load(states[stop])
        assert list(islice(resumed, len(expected) - stop)) == expected[stop:]


@pytest.mark.parametrize("workers", loader_kinds("none", "two"))
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (list, {"partial": "drop"}),
        (list, {"partial": "pad", "interleave": False}),
        (np.ndarray, {"output": "numpy"}),
        (torch.Tensor, {"output": "tensor", "shuffle_patches": False}),
    ],
)
def test_settings_and_outputs_resume_too(kind, settings, workers):
    first = Run(workers, dataset=BlockRows(kind), **settings)
    expected = expected_of(first.sampler, 2)
    actual = list(islice(first, 7))
    second = Run(workers, dataset=BlockRows(kind), **settings).load(by_json(first.save()))
    assert actual + list(islice(second, len(expected) - 7)) == expected


def test_a_drawn_seed_comes_back_with_the_loaders_state():
    first, second = Run("none", seed=None), Run("none", seed=None)
    assert first.sampler.seed != second.sampler.seed
    expected = expected_of(first.sampler, 2)
    actual = list(islice(first, 7))
    second.load(by_json(first.save()))
    assert actual + list(islice(second, len(expected) - 7)) == expected


def in_turn(runs, steps: int) -> list:
    """What the ranks hand out, step by step."""
    return list(chain.from_iterable(zip(*(islice(run, steps) for run in runs), strict=True)))


def world(size: int, workers: str) -> list[Run]:
    return [Run(workers, told=True, num_replicas=size, rank=rank) for rank in range(size)]


@pytest.mark.parametrize("workers", ["none", "two"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_twos_state_goes_on_on_three(workers, rank):
    epoch_batches = epoch_of(quiet(IDS, 4, seed=5), 0)
    two, three = world(2, workers), world(3, workers)
    drawn = in_turn(two, 4)
    assert drawn == epoch_batches[:8]
    saved = by_json(two[rank].save())
    for run in three:
        run.load(saved)
    # Twelve batches are left, four for each, and then the pass ends on all three.
    assert in_turn(three, 5) == [*epoch_batches[8:], None, None, None]
    following = epoch_of(quiet(IDS, 4, seed=5), 1)
    # Twenty batches on three ranks: the first comes again.
    assert in_turn(three, 7) == [*following, following[0]]


@pytest.mark.parametrize("workers", loader_kinds("none", "two"))
def test_another_number_of_workers_goes_on_by_the_samplers_state(workers):
    epoch_batches = epoch_of(quiet(IDS, 4, seed=5), 0)
    two = world(2, workers)
    assert in_turn(two, 4) == epoch_batches[:8]
    # torchdata's own state is of a number of workers, and says so in an AssertionError.
    other = "two" if workers == "none" else "none"
    expected = f"expected for {'multi' if workers == 'none' else 'single '}process dataloader"
    with pytest.raises(AssertionError, match=expected):
        next(iter(Run(other).load(two[0].save()).loader))
    state = by_json(two[1].sampler.state_dict(step=4))
    three = world(3, other)
    for run in three:
        run.sampler.load_state_dict(state)
    assert in_turn(three, 5) == [*epoch_batches[8:], None, None, None]


@pytest.mark.parametrize("workers", loader_kinds("none", "two", "persistent"))
def test_the_place_that_a_loader_has_loaded_wins_over_set_epoch(workers):
    # torchdata hands a state on when the next pass begins, which is after set_epoch.
    first = Run(workers)
    actual = list(islice(first, 7))
    second = Run(workers).load(first.save())
    second.sampler.set_epoch(4)
    assert actual + list(islice(second, BATCHES - 7)) == epoch_of(first.sampler, 0)
    assert second.sampler.epoch == 1


@pytest.mark.parametrize(("workers", "epoch"), [("none", 3), ("two", 0), ("persistent", 0)])
def test_a_loader_that_is_asked_for_its_state_has_begun(workers, epoch):
    # With workers it draws ahead at once, so set_epoch comes too late for this pass.
    run = Run(workers)
    run.save()
    run.sampler.set_epoch(3)
    assert list(islice(run, BATCHES)) == epoch_of(run.sampler, epoch)


@pytest.mark.parametrize("workers", loader_kinds("none", "two", "persistent"))
def test_passes_that_are_left_end_their_epoch(workers):
    run = Run(workers)
    for epoch in range(2):
        begun = iter(run.loader)
        first = [rows_of(next(begun), run.by_worker) for _ in range(2)]
        assert first == epoch_of(run.sampler, epoch)[:2]
        del begun
    assert list(islice(run, BATCHES)) == epoch_of(run.sampler, 2)


@pytest.mark.parametrize("workers", loader_kinds("none", "two", "persistent"))
def test_ranks_that_are_told_every_epoch_are_not_warned_after_a_finished_one(workers):
    first = Run(workers, told=True, num_replicas=2, rank=0)
    actual = list(islice(first, BATCHES // 2 + 1))
    second = Run(workers, told=True, num_replicas=2, rank=0).load(by_json(first.save()))
    assert actual + list(islice(second, BATCHES // 2)) == expected_of(first.sampler, 2)[:-1]


@pytest.mark.parametrize("workers", loader_kinds("none", "two", "persistent"))
def test_a_state_of_other_ids_is_refused_when_the_pass_begins(workers):
    first = Run(workers)
    list(islice(first, 3))
    other = Run(workers, seed=5, interleave=False).load(first.save())
    with pytest.raises(
        ValueError, match="interleave is True in the checkpoint, False in this sampler"
    ):
        next(iter(other))
    assert list(other.sampler) == epoch_of(other.sampler, 0)
