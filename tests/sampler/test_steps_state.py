"""Steps and state: a pass goes on in the width that it was begun in, on whatever ranks."""

from __future__ import annotations

import copy
import json
import re
import warnings
from itertools import product

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups, PatchTensorLoader
from support.strategies import IDS, draw, epoch_of, quiet, through_json

COSTS = {5: 1.0, -2: 2.5, 9: 1.4, 40: 7.0}
KINDS = [
    {"steps": "balanced", "patch_costs": COSTS},
    {"steps": "same_patch"},
    {"steps": "same_patch", "interleave": False},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=["balanced", "same", "same in a row"])


def make(**settings) -> PatchBatchSampler:
    return quiet(IDS, 4, **{"seed": 1, **settings})


def world_of(num_replicas: int, **settings) -> list[PatchBatchSampler]:
    return [
        quiet(IDS, 4, seed=1, num_replicas=num_replicas, rank=rank, **settings)
        for rank in range(num_replicas)
    ]


def in_turn(parts) -> list:
    return [batch for each in zip(*parts, strict=True) for batch in each]


def in_width(width: int, epoch: int, **kind) -> list[list[int]]:
    """A whole epoch in steps of a width."""
    return epoch_of(make(**kind, step_width=width), epoch)


@every_kind
@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.filterwarnings("ignore:Until epoch 6 ends")
def test_other_ranks_go_on_in_mid_step_in_the_saved_width(kind, uneven):
    kind = {**kind, "uneven": uneven}
    for done, (before, width), after in product(
        (1, 2, 3), ((2, 4), (2, 6), (4, 8), (3, 3)), (1, 2, 3, 5)
    ):
        first = world_of(before, **kind, step_width=width)
        epoch_batches = in_width(width, 6, **kind)
        drawn, states = [], []
        for sampler in first:
            sampler.set_epoch(6)
            iterator = iter(sampler)
            drawn.append(draw(iterator, done))
            states += [through_json(sampler.state_dict()), through_json(iterator.state_dict())]
        drawn = in_turn(drawn)
        assert drawn == epoch_batches[: done * before]
        assert all(state == states[0] for state in states)
        assert states[0]["step_width"] == width

        second = world_of(after, **kind)
        for sampler in second:
            sampler.load_state_dict(states[0])
        expected = epoch_batches[len(drawn) :]
        if uneven == "drop" and len(expected) < after:
            # No batch for every rank is left, so that epoch is finished.
            assert {sampler.epoch for sampler in second} == {7}
            continue
        iterators = [*map(iter, second)]
        lengths = {len(iterator) for iterator in iterators}
        remaining = in_turn(iterators)
        if uneven == "drop":
            expected = expected[: len(expected) // after * after]
            assert remaining == expected
        else:
            # To the end, and over it from the start as far as the last step of the ranks asks.
            assert remaining == (expected + epoch_batches * after)[: len(remaining)]
            assert 0 <= len(remaining) - len(expected) < after
        assert lengths == {len(remaining) // after}
        # The next epoch is in the width of those who go on.
        assert {sampler.epoch for sampler in second} == {7}
        for sampler in second:
            sampler.set_epoch(7)
            assert sampler.state_dict()["step_width"] == after
        following = in_turn(second)
        assert following == (in_width(after, 7, **kind) * after)[: len(following)]


@every_kind
def test_a_state_of_another_width_is_taken_to_the_end_of_its_epoch(kind):
    first = make(**kind, step_width=6)
    draw(iter(first), 7)
    state = through_json(first.state_dict())
    assert (state["slot"], state["step_width"]) == (7, 6)
    second = make(**kind, step_width=2)
    second.load_state_dict(state)
    assert second.plan.step_width == 2
    epoch_batches = in_width(6, 0, **kind)
    # Saved once more on the way, by whoever has not drawn yet and by who has.
    assert through_json(second.state_dict()) == state
    iterator = iter(second)
    assert len(iterator) == len(epoch_batches) - 7
    assert draw(iterator, 4) == epoch_batches[7:11]
    onward = through_json(second.state_dict())
    assert (onward["slot"], onward["step_width"]) == (11, 6)
    assert list(iterator) == epoch_batches[11:]
    done = second.state_dict()
    assert (done["epoch"], done["slot"], done["step_width"]) == (0, len(epoch_batches), 6)
    assert list(second) == in_width(2, 1, **kind)
    assert second.state_dict()["step_width"] == 2

    third = make(**kind, step_width=3)
    third.load_state_dict(onward)
    assert list(third) == epoch_batches[11:]
    # The end of an epoch in one width is the start of the next in another.
    third.load_state_dict(done)
    assert third.epoch == 1
    assert list(third) == in_width(3, 1, **kind)


@every_kind
def test_another_epoch_than_the_loaded_one_is_in_the_own_width(kind):
    first = make(**kind, step_width=6)
    draw(iter(first), 7)
    second = make(**kind, step_width=2)
    second.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match=r"set_epoch\(3\) drops the loaded position: epoch 0"):
        second.set_epoch(3)
    assert list(second) == in_width(2, 3, **kind)
    # The loaded epoch keeps the position, and so the width.
    second.load_state_dict(first.state_dict())
    second.set_epoch(0)
    assert list(second) == in_width(6, 0, **kind)[7:]


@every_kind
def test_a_step_of_the_pass_counts_from_where_it_began(kind):
    first = make(**kind, step_width=6)
    draw(iter(first), 7)
    second = make(**kind, step_width=2)
    second.load_state_dict(first.state_dict())
    draw(iter(second), 9)
    state = second.state_dict(step=3)
    assert (state["slot"], state["step_width"]) == (10, 6)


@pytest.mark.parametrize("output", ["list", "numpy"])
def test_a_loader_and_its_sampler_go_on_alike(output):
    torch = pytest.importorskip("torch")
    first = make(**KINDS[1], step_width=6)
    draw(iter(first), 7)
    samplers = [make(**KINDS[1], step_width=4, output=output) for _ in range(2)]
    for sampler in samplers:
        sampler.load_state_dict(first.state_dict())
    loader = PatchTensorLoader(samplers[0], x=torch.arange(IDS.size))
    rows = [batch["x"].tolist() for batch in loader]
    assert rows == [list(batch) for batch in samplers[1]]
    assert rows == in_width(6, 0, **KINDS[1])[7:]


def test_a_state_in_steps_is_small_and_plain():
    state = make(**KINDS[0], step_width=4).state_dict()
    assert type(state["step_width"]) is int
    assert type(state["fingerprint"]["patch_costs"]) is int
    assert through_json(state) == state
    assert make(**KINDS[1], step_width=4).state_dict()["fingerprint"]["uneven"] == "pad"
    # What has no influence on the batches is not in there.
    free = make(uneven="drop").state_dict()
    assert free["step_width"] == 1
    assert {"uneven", "patch_costs"}.isdisjoint(free["fingerprint"])
    assert "uneven" not in make(**KINDS[0], uneven="drop").state_dict()["fingerprint"]


@pytest.mark.parametrize(
    ("width", "error", "match"),
    [
        (0, ValueError, "state_dict step_width must be >= 1, got 0"),
        (-3, ValueError, "state_dict step_width must be >= 1, got -3"),
        (2**31, ValueError, "state_dict step_width must be < 2147483648"),
        (True, TypeError, "state_dict step_width must be an int, got True"),
        (2.0, TypeError, "state_dict step_width must be an int, got 2.0"),
        ("2", TypeError, "state_dict step_width must be an int, got '2'"),
        (None, TypeError, "state_dict step_width must be an int, got None"),
    ],
)
@every_kind
def test_widths_that_are_none_are_refused(kind, width, error, match):
    sampler = make(**kind, step_width=2)
    before = sampler.state_dict()
    with pytest.raises(error, match=re.escape(match)):
        sampler.load_state_dict({**make(**kind, step_width=2).state_dict(), "step_width": width})
    assert sampler.state_dict() == before


def test_a_width_is_refused_where_steps_are_free():
    state = {**make().state_dict(), "step_width": 2}
    with pytest.raises(ValueError, match="state_dict step_width must be 1 under steps='free', got"):
        make().load_state_dict(state)


def test_a_state_without_a_width_is_none():
    state = make().state_dict()
    del state["step_width"]
    with pytest.raises(TypeError, match=r"it lacks \['step_width'\]"):
        make().load_state_dict(state)


def test_a_slot_beyond_the_saved_width_s_epoch_is_refused():
    # 24 batches of their own; in steps of 4 of one patch 32 slots, in steps of 1 they are 24.
    state = make(**KINDS[1], step_width=4).state_dict()
    assert make(**KINDS[1], step_width=4).plan.num_batches == 32
    sampler = make(**KINDS[1], step_width=1)
    sampler.load_state_dict({**state, "slot": 32})
    with pytest.raises(ValueError, match="state_dict slot must be < 33, got 33"):
        sampler.load_state_dict({**state, "slot": 33})
    with pytest.raises(ValueError, match="state_dict slot must be < 25, got 32"):
        sampler.load_state_dict({**state, "slot": 32, "step_width": 1})


OTHER = [
    (
        {"steps": "same_patch"},
        "steps is 'balanced' in the checkpoint, 'same_patch' in this sampler",
    ),
    ({}, "steps is 'balanced' in the checkpoint, 'free' in this sampler"),
    ({"steps": "balanced"}, r"patch_costs is \d+ in the checkpoint, \d+ in this sampler"),
    (
        {"steps": "same_patch", "uneven": "drop"},
        "uneven is absent in the checkpoint, 'drop' in this sampler",
    ),
]


@pytest.mark.parametrize(("settings", "names"), OTHER)
def test_other_steps_are_refused_by_name(settings, names):
    state = make(**KINDS[0], step_width=2).state_dict()
    sampler = make(**settings)
    for load in (sampler.load_state_dict, iter(sampler).load_state_dict):
        with pytest.raises(ValueError, match=f"Cannot load state: .*{names}"):
            load(state)


def test_what_becomes_of_uneven_patches_is_a_setting_of_steps_of_one_patch_only():
    state = make(steps="same_patch", uneven="drop", step_width=2).state_dict()
    with pytest.raises(
        ValueError, match="uneven is 'drop' in the checkpoint, 'pad' in this sampler"
    ):
        make(steps="same_patch", step_width=2).load_state_dict(state)
    make(**KINDS[0]).load_state_dict(make(**KINDS[0], uneven="drop").state_dict())


# Cursors


def rows_of(cursor, count: int) -> list[list[int]]:
    return [cursor().indices.tolist() for _ in range(count)]


@every_kind
@pytest.mark.parametrize("uneven", ["pad", "drop"])
def test_a_cursor_hands_out_its_rank_s_batches_in_steps(kind, uneven):
    pytest.importorskip("torch")
    kind = {**kind, "uneven": uneven, "partial": "pad", "step_width": 4}
    for sampler in world_of(2, **kind):
        cursor = sampler.cursor()
        assert cursor.steps_per_epoch == len(sampler)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            assert cursor.position() == (epoch, 0)
            assert rows_of(cursor, len(sampler)) == [*sampler]
        assert cursor.position() == (2, 0)


@every_kind
def test_a_cursor_refuses_a_place_of_another_width_by_name(kind):
    pytest.importorskip("torch")
    first = make(**kind, partial="pad", step_width=4).cursor()
    rows_of(first, 3)
    state = first.state_dict()
    json.dumps(state["_extra_state"])
    again = make(**kind, partial="pad", step_width=4).cursor()
    again.load_state_dict(copy.deepcopy(state))
    assert again.position() == (0, 3)
    other = make(**kind, partial="pad", step_width=2).cursor()
    rows_of(other, 1)
    with pytest.raises(ValueError, match="step_width is 4 in the checkpoint, 2 in this sampler"):
        other.load_state_dict(copy.deepcopy(state))
    assert other.position() == (0, 1)


def test_a_cursor_of_a_sampler_that_was_loaded_keeps_the_saved_width():
    pytest.importorskip("torch")
    kind = {**KINDS[1], "partial": "pad"}
    first = make(**kind, step_width=6)
    draw(iter(first), 7)
    second = make(**kind, step_width=2)
    second.load_state_dict(first.state_dict())
    cursor = second.cursor()
    assert cursor.position() == (0, 7)
    assert cursor.plan.step_width == 6
    left = in_width(6, 0, **kind)[7:]
    assert rows_of(cursor, len(left)) == left
    # What is compiled knows one width: it runs on in it.
    assert rows_of(cursor, 5) == in_width(6, 1, **kind)[:5]
    # Made anew for the next epoch, it has the sampler's own.
    list(second)
    second.set_epoch(1)
    assert second.cursor().plan.step_width == 2
    assert rows_of(second.cursor(), 5) == in_width(2, 1, **kind)[:5]


def test_a_plan_of_another_width_leaves_the_first_as_it_was():
    plan = make(**KINDS[1], step_width=4).plan
    before = plan.evaluate(2, np.arange(plan.num_batches)).indices.tolist()
    wider = plan.with_step_width(6)
    assert (plan.step_width, wider.step_width) == (4, 6)
    assert (plan.num_batches, wider.num_batches) == (32, 42)
    assert wider.with_step_width(6) is wider
    back = wider.with_step_width(4)
    assert back.evaluate(2, np.arange(32)).indices.tolist() == before
    assert plan.evaluate(2, np.arange(32)).indices.tolist() == before
    assert plan.settings == wider.settings
    assert back.with_seed(9).step_width == 4


@every_kind
def test_a_plan_of_another_width_keeps_nothing_of_the_first(kind):
    torch = pytest.importorskip("torch")
    fresh = {width: make(**kind, step_width=width).plan for width in (4, 6)}
    plan = make(**kind, step_width=4).plan.on("cpu")
    for width in (4, 6, 4):
        # Everything that a plan keeps for later is made, and then the width is another.
        plan = plan.with_step_width(width)
        slots = np.arange(plan.num_batches)
        expected = fresh[width].evaluate(2, slots)
        for actual in (
            plan.evaluate(2, slots),
            plan.evaluator.block_by_arrays(2, torch.from_numpy(slots)),
            plan.on("numpy").evaluate(2, slots),
        ):
            for a, b in zip(actual, expected, strict=True):
                np.testing.assert_array_equal(a, b)
        last = torch.tensor(plan.num_batches - 1)
        assert plan.batch(torch.tensor(2), last).tolist() == expected.indices[-1].tolist()


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("settings", [{}, {"interleave": False}], ids=["interleaved", "in a row"])
def test_a_plan_of_another_width_keeps_nothing_of_what_the_first_one_evaluated(settings):
    groups = PatchGroups.from_counts([50, 9, 33, 70])
    settings = {"steps": "same_patch", "step_width": 3, **settings}
    for device in ("numpy", "cpu"):
        plan = EpochPlan(groups, 4, 1, device=device, **settings)
        plan.evaluate(5, range(plan.num_batches))
        wider = plan.with_step_width(5)
        fresh = EpochPlan(groups, 4, 1, **{**settings, "step_width": 5})
        actual = wider.evaluate(5, range(wider.num_batches)).indices.tolist()
        assert actual == fresh.evaluate(5, range(fresh.num_batches)).indices.tolist()


@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.parametrize("interleave", [True, False])
def test_ranks_that_cut_across_steps_of_one_patch_are_warned(uneven, interleave):
    ids = np.repeat([10, 2, 7], [50, 30, 41])

    def world(ranks: int, width: int) -> list[PatchBatchSampler]:
        kind = {"steps": "same_patch", "uneven": uneven, "interleave": interleave}
        return [
            PatchBatchSampler(
                ids, 2, seed=1, num_replicas=ranks, rank=rank, step_width=width, **kind
            )
            for rank in range(ranks)
        ]

    cases = set()
    for (before, width), after, done in product(
        ((4, 4), (2, 4), (3, 6), (1, 1)), (1, 2, 3, 4, 6, 8), (0, 1, 3)
    ):
        first = world(before, width)[0]
        draw(iter(first), done)
        state = first.state_dict(step=done)
        second = world(after, after)
        warned = []
        for rank in second:
            # By the sampler, or by an iterator of it.
            for loading in (rank, iter(rank)):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    loading.load_state_dict(state)
                assert all(entry.filename == __file__ for entry in caught)
                warned.append(len(caught))
        assert len(set(warned)) == 1
        for rank in second:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                rank.load_state_dict(state)
        steps = [*zip(*second, strict=True)]
        mixed = any(len({int(ids[batch[0]]) for batch in step}) > 1 for step in steps)
        # It cannot know which patches lie side by side, so it warns where they may be two.
        assert warned[0] == 1 or not mixed
        fits = width % after == 0 and before * done % after == 0
        assert warned[0] == (not fits)
        cases.add((warned[0], mixed))
    assert {(0, False), (1, True)} <= cases


def test_the_rest_of_steps_that_fit_and_of_a_finished_epoch_is_not_warned_of():
    kind = {"steps": "same_patch"}
    finished = {**world_of(4, **kind)[0].state_dict(), "epoch": 3}
    finished["slot"] = world_of(4, **kind)[0].plan.num_batches
    for rank in world_of(3, **kind):
        rank.load_state_dict(finished)
        assert rank.epoch == 4
    message = (
        "Until epoch 3 ends, 3 ranks may process different patches in one step, because the epoch "
        "began with step_width=4. To avoid this, resume on the same number of ranks as before."
    )
    with pytest.warns(UserWarning, match=f"^{message}$"):
        world_of(3, **kind)[0].load_state_dict({**finished, "slot": 0})
