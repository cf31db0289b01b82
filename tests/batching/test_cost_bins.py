"""Classes of cost inside a patch, against a model of the rule in plain Python."""

from __future__ import annotations

from itertools import chain, combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import EpochPlan, PatchGroups
from gpusampler.batching import cost_bins
from gpusampler.batching.cost_bins import CostBins, cut_into_bins
from gpusampler.batching.cost_budget import CostBudget
from gpusampler.plan.coverage import omitted_samples
from support.strategies import smallest_size

PARTIALS = ["keep", "drop", "pad"]

# -- the rule, as one would write it down --


def allowed(budget: CostBudget, cost: float) -> int:
    """The largest batch size for samples of one cost, by trying all."""
    max_size = min(budget.max_batch_size or 3000, int(budget.max_cost // cost) + 1)
    for size in range(max_size, 0, -1):
        is_multiple = size % budget.multiple_of == 0
        is_power = size & (size - 1) == 0 or not budget.power_of_two
        if size * cost <= budget.max_cost and is_multiple and is_power:
            return size if size >= budget.min_batch_size else 0
    return 0


def of_use(budget: CostBudget, size: int, count: int, partial: str) -> int:
    def fits(size: int) -> bool:
        power = size & (size - 1) == 0 or not budget.power_of_two
        return size % budget.multiple_of == 0 and size >= budget.min_batch_size and power

    if partial == "drop":
        return max((s for s in range(1, min(size, count) + 1) if fits(s)), default=size)
    return min((s for s in range(count, size + 1) if fits(s)), default=size)


def flat(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def leading(size: int) -> int:
    """A size with all but its four leading bits cleared."""
    low = max(size.bit_length() - 4, 0)
    return size >> low << low


def counts_for(budget: CostBudget, size: int, count: int, partial: str) -> float:
    """What a part counts, but for the parts being few."""
    if partial != "drop":
        return max(-(-count // size), 2)
    used = of_use(budget, size, count, partial)
    return max(count // used, 2) + 3.0 * (count % used / used)


def classes_of(samples: list[int], cost: Any, budget: CostBudget) -> list[list[int]]:
    """Samples of a patch by class, the cheapest first."""
    samples_by_size: dict[int, list[int]] = {}
    for sample in samples:
        samples_by_size.setdefault(leading(allowed(budget, cost[sample])), []).append(sample)
    return [samples_by_size[key] for key in sorted(samples_by_size, reverse=True)]


def cut(samples: list[int], cost: Any, budget: CostBudget, partial: str) -> list[list[int]]:
    """The parts of one patch."""
    classes = classes_of(samples, cost, budget)
    over_budget = [c for c in classes if allowed(budget, cost[c[0]]) == 0]
    classes = classes[: len(classes) - len(over_budget)]
    best: list[tuple[float, list[list[int]]]] = [(0.0, [])]
    for end in range(1, len(classes) + 1):
        candidates = []
        size = allowed(budget, max(cost[s] for s in classes[end - 1]))
        for start in range(end):
            samples_of_bin = sorted(flat(classes[start:end]))
            penalty = counts_for(budget, size, len(samples_of_bin), partial)
            candidates.append((best[start][0] + penalty, start, [*best[start][1], samples_of_bin]))
        # Of equals, the one whose last part is the longest.
        value, _, bins = min(candidates, key=lambda way: way[:2])
        best.append((value, bins))
    return best[-1][1] + over_budget


def listed(cost_bins: CostBins) -> list[list[int]]:
    return [cost_bins.groups.samples_of(number).tolist() for number in range(cost_bins.sizes.size)]


def by_patch(ids: Any, members: Any = None) -> list[list[int]]:
    members = range(len(ids)) if members is None else sorted(members)
    return [[s for s in members if ids[s] == patch] for patch in sorted({ids[s] for s in members})]


# -- what it is tried on --


@st.composite
def budgets(draw, costs: Any) -> CostBudget:
    power = draw(st.booleans())
    min_size = draw(st.integers(1, 5))
    multiple = draw(st.sampled_from([1, 2, 4] if power else [1, 2, 3, 8]))
    smallest = smallest_size(min_size, multiple, power)
    return CostBudget(
        draw(st.sampled_from([30, 100.0, 257.5, 600])),
        sample_costs=costs,
        min_batch_size=min_size,
        max_batch_size=draw(st.none() | st.integers(smallest, 40)),
        multiple_of=multiple,
        power_of_two=power,
        over_budget="skip",
    )


@st.composite
def cases(draw) -> tuple[list[int], list[float], CostBudget, str]:
    patches = draw(st.integers(1, 4))
    size = draw(st.integers(1, 90))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    ids = random.integers(0, patches, size)
    if draw(st.booleans()):
        ids.sort()
    kind = draw(st.sampled_from(["lengths", "wide", "few", "halves"]))
    costs = {
        "lengths": random.integers(1, 60, size),
        "wide": np.exp(random.normal(2, 1.2, size)),
        "few": random.choice([1, 2, 7, 7.5, 31], size),
        "halves": random.integers(2, 40, size) / 2,
    }[kind].astype(float)
    return ids.tolist(), costs.tolist(), draw(budgets(costs)), draw(st.sampled_from(PARTIALS))


@given(cases())
def test_parts_are_those_of_the_model(case):
    ids, costs, budget, partial = case
    expected = [(g, p) for g, s in enumerate(by_patch(ids)) for p in cut(s, costs, budget, partial)]
    groups = PatchGroups.from_ids(np.array(ids))
    if all(allowed(budget, cost) == 0 for cost in costs):
        with pytest.raises(ValueError, match=r"too small for all \d+ samples"):
            cut_into_bins(groups, budget, partial)
        return
    result = cut_into_bins(groups, budget, partial)
    largest = [max(costs[s] for s in part) for _, part in expected]
    limits = [allowed(budget, cost) for cost in largest]
    assert result.patch_of_bin.tolist() == [patch for patch, _ in expected]
    # In the order of samples inside a part, too: the model's are sorted.
    assert listed(result) == [part for _, part in expected]
    assert result.costs.tolist() == largest
    assert result.sizes.tolist() == [
        of_use(budget, limit, len(part), partial) if limit else 0
        for limit, (_, part) in zip(limits, expected, strict=True)
    ]
    assert result.groups.patch_ids.tolist() == list(range(len(expected)))


@given(cases(), st.data())
def test_the_laws_of_parts(case, data):
    ids, costs, budget, partial = case
    costs = np.array(costs)
    groups = PatchGroups.from_ids(np.array(ids))
    members = np.arange(len(ids))
    if data.draw(st.booleans()):
        members = np.array(sorted(data.draw(st.sets(st.sampled_from(range(len(ids))), min_size=1))))
        groups = groups.select(members)
    if (budget.sizes_for(costs[members]) == 0).all():
        return
    result = cut_into_bins(groups, budget, partial)
    bins = listed(result)
    # Each sample once, with its patch; parts of a patch side by side, the cheapest first.
    assert sorted(flat(bins)) == sorted(members.tolist())
    assert all(
        {ids[s] for s in part} == {groups.patch_ids[parent]}
        for part, parent in zip(bins, result.patch_of_bin, strict=True)
    )
    assert (np.diff(result.patch_of_bin) >= 0).all()
    same = np.diff(result.patch_of_bin) == 0
    assert (np.diff(result.costs)[same] > 0).all()
    for before, after, alike in zip(bins, bins[1:], same, strict=False):
        assert not alike or max(costs[before]) < min(costs[after])
    assert all(part == sorted(part) for part in bins)
    # Within the budget, or left out, all of them.
    assert (result.sizes * result.costs <= budget.max_cost).all()
    for part, size in zip(bins, result.sizes, strict=True):
        assert (budget.sizes_for(costs[part]) > 0).tolist() == [size > 0] * len(part)
    # As groups are.
    assert result.groups.source_size == len(ids)
    assert result.groups.device == groups.device
    assert result.groups.counts.tolist() == list(map(len, bins))
    order = result.groups.order
    is_runs = all(part[-1] - part[0] + 1 == len(part) for part in bins)
    assert (order is None) == is_runs
    if order is None:
        assert result.groups.starts.tolist() == [part[0] for part in bins]
    else:
        assert order.dtype == np.int32
        assert order.tolist() == flat(bins)
        assert result.groups.starts.tolist() == result.groups.offsets[:-1].tolist()


@given(cases())
def test_no_other_cut_has_fewer_batches(case):
    ids, costs, budget, partial = case
    budget = CostBudget(100, sample_costs=np.minimum(costs, 100))
    result = cut_into_bins(PatchGroups.from_ids(np.array(ids)), budget, partial)
    for patch, samples in enumerate(by_patch(ids)):
        classes = classes_of(samples, budget.sample_costs, budget)[-9:]
        samples_kept = {s for c in classes for s in c}
        bins = [p for p, g in zip(listed(result), result.patch_of_bin, strict=True) if g == patch]
        if samples_kept != set(flat(bins)):
            continue

        def worth(parts: list[list[int]]) -> float:
            sizes = [allowed(budget, max(budget.sample_costs[p])) for p in parts]
            pairs = zip(sizes, parts, strict=True)
            return sum(counts_for(budget, s, len(p), partial) for s, p in pairs)

        penalties = []
        for number in range(len(classes)):
            for inner in combinations(range(1, len(classes)), number):
                bounds = [0, *inner, len(classes)]
                penalties.append(worth([flat(classes[a:b]) for a, b in pairwise(bounds)]))
        # Equal, but for the order in which fractions of batches are added up.
        assert worth(bins) == pytest.approx(min(penalties), rel=1e-12)


@pytest.mark.parametrize("partial", PARTIALS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_samples_of_one_cost_stay_with_their_patch(partial, shuffled):
    ids = np.repeat([4, -3, 9], [50, 7, 23])
    if shuffled:
        ids = np.random.default_rng(0).permutation(ids)
    groups = PatchGroups.from_ids(ids)
    result = cut_into_bins(groups, CostBudget(81, sample_costs=np.full(80, 10.0)), partial)
    plain = EpochPlan(groups, CostBudget(81, cost=[10] * 3), seed=0, partial=partial)
    assert result.patch_of_bin.tolist() == [0, 1, 2]
    assert result.sizes.tolist() == plain.sizes_by_patch.tolist()
    assert result.groups.counts.tolist() == groups.counts.tolist()
    assert result.groups.starts.tolist() == groups.starts.tolist()
    assert (result.groups.order is None) == (groups.order is None) == (not shuffled)
    if shuffled:
        assert result.groups.order.tolist() == groups.order.tolist()


def whole(costs: Any, budget: float, partial: str = "keep", **settings: Any) -> CostBins:
    budget = CostBudget(budget, sample_costs=costs, **settings)
    return cut_into_bins(PatchGroups.from_counts([len(costs)]), budget, partial)


def test_costs_that_allow_one_size_share_a_part():
    # A maximum of 100 allows two of each cost from 34 to 50, and three from 26 to 33.
    costs = np.concatenate([np.arange(26, 34)] * 6 + [np.arange(34, 51)] * 6)
    result = whole(costs, 100)
    assert result.costs.tolist() == [33, 50]
    assert result.sizes.tolist() == [3, 2]
    assert result.groups.counts.tolist() == [48, 102]
    # Nothing above 25 is below a power of two but 2 itself.
    assert whole(costs, 100, power_of_two=True).sizes.tolist() == [2]
    assert whole(costs, 1000, max_batch_size=4).sizes.tolist() == [4]


def test_a_part_of_one_batch_has_to_save_two():
    # 10 of cost 1 and 10 of 10: apart one batch of ten and ten of one; together twenty of one.
    assert whole([1] * 10 + [10] * 10, 10).sizes.tolist() == [10, 1]
    # Apart one batch and one; together two.
    assert whole([1] * 10 + [2] * 5, 10).sizes.tolist() == [5]
    # Apart 1 and 2, together 4: the one is counted as two, and no part is made for nothing.
    assert whole([1] * 10 + [2] * 10, 10).sizes.tolist() == [5]
    assert whole([1] * 11 + [2] * 10, 10).sizes.tolist() == [10, 5]


def test_under_drop_samples_that_fill_no_batch_count():
    # Together 40 fill eight batches of five. Apart they fill two and two, and leave out 0.7 and 0.6
    # of a batch, or 0.6 and 0.8.
    assert whole([1] * 27 + [2] * 13, 10, "drop").sizes.tolist() == [10, 5]
    assert whole([1] * 26 + [2] * 14, 10, "drop").sizes.tolist() == [5]
    assert whole([1] * 26 + [2] * 14, 10, "keep").sizes.tolist() == [10, 5]


@given(st.floats(1e-3, 1e3), st.integers(1, 1000))
def test_sizes_are_exact_where_quotients_are_rounded(cost, size):
    product = size * cost
    just, short = np.nextafter([product] * 2, [np.inf, 0]).tolist()
    for limit in (product, just, short):
        result = whole([cost] * (size + 2), limit, over_budget="skip") if limit >= cost else None
        max_size = max(
            (s for s in range(max(1, size - 1), size + 2) if s * cost <= limit), default=0
        )
        assert (0 if result is None else result.sizes[0]) == max_size


@pytest.mark.parametrize("partial", PARTIALS)
def test_who_is_over_the_budget_is_split_from_who_is_not(partial):
    # 100 and 101 have the same leading bits, and the limit goes through between them.
    costs = [100, 101, 99, 101, 98] * 3
    result = whole(costs, 100, partial, over_budget="skip")
    assert result.sizes.tolist() == [1, 0]
    assert result.costs.tolist() == [100, 101]
    assert listed(result) == [
        [s for s in range(15) if costs[s] <= 100],
        [s for s in range(15) if costs[s] > 100],
    ]


def test_a_patch_may_be_over_the_budget_as_a_whole():
    ids = [3, 3, 5, 5, 5, 8]
    groups = PatchGroups.from_ids(ids)
    costs = [9, 9, 11, 12, 11, 2]
    result = cut_into_bins(groups, CostBudget(10, sample_costs=costs, over_budget="skip"), "keep")
    assert result.sizes.tolist() == [1, 0, 1]
    assert result.costs.tolist() == [9, 12, 2]
    plan = EpochPlan(groups, CostBudget(10, sample_costs=costs, over_budget="skip"), seed=0)
    assert omitted_samples(plan, plan.num_batches).over_budget.tolist() == [0, 3, 0]
    assert plan.num_batches == 3


def test_the_first_sample_over_the_budget_is_named():
    ids = ["b", "a", "b", "a", "a"]
    groups = PatchGroups.from_ids(ids)
    costs = np.array([5, 7, 13, 12, 1])
    with pytest.raises(ValueError, match=r"max_cost=10 .*for 2 of 5 samples: sample 2 of pa"):
        cut_into_bins(groups, CostBudget(10, sample_costs=costs), "keep")
    with pytest.raises(ValueError, match=r"patch b costs 13\.0\. Raise max_cost .*'skip'"):
        cut_into_bins(groups, CostBudget(10, sample_costs=costs), "keep")
    with pytest.raises(ValueError, match=r"too small for all 5 samples: .* costs 1\.0\."):
        cut_into_bins(groups, CostBudget(0.5, sample_costs=costs, over_budget="skip"), "keep")
    # Of those that are held.
    selected = groups.select([0, 1, 3, 4])
    with pytest.raises(ValueError, match=r"for 1 of 4 .*sample 3 of patch a costs 12\.0\."):
        cut_into_bins(selected, CostBudget(10, sample_costs=costs), "keep")
    assert cut_into_bins(
        groups.select([0, 4]), CostBudget(10, sample_costs=costs), "keep"
    ).sizes.all()


def test_batches_of_a_plan_are_within_the_budget_and_hand_out_all():
    random = np.random.default_rng(5)
    ids, costs = random.integers(0, 6, 3000), np.exp(random.normal(3, 0.7, 3000))
    budget = CostBudget(costs.max() * 1.5, sample_costs=costs)
    plan = EpochPlan(PatchGroups.from_ids(ids), budget, seed=1)
    block = plan.evaluate(epoch=3, slots=np.arange(plan.num_batches))
    samples = []
    for indices, length, group in zip(*block, strict=True):
        batch = indices[:length]
        samples.extend(batch.tolist())
        assert length * costs[batch].max() <= budget.max_cost
        assert set(ids[batch]) == {group}
    assert sorted(samples) == list(range(3000))
    # One size for all would take more than three times as many.
    fixed = EpochPlan(plan.groups, int(budget.max_cost // costs.max()), seed=1)
    assert plan.num_batches < fixed.num_batches / 3


# -- where samples and costs lie --


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int8", "uint64"])
def test_costs_of_any_library_and_type_are_the_same(library, dtype):
    random = np.random.default_rng(0)
    costs = random.integers(1, 100, 400)
    groups = PatchGroups.from_ids(random.integers(0, 3, 400))
    arguments = library.array(costs.astype(dtype))
    result = cut_into_bins(groups, CostBudget(600, sample_costs=arguments), "keep")
    expected = cut_into_bins(groups, CostBudget(600, sample_costs=costs.tolist()), "keep")
    assert len(expected.sizes) > 3
    assert listed(result) == listed(expected)
    assert result.costs.tolist() == expected.costs.tolist()


@pytest.mark.parametrize("dtype", [">f8", ">i4", "g", "<u2"])
def test_other_types_of_numpy(dtype):
    costs = np.arange(1, 101).astype(dtype)
    result = whole(costs, 100)
    assert result.costs.tolist() == whole(np.arange(1.0, 101), 100).costs.tolist()
    assert result.costs.dtype == np.float64
    assert whole(np.repeat(costs, 2)[::2], 100).sizes.tolist() == result.sizes.tolist()


def test_types_that_numpy_does_not_have():
    torch = pytest.importorskip("torch")
    costs = torch.arange(1, 101)
    for dtype in (torch.bfloat16, torch.float16):
        result = whole(costs.to(dtype).requires_grad_(), 100)
        assert result.costs.tolist() == whole(costs, 100).costs.tolist()
    with pytest.raises(TypeError, match="sample_costs must be numbers"):
        whole(torch.ones(3, device="meta"), 100)


def test_integers_beyond_doubles_are_rounded_up():
    for cost in (2**53 + 1, 2**60 + 1, 2**63 - 1, 2**64 - 1, 2**53, 2**62):
        budget = CostBudget(float(2**54), sample_costs=np.array([cost] * 3, np.uint64))
        budget = CostBudget(float(2**66), sample_costs=budget.sample_costs)
        result = cut_into_bins(PatchGroups.from_counts([3]), budget, "keep")
        assert int(result.costs[0]) >= cost
        assert int(result.costs[0]) - cost < 2048
        assert int(result.sizes[0]) * cost <= 2**66
    # Rounded to the nearest, it would be within the budget, and two would not.
    over = CostBudget(float(2**54), sample_costs=np.array([2**53 + 1]))
    assert cut_into_bins(PatchGroups.from_counts([1]), over, "keep").sizes.tolist() == [1]
    just = np.longdouble(1) + np.finfo(np.longdouble).eps
    if just != 1.0 and float(just) == 1.0:
        assert whole(np.array([just] * 4), 2.0).sizes.tolist() == [1]


def test_costs_and_budgets_may_be_extreme():
    assert whole([5e-324, 1e-300, 1e150], 1e154).sizes.tolist() == [3]
    assert whole([5e-324, 1e-300, 1e150] * 9000, 1e154).groups.num_samples == 27000
    tiny = whole(np.array([1e-320] * 5), 1e-319)
    assert tiny.sizes.tolist() == [5]
    assert whole([2.0**511], 2.0**511).sizes.tolist() == [1]


def test_groups_on_torch_keep_their_device():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(2)
    ids, costs = random.integers(0, 5, 500), random.integers(1, 50, 500)
    groups = PatchGroups.from_ids(torch.from_numpy(ids))
    result = cut_into_bins(groups, CostBudget(100, sample_costs=torch.from_numpy(costs)), "keep")
    expected = cut_into_bins(PatchGroups.from_ids(ids), CostBudget(100, sample_costs=costs), "keep")
    assert result.groups.device == groups.device
    assert isinstance(result.groups.order, torch.Tensor)
    assert result.groups.order.dtype == torch.int32
    assert result.groups.order.tolist() == expected.groups.order.tolist()
    assert result.groups.fingerprint == expected.groups.fingerprint


def test_an_order_that_is_mapped_from_a_file(tmp_path):
    random = np.random.default_rng(2)
    ids, costs = random.integers(0, 5, 500), random.integers(1, 50, 500)
    groups = PatchGroups.from_ids(ids, path=tmp_path / "index")
    budget = CostBudget(100, sample_costs=costs)
    assert listed(cut_into_bins(groups, budget, "keep")) == listed(
        cut_into_bins(PatchGroups.from_ids(ids), budget, "keep")
    )


def test_runs_stay_runs():
    # A patch whose samples ascend in cost needs no order for its parts, either.
    costs = np.concatenate([np.arange(1, 200), np.arange(1, 100)])
    groups = PatchGroups.from_counts([199, 99], patch_ids=[7, 3])
    result = cut_into_bins(groups, CostBudget(400, sample_costs=costs), "keep")
    assert result.sizes.size > 6
    assert result.groups.order is None
    assert result.groups.starts.tolist() != sorted(result.groups.starts.tolist())
    other_order = PatchGroups.from_counts([199, 99])
    expected = cut_into_bins(other_order, CostBudget(400, sample_costs=costs), "keep")
    assert sorted(listed(result)) == sorted(listed(expected))


def test_large_source_of_which_little_is_held():
    groups = PatchGroups.from_counts([10, 10**6, 5]).select(np.r_[0:10, 10**6 + 10 : 10**6 + 15])
    costs = np.full(10**6 + 15, np.nan)
    costs[:10], costs[-5:] = 3, 9
    result = cut_into_bins(groups, CostBudget(27, sample_costs=costs), "keep")
    assert result.sizes.tolist() == [9, 3]
    assert result.groups.source_size == 10**6 + 15


@given(cases(), st.integers(1, 40), st.integers(1, 4))
def test_how_much_is_worked_on_at_once_changes_nothing(case, chunk, patches):
    ids, costs, budget, partial = case
    groups = PatchGroups.from_ids(np.array(ids))
    if (budget.sizes_for(np.array(costs)) == 0).all():
        return
    expected = cut_into_bins(groups, budget, partial)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost_bins, "CHUNK", chunk)
        patch.setattr(cost_bins, "PATCHES_PER_BLOCK", patches)
        result = cut_into_bins(groups, budget, partial)
    assert listed(result) == listed(expected)
    assert result.costs.tolist() == expected.costs.tolist()
    assert result.patch_of_bin.tolist() == expected.patch_of_bin.tolist()


def test_many_patches_and_classes():
    random = np.random.default_rng(4)
    ids = random.integers(0, 40_000, 200_000)
    costs = np.exp(random.normal(3, 1, ids.size))
    groups = PatchGroups.from_ids(ids)
    result = cut_into_bins(groups, CostBudget(2 * costs.max(), sample_costs=costs), "keep")
    order = result.groups.order
    assert (np.bincount(order, minlength=ids.size) == 1).all()
    parent = np.repeat(result.patch_of_bin, result.groups.counts)
    assert (groups.patch_ids[parent] == ids[order]).all()
    top = np.maximum.reduceat(costs[order], result.groups.starts)
    assert top.tolist() == result.costs.tolist()
    # A single patch with every class there is.
    sizes = 2.0 ** (31 * random.random(100_000))
    result = whole(2.0**40 / sizes, 2.0**40)
    assert (result.sizes * result.costs <= 2.0**40).all()


def test_the_benchmark_of_the_rule(monkeypatch):
    from docs.figures import cost_bins as bench

    before = cost_bins._bin_ends, cost_bins.MIN_COUNTED_BATCHES
    result = dict(bench.table(bench.lognormal, 5, 200, 8, "keep"))
    assert (cost_bins._bin_ends, cost_bins.MIN_COUNTED_BATCHES) == before
    assert result["one size per patch"].bins == 1
    assert result["one size per patch"].used < 0.3
    mine = result["this rule"]
    assert mine.used > result["1/8 octave, merged upwards"].used
    assert mine.bins < result["1/8 octave, merged upwards"].bins
    assert mine.single < 0.02
    assert 0.7 < mine.used < mine.padded <= 1
    assert mine.left_out == 0


# -- bad input --

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "zero": ([1, 0, 0, 2], ValueError, r"> 0 and < 2\*\*512, got 0 for sample 1"),
    "negative": ([1, 2, -3.5, 2], ValueError, "got -3.5 for sample 2"),
    "nan": ([1, 2, 3, float("nan")], ValueError, "got nan for sample 3"),
    "infinite": ([float("inf"), 2, 3, 4], ValueError, "got inf for sample 0"),
    "too large": ([1, 2.0**512, 3, 4], ValueError, "for sample 1"),
    "half that is infinite": (np.array([1, 1, np.inf, 1], np.float16), ValueError, "sample 2"),
    "wide": (np.array([1, 1, 1, "1e400"], "g"), ValueError, "for sample 3"),
    "too few": ([1, 2, 3], ValueError, r"shape \(4,\), got shape \(3,\)"),
    "two-dimensional": (np.ones((4, 1)), ValueError, r"got shape \(4, 1\)"),
    "scalar": (3.0, ValueError, r"got shape \(\)"),
    "ragged": ([[1], [2, 3]], ValueError, "one number per sample"),
    "strings": (list("1234"), TypeError, "numbers, one per sample"),
    "booleans": ([True] * 4, TypeError, "numbers"),
    "complex": ([1j] * 4, TypeError, "numbers"),
    "none": ([1, 2, None, 3], TypeError, "numbers"),
    "mapping": ({0: 1, 1: 2, 2: 3, 3: 4}, TypeError, "numbers"),
    "function": (lambda sample: 1.0, TypeError, "numbers"),
    "huge integers": ([2**70, 1, 1, 1], TypeError, "numbers"),
    "masked": (np.ma.masked_array([1, 2, 3, 4], [0, 0, 1, 0]), TypeError, "masked"),
}


@pytest.mark.parametrize(("costs", "error", "text"), BAD.values(), ids=BAD)
def test_bad_costs_are_refused(costs, error, text):
    groups = PatchGroups.from_ids([1, 2, 1, 2])
    with pytest.raises(error, match=f"sample_costs must .*{text}"):
        cut_into_bins(groups, CostBudget(10, sample_costs=costs), "keep")


def test_the_first_of_all_samples_is_named_whatever_their_patches():
    groups = PatchGroups.from_ids([9, 9, 1, 1])
    with pytest.raises(ValueError, match=r"got -2\.0 for sample 1"):
        cut_into_bins(groups, CostBudget(10, sample_costs=[1.0, -2, -3, 4]), "keep")
