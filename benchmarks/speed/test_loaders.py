"""Batches of tensors in memory, gathered many at once, against loaders of other projects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.cases import Case
from benchmarks.peers.peer import Work, missing
from benchmarks.peers.samplers.loaders import LOADERS
from benchmarks.timing import drain
from gpusampler import PatchBatchSampler, PatchTensorLoader

N = 400_000
CASE = Case(10**5, 100, 64)
WIDTHS = (8, 256)
"""Numbers in a row."""


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_against_dataloader(against, scaled, kind):
    samples, rng = scaled(N), np.random.default_rng(2026)
    x = rng.random((samples, 8), dtype=np.float32)
    y = rng.random(samples, dtype=np.float32)
    sampler = PatchBatchSampler(rng.integers(0, 200, samples), 64, seed=0, device="numpy")
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


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("peer", LOADERS, ids=lambda peer: peer.name)
def test_against_loaders(against, scaled, peer, width):
    """The other loaders do not group; ours yields batches of one patch each."""
    if why := missing(peer):
        pytest.skip(why)
    case = CASE._replace(samples=scaled(CASE.samples))
    tensor = torch.rand(case.samples, width, generator=torch.Generator().manual_seed(0))
    ids = case.ids()
    ours = PatchTensorLoader(PatchBatchSampler(ids, case.batch_size, seed=0), x=tensor)
    theirs = peer.make(Work(tensor, ids, case.batch_size), 0)
    what = f"PatchTensorLoader, {case}, {width} numbers in a row"
    against(what, lambda: drain(ours), peer.name, lambda: drain(theirs), repeats=10)
