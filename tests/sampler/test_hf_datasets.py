"""Hugging Face datasets in a DataLoader that holds the sampler, resumed in mid-epoch."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest

from support.strategies import epoch_of

pytest.importorskip("torch")
pytest.importorskip("datasets")

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from gpusampler import PatchBatchSampler, read_patch_ids

pytestmark = pytest.mark.slow("imports datasets, and starts workers")

IDS = np.random.default_rng(3).permutation(np.repeat([4, 1, 8, 30], [25, 6, 40, 2]))


def table_of(view: str) -> Dataset:
    columns = {"row": range(IDS.size), "patch": IDS.tolist(), "x": np.sqrt(range(IDS.size))}
    table = Dataset.from_dict(columns)
    if view == "shuffled":
        return table.shuffle(seed=1).with_format("torch")
    if view == "selected":
        return table.select(range(0, IDS.size, 2)).with_format("torch")
    return table.with_format("torch")


def rows_of(batch: dict) -> list[int]:
    assert batch["x"].dtype == torch.float32
    assert batch["patch"].unique().numel() == 1
    return batch["row"].tolist()


@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("view", ["whole", "shuffled", "selected"])
def test_an_epoch_goes_on_exactly_in_its_middle(view, num_workers, output):
    dataset = table_of(view)
    settings = {"num_workers": num_workers}
    settings |= {"multiprocessing_context": "fork"} if num_workers else {}

    def sampler_of(seed=None):
        return PatchBatchSampler(read_patch_ids(dataset, "patch"), 4, seed=seed, output=output)

    def loader_of(sampler):
        return DataLoader(dataset, batch_sampler=sampler, **settings)

    order = [int(row) for row in dataset["row"]]
    epochs = [
        [[order[i] for i in batch] for batch in epoch_of(sampler_of(seed=7), epoch)]
        for epoch in range(2)
    ]
    sampler, done = sampler_of(seed=7), []
    for step, batch in enumerate(loader_of(sampler), start=1):
        done.append(rows_of(batch))
        if step == 5:
            state = json.loads(json.dumps(sampler.state_dict(step=step)))
            break
    resumed = sampler_of()
    resumed.load_state_dict(state)
    done += map(rows_of, loader_of(resumed))
    assert done == epochs[0]
    assert sorted(chain.from_iterable(done)) == sorted(order)
    assert list(map(rows_of, loader_of(resumed))) == epochs[1]


def test_ids_from_before_a_shuffle_mix_the_batches():
    sampler = PatchBatchSampler(read_patch_ids(table_of("whole"), "patch"), 4, seed=7)
    loader = DataLoader(table_of("shuffled"), batch_sampler=sampler)
    assert any(batch["patch"].unique().numel() > 1 for batch in loader)


def test_a_stream_takes_no_batch_sampler():
    stream = table_of("whole").to_iterable_dataset()
    sampler = PatchBatchSampler(IDS, 4, seed=7)
    with pytest.raises(ValueError, match="unspecified batch_sampler"):
        DataLoader(stream, batch_sampler=sampler)
