"""BatchCursor: the sampler's batches, one a call, for loops in which the host has no say."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.core.devices import Device
from support.interrupts import InterruptedAt
from support.strategies import IDS, epoch_of, make, quiet

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

from gpusampler.sampler.cursor import BatchCursor, CursorBatch  # noqa: E402


def plan_of(**settings) -> EpochPlan:
    """A plan of 11 batches."""
    settings = {"batch_size": 8, "seed": 5, "partial": "pad", "device": "cpu", **settings}
    return EpochPlan(PatchGroups.from_counts([50, 26]), **settings)


TOTAL = plan_of().num_batches


def drawn(cursor: BatchCursor, count: int) -> list[tuple[list[int], int, int]]:
    """The next batches of a cursor, in plain values."""
    actual = [cursor() for _ in range(count)]
    return [(b.indices.tolist(), int(b.valid), int(b.group)) for b in actual]


def handed_out(sampler: PatchBatchSampler, epoch: int | None = None) -> list[tuple]:
    """A rank's batches of an epoch (the next one), from the sampler, in the cursor's form."""
    patch_ids = sampler.plan.groups.patch_ids.tolist()
    return [
        (batch.indices.tolist(), batch.valid, patch_ids.index(batch.patch_id))
        for batch in sampler.batches(epoch)
    ]


def same(actual, expected) -> bool:
    """Whether a cursor's batches are the sampler's; the sampler's may be short."""
    return len(actual) == len(expected) and all(
        (a[0][: len(b[0])], *a[1:]) == b for a, b in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("settings", [{}, {"num_replicas": 3, "rank": 2}])
def test_the_position_of_an_interrupted_cursor_is_in_range(settings):
    # Where it stops inside the evaluation does not matter: an evaluation of few calls will do.
    plan = plan_of(shuffle_patches=False, shuffle_within_batches=False)
    cursor = BatchCursor(plan, **settings)
    last = cursor.num_replicas * (cursor.steps_per_epoch - 1)
    cursor.seek(4, last)
    expected = drawn(cursor, 1)
    event, is_complete, positions = 0, False, set()
    while not is_complete:
        event += 1
        cursor.seek(4, last)
        with InterruptedAt(event):
            try:
                cursor()
                is_complete = True
            except KeyboardInterrupt:
                positions.add(cursor.position())
        cursor.seek(4, last)
        assert drawn(cursor, 1) == expected
    assert positions == {(4, last), (5, last), (5, 0)}
    assert event > 30


def saved(cursor: torch.nn.Module) -> dict:
    """The state as it comes back from a checkpoint, read without running what is in it."""
    buffer = io.BytesIO()
    torch.save(cursor.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---------------------------------------------------------------------------------------------
# The sampler's batches


def test_a_batch_lies_in_tensors_of_fixed_shapes():
    batch = BatchCursor(plan_of())()
    assert isinstance(batch, CursorBatch)
    assert [part.dtype for part in batch] == [torch.int64] * 3
    assert [tuple(part.shape) for part in batch] == [(8,), (), (1,)]


TWO_PATCHES = np.repeat([1, 2], [200, 40])


@pytest.mark.parametrize(
    ("batch_size", "message", "fitting"),
    [
        (
            CostBudget(80, cost={1: 1, 2: 20}),
            "has 80 samples, .*: 20 times what max_cost=80 allows for patch 2, .* at most 4 ",
            CostBudget(80, cost={1: 1, 2: 20}, max_batch_size=4),
        ),
        (
            CostBudget(80, sample_costs=np.where(np.arange(240) % 3, 1, 20)),
            "has 80 samples, .*: 20 times what max_cost=80 allows for patch 1, .* max_batch_size=4",
            CostBudget(80, sample_costs=np.where(np.arange(240) % 3, 1, 20), max_batch_size=4),
        ),
        ({1: 80, 2: 4}, "80 samples, .*: 20 times the batch size of patch 2.* batch_size=4", 4),
    ],
)
def test_rows_over_the_budget_are_warned_of(batch_size, message, fitting):
    sampler = PatchBatchSampler(TWO_PATCHES, batch_size, seed=0)
    with pytest.warns(UserWarning, match=message) as warned:
        assert sampler.cursor()().indices.shape == (80,)
    assert warned[0].filename == __file__
    # Warnings are errors here: what the text advises is silent.
    assert PatchBatchSampler(TWO_PATCHES, fitting, seed=0).cursor()().indices.shape == (4,)


@pytest.mark.parametrize(
    "batch_size",
    [
        80,
        {1: 80, 2: 76},
        CostBudget(80, cost={1: 1, 2: 1.05}),
        # The few samples of patch 2 make its batches small, not its cost.
        CostBudget(400, cost={1: 4, 2: 3}),
        CostBudget(80, cost={1: 1, 2: 90}, over_budget="skip"),
    ],
)
def test_rows_within_a_tenth_of_the_budget_are_not_warned_of(batch_size):
    quiet(TWO_PATCHES, batch_size, seed=0).cursor()


@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_cursor_runs_on_from_epoch_to_epoch(num_replicas, partial, uneven):
    for rank in range(num_replicas):
        sampler = make(
            num_replicas=num_replicas, rank=rank, partial=partial, uneven=uneven, batch_size=3
        )
        cursor = sampler.cursor()
        steps = cursor.steps_per_epoch
        assert steps == len(sampler)
        for epoch in range(2):
            assert cursor.position() == (epoch, 0)
            assert same(drawn(cursor, steps), handed_out(sampler, epoch))


@given(data=st.data())
def test_a_cursor_begins_where_the_next_iterator_would(data):
    ranks = data.draw(st.integers(1, 4))
    settings = {
        "num_replicas": ranks,
        "rank": data.draw(st.integers(0, ranks - 1)),
        "uneven": data.draw(st.sampled_from(["pad", "drop"])),
        "partial": data.draw(st.sampled_from(["keep", "pad"])),
        "interleave": data.draw(st.booleans()),
    }
    whole = quiet(IDS, 8, seed=1, partial=settings["partial"], interleave=settings["interleave"])
    epoch = data.draw(st.sampled_from([0, 7, 2**40]))
    slot = data.draw(st.integers(0, len(whole)))
    state = {**whole.state_dict(), "epoch": epoch, "slot": slot}
    sampler = quiet(IDS, 8, seed=1, **settings)
    sampler.load_state_dict(state)
    cursor = sampler.cursor()
    begun = sampler.epoch
    assert cursor.position() == (begun, slot if begun == epoch else 0)
    remaining = handed_out(sampler)
    assert same(drawn(cursor, len(remaining)), remaining)
    assert same(drawn(cursor, 3), handed_out(sampler, begun + 1)[:3])


def test_the_sampler_does_not_follow_its_cursor():
    sampler = make()
    before = sampler.state_dict()
    cursor = sampler.cursor()
    drawn(cursor, 5)
    assert sampler.state_dict() == before
    sampler.set_epoch(4)
    assert cursor.position() == (0, 5)
    assert sampler.cursor().position() == (4, 0)


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_a_sampler_on_the_host_has_a_cursor_of_torch(device):
    sampler = make(device=device, partial="pad")
    cursor = sampler.cursor()
    assert cursor.plan.device == Device("torch", "cpu")
    assert cursor().indices.device == torch.device("cpu")
    assert str(sampler.plan.device) == device


def test_more_ranks_than_batches_get_the_first_again():
    actual = [drawn(BatchCursor(plan_of(), num_replicas=12, rank=r), 2) for r in range(12)]
    single = drawn(BatchCursor(plan_of()), 2 * TOTAL)
    for epoch in range(2):
        own = single[epoch * TOTAL : (epoch + 1) * TOTAL]
        assert [steps[epoch] for steps in actual] == [*own, own[0]]


def test_more_ranks_than_batches_are_refused_where_the_rest_is_left_out():
    with pytest.raises(ValueError, match=r"num_replicas must be at most .* got 12 for 11 batches"):
        BatchCursor(plan_of(), num_replicas=12, uneven="drop")


def test_every_batch_of_every_rank_once_an_epoch():
    single = drawn(BatchCursor(plan_of()), TOTAL)
    world = [BatchCursor(plan_of(), num_replicas=4, rank=r, uneven="drop") for r in range(4)]
    assert {cursor.steps_per_epoch for cursor in world} == {2}
    by_rank = [drawn(cursor, 2) for cursor in world]
    assert [batch for step in zip(*by_rank, strict=True) for batch in step] == single[:8]
    assert {cursor.position() for cursor in world} == {(1, 0)}


# ---------------------------------------------------------------------------------------------
# Places


def test_a_place_is_chosen_in_place():
    cursor = BatchCursor(plan_of())
    everything = drawn(cursor, 2 * TOTAL)
    addresses = cursor.epoch.data_ptr(), cursor.slot.data_ptr()
    for epoch, slot in [(0, 3), (1, 0), (0, TOTAL - 1), (0, 0)]:
        cursor.seek(epoch, slot)
        assert cursor.position() == (epoch, slot)
        remaining = everything[epoch * TOTAL + slot :]
        assert drawn(cursor, len(remaining)) == remaining
    assert (cursor.epoch.data_ptr(), cursor.slot.data_ptr()) == addresses


def test_the_end_of_an_epoch_is_the_beginning_of_the_next():
    cursor = BatchCursor(plan_of(), epoch=6, slot=TOTAL)
    assert cursor.position() == (7, 0)
    cursor.seek(2, TOTAL)
    assert cursor.position() == (3, 0)
    # Of eleven batches, four ranks that leave the rest out have done their last after eight.
    dropping = BatchCursor(plan_of(), num_replicas=4, uneven="drop", slot=8)
    assert dropping.position() == (1, 0)
    assert BatchCursor(plan_of(), num_replicas=4, slot=8).position() == (0, 8)


@pytest.mark.parametrize(
    ("place", "error", "match"),
    [
        ((-1, 0), ValueError, "epoch must be >= 0, got -1"),
        ((2**63, 0), ValueError, f"epoch must be < {2**63}"),
        ((2**63 - 1, TOTAL), ValueError, f"epoch must be < {2**63}, got {2**63}"),
        ((0.5, 0), TypeError, r"epoch must be an int, got 0\.5"),
        ((0, -1), ValueError, "slot must be >= 0, got -1"),
        ((0, TOTAL + 1), ValueError, f"slot must be < {TOTAL + 1}, got {TOTAL + 1}"),
        ((0, True), TypeError, "slot must be an int, got True"),
    ],
)
def test_places_that_are_none(place, error, match):
    cursor = BatchCursor(plan_of(), epoch=3, slot=4)
    with pytest.raises(error, match=match):
        cursor.seek(*place)
    assert cursor.position() == (3, 4)
    with pytest.raises(error, match=match):
        BatchCursor(plan_of(), epoch=place[0], slot=place[1])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_replicas": 0}, ValueError, "num_replicas must be >= 1, got 0"),
        ({"num_replicas": 2.0}, TypeError, "num_replicas must be an int"),
        ({"num_replicas": 2, "rank": 2}, ValueError, "rank must be < 2, got 2"),
        ({"rank": -1}, ValueError, "rank must be >= 0, got -1"),
        ({"rank": 1}, ValueError, "rank must be < 1, got 1"),
        ({"uneven": "keep"}, ValueError, "uneven must be one of 'pad', 'drop', got 'keep'"),
    ],
)
def test_the_argument_checks(arguments, error, match):
    with pytest.raises(error, match=match):
        BatchCursor(plan_of(), **arguments)


def test_plans_that_are_none_or_not_on_torch_are_refused():
    with pytest.raises(TypeError, match="plan must be an EpochPlan, got PatchBatchSampler"):
        BatchCursor(make())
    elsewhere = r"plan must be on a torch device, got '{}'; pass plan\.on\('cpu'\)"
    with pytest.raises(ValueError, match=elsewhere.format("numpy")):
        BatchCursor(plan_of(device=None))
    with pytest.raises(ValueError, match=elsewhere.format("cupy:0")):
        BatchCursor(plan_of(device=Device("cupy", "0")))


# ---------------------------------------------------------------------------------------------
# States


@pytest.mark.parametrize("keep", [lambda c: c.state_dict(), saved], ids=["dict", "file"])
def test_a_loaded_place_goes_on_where_it_was_saved(keep):
    cursor = BatchCursor(plan_of(seed=2**64 - 1), epoch=2**40, slot=5)
    drawn(cursor, 1)
    state = copy.deepcopy(keep(cursor))
    remaining = drawn(cursor, 2 * TOTAL)
    other = BatchCursor(plan_of(seed=2**64 - 1))
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert other.position() == (2**40, 6)
    assert drawn(other, 2 * TOTAL) == remaining


def test_a_state_holds_the_place_of_all_ranks():
    state = BatchCursor(plan_of(), num_replicas=2, rank=1, epoch=3, slot=6).state_dict()
    everything = drawn(BatchCursor(plan_of(), epoch=3), TOTAL)
    for ranks in (1, 2, 3, 5):
        world = [BatchCursor(plan_of(), num_replicas=ranks, rank=r) for r in range(ranks)]
        for cursor in world:
            cursor.load_state_dict(state)
        assert [drawn(cursor, 1)[0] for cursor in world] == everything[6 : 6 + ranks]


def test_a_place_that_leaves_other_ranks_no_step_is_the_next_epoch():
    state = BatchCursor(plan_of(), slot=TOTAL - 1).state_dict()
    world = [BatchCursor(plan_of(), num_replicas=4, rank=r, uneven="drop") for r in range(4)]
    for cursor in world:
        cursor.load_state_dict(state)
        assert cursor.position() == (1, 0)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"batch_size": 9}, "batch_size is 8 in the checkpoint, 9 in this sampler"),
        ({"partial": "keep"}, "partial is 'pad' in the checkpoint, 'keep' in this sampler"),
        ({"interleave": False}, "interleave is True in the checkpoint, False in this sampler"),
        (
            {"shuffle_patches": False},
            "shuffle_patches is True in the checkpoint, False in this sampler",
        ),
        (
            {"shuffle_within_batches": False},
            "shuffle_within_batches is True in the checkpoint, False in this",
        ),
        ({"seed": 6}, "Saved state uses seed 5, this sampler seed 6"),
    ],
)
def test_a_state_of_other_settings_is_refused_and_changes_nothing(settings, names):
    state = BatchCursor(plan_of(), epoch=2, slot=7).state_dict()
    cursor = BatchCursor(plan_of(**settings), epoch=1, slot=3)
    expected = drawn(cursor, 2)
    cursor.seek(1, 3)
    with pytest.raises(ValueError, match=names):
        cursor.load_state_dict(state)
    assert cursor.position() == (1, 3)
    assert drawn(cursor, 2) == expected


def test_a_state_of_other_ids_is_refused_by_name():
    state = make().cursor().state_dict()
    for ids, names in [
        (IDS[::-1].copy(), "ids is "),
        (np.append(IDS, 5), "num_samples is 90 in the checkpoint, 91 in this sampler"),
        (np.where(IDS == 40, 9, IDS), "num_patches is 4 in the checkpoint, 3 in this sampler"),
    ]:
        cursor = PatchBatchSampler(ids, 4, seed=1).cursor()
        with pytest.raises(ValueError, match=names):
            cursor.load_state_dict(state)


def test_a_drawn_seed_gives_way_and_a_given_one_does_not():
    given_one = make(seed=5, partial="pad").cursor()
    state = given_one.state_dict()
    drawn_one = PatchBatchSampler(IDS, 4, partial="pad").cursor()
    drawn_one.load_state_dict(state)
    assert drawn_one.plan.seed == 5
    assert drawn(drawn_one, 30) == drawn(given_one, 30)
    # It was not given here, so another state may replace it again.
    drawn_one.load_state_dict(make(seed=6, partial="pad").cursor().state_dict())
    assert drawn_one.plan.seed == 6
    with pytest.raises(ValueError, match="uses seed 5, this sampler seed 0"):
        make(seed=0, partial="pad").cursor().load_state_dict(state)


def test_a_state_that_is_refused_for_its_place_leaves_the_seed():
    state = make(seed=5, partial="pad").cursor().state_dict()
    cursor = PatchBatchSampler(IDS, 4, partial="pad").cursor()
    seed = cursor.plan.seed
    with pytest.raises(ValueError, match="slot must be < 25, got 99"):
        cursor.load_state_dict({**state, "slot": torch.tensor(99)})
    assert (cursor.plan.seed, cursor.position()) == (seed, (0, 0))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"slot": torch.tensor(-1)}, ValueError, "slot must be >= 0, got -1"),
        ({"epoch": torch.tensor(-1)}, ValueError, "epoch must be >= 0, got -1"),
        (
            {"slot": torch.tensor(2.7)},
            TypeError,
            "slot must be an integer tensor, got torch.float32",
        ),
        ({"epoch": torch.zeros(2, dtype=torch.int64)}, RuntimeError, "size mismatch for epoch"),
        ({"_extra_state": None}, TypeError, "must come from BatchCursor.state_dict.*, got None"),
        ({"_extra_state": {"seed": 5}}, TypeError, "must come from BatchCursor.state_dict"),
        ({"_extra_state": {"seed": 5, "fingerprint": 3}}, TypeError, "fingerprint must be a map"),
        (
            {"_extra_state": {"seed": 5, "fingerprint": {}}},
            ValueError,
            "ids is absent in the checkpoint",
        ),
    ],
)
def test_broken_states(change, error, match):
    cursor = BatchCursor(plan_of(), epoch=1, slot=2)
    state = {**BatchCursor(plan_of(), epoch=4, slot=5).state_dict(), **change}
    with pytest.raises(error, match=match):
        cursor.load_state_dict(state)
    assert cursor.position() == (1, 2)


@pytest.mark.parametrize("lacking", ["epoch", "slot", "_extra_state"])
def test_loading_is_strict(lacking):
    state = BatchCursor(plan_of(), epoch=4, slot=5).state_dict()
    del state[lacking]
    cursor = BatchCursor(plan_of(), epoch=1, slot=2)
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{lacking}"'):
        cursor.load_state_dict(state)
    assert cursor.position() == (1, 2)
    # Half a place is none: the rest of it is not taken over.
    assert cursor.load_state_dict(state, strict=False).missing_keys == [lacking]
    assert cursor.position() == (1, 2)


def test_the_state_of_the_sampler_is_not_the_cursors():
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
        make().cursor().load_state_dict(make().state_dict())


# ---------------------------------------------------------------------------------------------
# In a model


class Trainer(torch.nn.Module):
    """A model that takes its batches by itself; its loss counts valid rows only."""

    def __init__(self, cursor: BatchCursor) -> None:
        super().__init__()
        self.cursor = cursor
        self.layer = torch.nn.Linear(2, 1)
        with torch.no_grad():
            self.layer.weight.copy_(torch.tensor([[0.5, -1.0]]))
            self.layer.bias.fill_(0.25)
        self.register_buffer("x", torch.arange(2.0 * IDS.size).reshape(-1, 2) / 100)
        self.register_buffer("scales", torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.register_buffer("column", torch.arange(cursor.plan.batch_size))

    def forward(self) -> tuple[torch.Tensor, CursorBatch]:
        batch = self.cursor()
        out = self.layer(self.x[batch.indices])[:, 0] * self.scales[batch.group]
        counted = torch.where(self.column < batch.valid, out * out, 0)
        return counted.sum() / batch.valid, batch


def short_graph(**settings) -> PatchBatchSampler:
    """A sampler whose cursor is quick to trace: samples in order, and seven batches shuffled."""
    few = {"batch_size": 20, "partial": "pad", "seed": 1, "shuffle_within_batches": False}
    return quiet(IDS, **few | settings)


def trainer(**settings) -> Trainer:
    return Trainer(short_graph(**settings).cursor())


def steps_of(model, count: int) -> list[tuple[float, list[int], int, int]]:
    actual = []
    for _ in range(count):
        loss, batch = model()
        actual.append((loss.item(), batch.indices.tolist(), int(batch.valid), int(batch.group)))
    return actual


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to": lambda model: copy.deepcopy(model).to("cpu"),
    "double": lambda model: copy.deepcopy(model).double(),
    "half and back": lambda model: copy.deepcopy(model).half().float(),
}


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_model_is_copied_with_its_place_and_may_be_compiled_at_once(made):
    model = trainer()
    steps_of(model, 3)
    copied = made(model)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(copied, fullgraph=True, backend=counter)
    expected = steps_of(model, 12)
    # Each has its own place, whatever it shares.
    assert model.cursor.position() == (2, 1)
    actual = steps_of(compiled, 12)
    assert [step[1:] for step in actual] == [step[1:] for step in expected]
    assert [step[0] for step in actual] == pytest.approx([step[0] for step in expected], rel=1e-2)
    assert counter.frame_count == 1
    assert copied.cursor.epoch.dtype == copied.cursor.slot.dtype == torch.int64


def test_a_copy_shares_the_order_of_the_samples():
    cursor = make().cursor()
    assert copy.deepcopy(cursor).plan is cursor.plan
    # What refers to a cursor from inside it is copied along with it.
    cursor.users = [cursor]
    copied = copy.deepcopy(cursor)
    assert copied.users == [copied]
    assert copied is not cursor


def test_a_model_keeps_its_place_in_its_state():
    model = trainer()
    steps_of(model, 9)
    other = trainer()
    other.load_state_dict(saved(model))
    assert other.cursor.position() == (1, 2)
    assert steps_of(other, 14) == steps_of(model, 14)


def test_moving_a_model_moves_the_plan(monkeypatch):
    model = trainer()
    moved_to = []
    original = EpochPlan.on
    monkeypatch.setattr(EpochPlan, "on", lambda *a: moved_to.append(a[1]) or original(*a))
    # No second device is here that holds values; this one has all that is asked of a device.
    model.to("meta")
    assert moved_to == [Device("torch", "meta")]
    assert model.cursor.plan.device == Device("torch", "meta")
    assert model.cursor().indices.device == torch.device("meta")


# ---------------------------------------------------------------------------------------------
# Compiled


@pytest.mark.parametrize(
    ("backend", "shuffle_within_batches"),
    [
        ("eager", False),
        pytest.param("aot_eager", True, marks=pytest.mark.slow("traces large graphs twice")),
    ],
)
@pytest.mark.parametrize(("num_replicas", "uneven"), [(1, "pad"), (3, "pad"), (3, "drop")], ids=str)
def test_one_graph_serves_a_whole_run(backend, shuffle_within_batches, num_replicas, uneven):
    settings = {
        "num_replicas": num_replicas,
        "rank": num_replicas - 1,
        "uneven": uneven,
        "shuffle_within_batches": shuffle_within_batches,
    }
    plain, model = trainer(**settings), trainer(**settings)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model, fullgraph=True, backend=counter)
    sampler = short_graph(**settings)
    for epoch in range(3):
        actual = steps_of(step, len(sampler))
        assert [batch for _, *batch in actual] == [[*b] for b in handed_out(sampler, epoch)]
        assert [loss for loss, *_ in actual] == pytest.approx(
            [loss for loss, *_ in steps_of(plain, len(sampler))]
        )
    assert counter.frame_count == 1
    assert model.cursor.position() == plain.cursor.position() == (3, 0)


def test_a_compiled_model_is_trained_and_sought_without_another_graph():
    losses = []
    counter = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        model = trainer()
        step = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        optimizer = torch.optim.SGD(model.layer.parameters(), lr=1e-3)
        actual = []
        for place in [(0, 5), (7, 7)]:
            model.cursor.seek(*place)
            for _ in range(8):
                optimizer.zero_grad()
                loss, _ = step()
                loss.backward()
                optimizer.step()
                actual.append(loss.item())
        assert model.cursor.position() == (9, 1)
        losses.append(actual)
    assert losses[1] == pytest.approx(losses[0])
    assert len(set(losses[0])) == 16
    assert counter.frame_count == 1


def test_a_compiled_cursor_takes_over_a_seed_that_is_loaded():
    cursor = short_graph(seed=None).cursor()
    step = torch.compile(cursor, fullgraph=True, backend="eager")
    step()
    state = short_graph(seed=5).cursor().state_dict()
    cursor.load_state_dict(state)
    expected = epoch_of(short_graph(seed=5), 0)
    assert [step().indices.tolist() for _ in expected] == expected


def test_a_cursor_is_shown_by_its_plan_and_ranks():
    assert "rank" not in repr(BatchCursor(plan_of()))
    shown = repr(BatchCursor(plan_of(), num_replicas=3, rank=2))
    assert "EpochPlan(11 batches, seed=5" in shown
    assert "device='cpu', rank 2 of 3" in shown


def test_a_model_that_is_cast_leaves_the_place_in_integers():
    sampler = PatchBatchSampler(PatchGroups.from_counts([5, 40, 4]), 8, seed=3, partial="pad")
    cursor, expected = sampler.cursor(), sampler.cursor()
    cursor(), expected()
    cursor.type(torch.float16)
    assert (cursor.epoch.dtype, cursor.slot.dtype) == (torch.int64, torch.int64)
    assert cursor().indices.tolist() == expected().indices.tolist()
