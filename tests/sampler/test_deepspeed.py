"""DeepSpeed under Accelerate: an epoch is shared out by the sampler, and resumed in its middle."""

from __future__ import annotations

from itertools import chain

import pytest

from support.paths import SUPPORT
from support.processes import run_ranks
from support.strategies import epoch_of

pytest.importorskip("deepspeed")
pytest.importorskip("accelerate")
pytest.importorskip("torch")

from gpusampler import PatchBatchSampler
from support.deepspeed_script import EPOCHS, IDS

pytestmark = pytest.mark.slow("two jobs of DeepSpeed, which compiles what its processes talk by")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[list[dict]]:
    """The ranks of a run that stops in the middle of an epoch, and of one that goes on."""
    out = tmp_path_factory.mktemp("deepspeed")
    return [run_ranks(SUPPORT / "deepspeed_script.py", 2, out) for _ in range(2)]


def test_every_sample_counts_once_through_a_resume(runs):
    for run in runs:
        for rank in run:
            assert (rank["kind"], rank["processes"]) == ("DistributedType.DEEPSPEED", 2)
    sampler = PatchBatchSampler(IDS, 8, seed=42, num_replicas=1, rank=0)
    assert len(sampler) % 2 == 1  # so that the last step takes the first batch again
    for epoch in range(EPOCHS):
        drawn = [
            batch
            for run in runs
            for step in zip(*(rank["steps"] for rank in run), strict=True)
            for at, batch in step
            if at == epoch
        ]
        batches = epoch_of(sampler, epoch)
        assert drawn == [*batches, batches[0]]
        assert sorted(chain.from_iterable(drawn[:-1])) == list(range(IDS.numel()))


def test_a_batch_size_that_deepspeed_is_to_find_out_is_refused(runs):
    for rank in runs[1]:
        assert "`None` as batch size" in rank["refused"]
        assert "train_micro_batch_size_per_gpu" in rank["refused"]
