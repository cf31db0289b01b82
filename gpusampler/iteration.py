"""Handing out an epoch's batches: blocks are evaluated ahead, batches leave one by one."""

from __future__ import annotations

from collections.abc import Iterator
from operator import length_hint
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from gpusampler import arrays
from gpusampler.plan import EpochPlan, Located, RaggedBlock

if TYPE_CHECKING:
    from gpusampler.sampler import PatchBatchSampler

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
    """

    patch_id: int
    indices: Any
    valid: int


class Share(NamedTuple):
    """A rank's part of an epoch from a global slot on."""

    slot: int
    num_replicas: int
    rank: int
    steps: int

    @classmethod
    def of(cls, slot: int, total: int, num_replicas: int, rank: int, uneven: str) -> Share:
        """Return the share from ``slot`` on: equally many steps on every rank."""
        left = max(total - slot, 0)
        steps = -(-left // num_replicas) if uneven == "pad" else left // num_replicas
        return cls(slot, num_replicas, rank, steps)

    def slot_after(self, steps: int, total: int) -> int:
        """Return the global slot after some steps; ``total`` once the share is done."""
        if steps >= self.steps:
            return total
        return min(self.slot + steps * self.num_replicas, total)


class EpochIterator(Iterator[T], Generic[T]):
    """Iterator over a rank's batches of one epoch.

    The epoch, and where in it to start, are bound when the first batch is drawn (a DataLoader
    calls ``iter`` more often than it draws). It has a ``state_dict`` of its own, interchangeable
    with the sampler's.
    """

    def __init__(self, sampler: PatchBatchSampler, output: str, epoch: int | None = None) -> None:
        self._sampler = sampler
        self._output = output
        self._fixed_epoch = epoch
        self._epoch = 0
        self._plan: EpochPlan = sampler.plan
        self._share: Share | None = None
        self._at: Located | None = None
        self._row = 0
        self._looked_up = 0
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
            slot = 0 if self._fixed_epoch is not None else self._sampler.pending_slot
            return self._sampler.share_from(slot).steps
        return self._share.steps - self._steps_done

    @property
    def _steps_done(self) -> int:
        # A list iterator knows what it still holds, so nothing is counted batch by batch.
        ahead = 0 if self._at is None else self._at.group.size - self._row
        return self._looked_up - ahead - length_hint(self._ready)

    def bind(self, epoch: int, slot: int) -> None:
        """Fix the epoch and the global slot to start at."""
        self._epoch = epoch
        self._plan = self._sampler.plan
        self._share = self._sampler.share_from(slot)
        self._at, self._row, self._looked_up = None, 0, 0
        self._ready = iter(())

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the sampler's state after ``step`` batches of this iterator, or those drawn."""
        if self._share is None:
            return self._sampler.state_dict(step)
        if step is None:
            step = self._steps_done
        slot = self._share.slot_after(step, self._plan.num_batches)
        return self._sampler.state_at(self._plan, self._epoch, slot)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the sampler or of one of its iterators.

        Raises
        ------
        TypeError, ValueError
            As `PatchBatchSampler.load_state_dict` does.
        """
        self._sampler.bind_loaded(self, state)

    def _refill(self) -> T:
        if self._share is None:
            if self._fixed_epoch is None:
                self._sampler.bind_next(self)
            else:
                self.bind(self._fixed_epoch, 0)
        at = self._at
        if at is None or self._row == at.group.size:
            at = self._look_up()
        width = self._plan.max_batch_size
        # Each block is as large as all before it, up to the most.
        done = self._looked_up - at.group.size + self._row
        lanes = min(max(FIRST_LANES, done * width), MOST_LANES)
        rows = slice(self._row, self._row + max(1, lanes // width))
        block = self._plan.batches_at(self._epoch, at.rows(rows))
        self._row += block.sizes.size
        self._ready = iter(_SPLITTERS[self._output](self._plan, block))
        return next(self._ready)

    def _look_up(self) -> Located:
        """Find out which batches the next slots of this rank are."""
        share, total = self._share, self._plan.num_batches
        assert share is not None
        left = share.steps - self._looked_up
        if left <= 0:
            self._ready = iter(())
            raise StopIteration
        steps = min(left, max(FIRST_SLOTS, min(self._looked_up, MOST_SLOTS)))
        step = np.arange(self._looked_up, self._looked_up + steps, dtype=np.int64)
        slots = share.slot + step * share.num_replicas + share.rank
        if int(slots[-1]) >= total:
            slots %= total
        self._at = self._plan.locate(self._epoch, slots)
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
    return _views(arrays.tensor_from_numpy(arrays.to_numpy(block.samples)), block)


def _as_batches(plan: EpochPlan, block: RaggedBlock) -> list[Batch]:
    samples = arrays.to_device(block.samples, plan.device)
    patch_ids = plan.groups.patch_ids[block.groups].tolist()
    views = _views(samples, block)
    return list(map(Batch, patch_ids, views, block.lengths.tolist()))


_SPLITTERS: dict[str, Any] = {
    "list": _as_lists,
    "numpy": _as_numpy,
    "tensor": _as_tensors,
    "batch": _as_batches,
}
