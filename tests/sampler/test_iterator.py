"""EpochIterator: what it returns when it is interrupted."""

from __future__ import annotations

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchTensorLoader
from support.interrupts import InterruptedAt
from support.strategies import quiet

IDS = np.arange(9000) % 7


def sampler_of(**settings) -> PatchBatchSampler:
    return quiet(IDS, **{"batch_size": 4, "seed": 3, **settings})


def loader_of(**settings) -> PatchTensorLoader:
    return PatchTensorLoader(sampler_of(**settings), row=np.arange(IDS.size))


def file_loader_of(**settings) -> PatchTensorLoader:
    """A loader whose rows a thread reads, as from a file, some batches ahead."""
    rows = np.arange(IDS.size).view(np.memmap)
    return PatchTensorLoader(sampler_of(**settings), read_ahead_bytes=1 << 15, row=rows)


def indices_of(batch) -> list[int]:
    for name in ("indices", "row"):
        if hasattr(batch, name) or (isinstance(batch, dict) and name in batch):
            batch = getattr(batch, name, None) if hasattr(batch, name) else batch[name]
    return np.asarray(batch).tolist()


@pytest.mark.parametrize(
    "passes",
    [
        lambda: iter(sampler_of()),
        lambda: iter(sampler_of(output="numpy")),
        lambda: iter(sampler_of(interleave=False, partial="pad")),
        lambda: sampler_of(num_replicas=2, rank=1).batches(),
        lambda: sampler_of().batches(epoch=0),
        lambda: iter(loader_of()),
        lambda: iter(file_loader_of()),
    ],
    ids=["lists", "arrays", "in a row", "of a rank", "of an epoch", "tensors", "files"],
)
def test_an_interrupted_iterator_goes_on_where_it_was(passes):
    expected = [indices_of(batch) for batch in passes()]
    iterator = passes()
    delivered = []
    event, is_complete = 0, False
    while not is_complete:
        # At every call that reads a block, and later among batches that are ready.
        event += 1
        with InterruptedAt(event):
            try:
                for batch in iterator:
                    delivered.append(indices_of(batch))
                is_complete = True
            except KeyboardInterrupt:
                pass
        assert len(iterator) == len(expected) - len(delivered)
        # A range that stays open would count the time of all that follows.
        assert not iterator._recorder._open_ranges.frames
    assert delivered == expected
    assert event > 50
