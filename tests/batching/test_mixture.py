"""Mixing: shares of an epoch, and passes over patches that go on from epoch to epoch."""

from __future__ import annotations

import math
import pickle
import re
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate, chain, product
from time import process_time
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups, Temperature
from gpusampler.batching.mixture import apportion
from gpusampler.plan import mixture_coverage
from support import oracle
from support.cases import KINDS, PARTIALS, WEIGHTS, Case, cases, whole
from support.optional_torch import torch
from support.strategies import IDS, draw, epochs, quiet, through_json, times_seen

TOP = (1 << 31) - 1

MIXED = {
    "batch_size": {5: 3, -2: 2, 9: 4, 40: 2},
    "weights": {5: 7, -2: 1, 9: 1.5, 40: 0.2},
    "epoch_batches": 41,
}

# Against the oracle


@settings(max_examples=300)
@given(cases(), epochs)
def test_every_slot_is_what_the_oracle_says(case, epoch):
    plan = case.plan
    passes = oracle.passes_of(case.counts, case.seed, epoch, case.oracle)
    assert plan.num_batches == len(passes)
    locations = plan.evaluator.locate(epoch, np.arange(plan.num_batches))
    result = zip(locations.group.tolist(), locations.j.tolist(), strict=True)
    assert [*result] == [(group, number) for group, _, number in passes]
    if case.oracle.mixed:
        # The 64 bits that the key reads.
        assert [number % 2**64 for number in locations.passes.tolist()] == [
            number for _, number, _ in passes
        ]
    # As they are handed out, in blocks, and on torch.
    expected = oracle.epoch(case.ids.tolist(), case.seed, epoch, case.oracle)
    assert whole(plan, epoch) == expected
    block = plan.evaluate(epoch, np.arange(plan.num_batches))
    assert [
        row[: len(samples)]
        for row, (_, samples) in zip(block.indices.tolist(), expected, strict=True)
    ] == [samples for _, samples in expected]


@settings(max_examples=100)
@given(cases(), epochs)
def test_libraries_and_forms_are_equal_bit_for_bit(case, epoch):
    plan = case.plan
    slots = np.arange(plan.num_batches)
    expected = plan.evaluate(epoch, slots)
    plan_on_cpu = case.on("torch")
    sent = torch.from_numpy(slots)
    for block in (
        plan.evaluator.block_by_arrays(epoch, slots),
        plan_on_cpu.evaluate(epoch, sent),
        plan_on_cpu.evaluator.block_by_arrays(epoch, sent),
        plan.on("cpu").evaluate(epoch, slots),
    ):
        for actual, desired in zip(expected, block, strict=True):
            np.testing.assert_array_equal(actual, np.asarray(desired))
    for slot in {0, plan.num_batches // 2, plan.num_batches - 1}:
        batch = plan_on_cpu.batch(torch.tensor(epoch), torch.tensor(slot))
        assert batch.tolist() == expected.indices[slot].tolist()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_iteration_is_the_plan_and_any_slot_can_be_asked_for(kind):
    sampler = PatchBatchSampler(IDS, seed=3, **{**MIXED, **kind})
    plan = sampler.plan
    expected = whole(plan, 9)
    result = [(batch.patch_id, batch.indices.tolist()) for batch in sampler.batches(9)]
    assert result == expected
    sampler = pickle.loads(pickle.dumps(sampler))
    sampler.set_epoch(9)
    assert list(sampler) == [samples for _, samples in expected]
    # Backwards, one of them twice, a later epoch first.
    slots = np.array([plan.num_batches - 1, 3, 3, 0, 17])
    for epoch in (9, 2):
        block = plan.evaluate(epoch, np.arange(plan.num_batches))
        for all_of_them, part in zip(block, plan.evaluate(epoch, slots), strict=True):
            np.testing.assert_array_equal(part, all_of_them[slots])


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_device_hands_out_the_same_batches(kind):
    # What a GPU without a kernel does, on the host.
    arguments = {**MIXED, **kind, "seed": 3}
    host = PatchBatchSampler(IDS, device="numpy", **arguments)
    plan_on_cpu = PatchBatchSampler(IDS, device="cpu", **arguments)
    assert not plan_on_cpu.plan.evaluator.works_on_host
    for epoch in (0, 5, 2**63 - 1):
        expected = whole(host.plan, epoch)
        assert whole(plan_on_cpu.plan, epoch) == expected
        result = [(batch.patch_id, batch.indices.tolist()) for batch in plan_on_cpu.batches(epoch)]
        assert result == expected


# Shares


def exact_shares(weights: list[float], total: int) -> list[Fraction | None]:
    """What each is due of a total; None where that is less than 1, and it gets one all the same."""
    weights = list(map(Fraction, weights))
    due: list[Fraction | None] = [Fraction(0)] * len(weights)
    while True:
        free = [g for g, share in enumerate(due) if share is not None]
        remaining = total - (len(due) - len(free))
        sum_ = sum(weights[g] for g in free)
        for g in free:
            due[g] = weights[g] * remaining / sum_
        below_minimum = [g for g in free if due[g] < 1]
        if not below_minimum:
            return due
        for g in below_minimum:
            due[g] = None


@settings(max_examples=200)
@given(data=st.data(), partial=st.sampled_from(PARTIALS))
def test_shares_are_within_one_batch_of_the_weights(data, partial):
    counts = data.draw(
        st.lists(st.one_of(st.integers(1, 9), st.integers(1, TOP)), min_size=1, max_size=30)
    )
    size = data.draw(st.sampled_from([1, 2, 3, 1000]))
    expected = oracle.Settings(size, partial)
    own_batches = [-(-n // size) if partial != "drop" else n // size for n in counts]
    taking_part = [g for g, nb in enumerate(own_batches) if nb]
    assume(taking_part)
    many = len(counts)
    # Of one magnitude, or of any; equal ones make ties.
    pool = data.draw(st.lists(WEIGHTS, min_size=1, max_size=4))
    weights = data.draw(
        st.one_of(
            st.none(),
            st.lists(WEIGHTS, min_size=many, max_size=many),
            st.lists(st.sampled_from(pool), min_size=many, max_size=many),
            st.lists(st.floats(2.0**-511, 2.0**511), min_size=many, max_size=many),
        )
    )
    length = st.one_of(
        st.integers(len(taking_part), 3 * many + 9), st.integers(len(taking_part), 2**60 - 1)
    )
    total = data.draw(st.one_of(st.none(), length) if weights else length)
    groups = PatchGroups.from_counts(counts)
    plan = EpochPlan(groups, size, 0, partial=partial, weights=weights, epoch_batches=total)
    shares = plan.batches_by_patch.tolist()
    assert plan.own_batches_by_patch.tolist() == own_batches
    assert shares == oracle.slots_of(
        own_batches, expected._replace(weights=weights, epoch_batches=total)
    )

    total = sum(own_batches) if total is None else total
    assert sum(shares) == plan.num_batches == total
    assert {g for g, share in enumerate(shares) if share} == set(taking_part)
    weights = [(own_batches if weights is None else weights)[g] for g in taking_part]
    shares = [shares[g] for g in taking_part]
    # Weights are good to 2**-52 of their sum.
    error = 1 + Fraction(total, 2**50)
    for share, exact in zip(shares, exact_shares(weights, total), strict=True):
        assert abs(share - (1 if exact is None else exact)) < error
    # More weight, no fewer batches; of equal weight, no fewer for the first one.
    weighed = oracle.whole_weights(weights)
    for g, h in product(range(len(taking_part)), repeat=2):
        extra = weighed[g] > weighed[h] or (weighed[g] == weighed[h] and g < h)
        assert shares[g] >= shares[h] or not extra


@pytest.mark.parametrize(
    ("counts", "weights", "length", "expected"),
    [
        # Ties go to the patches that come first.
        ([9, 9, 9], [1, 1, 1], 10, [4, 3, 3]),
        ([9, 9, 9, 9], [1, 1, 1, 1], 6, [2, 2, 1, 1]),
        # A patch below one batch gets one, and the others share the rest.
        ([9, 9, 9], [1, 1000, 1000], 11, [1, 5, 5]),
        ([9, 9, 9], [1, 10, 89], 10, [1, 1, 8]),
        # Lifting one brings the next below one batch.
        ([9, 9, 9], [1, 20, 100], 6, [1, 1, 4]),
        ([9, 9, 9], [1, 1e-300, 1e150], 7, [1, 1, 5]),
        # Largest remainders: 2.5, 1.75, 1.75.
        ([9, 9, 9], [10, 7, 7], 6, [2, 2, 2]),
        ([5, 50, 500], None, 111, [1, 10, 100]),
        ([5, 50, 500], None, None, None),
        ([7], [0.3], 3, [3]),
        ([1 << 30, 1], [1, 1], 2**60 - 1, [2**59, 2**59 - 1]),
        # As few as there are.
        ([4, 5, 6], [1, 2, 3], 3, [1, 1, 1]),
    ],
)
def test_shares_of_some(counts, weights, length, expected):
    groups = PatchGroups.from_counts(counts)
    plan = EpochPlan(groups, 1, 0, weights=weights, epoch_batches=length)
    assert plan.batches_by_patch.tolist() == (counts if expected is None else expected)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_shares_of_the_longest_epochs_are_shared_out_as_steps_exactly(width):
    # Slots of a patch are beyond what a double holds.
    weights = [3, 7, 10, 11]
    slots = apportion(np.array(weights), 2**60 - 1, np.ones(4, bool))
    assert slots.tolist() == oracle.apportion(weights, 2**60 - 1)
    steps = -(-(2**60 - 1) // width)
    result = apportion(slots, steps, np.ones(4, bool))
    assert result.tolist() == oracle.apportion(slots.tolist(), steps)
    assert int(result.sum()) == steps


def test_patches_without_a_batch_take_no_part():
    groups = PatchGroups.from_counts([3, 50, 2, 70])
    plan = EpochPlan(groups, 5, 0, partial="drop", weights=[1000, 1, 1000, 3], epoch_batches=8)
    assert plan.batches_by_patch.tolist() == [0, 2, 0, 6]
    # Two batches are enough for the patches that have any.
    short = EpochPlan(groups, 5, 0, partial="drop", epoch_batches=2)
    assert short.batches_by_patch.tolist() == [0, 1, 0, 1]


@given(cases(kinds=KINDS[3:], always_mixed=True), epochs)
def test_steps_of_one_patch_are_shared_out_whole(case, epoch):
    plan, width = case.plan, case.oracle.step_width
    total = sum(case.own) if case.oracle.epoch_batches is None else case.oracle.epoch_batches
    num_patches = sum(map(bool, case.own))
    steps = total // width if case.oracle.uneven == "drop" else max(-(-total // width), num_patches)
    assert plan.num_batches == steps * width
    shares = plan.batches_by_patch
    assert not (shares % width).any()
    assert (shares > 0).tolist() == [nb > 0 for nb in case.own]
    batches = whole(plan, epoch)
    for first in range(0, len(batches), width):
        assert len({patch for patch, _ in batches[first : first + width]}) == 1


# Passes


@settings(max_examples=100)
@given(cases(always_mixed=True, shuffle_patches=False, kinds=[{}, {"interleave": False}]), epochs)
def test_each_pass_has_every_sample_and_goes_on_from_epoch_to_epoch(case, epoch):
    plan, size_of = case.plan, case.oracle.size
    epoch = min(epoch, 2**63 - 8)
    batches_by_patch: dict[int, list[list[int]]] = {}
    for number in range(epoch, epoch + 7):
        # Unshuffled, a patch's batches come in turn.
        for patch, samples in whole(plan, number):
            batches_by_patch.setdefault(patch, []).append(samples)
    patch_ids = plan.groups.patch_ids.tolist()
    slots = plan.batches_by_patch.tolist()
    for g, (patch, own_batches) in enumerate(zip(patch_ids, case.own, strict=True)):
        if not own_batches:
            assert patch not in batches_by_patch
            continue
        batches, members = batches_by_patch[patch], np.flatnonzero(case.ids == patch)
        assert len(batches) == 7 * slots[g]
        # Of the pass that the first of these epochs is in, what was left.
        remaining = -epoch * slots[g] % own_batches
        passes = [batches[p : p + own_batches] for p in range(remaining, len(batches), own_batches)]
        orders = []
        for one in passes:
            times = times_seen(one, case.ids.size)
            assert not np.delete(times, members).any()
            whole_pass = len(one) == own_batches
            size = size_of(g)
            if case.oracle.partial == "drop":
                assert times.max() <= 1
                assert times.sum() == len(one) * size
            elif case.oracle.partial == "keep":
                assert times.max() <= 1
                assert not whole_pass or (times[members] == 1).all()
            else:
                assert times.sum() == len(one) * size
                assert not whole_pass or times[members].min() >= 1
                assert not whole_pass or np.ptp(times[members]) <= 1
            if whole_pass and case.oracle.partial != "drop":
                orders.append(tuple(chain.from_iterable(one)))
        head = times_seen(batches[:remaining], case.ids.size)
        assert case.oracle.partial == "pad" or head.max(initial=0) <= 1
        if len(members) >= 20 and case.oracle.shuffle_within_batches:
            assert len(set(orders)) == len(orders)
        elif not case.oracle.shuffle_within_batches:
            assert len(set(orders)) <= 1


@given(cases(kinds=KINDS, partials=("keep", "pad"), always_mixed=True), st.integers(0, 2**62))
def test_every_sample_comes_round_in_time(case, first):
    # Whatever the order of the batches. From where a pass begins, one pass; from anywhere, the rest
    # of one and another, as passes are permuted by themselves.
    plan = case.plan
    shares = plan.batches_by_patch.tolist()
    windows = []
    for own_batches, m in zip(case.own, shares, strict=True):
        step = math.gcd(own_batches, m)
        needed = own_batches if first * m % own_batches == 0 else 2 * own_batches - step
        windows.append(-(-needed // m))
    assume(max(windows) * plan.num_batches < 3000)
    times = np.zeros(case.ids.size, int)
    for number in range(max(windows)):
        for _, samples in whole(plan, first + number):
            times[samples] += 1
        for patch_id, window in zip(np.unique(case.ids), windows, strict=True):
            if window == number + 1:
                assert (times[case.ids == patch_id] > 0).all()


@given(cases(kinds=KINDS[:2], always_mixed=True), epochs)
def test_the_order_of_the_batches_says_nothing_of_what_they_hold(case, epoch):
    batches = sorted(whole(case.plan, epoch))
    for changed in ({"shuffle_patches": False}, {"interleave": True}):
        arguments = {**case.given, **changed}
        assert sorted(whole(case._replace(given=arguments).plan, epoch)) == batches


def test_a_patch_of_many_passes_is_permuted_otherwise_in_each():
    plan = EpochPlan(PatchGroups.from_counts([64, 640]), 8, 5, weights=[10, 1], epoch_batches=880)
    assert plan.batches_by_patch.tolist() == [800, 80]
    samples = [samples for patch, samples in whole(plan, 0) if patch == 0]
    assert (times_seen(samples, 64) == 100).all()
    unshuffled = EpochPlan(
        plan.groups, 8, 5, weights=[10, 1], epoch_batches=880, shuffle_patches=False
    )
    batches = [samples for patch, samples in whole(unshuffled, 0) if patch == 0]
    passes = {tuple(chain.from_iterable(batches[p : p + 8])) for p in range(0, 800, 8)}
    assert len(passes) == 100
    assert all(len(set(one)) == 64 for one in passes)
    # Pass 0 is that of the plain plan's epoch 0, and so on.
    plain = EpochPlan(PatchGroups.from_counts([64, 640]), 8, 5, shuffle_patches=False)
    for number in (0, 1, 57):
        of_patch = [samples for patch, samples in whole(plain, number) if patch == 0]
        assert of_patch == batches[8 * number : 8 * number + 8]


def test_a_patch_comes_round_once_in_ten_epochs():
    # Patch 0 has 100 batches and 10 slots.
    plan = EpochPlan(PatchGroups.from_counts([400, 40]), 4, 1, weights=[1, 9], epoch_batches=100)
    assert plan.batches_by_patch.tolist() == [10, 90]
    for first in (0, 10, 2**40 * 10):
        orders = set()
        times = np.zeros(440, int)
        for epoch in range(first, first + 10):
            batches = [samples for patch, samples in whole(plan, epoch) if patch == 0]
            orders.add(tuple(map(tuple, sorted(batches))))
            times += times_seen(batches, 440)
        assert (times[:400] == 1).all()
        assert len(orders) == 10


# What is no mixing


@given(
    data=st.data(),
    case=cases(kinds=[*KINDS[:3]], partials=("drop", "pad"), always_mixed=True, patch_costs=None),
    epoch=epochs,
)
def test_own_batches_as_weights_are_the_plain_plan(data, case, epoch):
    own_batches = case.own
    arguments = {**case.given, "weights": None, "epoch_batches": None}
    plain = case._replace(given=arguments).plan
    scale = data.draw(st.sampled_from([1, 3, 0.1, 2.0**-500]))
    weights = [nb * scale if nb else 1 for nb in own_batches]
    for mixing in (
        {"weights": weights},
        {"epoch_batches": sum(own_batches)},
        {"weights": Temperature(1)},
        {"weights": Temperature(1.0), "epoch_batches": sum(own_batches)},
    ):
        mixed = case._replace(given={**arguments, **mixing}).plan
        assert mixed.batches_by_patch.tolist() == own_batches
        assert whole(mixed, epoch) == whole(plain, epoch)


@given(cases(kinds=KINDS[:2], partials=("keep",), always_mixed=True), epochs)
def test_own_batches_as_weights_are_the_plain_plan_with_short_batches(case, epoch):
    # In balanced steps a plain plan classes a short batch by itself, a mixed one as a whole one.
    arguments = {**case.given, "weights": None, "epoch_batches": None}
    mixed = {**arguments, "weights": case.own}
    assert whole(case._replace(given=mixed).plan, epoch) == whole(
        case._replace(given=arguments).plan, epoch
    )


def test_without_weights_settings_are_what_they_were():
    plain = PatchBatchSampler(IDS, 4, seed=1).plan.settings
    assert plain == {
        "batch_size": 4,
        "shuffle_within_batches": True,
        "shuffle_patches": True,
        "interleave": True,
        "partial": "keep",
        "steps": "free",
    }
    # Sizes that are all alike are one size.
    same = PatchBatchSampler(IDS, dict.fromkeys(IDS.tolist(), 4), seed=1).plan
    assert same.settings == plain
    assert same.batch_size == 4


# Temperature


def test_a_temperature_of_infinity_is_equal_shares():
    counts = [3, 800, 77, 1, 50, 50]
    for length in (None, 6, 7, 100, 1234):
        plan = EpochPlan(
            PatchGroups.from_counts(counts),
            2,
            0,
            weights=Temperature(math.inf),
            epoch_batches=length,
        )
        shares = plan.batches_by_patch
        assert np.ptp(shares) <= 1
        assert shares.sum() == (length or sum(-(-n // 2) for n in counts))
        # The first ones get what is left over.
        assert (np.diff(shares) <= 0).all()


@given(
    counts=st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    t=st.one_of(st.floats(0.05, 100), st.sampled_from([1, 2, 0.5, 1e-300, 1e300])),
    many=st.integers(0, 10**5),
)
def test_a_temperature_weighs_by_own_batches_to_the_power_of_its_inverse(counts, t, many):
    total = len(counts) + many
    groups = PatchGroups.from_counts(counts)
    plan = EpochPlan(groups, 3, 0, weights=Temperature(t), epoch_batches=total)
    own_batches = [-(-n // 3) for n in counts]
    # Relative to the largest one; what underflows is next to nothing.
    weights = [math.exp(math.log(nb / max(own_batches)) / t) or 5e-324 for nb in own_batches]
    due = exact_shares(weights, total)
    for share, exact in zip(plan.batches_by_patch.tolist(), due, strict=True):
        # Powers differ in their last digits.
        assert abs(share - (1 if exact is None else exact)) < 1 + 1e-6
    assert plan.batches_by_patch.sum() == total


def test_the_last_bits_of_a_power_decide_nothing():
    # Processors differ in them, and what is rounded to 32 does not.
    weights = Temperature(3).weights(np.arange(1, 5000))
    mantissa = np.frexp(weights)[0] * 2.0**32
    assert (mantissa == np.floor(mantissa)).all()
    np.testing.assert_allclose(weights, (np.arange(1, 5000) / 4999) ** (1 / 3), rtol=2.0**-32)


def test_a_temperature_brings_small_patches_up():
    shares = [
        PatchBatchSampler([1] * 9000 + [2] * 90 + [3] * 900, 10, seed=0, weights=Temperature(t))
        .coverage()
        .batches.tolist()
        for t in (0.5, 1, 2, 3, math.inf)
    ]
    assert shares[1] == [900, 9, 90]
    small = [row[1] for row in shares]
    assert small == sorted(small)
    # 30, 3 and 9.49 parts of 999 batches.
    assert shares[2] == [705, 71, 223]


# Sizes that are large


class Huge(NamedTuple):
    """Epochs of patches side by side, a slot at a time, from the oracle's parts."""

    counts: list[int]
    settings: oracle.Settings
    seed: int

    @property
    def own(self) -> list[int]:
        size, drop = self.settings.size, self.settings.partial == "drop"
        return [n // size(g) if drop else -(-n // size(g)) for g, n in enumerate(self.counts)]

    def located(self, epoch: int, slots: list[int]) -> list[tuple[int, int]]:
        """Patch, and which slot of it, at each slot."""
        share, width = oracle.slots_of(self.own, self.settings), self.settings.step_width
        if self.settings.steps == "balanced":
            lengths = [
                self.settings.size(g)
                if self.settings.partial == "pad"
                else min(self.settings.size(g), n)
                for g, n in enumerate(self.counts)
            ]
            runs = [(g, 0, m, lengths[g]) for g, m in enumerate(share)]
            balanced = oracle.Balanced(runs, self.seed, epoch, self.settings)
            return [balanced.at(slot) for slot in slots]
        patches = list(range(len(share)))
        if not self.settings.interleave:
            key = oracle.derive(self.seed, oracle.ORDER_OF_PATCHES, epoch, 0)
            patches = [oracle.permuted(g, len(share), key) for g in patches]
        before = [0, *accumulate(share[g] for g in patches)]
        key = oracle.derive(self.seed, oracle.ORDER_OF_BATCHES, epoch, 0)
        out = []
        for slot in slots:
            if self.settings.interleave:
                step = oracle.permuted(slot // width, before[-1] // width, key)
                slot = step * width + slot % width
            index = bisect_right(before, slot) - 1
            out.append((patches[index], slot - before[index]))
        return out

    def batches(self, epoch: int, slots: list[int]) -> list[tuple[int, list[int]]]:
        share = oracle.slots_of(self.own, self.settings)
        starts = [0, *accumulate(self.counts)]
        out = []
        for g, j in self.located(epoch, slots):
            n, size = self.counts[g], self.settings.size(g)
            pass_, b = divmod(epoch * share[g] + j, self.own[g])
            key = oracle.derive(self.seed, oracle.INSIDE_A_PATCH, pass_ % 2**64, g)
            last = b * size + size if self.settings.partial == "pad" else min(b * size + size, n)
            inside = [oracle.permuted(p % n, n, key) for p in range(b * size, last)]
            out.append((g, [starts[g] + x for x in inside]))
        return out


HUGE = {
    "one of 2**31 - 1": ([TOP, 5, 1000], [4, 2, 3], [1, 1e6, 3], 10**6),
    # A unit in the last place of a weight is a hundred batches.
    "more slots than int32": ([TOP, 5, 1000], [1, 2, 3], [0.1, 1 / 3, 0.7], 2**59 + 12345),
    "weights beyond 2**52": ([TOP, 5, 9], [1, 2, 3], [2**53 - 1, 2**51 + 3, 2**49 + 1], 2**59 + 1),
    "all at their ends": ([TOP, TOP, 1], [1, 2, 1], [5, 3, 4], 2**60 - 1),
    "1e12 samples": (
        np.random.default_rng(4).integers(15 * 10**8, 18 * 10**8, 600).tolist(),
        64,
        np.random.default_rng(5).lognormal(0, 3, 600).tolist(),
        10**9 + 7,
    ),
}


@pytest.mark.parametrize("partial", PARTIALS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", HUGE)
def test_huge_patches(name, kind, partial):
    counts, sizes, weights, length = HUGE[name]
    seed = 2**64 - 3
    if kind.get("steps"):
        kind = {**kind, "step_width": 7}
    arguments = {"weights": weights, "epoch_batches": length, "partial": partial, **kind}
    huge = Huge(counts, oracle.Settings(sizes, **arguments), seed)
    if isinstance(sizes, list):
        sizes = dict(enumerate(sizes))
    start_time = process_time()
    plan = EpochPlan(PatchGroups.from_counts(counts), sizes, seed, **arguments)
    assert 0 <= plan.num_batches - length < 7
    last = plan.num_batches - 1
    rng = np.random.default_rng(1)
    slots = np.unique(np.concatenate([[0, 1, last], rng.integers(0, last, 25)]))
    for epoch in (0, 1, 2**31 + 7, 2**63 - 1):
        block = plan.evaluate(epoch, slots)
        reference = plan.on("cpu").evaluator.block_by_arrays(epoch, torch.from_numpy(slots))
        for actual, desired in zip(block, reference, strict=True):
            np.testing.assert_array_equal(actual, np.asarray(desired))
        rows = zip(block.groups.tolist(), block.indices.tolist(), strict=True)
        batches = huge.batches(epoch, slots.tolist())
        for (group, row), (patch, samples) in zip(rows, batches, strict=True):
            assert (group, row[: len(samples)]) == (patch, samples)
    # Some tens of milliseconds where this was written.
    assert process_time() - start_time < 20


def more_than_24_bits(patches: int) -> None:
    """Check weights of very many patches, which a draw by `torch.multinomial` refuses."""
    rng = np.random.default_rng(7)
    counts = rng.integers(1, 6, patches)
    weights = rng.lognormal(0, 1, patches)
    groups = PatchGroups.from_counts(counts)
    plan = EpochPlan(groups, 2, 3, weights=weights, epoch_batches=3 * patches)
    shares = plan.batches_by_patch
    assert shares.sum() == 3 * patches
    assert shares.min() == 1
    # What each is due, once those below one batch have one.
    few = np.zeros(patches, bool)
    while True:
        due = weights * ((3 * patches - few.sum()) / weights[~few].sum())
        if not (fewer := ~few & (due < 1)).any():
            break
        few |= fewer
    assert (shares[few] == 1).all()
    assert abs(shares - due)[~few].max() < 1 + 1e-6
    last = np.arange(plan.num_batches - 500, plan.num_batches)
    block = plan.evaluate(2**63 - 1, last)
    starts = np.cumsum(counts) - counts
    inside = block.indices - starts[block.groups][:, None]
    assert (inside >= 0).all()
    assert (inside < counts[block.groups][:, None]).all()
    # Every patch has its slots: the last patch, too.
    slots = np.arange(0, plan.num_batches, max(1, plan.num_batches // 10**6))
    group = plan.evaluator.locate(5, slots).group
    assert group.max() > 0.9999 * patches


def test_weights_of_many_patches():
    more_than_24_bits(2**18 + 5)


@pytest.mark.battery("17 million patches, 3.6 GB")
def test_weights_of_more_than_2_to_the_24_patches():
    start_time = process_time()
    more_than_24_bits(2**24 + 5)
    assert process_time() - start_time < 120


# Ranks and state


def world_of(num_replicas: int, **settings: Any) -> list[PatchBatchSampler]:
    return [
        quiet(IDS, seed=1, num_replicas=num_replicas, rank=rank, **settings)
        for rank in range(num_replicas)
    ]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.filterwarnings("ignore:Until epoch 6 ends")
def test_other_ranks_go_on_with_the_rest_of_the_epoch(kind, uneven):
    kind = {**MIXED, **kind, "uneven": uneven}
    for before, done, after in product((1, 2, 3), (1, 4), (1, 2, 3, 5)):
        batches, states = [], []
        first = world_of(before, **kind)
        for sampler in first:
            sampler.set_epoch(6)
            iterator = iter(sampler)
            batches.append(draw(iterator, done))
            states += [through_json(sampler.state_dict()), through_json(iterator.state_dict())]
        assert all(state == states[0] for state in states)
        expected = [samples for _, samples in whole(first[0].plan, 6)]
        batches = [batch for each in zip(*batches, strict=True) for batch in each]
        assert batches == expected[: len(batches)]
        second = world_of(after, **kind)
        for sampler in second:
            sampler.load_state_dict(states[0])
        remaining = [batch for each in zip(*second, strict=True) for batch in each]
        expected = expected[len(batches) :]
        if uneven == "drop":
            assert remaining == expected[: len(expected) // after * after]
        else:
            assert remaining[: len(expected)] == expected
            assert len(remaining) == -(-len(expected) // after) * after
        # The next epoch is that of a world which has always been so large.
        assert {sampler.epoch for sampler in second} == {7}
        fresh = world_of(after, **kind)[0]
        assert whole(second[0].plan, 7) == whole(fresh.plan, 7)


def test_a_pass_goes_on_over_epochs_on_changing_ranks():
    # Patch 9 has 13 batches and 2 slots an epoch; the ranks change after each one.
    kind = {"batch_size": 4, "weights": {5: 8, -2: 2, 9: 2, 40: 2}, "epoch_batches": 14}
    times, state = np.zeros(IDS.size, int), None
    for number in range(13):
        world = world_of((1, 2, 7)[number % 3], **kind)
        for sampler in world:
            if state is not None:
                sampler.load_state_dict(state)
            assert sampler.epoch == number
        for batch in chain.from_iterable([list(sampler) for sampler in world]):
            times[batch] += 1
        states = [through_json(sampler.state_dict()) for sampler in world]
        assert all(one == states[0] for one in states)
        state = states[0]
    assert set(times[IDS == 9]) == {2}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"weights": {5: 7, -2: 1, 9: 15, 40: 2}}, ["weights"]),
        ({"weights": None}, ["weights"]),
        ({"weights": Temperature(2)}, ["weights"]),
        ({"weights": None, "epoch_batches": None}, ["epoch_batches", "weights"]),
        ({"epoch_batches": 42}, ["epoch_batches", "weights"]),
        ({"epoch_batches": None}, ["epoch_batches", "weights"]),
        ({"batch_size": {5: 3, -2: 2, 9: 4, 40: 3}}, ["batch_sizes"]),
        ({"batch_size": {5: 2, -2: 3, 9: 4, 40: 2}}, ["batch_sizes"]),
        ({"batch_size": 4}, ["batch_size", "batch_sizes"]),
    ],
)
def test_a_state_of_other_sizes_or_weights_is_refused_by_name(changed, names):
    sampler = PatchBatchSampler(IDS, seed=1, **MIXED)
    draw(iter(sampler), 3)
    state = through_json(sampler.state_dict())
    other = PatchBatchSampler(IDS, seed=1, **{**MIXED, **changed})
    for desired, actual in ((state, other), (through_json(other.state_dict()), sampler)):
        with pytest.raises(ValueError, match="Cannot load state: ") as refused:
            actual.load_state_dict(desired)
        result = re.findall(r"(\w+) is \S+(?: patch')? in the checkpoint, ", str(refused.value))
        assert result == names


def test_weights_of_the_same_shares_are_the_same_settings():
    sampler = PatchBatchSampler(IDS, seed=1, **MIXED)
    draw(iter(sampler), 3)
    doubled = {patch: 2 * w for patch, w in MIXED["weights"].items()}
    as_array = np.array([1, 7, 1.5, 0.2])
    for weights in (doubled, as_array, torch.from_numpy(as_array), as_array.tolist()):
        other = PatchBatchSampler(IDS, seed=1, **{**MIXED, "weights": weights})
        other.load_state_dict(through_json(sampler.state_dict()))
        assert list(other) == [samples for _, samples in whole(sampler.plan, 0)][3:]


def test_names_are_weighed_by_name():
    names = np.array(["alps", "po", "rhine"])[np.unique(IDS[IDS != 40], return_inverse=True)[1]]
    weights, sizes = {"rhine": 1, "po": 3, "alps": 2}, {"po": 5, "rhine": 10, "alps": 7}
    sampler = PatchBatchSampler(names, sizes, seed=0, weights=weights, epoch_batches=12)
    result = [(batch.patch_id, len(batch.indices)) for batch in sampler.batches(0)]
    assert sorted(result) == [("alps", 7)] * 4 + [("po", 5)] * 6 + [("rhine", 10)] * 2
    with pytest.raises(
        ValueError, match="weights must have a number for every patch, got none for po"
    ):
        PatchBatchSampler(names, 4, weights={"rhine": 1, "alps": 2})
    with pytest.raises(
        ValueError, match=r"none for 1, 2 \(the mapping has the key 2, but the patch id is '2'"
    ):
        PatchBatchSampler(["1", "2"], 4, weights={2: 1})


@pytest.mark.parametrize("weights", ["uniform", True, {5: 1, 9: "2", -2: 1, 40: 1}])
def test_what_weights_must_be_is_said_of_weights(weights):
    with pytest.raises(
        TypeError, match=r"weights must be numbers by ascending .* from patch ids, "
    ):
        PatchBatchSampler(IDS, 4, weights=weights)


# Coverage


@settings(max_examples=150)
@given(data=st.data(), case=cases(always_mixed=True), epoch=epochs)
@example(
    None,
    Case(
        np.repeat([4, 7], [20, 33]),
        3,
        {"partial": "drop", "weights": [9, 1], "epoch_batches": 40},
        oracle.Settings(3),
        5,
    ),
    2**63 - 1,
)
def test_coverage_is_what_happens(data, case, epoch):
    check_coverage(data, case, epoch)


@settings(max_examples=150)
@given(data=st.data(), case=cases(kinds=KINDS[2:], always_mixed=True), epoch=epochs)
def test_coverage_is_what_happens_in_steps(data, case, epoch):
    check_coverage(data, case, epoch)


def check_coverage(data: Any, case: Case, epoch: int) -> None:
    arguments = {**case.given}
    steps, width = arguments.pop("steps", "free"), arguments.pop("step_width", 1)
    ranks = [1, 2, 3, 5, 11, 40] if steps == "free" else [n for n in range(1, 9) if width % n == 0]
    num_replicas = 3 if data is None else data.draw(st.sampled_from(ranks))
    if steps != "free":
        arguments |= {"step_width": width}
    elif data is not None:
        arguments["uneven"] = data.draw(st.sampled_from(["pad", "drop"]))
    try:
        world = [
            quiet(
                case.ids,
                case.batch_size,
                seed=case.seed,
                steps=steps,
                num_replicas=num_replicas,
                rank=rank,
                **arguments,
            )
            for rank in range(num_replicas)
        ]
    except ValueError as error:
        assume("num_replicas must be at most the number of batches" not in str(error))
        raise
    for sampler in world:
        sampler.set_epoch(epoch)
    handed_out = [batch for sampler in world for batch in sampler]
    times_by_sample = times_seen(handed_out, case.ids.size)
    first_of = case.ids[[batch[0] for batch in handed_out]]
    result = world[0].coverage(epoch)
    for row, patch_id in zip(result, np.unique(case.ids).tolist(), strict=True):
        times = times_by_sample[case.ids == patch_id]
        assert row == {
            "patch_id": patch_id,
            "counts": times.size,
            "seen_once": int((times == 1).sum()),
            "repeated": int((times > 1).sum()),
            "missed": int((times == 0).sum()),
            "batches": int((first_of == patch_id).sum()),
        }
    assert result.exact == bool((times_by_sample == 1).all())


def test_coverage_of_huge_patches_is_quick():
    # Within one pass nothing is counted sample by sample.
    sampler = PatchBatchSampler(
        PatchGroups.from_counts([TOP, TOP, 8]), 4, seed=0, weights=[1, 10, 5], epoch_batches=16_000
    )
    start_time = process_time()
    result = sampler.coverage(0)
    assert process_time() - start_time < 2
    assert result.batches.tolist() == [1000, 10_000, 5000]
    assert result.seen_once.tolist() == [4000, 40_000, 0]
    assert result.missed.tolist() == [TOP - 4000, TOP - 40_000, 0]
    assert result.repeated.tolist() == [0, 0, 8]


def test_coverage_looks_at_each_patch_once_however_many_there_are(monkeypatch):
    rng = np.random.default_rng(0)
    groups = PatchGroups.from_counts(rng.integers(1, 60, 300))
    shares = {"weights": rng.integers(1, 30, 300), "num_replicas": 7, "rank": 0}
    sampler = PatchBatchSampler(groups, 4, seed=0, **shares)
    expected = [sampler.coverage(epoch) for epoch in range(3)]
    looked_at: list[int] = []
    counted = mixture_coverage._times_by_sample

    def counting(plan, these, every, rows):
        assert set(rows.group.tolist()) <= set(these.tolist())
        looked_at.append(rows.group.size)
        return counted(plan, these, every, rows)

    # A few patches at a time, whose rows are cut, too.
    monkeypatch.setattr(mixture_coverage, "CHUNK", 50)
    monkeypatch.setattr(mixture_coverage, "_times_by_sample", counting)
    for epoch, coverage in enumerate(expected):
        assert sampler.coverage(epoch) == coverage
    assert len(looked_at) > 100
    assert sum(looked_at) < 3 * 300 * 20


# Bad input


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (
            {"weights": [1, 2, 3]},
            ValueError,
            "weights must be one number per patch, shape (4,), got",
        ),
        (
            {"weights": [[1, 2, 3, 4]]},
            ValueError,
            "weights must be one number per patch, shape (4,)",
        ),
        ({"weights": []}, ValueError, "weights must be one number per patch, shape (4,), got"),
        (
            {"weights": {5: 1, 9: 2}},
            ValueError,
            "weights must have a number for every patch, got n",
        ),
        (
            {"weights": [1, -0.5, 1, 1]},
            ValueError,
            "weights must be >= 0 and < 2**512, got -0.5 for pat",
        ),
        ({"weights": {5: 1, 9: -1, -2: 1, 40: 1}}, ValueError, "got -1.0 for patch 9"),
        ({"weights": [1, math.inf, 1, 1]}, ValueError, "< 2**512, got inf for patch 5"),
        ({"weights": [1, math.nan, 1, 1]}, ValueError, "< 2**512, got nan for patch 5"),
        ({"weights": ["a", "b", "c", "d"]}, TypeError, "weights must be numbers by ascending"),
        ({"weights": [True] * 4}, TypeError, "weights must be numbers by ascending"),
        ({"weights": "high"}, TypeError, "weights must be numbers by ascending"),
        (
            {"weights": 2},
            ValueError,
            "weights must be one number per patch, shape (4,), got shape ()",
        ),
        ({"weights": lambda patch: 1}, TypeError, "weights must be a mapping from patch ids, numb"),
        (
            {"epoch_batches": 3, "interleave": False},
            ValueError,
            "epoch_batches must be at least 4, the number of patches",
        ),
        ({"epoch_batches": 0}, ValueError, "epoch_batches must be >= 1, got 0"),
        ({"epoch_batches": -1}, ValueError, "epoch_batches must be >= 1, got -1"),
        ({"epoch_batches": 2**60}, ValueError, "epoch_batches must be"),
        ({"epoch_batches": 10.0}, TypeError, "epoch_batches must be an int, got 10.0"),
        ({"epoch_batches": True}, TypeError, "epoch_batches must be an int"),
        ({"epoch_batches": "10"}, TypeError, "epoch_batches must be an int"),
        (
            {"epoch_batches": 11, "steps": "same_patch", "uneven": "drop", "step_width": 3},
            ValueError,
            "epoch_batches must be at least 12, got 11: with steps='same_patch' and uneven='drop', "
            "each of 4 patches needs a step of 3 batches",
        ),
    ],
)
def test_bad_input(wrong, error, match):
    with pytest.raises(error, match=re.escape(match)):
        PatchBatchSampler(IDS, 4, seed=0, **wrong)


@pytest.mark.parametrize(
    ("t", "error", "match"),
    [
        (0, ValueError, "t must be > 0, got 0"),
        (-1.5, ValueError, "t must be > 0, got -1.5"),
        (math.nan, ValueError, "t must be > 0, got nan"),
        ("2", TypeError, "t must be a number, got '2'"),
        (True, TypeError, "t must be a number, got True"),
        (None, TypeError, "t must be a number, got None"),
    ],
)
def test_bad_temperatures(t, error, match):
    with pytest.raises(error, match=match):
        Temperature(t)


def test_an_epoch_with_a_batch_for_every_patch_that_has_any():
    # Four patches, of which "drop" leaves one out.
    assert len(quiet(IDS, 4, partial="drop", epoch_batches=3)) == 3
    with pytest.raises(ValueError, match="at least 3, the number of patches with a batch, got 2"):
        quiet(IDS, 4, partial="drop", epoch_batches=2, interleave=False)
    with pytest.raises(ValueError, match="weights must be >= 0"):
        # Left out, but named all the same.
        quiet(IDS, 4, partial="drop", weights={5: 1, -2: 1, 9: 1, 40: -1})
