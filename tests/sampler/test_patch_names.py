"""Patches with names: what the user calls them is what comes back, everywhere."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups, PatchTensorLoader
from support.strategies import expected_by_patch

NAMES = ["sand", "clay", "sand", "silt", "clay", "sand", "sand"]
SORTED = ["clay", "sand", "silt"]
PLACES = np.array([SORTED.index(name) for name in NAMES])


def sampler_of(source=NAMES, **settings) -> PatchBatchSampler:
    return PatchBatchSampler(source, 2, seed=3, **settings)


def test_batches_and_coverage_say_the_names(library):
    sampler = sampler_of(device=library.device)
    for batch in sampler.batches():
        assert type(batch.patch_id) is str
        assert {NAMES[i] for i in library.host(batch.indices)} == {batch.patch_id}
    coverage = sampler.coverage()
    assert coverage.patch_ids.tolist() == SORTED
    assert [row["patch_id"] for row in coverage] == SORTED
    assert [row["counts"] for row in coverage] == [2, 4, 1]
    assert coverage == sampler_of().coverage()
    assert coverage != sampler_of(PLACES).coverage()


def test_the_batches_are_those_of_the_places_among_the_sorted_names():
    named, plain = sampler_of(), sampler_of(PLACES)
    assert list(named) == list(plain)
    assert {type(batch.patch_id) for batch in plain.batches()} == {int}


@pytest.mark.parametrize("form", [list, tuple, np.array, lambda names: np.array(names, object)])
def test_names_in_any_form_have_one_fingerprint(form):
    assert sampler_of(form(NAMES)).state_dict() == sampler_of().state_dict()


@pytest.mark.parametrize(
    "other", [PLACES, [name.upper() for name in NAMES], ["sand" + n for n in NAMES]]
)
def test_a_state_of_other_names_is_refused(other):
    state = json.loads(json.dumps(sampler_of().state_dict()))
    sampler_of(list(NAMES)).load_state_dict(state)
    with pytest.raises(ValueError, match="ids"):
        sampler_of(other).load_state_dict(state)


def test_names_that_run_into_one_another_differ():
    ab_c = PatchGroups.from_counts([1, 1], ["ab", "c"])
    a_bc = PatchGroups.from_counts([1, 1], ["a", "bc"])
    assert ab_c.fingerprint != a_bc.fingerprint


def test_tensor_batches_say_the_names():
    loader = PatchTensorLoader(sampler_of(), x=np.arange(7))
    for batch in loader:
        assert {NAMES[i] for i in batch["x"]} == {batch["patch_id"]}


def test_samples_by_name():
    groups = PatchGroups.from_ids(NAMES)
    expected = expected_by_patch(PLACES)
    for place, name in enumerate(SORTED):
        assert groups.samples_of(name).tolist() == expected[place]
    with pytest.raises(KeyError, match=r"one of the 3 patches, got 'loam'"):
        groups.samples_of("loam")
    with pytest.raises(KeyError, match=r"one of the 3 patches, got 'zinc'"):
        groups.samples_of("zinc")
    with pytest.raises(TypeError, match="patch_id must be a str, got 1"):
        groups.samples_of(1)
    with pytest.raises(TypeError, match="patch_id must be an int, got 'sand'"):
        PatchGroups.from_ids(PLACES).samples_of("sand")


def test_parts_keep_the_names():
    groups = PatchGroups.from_ids(NAMES)
    chosen = groups.select([0, 3, 5])
    assert chosen.labels.tolist() == ["sand", "silt"]
    assert chosen.samples_of("sand").tolist() == [0, 5]
    with pytest.raises(KeyError, match="got 'clay'"):
        chosen.samples_of("clay")
    by_patch = groups.split([0.5, 0.5], by="patch", seed=1)
    assert sorted(name for part in by_patch for name in part.labels) == SORTED
    for part in groups.split([0.5, 0.5], by="sample", seed=1):
        assert set(part.labels.tolist()) <= set(SORTED)


def test_counts_by_name():
    groups = PatchGroups.from_counts([2, 3, 1], ["b", "a", "c"])
    assert groups.labels.tolist() == ["a", "b", "c"]
    assert groups.samples_of("b").tolist() == [0, 1]
    assert groups.samples_of("a").tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="patch_ids must be distinct, got 'a' twice"):
        PatchGroups.from_counts([2, 3], ["a", "a"])
    with pytest.raises(ValueError, match=r"as long as counts \(2\), got 3"):
        PatchGroups.from_counts([2, 3], ["a", "b", "c"])
    with pytest.raises(
        ValueError, match=r"fewer than 2\*\*31 samples, got 2147483648 in patch 'b'"
    ):
        PatchGroups.from_counts([1, 1 << 31], ["a", "b"])


def test_costs_by_name():
    costs = {"clay": 1.0, "sand": 5.0, "silt": 2.0}
    by_name = sampler_of(steps="balanced", patch_costs=costs)
    by_call = sampler_of(steps="balanced", patch_costs=costs.__getitem__)
    by_place = sampler_of(PLACES, steps="balanced", patch_costs=[1.0, 5.0, 2.0])
    assert list(by_name) == list(by_call) == list(by_place)
    with pytest.raises(ValueError, match="got none for silt"):
        sampler_of(steps="balanced", patch_costs={"clay": 1.0, "sand": 5.0})
    with pytest.raises(ValueError, match=r"got -1\.0 for patch sand"):
        sampler_of(steps="balanced", patch_costs={**costs, "sand": -1.0})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_names_travel(copied):
    sampler = copied(sampler_of())
    assert [b.patch_id for b in sampler.batches(0)] == [b.patch_id for b in sampler_of().batches(0)]


def test_names_are_saved(tmp_path):
    groups = PatchGroups.from_ids(["ä", "z", "ä", "日本", "z", "ä"])
    groups.save(tmp_path / "named.index")
    loaded = PatchGroups.load(tmp_path / "named.index", source=["ä", "z", "ä", "日本", "z", "ä"])
    assert loaded.names == groups.names == ("z", "ä", "日本")
    assert loaded.fingerprint == groups.fingerprint
    with pytest.raises(ValueError, match="the patch names differ"):
        PatchGroups.load(tmp_path / "named.index", source=["ö", "z", "ö", "日本", "z", "ö"])


def test_a_dataset_may_name_its_patches():
    data = pytest.importorskip("torch.utils.data")
    samples = [{"patch_id": name} for name in NAMES]
    assert list(sampler_of(samples)) == list(sampler_of())
    both = data.ConcatDataset([data.Subset(samples, [0, 1]), data.Subset(samples, range(2, 7))])
    assert list(sampler_of(both)) == list(sampler_of())


def test_the_plan_knows_groups_by_place():
    plan = EpochPlan(PatchGroups.from_ids(NAMES), 2, seed=0)
    assert plan.labels.tolist() == SORTED
    assert plan.groups.patch_ids.tolist() == [0, 1, 2]
