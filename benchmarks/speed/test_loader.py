"""Batches of tensors in memory: gathered many at once, against a DataLoader that fetches rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.gate_cases import drain
from gpusampler import PatchBatchSampler, PatchTensorLoader

N = 400_000


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_loader_against_dataloader(against, kind, rng):
    x = rng.random((N, 8), dtype=np.float32)
    y = rng.random(N, dtype=np.float32)
    sampler = PatchBatchSampler(rng.integers(0, 200, N), 64, seed=0, device="numpy")
    there = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    tensors = {"x": x, "y": y}
    if kind == "torch":
        tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    loader = PatchTensorLoader(sampler, **tensors)
    usual = DataLoader(there, batch_sampler=sampler)
    against(
        f"PatchTensorLoader of {kind}, N = 4e5, 64 of 8",
        lambda: drain(loader),
        "DataLoader(TensorDataset(x, y))",
        lambda: drain(usual),
    )
