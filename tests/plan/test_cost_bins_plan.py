"""Plans whose patches are cut into cost bins, against the oracle and in every form."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups, Temperature
from support import oracle

torch = pytest.importorskip("torch")

PATCH_IDS = [-4, 3, 9, 20]
RANDOM = np.random.default_rng(7)
IDS = np.repeat(PATCH_IDS, [40, 3, 25, 60])[RANDOM.permutation(128)]
COSTS = np.exp(RANDOM.normal(1, 1, IDS.size)).clip(0.1, 30)
EPOCH = 2**40 + 3

STEPS: list[dict[str, Any]] = [
    {},
    {"interleave": False},
    {"steps": "balanced", "step_width": 3},
    {"steps": "same_patch", "step_width": 2},
    {"steps": "same_patch", "step_width": 2, "interleave": False},
]
SHARES: list[dict[str, Any]] = [
    {},
    {"weights": {-4: 1, 3: 1, 9: 5, 20: 0.5}, "epoch_batches": 90},
    {"weights": Temperature(2)},
]


def plan_of(partial: str, settings: dict[str, Any]) -> EpochPlan:
    budget = CostBudget(40, sample_costs=COSTS, max_batch_size=16)
    groups = PatchGroups.from_ids(IDS)
    return EpochPlan(groups, budget, 5, partial=partial, **settings)


def expected_batches(plan: EpochPlan, settings: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """An epoch as the oracle has it, of the plan's own classes: each is a patch to it."""
    cut = plan.units
    assert cut.patch_of_bin is not None
    assert cut.groups.num_patches > plan.groups.num_patches
    order, ends = np.asarray(cut.groups.order), np.cumsum(cut.groups.counts)
    part = np.empty(IDS.size, np.int64)
    part[order] = np.repeat(np.arange(ends.size), cut.groups.counts)
    steps_settings = {
        k: settings[k] for k in ("interleave", "steps", "step_width") if k in settings
    }
    shares = plan.tables.slot_shares
    mixed = {} if shares is None else {"weights": shares.tolist(), "epoch_batches": shares.sum()}
    oracle_settings = oracle.Settings(
        cut.sizes.tolist(),
        partial=plan.partial,
        patch_costs=cut.costs.tolist(),
        patch_of_bin=cut.patch_of_bin.tolist(),
        **steps_settings,
        **mixed,
    )
    epoch = oracle.epoch(part.tolist(), plan.seed, EPOCH, oracle_settings)
    return [(PATCH_IDS[cut.patch_of_bin[number]], samples) for number, samples in epoch]


@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
@pytest.mark.parametrize(
    "settings", [{**a, **b} for a, b in itertools.product(STEPS, SHARES)], ids=str
)
def test_every_slot_is_what_the_oracle_says(settings, partial):
    plan = plan_of(partial, settings)
    batches = expected_batches(plan, settings)
    slots = np.arange(plan.num_batches)
    blocks = [plan.evaluate(EPOCH, slots)]
    plan_on_cpu = plan.on("cpu")
    blocks += [
        plan_on_cpu.evaluate(EPOCH, slots),
        plan_on_cpu.evaluator.block_by_arrays(EPOCH, torch.from_numpy(slots)),
    ]
    for block in blocks:
        assert [PATCH_IDS[group] for group in block.groups.tolist()] == [p for p, _ in batches]
        rows = [row[: len(b)] for row, (_, b) in zip(block.indices.tolist(), batches, strict=True)]
        assert rows == [samples for _, samples in batches]
    for slot in (0, plan.num_batches - 1):
        batch = plan_on_cpu.evaluator.batch(torch.tensor(EPOCH), torch.tensor(slot))
        assert PATCH_IDS[int(batch.groups)] == batches[slot][0]
        assert batch.indices.tolist() == blocks[0].indices[slot].tolist()
    for patch_id, samples in batches:
        assert set(IDS[samples]) == {patch_id}
        assert len(samples) * COSTS[samples].max() <= 40


def test_patches_in_a_row_are_whole_and_in_the_order_of_other_plans():
    budget = CostBudget(40, sample_costs=COSTS)
    for epoch in range(3):
        sampler = PatchBatchSampler(IDS, budget, seed=3, interleave=False)
        rows = [key for key, _ in itertools.groupby(b.patch_id for b in sampler.batches(epoch))]
        plain = PatchBatchSampler(IDS, 8, seed=3, interleave=False)
        assert rows == [
            key for key, _ in itertools.groupby(b.patch_id for b in plain.batches(epoch))
        ]
        assert len(rows) == 4


@pytest.mark.parametrize("total", [60, 101, 600, 10**9])
def test_weights_are_of_patches_however_they_are_cut(total):
    weights = {-4: 0.37, 3: 0.1, 9: 2.5, 20: 0.9}
    plan = plan_of("keep", {"weights": weights, "epoch_batches": total})
    shares = np.array(list(weights.values())) / sum(weights.values()) * total
    # A patch has a slot for each of its classes; the others share what is left.
    num_bins = np.bincount(plan.units.patch_of_bin)
    at_minimum = num_bins > shares
    result = plan.batches_by_patch
    assert result.sum() == total
    assert result[at_minimum].tolist() == num_bins[at_minimum].tolist()
    exact = shares[~at_minimum] / shares[~at_minimum].sum() * (total - num_bins[at_minimum].sum())
    assert (np.abs(result[~at_minimum] - exact) < 1).all()
    # Inside a patch, by the batches that each class has.
    for patch, slots in enumerate(result):
        in_patch = plan.units.patch_of_bin == patch
        own_batches = plan.tables.batches_per_pass[in_patch]
        assert plan.tables.slot_shares[in_patch].tolist() == oracle.apportion(
            own_batches.tolist(), int(slots)
        )


def test_an_epoch_has_a_batch_for_every_class():
    number = plan_of("keep", {}).units.groups.num_patches
    assert plan_of("keep", {"epoch_batches": number}).tables.slot_shares.tolist() == [1] * number
    with pytest.raises(ValueError, match=f"epoch_batches .* {number}, the number of cost bins"):
        plan_of("keep", {"epoch_batches": number - 1, "interleave": False})
    # Interleaved, the bins take turns.
    turns = plan_of("keep", {"epoch_batches": number - 1})
    located = [turns.evaluator.locate(e, np.arange(number - 1)).group for e in range(number)]
    assert np.bincount(np.concatenate(located)).tolist() == [number - 1] * number


def test_classes_that_fill_no_batch_are_warned_of():
    # Three samples may be four in a batch, and must be.
    budget = CostBudget(40, sample_costs=[1] * 400 + [10] * 3, min_batch_size=4)
    with pytest.warns(UserWarning, match="whole cost bins of 1 of 1 patches .3 samples."):
        sampler = PatchBatchSampler([3] * 403, budget, seed=0, partial="drop")
    assert sampler.coverage().missed.tolist() == [3]
    with pytest.warns(UserWarning, match="whole cost bins of 1 of 1 patches .3 samples."):
        sampler = PatchBatchSampler(
            [3] * 403, budget, seed=0, steps="same_patch", step_width=2, uneven="drop"
        )
    assert sampler.coverage().missed.tolist() == [3]


def test_samples_over_the_budget_are_warned_of():
    budget = CostBudget(40, sample_costs=[1] * 40 + [41], over_budget="skip")
    with pytest.warns(UserWarning, match="'skip' leaves out 1 samples in 1 of 1 patches"):
        PatchBatchSampler([3] * 41, budget, seed=0)


def test_a_state_knows_which_samples_are_in_which_class():
    # Two classes of the same sizes and counts, of other samples.
    costs = np.repeat([10.0, 40.0], 40)
    budget = CostBudget(80, sample_costs=costs)
    sampler = PatchBatchSampler([1] * 80, budget, seed=0)
    assert sampler.plan.units.patch_of_bin is not None
    other = PatchBatchSampler([1] * 80, CostBudget(80, sample_costs=costs[::-1]), seed=0)
    assert other.plan.units.sizes.tolist() == sampler.plan.units.sizes.tolist()
    with pytest.raises(ValueError, match="batch_sizes is"):
        other.load_state_dict(sampler.state_dict())
    PatchBatchSampler([1] * 80, budget, seed=0).load_state_dict(sampler.state_dict())
