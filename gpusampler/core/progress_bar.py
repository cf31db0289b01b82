"""Progress bars, shown only where work takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from time import time
from typing import Any

from gpusampler.core.tracing import T

BAR_AFTER = 1.0
"""Seconds after which a bar is shown."""


class Bar:
    """Counts what is done, and shows a bar of tqdm's once that has taken more than a second.

    tqdm is made then and not before: each process in which it is made once has a thread of its and
    a semaphore from there on, and one that has threads should not fork, as DataLoaders do.

    Parameters
    ----------
    total : int
    what, unit : str
        What is counted.
    progress : bool
        False: no bar. No bar either where standard error is no terminal.
    """

    def __init__(self, total: int, what: str, unit: str, progress: bool) -> None:
        self._look = {"total": total, "desc": what, "unit": f" {unit}", "unit_scale": True}
        self._wanted = progress and _on_terminal()
        self._began = time()
        self._done = 0
        self._shown: Any = None

    def __enter__(self) -> Bar:
        """Return itself."""
        return self

    def update(self, done: int) -> None:
        """Count some more."""
        if not self._wanted:
            return
        self._done += done
        if self._shown is None:
            if time() - self._began < BAR_AFTER:
                return
            from tqdm import tqdm

            self._shown = tqdm(**self._look)
            # So that what is shown as the time taken, and what is left, count from the start.
            self._shown.start_t = self._shown.last_print_t = self._began
            done = self._done
        self._shown.update(done)

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it is."""
        if self._shown is not None:
            self._shown.close()


def over(items: Sequence[T], what: str, unit: str, progress: bool) -> Iterator[T]:
    """Iterate over items under a `Bar` that counts them."""
    with Bar(len(items), what, unit, progress) as shown:
        for item in items:
            yield item
            shown.update(1)


def _on_terminal() -> bool:
    # None in a program that has no console.
    return sys.stderr is not None and sys.stderr.isatty()
