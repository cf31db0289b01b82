"""DataLoader workers that are spawned: a dataset that holds the sampler takes it along."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from itertools import islice

from gpusampler import PatchBatchSampler
from support.dataloaders import IDS, Rows, epoch_of, loader_of


class Holding(Rows):
    """Rows, with what the sampler says and would hand out in the worker."""

    def __init__(self, sampler: PatchBatchSampler):
        self.sampler = sampler

    def __getitem__(self, i):
        row = super().__getitem__(i)
        state = self.sampler.state_dict()
        return {
            **row,
            # The last is how many batches it would hand out.
            "place": (state["epoch"], state["slot"], state["seed"], len(iter(self.sampler))),
            "first": self.sampler.plan.evaluate(9, [4]).indices[0],
        }


def taken_along(batches) -> tuple[list, list]:
    """The batches' rows, and where the sampler was in each worker."""
    rows, places = [], set()
    for batch in batches:
        assert batch["worker"].all()
        rows.append(batch["row"].tolist())
        places.add(tuple(part[0].item() for part in batch["place"]))
        assert batch["first"][0].tolist() == epoch_of(PatchBatchSampler(IDS, 4, seed=5), 9)[4]
    return rows, sorted(places)


@pytest.mark.slow("spawned workers import torch anew")
def test_a_sampler_in_the_dataset_is_spawned_along_in_the_middle_of_an_epoch():
    before = PatchBatchSampler(IDS, 4, seed=5)
    list(islice(before, 7))
    sampler = PatchBatchSampler(IDS, 4)
    sampler.load_state_dict(before.state_dict())

    def spawned(workers: int):
        return loader_of(
            Holding(sampler), sampler, num_workers=workers, multiprocessing_context="spawn"
        )

    rows, places = taken_along(spawned(2))
    assert rows == epoch_of(before, 0)[7:]
    assert places == [(0, 7, 5, 13)]
    # The pass before is over, but its iterator is still the sampler's last.
    begun = iter(spawned(1))
    rows, places = taken_along(islice(begun, 3))
    assert rows == epoch_of(before, 1)[:3]
    assert places == [(1, 0, 5, 20)]
    # What the workers did with theirs is none of this one's business.
    assert sampler.state_dict(step=3)["slot"] == 3
    del begun
