"""Golden vectors of permutation version 1: any change here changes every user's batches.

The file was written by `make_golden` from `oracle`, a transcription of the design into Python
integers that shares nothing with the package.
"""

from __future__ import annotations

import json
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import make_golden
import numpy as np
import pytest

from gpusampler import EpochPlan, PatchGroups, lanes, runs
from gpusampler.permutation import VERSION, Grid, derive_key, grid_of, grids_of, permute

GOLDEN = json.loads(make_golden.PATH.read_text())
NAMESPACES = {"numpy": array_api_compat.numpy, "torch": array_api_compat.torch}

every_namespace = pytest.mark.parametrize("xp", NAMESPACES.values(), ids=NAMESPACES.keys())


def named(vector: dict[str, Any]) -> str:
    return f"{vector['n']}-{vector['key'][0]:x}-{vector['key'][1]:x}"


def positions(vector: dict[str, Any]) -> list[int]:
    return vector["x"] if "x" in vector else list(range(vector["n"]))


PERMUTATIONS = GOLDEN["whole"] + GOLDEN["sampled"]
every_permutation = pytest.mark.parametrize("vector", PERMUTATIONS, ids=named)


def test_version():
    assert GOLDEN["version"] == VERSION == make_golden.VERSION


def test_file_is_what_the_oracle_says():
    assert json.loads(json.dumps(make_golden.build())) == GOLDEN


def test_file_covers_the_edges():
    words = {word for vector in PERMUTATIONS for word in vector["key"]}
    assert {0, 2**31 - 1, 2**31, 2**32 - 1} <= words
    assert {row[0] for row in GOLDEN["keys"]} >= {0, 1, 2**31, 2**32, 2**63, 2**64 - 1}
    assert max(vector["n"] for vector in PERMUTATIONS) == 15 * 10**9
    settings = [epoch["settings"] for epoch in GOLDEN["epochs"]]
    assert {(s["partial"], s["interleave"]) for s in settings} == {
        (partial, interleave) for partial in ("keep", "drop", "pad") for interleave in (True, False)
    }
    for flag in ("shuffle_patches", "shuffle_within_batches"):
        assert {s["interleave"] for s in settings if not s[flag]} == {True, False}


@pytest.mark.parametrize("row", GOLDEN["keys"], ids=lambda row: "-".join(map(str, row[:4])))
@every_namespace
def test_keys(xp, row):
    seed, purpose, pass_, group, k0, k1 = row
    assert derive_key(seed, purpose, pass_, group) == (k0, k1)
    as_arrays = derive_key(seed, purpose, xp.asarray([pass_]), xp.asarray([group]))
    assert [int(word[0]) for word in as_arrays] == [k0, k1]


@every_permutation
@every_namespace
def test_reference(xp, vector):
    n = vector["n"]
    x = xp.asarray(positions(vector))
    lanes_of = [xp.full_like(x, value) for value in (n, *vector["key"])]
    images = permute(xp, x, lanes_of[0], tuple(lanes_of[1:]), grids_of(xp, lanes_of[0]), n, n)
    assert images.dtype == xp.int64
    assert images.tolist() == vector["images"]


@pytest.mark.parametrize("vector", [v for v in PERMUTATIONS if v["n"] <= lanes.WIDEST], ids=named)
def test_lanes_one(vector):
    n = vector["n"]
    x = np.array(positions(vector))
    images = lanes.permute_one(x, n, tuple(vector["key"]), grid_of(n))
    assert images.tolist() == vector["images"]


@pytest.mark.parametrize("vectors", [GOLDEN["whole"], GOLDEN["sampled"]], ids=["whole", "sampled"])
def test_lanes_runs(vectors):
    vectors = [vector for vector in vectors if vector["n"] < 2**31]
    # Every position is a run of its own, all sizes and keys in one call.
    wanted = [
        (x, vector["n"], *vector["key"], image)
        for vector in vectors
        for x, image in zip(positions(vector), vector["images"], strict=True)
    ]
    x, n, k0, k1, images = np.array(wanted, np.int64).T
    grid = Grid(*(np.array(side) for side in zip(*(grid_of(int(m)) for m in n), strict=True)))
    samples, starts = runs.permute_runs(
        x, np.ones_like(x), n, (k0, k1), grid, np.zeros_like(x), None
    )
    assert samples[starts].tolist() == images.tolist()


def named_epoch(epoch: dict[str, Any]) -> str:
    settings = epoch["settings"]
    off = [name for name in settings if settings[name] is False]
    return "-".join(
        [f"{len(epoch['ids'])}", settings["partial"], f"{settings['batch_size']}", *off]
    )


def handed_out(block: Any, groups: PatchGroups, epoch: dict[str, Any]) -> list[Any]:
    settings = epoch["settings"]
    out = []
    for row, length, group in zip(
        block.indices.tolist(), block.lengths.tolist(), block.groups.tolist(), strict=True
    ):
        width = settings["batch_size"] if settings["partial"] == "pad" else length
        out.append([int(groups.patch_ids[group]), row[:width]])
    return out


@pytest.mark.parametrize("epoch", GOLDEN["epochs"], ids=named_epoch)
@every_namespace
def test_epochs(xp, epoch):
    groups = PatchGroups.from_ids(xp.asarray(epoch["ids"], dtype=xp.int64))
    settings = dict(epoch["settings"])
    plan = EpochPlan(groups, settings.pop("batch_size"), epoch["seed"], **settings)
    assert plan.num_batches == len(epoch["batches"])
    slots = xp.arange(plan.num_batches)

    block = plan.evaluate(epoch["epoch"], slots)
    assert handed_out(block, groups, epoch) == epoch["batches"]

    reference = plan.evaluate_reference(epoch["epoch"], slots)
    assert handed_out(reference, groups, epoch) == epoch["batches"]

    ragged = plan.evaluate_ragged(epoch["epoch"], np.arange(plan.num_batches))
    assert [
        [int(groups.patch_ids[group]), ragged.samples[start : start + size].tolist()]
        for group, start, size in zip(ragged.groups, ragged.starts, ragged.sizes, strict=True)
    ] == epoch["batches"]
