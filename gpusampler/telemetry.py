"""What the package says while it works: ranges that are timed, bars, and a logger for print.

A `Range` stands around whole blocks of work, never around a single batch, so it is always on. It
has the same name in ``torch.profiler`` and NVTX, where those are on.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from time import perf_counter, time
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

logger = logging.getLogger("gpusampler")
"""Says at level INFO what was made, read or gone on with; silent unless the program listens."""

T = TypeVar("T")

BAR_AFTER = 1.0
"""Seconds after which a bar is shown."""

LOAD_IDS, GROUP, EVALUATE, TRANSFER, HAND_OUT = (
    "load_ids",
    "group",
    "evaluate",
    "transfer",
    "hand_out",
)
RANGES = (LOAD_IDS, GROUP, EVALUATE, TRANSFER, HAND_OUT)
"""What a sampler's time goes to; profilers show them as "gpusampler.evaluate" and so on."""


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


def warn(text: str) -> None:
    """Warn the line that called the package, from however deep inside it."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == __package__


class Watch(Protocol):
    """Who looks at every range while it lasts: a profile."""

    batches: int
    """Batches handed out; iterators count them."""

    def entered(self) -> float:
        """Return the time at which an outermost range begins."""

    def leaving(self, name: str) -> None:
        """Be told that a range is about to end."""

    def left(self, now: float) -> None:
        """Be told that an outermost range has ended."""


class Holds(Protocol):
    """Who hands batches out by a path that nobody sees, until it is told to stop doing so."""

    def hold(self) -> None:
        """Hand the batches that are ready out one by one."""


class _Open(threading.local):
    """The ranges that a thread is in: [start, seconds of ranges inside, how to end it]."""

    def __init__(self) -> None:
        self.frames: list[list[Any]] = []


class Range:
    """Part of a `Recorder`: a context that counts its calls and its own time.

    Attributes
    ----------
    name : str
    calls : int
    seconds : float
        Without those of the ranges inside it.
    """

    __slots__ = ("_label", "_recorder", "calls", "name", "seconds")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self.name = name
        self.calls = 0
        self.seconds = 0.0
        self._label = f"gpusampler.{name}"
        self._recorder = recorder

    def __enter__(self) -> None:
        recorder = self._recorder
        frames = recorder._open.frames
        watch = recorder.watch
        start = perf_counter() if watch is None or frames else watch.entered()
        frames.append([start, 0.0, _shown(self._label)])

    def __exit__(self, *error: object) -> None:
        recorder = self._recorder
        frames = recorder._open.frames
        start, inside, end = frames.pop()
        watch = recorder.watch
        if watch is not None:
            watch.leaving(self.name)
        if end is not None:
            end()
        now = perf_counter()
        took = now - start
        self.calls += 1
        self.seconds += took - inside
        if frames:
            frames[-1][1] += took
        elif watch is not None:
            watch.left(now)


class Recorder:
    """Where a sampler's time goes. A copy, such as a worker's, counts from nothing.

    Attributes
    ----------
    batches : int
        Made so far.
    watch : Watch or None
        A profile, while it lasts.
    iterators : set of Holds
        Those that have begun and are still alive.

    Examples
    --------
    >>> recorder = Recorder()
    >>> with recorder.range(HAND_OUT):
    ...     with recorder.range(EVALUATE):
    ...         pass
    >>> [(row.name, row.calls) for row in recorder.ranges if row.calls]
    [('evaluate', 1), ('hand_out', 1)]
    """

    def __init__(self) -> None:
        self.batches = 0
        self.watch: Watch | None = None
        self.iterators: WeakSet[Holds] = WeakSet()
        self._ranges = {name: Range(self, name) for name in RANGES}
        self._open = _Open()

    @property
    def ranges(self) -> Iterable[Range]:
        """All ranges, in the order of `RANGES`."""
        return self._ranges.values()

    def range(self, name: str) -> Range:
        """Return a range by its name: the same one every time."""
        return self._ranges[name]

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        """Travel as an empty one."""
        return Recorder, ()


def _shown(label: str) -> Callable[[], object] | None:
    """Begin a range in the profilers that are on; return how to end it, None where none is."""
    ends: list[Callable[[], object]] = []
    if _torch_records():
        from torch.autograd.profiler import record_function

        shown = record_function(label)
        shown.__enter__()
        ends.append(lambda: shown.__exit__(None, None, None))
    marks = _nvtx()
    if marks is not None:
        push, pop = marks
        push(label)
        ends.append(pop)
    if not ends:
        return None
    # Those begun last end first.
    return lambda: [end() for end in reversed(ends)]


def _torch_records() -> bool:
    """Whether a profiler of torch is on; ``emit_nvtx`` is one, and makes NVTX ranges itself."""
    autograd = sys.modules.get("torch.autograd")
    enabled = getattr(autograd, "_profiler_enabled", None)
    return enabled is not None and bool(enabled())


_marks: list[tuple[Callable[[str], Any], Callable[[], Any]] | None] = []
"""How NVTX ranges are made in this process, once that has been found out."""


def _nvtx() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    """Return what begins and ends an NVTX range, None where nobody has asked for them."""
    if not _marks:
        # Nsight Systems and Compute set the first for the programs that they start.
        asked = os.environ.get("NVTX_INJECTION64_PATH") or os.environ.get("GPUSAMPLER_NVTX") == "1"
        _marks.append(_found_nvtx() if asked else None)
    return _marks[0]


def _found_nvtx() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    # Counted, which initialises no CUDA: the process may fork yet.
    if torch is not None and torch.cuda.device_count() > 0:
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    with suppress(Exception):
        if cupy is not None and cupy.cuda.is_available():
            return cupy.cuda.nvtx.RangePush, cupy.cuda.nvtx.RangePop
    try:
        import nvtx
    except ImportError:
        logger.info("NVTX ranges were asked for, but there is none of torch, cupy and nvtx")
        return None
    return nvtx.push_range, nvtx.pop_range
