"""Steps: of one patch, or of nearly equal cost; on one rank, or shared out among several."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from support import oracle
from support.strategies import IDS, epochs, patchy_ids, quiet, seeds, times_seen

COSTS = st.one_of(
    st.integers(1, 4), st.floats(0.5, 2), st.floats(1e-6, 1e6), st.sampled_from([0.1, 1e150, 3e-90])
)
PARTIALS = ("keep", "drop", "pad")


class Case(NamedTuple):
    """A plan in steps, and what the oracle has for it."""

    plan: EpochPlan
    oracle: oracle.Settings
    epoch: int

    @property
    def own(self) -> list[list[range]]:
        """Positions of every batch that each patch is cut into."""
        counts = self.plan.groups.counts.tolist()
        return [oracle.batches_of(n, self.oracle.batch_size, self.oracle.partial) for n in counts]

    def located(self) -> list[tuple[int, int]]:
        """(Patch, batch of it) at every slot."""
        locations = self.plan.evaluator.locate(self.epoch, np.arange(self.plan.num_batches))
        return [*zip(locations.group.tolist(), locations.j.tolist(), strict=True)]

    def steps(self) -> list[list[tuple[int, int]]]:
        result, width = self.located(), self.plan.step_width
        return [result[first : first + width] for first in range(0, len(result), width)]


@st.composite
def cases(draw: st.DrawFn, steps: str) -> Case:
    ids = draw(patchy_ids())
    groups = PatchGroups.from_ids(ids)
    settings: dict[str, Any] = {
        "batch_size": draw(st.sampled_from([1, 2, 3, 7, 20, 40])),
        "partial": draw(st.sampled_from(PARTIALS)),
        "interleave": True if steps == "balanced" else draw(st.booleans()),
        "shuffle_patches": draw(st.sampled_from([True, True, False])),
        "steps": steps,
        "step_width": draw(st.sampled_from([1, 2, 3, 4, 5, 8, 30])),
        "uneven": draw(st.sampled_from(["pad", "drop"])),
    }
    if steps == "balanced":
        settings["patch_costs"] = [draw(COSTS) for _ in range(groups.num_patches)]
    expected = oracle.Settings(**settings)
    try:
        plan = EpochPlan(groups, settings.pop("batch_size"), draw(seeds), **settings)
    except ValueError as error:
        # Checked on their own below.
        assume("must be at most" not in str(error))
        assume("leaves no batches" not in str(error))
        raise
    return Case(plan, expected, draw(epochs))


@given(st.sampled_from(["balanced", "same_patch"]).flatmap(cases))
def test_every_slot_is_what_the_oracle_says(case):
    sizes = case.plan.groups.counts.tolist()
    assert case.located() == oracle.order_of(sizes, case.plan.seed, case.epoch, case.oracle)


# Steps of one patch


@given(cases("same_patch"))
def test_a_step_is_of_one_patch_and_its_batches_come_equally_often(case):
    steps, width = case.steps(), case.plan.step_width
    assert {len(step) for step in steps} == {width}
    assert all(len({group for group, _ in step}) == 1 for step in steps)
    times_by_batch = Counter(case.located())
    for group, own_batches in enumerate(case.own):
        number = len(own_batches)
        whole = number // width if case.oracle.uneven == "drop" else -(-number // width)
        assert sum(step[0][0] == group for step in steps) == whole
        if number == 0:
            continue
        # Once, and the first ones again; where steps are wider than the patch, round and round.
        rounds, more = divmod(whole * width, number)
        times = [times_by_batch[group, j] for j in range(number)]
        assert times == [rounds + 1] * more + [rounds] * (number - more)
    assert set(case.plan.batches_by_patch % width) == {0}


@given(cases("same_patch"))
def test_the_steps_of_a_patch_hold_its_batches_in_turn(case):
    steps, width = case.steps(), case.plan.step_width
    for group, own in enumerate(case.own):
        result = [[j for _, j in step] for step in steps if step[0][0] == group]
        expected = [[(q * width + p) % len(own) for p in range(width)] for q in range(len(result))]
        assert sorted(result) == sorted(expected)
        if not (case.oracle.interleave and case.oracle.shuffle_patches):
            assert result == expected
    if not case.oracle.interleave:
        # All steps of a patch are in a row.
        groups = [step[0][0] for step in steps]
        assert sum(a != b for a, b in pairwise(groups)) == len(set(groups)) - 1


@given(data=st.data(), seed=seeds, epoch=st.integers(0, 3))
def test_steps_of_one_slot_are_the_free_order(data, seed, epoch):
    ids = data.draw(patchy_ids())
    settings = {
        "batch_size": data.draw(st.integers(1, 9)),
        "partial": data.draw(st.sampled_from(["keep", "pad"])),
        "interleave": data.draw(st.booleans()),
        "shuffle_patches": data.draw(st.booleans()),
        "uneven": data.draw(st.sampled_from(["pad", "drop"])),
        "seed": seed,
    }
    free = quiet(ids, **settings)
    same = quiet(ids, **settings, steps="same_patch", step_width=1)
    for sampler in (free, same):
        sampler.set_epoch(epoch)
    assert list(same) == list(free)
    # Their states are of different settings all the same.
    with pytest.raises(
        ValueError, match="steps is 'free' in the checkpoint, 'same_patch' in this sampler"
    ):
        same.load_state_dict(free.state_dict())


# Steps of nearly equal cost


@given(cases("balanced"))
def test_balanced_steps_hold_every_batch_once(case):
    assert sorted(case.located()) == [
        (group, j) for group, own_batches in enumerate(case.own) for j in range(len(own_batches))
    ]
    sizes = [len(step) for step in case.steps()]
    # Only the last may be short.
    assert set(sizes[:-1]) <= {case.plan.step_width}


def costs_of(case: Case) -> dict[tuple[int, int], float]:
    """What each batch costs, and so which class it is in."""
    costs = case.oracle.patch_costs
    return {
        (group, j): len(batch) * float(costs[group])
        for group, own_batches in enumerate(case.own)
        for j, batch in enumerate(own_batches)
    }


@given(cases("balanced"))
@example(
    Case(
        EpochPlan(
            PatchGroups.from_counts([40, 30, 50]),
            3,
            5,
            steps="balanced",
            step_width=8,
            partial="keep",
        ),
        oracle.Settings(3, steps="balanced", step_width=8, patch_costs=[1, 1, 1]),
        2,
    )
)
def test_a_step_spans_two_neighbouring_classes_unless_one_is_smaller_than_it(case):
    costs = costs_of(case)
    classes = {batch: oracle.cost_class(1, cost) for batch, cost in costs.items()}
    sizes = Counter(classes.values())
    for number in sizes:
        inside = [cost for batch, cost in costs.items() if classes[batch] == number]
        assert max(inside) / min(inside) < 9 / 8
    # The cheaper class is the lower one.
    by_cost = sorted(costs, key=costs.__getitem__)
    assert [classes[batch] for batch in by_cost] == sorted(classes.values())
    width = case.plan.step_width
    for step in case.steps():
        step_classes = sorted({classes[batch] for batch in step})
        between = [sizes[number] for number in sizes if step_classes[0] < number < step_classes[-1]]
        # Whole in the step, beside a batch or more of each of its neighbours, or in the short one,
        # whose batches are taken out of the middle and, where it goes round the end, of both ends.
        if len(step) == width:
            assert sum(between) <= max(width - 2, 0) + case.plan.num_batches % width


def test_a_step_of_large_classes_is_of_one_or_two_neighbours():
    # Four classes of 25 batches, steps of 8.
    plan = EpochPlan(
        PatchGroups.from_counts([100] * 4),
        4,
        3,
        steps="balanced",
        step_width=8,
        patch_costs=[4, 1, 3, 2],
    )
    rank_of = np.array([3, 0, 2, 1])
    straddling = 0
    for epoch in range(50):
        group = plan.evaluator.locate(epoch, np.arange(96)).group.reshape(12, 8)
        ranks = np.sort(rank_of[group], axis=1)
        assert (ranks[:, -1] - ranks[:, 0] <= 1).all()
        straddling += int((ranks[:, -1] > ranks[:, 0]).sum())
    # Three boundaries, of which the short step's batches may hide one.
    assert 2 * 50 <= straddling <= 3 * 50


@given(cases("balanced"), st.integers(-300, 300))
def test_a_power_of_two_on_all_costs_changes_nothing(case, power):
    scaled = [float(cost) * 2.0**power for cost in case.oracle.patch_costs]
    assume(all(2.0**-900 < cost < 2.0**512 for cost in scaled))
    again = EpochPlan(
        case.plan.groups,
        case.oracle.batch_size,
        case.plan.seed,
        partial=case.oracle.partial,
        shuffle_patches=case.oracle.shuffle_patches,
        steps="balanced",
        step_width=case.plan.step_width,
        patch_costs=scaled,
    )
    assert again.settings == case.plan.settings
    assert Case(again, case.oracle, case.epoch).located() == case.located()


def test_a_filled_batch_costs_as_much_as_a_full_one():
    # 7 samples in batches of 4: under "keep" the second is cheaper, and stands in another class.
    ids = np.repeat([1, 2, 3], 7)
    for partial, classes in (("keep", 2), ("pad", 1), ("drop", 1)):
        plan = PatchBatchSampler(ids, 4, seed=0, steps="balanced", partial=partial).plan
        assert plan._tables.buckets.counts.size == classes


# Ranks


def ranks_of(num_replicas: int, ids: Any = IDS, batch_size: int = 4, **settings: Any):
    return [
        quiet(ids, batch_size, num_replicas=num_replicas, rank=rank, **{"seed": 1, **settings})
        for rank in range(num_replicas)
    ]


CHOICES = [
    (steps, uneven, partial, interleave)
    for steps, uneven, partial, interleave in product(
        ("balanced", "same_patch"), ("pad", "drop"), PARTIALS, (True, False)
    )
    if interleave or steps == "same_patch"
]


@pytest.mark.parametrize(("steps", "uneven", "partial", "interleave"), CHOICES)
def test_ranks_have_equally_many_batches_and_begin_every_step_together(
    steps, uneven, partial, interleave
):
    for num_replicas, times in product((1, 2, 3, 5), (1, 2, 3)):
        width = num_replicas * times
        settings = {
            "steps": steps,
            "uneven": uneven,
            "partial": partial,
            "interleave": interleave,
            # The largest patch has 12 batches.
            "step_width": min(width, 12 // num_replicas * num_replicas),
        }
        world = ranks_of(num_replicas, **settings)
        assert len({len(sampler) for sampler in world}) == 1
        together = [*zip(*(sampler.batches(7) for sampler in world), strict=True)]
        assert len(together) == len(world[0])
        if steps == "same_patch":
            # What they work on at one time is of one patch, for as long as the step takes.
            patches = [{batch.patch_id for batch in each} for each in together]
            assert all(len(patch) == 1 for patch in patches)
            turns = settings["step_width"] // num_replicas
            assert len(patches) % turns == 0
            for first in range(0, len(patches), turns):
                assert len(set.union(*patches[first : first + turns])) == 1
        # Rank by rank they are the slots of one epoch, in order.
        slots = np.arange(len(together) * num_replicas)
        plan = world[0].plan
        locations = plan.evaluator.locate(7, slots % plan.num_batches)
        assert [batch.patch_id for each in together for batch in each] == plan.groups.patch_ids[
            locations.group
        ].tolist()


def test_the_width_is_that_of_the_ranks_if_none_is_given():
    for steps in ("balanced", "same_patch"):
        assert {s.plan.step_width for s in ranks_of(3, steps=steps)} == {3}
    assert {s.plan.step_width for s in ranks_of(3)} == {1}
    assert PatchBatchSampler(IDS, 4, seed=1, steps="same_patch").plan.step_width == 1


@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.parametrize("interleave", [True, False])
def test_micro_batches_of_one_patch_for_gradient_accumulation(interleave, uneven):
    ids = np.repeat([5, -2, 9], [83, 64, 17])
    sampler = PatchBatchSampler(
        ids, 4, seed=1, steps="same_patch", step_width=4, uneven=uneven, interleave=interleave
    )
    batches = [*sampler.batches(0)]
    # 21, 16 and 5 batches, in steps of four.
    assert len(batches) == len(sampler) == 4 * {"pad": 6 + 4 + 2, "drop": 5 + 4 + 1}[uneven]
    steps = [batches[first : first + 4] for first in range(0, len(batches), 4)]
    assert all(len({batch.patch_id for batch in step}) == 1 for step in steps)
    # The samples of a step are all different where the patch has them.
    for step in steps:
        samples = np.concatenate([batch.indices for batch in step])
        assert {ids[i] for i in samples.tolist()} == {step[0].patch_id}
        if step[0].patch_id == -2:
            assert np.unique(samples).size == 16
    assert [list(batch.indices) for batch in batches] == [*map(list, sampler)]


@pytest.mark.parametrize("partial", PARTIALS)
@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.parametrize("steps", ["balanced", "same_patch"])
def test_coverage_counts_what_steps_repeat_and_leave_out(steps, uneven, partial):
    # Every rank's samples, counted one by one.
    for width in (2, 4, 8):
        world = ranks_of(2, steps=steps, uneven=uneven, partial=partial, step_width=width)
        times_by_sample = times_seen([batch for s in world for batch in s], IDS.size)
        result = world[0].coverage(0)
        assert result == world[1].coverage(0)
        for patch_id, row in zip(result.patch_ids, result, strict=True):
            times = times_by_sample[patch_id == IDS]
            assert row["seen_once"] == (times == 1).sum()
            assert row["repeated"] == (times > 1).sum()
            assert row["missed"] == (times == 0).sum()
        assert result.totals()["batches"] == 2 * len(world[0])


def test_one_patch_steps_of_no_shuffling_go_through_the_patches_in_order():
    sampler = PatchBatchSampler(
        [7, 7, 7, 2, 2],
        1,
        shuffle_within_batches=False,
        shuffle_patches=False,
        seed=0,
        steps="same_patch",
        step_width=2,
    )
    assert list(sampler) == [[3], [4], [0], [1], [2], [0]]


# What uneven="drop" leaves out of balanced steps


def times_left_out(plan: EpochPlan, num_replicas: int, num_epochs: int) -> np.ndarray:
    """How often each batch is among the last ones, for which there is none on every rank."""
    before = np.cumsum(plan.batches_by_patch) - plan.batches_by_patch
    handed_out = plan.num_batches // num_replicas * num_replicas
    times = np.zeros(plan.num_batches, np.int64)
    for number in range(num_epochs):
        locations = plan.evaluator.locate(number, np.arange(handed_out, plan.num_batches))
        times[before[locations.group] + locations.j] += 1
    return times


@pytest.mark.parametrize(("width", "num_replicas"), [(8, 8), (8, 4), (16, 8), (7, 7)])
def test_batches_of_a_large_class_are_left_out_equally_often(width, num_replicas):
    plan = PatchBatchSampler(
        PatchGroups.from_counts([100, 97, 100, 95, 91]),
        10,
        seed=1,
        partial="pad",
        steps="balanced",
        step_width=width,
        num_replicas=num_replicas,
        rank=0,
        uneven="drop",
    ).plan
    assert plan.num_batches == 50
    num_left_out = 50 % num_replicas
    times = times_left_out(plan, num_replicas, num_epochs := 1500)
    chance = num_left_out / 50
    spread = (num_epochs * chance * (1 - chance)) ** 0.5
    assert abs(times - num_epochs * chance).max() < 5 * spread


def test_batches_of_small_classes_are_left_out_equally_often():
    # Every class is smaller than a step: 17 of one batch, steps of 8, one batch left.
    plan = EpochPlan(
        PatchGroups.from_counts([1] * 17),
        1,
        1,
        steps="balanced",
        step_width=8,
        patch_costs=2.0 ** np.arange(17),
    )
    times = times_left_out(plan, 8, num_epochs := 2000)
    assert times.sum() == num_epochs
    assert abs(times - num_epochs / 17).max() < 5 * (num_epochs / 17 * 16 / 17) ** 0.5
