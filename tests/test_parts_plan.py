"""Plans whose patches are cut into classes of cost, against the oracle and in every form."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracle
import pytest

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups, Temperature

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


def wanted(plan: EpochPlan, settings: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """An epoch as the oracle has it, of the plan's own classes: each is a patch to it."""
    cut = plan._cut
    assert cut.parents is not None
    assert cut.groups.num_patches > plan.groups.num_patches
    order, ends = np.asarray(cut.groups.order), np.cumsum(cut.groups.counts)
    part = np.empty(IDS.size, np.int64)
    part[order] = np.repeat(np.arange(ends.size), cut.groups.counts)
    known = {k: settings[k] for k in ("interleave", "steps", "step_width") if k in settings}
    shares = plan.tables.shares
    mixed = {} if shares is None else {"weights": shares.tolist(), "epoch_batches": shares.sum()}
    said = oracle.Settings(
        cut.sizes.tolist(),
        partial=plan.partial,
        patch_costs=cut.costs.tolist(),
        parents=cut.parents.tolist(),
        **known,
        **mixed,
    )
    epoch = oracle.epoch(part.tolist(), plan.seed, EPOCH, said)
    return [(PATCH_IDS[cut.parents[number]], samples) for number, samples in epoch]


@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
@pytest.mark.parametrize(
    "settings", [{**a, **b} for a, b in itertools.product(STEPS, SHARES)], ids=str
)
def test_every_slot_is_what_the_oracle_says(settings, partial):
    plan = plan_of(partial, settings)
    batches = wanted(plan, settings)
    slots = np.arange(plan.num_batches)
    blocks = [plan.evaluate(EPOCH, slots)]
    there = plan.on("cpu")
    blocks += [
        there.evaluate(EPOCH, slots),
        there.evaluate_reference(EPOCH, torch.from_numpy(slots)),
    ]
    for block in blocks:
        assert [PATCH_IDS[group] for group in block.groups.tolist()] == [p for p, _ in batches]
        rows = [row[: len(b)] for row, (_, b) in zip(block.indices.tolist(), batches, strict=True)]
        assert rows == [samples for _, samples in batches]
    for slot in (0, plan.num_batches - 1):
        one = there.batch_of_tensors(torch.tensor(EPOCH), torch.tensor(slot))
        assert PATCH_IDS[int(one.groups)] == batches[slot][0]
        assert one.indices.tolist() == blocks[0].indices[slot].tolist()
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
