"""SPDL: its loader for datasets and its pipeline, with batches in their order and without."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest

from support.strategies import epoch_of

pytest.importorskip("torch")
pytest.importorskip("spdl.dataloader")

from spdl.dataloader import get_pytorch_dataloader
from spdl.pipeline import PipelineBuilder

from gpusampler import PatchBatchSampler

pytestmark = pytest.mark.slow("starts processes of SPDL")

IDS = np.random.default_rng(3).permutation(np.repeat([4, 1, 8, 30], [25, 6, 40, 2]))
STEPS = 5


def sampler_of(seed: int | None = 7) -> PatchBatchSampler:
    return PatchBatchSampler(IDS, 4, seed=seed)


FIRST = set(epoch_of(sampler_of(), 0)[0])


class Rows:
    """Says which rows were asked for; those of the first batch come late."""

    patch_ids = IDS

    def __len__(self):
        return IDS.size

    def __getitems__(self, rows):
        time.sleep(0.5 if FIRST & set(rows) else 0.01)
        return rows


class Pipeline:
    """A pipeline that is made anew for every pass, as SPDL's own loaders do it."""

    def __init__(self, sampler, order):
        self.builder = (
            PipelineBuilder()
            .add_source(sampler)
            .pipe(Rows().__getitems__, concurrency=3, output_order=order)
            .add_sink(2)
        )

    def __iter__(self):
        pipeline = self.builder.build(num_threads=3)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()


def as_it_is(batch):
    return batch


def loader_of(kind, sampler, in_order):
    if kind == "pipeline":
        return Pipeline(sampler, "input" if in_order else "completion")
    return get_pytorch_dataloader(
        Rows(),
        batch_size=None,
        batch_sampler=sampler,
        collate_fn=as_it_is,
        num_workers=3,
        multiprocessing_context="forkserver",
        **({"in_order": True} if in_order else {}),
    )


def broken_off_and_resumed(kind, in_order):
    """An epoch by two samplers, and what the second one hands out after it."""
    sampler, resumed = sampler_of(), sampler_of(seed=None)
    drawn = list(islice(loader_of(kind, sampler, in_order), STEPS))
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict(step=STEPS))))
    loader = loader_of(kind, resumed, in_order)
    return drawn + list(loader), list(loader)


@pytest.mark.parametrize("kind", ["pipeline", "loader"])
def test_batches_in_order_go_on_exactly(kind):
    epoch, following = broken_off_and_resumed(kind, in_order=True)
    assert epoch == epoch_of(sampler_of(), 0)
    assert sorted(chain.from_iterable(epoch)) == list(range(IDS.size))
    assert following == epoch_of(sampler_of(), 1)


@pytest.mark.parametrize("kind", ["pipeline", "loader"])
def test_batches_as_they_are_done_lose_samples(kind):
    # The default. The first batch is late: it is not among those that were counted as done.
    epoch, _ = broken_off_and_resumed(kind, in_order=False)
    times = Counter(chain.from_iterable(epoch))
    assert FIRST.isdisjoint(times)
    assert sum(times.values()) == IDS.size
    assert max(times.values()) == 2


def test_the_loaders_own_batch_size_must_be_switched_off():
    with pytest.raises(ValueError, match="`batch_size` and `batch_sampler` are mutually exclusive"):
        get_pytorch_dataloader(Rows(), batch_sampler=sampler_of())
