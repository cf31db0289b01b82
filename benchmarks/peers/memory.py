"""How much memory a call takes at most, above what its process held before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import TypeVar

from gpusampler.calibration.forked_child import high_water_mark

T = TypeVar("T")


def peak_of(call: Callable[[], T]) -> tuple[T, int]:
    """Call, and return the result with the peak, in bytes above what was held before.

    For a process of its own, whose memory nobody has used before. Linux, with glibc.
    """
    gc.collect()
    # Freed memory goes back to the system; nothing else of the allocator is changed, because the
    # same call is timed.
    ctypes.CDLL(None).malloc_trim(0)
    before = high_water_mark(reset=True)
    result = call()
    return result, high_water_mark() - before
