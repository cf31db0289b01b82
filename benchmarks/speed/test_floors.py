"""What batches cost at the least, and what ours cost.

In every sampler, the indices must be gathered from the samples sorted by patch into memory,
and be yielded: as a view of an array, or as a list of Python integers. Each of these is timed on
indices that were drawn beforehand, so a floor holds no arithmetic of a shuffle and no bookkeeping.
Ours is timed in turn with it, over the same batches, in C where the package was compiled;
GPUSAMPLER_NATIVE=0 before the command has NumPy evaluate it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import pytest

from benchmarks.peers.cases import Case
from benchmarks.peers.peer import Work
from benchmarks.peers.samplers.restated import UNGROUPED
from benchmarks.timing import drain
from gpusampler import PatchBatchSampler

SAMPLES = 2_000_000
PATCHES = 1000
SIZES = (8, 64, 1024)
ROUNDS = 5
PARTS = ("write", "gather", "views", "tolist", "next", "ungrouped")
CHUNK = 1 << 15
"""Indices treated at once: as many as a second-level cache holds, which is what we do, too."""


class Floors:
    """The least work on a sampler's first epoch, a part at a time."""

    def __init__(self, ids: np.ndarray, batch_size: int) -> None:
        self.ids, self.batch_size = ids, batch_size
        self.order = np.argsort(ids, kind="stable").astype(np.int32)
        batches = list(PatchBatchSampler(ids, batch_size, seed=0, output="numpy"))
        self.samples = np.concatenate(batches)
        place = np.empty(ids.size, np.int64)
        place[self.order] = np.arange(ids.size)
        self.places = place[self.samples]
        self.lists = [batch.tolist() for batch in batches]
        self.torchs = UNGROUPED.make(Work(ids, ids, batch_size), 0)
        self.scratch = np.empty(CHUNK, np.int64)

    def _chunks(self) -> Iterable[slice]:
        return (slice(i, i + CHUNK) for i in range(0, self.samples.size, CHUNK))

    def write(self) -> None:
        """Write the indices once, into memory that is used again."""
        for rows in self._chunks():
            part = self.samples[rows]
            np.copyto(self.scratch[: part.size], part)

    def gather(self) -> None:
        """Look the samples up in the order by patch, and write them as int64."""
        for rows in self._chunks():
            np.take(self.order, self.places[rows]).astype(np.int64)

    def next(self) -> None:
        """Yield lists that exist already."""
        drain(iter(self.lists))

    def views(self) -> None:
        """Cut the indices into one view per batch, and yield these."""
        for table in self._tables():
            drain(iter(list(table)))

    def tolist(self) -> None:
        """Make one list of integers per batch, and yield these."""
        for table in self._tables():
            drain(iter(table.tolist()))

    def ungrouped(self) -> None:
        """Torch's own batches, which group nothing: no floor, but the usual way to make lists."""
        drain(self.torchs)

    def numpy_floor(self) -> None:
        self.gather()
        self.views()

    def list_floor(self) -> None:
        self.gather()
        self.tolist()

    def _tables(self) -> Iterable[np.ndarray]:
        """Chunks of the indices as rows of one length, which are cut and made in one call.

        Batches that are short make it a little more, so this is a floor of theirs, too.
        """
        rows = CHUNK // self.batch_size
        whole = self.samples[: self.samples.size // self.batch_size * self.batch_size]
        table = whole.reshape(-1, self.batch_size)
        return (table[first : first + rows] for first in range(0, len(table), rows))


@lru_cache(1)
def floors_of(samples: int, size: int) -> Floors:
    return Floors(Case(samples, PATCHES, size).ids(), size)


# The size comes first: floors are kept from test to test.
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", SIZES)
def test_part(benchmark, scaled, part, size):
    floors = floors_of(scaled(SAMPLES), size)
    benchmark.extra_info |= {"samples": floors.samples.size, "batches": len(floors.lists)}
    benchmark.pedantic(getattr(floors, part), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("output", ["numpy", "list"])
@pytest.mark.parametrize("size", SIZES)
def test_above_the_floor(against, benchmark, scaled, output, size):
    floors = floors_of(scaled(SAMPLES), size)
    ours = PatchBatchSampler(floors.ids, size, seed=0, output=output)
    yielding, floor = {
        "numpy": ("a view a batch", floors.numpy_floor),
        "list": ("lists of int", floors.list_floor),
    }[output]
    benchmark.extra_info["samples"] = floors.samples.size
    against(f"epoch as {output} of {size}", lambda: drain(ours), f"gather, {yielding}", floor)
