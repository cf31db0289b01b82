"""A rank's shard of an epoch, and the passes over it that have begun."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import length_hint
from typing import Any, NamedTuple

import numpy as np

from gpusampler.core.arrays import Int64
from gpusampler.core.log import calling_module
from gpusampler.core.tracing import Recorder
from gpusampler.plan.epoch_plan import EpochPlan

STATEFUL_LOADER = "torchdata.stateful_dataloader"
"""Its modules ask for a sampler's state, but resume from that of its iterator."""


class RankShard(NamedTuple):
    """A rank's part of a plan's epoch, from a global slot on.

    ``repeats_count``: whether a batch counts if it is repeated only to give all ranks the same
    number of batches. ``recorder``: records the time that the batches take.
    """

    plan: EpochPlan
    epoch: int
    slot: int
    steps: int
    num_replicas: int
    rank: int
    repeats_count: bool
    recorder: Recorder

    def slots(self, start: int, stop: int) -> Int64:
        """Return the global slots of steps start .. stop - 1; they may exceed the epoch's last."""
        step = np.arange(start, stop, dtype=np.int64)
        return self.slot + step * self.num_replicas + self.rank

    def slot_after(self, steps: int) -> int:
        """Return the global slot after ``steps`` steps, or the number of slots if none is left."""
        total = self.plan.num_batches
        return total if steps >= self.steps else min(self.slot + steps * self.num_replicas, total)

    def after(self, steps: int) -> RankShard:
        """Return the part that remains after ``steps`` steps."""
        if steps == 0:
            return self
        slot = self.slot + steps * self.num_replicas
        return self._replace(slot=slot, steps=self.steps - steps)


class EpochPass:
    """A pass over a shard that has begun, and how far it is. It outlives its iterator.

    ``iterator`` draws from the pass. Batches that have been read wait in a list iterator, which
    knows how many of them remain, so that nothing is counted per batch. Batches that a reader has
    prefetched do not count as read.
    """

    def __init__(self, shard: RankShard, iterator: Any) -> None:
        self.shard = shard
        self._iterator: Callable[[], Any] = weakref.ref(iterator)
        self.num_read = 0
        self.waiting: Iterator[Any] = iter(())
        self._drawn_before_next: int | None = None

    @property
    def num_drawn(self) -> int:
        """Number of batches drawn from the iterator."""
        return self.num_read - length_hint(self.waiting)

    @property
    def iterator(self) -> Any:
        """The iterator; None if it no longer exists."""
        return self._iterator()

    @property
    def is_running(self) -> bool:
        """Whether batches remain, and the iterator still exists."""
        return self.num_drawn < self.shard.steps and self.iterator is not None

    def note_next(self) -> None:
        """Note that another pass begins."""
        if self._drawn_before_next is None:
            self._drawn_before_next = self.num_drawn

    @property
    def has_outlasted_next(self) -> bool:
        """Whether batches were drawn after another pass had begun."""
        return self._drawn_before_next is not None and self.num_drawn > self._drawn_before_next

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the iterator: a copy of a pass belongs to none, as its tracker has no pass."""
        return {**self.__dict__, "_iterator": _no_iterator}


def _no_iterator() -> None:
    """Stand for the reference to an iterator in the copy of a pass."""


def pass_to_save(passes: Sequence[EpochPass], step: int | None) -> EpochPass:
    """Return which of at least one pass, in the order of their beginnings, a state is asked of.

    It is the one that is running, among those from which ``step`` batches were drawn. A pass whose
    iterator is gone was a look at a few batches if an earlier pass goes on. Raise RuntimeError if
    several passes are running.
    """
    if step is not None:
        passes = [each for each in passes if each.num_drawn >= step] or passes[-1:]
    running = [each for each in passes if each.is_running]
    if len(running) > 1:
        if calling_module().startswith(STATEFUL_LOADER):
            return running[-1]
        # Iterators that are gone may be kept by reference cycles.
        gc.collect()
        running = [each for each in running if each.is_running]
    if len(running) > 1:
        listed = " and ".join(
            f"epoch {each.shard.epoch} ({each.num_drawn} batches drawn)" for each in running
        )
        raise RuntimeError(
            f"state_dict() cannot tell which pass to save: passes over {listed} are running. "
            "Delete the iterator that is no longer used, as in `del iterator`, or call "
            "sampler.set_epoch(epoch) before each pass, which ends those before it."
        )
    outlasting = [each for each in passes if each.has_outlasted_next]
    return (running or outlasting or passes[-1:])[0]
