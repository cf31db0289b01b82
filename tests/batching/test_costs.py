"""What batches cost: given in many forms, or asked of datasets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.sources.datasets import dataset_patch_costs
from support import oracle
from support.strategies import IDS, epoch_of, epochs, make, patchy_ids, quiet, ragged_of, seeds

COSTS = {5: 1.0, -2: 2.5, 9: 1.4, 40: 7.0}  # by ascending id: 2.5, 1.0, 1.4, 7.0
BALANCED = {"steps": "balanced", "step_width": 5}


def balanced(patch_costs: Any, **settings: Any) -> PatchBatchSampler:
    return make(**BALANCED, patch_costs=patch_costs, **settings)


def by_id(costs: dict[int, Any]) -> list[Any]:
    return [costs[patch_id] for patch_id in sorted(costs)]


def asked(patch_id: int) -> float:
    assert type(patch_id) is int
    return COSTS[patch_id]


FORMS = {
    "mapping with more in it": {**COSTS, 11: 0.0, "name": None},
    "mapping of mixed numbers": {5: 1, np.int64(-2): np.float32(2.5), 9: 1.4, 40: np.uint8(7)},
    "list": by_id(COSTS),
    "tuple": tuple(by_id(COSTS)),
    "float64": np.array(by_id(COSTS)),
    "not contiguous": np.array([by_id(COSTS), by_id(COSTS)]).T[:, 0],
    "callable": asked,
    "bound method": COSTS.__getitem__,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_costs_in_any_form_are_the_same(form):
    expected = balanced(COSTS)
    result = balanced(form)
    assert result.plan.settings == expected.plan.settings
    assert epoch_of(result, 3) == epoch_of(expected, 3)
    result.load_state_dict(expected.state_dict())
    # And they do something.
    assert epoch_of(expected, 3) != epoch_of(make(**BALANCED), 3)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int8", "uint64"])
def test_costs_of_any_library_and_type_are_the_same(library, dtype):
    whole = [3, 1, 2, 7]
    arguments = library.array(np.array(whole, dtype))
    groups = library.array(IDS)
    result = PatchBatchSampler(groups, 4, seed=1, **BALANCED, patch_costs=arguments)
    expected = balanced(dict(zip(sorted(COSTS), whole, strict=True)))
    assert result.plan.settings == expected.plan.settings
    assert epoch_of(result, 3) == epoch_of(expected, 3)


def test_costs_are_taken_when_they_are_given():
    costs = np.array(by_id(COSTS))
    sampler = balanced(costs)
    before = epoch_of(sampler, 0)
    costs[:] = [1, 9, 1, 9]
    assert epoch_of(sampler, 0) == before == epoch_of(balanced(COSTS), 0)


def test_tensors_that_are_being_learned_are_costs():
    torch = pytest.importorskip("torch")
    learned = torch.tensor(by_id(COSTS), dtype=torch.float64, requires_grad=True)
    assert epoch_of(balanced(learned), 0) == epoch_of(balanced(COSTS), 0)
    assert learned.grad is None


def test_ones_are_the_default():
    assert epoch_of(make(**BALANCED), 2) == epoch_of(balanced(np.ones(4)), 2)
    # All alike is enough.
    assert epoch_of(make(**BALANCED), 2) == epoch_of(balanced([0.25] * 4), 2)


# What only costs a little more is the same plan


@given(data=st.data(), seed=seeds, epoch=epochs)
def test_the_fingerprint_is_of_the_classes_and_their_order(data, seed, epoch):
    ids = data.draw(patchy_ids())
    groups = PatchGroups.from_ids(ids)
    size = data.draw(st.sampled_from([1, 3, 7, 20]))
    partial = data.draw(st.sampled_from(["keep", "pad"]))
    near = st.one_of(st.floats(0.9, 1.3), st.sampled_from([1.0, 1.125, 1.25, 1.5]))
    costs = [data.draw(near) for _ in range(groups.num_patches)]
    others = [data.draw(st.one_of(st.just(cost), near)) for cost in costs]
    plans, kinds = [], []
    for given_costs in (costs, others):
        settings = {"partial": partial, "steps": "balanced", "patch_costs": given_costs}
        plans.append(EpochPlan(groups, size, seed, **settings, step_width=3))
        # In which order classes are met, and which batches share one.
        classes = [
            oracle.cost_class(len(batch), cost)
            for n, cost in zip(groups.counts.tolist(), given_costs, strict=True)
            for batch in oracle.batches_of(n, size, partial)
        ]
        kinds.append(np.unique(classes, return_inverse=True)[1].tolist())
    marks = [plan.settings["patch_costs"] for plan in plans]
    assert (marks[0] == marks[1]) == (kinds[0] == kinds[1])
    if marks[0] == marks[1]:
        slots = np.arange(plans[0].num_batches)
        first, second = (ragged_of(plan, epoch, slots).samples for plan in plans)
        np.testing.assert_array_equal(first, second)


def test_costs_that_change_numbers_inside_a_class_only_load_each_other_s_states():
    # From 1 to below 9/8 is one class; the four patches' full batches are of classes 1, 2, 4, 8.
    near = {-2: 1.0, 5: 2.0, 9: 4.0, 40: 8.0}
    sampler = balanced(near)
    state = sampler.state_dict()
    other = balanced({-2: 1.1, 5: 2.1, 9: 4.2, 40: 8.9})
    other.load_state_dict(state)
    assert list(other) == list(sampler)
    for moved in ({**near, -2: 1.2}, {**near, 9: 2.0}, {**near, -2: 2.0, 5: 1.0}):
        refused = balanced(moved)
        with pytest.raises(
            ValueError,
            match=r"Cannot load state: hash of patch_costs is \d+ in the checkpoint, "
            r"\d+ in this sampler\. Build the sampler with the same ids and settings\.",
        ):
            refused.load_state_dict(state)


def test_a_plan_of_other_costs_is_refused_by_a_cursor():
    pytest.importorskip("torch")
    state = balanced(COSTS, partial="pad").cursor().state_dict()
    with pytest.raises(
        ValueError, match=r"patch_costs is \d+ in the checkpoint, \d+ in this sampler"
    ):
        balanced(by_id(COSTS)[::-1], partial="pad").cursor().load_state_dict(state)


# Datasets


class Known:
    """A dataset that knows its ids and what they cost."""

    def __init__(self, ids: Any, costs: Any = None) -> None:
        self.patch_ids = np.asarray(ids)
        if costs is not None:
            self.patch_costs = lambda: costs

    def __len__(self) -> int:
        return len(self.patch_ids)

    def __getitem__(self, i: int) -> None:
        raise AssertionError("no sample needs to be read")


def from_dataset(dataset: Any, **settings: Any) -> PatchBatchSampler:
    return PatchBatchSampler(dataset, 4, seed=1, device="numpy", **{**BALANCED, **settings})


def test_a_dataset_says_what_its_patches_cost():
    assert epoch_of(from_dataset(Known(IDS, COSTS)), 1) == epoch_of(balanced(COSTS), 1)
    assert epoch_of(from_dataset(Known(IDS, by_id(COSTS))), 1) == epoch_of(balanced(COSTS), 1)
    assert epoch_of(from_dataset(Known(IDS)), 1) == epoch_of(make(**BALANCED), 1)
    # What is given wins, and is all that is asked for.
    arguments = from_dataset(Known(IDS, COSTS), patch_costs=np.ones(4))
    assert epoch_of(arguments, 1) == epoch_of(make(**BALANCED), 1)


@pytest.mark.parametrize("steps", ["free", "same_patch"])
def test_a_dataset_is_not_asked_where_steps_are_not_balanced(steps):
    def ask() -> None:
        raise AssertionError("nobody needs to know")

    dataset = Known(IDS)
    dataset.patch_costs = ask
    sampler = PatchBatchSampler(dataset, 4, seed=1, steps=steps)
    assert "patch_costs" not in sampler.state_dict()["fingerprint"]


def test_wrong_costs_of_a_dataset_are_refused_like_others():
    with pytest.raises(ValueError, match=r"patch_costs must be > 0 and < 2\*\*512, got 0.0 for"):
        from_dataset(Known(IDS, {**COSTS, 9: 0}))


def test_groundwater_patches_cost_their_points():
    pytest.importorskip("torch")
    from gpusampler import GWPatchDataset
    from gpusampler.demo.embedded import small_data

    dataset = GWPatchDataset(small_data(), 6, 1)
    costs = dataset.patch_costs()
    assert len(set(costs.values())) > 5
    ids = dataset.get_all_patch_ids()
    expected = PatchBatchSampler(ids, 8, seed=3, **BALANCED, patch_costs=costs)
    result = PatchBatchSampler(dataset, 8, seed=3, device="numpy", **BALANCED)
    assert epoch_of(result, 5) == epoch_of(expected, 5)
    plain = PatchBatchSampler(ids, 8, seed=3, **BALANCED)
    assert epoch_of(result, 5) != epoch_of(plain, 5)


def test_a_column_with_an_index_is_a_mapping():
    pandas = pytest.importorskip("pandas")
    column = pandas.Series(COSTS)
    assert column.tolist() != by_id(COSTS)
    assert epoch_of(balanced(column), 3) == epoch_of(balanced(COSTS), 3)
    with pytest.raises(ValueError, match="a number for every patch, got none for -2, 5, 9, 40"):
        balanced(pandas.Series(by_id(COSTS), index=[100, 101, 102, 103]))


def test_a_dataset_may_have_costs_as_an_attribute():
    dataset = Known(IDS)
    dataset.patch_costs = COSTS
    assert epoch_of(from_dataset(dataset), 1) == epoch_of(balanced(COSTS), 1)


def test_a_dataset_is_anything_with_the_method():
    # Not only datasets of torch.
    known = SimpleNamespace(patch_costs=lambda: COSTS)
    assert dataset_patch_costs(known) is COSTS
    assert dataset_patch_costs(IDS) is None
    assert dataset_patch_costs(PatchGroups.from_ids(IDS)) is None


class TestWrapped:
    """Subset and ConcatDataset of torch pass the question on."""

    @pytest.fixture
    def data(self):
        return pytest.importorskip("torch.utils.data")

    def test_a_subset_of_some_patches(self, data):
        keep = np.flatnonzero(IDS != 9)
        subset = data.Subset(Known(IDS, COSTS), keep.tolist())
        expected = quiet(IDS[keep], 4, seed=1, **BALANCED, patch_costs=COSTS)
        assert epoch_of(from_dataset(subset), 1) == epoch_of(expected, 1)
        assert epoch_of(from_dataset(data.Subset(subset, range(20))), 1) == epoch_of(
            quiet(IDS[keep][:20], 4, seed=1, **BALANCED, patch_costs=COSTS), 1
        )

    def test_parts_of_a_whole(self, data):
        subsets = [
            Known([3, 3, 3, 1], {3: 2.0, 1: 9.5}),
            data.Subset(Known([7, 7, 1, 1, 1], {7: 0.3, 1: 9.5}), [0, 2, 3]),
        ]
        joined = data.ConcatDataset([*subsets, data.ConcatDataset(subsets[:1])])
        ids = [3, 3, 3, 1, 7, 1, 1, 3, 3, 3, 1]
        expected = PatchBatchSampler(
            ids, 2, seed=1, steps="balanced", patch_costs={3: 2, 1: 9.5, 7: 0.3}
        )
        result = PatchBatchSampler(joined, 2, seed=1, device="numpy", steps="balanced")
        assert epoch_of(result, 1) == epoch_of(expected, 1)

    def test_random_split_of_the_groundwater_data(self, data):
        from gpusampler import GWPatchDataset
        from gpusampler.demo.embedded import small_data

        dataset = GWPatchDataset(small_data(), 6, 1)
        for part in data.random_split(dataset, [0.5, 0.5]):
            ids = dataset.get_all_patch_ids()[np.array(part.indices)]
            expected = quiet(ids, 4, seed=1, **BALANCED, patch_costs=dataset.patch_costs())
            assert epoch_of(from_dataset(part), 1) == epoch_of(expected, 1)

    def test_parts_without_costs_cost_the_same(self, data):
        whole = data.ConcatDataset([Known(IDS), data.Subset(Known(IDS), [0, 1])])
        assert dataset_patch_costs(whole) is None
        ids = [*IDS, IDS[0], IDS[1]]
        expected = PatchBatchSampler(ids, 4, seed=1, **BALANCED)
        assert epoch_of(from_dataset(whole), 1) == epoch_of(expected, 1)

    @pytest.mark.parametrize(
        ("others", "error", "match"),
        [
            (None, ValueError, "in every part of a ConcatDataset or in none, got none in part 1"),
            ([1.0] * 4, TypeError, "a mapping .* in a part of .*, got list in part 1"),
            (
                {**COSTS, 9: 1.5},
                ValueError,
                "the same in every part of a ConcatDataset, got 1.4 and 1.5 for patch 9",
            ),
        ],
    )
    def test_parts_that_do_not_agree(self, data, others, error, match):
        whole = data.ConcatDataset([Known(IDS, COSTS), Known(IDS, others)])
        with pytest.raises(error, match=rf"patch_costs\(\) must be .*{match}"):
            from_dataset(whole)
        # Another kind of steps has no use for them.
        PatchBatchSampler(whole, 4, seed=1, device="numpy", steps="same_patch")
        from_dataset(whole, patch_costs=COSTS)

    def test_a_subset_cannot_tell_whose_costs_a_list_has(self, data):
        subset = data.Subset(Known(IDS, by_id(COSTS)), [0, 1, 2])
        match = r"patch_costs\(\) must be a mapping .* for a Subset, which may hold .*, got list"
        with pytest.raises(TypeError, match=match):
            from_dataset(subset)

    def test_a_part_whose_subset_lacks_costs(self, data):
        whole = data.ConcatDataset([Known(IDS, COSTS), data.Subset(Known(IDS), [0])])
        with pytest.raises(ValueError, match="got none in part 1"):
            from_dataset(whole)
