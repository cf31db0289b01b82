"""torch's DataLoader: the same epochs whoever fetches the samples."""

from __future__ import annotations

from itertools import chain, islice

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from gpusampler import PatchBatchSampler
from support.dataloaders import (
    IDS,
    LOADERS,
    BlockRows,
    Rows,
    epoch_of,
    loader_kinds,
    loader_of,
    rows_of,
)
from support.strategies import through_json


@pytest.mark.parametrize("loader", loader_kinds(quick=("none", "two")))
def test_five_epochs_are_the_same_with_any_workers(loader):
    settings = LOADERS[loader]
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(Rows(), sampler, **settings)
    for epoch in range(5):
        assert sampler.epoch == epoch
        assert len(loaded) == len(sampler)
        actual = [rows_of(batch, bool(settings)) for batch in loaded]
        assert actual == epoch_of(sampler, epoch)
        assert sorted(chain.from_iterable(actual)) == list(range(IDS.size))


def test_spawned_workers_give_the_same_epochs():
    # The dataset travels by pickle, and the sampler with it.
    dataset = Rows()
    dataset.sampler = sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(
        dataset, sampler, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
    )
    for epoch in range(2):
        assert [rows_of(batch, True) for batch in loaded] == epoch_of(sampler, epoch)


@pytest.mark.parametrize("loader", loader_kinds("none", "two"))
@pytest.mark.parametrize(
    ("output", "kind"), [("list", list), ("numpy", np.ndarray), ("tensor", torch.Tensor)]
)
def test_blocks_of_rows_are_fetched_by_array(output, kind, loader):
    settings = LOADERS[loader]
    dataset = BlockRows(kind)
    sampler = PatchBatchSampler(dataset, 4, seed=5, output=output)
    loaded = loader_of(dataset, sampler, **settings)
    for epoch in range(2):
        actual = [rows_of(batch, bool(settings)) for batch in loaded]
        assert actual == epoch_of(PatchBatchSampler(IDS, 4, seed=5), epoch)


@pytest.mark.parametrize("loader", loader_kinds())
def test_a_pass_that_is_left_ends_its_epoch(loader):
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(Rows(), sampler, **LOADERS[loader])
    for epoch in (0, 1):
        begun = iter(loaded)
        assert rows_of(next(begun), bool(LOADERS[loader])) == epoch_of(sampler, epoch)[0]
        assert sampler.epoch == epoch + 1
        del begun
    assert [rows_of(b, bool(LOADERS[loader])) for b in loaded] == epoch_of(sampler, 2)


@pytest.mark.parametrize("loader", loader_kinds())
def test_set_epoch_between_passes(loader):
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(Rows(), sampler, **LOADERS[loader])
    for epoch in (3, 3, 0):
        sampler.set_epoch(epoch)
        assert [rows_of(b, bool(LOADERS[loader])) for b in loaded] == epoch_of(sampler, epoch)


@pytest.mark.parametrize("loader", loader_kinds(quick=("none", "eager")))
@pytest.mark.parametrize("step", [1, 9, 19, 20])
def test_resuming_by_step_in_spite_of_prefetching(loader, step):
    # Stopped twice in the second epoch, each time after the steps that training has done.
    settings = LOADERS[loader]
    expected = [
        batch for epoch in (1, 2) for batch in epoch_of(PatchBatchSampler(IDS, 4, seed=5), epoch)
    ]
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    list(sampler)
    drawn = []
    for steps in (step, 3):
        begun = iter(loader_of(Rows(), sampler, **settings))
        batches = list(islice(begun, steps))
        drawn += [rows_of(batch, bool(settings)) for batch in batches]
        state = through_json(sampler.state_dict(step=len(batches)))
        if settings and len(drawn) < 19:
            # What a loader with workers has drawn is not what was trained on.
            assert sampler.state_dict()["slot"] > state["slot"]
        del begun
        sampler = PatchBatchSampler(Rows(), 4)
        sampler.load_state_dict(state)
    loaded = loader_of(Rows(), sampler, **settings)
    while len(drawn) < 40:
        drawn += [rows_of(batch, bool(settings)) for batch in loaded]
    assert drawn == expected


@pytest.mark.parametrize("loader", loader_kinds())
def test_the_state_before_the_first_step_is_the_epochs_start(loader):
    # The loader has drawn ahead, and training has done nothing.
    settings = LOADERS[loader]
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    begun = iter(loader_of(Rows(), sampler, **settings))
    state = through_json(sampler.state_dict(step=0))
    del begun
    resumed = PatchBatchSampler(Rows(), 4)
    resumed.load_state_dict(state)
    assert [rows_of(b, bool(settings)) for b in loader_of(Rows(), resumed, **settings)] == epoch_of(
        PatchBatchSampler(IDS, 4, seed=5), 0
    )


@pytest.mark.parametrize("loader", loader_kinds())
def test_a_loader_and_its_workers_go_on_in_place_after_a_load(loader):
    # Going back to a state in the same process: nothing of the pass that was left comes through.
    settings = LOADERS[loader]
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(Rows(), sampler, **settings)
    begun = iter(loaded)
    list(islice(begun, 6))
    state = sampler.state_dict(step=4)
    list(islice(begun, 5))
    del begun
    for _ in range(2):
        sampler.load_state_dict(state)
        assert [rows_of(b, bool(settings)) for b in loaded] == epoch_of(sampler, 0)[4:]
    assert [rows_of(b, bool(settings)) for b in loaded] == epoch_of(sampler, 1)


def test_ranks_through_loaders_share_the_epoch_out():
    epoch_batches = epoch_of(PatchBatchSampler(IDS, 4, seed=5), 0)
    actual = []
    for rank in range(2):
        sampler = PatchBatchSampler(Rows(), 4, seed=5, num_replicas=2, rank=rank)
        actual.append([rows_of(batch, False) for batch in loader_of(Rows(), sampler)])
    assert [batch for step in zip(*actual, strict=True) for batch in step][
        : len(epoch_batches)
    ] == epoch_batches
