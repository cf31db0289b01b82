"""Drawing batches: the first one, and a whole epoch."""

from __future__ import annotations

import pytest
from torch.utils.data import BatchSampler, RandomSampler

from benchmarks.gate_cases import FirstBatches, drain
from gpusampler import PatchBatchSampler, PatchGroups

N = 2_000_000
FIRST_DRAWS = 50


def test_first_batch_at_any_size(against):
    against(
        f"first batch, N = 1e9 ({FIRST_DRAWS} times)",
        FirstBatches(10**9, FIRST_DRAWS).prepare(),
        f"first batch, N = 1e4 ({FIRST_DRAWS} times)",
        FirstBatches(10**4, FIRST_DRAWS).prepare(),
    )


@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
def test_epoch_against_ungrouped(against, rng, output):
    ids = rng.integers(0, 1000, N)
    sampler = PatchBatchSampler(ids, 64, seed=0, output=output)
    ungrouped = BatchSampler(RandomSampler(range(N)), 64, False)
    against(
        f"epoch as {output}, N = 2e6, 1,000 patches, 64",
        lambda: drain(sampler),
        "BatchSampler(RandomSampler(range(N)), 64)",
        lambda: drain(ungrouped),
    )


def test_contiguous_epoch_against_ungrouped(against):
    sampler = PatchBatchSampler(PatchGroups.from_counts([2000] * 1000), 64, seed=0)
    ungrouped = BatchSampler(RandomSampler(range(N)), 64, False)
    against(
        "epoch as list, the same, contiguous",
        lambda: drain(sampler),
        "BatchSampler(RandomSampler(range(N)), 64)",
        lambda: drain(ungrouped),
    )
