"""Progress bars that appear only if work takes longer than a second."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from time import time
from typing import Any, TypeVar

T = TypeVar("T")
SHOW_AFTER_SECONDS = 1.0
"""Seconds after which a bar appears."""


class ProgressBar:
    """Shows a tqdm bar after a second, if ``progress`` is true and standard error is a terminal."""

    def __init__(self, total: int, label: str, unit: str, progress: bool) -> None:
        self._options = {"total": total, "desc": label, "unit": f" {unit}", "unit_scale": True}
        self._enabled = progress and _is_on_terminal()
        self._start = time()
        self._count = 0
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        """Return this bar."""
        return self

    def update(self, count: int) -> None:
        """Add ``count`` to the number of finished items."""
        if not self._enabled:
            return
        self._count += count
        if self._bar is None:
            if time() - self._start < SHOW_AFTER_SECONDS:
                return
            # Imported late: tqdm starts a thread, and a process with threads should not fork, as
            # a DataLoader does.
            from tqdm import tqdm

            self._bar = tqdm(**self._options)
            # Elapsed and remaining time count from the start of the work.
            self._bar.start_t = self._bar.last_print_t = self._start
            count = self._count
        self._bar.update(count)

    def __exit__(self, *error: object) -> None:
        """Close the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def iterate_with_bar(items: Sequence[T], label: str, unit: str, progress: bool) -> Iterator[T]:
    """Yield the items and count them on a `ProgressBar`."""
    with ProgressBar(len(items), label, unit, progress) as bar:
        for item in items:
            yield item
            bar.update(1)


def _is_on_terminal() -> bool:
    # sys.stderr is None in a program without a console.
    return sys.stderr is not None and sys.stderr.isatty()
