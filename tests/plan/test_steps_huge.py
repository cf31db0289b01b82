"""Steps of 1e12 samples: slots against the oracle, in kilobytes, on every path of the host."""

from __future__ import annotations

import tracemalloc
from time import process_time

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from support import oracle

TOP = (1 << 31) - 1


def runs_of(counts: list[int], settings: oracle.Settings) -> list[tuple[int, int, int, int]]:
    """Each patch's whole batches, and its short one: (patch, first, batches, samples of each)."""
    out, size = [], settings.batch_size
    for patch, count in enumerate(counts):
        whole, remaining = divmod(count, size)
        out.append((patch, 0, whole, size))
        if remaining and settings.partial != "drop":
            out.append((patch, whole, 1, remaining if settings.partial == "keep" else size))
    return out


def slots_of(total: int, width: int, seed: int, number: int = 300) -> np.ndarray:
    """Both ends, both sides of what 31, 32 and 33 bits hold, and some at random."""
    full = total // width * width
    edges = [
        near + off
        for near in (0, width, full, total // 2, total - 1, 1 << 31, 1 << 32, 1 << 33)
        for off in (-2, -1, 0, 1, 2)
    ]
    rng = np.random.default_rng(seed)
    slots = np.concatenate([edges, rng.integers(0, total, number)])
    return np.unique(slots[(slots >= 0) & (slots < total)])


def check(plan: EpochPlan, settings: oracle.Settings, epoch: int, slots: np.ndarray) -> None:
    """What slots lead to, from the package's host form and torch's, is what the oracle says."""
    counts = plan.groups.counts.tolist()
    expected = oracle.Balanced(runs_of(counts, settings), plan.seed, epoch, settings)
    assert expected.total == plan.num_batches
    locations = plan.evaluator.locate(epoch, slots)
    result = [*zip(locations.group.tolist(), locations.j.tolist(), strict=True)]
    assert result == [expected.at(slot) for slot in slots.tolist()]

    torch = pytest.importorskip("torch")
    block = plan.evaluate(epoch, slots)
    reference = plan.on("cpu").evaluator.block_by_arrays(epoch, torch.from_numpy(slots))
    for actual, desired in zip(block, reference, strict=True):
        np.testing.assert_array_equal(actual, desired.numpy())
    rows = [*zip(block.indices, result, block.lengths, strict=True)]
    for row, (patch, number), length in rows[::20]:
        start = int(plan.groups.starts[patch])
        key = oracle.derive(plan.seed, oracle.INSIDE_A_PATCH, epoch, patch)
        first = number * settings.batch_size
        indices = range(first, first + int(length))
        samples = [start + oracle.permuted(x, counts[patch], key) for x in indices]
        assert row[: int(length)].tolist() == samples


@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
@pytest.mark.parametrize("width", [1024, 1000, 1])
def test_a_trillion_samples_in_balanced_steps(width, partial):
    # A patch holds fewer than 2**31 samples, so it takes 600 of them.
    rng = np.random.default_rng(4)
    counts = [*rng.integers(15 * 10**8, 18 * 10**8, 600).tolist(), 100, 64]
    costs = rng.lognormal(0, 1, 602).tolist()
    settings = oracle.Settings(64, partial, steps="balanced", step_width=width, patch_costs=costs)
    groups = PatchGroups.from_counts(counts)
    # What the first call imports is no memory of the plan.
    EpochPlan(PatchGroups.from_counts([5]), 2, 0, steps="balanced").evaluate(0, [1])
    tracemalloc.start()
    start_time = process_time()
    plan = EpochPlan(
        groups, 64, 9, steps="balanced", step_width=width, patch_costs=costs, partial=partial
    )
    slots = slots_of(plan.num_batches, width, seed=width)
    locations = plan.evaluator.locate(2**40, slots)
    seconds = process_time() - start_time
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert locations.group.size == slots.size
    assert peak < 2_000_000
    # Processor time of this process alone; some milliseconds where this was written.
    assert seconds < 2
    assert groups.num_samples > 0.98e12
    assert plan.num_batches > 1 << 33
    check(plan, settings, 2**40, slots)


# Batches of one class: counts of patches of batches of one sample, all of one cost.
CLASSES = {
    "2**31 - 1": [TOP],
    "2**31": [TOP, 1],
    "2**32 - 1": [TOP, TOP, 1],
    "2**32": [TOP, TOP, 2],
    "2**32 + 1": [TOP, TOP, 3],
    "2**33 + 1": [TOP] * 4 + [5],
}


@pytest.mark.parametrize("width", [1, 2, 3, 1000])
@pytest.mark.parametrize("counts", CLASSES.values(), ids=CLASSES)
def test_classes_of_more_batches_than_a_word_counts(counts, width):
    total = sum(counts)
    small = [7, 40, 1]
    for beside in ([], small):
        # Small classes below and above it, of other costs.
        costs = [1.0] * len(counts) + [0.25, 8.0, 64.0][: len(beside)]
        settings = oracle.Settings(1, steps="balanced", step_width=width, patch_costs=costs)
        plan = EpochPlan(
            PatchGroups.from_counts([*counts, *beside]),
            1,
            2**64 - 1,
            steps="balanced",
            step_width=width,
            patch_costs=costs,
        )
        assert plan._tables.buckets.counts.tolist() == [*beside[:1], total, *beside[1:]]
        check(plan, settings, 2**63 - 1, slots_of(plan.num_batches, width, seed=1, number=60))


@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.parametrize("interleave", [True, False])
def test_a_trillion_samples_in_steps_of_one_patch(interleave, uneven):
    counts = np.random.default_rng(4).integers(15 * 10**8, 18 * 10**8, 600).tolist()
    sampler = PatchBatchSampler(
        PatchGroups.from_counts(counts),
        10,
        seed=5,
        steps="same_patch",
        step_width=1024,
        interleave=interleave,
        uneven=uneven,
    )
    own_batches = [-(-count // 10) for count in counts]
    steps = [n // 1024 if uneven == "drop" else -(-n // 1024) for n in own_batches]
    total = sum(steps)
    assert len(sampler) == total * 1024 > 9e10
    slots = slots_of(len(sampler), 1024, seed=2, number=100)
    # What the oracle says, without all steps one after the other.
    number = 6
    key = oracle.derive(5, oracle.ORDER_OF_BATCHES, number, 0)
    order = oracle.derive(5, oracle.ORDER_OF_PATCHES, number, 0)
    patches = [oracle.permuted(index, 600, order) for index in range(600)]
    expected = []
    for slot in slots.tolist():
        step, p = divmod(slot, 1024)
        if interleave:
            step = oracle.permuted(step, total, key)
        for patch in range(600) if interleave else patches:
            if step < steps[patch]:
                break
            step -= steps[patch]
        expected.append((patch, (step * 1024 + p) % own_batches[patch]))
    locations = sampler.plan.evaluator.locate(number, slots)
    assert [*zip(locations.group.tolist(), locations.j.tolist(), strict=True)] == expected
    totals = sampler.coverage(number).totals()
    assert totals["batches"] == len(sampler)
    assert totals["seen_once"] + totals["repeated"] + totals["missed"] == sum(counts)


def test_a_balanced_sampler_of_a_trillion_goes_on_anywhere():
    groups = PatchGroups.from_counts([16 * 10**8] * 625)
    costs = np.random.default_rng(1).lognormal(0, 1, 625)
    tracemalloc.start()
    sampler = PatchBatchSampler(
        groups, 64, seed=3, steps="balanced", step_width=1024, patch_costs=costs
    )
    iterator = iter(sampler)
    first = [next(iterator) for _ in range(3)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    total = sampler.plan.num_batches
    assert total == len(sampler) == 15_625_000_000
    assert first == sampler.plan.evaluate(0, [0, 1, 2]).indices.tolist()
    sampler.load_state_dict({**sampler.state_dict(), "slot": total - 2})
    remaining = list(iter(sampler))  # list(sampler) would make room for len(sampler)
    assert remaining == sampler.plan.evaluate(0, [total - 2, total - 1]).indices.tolist()
