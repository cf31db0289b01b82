"""Mappings from patch ids: their keys, in every form and on parts of a dataset."""

from __future__ import annotations

import enum
import pickle

import numpy as np
import pytest

from gpusampler import CostBudget, PatchBatchSampler, PatchGroups

FORMS = {"dict": dict, "Series": lambda numbers: pytest.importorskip("pandas").Series(numbers)}
ARGUMENTS = {
    "batch_size": lambda source, numbers: PatchBatchSampler(source, numbers, seed=0),
    "weights": lambda source, numbers: PatchBatchSampler(source, 1, seed=0, weights=numbers),
}
PATCHES = {
    "integers": ([7, 7, 2, 2, 9], {2: 1, 7: 2, 9: 1}, 8),
    "strings": (["b", "b", "a", "a", "c"], {"a": 1, "b": 2, "c": 1}, "z"),
    "tuples": ([(1, 2)] * 2 + [(1, 1)] * 2 + [(2, 1)], {(1, 1): 1, (1, 2): 2, (2, 1): 1}, (8, 8)),
}


@pytest.fixture(params=PATCHES)
def patches(request):
    """Ids, a number for each patch, and a key that is no patch."""
    return PATCHES[request.param]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_numbers_by_patch_may_be_a_series(patches, argument, form):
    ids, numbers, _ = patches
    sampler = ARGUMENTS[argument](ids, FORMS[form](numbers))
    assert list(sampler) == list(ARGUMENTS[argument](ids, dict(reversed(numbers.items()))))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_key_that_is_no_patch_is_named(patches, argument, form):
    ids, numbers, unknown = patches
    with pytest.raises(ValueError) as caught:
        ARGUMENTS[argument](ids, FORMS[form]({**numbers, unknown: 1}))
    assert f"{argument} must have only patch ids of the dataset as keys, got {unknown}: " in str(
        caught.value
    )
    assert f"for key, value in {argument}.items() if key in" in str(caught.value)


class Declared:
    """A dataset whose samples must not be read."""

    def __init__(self, ids):
        self.patch_ids = ids

    def __len__(self):
        return len(self.patch_ids)

    def __getitem__(self, i):
        raise AssertionError(f"sample {i} was read")


def subset(dataset, indices):
    return pytest.importorskip("torch.utils.data").Subset(dataset, indices)


def concatenated(*datasets):
    return pytest.importorskip("torch.utils.data").ConcatDataset(datasets)


def keep(ids):
    return PatchGroups.from_ids(ids).select([2, 3])


PARTS = {
    "select": keep,
    "select twice": lambda ids: PatchGroups.from_ids(ids).select([1, 2, 3]).select([2]),
    "split": lambda ids: PatchGroups.from_ids(ids).split([0.5, 0.5], seed=1)[0],
    "pickled": lambda ids: pickle.loads(pickle.dumps(keep(ids))),
    "from_counts": lambda ids: PatchGroups.from_counts({ids[1]: 2, ids[2]: 2, ids[4]: 0}),
    "Subset": lambda ids: subset(Declared(ids), [2, 3]),
    "Subset of Subset": lambda ids: subset(subset(Declared(ids), [1, 2, 3]), [1, 2]),
    "parts of Subsets": lambda ids: concatenated(subset(Declared(ids), [2]), Declared(ids[3:4])),
    "Subset of parts": lambda ids: subset(concatenated(Declared(ids), Declared(ids)), [2, 3]),
    "groups of a Subset": lambda ids: PatchGroups.from_ids(subset(Declared(ids), [2, 3])),
    "select of a Subset": lambda ids: PatchGroups.from_ids(subset(Declared(ids), [1, 2, 3])).select(
        [1]
    ),
}
"""Ways to keep only some patches of ids."""


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_part_takes_the_numbers_of_the_whole(patches, argument, part):
    ids, numbers, unknown = patches
    source = PARTS[part](ids)
    assert ARGUMENTS[argument](source, numbers).plan.groups.num_patches < 3
    with pytest.raises(ValueError, match="must have only patch ids of the dataset as keys"):
        ARGUMENTS[argument](source, {**numbers, unknown: 1})


def test_costs_may_be_those_of_other_datasets():
    budget = CostBudget(4, {2: 1.0, 7: 2.0, 9: 1.0, 8: 5.0})
    assert len(PatchBatchSampler([7, 7, 2, 2, 9], budget, seed=0)) == 3


@pytest.mark.parametrize("values", [("a", "b"), ("alpha", "beta")])
def test_members_of_a_str_enum_are_their_values(values):
    pd = pytest.importorskip("pandas")

    class K(str, enum.Enum):
        A, B = values

    members = [K.A, K.B, K.A]
    weights = {K.A: 1, K.B: 2}
    sources = [members, tuple(members), np.array(members, object), pd.Series(members)]
    sources += [pd.Categorical(members), [{"patch_id": member} for member in members]]
    for source in sources:
        sampler = PatchBatchSampler(source, 1, seed=0, weights=weights)
        assert sampler.plan.groups.labels.tolist() == sorted(values)
    named = PatchGroups.from_counts({K.A: 2, K.B: 1})
    assert named.labels.tolist() == sorted(values)
    # NumPy stores str(member), cut to the length of the longest value.
    for settings in ({"weights": weights}, {"batch_size": weights}):
        with pytest.raises(ValueError, match=r"key <K.A: .*\[key\.value for key in ids\]"):
            PatchBatchSampler(np.array(members), **{"batch_size": 1, **settings})
