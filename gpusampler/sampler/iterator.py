"""EpochIterator: hands out the batches of an epoch one by one, and keeps its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import length_hint
from typing import Any, Generic, Protocol, TypeVar

from gpusampler.core.tracing import HAND_OUT
from gpusampler.sampler.state import EpochTracker, RankShard

T = TypeVar("T")


class Reader(Protocol[T]):
    """What an `EpochIterator` takes a rank's batches of one epoch from."""

    def read(self) -> list[T] | None:
        """Return the next batches, None after the last."""


class EpochIterator(Iterator[T], Generic[T]):
    """Iterator over a rank's batches of one epoch.

    The epoch, and where in it to start, are bound when the first batch is drawn (a DataLoader
    calls ``iter`` more often than it draws). It has a ``state_dict`` of its own, interchangeable
    with the sampler's. One thread at a time may draw from it.

    Parameters
    ----------
    tracker : EpochTracker
    make_reader : callable
        Makes the reader of a shard of an epoch.
    epoch : int, optional
        Default: the next one.
    """

    def __init__(
        self,
        tracker: EpochTracker,
        make_reader: Callable[[RankShard], Reader[T]],
        epoch: int | None = None,
    ) -> None:
        self._tracker = tracker
        self._make_reader = make_reader
        # A pass over a given epoch is nobody else's business.
        self._shard: RankShard | None = None if epoch is None else tracker.shard_of(epoch)
        self._reader: Reader[T] | None = None
        self._num_read = 0
        self._unwatched: Iterator[T] = iter(())
        # While a profile lasts, batches wait here instead, so that each is seen.
        self._watched: Iterator[T] = iter(())
        self._recorder = tracker.recorder
        self._hand_out_range = tracker.recorder.range(HAND_OUT)

    def __iter__(self) -> EpochIterator[T]:
        """Return itself."""
        return self

    def __next__(self) -> T:
        """Return the next batch."""
        for batch in self._unwatched:
            return batch
        return self._refill()

    def __len__(self) -> int:
        """Return the number of batches that remain on this rank."""
        if self._shard is None:
            return self._tracker.pending_shard().steps
        return self._shard.steps - self._num_returned

    @property
    def _num_returned(self) -> int:
        # A list iterator knows what it still holds, so nothing is counted batch by batch; what a
        # reader has evaluated beyond it, or has on its way, has not been taken.
        return self._num_read - length_hint(self._unwatched) - length_hint(self._watched)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the state after ``step`` batches of this iterator, or those drawn.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is no integer or negative.
        """
        if self._shard is None:
            return self._tracker.pending_state(step)
        return self._tracker.state_after(self._shard, self._num_returned if step is None else step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the sampler or of one of its iterators.

        Raises
        ------
        TypeError, ValueError
            As `PatchBatchSampler.load_state_dict` does.
        """
        self._shard = self._tracker.bind_state(self, state)
        self._reader = None
        self._num_read = 0
        self._unwatched = self._watched = iter(())

    def observe_each_batch(self) -> None:
        """Hand the batches that are ready out one by one, while a profile lasts."""
        if length_hint(self._unwatched):
            self._unwatched, self._watched = iter(()), self._unwatched

    def _refill(self) -> T:
        """Return the next batch that is held, or take more from the reader."""
        with self._hand_out_range:
            if self._shard is None:
                self._shard = self._tracker.bind(self)
            if not length_hint(self._watched):
                self._watched = iter(self._read(self._shard))
            watcher = self._recorder.watcher
            if watcher is None:
                self._unwatched, self._watched = self._watched, iter(())
                return next(self._unwatched)
            watcher.batches += 1
            return next(self._watched)

    def _read(self, shard: RankShard) -> list[T]:
        """Take the next batches from the reader."""
        if self._reader is None:
            self._reader = self._make_reader(shard)
            self._recorder.iterators.add(self)
        batches = self._reader.read()
        if batches is None:
            raise StopIteration
        self._num_read += len(batches)
        self._recorder.batches += len(batches)
        return batches
