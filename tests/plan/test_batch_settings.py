"""Even batches, short ones left out, costliest first, weights of 0, fewer batches than patches."""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups
from support import oracle
from support.cases import cases, short_batch_cases, whole
from support.kernels import TRITON, every_kernel, kernel_of
from support.strategies import epochs, patchy_ids, quiet, seeds, through_json, times_seen

IDS = np.random.default_rng(5).permutation(np.repeat([4, -1, 8, 30, 11], [33, 7, 64, 1, 50]))
COSTS = {4: 1.0, -1: 9.0, 8: 2.0, 30: 100.0, 11: 1.0}
SETTINGS = {
    "even": {"partial": "even"},
    "even, short left out": {"partial": "even", "min_partial": 8},
    "short left out": {"min_partial": 3},
    "costliest first": {"costliest_first": True, "step_width": 4, "patch_costs": COSTS},
    "costliest first, balanced, even": {
        "costliest_first": True,
        "partial": "even",
        "steps": "balanced",
        "step_width": 3,
    },
    "costliest first, weights": {
        "costliest_first": True,
        "step_width": 6,
        "weights": [0, 1, 5, 3, 1],
        "epoch_batches": 23,
    },
    "weights of 0": {"weights": [2, 0, 1, 0, 1]},
    "weights of 0, in a row": {"weights": [0, 2, 0, 1, 0], "interleave": False},
    "few visits": {"epoch_batches": 3},
    "few visits, even, unshuffled": {
        "epoch_batches": 4,
        "partial": "even",
        "shuffle_patches": False,
    },
}
every_setting = pytest.mark.parametrize("given_settings", SETTINGS.values(), ids=SETTINGS.keys())


def make(**given_settings) -> PatchBatchSampler:
    return quiet(IDS, **{"batch_size": 9, "seed": 3, **given_settings})


def plan_of(**given_settings) -> EpochPlan:
    return make(**given_settings).plan


# The same in every form


@settings(max_examples=300)
@given(short_batch_cases(), epochs)
def test_every_slot_is_what_the_oracle_says(case, epoch):
    plan = case.plan
    expected = oracle.epoch(case.ids.tolist(), case.seed, epoch, case.oracle)
    assert plan.num_batches == len(expected)
    assert whole(plan, epoch) == expected
    slots = np.arange(plan.num_batches)
    on_cpu = case.on("torch")
    block = plan.evaluate(epoch, slots)
    for other in (plan.evaluator.block_by_arrays(epoch, slots), on_cpu.evaluate(epoch, slots)):
        for actual, desired in zip(other, block, strict=True):
            np.testing.assert_array_equal(np.asarray(actual), desired)
    # Any slots, in any order.
    some = slots[:: -max(1, slots.size // 3)]
    np.testing.assert_array_equal(plan.evaluate(epoch, some).indices, block.indices[some])


@every_setting
def test_a_cursor_and_any_order_of_slots_equal_iteration(given_settings):
    torch = pytest.importorskip("torch")
    sampler = make(**given_settings)
    sampler.set_epoch(2)
    expected = [(batch.indices.tolist(), batch.valid) for batch in sampler.batches()]
    expected += [(batch.indices.tolist(), batch.valid) for batch in sampler.batches()]
    sampler.set_epoch(2)
    cursor = sampler.cursor()
    for samples, valid in expected:
        batch = cursor()
        assert batch.indices[: len(samples)].tolist() == samples
        assert int(batch.valid) == valid
    assert cursor.position() == (4, 0)
    plan = sampler.plan.on("cpu")
    last = plan.num_batches - 1
    batch = plan.batch(torch.tensor(2), torch.tensor(last))
    assert batch.tolist() == plan.evaluate(2, [last]).indices[0].tolist()


def check_kernel(plan: EpochPlan, kind: str, epoch: int) -> None:
    """A kernel locates and evaluates every slot as the host does, in one launch."""
    kernel = kernel_of(plan, kind)
    slots = np.arange(plan.num_batches)
    block = plan.evaluate(epoch, slots)
    for actual, desired in zip(kernel.block(plan, epoch, slots), block, strict=True):
        np.testing.assert_array_equal(actual, desired)
    locations = plan.evaluator.locate(epoch, slots)
    expected = [
        row[:size] for row, size in zip(block.indices.tolist(), locations.size, strict=True)
    ]
    samples = kernel.ragged(plan, epoch, locations).tolist()
    assert samples == list(chain.from_iterable(expected))
    assert len(kernel.launches) == 2


@every_kernel
@every_setting
def test_kernels_equal_the_host(kind, given_settings):
    check_kernel(plan_of(**given_settings), kind, 1)


@pytest.mark.parametrize("kind", ["cuda-c", TRITON])
@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(st.one_of(cases(), short_batch_cases()), epochs)
def test_kernels_locate_any_plan(kind, case, epoch):
    check_kernel(case.plan, kind, epoch)


# Laws


@given(ids=patchy_ids(), size=st.integers(1, 45), seed=seeds, epoch=epochs)
def test_even_batches_have_every_sample_once_and_differ_by_one(ids, size, seed, epoch):
    plan = EpochPlan(PatchGroups.from_ids(ids), size, seed, partial="even")
    batches = whole(plan, epoch)
    assert (times_seen([samples for _, samples in batches], ids.size) == 1).all()
    for patch, count in zip(*np.unique(ids, return_counts=True), strict=True):
        sizes = [len(samples) for patch_id, samples in batches if patch_id == patch]
        assert len(sizes) == -(-count // size)
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= size


@given(
    ids=patchy_ids(),
    size=st.integers(1, 45),
    min_partial=st.integers(1, 45),
    partial=st.sampled_from(["keep", "even"]),
    epoch=epochs,
)
def test_only_batches_below_min_partial_are_left_out(ids, size, min_partial, partial, epoch):
    assume(min_partial <= size)
    groups = PatchGroups.from_ids(ids)
    everything = whole(EpochPlan(groups, size, 7, partial=partial, shuffle_patches=False), epoch)
    remaining = [batch for batch in everything if len(batch[1]) >= min_partial]
    arguments = {"partial": partial, "min_partial": min_partial, "shuffle_patches": False}
    if not remaining:
        with pytest.raises(ValueError, match=f"min_partial={min_partial} leaves no batches, "):
            EpochPlan(groups, size, 7, **arguments)
        return
    plan = EpochPlan(groups, size, 7, **arguments)
    assert whole(plan, epoch) == remaining


def test_the_example_of_the_issue():
    ids = np.repeat(np.arange(50), 33)
    kept = PatchBatchSampler(ids, 32, seed=0)
    assert Counter(map(len, kept)) == {32: 50, 1: 50}
    even = PatchBatchSampler(ids, 32, seed=0, partial="even")
    assert Counter(map(len, even)) == {17: 50, 16: 50}
    assert even.coverage().exact
    assert even.batch_size is None
    without = PatchBatchSampler(ids, 32, seed=0, min_partial=2)
    assert Counter(map(len, without)) == {32: 50}
    assert without.coverage().missed.tolist() == [1] * 50


@pytest.mark.parametrize("partial", ["keep", "even"])
@pytest.mark.parametrize(
    "size",
    [
        {1: 32, 2: 32, 3: 32},
        CostBudget(32, cost=[1, 1, 1]),
        CostBudget(32, sample_costs=np.ones(74)),
    ],
    ids=["mapping", "budget", "by sample"],
)
def test_a_single_sample_is_left_out_whatever_sets_the_sizes(size, partial):
    ids = np.repeat([1, 2, 3], [1, 33, 40])
    sampler = quiet(ids, size, seed=0, partial=partial, min_partial=2)
    assert min(map(len, sampler)) > 1
    assert sampler.coverage().missed.tolist() == [1, partial == "keep", 0]


def cost_of(batch: tuple[int, list[int]], costs: dict[int, float]) -> float:
    return len(batch[1]) * costs[batch[0]]


@settings(max_examples=100)
@given(
    ids=patchy_ids(),
    size=st.sampled_from([1, 3, 7, 20]),
    width=st.integers(1, 70),
    steps=st.sampled_from(["free", "balanced"]),
    partial=st.sampled_from(["keep", "drop", "pad", "even"]),
    data=st.data(),
    epoch=epochs,
)
def test_the_costliest_full_batches_come_first(ids, size, width, steps, partial, data, epoch):
    patches, counts = np.unique(ids, return_counts=True)
    assume(partial != "drop" or counts.max() >= size)
    costs = {int(patch): data.draw(st.sampled_from([1, 1, 2, 0.3])) for patch in patches}
    arguments = {"partial": partial, "steps": steps}
    if steps == "balanced":
        arguments |= {"patch_costs": costs, "step_width": width}
    groups = PatchGroups.from_ids(ids)
    plain = whole(EpochPlan(groups, size, 3, **arguments), epoch)
    arguments |= {"patch_costs": costs, "step_width": width, "costliest_first": True}
    moved = whole(EpochPlan(groups, size, 3, **arguments), epoch)
    # The same batches, nearly all where they were.
    assert sorted(plain) == sorted(moved)
    largest = {patch: max(len(b) for p, b in plain if p == patch) for patch, _ in plain}
    full = [b for b in plain if partial == "even" or len(b[1]) == largest[b[0]]]
    count = min(width, len(full))
    expected = sorted((cost_of(batch, costs) for batch in full), reverse=True)[:count]
    assert [cost_of(batch, costs) for batch in moved[:count]] == expected
    displaced = sum(a != b for a, b in zip(plain, moved, strict=True))
    assert displaced <= 2 * count
    # With equal epochs aside, others are in the order of the permutation.
    first = {tuple(batch[1]) for batch in moved[:count]}
    remaining = [batch for batch in plain[count:] if tuple(batch[1]) not in first]
    assert [batch for batch in moved[count:] if batch in remaining] == remaining


def test_with_weights_full_batches_come_first_wherever_the_short_one_is():
    # Of patches 4, 8 and 11, one batch in a pass is short, in another slot in each epoch.
    costs = {4: 10.0, -1: 1.0, 8: 2.0, 30: 1.0, 11: 1.0}
    sampler = make(
        weights=[3, 2, 1, 2, 2],
        epoch_batches=37,
        costliest_first=True,
        patch_costs=costs,
        step_width=8,
    )
    count_of = dict(zip(*np.unique(IDS, return_counts=True), strict=True))
    slots_of = dict(
        zip(sampler.plan.labels.tolist(), sampler.plan.batches_by_patch.tolist(), strict=True)
    )
    # In every epoch, as many batches of a patch are full at least.
    full = []
    for patch, count in count_of.items():
        own = -(-count // 9)
        num_full = slots_of[patch]
        if own > 1 and count % 9:
            num_full -= -(-num_full // own)
        full += [min(count, 9) * costs[patch]] * max(num_full, 1)
    expected = sorted(full, reverse=True)[:8]
    for epoch in range(12):
        first = whole(sampler.plan, epoch)[:8]
        assert [cost_of(batch, costs) for batch in first] == expected


@pytest.mark.parametrize("uneven", ["pad", "drop"])
def test_coverage_of_few_visits_counts_what_ranks_repeat_and_drop(uneven):
    arguments = {"epoch_batches": 4, "uneven": uneven, "num_replicas": 3}
    ranks = [make(**arguments, rank=rank) for rank in range(3)]
    for epoch in range(10):
        batches = [batch for sampler in ranks for batch in sampler.batches(epoch)]
        times = times_seen([batch.indices.tolist() for batch in batches], IDS.size)
        totals = ranks[0].coverage(epoch).totals()
        assert len(batches) == totals["batches"] == (6 if uneven == "pad" else 3)
        assert totals["repeated"] == (times > 1).sum()
        assert totals["repeated"] > 0 or uneven == "drop"
        assert totals["missed"] == (times == 0).sum()


@given(case=short_batch_cases(), epoch=epochs, data=st.data())
def test_coverage_is_what_all_ranks_return(case, epoch, data):
    assume(case.oracle.steps == "free")
    num_replicas = data.draw(st.sampled_from([1, 2, 3]))
    uneven = data.draw(st.sampled_from(["pad", "drop"]))
    arguments = {**case.given, "uneven": uneven}
    if case.oracle.costliest_first:
        arguments["step_width"] *= num_replicas
    try:
        ranks = [
            quiet(
                case.ids,
                case.batch_size,
                seed=case.seed,
                **arguments,
                num_replicas=num_replicas,
                rank=rank,
            )
            for rank in range(num_replicas)
        ]
    except ValueError as error:
        if "num_replicas must be at most the number of batches" not in str(error):
            raise
        return
    batches = [batch for sampler in ranks for batch in sampler.batches(epoch)]
    times = times_seen([batch.indices.tolist() for batch in batches], case.ids.size)
    coverage = ranks[0].coverage(epoch)
    for row in coverage:
        own = times[case.ids == row["patch_id"]]
        assert row["seen_once"] == (own == 1).sum()
        assert row["repeated"] == (own > 1).sum()
        assert row["missed"] == (own == 0).sum()
        assert row["batches"] == sum(batch.patch_id == row["patch_id"] for batch in batches)


@settings(max_examples=50)
@given(ids=patchy_ids(), size=st.integers(1, 20), seed=seeds, first=st.integers(0, 2**40))
def test_few_visits_come_to_every_patch_once_a_round_and_to_every_sample_once_a_pass(
    ids, size, seed, first
):
    patches, counts = np.unique(ids, return_counts=True)
    assume(patches.size > 1)
    plan = EpochPlan(PatchGroups.from_ids(ids), size, seed, epoch_batches=patches.size - 1)
    own = -(-counts // size)
    # Enough epochs for the whole passes of two rounds of the patch with the most batches.
    num_epochs = 2 + 2 * int(own.max()) * patches.size // plan.num_batches
    first *= patches.size
    batches = list(chain.from_iterable(whole(plan, first + e) for e in range(num_epochs)))
    # (An epoch that is a multiple of the number of patches begins a round.)
    rounds = len(batches) // patches.size
    for number in range(rounds):
        visited = [p for p, _ in batches[number * patches.size : (number + 1) * patches.size]]
        assert sorted(visited) == patches.tolist()
    first_round = first * plan.num_batches // patches.size
    for patch, nb in zip(patches.tolist(), own.tolist(), strict=True):
        samples = [b for p, b in batches[: rounds * patches.size] if p == patch]
        begin = -first_round % nb
        for start in range(begin, len(samples) - nb + 1, nb):
            once = list(chain.from_iterable(samples[start : start + nb]))
            assert sorted(once) == np.flatnonzero(ids == patch).tolist()


def test_a_weight_of_0_is_as_if_the_patch_were_not_there():
    weights = {4: 2, -1: 0, 8: 1, 30: 0, 11: 0.5}
    arguments = {"weights": weights, "epoch_batches": 19}
    plan = plan_of(**arguments)
    switched_on = np.isin(IDS, [4, 8, 11])
    positive = {patch: weight for patch, weight in weights.items() if weight}
    others = PatchBatchSampler(
        IDS[switched_on], 9, seed=3, **{**arguments, "weights": positive}
    ).plan
    assert plan.batches_by_patch.tolist() == [
        0 if weight == 0 else others.batches_by_patch[others.labels.tolist().index(patch)]
        for patch, weight in sorted(weights.items())
    ]
    for interleave in (True, False):
        sampler = make(**arguments, interleave=interleave)
        assert {batch.patch_id for batch in sampler.batches()} == {4, 8, 11}
        coverage = sampler.coverage()
        assert coverage.missed[coverage.batches == 0].tolist() == [7, 1]
    # Two epochs' worth of a cost bin of the same patches.
    budget = CostBudget(30, sample_costs=np.arange(IDS.size) % 7 + 1)
    binned = quiet(IDS, budget, seed=3, weights=weights)
    assert {batch.patch_id for batch in binned.batches()} == {4, 8, 11}


@every_setting
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_run_resumes_on_another_number_of_ranks(given_settings, after):
    before = 2
    arguments = dict(given_settings)
    if "step_width" in arguments:
        arguments["step_width"] = 4

    def ranks(num_replicas: int) -> list[PatchBatchSampler]:
        return [
            make(**arguments, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)
        ]

    expected = [samples for _, samples in whole(ranks(1)[0].plan, 4)]
    iterators = []
    for sampler in ranks(before):
        sampler.set_epoch(4)
        iterators.append(iter(sampler))
    seen = [next(iterator) for iterator in iterators]
    state = through_json(iterators[0].state_dict())
    resumed = ranks(after)
    for sampler in resumed:
        sampler.load_state_dict(state)
    columns = [list(sampler) for sampler in resumed]
    rest = [batch for step in zip(*columns, strict=True) for batch in step]
    assert seen + rest[: len(expected) - before] == expected
    # What fills the last step is from the beginning of the epoch.
    filling = rest[len(expected) - before :]
    assert filling == expected[: len(filling)]


def test_the_width_of_costliest_first_is_saved():
    arguments = {"costliest_first": True, "patch_costs": COSTS}
    four = make(**arguments, num_replicas=4, rank=0)
    assert four.plan.step_width == 4
    assert make(**arguments).plan.step_width == 1
    state = through_json(four.state_dict())
    one = make(**arguments)
    one.load_state_dict(state)
    assert list(one) == [samples for _, samples in whole(four.plan, 0)]
    # Later epochs are of its own width.
    assert list(one) == [samples for _, samples in whole(make(**arguments).plan, 1)]
    with pytest.raises(ValueError, match="step_width must be a multiple of num_replicas=4"):
        make(**arguments, num_replicas=4, rank=0, step_width=2)


@pytest.mark.parametrize(
    ("ours", "others", "named"),
    [
        ({"partial": "even"}, {}, "partial is 'even' in the checkpoint"),
        ({"min_partial": 2}, {}, "min_partial is 2 in the checkpoint, absent"),
        ({"costliest_first": True}, {}, "costliest_first is True in the checkpoint, absent"),
        (
            {"costliest_first": True, "patch_costs": COSTS},
            {"costliest_first": True},
            "hash of patch_costs",
        ),
        ({"epoch_batches": 3}, {}, "epoch_batches is 3 in the checkpoint, absent"),
        ({"epoch_batches": 3}, {"epoch_batches": 4}, "epoch_batches is 3 .* 4 in this sampler"),
        (
            {"weights": [1, 1, 1, 1, 0], "epoch_batches": 9},
            {"weights": [1, 1, 1, 0, 1], "epoch_batches": 9},
            "hash of weights",
        ),
    ],
)
def test_states_tell_the_settings_apart(ours, others, named):
    state = through_json(make(**ours).state_dict())
    make(**ours).load_state_dict(state)
    with pytest.raises(ValueError, match=named):
        make(**others).load_state_dict(state)


def test_defaults_add_nothing_to_the_fingerprint():
    fingerprint = make().state_dict()["fingerprint"]
    assert not {"min_partial", "costliest_first", "patch_costs", "epoch_batches"} & set(fingerprint)


def test_the_state_of_another_batch_size_says_how_to_go_on():
    sampler = make(seed=None)
    sampler.set_epoch(6)
    next(iter(sampler))
    state = through_json(sampler.state_dict())
    other = make(batch_size=12, partial="even", seed=None)
    message = (
        f" To go on with this sampler's batches instead, pass seed={sampler.seed} and call "
        "set_epoch(7): the batches of epoch 6 from slot 1 on are skipped."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        other.load_state_dict(state)
    other = make(batch_size=12, partial="even", seed=sampler.seed)
    with pytest.raises(ValueError, match=re.escape("instead, call set_epoch(7): the batches")):
        other.load_state_dict(state)
    other.set_epoch(7)
    assert list(other) == [samples for _, samples in whole(other.plan, 7)]
    # Whatever else follows from the batch size.
    weighted = {"weights": [1, 1, 1, 1, 2], "seed": 5}
    state = through_json(make(**weighted).state_dict())
    with pytest.raises(ValueError, match=r"batches instead, call set_epoch\(0\)\.$"):
        make(**weighted, batch_size=4).load_state_dict(state)
    # Not where the ids differ.
    with pytest.raises(ValueError, match=r"with the same ids and settings\.$"):
        PatchBatchSampler(IDS[1:], 9, seed=3).load_state_dict(state)


# What is refused, and warned of


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("drop_last", "partial='drop'"),
        ("shuffle", "shuffle_patches"),
        ("world_size", "num_replicas"),
        ("replacement", "weights"),
        ("num_samples", "epoch_batches"),
        ("generator", "seed"),
    ],
)
def test_words_of_torch_are_answered_with_ours(word, ours):
    with pytest.raises(TypeError, match=f"^PatchBatchSampler has no argument {word}: .*{ours}"):
        PatchBatchSampler(IDS, 4, **{word: True})


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("drop_last", "partial='pad'"),
        ("shuffle", "unshuffled"),
        ("generator", "unshuffled"),
        ("world_size", "num_replicas"),
    ],
)
def test_words_of_torch_are_answered_for_evaluation(word, ours):
    message = f"^PatchBatchSampler.for_evaluation has no argument {word}: .*{ours}"
    with pytest.raises(TypeError, match=message):
        PatchBatchSampler.for_evaluation(IDS, 4, **{word: True})


def test_other_words_are_unknown_as_ever_and_the_signature_is_the_samplers():
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        PatchBatchSampler(IDS, 4, colour=True)
    parameters = inspect.signature(PatchBatchSampler).parameters
    assert list(parameters)[:2] == ["source", "batch_size"]
    assert parameters["min_partial"].default == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"partial": "odd"}, ValueError, "partial must be one of"),
        ({"min_partial": 0}, ValueError, "min_partial must be >= 1, got 0"),
        ({"min_partial": 2.0}, TypeError, "min_partial must be an int, got 2.0"),
        ({"min_partial": True}, TypeError, "min_partial must be an int, got True"),
        ({"min_partial": 10}, ValueError, "min_partial=10 leaves no batches, because all have f"),
        (
            {"min_partial": 2, "partial": "pad"},
            ValueError,
            "min_partial must be 1 under partial='pad', got 2",
        ),
        (
            {"min_partial": 2, "partial": "drop"},
            ValueError,
            "min_partial must be 1 under partial='drop', got 2",
        ),
        ({"costliest_first": 1}, TypeError, "costliest_first must be a bool, got 1"),
        (
            {"costliest_first": True, "interleave": False},
            ValueError,
            "costliest_first must be False if interleave=False",
        ),
        (
            {"costliest_first": True, "steps": "same_patch"},
            ValueError,
            "costliest_first must be False under steps='same_patch'",
        ),
        ({"weights": [0] * 5}, ValueError, "weights must be > 0 for at least one patch"),
        ({"weights": [1, 1, -1, 1, 1]}, ValueError, "weights must be >= 0 and .*got -1.0"),
        ({"weights": [1, 0, 0, 0, 1], "epoch_batches": 1}, ValueError, "at least 2, .* weight > 0"),
        (
            {"patch_costs": [1, 1, 0, 1, 1], "steps": "balanced"},
            ValueError,
            "patch_costs must be > ",
        ),
        ({"epoch_batches": 0}, ValueError, "epoch_batches must be >= 1, got 0"),
        ({"epoch_batches": 3, "interleave": False}, ValueError, "epoch_batches must be at least 5"),
        ({"epoch_batches": 3, "steps": "balanced"}, ValueError, "epoch_batches must be at least 5"),
        ({"epoch_batches": 3, "steps": "same_patch"}, ValueError, "must be at least 5"),
        ({"epoch_batches": 3, "costliest_first": True}, ValueError, "must be at least 5"),
        ({"epoch_batches": 3, "weights": [1] * 5}, ValueError, "must be at least 5"),
        ({"step_width": 2}, ValueError, "step_width must be 1 under steps='free', got 2"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_whole_patches_that_min_partial_leaves_out_are_warned_of():
    ids = np.repeat([1, 2, 3], [40, 2, 33])
    with pytest.warns(UserWarning, match=r"min_partial=3 leaves out 1 of 3 patches \(2 samples\)"):
        PatchBatchSampler(ids, 10, seed=0, min_partial=3)
    message = r"min_partial=17 leaves out 1 of 3 patches .* only smaller batches. Use a smaller"
    with pytest.warns(UserWarning, match=message):
        PatchBatchSampler(ids, 32, seed=0, partial="even", min_partial=17)


def test_batches_that_are_mostly_copies_are_warned_of():
    ids = np.repeat([1, 2, 3], [40, 1, 5])
    message = (
        "partial='pad' makes batches of 1 of 3 patches more than half copies, such as those of "
        "patch 2: 1 of 10 samples differ."
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        PatchBatchSampler(ids, 10, seed=0, partial="pad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Half of a batch, or copies that do not count.
        PatchBatchSampler(ids[ids != 2], 10, seed=0, partial="pad")
        PatchBatchSampler.for_evaluation(ids, 10, partial="pad")


def test_evaluation_may_be_even():
    ranks = [
        PatchBatchSampler.for_evaluation(IDS, 9, partial="even", num_replicas=3, rank=rank)
        for rank in range(3)
    ]
    counted = [
        sample
        for sampler in ranks
        for batch in sampler.batches()
        for sample in batch.indices[: batch.valid].tolist()
    ]
    assert sorted(counted) == list(range(IDS.size))
