"""Named ranges of work that are timed, and shown in ``torch.profiler`` and NVTX if enabled.

Ranges are always on: they surround whole blocks of work, never a single batch.
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
"""Names of all ranges; profilers show them as "gpusampler.evaluate" and so on."""


class RangeWatcher(Protocol):
    """Observer of all ranges, such as an active profile."""

    batches: int
    """Number of yielded batches; iterators increase it."""

    def enter(self) -> float:
        """Return the time at which an outermost range begins."""

    def before_exit(self, name: str) -> None:
        """Called just before a range ends."""

    def after_exit(self, now: float) -> None:
        """Called after an outermost range has ended."""


class ProfiledIterator(Protocol):
    """Iterator with a fast path that a profile cannot observe, and a way to leave that path."""

    def observe_each_batch(self) -> None:
        """Take the slower path, which a profile can observe, for the remaining batches."""


class _OpenRanges(threading.local):
    """Open ranges of a thread, one list for each.

    A list is [start, seconds in nested ranges, function that ends the profiler range or None].
    """

    def __init__(self) -> None:
        self.frames: list[list[Any]] = []


class Range:
    """Context manager that counts its calls and its seconds without those of nested ranges."""

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
        end = None
        if _is_torch_profiling() or _nvtx_functions() is not None:
            end = _begin_profiler_range(self._label)
        frames.append([start, 0.0, end])

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
    """Records the time that a sampler spends in each range; a copy in a worker starts at zero.

    ``batches`` counts the batches made so far, ``watcher`` is the active profile or None, and
    ``iterators`` holds the iterators that have started and are still alive.

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

    def close_ranges(self) -> None:
        """Close the ranges of this thread that an interrupt has left open."""
        self._open_ranges.frames.clear()

    def range(self, name: str) -> Range:
        """Return the range of a name, always the same object."""
        return self._ranges[name]

    def __reduce__(self) -> tuple[type[Recorder], tuple[()]]:
        """Pickle as an empty recorder."""
        return Recorder, ()


def _begin_profiler_range(label: str) -> Callable[[], object]:
    """Begin a range in all active profilers, and return a function that ends the range."""
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
    return lambda: [end() for end in reversed(ends)]


def _is_torch_profiling() -> bool:
    """Whether a torch profiler is active, including ``emit_nvtx``, which makes NVTX ranges."""
    autograd = sys.modules.get("torch.autograd")
    enabled = getattr(autograd, "_profiler_enabled", None)
    return enabled is not None and bool(enabled())


@cache
def _nvtx_functions() -> tuple[Callable[[str], Any], Callable[[], Any]] | None:
    """Return functions that begin and end an NVTX range, or None if NVTX is not enabled."""
    # Nsight Systems and Nsight Compute set NVTX_INJECTION64_PATH for the programs they start.
    if not os.environ.get("NVTX_INJECTION64_PATH") and os.environ.get("GPUSAMPLER_NVTX") != "1":
        return None
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    # device_count() does not initialize CUDA, so the process can still fork.
    if torch is not None and torch.cuda.device_count() > 0:
        return torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    with suppress(Exception):
        if cupy is not None and cupy.cuda.is_available():
            return cupy.cuda.nvtx.RangePush, cupy.cuda.nvtx.RangePop
    try:
        import nvtx
    except ImportError:
        logger.info(
            "NVTX ranges were requested, but none of torch, cupy and nvtx can make them: "
            "pip install nvtx"
        )
        return None
    return nvtx.push_range, nvtx.pop_range
