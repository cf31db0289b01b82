"""Golden vectors of permutation version 1: any change here changes every user's batches.

The files were written by `make_golden` from `oracle`, which computes in Python integers and
shares nothing with the package.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product
from operator import itemgetter
from typing import Any

import numpy as np
import pytest

from gpusampler import CostBudget, EpochPlan, PatchGroups
from gpusampler.permutation import host
from gpusampler.permutation.reference import VERSION, derive_key, grids_of, permute
from support import make_golden, oracle
from support.optional_torch import every_namespace, torch
from support.strategies import expected_by_patch, ragged_of, rows_of

GOLDEN = json.loads(make_golden.PATH.read_text())
STEPS = json.loads(make_golden.STEPS_PATH.read_text())
MIXING = json.loads(make_golden.MIXING_PATH.read_text())
SHORT = json.loads(make_golden.SHORT_PATH.read_text())


def named(vector: dict[str, Any]) -> str:
    return f"{vector['n']}-{vector['key'][0]:x}-{vector['key'][1]:x}"


def positions(vector: dict[str, Any]) -> list[int]:
    return vector["x"] if "x" in vector else list(range(vector["n"]))


def grouped(items: Iterable[Any], name_of: Callable[[Any], Any]) -> dict[str, list[Any]]:
    """The items by name: thousands of tests would take longer than what they test."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(str(name_of(item)), []).append(item)
    return groups


PERMUTATIONS = GOLDEN["whole"] + GOLDEN["sampled"]
BY_SIZE = grouped(PERMUTATIONS, itemgetter("n"))
every_permutation = pytest.mark.parametrize("vectors", BY_SIZE.values(), ids=BY_SIZE)


def test_version():
    versions = {golden["version"] for golden in (GOLDEN, STEPS, MIXING, SHORT)}
    assert versions == {VERSION} == {make_golden.VERSION}


def test_files_are_what_the_oracle_says():
    assert json.loads(json.dumps(make_golden.build())) == GOLDEN
    assert json.loads(json.dumps(make_golden.build_steps())) == STEPS
    assert json.loads(json.dumps(make_golden.build_mixing())) == MIXING
    assert json.loads(json.dumps(make_golden.build_short_batches())) == SHORT


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


def test_file_of_steps_covers_the_edges():
    result = [
        (oracle.Settings(**epoch["settings"]), len(epoch["batches"])) for epoch in STEPS["epochs"]
    ]
    for kind, uneven, interleave in [
        ("balanced", "pad", True),
        ("same_patch", "pad", True),
        ("same_patch", "pad", False),
        ("same_patch", "drop", True),
        ("same_patch", "drop", False),
    ]:
        matching = [
            s for s, _ in result if (s.steps, s.uneven, s.interleave) == (kind, uneven, interleave)
        ]
        assert {s.partial for s in matching} == {"keep", "drop", "pad"}
        assert {s.step_width for s in matching} >= (
            {1, 2, 3} if uneven == "drop" else {1, 2, 3, 4, 5}
        )
        assert {s.shuffle_patches for s in matching} == {True, False}
        assert {s.shuffle_within_batches for s in matching} == {True, False}
    shuffled = {
        (min(total // s.step_width, 2), total % s.step_width > 0)
        for s, total in result
        if s.steps == "balanced" and s.shuffle_patches and s.step_width > 1
    }
    # No full step, one, or several; with a short one, or none.
    assert shuffled >= {(0, True), (1, True), (2, False), (2, True)}
    assert any(total // s.step_width > 32 and total % s.step_width for s, total in result)
    costs = [cost for s, _ in result for cost in s.patch_costs or ()]
    assert max(costs) > 1e150
    assert min(costs) < 1e-299
    assert any(cost % 1 and cost > 1 for cost in costs)


def test_file_of_short_batches_covers_the_edges():
    result = [oracle.Settings(**epoch["settings"]) for epoch in SHORT["epochs"]]
    partials = {(s.partial, s.min_partial) for s in result}
    assert partials >= {*product(["keep", "even"], [1, 2, 3]), ("pad", 1), ("drop", 1)}
    kinds = Counter((s.costliest_first, s.steps, s.weights is None) for s in result)
    assert len(kinds) == 2 + 2 * 2 + 1
    assert min(kinds.values()) >= 10
    assert {s.step_width for s in result if s.costliest_first} == {1, 2, 3, 5, 8}
    few = [s.epoch_batches for s in result if s.weights is None and s.epoch_batches]
    assert len(few) >= 20
    assert any(0 in s.weights for s in result if s.weights)


def test_file_of_mixing_covers_the_edges():
    epochs = MIXING["epochs"]
    result = [oracle.Settings(**epoch["settings"]) for epoch in epochs]
    kinds = Counter((s.steps, s.uneven, s.interleave) for s in result if s.mixed)
    assert len(kinds) == 2 + 1 + 4
    assert all(kinds[kind] >= 8 for kind in kinds)
    assert len({(s.partial, s.steps, s.uneven, s.interleave) for s in result}) == 3 * len(kinds)
    assert {epoch["epoch"] for epoch in epochs} == {0, 1, 5, 2**32, 2**63 - 1}
    assert {s.step_width for s in result if s.steps == "same_patch"} == {1, 2, 3, 4, 5}
    for flag in ("shuffle_patches", "shuffle_within_batches"):
        assert {getattr(s, flag) for s in result} == {True, False}
    # One size or a list; with weights, with a length, with both; with neither, a list only.
    weights_by_kind = {
        (isinstance(s.batch_size, list), s.weights is None, s.epoch_batches is None) for s in result
    }
    assert weights_by_kind == {*product((True, False), repeat=3)} - {(False, True, True)}
    assert any(s.mixed and isinstance(s.batch_size, list) and 0 in s.batch_size for s in result)
    # Patches that are gone through several times, once, in part; passes that wrap around.
    passes = Counter()
    for epoch, settings in zip(epochs, result, strict=True):
        if settings.mixed:
            sizes = list(map(len, expected_by_patch(epoch["ids"]).values()))
            batches_per_pass = list(map(len, oracle.own_batches(sizes, settings)))
            slots = oracle.slots_of(batches_per_pass, settings)
            for nb, m in zip(batches_per_pass, slots, strict=True):
                if nb:
                    passes[(m > nb) - (m < nb), m % nb > 0] += 1
                    passes["wrapped"] += (epoch["epoch"] + 1) * m // nb > 2**64
    assert set(passes) == {(1, True), (1, False), (0, False), (-1, True), "wrapped"}
    assert min(passes.values()) >= 10


@every_namespace
def test_keys(xp):
    for row in GOLDEN["keys"]:
        seed, purpose, pass_, group, k0, k1 = row
        assert derive_key(seed, purpose, pass_, group) == (k0, k1), row
        as_arrays = derive_key(seed, purpose, xp.asarray([pass_]), xp.asarray([group]))
        assert [int(word[0]) for word in as_arrays] == [k0, k1], row


@every_permutation
@every_namespace
def test_reference(xp, vectors):
    for vector in vectors:
        n = vector["n"]
        x = xp.asarray(positions(vector))
        lanes_of = [xp.full_like(x, value) for value in (n, *vector["key"])]
        images = permute(xp, x, lanes_of[0], tuple(lanes_of[1:]), grids_of(xp, lanes_of[0]), n, n)
        assert images.dtype == xp.int64
        assert images.tolist() == vector["images"], named(vector)


@every_permutation
def test_lanes_one(host_form, vectors):
    for vector in vectors:
        x = np.array(positions(vector))
        images = host.permute_one(x, vector["n"], tuple(vector["key"]))
        assert images.tolist() == vector["images"], named(vector)


@pytest.mark.parametrize("vectors", [GOLDEN["whole"], GOLDEN["sampled"]], ids=["whole", "sampled"])
def test_lanes_runs(host_form, vectors):
    vectors = [vector for vector in vectors if vector["n"] < 2**31]
    # Every position is a run of its own, all sizes and keys in one call.
    expected = [
        (x, vector["n"], *vector["key"], image)
        for vector in vectors
        for x, image in zip(positions(vector), vector["images"], strict=True)
    ]
    x, n, k0, k1, images = np.array(expected, np.int64).T
    samples = host.permute_ranges(x, np.ones_like(x), n, (k0, k1), np.zeros_like(x), None)
    assert samples.tolist() == images.tolist()


def named_epoch(epoch: dict[str, Any]) -> str:
    settings = epoch["settings"]
    off = [name for name in settings if settings[name] is False]
    later = ("steps", "step_width", "uneven", "weights", "epoch_batches")
    steps = [str(settings[name]) for name in later if name in settings]
    return "-".join(
        [f"{len(epoch['ids'])}", settings["partial"], f"{settings['batch_size']}", *off, *steps]
    )


def kind_of(epoch: dict[str, Any]) -> str:
    settings = epoch["settings"]
    return f"{settings['partial']}-{settings.get('steps', 'free')}-{len(epoch['ids'])}"


LATER = grouped([*STEPS["epochs"], *MIXING["epochs"], *SHORT["epochs"]], kind_of)
EPOCHS = {**LATER, **grouped(GOLDEN["epochs"], lambda epoch: f"first-{kind_of(epoch)}")}


def plan_of(epoch: dict[str, Any], ids: Any) -> EpochPlan:
    settings = dict(epoch["settings"])
    groups = PatchGroups.from_ids(ids)
    batch_size = sizes_given(settings.pop("batch_size"), groups.patch_ids.tolist())
    if settings.get("steps") == "balanced" or settings.get("costliest_first"):
        # Those of a budget are for its sizes only.
        settings.setdefault("patch_costs", [1] * groups.num_patches)
    return EpochPlan(groups, batch_size, epoch["seed"], **settings)


def sizes_given(sizes: Any, patch_ids: list[int]) -> Any:
    """Return batch sizes as a user says them; one of 0 is over some budget."""
    if isinstance(sizes, int):
        return sizes
    if 0 not in sizes:
        return dict(zip(patch_ids, sizes, strict=True))
    costs = [1 / size if size else 2 for size in sizes]
    return CostBudget(1, costs, over_budget="skip")


def handed_out(block: Any, plan: EpochPlan) -> list[Any]:
    out = []
    for row, length, group in zip(
        block.indices.tolist(), block.lengths.tolist(), block.groups.tolist(), strict=True
    ):
        width = plan.sizes_by_patch[group] if plan.partial == "pad" else length
        out.append([int(plan.groups.patch_ids[group]), row[:width]])
    return out


@pytest.mark.parametrize("epochs", EPOCHS.values(), ids=EPOCHS)
@every_namespace
def test_epochs(host_form, xp, epochs):
    for epoch in epochs:
        check_epoch(xp, epoch)


def check_epoch(xp: Any, epoch: dict[str, Any]) -> None:
    plan = plan_of(epoch, xp.asarray(epoch["ids"], dtype=xp.int64))
    assert plan.num_batches == len(epoch["batches"]), named_epoch(epoch)
    slots = xp.arange(plan.num_batches)

    block = plan.evaluate(epoch["epoch"], slots)
    assert handed_out(block, plan) == epoch["batches"], named_epoch(epoch)

    reference = plan.evaluator.block_by_arrays(epoch["epoch"], slots)
    assert handed_out(reference, plan) == epoch["batches"], named_epoch(epoch)

    ragged = ragged_of(plan, epoch["epoch"], np.arange(plan.num_batches))
    assert [
        [int(plan.groups.patch_ids[group]), samples]
        for group, samples in zip(ragged.groups, rows_of(ragged), strict=True)
    ] == epoch["batches"], named_epoch(epoch)


@pytest.mark.filterwarnings("ignore:every row of a cursor has")
@pytest.mark.parametrize("epochs", LATER.values(), ids=LATER)
def test_epochs_a_batch_at_a_time(epochs):
    for epoch in epochs:
        check_batches(epoch)


def check_batches(epoch: dict[str, Any]) -> None:
    plan = plan_of(epoch, torch.tensor(epoch["ids"]))
    batches, number = epoch["batches"], torch.tensor(epoch["epoch"])
    patch_ids = plan.groups.patch_ids.tolist()
    for slot in {0, len(batches) // 2, len(batches) - 1}:
        _, samples = batches[slot]
        batch = plan.batch(number, torch.tensor(slot))
        assert batch[: len(samples)].tolist() == samples, named_epoch(epoch)

    from gpusampler.sampler.cursor import BatchCursor

    cursor = BatchCursor(plan, epoch=epoch["epoch"])
    first, last = range(min(2, len(batches))), range(max(len(batches) - 2, 0), len(batches))
    for slots in (first, last):
        cursor.seek(epoch["epoch"], slots[0])
        for slot in slots:
            assert cursor.position() == (epoch["epoch"], slot), named_epoch(epoch)
            result = cursor()
            patch, samples = batches[slot]
            assert result.indices[: len(samples)].tolist() == samples, named_epoch(epoch)
            assert patch_ids[int(result.group)] == patch, named_epoch(epoch)
