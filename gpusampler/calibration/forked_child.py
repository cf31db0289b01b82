"""Run a function in a forked child so that an out-of-memory error cannot kill the parent.

The function need not be picklable, and its changes to memory stay in the child. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any, BinaryIO, TypeVar

from gpusampler.core import devices, memory

T = TypeVar("T")

HANG_TIMEOUT = 60.0
"""Seconds without CPU time after which a child counts as hanging."""

POLL_INTERVAL = 0.02
"""Seconds between two checks of a child's memory."""

MALLOC_THRESHOLD = 1 << 16
"""Bytes from which the child's malloc uses mmap, so that a freed block returns to the system."""

_LENGTH_BYTES = 8
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_PR_SET_PDEATHSIG = 1
_CRASH_SIGNALS = ("SIGABRT", "SIGBUS", "SIGSEGV")
_HOST_TEXTS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


class StepTraceback(Exception):
    """Text of a child's traceback; the cause of the error that the parent raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that host or device memory has run out."""
    # For host memory, torch and its libraries report this only in the message.
    message = str(error).lower()
    return devices.is_out_of_memory(error) or (
        isinstance(error, (RuntimeError, OSError)) and any(text in message for text in _HOST_TEXTS)
    )


def check_platform() -> None:
    """Raise RuntimeError if the peak memory of a child cannot be measured."""
    if sys.platform != "linux" or not os.access(memory.PROC / "self" / "clear_refs", os.W_OK):
        raise RuntimeError(
            "calibrate can measure a CPU step only on Linux with a writable /proc/self/clear_refs "
            f"(platform: {sys.platform}). Choose max_cost yourself and pass it to CostBudget."
        )


def call_in_child(
    function: Callable[[], T], memory_limit: int | None = None, *, release_freed: bool = True
) -> tuple[bool, T | None]:
    """Call a function in a forked child; return (True, result), or (False, None) if out of memory.

    The result is pickled. ``memory_limit`` (bytes) includes the memory that this process already
    uses: allocations beyond it fail, and a child that exceeds it anyway is killed. With
    ``release_freed``, the child's malloc returns freed memory immediately. An error of ``function``
    is raised here, with the child's traceback as its cause. If the child ends without an answer or
    hangs, RuntimeError is raised.
    """
    context = multiprocessing.get_context("fork")
    # A file, not a pipe: processes that step starts would keep a pipe open after the child's end.
    with open(os.memfd_create("answer"), "w+b") as answer:
        child = context.Process(
            target=_run_child, args=(function, memory_limit, release_freed, answer, os.getpid())
        )
        _start(child)
        try:
            peak = _wait_for_end(child, memory_limit)
        finally:
            child.kill()
            child.join()
        answer.seek(0)
        length = int.from_bytes(answer.read(_LENGTH_BYTES), "little")
        packed = answer.read()
    # A child that is killed while it writes leaves a part of an answer.
    if packed and len(packed) == length:
        status, result = pickle.loads(packed)
        if isinstance(status, BaseException):
            raise status from StepTraceback(result)
        return status, result
    exitcode = child.exitcode
    assert exitcode is not None
    name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    # Libraries that do not check for failed allocations end by one of these signals.
    is_crash = memory_limit is not None and peak > memory_limit // 2 and name in _CRASH_SIGNALS
    if name == "SIGKILL" or is_crash:
        return False, None
    ending = f"with signal {name}" if name else f"with exit status {exitcode}"
    raise RuntimeError(
        f"the child process that runs step ended {ending}, without a Python error: call step "
        "without calibrate() to find the cause"
    )


def _start(child: BaseProcess) -> None:
    process = multiprocessing.current_process()
    is_daemon = process.daemon
    with warnings.catch_warnings():
        # Python warns that locks of other threads stay locked. HANG_TIMEOUT covers that case.
        warnings.filterwarnings("ignore", r".*use of fork\(\)", DeprecationWarning)
        # Daemonic processes may not start children that could outlive them. This child cannot.
        process.daemon = False
        try:
            child.start()
        finally:
            process.daemon = is_daemon


def _wait_for_end(child: BaseProcess, memory_limit: int | None) -> int:
    """Wait until a child has ended, and return its peak resident bytes.

    Kill the child if it exceeds the limit; raise RuntimeError if it hangs.
    """
    assert child.pid is not None
    peak, last_ticks, last_active = 0, -1, monotonic()
    # `join` returns at the child's end, or later if step has started processes that still run.
    while child.exitcode is None:
        ticks = _cpu_ticks(child.pid)
        if ticks != last_ticks:
            last_ticks, last_active = ticks, monotonic()
        peak = max(peak, memory.resident_bytes(child.pid) or 0)
        if memory_limit is not None and peak > memory_limit:
            child.kill()
        elif monotonic() - last_active > HANG_TIMEOUT:
            raise RuntimeError(
                f"step used no CPU time for {HANG_TIMEOUT:.0f} s in its forked child process: it "
                "waits for a thread, a lock or a rank that the child does not have. Call "
                "calibrate() before starting threads or a process group, with a model that is not "
                "wrapped in DDP"
            )
        child.join(POLL_INTERVAL)
    return peak


def _cpu_ticks(process: int) -> int:
    """Return the CPU time of a process and its children, in clock ticks."""
    with suppress(OSError):
        fields = (memory.PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))
    return 0


def _run_child(
    function: Callable[[], Any],
    memory_limit: int | None,
    release_freed: bool,
    answer: BinaryIO,
    parent: int,
) -> None:
    """Write a function's result or error, and exit without the parent's exit handlers."""
    import resource

    process = os.getpid()
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        _configure_child(parent, release_freed)
        if memory_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (_data_limit(memory_limit, limits), limits[1]))
        try:
            result: Any = function()
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, limits)
        packed = pickle.dumps((True, result))
    except BaseException as error:
        packed = pickle.dumps((False, None)) if is_out_of_memory(error) else _pack_error(error)
    if os.getpid() != process:
        # A process that the function forked has returned from it, too. It has no answer.
        os._exit(0)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    answer.write(len(packed).to_bytes(_LENGTH_BYTES, "little") + packed)
    answer.flush()
    os._exit(0)


def _configure_child(parent: int, release_freed: bool) -> None:
    """Set up this process for exact measurement, and to die with its parent."""
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    # If system memory runs out anyway, the kernel kills this process, not the parent.
    with suppress(OSError):
        (memory.PROC / "self" / "oom_score_adj").write_text("1000")
    # The kernel counts pages per CPU and sums them only occasionally: on one CPU it is exact.
    with suppress(OSError):
        os.sched_setaffinity(0, {library.sched_getcpu()})
    # Not every C library has mallopt; without it, peaks vary more between runs.
    if release_freed and hasattr(library, "mallopt"):
        for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            library.mallopt(setting, MALLOC_THRESHOLD)
        library.mallopt(_M_TOP_PAD, 0)
    if devices.loaded_module("torch") is not None:
        import torch

        # The threads of the parent's pool do not exist here; torch would wait for them.
        torch.set_num_threads(1)
    # Exclude existing objects from garbage collection, which would copy their memory pages.
    gc.freeze()
    release_freed_memory()


def release_freed_memory() -> None:
    """Return freed memory to the system, including that of reference cycles."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def high_water_mark(reset: bool = False) -> int:
    """Return the peak resident bytes of this process since the last reset."""
    if reset:
        (memory.PROC / "self" / "clear_refs").write_text("5")
    return memory.peak_resident_bytes() or 0


def _data_limit(memory_limit: int, limits: tuple[int, int]) -> int:
    """Return the RLIMIT_DATA that keeps resident memory within ``memory_limit``."""
    private = memory.kernel_field(memory.PROC / "self" / "status", "VmData") or 0
    data_limit = max(private, private + memory_limit - (memory.resident_bytes() or 0))
    return min([data_limit, *(limit for limit in limits if limit >= 0)])


def _pack_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        answer = pickle.dumps((error, text))
        pickle.loads(answer)
    except Exception:
        # Exceptions with custom constructor arguments often cannot be unpickled.
        described = RuntimeError(f"step raised {type(error).__name__}: {error}")
        answer = pickle.dumps((described, text))
    return answer
