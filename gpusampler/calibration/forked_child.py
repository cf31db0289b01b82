"""A piece of work done in a copy of this process, whose memory may run out without ours doing so.

The copy is made by ``fork``: functions and what they refer to need not be sent, and whatever the
work changes in memory is changed in the copy alone. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from select import select
from time import monotonic
from typing import Any, NoReturn

from gpusampler.core import devices, memory

HUNG_AFTER = 60.0
"""Seconds without any work on a processor after which a child is taken to wait for ever."""

LOOK_EVERY = 0.02
"""Seconds between two looks at what a child takes."""

BLOCK = 1 << 16
"""Bytes from which the child's malloc maps a block of its own, which goes back when it is freed."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_PR_SET_PDEATHSIG = 1
_FALLS = (signal.SIGABRT, signal.SIGBUS, signal.SIGSEGV)
_CPU_TEXTS = ("not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")


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
    text = str(error).lower()
    return devices.is_out_of_memory(error) or (
        isinstance(error, (RuntimeError, OSError)) and any(told in text for told in _CPU_TEXTS)
    )


def check_there() -> None:
    """Raise RuntimeError where there are no children whose peak can be told."""
    if sys.platform != "linux" or not os.access(memory.PROC / "self" / "clear_refs", os.W_OK):
        raise RuntimeError(
            "calibrate must run on Linux, with /proc/self/clear_refs, to measure a step on the "
            f"CPU, got {sys.platform}; give CostBudget a max_cost of your own"
        )


def call_in_child(
    work: Callable[[], Any], most: int | None = None, *, tidy: bool = True
) -> tuple[bool, Any]:
    """Call a function in a copy of this process.

    Parameters
    ----------
    work : callable
        What it returns is pickled.
    most : int, optional
        Bytes that the child may hold, with what this process holds already. Allocations beyond
        fail; if it comes to hold more all the same, it is killed.
    tidy : bool
        Let malloc give back at once what is freed. False: leave it as this process has it.

    Returns
    -------
    (bool, object)
        False and None if memory ran out, else True and what ``work`` returned.

    Raises
    ------
    BaseException
        What ``work`` raises, with the child's traceback as its cause.
    RuntimeError
        If the child ended by itself, or waits for something that never comes.
    """
    for stream in (sys.stdout, sys.stderr):
        # What is still to be written would be written twice.
        if stream is not None:
            stream.flush()
    reading, writing = os.pipe()
    parent = os.getpid()
    child = _fork()
    if child == 0:
        os.close(reading)
        _be_the_child(work, most, tidy, writing, parent)
    os.close(writing)
    ended = False
    try:
        answer, why, held = _wait(reading, child, most)
        status = os.waitpid(child, 0)[1]
        ended = True
    finally:
        os.close(reading)
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if answer:
        return _unpacked(answer)
    if why == "hung":
        raise RuntimeError(
            f"step has done nothing for {HUNG_AFTER:.0f} s in the child process that measures it: "
            "it waits for a thread, a lock or another rank that is not there. calibrate before "
            "threads are started and ranks are joined, with a model that is not wrapped in DDP"
        )
    code = os.waitstatus_to_exitcode(status)
    # Libraries that do not look whether they were given memory end as these do.
    fell = most is not None and held > most // 2 and -code in _FALLS
    if why == "too much" or -code == signal.SIGKILL or fell:
        return False, None
    by = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
    raise RuntimeError(f"step ended the child process that measures it, {by}, and said nothing")


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns of threads, as their locks stay locked; a child that waits for one is told.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _wait(reading: int, child: int, most: int | None) -> tuple[bytes, str, int]:
    """Wait until a child ends; kill it if it takes too much, or does nothing.

    Returns
    -------
    (bytes, str, int)
        What it has sent, why it was killed, and the most bytes that it was seen to hold.
    """
    answer: list[bytes] = []
    why, held = "", 0
    worked, since = -1, monotonic()
    while True:
        if select([reading], [], [], LOOK_EVERY)[0]:
            part = os.read(reading, 1 << 16)
            if not part:
                return b"".join(answer), why, held
            answer.append(part)
            continue
        if why:
            continue
        now, ticks = monotonic(), _ticks(child)
        if ticks != worked:
            worked, since = ticks, now
        held = max(held, memory.resident(child) or 0)
        if most is not None and held > most:
            why = "too much"
        elif now - since > HUNG_AFTER:
            why = "hung"
        if why:
            os.kill(child, signal.SIGKILL)


def _ticks(child: int) -> int:
    """Return the time that a process and its own children have worked, in ticks."""
    with suppress(OSError):
        fields = (memory.PROC / str(child) / "stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15]))
    return 0


def _be_the_child(
    work: Callable[[], Any], most: int | None, tidy: bool, writing: int, parent: int
) -> NoReturn:
    """Work, send what comes of it, and end without a word to whatever the parent has open."""
    try:
        answer = _answer(work, most, tidy, parent)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        while answer:
            answer = answer[os.write(writing, answer) :]
    finally:
        os._exit(0)


def _answer(work: Callable[[], Any], most: int | None, tidy: bool, parent: int) -> bytes:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        _settle(parent, tidy)
        if most is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (_data_limit(most, before), before[1]))
        try:
            result: Any = work()
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)
        return pickle.dumps(("done", result))
    except BaseException as error:
        if is_out_of_memory(error):
            return pickle.dumps(("out of memory", None))
        return _packed(error)


def _settle(parent: int, tidy: bool) -> None:
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
    if tidy and hasattr(library, "mallopt"):
        for setting in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            library.mallopt(setting, BLOCK)
        library.mallopt(_TOP_PAD, 0)
    if devices.loaded("torch") is not None:
        import torch

        # Threads of the parent's pool are not there; torch would wait for them.
        torch.set_num_threads(1)
    # What is there by now is not looked through for garbage, which would copy all of it.
    gc.freeze()
    trim()


def trim() -> None:
    """Give what was freed back to the system, also what is still held in a circle."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def high_water(reset: bool = False) -> int:
    """Return the most bytes that this process has held, since that was last reset."""
    if reset:
        (memory.PROC / "self" / "clear_refs").write_text("5")
    return memory.peak_resident() or 0


def _data_limit(most: int, before: tuple[int, int]) -> int:
    """Return the limit of private memory with which a process holds at most ``most``."""
    data = memory.field(Path("/proc/self/status"), "VmData") or 0
    limit = max(data, data + most - (memory.resident() or 0))
    return min([limit, *(bound for bound in before if bound >= 0)])


def _packed(error: BaseException) -> bytes:
    told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        packed = pickle.dumps(("error", (error, told)))
        pickle.loads(packed)
    except Exception:
        # Errors with arguments of their own often cannot be made again from what is pickled.
        named = f"step raised {type(error).__name__}: {error}"
        packed = pickle.dumps(("error", (RuntimeError(named), told)))
    return packed


def _unpacked(answer: bytes) -> tuple[bool, Any]:
    kind, what = pickle.loads(answer)
    if kind == "error":
        error, told = what
        raise error from StepTraceback(told)
    return kind == "done", what
