"""The peak memory of a call, above the memory of its process before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import TypeVar

from gpusampler.calibration.forked_child import high_water_mark

T = TypeVar("T")


def peak_of(call: Callable[[], T]) -> tuple[T, int]:
    """Call, and return the result and the peak, in bytes above the memory before the call.

    Run it in a new process: memory that was freed before would hide some of the peak. Linux, glibc.
    """
    gc.collect()
    # Freed memory goes back to the system; nothing else of the allocator is changed, because the
    # same call is timed.
    ctypes.CDLL(None).malloc_trim(0)
    before = high_water_mark(reset=True)
    assert before, "the system must report the peak of resident memory"
    result = call()
    return result, high_water_mark() - before
