"""torch's DataLoader: the same epochs whoever fetches the samples."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gpusampler import PatchBatchSampler

IDS = np.random.default_rng(3).permutation(np.repeat([4, 1, 8, 30], [25, 6, 40, 2]))


class Rows(Dataset):
    """Says which rows were asked for, how, and whether a worker was asked."""

    def __len__(self):
        return IDS.size

    def get_all_patch_ids(self):
        return IDS

    def __getitem__(self, i):
        assert type(i) is int
        return {"row": i, "patch_id": int(IDS[i]), "worker": get_worker_info() is not None}


class BlockRows(Rows):
    """Fetches a batch at a time, and wants an array."""

    def __init__(self, kind):
        self.kind = kind

    def __getitems__(self, rows):
        assert type(rows) is self.kind
        if self.kind is not list:
            assert str(rows.dtype).endswith("int64")
        return [Rows.__getitem__(self, int(row)) for row in rows]


LOADERS = {
    "none": {},
    "two": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
    "eager": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 16},
}


def loader_of(dataset, sampler, **settings):
    if settings.get("num_workers"):
        settings.setdefault("multiprocessing_context", "fork")
    return DataLoader(dataset, batch_sampler=sampler, **settings)


def rows_of(batch, worker: bool) -> list[int]:
    assert batch["worker"].tolist() == [worker] * len(batch["row"])
    assert len(set(batch["patch_id"].tolist())) == 1
    return batch["row"].tolist()


def epoch_of(sampler, epoch) -> list[list[int]]:
    return [batch.indices.tolist() for batch in sampler.batches(epoch)]


@pytest.mark.parametrize("loader", LOADERS)
def test_five_epochs_are_the_same_with_any_workers(loader):
    settings = LOADERS[loader]
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(Rows(), sampler, **settings)
    for epoch in range(5):
        assert sampler.epoch == epoch
        assert len(loaded) == len(sampler)
        found = [rows_of(batch, bool(settings)) for batch in loaded]
        assert found == epoch_of(sampler, epoch)
        assert sorted(chain.from_iterable(found)) == list(range(IDS.size))


def test_spawned_workers_give_the_same_epochs():
    # The dataset travels by pickle, and the sampler with it.
    dataset = Rows()
    dataset.sampler = sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(
        dataset, sampler, num_workers=1, multiprocessing_context="spawn", persistent_workers=True
    )
    for epoch in range(2):
        assert [rows_of(batch, True) for batch in loaded] == epoch_of(sampler, epoch)


@pytest.mark.parametrize("loader", ["none", "two"])
@pytest.mark.parametrize(
    ("output", "kind"), [("list", list), ("numpy", np.ndarray), ("tensor", torch.Tensor)]
)
def test_blocks_of_rows_are_fetched_by_array(output, kind, loader):
    settings = LOADERS[loader]
    dataset = BlockRows(kind)
    sampler = PatchBatchSampler(dataset, 4, seed=5, output=output)
    loaded = loader_of(dataset, sampler, **settings)
    for epoch in range(2):
        found = [rows_of(batch, bool(settings)) for batch in loaded]
        assert found == epoch_of(PatchBatchSampler(IDS, 4, seed=5), epoch)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pass_that_is_left_ends_its_epoch(loader):
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(Rows(), sampler, **LOADERS[loader])
    for epoch in (0, 1):
        begun = iter(loaded)
        assert rows_of(next(begun), bool(LOADERS[loader])) == epoch_of(sampler, epoch)[0]
        assert sampler.epoch == epoch + 1
        del begun
    assert [rows_of(b, bool(LOADERS[loader])) for b in loaded] == epoch_of(sampler, 2)


@pytest.mark.parametrize("loader", LOADERS)
def test_set_epoch_between_passes(loader):
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    loaded = loader_of(Rows(), sampler, **LOADERS[loader])
    for epoch in (3, 3, 0):
        sampler.set_epoch(epoch)
        assert [rows_of(b, bool(LOADERS[loader])) for b in loaded] == epoch_of(sampler, epoch)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("step", [1, 4, 7])
def test_resuming_by_step_in_spite_of_prefetching(loader, step):
    settings = LOADERS[loader]
    sampler = PatchBatchSampler(Rows(), 4, seed=5)
    list(loader_of(Rows(), sampler))
    begun = iter(loader_of(Rows(), sampler, **settings))
    seen = [rows_of(next(begun), bool(settings)) for _ in range(step)]
    state = sampler.state_dict(step=step)
    if settings:
        # What a loader with workers has drawn is not what was trained on.
        assert sampler.state_dict()["slot"] > step
    assert (state["epoch"], state["slot"]) == (1, step)
    resumed = PatchBatchSampler(Rows(), 4)
    resumed.load_state_dict(state)
    rest = [rows_of(b, bool(settings)) for b in loader_of(Rows(), resumed, **settings)]
    assert seen + rest == epoch_of(sampler, 1)
    del begun


def test_ranks_through_loaders_share_the_epoch_out():
    whole = epoch_of(PatchBatchSampler(IDS, 4, seed=5), 0)
    found = []
    for rank in range(2):
        sampler = PatchBatchSampler(Rows(), 4, seed=5, num_replicas=2, rank=rank)
        found.append([rows_of(batch, False) for batch in loader_of(Rows(), sampler)])
    assert [batch for step in zip(*found, strict=True) for batch in step][: len(whole)] == whole


@pytest.mark.filterwarnings("ignore:.*set_vital")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 9, 19])
def test_stateful_loader_resumes_exactly(workers, stop):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        sampler = PatchBatchSampler(Rows(), 4, seed=5)
        return sampler, stateful.StatefulDataLoader(
            Rows(), batch_sampler=sampler, num_workers=workers
        )

    sampler, loaded = make()
    total = len(sampler)
    assert stop < total == 20
    begun = iter(loaded)
    seen = [rows_of(next(begun), bool(workers)) for _ in range(stop)]
    state = loaded.state_dict()
    del begun
    other, resumed = make()
    resumed.load_state_dict(state)
    assert seen + [rows_of(b, bool(workers)) for b in resumed] == epoch_of(sampler, 0)
    assert [rows_of(b, bool(workers)) for b in resumed] == epoch_of(other, 1)
