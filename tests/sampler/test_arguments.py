"""PatchBatchSampler: what it warns of and what it refuses, in which words."""

from __future__ import annotations

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchGroups
from support.strategies import IDS, epoch_of, make


def test_drop_warns_of_patches_that_are_left_out():
    with pytest.warns(
        UserWarning,
        match=r"partial='drop' leaves out 2 of 4 patches \(10 samples\): .* batch_size=8",
    ) as caught:
        sampler = PatchBatchSampler(IDS, 8, partial="drop")
    # The warning points here, not into the package.
    assert caught[0].filename == __file__
    assert sampler.coverage(0).missed.tolist() == [7, 6, 2, 3]


def test_drop_is_silent_where_every_patch_has_a_batch():
    PatchBatchSampler(IDS, 3, partial="drop")


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"batch_size": -3}, ValueError, "batch_size must be >= 1, got -3"),
        (
            {"batch_size": 2.0},
            TypeError,
            r"batch_size must be an int, a mapping .* or a CostBudget, got 2\.0",
        ),
        ({"batch_size": True}, TypeError, "batch_size must be an int, got True"),
        (
            {"batch_size": None},
            TypeError,
            "batch_size must be an int, a mapping .* or a CostBudget, got None",
        ),
        (
            {"batch_size": "8"},
            TypeError,
            "batch_size must be an int, a mapping .* or a CostBudget, got '8'",
        ),
        ({"batch_size": 2**31}, ValueError, f"batch_size must be < {2**31}, got {2**31}"),
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"seed": 2**64}, ValueError, f"seed must be < {2**64}"),
        ({"seed": 1.5}, TypeError, r"seed must be an int, got 1\.5"),
        ({"seed": True}, TypeError, "seed must be an int, got True"),
        ({"shuffle_within_batches": 1}, TypeError, "shuffle_within_batches must be a bool, got 1"),
        ({"shuffle_patches": "yes"}, TypeError, "shuffle_patches must be a bool, got 'yes'"),
        ({"interleave": None}, TypeError, "interleave must be a bool, got None"),
        ({"progress": 2}, TypeError, "progress must be a bool, got 2"),
        (
            {"partial": "fill"},
            ValueError,
            "partial must be one of 'keep', 'drop', 'pad', 'even', got 'fill'",
        ),
        ({"partial": None}, ValueError, "partial must be one of .*, got None"),
        ({"uneven": "keep"}, ValueError, "uneven must be one of 'pad', 'drop', got 'keep'"),
        (
            {"output": "cupy"},
            ValueError,
            "output must be one of 'list', 'numpy', 'tensor', got 'cupy'",
        ),
        # RuntimeError where torch, which would know the device, is not installed.
        (
            {"device": "gpu"},
            (ValueError, RuntimeError),
            r"device(='gpu' req| must be 'numpy'.*, got 'gpu')",
        ),
        (
            {"device": "cupy:x"},
            (ValueError, RuntimeError),
            r"device(='cupy:x' req| must be .*, got 'cupy:x')",
        ),
        ({"num_replicas": 2, "rank": 2}, ValueError, r"rank must be in 0 \.\. .* = 1, got 2"),
        ({"num_replicas": 2, "rank": -1}, ValueError, "rank must be >= 0, got -1"),
        ({"num_replicas": 0, "rank": 0}, ValueError, "num_replicas must be >= 1, got 0"),
        ({"num_replicas": 2.0, "rank": 0}, TypeError, r"num_replicas must be an int, got 2\.0"),
        ({"num_replicas": 2, "rank": "0"}, TypeError, "rank must be an int, got '0'"),
        ({"num_replicas": 2}, ValueError, "num_replicas and rank must be given together"),
        ({"rank": 0}, ValueError, "num_replicas and rank must be given together"),
        (
            {"num_replicas": 25, "rank": 0, "uneven": "drop"},
            ValueError,
            "num_replicas must be at most the number of batches .* got 25 for 24 batches",
        ),
        (
            {"batch_size": 51, "partial": "drop"},
            ValueError,
            r"partial='drop' leaves no batches: batch_size=51, but the largest patch has 50 s",
        ),
    ],
)
def test_bad_arguments(settings, error, match):
    with pytest.raises(error, match=match):
        make(**settings)


def test_cuda_where_there_is_none():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(
        RuntimeError, match="device='cuda' requested, but torch finds no CUDA device"
    ):
        make(device="cuda")


def test_a_cursor_without_torch(monkeypatch):
    monkeypatch.setattr("gpusampler.core.devices.has_torch", lambda: False)
    with pytest.raises(RuntimeError, match="not installed: pip install torch"):
        PatchBatchSampler([1, 1], 2).cursor()


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ([], ValueError, "at least one sample"),
        (np.zeros(0, np.int64), ValueError, "ids must name at least one sample"),
        ([1.0, 2.0], TypeError, "ids must be integers, got dtype float64"),
        ([1, float("nan")], TypeError, "ids must be integers, got dtype float64"),
        (np.array([np.nan]), TypeError, "ids must be integers, got dtype float64"),
        ([True, False], TypeError, "ids must be integers, got dtype bool"),
        (["a", 1], TypeError, "ids must be all strings or all integers, got 1 in sample 1"),
        ("abc", FileNotFoundError, "source must be an existing file or folder: .*abc'"),
        ({1: 2}, TypeError, "source must be a dataset, an array .* got dict"),
        (None, TypeError, "source must be a dataset, an array .* got NoneType"),
        (7, TypeError, "source must be a dataset, an array .* got int"),
        (np.zeros((3, 2), np.int64), ValueError, "ids must be 1-D, one id per sample"),
        ([2**63], ValueError, "ids must fit in int64"),
    ],
)
def test_bad_sources(source, error, match):
    with pytest.raises(error, match=match):
        PatchBatchSampler(source, 2)


def test_a_patch_of_two_to_the_31_samples():
    PatchBatchSampler(PatchGroups.from_counts([2**31 - 1]), 64)
    with pytest.raises(ValueError, match=r"a patch must have fewer than 2\*\*31 samples"):
        PatchBatchSampler(PatchGroups.from_counts([2**31]), 64)


@pytest.mark.parametrize("epoch", [-1, 2**63])
def test_epochs_out_of_range(epoch):
    with pytest.raises(ValueError, match="epoch must be"):
        make().set_epoch(epoch)
    with pytest.raises(ValueError, match="epoch must be"):
        make().batches(epoch)


@pytest.mark.parametrize("epoch", [1.0, None, "1", True])
def test_epochs_that_are_no_integers(epoch):
    with pytest.raises(TypeError, match="epoch must be an int"):
        make().set_epoch(epoch)


def test_numpy_integers_are_integers():
    sampler = PatchBatchSampler(IDS, np.int32(4), seed=np.uint64(3))
    sampler.set_epoch(np.int64(2))
    assert list(sampler) == epoch_of(PatchBatchSampler(IDS, 4, seed=3), 2)
    assert {type(sampler.seed), type(sampler.epoch)} == {int}
