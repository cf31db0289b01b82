"""Ranges of work that are timed, and shown in ``torch.profiler`` and NVTX where those are on.

A `Range` stands around whole blocks of work, never around a single batch, so it is always on.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from time import perf_counter
from typing import Any, Protocol
from weakref import WeakSet

from gpusampler.core.log import logger

LOAD_IDS, GROUP, EVALUATE, TRANSFER, HAND_OUT = (
    "load_ids",
    "group",
    "evaluate",
    "transfer",
    "hand_out",
)
RANGES = (LOAD_IDS, GROUP, EVALUATE, TRANSFER, HAND_OUT)
"""What a sampler's time goes to; profilers show them as "gpusampler.evaluate" and so on."""


class RangeWatcher(Protocol):
    """Who looks at every range while it lasts: a profile."""

    batches: int
    """Batches handed out; iterators count them."""

    def enter(self) -> float:
        """Return the time at which an outermost range begins."""

    def before_exit(self, name: str) -> None:
        """Be told that a range is about to end."""

    def after_exit(self, now: float) -> None:
        """Be told that an outermost range has ended."""


class ProfiledIterator(Protocol):
    """Who hands batches out by a path that nobody sees, until it is told to stop doing so."""

    def observe_each_batch(self) -> None:
        """Hand the batches that are ready out one by one."""


class _OpenRanges(threading.local):
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
        frames = recorder._open_ranges.frames
        watcher = recorder.watcher
        start = perf_counter() if watcher is None or frames else watcher.enter()
        frames.append([start, 0.0, _begin_profiler_range(self._label)])

    def __exit__(self, *error: object) -> None:
        recorder = self._recorder
        frames = recorder._open_ranges.frames
        start, nested_seconds, end = frames.pop()
        watcher = recorder.watcher
        if watcher is not None:
            watcher.before_exit(self.name)
        if end is not None:
            end()
        now = perf_counter()
        duration = now - start
        self.calls += 1
        self.seconds += duration - nested_seconds
        if frames:
            frames[-1][1] += duration
        elif watcher is not None:
            watcher.after_exit(now)


class Recorder:
    """Where a sampler's time goes. A copy, such as a worker's, counts from nothing.

    Attributes
    ----------
    batches : int
        Made so far.
    watcher : RangeWatcher or None
        A profile, while it lasts.
    iterators : set of ProfiledIterator
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
        self.watcher: RangeWatcher | None = None
        self.iterators: WeakSet[ProfiledIterator] = WeakSet()
        self._ranges = {name: Range(self, name) for name in RANGES}
        self._open_ranges = _OpenRanges()

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


def _begin_profiler_range(label: str) -> Callable[[], object] | None:
    """Begin a range in the profilers that are on; return how to end it, None where none is."""
    ends: list[Callable[[], object]] = []
    if _is_torch_profiling():
        from torch.autograd.profiler import record_function

        torch_range = record_function(label)
        torch_range.__enter__()
        ends.append(lambda: torch_range.__exit__(None, None, None))
    nvtx_functions = _nvtx_functions()
    if nvtx_functions is not None:
        push, pop = nvtx_functions
        push(label)
        ends.append(pop)
    if not ends:
        return None
    # Those begun last end first.
    return lambda: [end() for end in reversed(ends)]


def _is_torch_profiling() -> bool:
    """Whether a profiler of torch is on; ``emit_nvtx`` is one, and makes NVTX ranges itself."""
    autograd = sys.modules.get("torch.autograd")
    enabled = getattr(autograd, "_profiler_enabled", None)
    return enabled is not None and bool(enabled())


@cache
def _nvtx_functions() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    """Return what begins and ends an NVTX range, None where nobody has asked for them."""
    # Nsight Systems and Compute set the first for the programs that they start.
    if not os.environ.get("NVTX_INJECTION64_PATH") and os.environ.get("GPUSAMPLER_NVTX") != "1":
        return None
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
