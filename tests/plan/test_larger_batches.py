"""Tables in which the batches of a patch differ by one in size: the same in every form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchGroups
from gpusampler.core import arrays
from gpusampler.core.devices import HOST
from gpusampler.plan.evaluators.array import ArrayEvaluator
from gpusampler.plan.evaluators.host import HostEvaluator
from support.kernels import (
    device_of_kernel,
    evaluator_settings_of,
    every_kernel,
    kernel_evaluator_of,
)

COUNTS = [33, 7, 64, 1, 100, 50, 31]
SIZE = 16


def even_tables(plan: EpochPlan):
    """The plan's tables, each patch's samples spread evenly over as many batches."""
    tables = plan.tables
    sizes, larger = np.divmod(tables.counts, tables.batches)
    return replace(
        tables,
        sizes=sizes,
        larger=larger,
        is_uniform=False,
        max_batch_size=int((sizes + (larger > 0)).max()),
    )


def make(shuffle: bool) -> tuple[EpochPlan, HostEvaluator]:
    ids = np.random.default_rng(5).permutation(np.repeat(np.arange(len(COUNTS)), COUNTS))
    plan = EpochPlan(PatchGroups.from_ids(ids), SIZE, 3, shuffle_within_batches=shuffle)
    settings, streams = evaluator_settings_of(plan), plan.evaluator.streams
    return plan, HostEvaluator(even_tables(plan), plan.groups, settings, streams)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_comes_once_in_batches_of_nearly_one_size(shuffle):
    plan, host = make(shuffle)
    slots = np.arange(plan.num_batches)
    ragged = host.ragged(2, host.locate(2, slots))
    assert sorted(ragged.samples.tolist()) == list(range(sum(COUNTS)))
    for patch, count in enumerate(COUNTS):
        lengths = ragged.lengths[ragged.groups == patch]
        assert lengths.size == -(-count // SIZE)
        assert lengths.max() - lengths.min() <= 1
    # The batches of a patch cut its permutation, the larger ones first.
    order = plan.evaluator.host.ragged(2, plan.evaluator.locate(2, slots))
    locations = host.locate(2, slots)
    for patch in range(len(COUNTS)):
        first, last = (
            np.concatenate(
                [
                    block.samples[block.starts[row] : block.starts[row] + block.sizes[row]]
                    for row in np.flatnonzero(block.groups == patch)[
                        np.argsort(locations.j[locations.group == patch])
                    ]
                ]
            )
            for block in (ragged, order)
        )
        assert first.tolist() == last.tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_array_operations_equal_the_host(shuffle):
    plan, host = make(shuffle)
    tables = even_tables(plan).on(HOST, plan.groups.order)
    evaluator = ArrayEvaluator(tables, HOST, evaluator_settings_of(plan))
    slots = np.arange(plan.num_batches)
    block = evaluator.block(plan.evaluator.streams, 4, slots, None)
    for actual, desired in zip(block, host.block(4, slots), strict=True):
        np.testing.assert_array_equal(actual, desired)
    locations = host.locate(4, slots)
    ragged = host.ragged(4, locations)
    samples = evaluator.ragged(plan.evaluator.streams, 4, locations)
    starts = np.cumsum(locations.size) - locations.size
    for start, row_start, size in zip(starts, ragged.starts, ragged.sizes, strict=True):
        assert (samples[start : start + size] == ragged.samples[row_start : row_start + size]).all()


@every_kernel
@pytest.mark.parametrize("shuffle", [True, False])
def test_kernels_equal_the_host(kind, shuffle):
    plan, host = make(shuffle)
    device = device_of_kernel(kind)
    tables = even_tables(plan).on(device, plan.groups.order)
    kernel = kernel_evaluator_of(tables, device, evaluator_settings_of(plan), kind)
    array = ArrayEvaluator(even_tables(plan).on(HOST, plan.groups.order), HOST, kernel._settings)
    slots = np.arange(plan.num_batches)
    streams, locations = plan.evaluator.streams, host.locate(1, slots)
    block = kernel.block(streams, 1, arrays.to_device(slots, device))
    for actual, desired in zip(block, host.block(1, slots), strict=True):
        np.testing.assert_array_equal(arrays.to_numpy(actual), desired)
    samples = kernel.ragged(streams, 1, locations, is_located=False)
    np.testing.assert_array_equal(arrays.to_numpy(samples), array.ragged(streams, 1, locations))


def test_a_patch_without_a_slot_is_passed_over():
    plan, _ = make(True)
    batches = plan.tables.batches.copy()
    batches[[0, 2, 6]] = 0
    tables = plan.tables._with_slots(batches, 1)
    for interleave in (True, False):
        settings = evaluator_settings_of(plan)._replace(interleave=interleave)
        host = HostEvaluator(tables, plan.groups, settings, plan.evaluator.streams)
        locations = host.locate(0, np.arange(tables.num_batches))
        assert np.bincount(locations.group, minlength=batches.size).tolist() == batches.tolist()
