"""EpochIterator: yields the batches of an epoch and knows its position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import length_hint
from typing import Any, Generic, Protocol, TypeVar

from gpusampler.core.tracing import HAND_OUT
from gpusampler.sampler.passes import EpochPass, RankShard
from gpusampler.sampler.state import EpochTracker

T = TypeVar("T")


class Reader(Protocol[T]):
    """Source of the batches of an `EpochIterator`."""

    def read(self) -> list[T] | None:
        """Return the next batches; None after the last."""


class EpochIterator(Iterator[T], Generic[T]):
    """Iterator over a rank's batches of one epoch.

    The iterator binds its epoch and start position when the first batch is drawn, because a
    DataLoader calls ``iter`` more often than it draws batches. Its ``state_dict`` and the sampler's
    are interchangeable. Only one thread at a time may draw from it.
    """

    def __init__(
        self,
        tracker: EpochTracker,
        make_reader: Callable[[RankShard], Reader[T]],
        epoch: int | None = None,
    ) -> None:
        self._tracker = tracker
        self._make_reader = make_reader
        self._pass: EpochPass | None = None
        if epoch is not None:
            # A pass over an explicit epoch leaves the tracker's epoch alone.
            self._pass = EpochPass(tracker.shard_of(epoch), self)
        self._reader: Reader[T] | None = None
        self._unwatched: Iterator[T] = iter(())
        # While a profile is active, batches wait here instead, so that each one is timed.
        self._watched: Iterator[T] = iter(())
        self._recorder = tracker.recorder
        self._hand_out_range = tracker.recorder.range(HAND_OUT)

    def __iter__(self) -> EpochIterator[T]:
        return self

    def __next__(self) -> T:
        for batch in self._unwatched:
            return batch
        return self._refill()

    def __len__(self) -> int:
        """Return the number of batches that remain on this rank."""
        if self._pass is None:
            return self._tracker.pending_shard().steps
        return self._pass.shard.steps - self._pass.num_drawn

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the state after ``step`` batches of this iterator; default: after those drawn.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is not an integer, negative, or more than the batches drawn.
        """
        if self._pass is None:
            return self._tracker.pending_state(step)
        return self._tracker.state_of(self._pass, step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state of the sampler or of one of its iterators.

        Raises
        ------
        TypeError, ValueError
            As `PatchBatchSampler.load_state_dict` does.
        """
        self._pass = self._tracker.bind_state(self, state)
        self._reader = None
        self._unwatched = self._watched = iter(())

    def observe_each_batch(self) -> None:
        """Return batches that are ready one by one from now on, so that a profile can time each."""
        if length_hint(self._unwatched):
            self._unwatched, self._watched = iter(()), self._unwatched

    def _refill(self) -> T:
        """Return the next batch; read more batches if none is ready."""
        bound = self._pass
        drawn = 0 if bound is None else bound.num_drawn
        if bound is not None and drawn == bound.shard.steps:
            raise StopIteration
        try:
            with self._hand_out_range:
                if self._pass is None:
                    self._pass = self._tracker.bind(self)
                if not length_hint(self._watched):
                    self._watched = self._pass.waiting = iter(self._read(self._pass))
                watcher = self._recorder.watcher
                if watcher is None:
                    self._unwatched, self._watched = self._watched, iter(())
                    return next(self._unwatched)
                watcher.batches += 1
                return next(self._watched)
        except BaseException:
            # Ctrl-C may come anywhere, and a reader may fail half-way. What was read but not
            # returned is read again.
            self._reader = None
            self._unwatched = self._watched = iter(())
            self._recorder.close_ranges()
            if self._pass is None:
                self._pass = self._tracker.pass_of(self)
            if self._pass is not None:
                self._pass.num_read, self._pass.waiting = drawn, self._watched
            raise

    def _read(self, epoch_pass: EpochPass) -> list[T]:
        if self._reader is None:
            # Every kind of pass begins here, also one over an explicit epoch or a loaded state.
            self._tracker.check_ranks()
            self._reader = self._make_reader(epoch_pass.shard.after(epoch_pass.num_read))
            self._recorder.iterators.add(self)
        batches = self._reader.read()
        if batches is None:
            raise StopIteration
        epoch_pass.num_read += len(batches)
        self._recorder.batches += len(batches)
        return batches
