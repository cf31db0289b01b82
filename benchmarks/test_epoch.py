"""Drawing batches: the first one, and a whole epoch."""

from __future__ import annotations

from collections import deque

import pytest
from torch.utils.data import BatchSampler, RandomSampler

from gpusampler import PatchBatchSampler, PatchGroups

N = 2_000_000
FIRST_DRAWS = 50


def _drain(sampler):
    deque(sampler, maxlen=0)


def _sampler_of(samples):
    return PatchBatchSampler(PatchGroups.from_counts([samples // 1000] * 1000), 64, seed=0)


def _first_batches(sampler):
    for _ in range(FIRST_DRAWS):
        next(iter(sampler))


def test_first_batch_at_any_size(against):
    small, large = _sampler_of(10_000), _sampler_of(1_000_000_000)
    against(
        f"first batch, N = 1e9 ({FIRST_DRAWS} times)",
        lambda: _first_batches(large),
        f"first batch, N = 1e4 ({FIRST_DRAWS} times)",
        lambda: _first_batches(small),
        limit=2.0,
    )


@pytest.mark.parametrize(("output", "limit"), [("list", 1.0), ("numpy", 0.6), ("tensor", 0.9)])
def test_epoch_against_ungrouped(against, rng, output, limit):
    ids = rng.integers(0, 1000, N)
    sampler = PatchBatchSampler(ids, 64, seed=0, output=output)
    ungrouped = BatchSampler(RandomSampler(range(N)), 64, False)
    against(
        f"epoch as {output}, N = 2e6, 1,000 patches, 64",
        lambda: _drain(sampler),
        "BatchSampler(RandomSampler(range(N)), 64)",
        lambda: _drain(ungrouped),
        limit=limit,
    )


def test_contiguous_epoch_against_ungrouped(against):
    sampler = PatchBatchSampler(PatchGroups.from_counts([2000] * 1000), 64, seed=0)
    ungrouped = BatchSampler(RandomSampler(range(N)), 64, False)
    against(
        "epoch as list, the same, contiguous",
        lambda: _drain(sampler),
        "BatchSampler(RandomSampler(range(N)), 64)",
        lambda: _drain(ungrouped),
        limit=1.0,
    )
