"""torch_geometric: graphs of one size a batch, within a budget of nodes, resumed in mid-epoch."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest

from support.paths import ROOT
from support.strategies import epoch_of

pytest.importorskip("torch")
pytest.importorskip("torch_geometric")

import torch
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.loader import DataLoader

from gpusampler import CostBudget, PatchBatchSampler

pytestmark = pytest.mark.slow("imports torch_geometric, and starts workers")

BUDGET = 40
"""Nodes of a batch."""


class Molecules(InMemoryDataset):
    """Molecules of the pages; a graph says which row it is."""

    def __init__(self) -> None:
        super().__init__()
        data = np.load(ROOT / "docs" / "data" / "molecules.npz")
        starts = data["offsets"][1:-1].tolist()
        positions = torch.from_numpy(data["positions"]).tensor_split(starts)
        graphs = [
            Data(pos=part, num_nodes=len(part), row=row, patch_ids=len(part))
            for row, part in enumerate(positions)
        ]
        self.data, self.slices = self.collate(graphs)


def sampler_of(sizes: object, seed: int | None = 42) -> PatchBatchSampler:
    return PatchBatchSampler(sizes, CostBudget(BUDGET, cost=lambda size: size), seed=seed)


def rows_of(batch: Data) -> list[int]:
    """The rows of a batch, after a check that its graphs have one size, and fit."""
    assert batch.ptr.diff().unique().numel() == 1
    assert batch.num_nodes <= BUDGET
    return batch.row.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_an_epoch_goes_on_exactly_in_its_middle(num_workers, shuffled):
    torch.manual_seed(0)
    dataset = Molecules().shuffle() if shuffled else Molecules()
    order = [graph.row.item() for graph in dataset]
    assert (order == sorted(order)) != shuffled
    settings = {"num_workers": num_workers}
    settings |= {"multiprocessing_context": "fork"} if num_workers else {}

    def loader_of(sampler):
        return DataLoader(dataset, batch_sampler=sampler, **settings)

    sampler = sampler_of(dataset)  # its `patch_ids`, of a shuffled view too
    epochs = [
        [[order[row] for row in batch] for batch in epoch_of(sampler_of(dataset), epoch)]
        for epoch in range(3)
    ]
    sizes = [graph.num_nodes for graph in dataset]
    assert epoch_of(sampler_of(sizes), 1) == epoch_of(sampler, 1)
    assert list(map(rows_of, loader_of(sampler))) == epochs[0]
    done = []
    for step, batch in enumerate(loader_of(sampler), start=1):
        done.append(rows_of(batch))
        if step == 9:
            state = json.loads(json.dumps(sampler.state_dict(step=step)))
            break
    resumed = sampler_of(dataset, seed=None)
    resumed.load_state_dict(state)
    done += map(rows_of, loader_of(resumed))
    assert done == epochs[1]
    assert sorted(chain.from_iterable(done)) == list(range(len(dataset)))
    assert list(map(rows_of, loader_of(resumed))) == epochs[2]


def test_sizes_from_before_a_shuffle_mix_the_batches():
    # The page's trap: the loader's dataset, not the one that it was made of, says the sizes.
    torch.manual_seed(0)
    dataset = Molecules()
    loader = DataLoader(dataset.shuffle(), batch_sampler=sampler_of(dataset))
    assert any(batch.ptr.diff().unique().numel() > 1 for batch in loader)
