"""A stopwatch whose phases add up to the total time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from time import perf_counter
from typing import Generic, TypeVar

T = TypeVar("T")


class Stopwatch:
    """Seconds per phase; the time of an inner phase is not part of the outer one.

    Examples
    --------
    >>> watch = Stopwatch()
    >>> with watch.phase("outer"), watch.phase("inner"):
    ...     pass
    >>> sorted(watch.seconds)
    ['inner', 'outer']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner_seconds: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a ``with`` block to a phase."""
        self._inner_seconds.append(0.0)
        start = perf_counter()
        try:
            yield
        finally:
            duration = perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + duration - self._inner_seconds.pop()
            if self._inner_seconds:
                self._inner_seconds[-1] += duration

    def shares(self) -> dict[str, float]:
        """Return the percentage of each phase in the total time, largest first."""
        total = sum(self.seconds.values())
        if total <= 0:
            raise ValueError("no phase has been timed: use phase() before shares()")
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {name: 100.0 * seconds / total for name, seconds in ordered}


class TimedIterable(Generic[T]):
    """An iterable, e.g. a batch sampler, whose iteration is timed as a phase of a stopwatch."""

    def __init__(self, iterable: Iterable[T], watch: Stopwatch, name: str) -> None:
        self._iterable = iterable
        self._watch = watch
        self._name = name

    def __len__(self) -> int:
        if not isinstance(self._iterable, Sized):
            raise TypeError(f"the iterable must have a length, got {self._iterable!r}")
        return len(self._iterable)

    def __iter__(self) -> Iterator[T]:
        steps = iter(self._iterable)
        while True:
            with self._watch.phase(self._name):
                try:
                    item = next(steps)
                except StopIteration:
                    return
            yield item
