"""``python -m docs.figures.sizing``: what batches use of a budget, and the simulation's patches."""

from __future__ import annotations

import numpy as np
import pytest

from docs.figures import sizing
from gpusampler import CostBudget
from support.strategies import quiet

WANTED = 0.85


def test_used_is_what_batches_hold():
    costs, fixed, samples = np.array([3.0, 10.0, 4.5]), 4, 37
    patch_of = np.repeat(range(3), samples)
    found = sizing.used(costs, samples, fixed)
    for size, fill, batches in (
        (fixed, "fill_fixed", "batches_fixed"),
        (CostBudget(40, cost=costs), "fill", "batches"),
    ):
        held = [costs[patch_of[batch]].sum() for batch in quiet(patch_of, size, seed=5)]
        assert found[batches] == len(held)
        assert found[fill] == pytest.approx(np.mean(held) / 40)
    assert found["budget"] == 40
    assert found["gain"] == pytest.approx(found["fill"] / found["fill_fixed"])
    assert found["possible"] == pytest.approx(10 / (17.5 / 3))
    assert found["ratio"] == pytest.approx(found["gain"] / found["possible"])


def test_where_sizes_come_out_even_all_of_the_gain_is_had():
    found = sizing.used(np.array([1.0, 2.0, 4.0]), 64, 4)
    assert found["fill"] == 1
    assert found["gain"] == found["possible"] == pytest.approx(12 / 7)
    assert found["ratio"] == pytest.approx(1)


def test_where_patches_fill_no_batch_the_gain_is_small():
    found = sizing.used(np.array([1.0, 1.0, 100.0]), 10, 10)
    assert found["batches"] == 3
    assert found["fill"] < 0.5
    assert found["ratio"] < WANTED


@pytest.mark.parametrize(("preset", "least", "most"), [("small", 46, 454), ("medium", 234, 1347)])
def test_groundwater_patches_have_most_of_the_gain(preset, least, most):
    pytest.importorskip("gstools")
    points = sizing.patch_points(preset)
    assert (min(points["core"]), max(points["core"])) == (least, most)
    for of_patches in points.values():
        found = sizing.used(np.array(of_patches, float), sizing.samples_of(365), 8)
        assert WANTED <= found["ratio"] <= 1
        assert found["fill"] >= WANTED


def test_the_small_preset_is_the_committed_data():
    pytest.importorskip("gstools")
    from gpusampler import GWPatchDataset
    from gpusampler.demo.embedded import small_data

    dataset = GWPatchDataset(small_data(), 6, 1, stride=1)
    assert sizing.patch_points("small")["core and ghost"] == [*dataset.patch_costs().values()]
    assert sizing.samples_of(60) * 9 == len(dataset)
