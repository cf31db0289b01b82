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
    progress : EpochTracker
    begin : callable
        Makes the reader of a share of an epoch.
    epoch : int, optional
        Default: the next one.
    """

    def __init__(
        self,
        progress: EpochTracker,
        begin: Callable[[RankShard], Reader[T]],
        epoch: int | None = None,
    ) -> None:
        self._progress = progress
        self._begin = begin
        # A pass over a given epoch is nobody else's business.
        self._share: RankShard | None = None if epoch is None else progress.share_of(epoch)
        self._reader: Reader[T] | None = None
        self._taken = 0
        self._ready: Iterator[T] = iter(())
        # While a profile lasts, batches wait here instead, so that each is seen.
        self._held: Iterator[T] = iter(())
        self._recorder = progress.recorder
        self._handing_out = progress.recorder.range(HAND_OUT)

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
        # A list iterator knows what it still holds, so nothing is counted batch by batch; what a
        # reader has evaluated beyond it, or has on its way, has not been taken.
        return self._taken - length_hint(self._ready) - length_hint(self._held)

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
        self._reader = None
        self._taken = 0
        self._ready = self._held = iter(())

    def hold(self) -> None:
        """Hand the batches that are ready out one by one, while a profile lasts."""
        if length_hint(self._ready):
            self._ready, self._held = iter(()), self._ready

    def _refill(self) -> T:
        """Return the next batch that is held, or take more from the reader."""
        with self._handing_out:
            if self._share is None:
                self._share = self._progress.bind(self)
            if not length_hint(self._held):
                self._held = iter(self._read(self._share))
            watch = self._recorder.watch
            if watch is None:
                self._ready, self._held = self._held, iter(())
                return next(self._ready)
            watch.batches += 1
            return next(self._held)

    def _read(self, share: RankShard) -> list[T]:
        """Take the next batches from the reader."""
        if self._reader is None:
            self._reader = self._begin(share)
            self._recorder.iterators.add(self)
        batches = self._reader.read()
        if batches is None:
            raise StopIteration
        self._taken += len(batches)
        self._recorder.batches += len(batches)
        return batches
