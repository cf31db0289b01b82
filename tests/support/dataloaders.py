"""Datasets and loaders of the tests in which a loader of torch or torchdata holds the sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from torch.utils.data import DataLoader, Dataset, get_worker_info

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


starts_workers = pytest.mark.slow("each start of workers takes half a second")


def loader_kinds(*kinds: str, quick: tuple[str, ...] = ("none",)) -> list[Any]:
    """Kinds of loaders as parameters, by default all; those that are not ``quick`` are slow."""
    marks = {kind: [] if kind in quick else [starts_workers] for kind in kinds or LOADERS}
    return [pytest.param(kind, marks=marks[kind]) for kind in marks]


def loader_of(dataset: Dataset, sampler: Any, kind: type = DataLoader, **settings: Any) -> Any:
    """A loader of a kind; workers are forked where nothing else is said, which is quick."""
    if settings.get("num_workers"):
        settings.setdefault("multiprocessing_context", "fork")
    return kind(dataset, batch_sampler=sampler, **settings)


def rows_of(batch: dict[str, Any], worker: bool) -> list[int]:
    """The rows of a batch, after a check of who fetched it and that it is of one patch."""
    assert batch["worker"].tolist() == [worker] * len(batch["row"])
    assert len(set(batch["patch_id"].tolist())) == 1
    return batch["row"].tolist()


def epoch_of(sampler: Any, epoch: int) -> list[list[int]]:
    """This rank's batches of an epoch, by a way round the loader."""
    return [batch.indices.tolist() for batch in sampler.batches(epoch)]
