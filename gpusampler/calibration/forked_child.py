"""Run a function in a forked child so that an out-of-memory error cannot kill the parent.

The function need not be pickled, and whatever it changes in memory is changed in the child alone.
Linux only.
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
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any, TypeVar

from gpusampler.core import devices, memory

T = TypeVar("T")

HANG_TIMEOUT = 60.0
"""Seconds without any work on a processor after which a child is taken to wait for ever."""

POLL_INTERVAL = 0.02
"""Seconds between two looks at what a child takes."""

MALLOC_THRESHOLD = 1 << 16
"""Bytes from which the child's malloc maps a block of its own, which goes back when it is freed."""

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_PR_SET_PDEATHSIG = 1
_CRASH_SIGNALS = ("SIGABRT", "SIGBUS", "SIGSEGV")
_HOST_TEXTS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


class StepTraceback(Exception):
    """The traceback of an error in a child, as text: the cause of the error that is raised here."""

    def __str__(self) -> str:
        """Return the text, from a line of its own."""
        return f"\n{self.args[0]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, the host's or a device's.

    Examples
    --------
    >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("std::bad_alloc"))
    (True, True)
    >>> is_out_of_memory(RuntimeError("shapes differ"))
    False
    """
    # torch says it of the host in words only, and so does what it is made of.
    message = str(error).lower()
    return devices.is_out_of_memory(error) or (
        isinstance(error, (RuntimeError, OSError)) and any(text in message for text in _HOST_TEXTS)
    )


def check_platform() -> None:
    """Raise RuntimeError where there are no children whose peak can be told."""
    if sys.platform != "linux" or not os.access(memory.PROC / "self" / "clear_refs", os.W_OK):
        raise RuntimeError(
            "calibrate must run on Linux, with /proc/self/clear_refs, to measure a step on the "
            f"CPU, got {sys.platform}; give CostBudget a max_cost of your own"
        )


def call_in_child(
    function: Callable[[], T], memory_limit: int | None = None, *, release_freed: bool = True
) -> tuple[bool, T | None]:
    """Call a function in a forked child of this process.

    Parameters
    ----------
    function : callable
        What it returns is pickled.
    memory_limit : int, optional
        Bytes that the child may hold, with what this process holds already. Allocations beyond
        fail; if it comes to hold more all the same, it is killed.
    release_freed : bool
        Let malloc give back at once what is freed. False: leave it as this process has it.

    Returns
    -------
    (bool, object)
        False and None if memory ran out, else True and what ``function`` returned.

    Raises
    ------
    BaseException
        What ``function`` raises, with the child's traceback as its cause.
    RuntimeError
        If the child ended by itself, or waits for something that never comes.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(
        target=_run_child, args=(function, memory_limit, release_freed, sender, os.getpid())
    )
    _start(child)
    try:
        sender.close()
        answer, peak = _wait_for_answer(receiver, child, memory_limit)
        child.join()
    finally:
        child.kill()
        child.join()
        receiver.close()
    if answer:
        status, result = pickle.loads(answer)
        if isinstance(status, BaseException):
            raise status from StepTraceback(result)
        return status, result
    exitcode = child.exitcode
    assert exitcode is not None
    name = signal.Signals(-exitcode).name if exitcode < 0 else ""
    # Libraries that do not look whether they were given memory end by one of these signals.
    is_crash = memory_limit is not None and peak > memory_limit // 2 and name in _CRASH_SIGNALS
    if name == "SIGKILL" or is_crash:
        return False, None
    ending = f"by {name}" if name else f"with exit status {exitcode}"
    raise RuntimeError(f"step ended the child process that measures it, {ending}, and said nothing")


def _start(child: BaseProcess) -> None:
    process = multiprocessing.current_process()
    is_daemon = process.daemon
    with warnings.catch_warnings():
        # Python warns of threads, as their locks stay locked; a child that waits for one is told.
        warnings.filterwarnings("ignore", r".*use of fork\(\)", DeprecationWarning)
        # Daemonic processes may not start children, which could outlive them; this child cannot.
        process.daemon = False
        try:
            child.start()
        finally:
            process.daemon = is_daemon


def _wait_for_answer(
    receiver: Connection, child: BaseProcess, memory_limit: int | None
) -> tuple[bytes, int]:
    """Wait until a child answers or ends; kill it if it takes too much.

    Returns
    -------
    (bytes, int)
        What it has sent, if anything, and the most bytes that it was seen to hold.

    Raises
    ------
    RuntimeError
        If it does nothing for `HANG_TIMEOUT` seconds.
    """
    assert child.pid is not None
    peak, last_ticks, last_active = 0, -1, monotonic()
    while not receiver.poll(POLL_INTERVAL):
        ticks = _cpu_ticks(child.pid)
        if ticks != last_ticks:
            last_ticks, last_active = ticks, monotonic()
        peak = max(peak, memory.resident_bytes(child.pid) or 0)
        if memory_limit is not None and peak > memory_limit:
            child.kill()
        elif monotonic() - last_active > HANG_TIMEOUT:
            raise RuntimeError(
                f"step has done nothing for {HANG_TIMEOUT:.0f} s in the child process that "
                "measures it: it waits for a thread, a lock or another rank that is not there. "
                "calibrate before threads are started and ranks are joined, with a model that is "
                "not wrapped in DDP"
            )
    try:
        return receiver.recv_bytes(), peak
    except (EOFError, OSError):
        return b"", peak


def _cpu_ticks(process: int) -> int:
    """Return the time that a process and its own children have worked, in ticks."""
    with suppress(OSError):
        fields = (memory.PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))
    return 0


def _run_child(
    function: Callable[[], Any],
    memory_limit: int | None,
    release_freed: bool,
    sender: Connection,
    parent: int,
) -> None:
    """Send what a function returns or raises, and end without a handler or thread of the parent."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        _configure_child(parent, release_freed)
        if memory_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (_data_limit(memory_limit, limits), limits[1]))
        try:
            result: Any = function()
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, limits)
        answer = pickle.dumps((True, result))
    except BaseException as error:
        answer = pickle.dumps((False, None)) if is_out_of_memory(error) else _pack_error(error)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    sender.send_bytes(answer)
    os._exit(0)


def _configure_child(parent: int, release_freed: bool) -> None:
    """Make this process one that is measured well, and goes before its parent does."""
    library = ctypes.CDLL(None)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
    # If memory runs out all the same, the kernel takes this process and not the parent.
    with suppress(OSError):
        (memory.PROC / "self" / "oom_score_adj").write_text("1000")
    # The kernel counts pages on each processor, and adds up now and then: on one, it is exact.
    with suppress(OSError):
        os.sched_setaffinity(0, {library.sched_getcpu()})
    # Not every C library has them; peaks are less alike from run to run then.
    if release_freed and hasattr(library, "mallopt"):
        for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            library.mallopt(setting, MALLOC_THRESHOLD)
        library.mallopt(_M_TOP_PAD, 0)
    if devices.loaded_module("torch") is not None:
        import torch

        # Threads of the parent's pool are not there; torch would wait for them.
        torch.set_num_threads(1)
    # What is there by now is not looked through for garbage, which would copy all of it.
    gc.freeze()
    release_freed_memory()


def release_freed_memory() -> None:
    """Give what was freed back to the system, also what is still held in a circle."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def high_water_mark(reset: bool = False) -> int:
    """Return the most bytes that this process has held, since that was last reset."""
    if reset:
        (memory.PROC / "self" / "clear_refs").write_text("5")
    return memory.peak_resident_bytes() or 0


def _data_limit(memory_limit: int, limits: tuple[int, int]) -> int:
    """Return the limit of private memory with which a process holds at most ``memory_limit``."""
    private = memory.kernel_field(memory.PROC / "self" / "status", "VmData") or 0
    data_limit = max(private, private + memory_limit - (memory.resident_bytes() or 0))
    return min([data_limit, *(limit for limit in limits if limit >= 0)])


def _pack_error(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        answer = pickle.dumps((error, text))
        pickle.loads(answer)
    except Exception:
        # Errors with arguments of their own often cannot be made again from what is pickled.
        described = RuntimeError(f"step raised {type(error).__name__}: {error}")
        answer = pickle.dumps((described, text))
    return answer
