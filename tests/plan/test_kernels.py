"""Both kernels against the array form, integer for integer, on a GPU or played on the host."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpusampler import CostBudget, EpochPlan, PatchGroups
from gpusampler.core.devices import HOST
from gpusampler.permutation.reference import (
    MASK,
    MIX_1,
    MIX_2,
    SPREAD,
    Streams,
    absorb_pair,
    grids_of,
    key_of,
)
from gpusampler.plan.evaluators.kernels import kernel_spec
from gpusampler.plan.evaluators.kernels.kernel_spec import (
    KernelSpec,
    cuda_geometry,
    triton_geometry,
)
from support import kernels, make_golden
from support.kernels import (
    TRITON,
    cuda_batches_on_host,
    evaluator_settings_of,
    every_kernel,
    host,
    kernel_of,
)
from support.strategies import epochs, seeds

GOLDEN = json.loads(make_golden.PATH.read_text())
STEPS = json.loads(make_golden.STEPS_PATH.read_text())
HIGH = 1 << 31


def expected_samples(plan: EpochPlan, epoch: int, locations: Any) -> np.ndarray:
    """The samples of located batches, end to end, from NumPy."""
    return plan.evaluator.ragged(epoch, locations).samples


def check_block(plan: EpochPlan, kernel: Any, epoch: int, slots: Any, dtype: str = "int64"):
    expected = plan.evaluate(epoch, slots)
    result = kernel.block(plan, epoch, slots, dtype)
    for actual, desired, name in zip(result, expected, expected._fields, strict=True):
        assert actual.dtype == (dtype if name == "indices" else "int64")
        np.testing.assert_array_equal(actual, desired, err_msg=name)


def check(plan: EpochPlan, kind: str, epoch: int, slots: Any, dtype: str = "int64") -> Any:
    """Block and ragged rows by a kernel are those of NumPy and of the reference."""
    slots = np.asarray(slots, np.int64)
    kernel = kernel_of(plan, kind)
    check_block(plan, kernel, epoch, slots, dtype)
    locations = plan.evaluator.locate(epoch, slots)
    np.testing.assert_array_equal(
        kernel.ragged(plan, epoch, locations),
        expected_samples(plan, epoch, locations),
        err_msg="ragged",
    )
    reference = plan.evaluator.block_by_arrays(epoch, slots)
    for actual, desired in zip(plan.evaluate(epoch, slots), reference, strict=True):
        np.testing.assert_array_equal(actual, desired)
    return kernel


def plan_of(counts: Any, batch_size: int, seed: int = 1, **settings: Any) -> EpochPlan:
    return EpochPlan(PatchGroups.from_counts(counts), batch_size, seed, **settings)


def form_of(plan: EpochPlan, **arguments: Any) -> KernelSpec:
    tables = plan._tables.on(HOST, plan.groups.order)
    return KernelSpec.of(tables, evaluator_settings_of(plan), **{"ragged": False, **arguments})


def split_counts(total: int, maximum: int = HIGH - 1) -> list[int]:
    """As few patches as hold so many samples."""
    return [maximum] * (total // maximum) + [total % maximum] * (total % maximum > 0)


class TestGolden:
    """Every pinned permutation, once as the order of batches and once inside a patch."""

    @staticmethod
    def vectors(of: str) -> list[Any]:
        sizes = dict.fromkeys(vector["n"] for vector in GOLDEN["whole"] + GOLDEN["sampled"])
        return [n for n in sizes if of == "slots" or n < HIGH]

    @staticmethod
    def at(n: int):
        for vector in GOLDEN["whole"] + GOLDEN["sampled"]:
            if vector["n"] == n:
                yield tuple(vector["key"]), vector.get("x", range(n)), vector["images"]

    @pytest.mark.parametrize("n", vectors("slots"))
    @every_kernel
    def test_of_slots(self, kind, n, monkeypatch):
        # Batches of one sample, in the order of the samples: the batch of a slot is its image.
        plan = plan_of(split_counts(n), 1, shuffle_within_batches=False)
        kernel = kernel_of(plan, kind)
        assert plan.num_batches == n
        for key, x, images in self.at(n):
            monkeypatch.setattr(kernel.evaluator, "_keys", lambda *_, key=key: (*key, 0, 0, 0, 0))
            indices, _, _ = kernel.block(plan, 0, x)
            assert indices[:, 0].tolist() == images

    @pytest.mark.parametrize("n", vectors("samples"))
    @every_kernel
    def test_of_samples(self, kind, n, monkeypatch):
        whole = n <= max(make_golden.WHOLE)
        plan = plan_of([n], n if whole else 1, shuffle_patches=False)
        kernel = kernel_of(plan, kind)
        for key, x, images in self.at(n):
            state = state_of_samples(key)
            keys = 0, 0, *state, 0, 0
            monkeypatch.setattr(kernel.evaluator, "_keys", lambda *_, keys=keys: keys)
            indices, _, _ = kernel.block(plan, 0, [0] if whole else x)
            assert indices.ravel().tolist() == images

    @pytest.mark.parametrize("ids", make_golden.PATCHES, ids=len)
    @every_kernel
    def test_epochs(self, kind, ids):
        result = [epoch for epoch in GOLDEN["epochs"] if epoch["ids"] == ids]
        assert result
        for epoch in result:
            self.check_epoch(kind, epoch)

    @pytest.mark.parametrize("ids", [ids for ids, _ in make_golden.STEP_PATCHES], ids=len)
    @every_kernel
    def test_epochs_in_steps(self, kind, ids):
        result = [epoch for epoch in STEPS["epochs"] if epoch["ids"] == ids]
        assert {epoch["settings"]["steps"] for epoch in result} == {"balanced", "same_patch"}
        for epoch in result:
            self.check_epoch(kind, epoch)

    @staticmethod
    def check_epoch(kind, epoch):
        arguments = dict(epoch["settings"])
        groups = PatchGroups.from_ids(np.array(epoch["ids"], np.int64))
        plan = EpochPlan(groups, arguments.pop("batch_size"), epoch["seed"], **arguments)
        kernel = kernel_of(plan, kind)
        slots = np.arange(plan.num_batches)
        assert slots.size == len(epoch["batches"])

        indices, _, patches = kernel.block(plan, epoch["epoch"], slots)
        rows = [
            [int(groups.patch_ids[patch]), row[: len(samples)]]
            for patch, row, (_, samples) in zip(
                patches, indices.tolist(), epoch["batches"], strict=True
            )
        ]
        assert rows == epoch["batches"]

        if not plan._tables.is_uniform:
            flat = kernel.ragged(plan, epoch["epoch"], plan.evaluator.locate(epoch["epoch"], slots))
            assert flat.tolist() == [i for _, samples in epoch["batches"] for i in samples]


def unmixed(h: int) -> int:
    """What `permutation.mix` made this of."""
    h ^= h >> 15 ^ h >> 30
    h = h * pow(MIX_2, -1, 1 << 32) & MASK
    h ^= h >> 15 ^ h >> 30
    h = h * pow(MIX_1, -1, 1 << 32) & MASK
    return h ^ h >> 16


def state_of_samples(key: tuple[int, int]) -> tuple[int, int]:
    """The state that gives the first patch this key."""
    s0, s1 = key
    for _ in range(2):
        s0, s1 = unmixed(s0), (unmixed(s1) - s0) & MASK
    assert absorb_pair((s0, s1), 0) == key
    return s0, s1


EDGES = [1, 2, 3, 31, 32, 33, 64, 127, 128, 1023, 1024, 65535, 65536, 70_001]
SIZES = [1, 2, 3, 7, 31, 32, 33, 64, 100, 300]


def groups_at_random(rng: np.random.Generator, gathered: bool, selected: bool) -> PatchGroups:
    """Patches on every side of the permutation's forms."""
    kinds = [EDGES[:5], EDGES, range(33, 1024), range(1, 41), range(1, 3001)]
    counts = rng.choice(kinds[rng.integers(len(kinds))], rng.integers(1, 7))
    groups = PatchGroups.from_counts(counts)
    if gathered:
        starts = rng.permutation(counts.size)
        groups = PatchGroups.from_ids(rng.permutation(np.repeat(starts, counts)))
    if selected:
        size = groups.source_size
        groups = groups.select(rng.permutation(size)[: rng.integers(1, size + 1)])
    return groups


def with_order_of(dtype: str, groups: PatchGroups) -> PatchGroups:
    if groups.order is None:
        return groups
    tables = groups.patch_ids, groups.counts, groups.starts, groups.order.astype(dtype)
    return PatchGroups(*tables, source_size=groups.source_size)


flags = st.booleans()
mostly = st.sampled_from([True, True, True, False])
word = st.sampled_from(["int32", "int64"])


@st.composite
def plans(
    draw: st.DrawFn, interleave: bool, steps: str, gathered: bool, mixed: bool
) -> tuple[EpochPlan, np.ndarray]:
    """A plan and some of its slots, in any order, repeated or not."""
    # Sizes and slots are not shrunk, but differ from example to example.
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = with_order_of(draw(word), groups_at_random(rng, gathered, draw(flags)))
    partial = draw(st.sampled_from(["keep", "drop", "pad"]))
    batch_size = int(rng.choice(SIZES))
    if partial == "drop":
        batch_size = min(batch_size, int(groups.counts.max()))
    mixing: dict[str, Any] = {}
    if mixed:
        # Many passes an epoch, and many epochs a pass.
        weights = rng.choice([1, 30, 1000], groups.num_patches)
        batches = int(rng.integers(groups.num_patches, 3000))
        mixing = {"weights": weights, "epoch_batches": batches}
    plan = EpochPlan(
        groups,
        batch_size,
        draw(seeds),
        **mixing,
        partial=partial,
        shuffle_within_batches=draw(mostly),
        shuffle_patches=draw(mostly),
        interleave=interleave,
        steps=steps,
        step_width=1 if steps == "free" else int(rng.integers(1, 5)),
    )
    return plan, rng.integers(0, plan.num_batches, rng.integers(1, 24))


KINDS_OF_PLANS = [
    (True, "free"),
    (False, "free"),
    (True, "same_patch"),
    (False, "same_patch"),
    (True, "balanced"),
]


# Without shrinking: the plans are small, and an interpreter takes minutes to shrink them.
few = settings(max_examples=3, phases=[Phase.explicit, Phase.generate])


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("interleave", "steps"), KINDS_OF_PLANS)
@every_kernel
@few
@given(st.data())
def test_any_batches_of_any_plan(kind, interleave, steps, mixed, data):
    check_any_batches(kind, interleave, steps, mixed, data)


@pytest.mark.slow("100 plans in Triton's interpreter")
@every_kernel
@settings(few, max_examples=100)
@given(st.data(), st.sampled_from(KINDS_OF_PLANS), flags)
def test_any_batches_of_many_plans(kind, data, kind_of_plan, mixed):
    check_any_batches(kind, *kind_of_plan, mixed, data)


def check_any_batches(kind, interleave, steps, mixed, data):
    gathered = data.draw(flags)
    plan, slots = data.draw(plans(interleave, steps, gathered, mixed))
    kernel = check(plan, kind, data.draw(epochs), slots, data.draw(word))
    passes = mixed and plan.shuffle_within_batches
    assert {form.passes for form, _ in kernel.launches} == {passes}


HIGH_KEYS = next(
    (seed, epoch)
    for seed, epoch in product(range(1000), (5, 2**32 + 5))
    if min(
        *key_of(Streams.of(seed).batches, epoch, 0),
        *absorb_pair(Streams.of(seed).samples, epoch),
        *key_of(Streams.of(seed).samples, epoch, 0),
        *key_of(Streams.of(seed).samples, epoch, 1),
    )
    >= HIGH
)


@pytest.mark.parametrize("counts", [[20, 12], [300, 70_000]])
@every_kernel
def test_keys_beyond_a_signed_word(kind, counts):
    seed, epoch = HIGH_KEYS
    plan = plan_of(counts, 4, seed)
    kernel = check(plan, kind, epoch, np.arange(0, plan.num_batches, 1 + plan.num_batches // 40))
    # Keys go over as signed words of the same bits, which the plan's own must need.
    keys = kernel.evaluator._keys(plan.evaluator.streams, epoch, kernel.launches[0][0])
    assert all(word >= HIGH for word in keys[:4])
    assert form_of(plan).slots > 0


@pytest.mark.parametrize("number", [1, 2, 16, 32, 33, 127, 128, 1023, 1024, 65536])
@every_kernel
def test_any_number_of_batches(kind, number):
    counts = [part for part in (number - number // 3, number // 3) if part]
    plan = plan_of(counts, 1, seed=number)
    assert plan.num_batches == number
    check(plan, kind, 4, np.unique(np.linspace(0, number - 1, 40).astype(int)))


FORMS_OF_SLOTS = {
    1: kernel_spec.SLOTS_AS_THEY_ARE,
    2: kernel_spec.SLOTS_FISHER_YATES,
    32: kernel_spec.SLOTS_FISHER_YATES,
    33: kernel_spec.SLOTS_32_BIT,
    2**32: kernel_spec.SLOTS_32_BIT,
    2**32 + 1: kernel_spec.SLOTS_64_BIT,
    2**40 + 12345: kernel_spec.SLOTS_64_BIT,
}


@pytest.mark.parametrize("number", FORMS_OF_SLOTS)
@every_kernel
def test_more_batches_than_a_word_counts(kind, number):
    plan = plan_of(split_counts(number), 1, seed=2**64 - 1)
    assert plan.num_batches == number
    assert form_of(plan).slots == FORMS_OF_SLOTS[number]
    inside = np.linspace(0, number - 1, 30).astype(np.int64)
    ends = [0, 1, 2, number - 3, number - 2, number - 1, 2**32 - 1, 2**32, 2**32 + 7, 2**31]
    slots = np.concatenate([inside, [slot for slot in ends if 0 <= slot < number]])
    check(plan, kind, 2**63 - 1, slots)


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 64, 100, 129, 4096, 4200])
@every_kernel
def test_rows_of_any_width(kind, width):
    plan = plan_of([width, width + 5], width)
    kernel = check(plan, kind, 3, [*range(plan.num_batches), 0])
    assert {geometry.blocks[1] for _, geometry in kernel.launches} == {1 + (width > 4096)}


@every_kernel
def test_a_row_that_several_blocks_share(kind):
    plan = plan_of([8300], 8300)
    kernel = kernel_of(plan, kind)
    check_block(plan, kernel, 3, [0])
    assert [geometry.blocks for _, geometry in kernel.launches] == [(1, 3)]


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 257])
@every_kernel
def test_any_number_of_rows(kind, rows):
    check(plan_of([40, 3000, 20], 24), kind, 1, np.arange(rows) % 120)


@pytest.mark.parametrize("partial", ["keep", "pad"])
@every_kernel
def test_patches_of_every_kind_side_by_side(kind, partial):
    # Where rounds differ from patch to patch, each row goes by its own.
    plan = plan_of([*EDGES, 1025, 65_537], 24, partial=partial, shuffle_patches=False)
    result = form_of(plan)
    assert (result.samples, result.small, result.fewest, result.most) == (True, 32, 3, 6)
    ends = np.cumsum(plan.batches_by_patch)
    check(plan, kind, 6, np.concatenate([ends - 1, ends - plan.batches_by_patch]))


@pytest.mark.slow("Triton's interpreter without shortcuts")
@pytest.mark.parametrize("kind", [TRITON])
@pytest.mark.parametrize("partial", ["keep", "pad"])
def test_shortcuts_of_the_interpreter_change_no_result(kind, partial, monkeypatch):
    monkeypatch.setattr(kernels, "interpreter_in_haste", nullcontext)
    test_patches_of_every_kind_side_by_side(kind, partial)


@every_kernel
def test_the_largest_small_patch_beside_large_ones(kind):
    # No smaller one is there to bring in what it needs.
    plan = plan_of([32, 2000, 33], 16)
    check(plan, kind, 6, np.arange(plan.num_batches))


@pytest.mark.parametrize("steps", ["free", "balanced"])
@every_kernel
def test_costliest_batches_that_differ_from_epoch_to_epoch(kind, steps):
    counts, weights = [5, 32, 33, 60], [1, 1, 1, 2]
    settings = {"steps": steps, "step_width": 3, "costliest_first": True, "epoch_batches": 19}
    plan = plan_of(counts, 7, weights=weights, **settings)
    for epoch in (0, 1, 2**33):
        kernel = check(plan, kind, epoch, np.arange(plan.num_batches))
        assert {form.costliest for form, _ in kernel.launches} == {2}


@st.composite
def sized(
    draw: st.DrawFn, sizes: str, interleave: bool, steps: str, mixed: bool
) -> tuple[EpochPlan, np.ndarray]:
    """A plan whose patches have sizes of their own, and some of its slots."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = groups_at_random(rng, draw(flags), draw(flags))
    patch_ids = groups.labels.tolist()
    if sizes == "patch":
        batch_size: Any = dict(zip(patch_ids, rng.choice(SIZES, groups.num_patches), strict=True))
    elif sizes == "cost":
        costs = dict(zip(patch_ids, rng.integers(1, 400, groups.num_patches), strict=True))
        batch_size = CostBudget(400, cost=costs, max_batch_size=200)
    else:
        costs = rng.integers(1, 40, groups.source_size)
        batch_size = CostBudget(400, sample_costs=costs, max_batch_size=200)
    # Under "drop" the smallest groups may have no batch at all.
    partial = draw(st.sampled_from(["keep", "pad"]))
    mixing: dict[str, Any] = {}
    if mixed:
        mixing = {
            "weights": rng.choice([1, 30, 1000], groups.num_patches),
            "epoch_batches": int(rng.integers(groups.num_samples, 2 * groups.num_samples)),
        }
    plan = EpochPlan(
        groups,
        batch_size,
        draw(seeds),
        **mixing,
        partial=partial,
        shuffle_within_batches=draw(mostly),
        shuffle_patches=draw(mostly),
        interleave=interleave,
        steps=steps,
        step_width=1 if steps == "free" else int(rng.integers(1, 5)),
    )
    return plan, rng.integers(0, plan.num_batches, rng.integers(1, 24))


BY = ["patch", "cost", "sample"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("interleave", "steps"), KINDS_OF_PLANS)
@every_kernel
@settings(few, max_examples=2)
@given(st.data(), flags)
def test_any_batches_of_patches_with_sizes_of_their_own(kind, interleave, steps, by, data, mixed):
    plan, slots = data.draw(sized(by, interleave, steps, mixed))
    check(plan, kind, data.draw(epochs), slots)


@pytest.mark.slow("60 plans in Triton's interpreter")
@every_kernel
@settings(few, max_examples=60)
@given(st.data(), st.sampled_from(KINDS_OF_PLANS), st.sampled_from(BY), flags)
def test_batches_of_many_plans_with_sizes_of_their_own(kind, data, kind_of_plan, by, mixed):
    plan, slots = data.draw(sized(by, *kind_of_plan, mixed))
    check(plan, kind, data.draw(epochs), slots)


@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
@pytest.mark.parametrize("interleave", [True, False])
@every_kernel
def test_sizes_by_patch(kind, partial, interleave):
    sizes = {0: 40, 1: 8, 2: 13, 3: 150}
    plan = plan_of([100, 7, 40, 2000], sizes, partial=partial, interleave=interleave)
    kernel = check(plan, kind, 2, np.arange(plan.num_batches))
    assert [form.ragged for form, _ in kernel.launches] == [False, True]
    assert kernel.launches[1][0].pad == (partial == "pad")


@every_kernel
def test_narrow_ragged_rows_of_a_wide_plan(kind):
    # No block is launched for columns that none of the rows at hand has.
    plan = plan_of([3, 4200], 4200)
    slots = np.arange(2)
    located = plan.evaluator.locate(0, slots)
    kernel = kernel_of(plan, kind)
    for group, blocks in ((0, 1), (1, 2)):
        locations = located.rows(located.group == group)
        expected = expected_samples(plan, 0, locations)
        np.testing.assert_array_equal(kernel.ragged(plan, 0, locations), expected)
        assert kernel.launches[-1][1].blocks[1] == blocks


@every_kernel
def test_no_rows(kind):
    kernel = check(plan_of([5, 3], 2), kind, 0, [])
    assert kernel.launches == []


NOWHERE = {
    "one batch": PatchGroups.from_counts([3]),
    "small": PatchGroups.from_counts([20, 7]),
    "grid": PatchGroups.from_counts([20, 70_000, 300]),
    "64-bit": PatchGroups.from_counts(split_counts(2**34)),
    "gathered": PatchGroups.from_ids(np.arange(300) % 3),
}


@pytest.mark.parametrize("groups", NOWHERE.values(), ids=NOWHERE)
@every_kernel
def test_slots_that_do_not_exist_stay_in_bounds(kind, groups):
    choices = product(KINDS_OF_PLANS, [True, False], [None, 50, 1, "costliest"])
    for number, ((interleave, steps), shuffle, choice) in enumerate(choices):
        # Both meet every value of the others, though not every pair of these.
        partial = ["keep", "pad"][(number + number // 4) % 2]
        epoch_batches = choice if isinstance(choice, int) else None
        is_free = interleave and steps == "free"
        has_few = epoch_batches == 1 or choice == "costliest"
        if has_few and (not is_free or groups.num_patches == 1):
            continue
        plan = EpochPlan(
            groups,
            3,
            7,
            interleave=interleave,
            shuffle_patches=shuffle,
            partial=partial,
            steps=steps,
            step_width=1 if steps == "free" and choice != "costliest" else 2,
            epoch_batches=epoch_batches,
            costliest_first=choice == "costliest",
        )
        last = plan.num_batches - 1
        slots = [-1, -(2**31), -(2**63), last + 1, last + 2, 2**31, 2**32, 2**63 - 1, last]
        indices, lengths, result = kernel_of(plan, kind).block(plan, 0, slots)
        # Samples of some patch, whichever: a gather of them is as safe as any.
        assert ((result >= 0) & (result < groups.counts.size)).all()
        owners = groups.counts[result][:, None]
        if groups.order is None:
            positions = indices - groups.starts[result][:, None]
            assert ((positions >= 0) & (positions < owners)).all()
        assert ((indices >= 0) & (indices < groups.source_size)).all()
        # What is there is not disturbed by its neighbours.
        expected = plan.evaluate(0, [last])
        assert indices[-1].tolist() == expected.indices[0].tolist()
        assert lengths[-1] == expected.lengths[0]


EPOCHS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, HIGH_KEYS[1], 2**63 - 1]


@pytest.mark.parametrize(
    ("counts", "batch_size", "settings"),
    [
        ([40, 3000, 20], 24, {}),
        ([9, 5], 2, {"partial": "pad"}),
        ([70_000, 66_000], 64, {"shuffle_patches": False}),
        (split_counts(2**33), 3, {"shuffle_within_batches": False}),
    ],
    ids=["mixed", "small", "one kind", "64-bit"],
)
@pytest.mark.parametrize("kind", [TRITON])
def test_epoch_and_slot_are_read_on_the_device(kind, counts, batch_size, settings):
    import torch

    plan = plan_of(counts, batch_size, HIGH_KEYS[0], **settings)
    kernel = kernel_of(plan, kind)
    number = plan.num_batches
    for device, epoch in enumerate(EPOCHS):
        slot = device * (number - 1) // (len(EPOCHS) - 1)
        tensors = (torch.tensor(value, device=kernel.device.name) for value in (epoch, slot))
        result = [host(part) for part in kernel.evaluator.batch(plan.evaluator.streams, *tensors)]
        expected = plan.evaluate(epoch, [slot])
        for actual, desired in zip(result, expected, strict=True):
            assert actual.shape == desired.shape[1:]
            np.testing.assert_array_equal(actual, desired[0])
    assert {form for form, _ in kernel.launches} == {form_of(plan, epoch_on_device=True)}


NONE = KernelSpec(*[0] * len(KernelSpec._fields))


@pytest.mark.parametrize(
    ("counts", "batch_size", "settings", "asked", "expected"),
    [
        ([5], 5, {"shuffle_within_batches": False}, {}, {}),
        ([5], 5, {}, {}, {"samples": 1, "small": 8}),
        ([5, 9], 5, {"shuffle_patches": False}, {}, {"samples": 1, "small": 16}),
        ([1, 1], 1, {}, {}, {"slots": 1, "samples": 1, "small": 2}),
        ([32], 1, {}, {}, {"slots": 1, "samples": 1, "small": 32}),
        ([33], 1, {}, {}, {"slots": 2, "samples": 1, "fewest": 6, "most": 6}),
        ([33, 127], 1, {}, {}, {"slots": 2, "samples": 1, "fewest": 6, "most": 6}),
        ([33, 1023], 1, {}, {}, {"slots": 2, "samples": 1, "fewest": 5, "most": 6}),
        ([128, 1023], 1, {}, {}, {"slots": 2, "samples": 1, "fewest": 5, "most": 5}),
        ([128, 1024], 1, {}, {}, {"slots": 2, "samples": 1, "fewest": 4, "most": 5}),
        ([33, 1024], 1, {}, {}, {"slots": 2, "samples": 1, "fewest": 4, "most": 6}),
        ([1024, 65535], 1, {}, {}, {"slots": 2, "samples": 1, "fewest": 4, "most": 4}),
        ([1024, 65536], 1, {}, {}, {"slots": 2, "samples": 1, "fewest": 3, "most": 4}),
        ([65536], 9, {}, {}, {"slots": 2, "samples": 1, "fewest": 3, "most": 3}),
        ([128] * 4, 1, {}, {}, {"few": 4, "slots": 2, "samples": 1, "fewest": 5, "most": 5}),
        ([128] * 9, 1, {}, {}, {"few": 8, "slots": 2, "samples": 1, "fewest": 5, "most": 5}),
        ([128] * 10, 1, {}, {}, {"few": 0, "slots": 2, "samples": 1, "fewest": 5, "most": 5}),
        ([3, 65536], 9, {}, {}, {"slots": 2, "samples": 1, "small": 32, "fewest": 3, "most": 6}),
        ([5, 6], 1, {"interleave": False}, {}, {"in_order": 1, "samples": 1, "small": 8}),
        (
            [5, 6],
            1,
            {"weights": [1, 2], "epoch_batches": 9},
            {},
            {"slots": 1, "own": 2, "passes": 1, "samples": 1, "small": 8},
        ),
        (
            [5, 6],
            1,
            {"weights": [1, 2], "shuffle_within_batches": False},
            {},
            {"slots": 1, "own": 2},
        ),
        (
            [5, 6],
            1,
            {"epoch_batches": 1},
            {},
            {"few": 0, "visits": 2, "passes": 1, "samples": 1, "small": 8},
        ),
        (
            [5, 6],
            1,
            {"steps": "same_patch", "step_width": 2, "shuffle_within_batches": False},
            {},
            {"slots": 1, "steps": 1, "own": 1},
        ),
        (
            [5, 6],
            1,
            {"steps": "balanced", "step_width": 2, "shuffle_within_batches": False},
            {},
            {"slots": 1, "steps": 2, "runs": 2},
        ),
        (
            [5, 6],
            1,
            {"costliest_first": True, "step_width": 2, "shuffle_within_batches": False},
            {},
            {"slots": 1, "costliest": 1},
        ),
        ([5], 5, {"partial": "pad"}, {}, {"samples": 1, "small": 8}),
        ([5], 5, {}, {"ragged": True}, {"samples": 1, "small": 8, "ragged": 1}),
        (
            [5],
            5,
            {"partial": "pad"},
            {"ragged": True},
            {"samples": 1, "small": 8, "ragged": 1, "pad": 1},
        ),
        ([5], 5, {}, {"epoch_on_device": True}, {"samples": 1, "small": 8, "epoch_on_device": 1}),
    ],
)
def test_what_no_patch_needs_is_left_out(counts, batch_size, settings, asked, expected):
    result = form_of(plan_of(counts, batch_size, **settings), **asked)
    # Tables of up to three patches have two ends.
    assert result == NONE._replace(**{"few": 2} | expected)
    assert result.flags() == {name.upper(): value for name, value in result._asdict().items()}
    assert {type(value) for value in result.flags().values()} == {int}


def test_an_order_is_a_form_of_its_own():
    plan = EpochPlan(PatchGroups.from_ids([1, 0, 1]), 3, 0, shuffle_within_batches=False)
    assert form_of(plan) == NONE._replace(slots=1, few=2, ordered=1)


@pytest.mark.parametrize("num_patches", [1, 2, 3, 4, 5, 8, 9, 10])
@every_kernel
def test_the_group_of_every_batch(kind, num_patches):
    # Patches that have no batch share their first one with the next patch.
    counts = [40, 3, 7, 3, 90, 3, 3, 25, 60, 3][:num_patches]
    plan = plan_of(counts, 5, partial="drop", shuffle_patches=False)
    check(plan, kind, 2, np.arange(plan.num_batches))


@pytest.mark.parametrize("num_patches", [31, 32, 33])
@every_kernel
def test_visits_of_as_many_patches_as_are_permuted_by_fisher_yates(kind, num_patches):
    plan = plan_of([6] * num_patches, 3, epoch_batches=20)
    check(plan, kind, 7, np.arange(20))


def test_division_by_multiplication():
    n = np.unique(np.concatenate([np.arange(3, 3000), 2 ** np.arange(2, 31), [2**31 - 1]]))
    grid = grids_of(np, n)
    sides, rests = (words.view(np.uint64) for words in kernel_spec.side_words(grid))
    low = np.uint64(0xFFFF)
    a, last, b, shift = (sides >> np.uint64(16 * field) & low for field in range(4))
    np.testing.assert_array_equal(np.stack([a, last + np.uint64(1), b]), [grid.a, grid.a, grid.b])
    np.testing.assert_array_equal(rests & np.uint64(0xFFFFFFFF), grid.rem)
    # The worst numbers are multiples of b and those just below.
    for line in (np.zeros_like(n), np.ones_like(n), grid.a // 2, grid.a - 1):
        for x in (line * grid.b, line * grid.b + grid.b - 1, np.full_like(n, 2**31 - 1)):
            quotient = (x.view(np.uint64) * (rests >> np.uint64(32)) >> np.uint64(32)) >> shift
            np.testing.assert_array_equal(quotient, x // grid.b)


PLAIN = NONE._replace(samples=1, fewest=3, most=3)
MIXED = PLAIN._replace(small=32, most=6)
widths = st.one_of(st.integers(1, 200), st.integers(1, 70_000), st.integers(1, 2**27))
numbers = st.one_of(st.integers(1, 300), st.integers(1, 2**31 - 1))


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


class TestGeometry:
    @pytest.mark.parametrize("cut", [cuda_geometry, triton_geometry])
    @given(st.sampled_from([PLAIN, MIXED]), numbers, widths)
    def test_covers_every_lane_of_every_row_and_no_block_is_idle(self, cut, form, rows, width):
        geometry = cut(form, rows, width)
        for blocks, each, total in zip(
            geometry.blocks, (geometry.rows, geometry.span), (rows, width), strict=True
        ):
            assert (blocks - 1) * each < total <= blocks * each
        # What a GPU's grid has room for.
        assert geometry.blocks[0] < 2**31
        assert geometry.blocks[1] <= 65535

    @given(st.sampled_from([PLAIN, MIXED]), numbers, widths)
    def test_of_cuda_c_fits_its_constants(self, form, rows, width):
        geometry = cuda_geometry(form, rows, width)
        assert 1 <= geometry.rows <= kernel_spec.MOST_ROWS
        assert is_power_of_two(geometry.columns)
        assert kernel_spec.THREADS % geometry.columns == 0
        assert geometry.rows * geometry.span <= max(kernel_spec.BLOCK_LANES, width)

    @given(st.sampled_from([PLAIN, MIXED]), numbers, numbers, widths)
    def test_of_triton_is_made_of_powers_of_two_and_few(self, form, rows, more, width):
        geometry = triton_geometry(form, rows, width)
        sides = geometry.rows, geometry.columns, geometry.span
        assert all(map(is_power_of_two, sides))
        assert geometry.rows * geometry.columns <= 2048
        assert geometry.span % geometry.columns == 0
        # How many rows there are is no other kernel to compile.
        assert triton_geometry(form, more, width)[:3] == sides
        assert triton_geometry(form._replace(epoch_on_device=1), 1, width).rows == 1

    def test_of_triton_leaves_few_lanes_idle(self):
        for width in range(1, 1000):
            columns = triton_geometry(PLAIN, 1000, width).columns
            assert -(-width // columns) * columns < max(2 * width, width + 32), width

    def test_constants_are_those_of_the_source(self):
        defined = dict(re.findall(r"#define (\w+) (\w+)\n", cuda_batches_on_host().source()))
        assert int(defined["THREADS"]) == kernel_spec.THREADS
        assert int(defined["MOST_ROWS"]) == kernel_spec.MOST_ROWS
        assert int(defined["SPREAD"].rstrip("u"), 16) == SPREAD

    def test_numbers_of_a_plan_are_where_the_source_of_triton_has_them(self):
        pytest.importorskip("triton")
        from gpusampler.plan.evaluators.kernels import triton_batches

        for place, name in enumerate(kernel_spec.PLAN_WORDS):
            assert getattr(triton_batches, f"AT_{name.upper()}").value == place
