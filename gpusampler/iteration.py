"""Handing out an epoch's batches: blocks are evaluated ahead, batches leave one by one."""

from __future__ import annotations

from collections.abc import Iterator
from operator import length_hint
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from gpusampler import arrays
from gpusampler.plan import EpochPlan, RaggedBlock
from gpusampler.state import Progress, Share
from gpusampler.tables import Located

FIRST_LANES = 1 << 9
MOST_LANES = 1 << 15
"""Indices evaluated at once. The first batch comes at once; later ones come in blocks that spread
the overhead and still lie in cache when they are made into lists."""

FIRST_SLOTS = 8
MOST_SLOTS = 1 << 13
"""Slots looked up at once; far cheaper than their indices, so further ahead."""

T = TypeVar("T")


class Batch(NamedTuple):
    """One batch.

    Attributes
    ----------
    patch_id : int
        Patch of all its samples.
    indices : int64 array, shape (size,)
        On the sampler's device.
    valid : int
        How many of them count; the rest, under ``partial="pad"``, fills the batch up.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([7, 7, 7], 2, seed=0, partial="pad")
    >>> [(batch.patch_id, len(batch.indices), batch.valid) for batch in sampler.batches(epoch=1)]
    [(7, 2, 2), (7, 2, 1)]
    """

    patch_id: int
    indices: Any
    valid: int


class EpochIterator(Iterator[T], Generic[T]):
    """Iterator over a rank's batches of one epoch.

    The epoch, and where in it to start, are bound when the first batch is drawn (a DataLoader
    calls ``iter`` more often than it draws). It has a ``state_dict`` of its own, interchangeable
    with the sampler's. One thread at a time may draw from it.
    """

    def __init__(self, progress: Progress, output: str, epoch: int | None = None) -> None:
        self._progress = progress
        self._output = output
        # A pass over a given epoch is nobody else's business.
        self._share: Share | None = None if epoch is None else progress.share(epoch, 0)
        self._at: Located | None = None
        self._ends = np.zeros(0, np.int64)
        self._row = 0
        self._looked_up = 0
        self._lanes = 0
        self._ready: Iterator[T] = iter(())

    def __iter__(self) -> EpochIterator[T]:
        """Return itself."""
        return self

    def __next__(self) -> T:
        """Return the next batch."""
        for batch in self._ready:
            return batch
        return self._refill()

    def __len__(self) -> int:
        """Return the number of batches that remain on this rank."""
        if self._share is None:
            return self._progress.pending().steps
        return self._share.steps - self._steps_done

    @property
    def _steps_done(self) -> int:
        # A list iterator knows what it still holds, so nothing is counted batch by batch.
        ahead = 0 if self._at is None else self._at.group.size - self._row
        return self._looked_up - ahead - length_hint(self._ready)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the state after ``step`` batches of this iterator, or those drawn.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is no integer or negative.
        """
        if self._share is None:
            return self._progress.pending_state(step)
        return self._progress.state_after(self._share, self._steps_done if step is None else step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the sampler or of one of its iterators.

        Raises
        ------
        TypeError, ValueError
            As `PatchBatchSampler.load_state_dict` does.
        """
        self._share = self._progress.bind_state(self, state)
        self._at, self._row, self._looked_up, self._lanes = None, 0, 0, 0
        self._ready = iter(())

    def _refill(self) -> T:
        """Evaluate some more of the batches that have been looked up."""
        if self._share is None:
            self._share = self._progress.bind(self)
        at = self._at
        if at is None or self._row == at.group.size:
            at = self._look_up(self._share)
        # Each block is as large as all before it, up to the most, and a batch at least.
        before = int(self._ends[self._row - 1]) if self._row else 0
        most = before + min(max(FIRST_LANES, self._lanes), MOST_LANES)
        stop = max(self._row + 1, int(np.searchsorted(self._ends, most, side="right")))
        block = self._share.plan.batches_at(self._share.epoch, at.rows(slice(self._row, stop)))
        self._row = stop
        self._lanes += int(self._ends[stop - 1]) - before
        self._ready = iter(_SPLITTERS[self._output](self._share.plan, block))
        return next(self._ready)

    def _look_up(self, share: Share) -> Located:
        """Find out which batches the next slots of this rank are."""
        left = share.steps - self._looked_up
        if left <= 0:
            self._ready = iter(())
            raise StopIteration
        steps = min(left, max(FIRST_SLOTS, min(self._looked_up, MOST_SLOTS)))
        step = np.arange(self._looked_up, self._looked_up + steps, dtype=np.int64)
        slots = share.slot + step * self._progress.num_replicas + self._progress.rank
        if int(slots[-1]) >= share.plan.num_batches:
            slots %= share.plan.num_batches
        self._at = share.plan.locate(share.epoch, slots)
        self._ends = np.cumsum(self._at.size)
        self._row = 0
        self._looked_up += steps
        return self._at


def _as_lists(plan: EpochPlan, block: RaggedBlock) -> list[list[int]]:
    samples = arrays.to_numpy(block.samples)
    starts, sizes = block.starts, block.sizes
    size = int(sizes[0])
    if bool((sizes == size).all()):
        rows: list[list[int]] = samples.reshape(-1, size).tolist()
        if bool((starts[1:] > starts[:-1]).all()):
            return rows
        return [rows[place] for place in (starts // size).tolist()]
    flat: list[int] = samples.tolist()
    ends = (starts + sizes).tolist()
    return [flat[start:end] for start, end in zip(starts.tolist(), ends, strict=True)]


def _views(samples: Any, block: RaggedBlock) -> list[Any]:
    ends = (block.starts + block.sizes).tolist()
    return [samples[start:end] for start, end in zip(block.starts.tolist(), ends, strict=True)]


def _as_numpy(plan: EpochPlan, block: RaggedBlock) -> list[Any]:
    return _views(arrays.to_numpy(block.samples), block)


def _as_tensors(plan: EpochPlan, block: RaggedBlock) -> list[Any]:
    # Each has memory of its own: a tensor that is sent to a worker takes its whole storage along.
    views = _views(arrays.to_numpy(block.samples), block)
    return [arrays.tensor_from_numpy(view.copy()) for view in views]


def _as_batches(plan: EpochPlan, block: RaggedBlock) -> list[Batch]:
    samples = arrays.to_device(block.samples, plan.device)
    patch_ids = plan.groups.patch_ids[block.groups].tolist()
    return list(map(Batch, patch_ids, _views(samples, block), block.lengths.tolist()))


_SPLITTERS: dict[str, Any] = {
    "list": _as_lists,
    "numpy": _as_numpy,
    "tensor": _as_tensors,
    "batch": _as_batches,
}
