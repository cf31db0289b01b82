"""torchdata.nodes: a sampler in a SamplerWrapper, saved and resumed."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torchdata")

from torchdata.nodes import Loader, ParallelMapper, Prefetcher, SamplerWrapper

from gpusampler import PatchBatchSampler
from support.strategies import epoch_of, make

NUM_BATCHES = 24


def pipeline(sampler: PatchBatchSampler, kind: str) -> Loader:
    node = SamplerWrapper(sampler, epoch_updater=lambda epoch: sampler.epoch)
    if kind == "threads":
        node = ParallelMapper(node, list, num_workers=2, method="thread")
    elif kind == "prefetched":
        node = Prefetcher(node, prefetch_factor=5)
    # As a loop over a Loader does: each `for` is a new epoch.
    return Loader(node, restart_on_stop_iteration=True)


@pytest.mark.parametrize("kind", ["plain", "threads", "prefetched"])
@pytest.mark.parametrize("num_done", [1, 10, NUM_BATCHES])
@pytest.mark.parametrize("first_epochs", [0, 2])
def test_a_loader_that_is_resumed_goes_on_exactly(kind, num_done, first_epochs):
    saved = pipeline(make(), kind)
    for epoch in range(first_epochs):
        assert list(saved) == epoch_of(make(), epoch)
    done = []
    for batch in saved:
        done.append(batch)
        if len(done) == num_done:
            state = json.loads(json.dumps(saved.state_dict()))
            break
    assert done == epoch_of(make(), first_epochs)[:num_done]
    resumed = pipeline(make(), kind)
    resumed.load_state_dict(state)
    epochs = [list(resumed) for _ in range(3)]
    if num_done < NUM_BATCHES:
        epochs[0] = done + epochs[0]
    # The state after the last batch leads to the next epoch.
    first = first_epochs + (num_done == NUM_BATCHES)
    assert epochs == [epoch_of(make(), first + more) for more in range(3)]


@pytest.mark.parametrize("kind", ["plain", "threads", "prefetched"])
def test_a_loader_that_is_saved_after_an_epoch_goes_on_with_the_next(kind):
    saved = pipeline(make(), kind)
    assert list(saved) == epoch_of(make(), 0)
    resumed = pipeline(make(), kind)
    resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    epochs = [list(resumed) for _ in range(3)]
    assert epochs == [epoch_of(make(), epoch) for epoch in (1, 2, 3)]
