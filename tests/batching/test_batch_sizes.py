"""How many samples a batch holds: a size for each patch, and the most that a batch may cost."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.plan.coverage import omitted_samples
from support import oracle
from support.optional_torch import torch
from support.strategies import (
    IDS,
    draw,
    epochs,
    patchy_ids,
    quiet,
    seeds,
    smallest_size,
    through_json,
)

PARTIALS = ("keep", "drop", "pad")
TOP = (1 << 31) - 1
IDS_ASCENDING = [-2, 5, 9, 40]
COUNTS = [7, 30, 50, 3]

COSTS = st.one_of(
    st.integers(1, 50),
    st.floats(0.01, 100),
    # No binary fractions: their multiples are rounded either way.
    st.sampled_from([0.1, 0.2, 0.3, 0.7, 1.1, 1 / 3, 1e-9, 1e9, 1e-80, 1e120]),
)


class Budget(NamedTuple):
    """A budget, and what the oracle is told of it."""

    max_cost: float
    costs: list[float]
    bounds: dict[str, Any]

    def made(self, cost: Any = None, **arguments: Any) -> CostBudget:
        return CostBudget(
            self.max_cost, self.costs if cost is None else cost, **self.bounds, **arguments
        )

    def sizes(self, counts: list[int], partial: str) -> list[int | None]:
        """The oracle's sizes: None where a patch is over the budget."""
        bounds = {
            {"min_batch_size": "minimum", "max_batch_size": "maximum"}.get(name, name): value
            for name, value in self.bounds.items()
        }
        return [
            oracle.size_of(n, partial, float(cost), float(self.max_cost), **bounds)
            for n, cost in zip(counts, self.costs, strict=True)
        ]


@st.composite
def budgets(draw: st.DrawFn, patches: int) -> Budget:
    costs = draw(st.lists(COSTS, min_size=patches, max_size=patches))
    bounds: dict[str, Any] = {}
    if draw(st.booleans()):
        bounds["multiple_of"] = draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    if draw(st.booleans()) and bounds.get("multiple_of", 1) in (1, 2, 4, 8):
        bounds["power_of_two"] = True
    if draw(st.booleans()):
        bounds["min_batch_size"] = draw(st.integers(1, 6))
    if draw(st.booleans()):
        min_size = smallest_size(
            bounds.get("min_batch_size", 1),
            bounds.get("multiple_of", 1),
            bounds.get("power_of_two", False),
        )
        bounds["max_batch_size"] = draw(st.integers(min_size, min_size + 60))
    # Near a whole number of samples of one of the patches, from either side.
    total = draw(st.sampled_from(costs)) * draw(st.sampled_from([1, 2, 3, 7, 9, 16, 50, 77, 1000]))
    side = draw(st.sampled_from([-np.inf, None, None, np.inf]))
    max_cost = float(total) if side is None else float(np.nextafter(total, side))
    return Budget(max_cost, costs, bounds)


# The size that a budget allows


@settings(max_examples=300)
@given(data=st.data(), partial=st.sampled_from(PARTIALS))
def test_sizes_are_the_largest_within_the_budget(data, partial):
    counts = data.draw(
        st.lists(st.one_of(st.integers(1, 130), st.integers(1, TOP)), min_size=1, max_size=6)
    )
    budget = data.draw(budgets(len(counts)))
    groups = PatchGroups.from_counts(counts)
    expected = budget.sizes(counts, partial)
    if None in expected:
        first = expected.index(None)
        with pytest.raises(
            ValueError, match=f"is too small for .*: a sample of patch {first} costs"
        ):
            EpochPlan(groups, budget.made(), 0, partial=partial)
    assume(any(expected))
    plan = EpochPlan(groups, budget.made(over_budget="skip"), 0, partial=partial)
    sizes, own_batches = plan.sizes_by_patch.tolist(), plan.own_batches_by_patch.tolist()
    for n, cost, size, batches, oracle_size in zip(
        counts, budget.costs, sizes, own_batches, expected, strict=True
    ):
        if not oracle_size:
            # Over the budget, or too few samples for any batch under "drop".
            assert batches == 0
            assert (size == 0) == (oracle_size is None)
            continue
        assert size == oracle_size
        assert batches == (n // size if partial == "drop" else -(-n // size))
        # In the words of the rule.
        bounds = budget.bounds
        assert size * float(cost) <= budget.max_cost
        assert size % bounds.get("multiple_of", 1) == 0
        assert not bounds.get("power_of_two") or size & (size - 1) == 0
        min_size, max_size = bounds.get("min_batch_size", 1), bounds.get("max_batch_size") or TOP
        assert min_size <= size <= max_size
        larger = 2 * size if bounds.get("power_of_two") else size + bounds.get("multiple_of", 1)
        enough = larger > n if partial == "drop" else size >= n
        assert larger * float(cost) > budget.max_cost or larger > max_size or enough
    skipped = [
        n if oracle_size is None else 0 for n, oracle_size in zip(counts, expected, strict=True)
    ]
    assert omitted_samples(plan, plan.num_batches).over_budget.tolist() == skipped
    np.testing.assert_array_equal(plan.costs_by_patch, np.array(budget.costs, float))


@pytest.mark.parametrize(
    ("max_cost", "cost", "bounds", "size"),
    [
        # 3 * 0.1 is above 0.3 in float64, and 0.3 / 0.1 below 3; 0.7 / 0.1 is below 7, and so on.
        (0.3, 0.1, {}, 2),
        (0.30000000000000004, 0.1, {}, 3),
        (0.7, 0.1, {}, 6),
        (0.7000000000000001, 0.1, {}, 7),
        # 3 * 0.7 is rounded down to the budget, and the budget over 0.7 is below 3.
        (2.0999999999999996, 0.7, {}, 3),
        (277.7540818901099, 92.58469396336997, {}, 3),
        (100, 1 / 3, {}, 300),
        (1, 1 / 49, {}, 49),
        (100, 10, {}, 10),
        (100, 10, {"max_batch_size": 10}, 10),
        (100, 10, {"max_batch_size": 9}, 9),
        (100, 10, {"min_batch_size": 10}, 10),
        (100, 10, {"multiple_of": 4}, 8),
        (100, 10, {"multiple_of": 4, "max_batch_size": 7}, 4),
        (100, 10, {"multiple_of": 10}, 10),
        (100, 10, {"power_of_two": True}, 8),
        (160, 10, {"power_of_two": True}, 16),
        (160, 10, {"power_of_two": True, "multiple_of": 16}, 16),
        (100, 100, {}, 1),
        (100, 100, {"power_of_two": True}, 1),
        # No more than an int32 holds, whatever the budget.
        (1e100, 1e-100, {}, TOP),
        (1e100, 1e-100, {"power_of_two": True}, 1 << 30),
        (1e100, 1e-100, {"multiple_of": 1 << 30}, 1 << 30),
        (float(TOP), 1, {}, TOP),
        (float(TOP) - 1, 1, {}, TOP - 1),
    ],
)
def test_sizes_of_some(max_cost, cost, bounds, size):
    plan = EpochPlan(
        PatchGroups.from_counts([TOP, 5]), CostBudget(max_cost, [cost] * 2, **bounds), 0
    )
    assert plan.sizes_by_patch[0] == size


@pytest.mark.parametrize(
    ("cost", "bounds", "message"),
    [
        (100.00000000000001, {}, "a sample of patch 2 costs 100.00000000000001. Raise max_cost"),
        (
            10,
            {"min_batch_size": 11},
            "costs 10.0: max_cost allows a batch of at most 10, but no such",
        ),
        (10, {"min_batch_size": 11}, "satisfies min_batch_size=11. Relax a bound, or raise max_"),
        (10, {"multiple_of": 11}, "multiple_of=11"),
        (10, {"power_of_two": True, "min_batch_size": 9}, "power_of_two=True"),
        (10, {"power_of_two": True, "multiple_of": 16}, "multiple_of=16"),
    ],
)
def test_over_the_budget(cost, bounds, message):
    groups = PatchGroups.from_counts([20, 50], [1, 2])

    def sizes(cost_of_1: float, **choice: Any) -> list[int]:
        budget = CostBudget(100, {1: cost_of_1, 2: cost}, **bounds, **choice)
        return EpochPlan(groups, budget, 0).sizes_by_patch.tolist()

    with pytest.raises(
        ValueError, match="max_cost=100 is too small for 1 of 2 patches: "
    ) as refused:
        sizes(1e-3)
    error_text = str(refused.value)
    assert "1 of 2 patches: a sample of patch 2 costs " in error_text
    assert message in error_text
    advice = "Relax a bound, or raise" if bounds else "Raise"
    assert error_text.endswith(f". {advice} max_cost or pass over_budget='skip'.")
    assert [size > 0 for size in sizes(1e-3, over_budget="skip")] == [True, False]
    with pytest.raises(
        ValueError, match="max_cost=100 is too small for all 2 patches: a sample of"
    ):
        sizes(cost, over_budget="skip")


def test_bounds_that_leave_no_size():
    with pytest.raises(
        ValueError, match=r"no batch size satisfies all of .*multiple_of=4 and max_batch_s"
    ):
        CostBudget(100, [1, 1], multiple_of=4, max_batch_size=3)
    with pytest.raises(ValueError, match="satisfies all of min_batch_size=5 and power_of_two=True"):
        CostBudget(100, [1, 1], min_batch_size=5, power_of_two=True, max_batch_size=7)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.longdouble])
def test_a_budget_in_a_narrow_type_is_a_number_without_a_warning(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = EpochPlan(PatchGroups.from_counts([20, 50]), CostBudget(kind(9), [1, 2]), 0)
    assert plan.sizes_by_patch.tolist() == [9, 4]


def test_what_says_that_no_batch_is_left_names_a_patch_that_is_too_small():
    groups = PatchGroups.from_counts([5, 2])
    match = r"batch_size=3, but the patch closest to a full batch has 2 samples\. Reduce"
    with pytest.raises(ValueError, match=match):
        EpochPlan(groups, {0: 10, 1: 3}, 0, partial="drop")
    # 3 and 4 samples in classes of a patch, of 8 and of 4 in a batch.
    budget = CostBudget(8, sample_costs=[1] * 3 + [2] * 3, min_batch_size=4)
    with pytest.raises(
        ValueError, match=r"=\d, but the \w+ (cost bin|patch) has \d samples\. Reduce"
    ):
        EpochPlan(PatchGroups.from_counts([6]).select([0, 1, 3]), budget, 0, partial="drop")


@pytest.mark.parametrize(
    ("partial", "bounds", "sizes"),
    [
        # 7, 30, 50 and 3 samples, of which 20 are within the budget.
        ("keep", {}, [7, 20, 20, 3]),
        ("pad", {}, [7, 20, 20, 3]),
        ("drop", {}, [7, 20, 20, 3]),
        ("keep", {"multiple_of": 4}, [8, 20, 20, 4]),
        ("pad", {"multiple_of": 4}, [8, 20, 20, 4]),
        ("drop", {"multiple_of": 4}, [4, 20, 20, None]),
        ("keep", {"power_of_two": True}, [8, 16, 16, 4]),
        ("drop", {"power_of_two": True}, [4, 16, 16, 2]),
        ("pad", {"min_batch_size": 9}, [9, 20, 20, 9]),
        ("drop", {"min_batch_size": 9}, [None, 20, 20, None]),
        ("keep", {"min_batch_size": 6, "multiple_of": 5}, [10, 20, 20, 10]),
        ("drop", {"min_batch_size": 6, "multiple_of": 7}, [7, 14, 14, None]),
        ("keep", {"max_batch_size": 5}, [5, 5, 5, 3]),
    ],
)
def test_a_size_is_no_larger_than_a_patch_has_a_use_for(partial, bounds, sizes):
    plan = quiet(IDS, CostBudget(20, [1] * 4, **bounds), partial=partial).plan
    own_batches = plan.own_batches_by_patch
    assert [
        size if batches else None
        for size, batches in zip(plan.sizes_by_patch.tolist(), own_batches.tolist(), strict=True)
    ] == sizes
    # A table is no wider than that.
    assert plan.max_batch_size == (
        20 if max(filter(None, sizes)) == 20 else max(filter(None, sizes))
    )


# Batches


@given(data=st.data(), partial=st.sampled_from(PARTIALS), seed=seeds, epoch=epochs)
def test_no_batch_is_over_the_budget(data, partial, seed, epoch):
    ids = data.draw(patchy_ids())
    patch_ids, counts = np.unique(ids, return_counts=True)
    budget = data.draw(budgets(counts.size))
    sizes = budget.sizes(counts.tolist(), partial)
    assume(any(sizes))
    sampler = quiet(ids, budget.made(over_budget="skip"), seed=seed, partial=partial)
    cost_of = dict(zip(patch_ids.tolist(), map(float, budget.costs), strict=True))
    for batch in sampler.batches(epoch):
        assert len(batch.indices) * cost_of[batch.patch_id] <= budget.max_cost
        assert set(ids[batch.indices].tolist()) == {batch.patch_id}
    # Which batches they are.
    expected = oracle.Settings([size or 0 for size in sizes], partial)
    batches = [samples for _, samples in oracle.epoch(ids.tolist(), seed, epoch, expected)]
    sampler.set_epoch(epoch)
    assert list(sampler) == batches
    # Skipped, dropped: both are missed, and all else is seen.
    coverage = sampler.coverage(epoch)
    for size, n, missed in zip(sizes, counts.tolist(), coverage.missed.tolist(), strict=True):
        assert missed == (n if not size else n % size if partial == "drop" else 0)


@given(data=st.data(), partial=st.sampled_from(PARTIALS), seed=seeds, epoch=epochs)
def test_sizes_by_patch_are_as_the_oracle_says(data, partial, seed, epoch):
    ids = data.draw(patchy_ids())
    patch_ids, counts = np.unique(ids, return_counts=True)
    sizes = [data.draw(st.integers(1, 45)) for _ in patch_ids]
    assume(partial != "drop" or any(s <= n for s, n in zip(sizes, counts.tolist(), strict=True)))
    # Others may be there.
    arguments = dict(zip(patch_ids.tolist(), sizes, strict=True))
    sampler = quiet(ids, arguments, seed=seed, partial=partial)
    expected = oracle.epoch(ids.tolist(), seed, epoch, oracle.Settings(sizes, partial))
    result = [(batch.patch_id, batch.indices.tolist()) for batch in sampler.batches(epoch)]
    assert result == expected
    valid = [batch.valid for batch in sampler.batches(epoch)]
    lengths = [len(samples) for _, samples in expected]
    if partial == "pad":
        # What fills up a last batch does not count.
        assert all(0 < counted <= length for counted, length in zip(valid, lengths, strict=True))
        assert sum(valid) == ids.size
    else:
        assert valid == lengths
    plan_on_cpu = quiet(torch.from_numpy(ids), arguments, seed=seed, partial=partial)
    assert [
        (batch.patch_id, batch.indices.tolist()) for batch in plan_on_cpu.batches(epoch)
    ] == expected
    assert sampler.plan.max_batch_size == max(
        s if partial == "pad" else min(s, n)
        for s, n in zip(sizes, counts.tolist(), strict=True)
        if partial != "drop" or s <= n
    )


def test_equal_sizes_are_one_size():
    one = PatchBatchSampler(IDS, 4, seed=1)
    for sizes in (dict.fromkeys(IDS_ASCENDING, 4), dict.fromkeys(IDS_ASCENDING, np.int32(4))):
        same = PatchBatchSampler(IDS, sizes, seed=1)
        assert same.plan.settings == one.plan.settings
        assert list(same) == list(PatchBatchSampler(IDS, 4, seed=1))
    # Whatever it comes from; patches of less than four samples would be given less.
    ids = np.asarray(IDS)[np.isin(IDS, [5, 9])]
    one = PatchBatchSampler(ids, 4, seed=1)
    for costs in ({"cost": [3, 3]}, {"sample_costs": np.full(ids.size, 3)}):
        same = PatchBatchSampler(ids, CostBudget(13.5, **costs), seed=1)
        assert same.plan.settings == one.plan.settings
        # Nothing was cut, so no second order is kept.
        assert same.plan.table_bytes["numpy"] <= one.plan.table_bytes["numpy"] + 16
        assert list(same) == list(PatchBatchSampler(ids, 4, seed=1))
    assert (
        PatchBatchSampler(IDS, {-2: 1, 5: 2, 9: 3, 40: 1}, seed=1, partial="pad").batch_size is None
    )


@pytest.mark.parametrize("partial", ["keep", "pad"])
@pytest.mark.parametrize("sizes", [{-2: 3, 5: 7, 9: 8, 40: 2}, CostBudget(21, [3, 1.5, 2, 7])])
def test_evaluation_counts_every_sample_once(sizes, partial):
    world = [
        PatchBatchSampler.for_evaluation(IDS, sizes, partial=partial, num_replicas=3, rank=rank)
        for rank in range(3)
    ]
    counted = [
        sample for s in world for b in s.batches() for sample in b.indices[: b.valid].tolist()
    ]
    assert sorted(counted) == list(range(IDS.size))
    assert len({len(list(sampler.batches())) for sampler in world}) == 1


def test_costs_are_taken_in_any_form():
    costs = [3, 1.5, 2, 7]
    by_id = dict(zip(IDS_ASCENDING, costs, strict=True))
    expected = PatchBatchSampler(IDS, CostBudget(21, costs), seed=1)
    assert expected.plan.sizes_by_patch.tolist() == [7, 14, 10, 3]
    for cost in (
        np.array(costs),
        np.array(costs, np.float32),
        tuple(costs),
        torch.tensor(costs),
        by_id,
        {**by_id, 77: 1},
        by_id.__getitem__,
    ):
        result = PatchBatchSampler(IDS, CostBudget(21, cost=cost), seed=1)
        assert result.plan.settings == expected.plan.settings
        assert list(result) == list(PatchBatchSampler(IDS, CostBudget(21, costs), seed=1))


class Dataset:
    """A dataset whose patches have costs."""

    def patch_costs(self) -> dict[int, float]:
        return dict(zip(IDS_ASCENDING, [3, 1.5, 2, 7], strict=True))

    def get_all_patch_ids(self) -> np.ndarray:
        return IDS

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, sample: int) -> dict[str, int]:
        raise AssertionError("no sample is read")


def test_the_datasets_costs_are_the_default():
    result = PatchBatchSampler(Dataset(), CostBudget(21), seed=1)
    assert result.plan.sizes_by_patch.tolist() == [7, 14, 10, 3]
    assert result.plan.costs_by_patch.tolist() == [3, 1.5, 2, 7]
    # What is given comes first.
    arguments = PatchBatchSampler(Dataset(), CostBudget(21, [21, 7, 3, 10]), seed=1)
    assert arguments.plan.sizes_by_patch.tolist() == [1, 3, 7, 2]
    assert PatchBatchSampler(Dataset(), 4, seed=1).plan.costs_by_patch is None
    # Where there is neither.
    costs = "cost must be given in CostBudget if the dataset has no patch_costs"
    with pytest.raises(ValueError, match=costs):
        PatchBatchSampler(IDS, CostBudget(21))
    with pytest.raises(ValueError, match=costs):
        EpochPlan(PatchGroups.from_ids(IDS), CostBudget(21), 0)


def test_balanced_steps_go_by_the_costs_of_the_budget():
    costs = [3, 1.5, 2, 7]
    by_budget = PatchBatchSampler(
        IDS, CostBudget(21, costs), seed=1, steps="balanced", step_width=3
    )
    sizes = dict(zip(IDS_ASCENDING, [7, 14, 10, 3], strict=True))
    by_costs = PatchBatchSampler(
        IDS, sizes, seed=1, steps="balanced", step_width=3, patch_costs=costs
    )
    assert list(by_budget) == list(by_costs)
    assert list(by_budget) != list(
        PatchBatchSampler(IDS, sizes, seed=1, steps="balanced", step_width=3)
    )
    # Others, if they are asked for.
    other = [1, 9, 1, 1]
    settings = {"seed": 1, "steps": "balanced", "step_width": 3, "patch_costs": other}
    assert list(PatchBatchSampler(IDS, CostBudget(21, costs), **settings)) == list(
        PatchBatchSampler(IDS, sizes, **settings)
    )


def test_skipped_patches_are_missed_with_one_warning():
    budget = CostBudget(20, {-2: 1, 5: 21, 9: 2, 40: 1000}, over_budget="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = PatchBatchSampler(IDS, budget, seed=0)
        batches = list(sampler)
        coverage = sampler.coverage(0)
    assert [str(warning.message) for warning in caught] == [
        "over_budget='skip' leaves out 33 samples in 2 of 4 patches: even their smallest allowed "
        "batch costs more than max_cost. Raise max_cost to include them."
    ]
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="leaves out 33 samples") as caught:
        PatchBatchSampler.for_evaluation(IDS, budget)
    assert caught[0].filename == __file__
    assert coverage.missed.tolist() == [0, 30, 0, 3]
    assert coverage.batches.tolist() == [1, 0, 5, 0]
    assert (
        sorted(sample for batch in batches for sample in batch)
        == np.flatnonzero(np.isin(IDS, [-2, 9])).tolist()
    )
    # Too few for a batch of any size is another reason, and both are said.
    with pytest.warns(UserWarning, match="leaves out") as caught:
        both = PatchBatchSampler(
            IDS,
            CostBudget(20, [1, 21, 1, 1], min_batch_size=5, over_budget="skip"),
            partial="drop",
        )
    assert [str(warning.message).split(" leaves")[0] for warning in caught] == [
        "over_budget='skip'",
        "partial='drop'",
    ]
    assert "1 of 4 patches (3 samples)" in str(caught[1].message)
    assert both.coverage().missed.tolist() == [0, 30, 50 % 20, 3]


def test_a_budget_with_weights():
    budget = CostBudget(20, {-2: 1, 5: 21, 9: 2, 40: 1}, over_budget="skip")
    # What is skipped takes no part.
    sampler = quiet(IDS, budget, seed=0, weights=[1, 1000, 2, 1], epoch_batches=8)
    assert sampler.coverage(0).batches.tolist() == [2, 0, 4, 2]
    for batch in sampler.batches(0):
        assert len(batch.indices) * {-2: 1, 9: 2, 40: 1}[batch.patch_id] <= 20


# Kept, and told apart


@pytest.mark.parametrize(
    "budget",
    [
        CostBudget(100, {7: 10, 8: 45.5}),
        CostBudget(100, {np.int64(7): np.float64(10), np.int64(8): np.float32(0.5)}),
        CostBudget(1.7, [0.1, 1 / 3], min_batch_size=2, max_batch_size=9, multiple_of=3),
        CostBudget(np.float64(5), np.array([1, 2]), power_of_two=True, over_budget="skip"),
        CostBudget(5),
        CostBudget(5, sample_costs=[1, 2.5, 3]),
        CostBudget(5, {"north": 1, "south": 2}, calibration={"fixed": 3, "shapes": [[1, 2]]}),
    ],
    ids=repr,
)
def test_a_budget_goes_through_json(budget):
    plain = budget.to_dict()
    restored = CostBudget.from_dict(json.loads(json.dumps(plain)))
    assert restored.to_dict() == plain
    if budget.cost is not None:
        names = list(budget.cost) if isinstance(budget.cost, dict) else [3, 9]
        ids = np.repeat(np.array(names), [30, 40])
        plans = [quiet(ids, each, seed=0).plan for each in (budget, restored)]
        assert plans[0].settings == plans[1].settings
    for name in ("min_batch_size", "max_batch_size", "multiple_of", "power_of_two", "over_budget"):
        assert getattr(restored, name) == getattr(budget, name)
    assert (restored.calibration is None) == (budget.calibration is None)


def test_numbers_of_any_library_are_kept_as_plain_ones():
    torch = pytest.importorskip("torch")
    budget = CostBudget(
        np.float32(9),
        {np.int64(3): torch.tensor(2.0), 9: np.float32(1.5)},
        max_batch_size=np.int64(8),
        multiple_of=np.int32(2),
    )
    restored = CostBudget.from_dict(through_json(budget.to_dict()))
    assert restored == CostBudget(9.0, {3: 2.0, 9: 1.5}, max_batch_size=8, multiple_of=2)
    # Types that NumPy does not have are taken, too.
    plan = EpochPlan(
        PatchGroups.from_counts([5, 7]),
        CostBudget(9, torch.tensor([2.0, 1.5], dtype=torch.bfloat16)),
        0,
        weights=torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    )
    assert plan.sizes_by_patch.tolist() == [4, 6]


def test_a_saved_budget_that_lacks_its_cost_is_refused():
    with pytest.raises(ValueError, match=r"saved\['cost'\] must be given if"):
        CostBudget.from_dict({"max_cost": 1, "cost_by": "patch id"})


def test_a_function_of_costs_cannot_be_kept():
    with pytest.raises(
        TypeError, match="cost must be a mapping or an array to be saved, got a fun"
    ):
        CostBudget(5, lambda patch: 1.0).to_dict()


@pytest.mark.parametrize(
    ("saved", "match"),
    [
        ({}, "saved must come from CostBudget.to_dict, got"),
        (None, "saved must come from CostBudget.to_dict, got None"),
        ({"max_cost": 1, "colour": 2}, "got unknown keys"),
    ],
)
def test_what_is_no_saved_budget_is_refused(saved, match):
    with pytest.raises(TypeError, match=match):
        CostBudget.from_dict(saved)


@pytest.mark.parametrize("pairs", [5, [[1, 2, 3]], [7]])
def test_saved_costs_that_are_no_pairs_are_refused(pairs):
    match = re.escape(
        f"cost if saved['cost_by']='patch id', got {pairs}: pass the unchanged result"
    )
    with pytest.raises(ValueError, match=match):
        CostBudget.from_dict({"max_cost": 1, "cost": pairs, "cost_by": "patch id"})


def test_a_state_knows_the_sizes():
    def made(max_cost: float, **bounds: Any) -> PatchBatchSampler:
        return PatchBatchSampler(IDS, CostBudget(max_cost, [3, 1.5, 2, 7], **bounds), seed=1)

    sampler = made(21)
    begun = iter(sampler)
    draw(begun, 3)
    state = through_json(sampler.state_dict())
    # Another budget of the same sizes goes on.
    for same in (made(21), made(21.4), made(21, min_batch_size=3)):
        same.load_state_dict(state)
        assert list(same) == list(iter_of_rest(made(21), 3))
    for other in (made(20), made(21, max_batch_size=10), PatchBatchSampler(IDS, 7, seed=1)):
        with pytest.raises(ValueError, match=r"Cannot load state: .*batch_sizes? is"):
            other.load_state_dict(state)
    sizes = dict(zip(IDS_ASCENDING, [7, 14, 10, 3], strict=True))
    as_mapping = PatchBatchSampler(IDS, sizes, seed=1)
    as_mapping.load_state_dict(state)
    assert list(as_mapping) == list(iter_of_rest(made(21), 3))


def iter_of_rest(sampler: PatchBatchSampler, drawn: int) -> list[list[int]]:
    return list(sampler)[drawn:]


# Bad input


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"max_cost": 0}, ValueError, "max_cost must be > 0 and < 2**512, got 0"),
        ({"max_cost": -1.0}, ValueError, "max_cost must be > 0 and < 2**512, got -1.0"),
        ({"max_cost": float("inf")}, ValueError, "max_cost must be > 0 and < 2**512, got inf"),
        ({"max_cost": float("nan")}, ValueError, "max_cost must be > 0 and < 2**512, got nan"),
        ({"max_cost": "5"}, TypeError, "max_cost must be a number, got '5'"),
        ({"max_cost": True}, TypeError, "max_cost must be a number, got True"),
        ({"sample_costs": [1]}, ValueError, "sample_costs must be None if cost is given"),
        ({"min_batch_size": 0}, ValueError, "min_batch_size must be >= 1, got 0"),
        ({"min_batch_size": 1.5}, TypeError, "min_batch_size must be an int, got 1.5"),
        ({"max_batch_size": 0}, ValueError, "max_batch_size must be >= 1, got 0"),
        ({"max_batch_size": 1 << 31}, ValueError, "max_batch_size must be"),
        (
            {"min_batch_size": 5, "max_batch_size": 4},
            ValueError,
            "max_batch_size must be >= min_batch_size=5, got 4",
        ),
        ({"multiple_of": 0}, ValueError, "multiple_of must be >= 1, got 0"),
        ({"multiple_of": "8"}, TypeError, "multiple_of must be an int, got '8'"),
        ({"power_of_two": 1}, TypeError, "power_of_two must be a bool, got 1"),
        (
            {"power_of_two": True, "multiple_of": 6},
            ValueError,
            "multiple_of must be a power of two if power_of_two=True, got 6",
        ),
        ({"over_budget": "ignore"}, ValueError, "over_budget must be"),
        ({"calibration": [1]}, TypeError, "calibration must be a mapping, got [1]"),
    ],
)
def test_bad_budgets(wrong, error, match):
    with pytest.raises(error, match=re.escape(match)):
        CostBudget(**{"max_cost": 10, "cost": [1, 1, 1, 1], **wrong})


@pytest.mark.parametrize(
    ("batch_size", "error", "match"),
    [
        (CostBudget(9, [1, 2, 3]), ValueError, "cost must be one number per patch, shape (4,), go"),
        (
            CostBudget(9, {5: 1}),
            ValueError,
            "cost must have a number for every patch, got none for",
        ),
        (
            CostBudget(9, [1, 2, 0, 1]),
            ValueError,
            "cost must be > 0 and < 2**512, got 0.0 for patc",
        ),
        (CostBudget(9, [1, 2, np.nan, 1]), ValueError, "got nan for patch 9"),
        (CostBudget(9, lambda patch: -patch), ValueError, "got -5.0 for patch 5"),
        (CostBudget(9, "dear"), TypeError, "cost must be numbers"),
        (
            {5: 1, 9: 2},
            ValueError,
            "batch_size must have a number for every patch, got none for -2",
        ),
        ({}, ValueError, "batch_size must have a number for every patch, got none for -2, 5, 9, 4"),
        ({-2: 1, 5: 0, 9: 1, 40: 1}, ValueError, "batch_size of patch 5 must be >= 1, got 0"),
        ({-2: 1, 5: 1, 9: -3, 40: 1}, ValueError, "batch_size of patch 9 must be >= 1, got -3"),
        ({-2: 1, 5: 1, 9: 1.5, 40: 1}, TypeError, "batch_size of patch 9 must be an int, got 1.5"),
        ({-2: 1, 5: 1, 9: 1, 40: 1 << 31}, ValueError, "batch_size of patch 40 must be"),
        (
            {-2: True, 5: 1, 9: 1, 40: 1},
            TypeError,
            "batch_size of patch -2 must be an int, got Tru",
        ),
        (
            [4, 4, 4, 4],
            TypeError,
            "batch_size must be an int, a mapping from patch ids to ints, or",
        ),
        (None, TypeError, "batch_size must be an int, a mapping from patch ids to ints, or a Cost"),
        (
            np.array([4, 4, 4, 4]),
            TypeError,
            "batch_size must be an int, a mapping from patch ids to ints, or a CostBudget, got arr",
        ),
        (4.0, TypeError, "batch_size must be an int, a mapping from patch ids to ints, or a CostB"),
    ],
)
def test_bad_sizes(batch_size, error, match):
    with pytest.raises(error, match=re.escape(match)):
        PatchBatchSampler(IDS, batch_size, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"max_cost": 6},
        {"cost": {1: 3}},
        {"min_batch_size": 4},
        {"max_batch_size": 32},
        {"multiple_of": 4},
        {"power_of_two": True},
        {"over_budget": "skip"},
    ],
)
def test_budgets_that_differ_in_one_thing_are_not_equal(change):
    arguments = {"max_cost": 5, "cost": {1: 2}, "max_batch_size": 64}
    assert CostBudget(**arguments) == CostBudget(**arguments, calibration={"fixed": 1})
    assert CostBudget(**arguments) != CostBudget(**{**arguments, **change})


def test_the_counts_are_as_the_tables_above_say():
    assert np.unique(IDS, return_counts=True)[0].tolist() == IDS_ASCENDING
    assert np.unique(IDS, return_counts=True)[1].tolist() == COUNTS
