"""Progress bars, shown only where work takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from time import time
from typing import Any, TypeVar

T = TypeVar("T")
SHOW_AFTER_SECONDS = 1.0
"""Seconds after which a bar is shown."""


class ProgressBar:
    """Counts what is done, and shows a bar of tqdm's once that has taken more than a second.

    tqdm is made then and not before: each process in which it is made once has a thread of its and
    a semaphore from there on, and one that has threads should not fork, as DataLoaders do.

    Parameters
    ----------
    total : int
    label, unit : str
        What is counted.
    progress : bool
        False: no bar. No bar either where standard error is no terminal.
    """

    def __init__(self, total: int, label: str, unit: str, progress: bool) -> None:
        self._options = {"total": total, "desc": label, "unit": f" {unit}", "unit_scale": True}
        self._enabled = progress and _is_on_terminal()
        self._start = time()
        self._count = 0
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        """Return itself."""
        return self

    def update(self, count: int) -> None:
        """Count some more."""
        if not self._enabled:
            return
        self._count += count
        if self._bar is None:
            if time() - self._start < SHOW_AFTER_SECONDS:
                return
            from tqdm import tqdm

            self._bar = tqdm(**self._options)
            # So that what is shown as the time taken, and what is left, count from the start.
            self._bar.start_t = self._bar.last_print_t = self._start
            count = self._count
        self._bar.update(count)

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def iterate_with_bar(items: Sequence[T], label: str, unit: str, progress: bool) -> Iterator[T]:
    """Iterate over items under a `ProgressBar` that counts them."""
    with ProgressBar(len(items), label, unit, progress) as bar:
        for item in items:
            yield item
            bar.update(1)


def _is_on_terminal() -> bool:
    # None in a program that has no console.
    return sys.stderr is not None and sys.stderr.isatty()
