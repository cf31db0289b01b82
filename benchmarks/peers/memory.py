"""How much memory a call takes at most, above what its process held before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def resident() -> tuple[int, int]:
    """Return the resident memory of this process in bytes: now, and at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


def peak_of(call: Callable[[], T]) -> tuple[T, int]:
    """Call, and return the result with the high-water mark, in bytes above what was held before.

    For a process of its own, whose memory nobody has used before. Linux, with glibc.
    """
    gc.collect()
    # What was freed goes back to the system, and nothing else of the allocator's ways is changed:
    # the same call is timed.
    ctypes.CDLL(None).malloc_trim(0)
    before, _ = resident()
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    return result, max(resident()[1] - before, 0)
