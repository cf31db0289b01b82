"""EpochPlan: the laws that make a batch a pure function of (seed, epoch, slot)."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import EpochPlan, PatchGroups
from gpusampler.permutation.numpy_impl import TILE
from support.strategies import (
    epochs,
    expected_by_patch,
    patchy_ids,
    plan_settings,
    ragged_of,
    rows_of,
    seeds,
    times_seen,
)


def plan_of(library, ids, seed, **settings) -> EpochPlan:
    return EpochPlan(PatchGroups.from_ids(library.array(ids)), seed=seed, **settings)


def whole_epoch(library, plan, epoch, reference=False):
    """All batches of an epoch as NumPy (indices, lengths, groups), checked for type and place."""
    slots = np.arange(plan.num_batches)
    if reference:
        block = plan.evaluator.block_by_arrays(epoch, library.array(slots))
    else:
        block = plan.evaluate(epoch, slots)
    blocks = [library.host(part) for part in block]
    assert all(part.dtype == np.int64 for part in blocks)
    assert blocks[0].shape == (plan.num_batches, plan.max_batch_size)
    assert blocks[1].shape == blocks[2].shape == (plan.num_batches,)
    return blocks


def counted(indices, lengths) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(indices, lengths, strict=True)]


@given(data=st.data(), seed=seeds, epoch=epochs)
@pytest.mark.parametrize("reference", [False, True], ids=["evaluate", "reference"])
def test_a_batch_holds_one_patch_and_an_epoch_every_sample(library, reference, data, seed, epoch):
    ids = data.draw(patchy_ids())
    settings = data.draw(plan_settings(ids))
    plan = plan_of(library, ids, seed, **settings)
    indices, lengths, groups = whole_epoch(library, plan, epoch, reference)
    size, partial = settings["batch_size"], settings["partial"]
    patches = expected_by_patch(ids)
    sizes = np.array(list(map(len, patches.values())))
    patch_ids = np.array(list(patches))
    # Rows beyond their length stay in the patch, so a gather of the whole block is safe.
    assert (ids[indices] == patch_ids[groups][:, None]).all()
    filled = np.full(sizes.size, size) if partial == "pad" else np.minimum(sizes, size)
    assert plan.max_batch_size == filled.max()
    batches_of = sizes // size if partial == "drop" else -(-sizes // size)
    assert plan.num_batches == batches_of.sum()
    np.testing.assert_array_equal(plan.batches_by_patch, batches_of)
    np.testing.assert_array_equal(np.bincount(groups, minlength=sizes.size), batches_of)
    for group, count in enumerate(sizes):
        short = [count % size] if count % size and partial != "drop" else []
        of_group = sorted(lengths[groups == group].tolist())
        assert of_group == sorted([size] * (count // size) + short)
    times_by_sample = times_seen(counted(indices, lengths), ids.size)
    assert times_by_sample.max() == 1
    kept = np.minimum(sizes, batches_of * size)
    group_of_sample = np.unique(ids, return_inverse=True)[1]
    np.testing.assert_array_equal(np.bincount(group_of_sample, times_by_sample), kept)
    if partial == "pad":
        # What fills a batch up is spread evenly over its patch.
        everything = times_seen(indices, ids.size)
        for samples, batches in zip(patches.values(), batches_of, strict=True):
            times = everything[samples]
            assert times.sum() == batches * size
            assert times.max() - times.min() <= 1


@given(data=st.data(), seed=seeds, epoch=epochs)
def test_any_slots_are_those_of_the_whole_epoch(library, data, seed, epoch):
    ids = data.draw(patchy_ids())
    plan = plan_of(library, ids, seed, **data.draw(plan_settings(ids, steps_of=1)))
    epoch_blocks = whole_epoch(library, plan, epoch)
    slot_list = data.draw(st.lists(st.integers(0, plan.num_batches - 1), max_size=30))
    slots = np.array(slot_list, np.int64)
    for form in (slot_list, slots, slots.astype(np.int32), library.array(slots)):
        for part, all_of_it in zip(plan.evaluate(epoch, form), epoch_blocks, strict=True):
            np.testing.assert_array_equal(library.host(part), all_of_it[slots])
    reference = plan.evaluator.block_by_arrays(epoch, library.array(slots))
    for part, all_of_it in zip(reference, epoch_blocks, strict=True):
        np.testing.assert_array_equal(library.host(part), all_of_it[slots])
    if slot_list:
        ragged = ragged_of(plan, epoch, slots)
        rows = rows_of(ragged)
        for k, slot in enumerate(slot_list):
            handed_out = plan.batch_size if plan.partial == "pad" else epoch_blocks[1][slot]
            assert ragged.sizes[k] == handed_out
            np.testing.assert_array_equal(rows[k], epoch_blocks[0][slot, :handed_out])
        np.testing.assert_array_equal(ragged.lengths, epoch_blocks[1][slots])
        np.testing.assert_array_equal(ragged.groups, epoch_blocks[2][slots])


@given(data=st.data(), seed=seeds, epoch=epochs)
def test_libraries_agree_integer_for_integer(library, data, seed, epoch):
    ids = data.draw(patchy_ids())
    settings = data.draw(plan_settings(ids, steps_of=1))
    on_host = EpochPlan(PatchGroups.from_ids(ids), seed=seed, **settings)
    expected = [np.asarray(part) for part in on_host.evaluate(epoch, range(on_host.num_batches))]
    same = plan_of(library, ids, seed, **settings)
    moved = EpochPlan(PatchGroups.from_ids(ids), seed=seed, device=library.device, **settings)
    for plan in (same, moved, pickle.loads(pickle.dumps(same)), same.with_seed(seed)):
        for reference in (False, True):
            result = whole_epoch(library, plan, epoch, reference)
            for part, expected_part in zip(result, expected, strict=True):
                np.testing.assert_array_equal(part, expected_part)


@given(data=st.data(), seed=seeds, epoch=epochs)
def test_the_order_of_batches_never_changes_what_is_in_them(data, seed, epoch):
    ids = data.draw(patchy_ids())
    settings = data.draw(plan_settings(ids))
    result = []
    for shuffle_patches in (False, True):
        for interleave in (False, True):
            settings.update(shuffle_patches=shuffle_patches, interleave=interleave)
            plan = EpochPlan(PatchGroups.from_ids(ids), seed=seed, **settings)
            block = plan.evaluate(epoch, range(plan.num_batches))
            result.append(Counter(map(tuple, block.indices.tolist())))
    assert result[0] == result[1] == result[2] == result[3]


SIZES = [50, 33, 32, 40, 20, 60]


def wide_plan(seed=0, **settings) -> EpochPlan:
    """A plan whose permutations are too many for two to be the same by chance."""
    return EpochPlan(
        PatchGroups.from_counts(SIZES), settings.pop("batch_size", 4), seed, **settings
    )


def batches(plan, epoch) -> tuple[tuple[int, ...], ...]:
    block = plan.evaluate(epoch, range(plan.num_batches))
    return tuple(map(tuple, block.indices.tolist()))


def orders_within(plan, epoch) -> list[tuple[int, ...]]:
    """Each patch's samples in the order in which its batches, in their own order, hold them."""
    plan = wide_plan(plan.seed, shuffle_patches=False)
    block = plan.evaluate(epoch, range(plan.num_batches))
    return [
        tuple(np.concatenate([row[:n] for row, n, g in zip(*block, strict=True) if g == group]))
        for group in range(len(SIZES))
    ]


@given(seed=seeds, epoch=epochs.filter(lambda e: e < 2**63 - 1))
def test_epochs_seeds_and_patches_have_nothing_in_common(seed, epoch):
    other_seed = (seed + 1) % 2**64
    streams = [(seed, epoch), (seed, epoch + 1), (other_seed, epoch), (other_seed, epoch + 1)]
    # seed + epoch as a key would make the second and the third the same.
    orders = [tuple(wide_plan(s).evaluate(e, range(60)).groups.tolist()) for s, e in streams]
    assert len(set(orders)) == 4
    for group in range(len(SIZES)):
        inside = {orders_within(wide_plan(s), e)[group] for s, e in streams}
        assert len(inside) == 4
    patch_orders = [
        tuple(
            EpochPlan(PatchGroups.from_counts([1] * 30), 1, s, interleave=False)
            .evaluate(e, range(30))
            .groups.tolist()
        )
        for s, e in streams
    ]
    assert len(set(patch_orders)) == 4


def test_patches_of_one_size_are_permuted_differently():
    plan = EpochPlan(PatchGroups.from_counts([40] * 200), 40, 3, shuffle_patches=False)
    rows = plan.evaluate(5, range(200)).indices - 40 * np.arange(200)[:, None]
    assert len(set(map(tuple, rows.tolist()))) == 200


def test_without_shuffling_batches_are_slices_in_order_of_patches():
    plan = wide_plan(9, shuffle_within_batches=False, shuffle_patches=False)
    expected = []
    start = 0
    for size in SIZES:
        expected += [range(start + k, min(start + k + 4, start + size)) for k in range(0, size, 4)]
        start += size
    block = plan.evaluate(7, range(plan.num_batches))
    assert counted(block.indices, block.lengths) == list(map(list, expected))


def test_shuffling_only_the_batches_keeps_their_members():
    plain = wide_plan(9, shuffle_within_batches=False, shuffle_patches=False)
    shuffled = wide_plan(9, shuffle_within_batches=False)
    assert batches(shuffled, 0) != batches(plain, 0)
    assert sorted(batches(shuffled, 0)) == sorted(batches(plain, 0))
    assert batches(shuffled, 0) != batches(shuffled, 1)


def test_shuffling_only_inside_keeps_the_order_of_patches():
    plan = wide_plan(9, shuffle_patches=False)
    for epoch in range(5):
        groups = plan.evaluate(epoch, range(plan.num_batches)).groups
        assert (np.diff(groups) >= 0).all()
    assert batches(plan, 0) != batches(plan, 1)


def runs_of(groups) -> int:
    return int((np.diff(groups) != 0).sum()) + 1


def test_interleave_mixes_patches_and_without_it_they_come_in_a_row():
    mixed, in_a_row = wide_plan(2), wide_plan(2, interleave=False)
    first_patches = set()
    for epoch in range(40):
        slots = range(mixed.num_batches)
        assert runs_of(mixed.evaluate(epoch, slots).groups) > 30
        groups = in_a_row.evaluate(epoch, slots).groups
        assert runs_of(groups) == len(SIZES)
        first_patches.add(int(groups[0]))
    assert first_patches == set(range(len(SIZES)))
    unshuffled = wide_plan(2, interleave=False, shuffle_patches=False)
    groups = unshuffled.evaluate(3, slots).groups
    assert groups.tolist() == sorted(groups.tolist())


@pytest.mark.parametrize("interleave", [False, True])
def test_patches_without_a_batch_are_never_met(library, interleave):
    sizes = [2, 9, 1, 1, 8, 40, 3]
    groups = PatchGroups.from_counts(sizes)
    plan = EpochPlan(groups, 5, 1, partial="drop", interleave=interleave, device=library.device)
    for reference in (False, True):
        for epoch in range(10):
            _, lengths, result = whole_epoch(library, plan, epoch, reference)
            assert np.bincount(result, minlength=7).tolist() == [0, 1, 0, 0, 1, 8, 0]
            assert (lengths == 5).all()


def test_asking_out_of_turn_changes_nothing():
    plan = wide_plan(4, interleave=False)
    first, second = batches(plan, 0), batches(plan, 1)
    assert batches(plan, 0) == first
    other = plan.with_seed(5)
    assert batches(other, 0) != first
    assert batches(plan, 1) == second
    assert batches(wide_plan(5, interleave=False), 0) == batches(other, 0)


@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
def test_batches_wider_than_a_tile(library, partial):
    sizes = [100_000, 40, 70_000, 1500]
    groups = PatchGroups.from_counts(sizes)
    assert TILE < 50_000
    plan = EpochPlan(groups, 50_000, 8, partial=partial, device=library.device)
    indices, lengths, result = whole_epoch(library, plan, 2)
    for part, reference in zip(
        (indices, lengths, result), whole_epoch(library, plan, 2, reference=True), strict=True
    ):
        np.testing.assert_array_equal(part, reference)
    valid = np.concatenate([row[:n] for row, n in zip(indices, lengths, strict=True)])
    assert np.unique(valid).size == valid.size
    assert valid.size == (150_000 if partial == "drop" else groups.num_samples)
    assert (np.searchsorted(groups.offsets, indices, side="right") - 1 == result[:, None]).all()


def test_batches_wider_than_a_tile_in_shuffled_ids(library):
    ids = np.random.default_rng(0).permutation(np.repeat([3, 1, 2], [90_000, 30, 2000]))
    plan = plan_of(library, ids, 8, batch_size=80_000, partial="pad")
    indices, _, groups = whole_epoch(library, plan, 0)
    assert (ids[indices] == np.array([1, 2, 3])[groups][:, None]).all()
    result = [np.unique(indices[groups == group]).size for group in range(3)]
    assert result == [30, 2000, 90_000]


def test_the_argument_checks():
    groups = PatchGroups.from_counts([3, 4])
    for settings, error, match in [
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"batch_size": -2}, ValueError, "batch_size must be >= 1, got -2"),
        ({"batch_size": 2**31}, ValueError, f"batch_size must be < {2**31}"),
        ({"batch_size": 2.0}, TypeError, r"batch_size must be an int, a mapping .*, got 2\.0"),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"seed": 2**64}, ValueError, f"seed must be < {2**64}, got {2**64}"),
        ({"seed": None}, TypeError, "seed must be an int, got None"),
        (
            {"partial": "kept"},
            ValueError,
            "partial must be one of 'keep', 'drop', 'pad', 'even', got 'kept'",
        ),
        ({"interleave": 1}, TypeError, "interleave must be a bool, got 1"),
        ({"shuffle_patches": None}, TypeError, "shuffle_patches must be a bool, got None"),
        ({"shuffle_within_batches": "no"}, TypeError, "shuffle_within_batches must be a bool"),
        # RuntimeError where torch, which would know the device, is not installed.
        (
            {"device": "quantum"},
            (ValueError, RuntimeError),
            "device must be .*, got 'quantum'",
        ),
        (
            {"batch_size": 5, "partial": "drop"},
            ValueError,
            "partial='drop' leaves no batches: batch_size=5",
        ),
    ]:
        with pytest.raises(error, match=match):
            EpochPlan(groups, **{"batch_size": 2, "seed": 0, **settings})
    with pytest.raises(TypeError, match="groups must be PatchGroups, got list"):
        EpochPlan([1, 2], 1, 0)


@pytest.mark.parametrize(
    ("epoch", "slots", "error", "match"),
    [
        (-1, [0], ValueError, "epoch must be >= 0, got -1"),
        (2**63, [0], ValueError, f"epoch must be < {2**63}"),
        (0.0, [0], TypeError, r"epoch must be an int, got 0\.0"),
        (0, [4], ValueError, r"slots must be in 0 \.\. 3, got 4"),
        (0, [0, -1], ValueError, r"slots must be in 0 \.\. 3, got -1"),
        (0, [0.0], TypeError, "slots must be integers, got dtype float64"),
        (0, [True], TypeError, "slots must be integers, got dtype bool"),
        (0, [[0]], ValueError, r"slots must be 1-D, got shape \(1, 1\)"),
        (0, 0, ValueError, r"slots must be 1-D, got shape \(\)"),
    ],
)
def test_bad_epochs_and_slots(library, epoch, slots, error, match):
    plan = EpochPlan(PatchGroups.from_counts([3, 4]), 2, 0, device=library.device)
    assert plan.num_batches == 4
    with pytest.raises(error, match=match):
        plan.evaluate(epoch, slots)


def test_epochs_and_seeds_up_to_their_ends(library):
    plan = EpochPlan(PatchGroups.from_counts(SIZES), 4, 2**64 - 1, device=library.device)
    last = whole_epoch(library, plan, 2**63 - 1)
    for part, expected in zip(
        whole_epoch(library, plan, 2**63 - 1, reference=True), last, strict=True
    ):
        np.testing.assert_array_equal(part, expected)
    assert not np.array_equal(last[0], whole_epoch(library, plan, 2**31 - 1)[0])
    assert not np.array_equal(
        last[0], whole_epoch(library, plan.with_seed(2**32 - 1), 2**63 - 1)[0]
    )
