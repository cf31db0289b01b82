"""What stays in memory, and what an epoch adds: counted by tracemalloc, which NumPy reports to."""

from __future__ import annotations

import gc
import tracemalloc
from collections import deque

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchGroups

pytestmark = pytest.mark.serial("measures memory; holds 1e7 samples")

MB = 1 << 20
N = 10_000_000


@pytest.fixture
def traced():
    # What the first call imports is no memory of the groups.
    next(iter(PatchBatchSampler([1, 2, 1], 2, seed=0)))
    gc.collect()
    tracemalloc.start()
    yield tracemalloc
    tracemalloc.stop()


@pytest.fixture(scope="module")
def shuffled_ids():
    return np.random.default_rng(0).integers(0, 1000, N)


def test_shuffled_ids_keep_four_bytes_a_sample(shuffled_ids, traced):
    before, _ = traced.get_traced_memory()
    groups = PatchGroups.from_ids(shuffled_ids)
    after, peak = traced.get_traced_memory()
    assert groups.nbytes <= 4 * N + 3 * 8 * 1000
    assert after - before <= 4 * N + MB
    assert after - before >= 4 * N
    # Grouping itself needs next to nothing beside its result.
    assert peak - before <= 4 * N + 16 * MB


def test_contiguous_ids_keep_nothing_a_sample(traced):
    ids = np.repeat(np.array([10, 1, 2], np.int64), N // 3)
    before, _ = traced.get_traced_memory()
    groups = PatchGroups.from_ids(ids)
    after, peak = traced.get_traced_memory()
    assert groups.order is None
    assert groups.nbytes < 1000
    assert after - before < MB
    assert peak - before < 16 * MB


def test_1e12_samples_from_counts_take_kilobytes(traced):
    before, _ = traced.get_traced_memory()
    sampler = PatchBatchSampler(PatchGroups.from_counts([2_000_000_000] * 500), 64, seed=0)
    after, _ = traced.get_traced_memory()
    assert sampler.plan.groups.num_samples == 10**12
    assert after - before < 256 * 1024


@pytest.mark.parametrize("contiguous", [False, True])
def test_draining_an_epoch_adds_at_most_32_mb(shuffled_ids, traced, contiguous):
    ids = np.sort(shuffled_ids) if contiguous else shuffled_ids
    sampler = PatchBatchSampler(ids, 64, seed=0, output="numpy")
    before, _ = traced.get_traced_memory()
    traced.reset_peak()
    deque(sampler, maxlen=0)
    _, peak = traced.get_traced_memory()
    assert peak - before <= 32 * MB


def test_a_batch_of_a_million_is_evaluated_in_tiles(traced):
    sampler = PatchBatchSampler(PatchGroups.from_counts([N]), 1_000_000, seed=0, output="numpy")
    before, _ = traced.get_traced_memory()
    traced.reset_peak()
    for batch in sampler:
        assert batch.size == 1_000_000
        del batch
    _, peak = traced.get_traced_memory()
    # Two batches of 8 MB may be alive at once; everything else is tiles.
    assert peak - before <= (2 * 8 + 4) * MB
