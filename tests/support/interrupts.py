"""Interrupt the package where Python may handle a signal."""

from __future__ import annotations

import sys
from pathlib import Path

import gpusampler

PACKAGE = str(Path(gpusampler.__file__).parent)


class InterruptedAt:
    """Raise KeyboardInterrupt at the n-th call from the package, before or after it.

    CPython looks for signals where a function begins, and after the call of a C function.
    """

    def __init__(self, event: int) -> None:
        self.left = event

    def __enter__(self) -> InterruptedAt:
        sys.setprofile(self.profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def profile(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return
        # Signals are not handled between a lock and the block that it guards, but are after it.
        name = getattr(argument, "__name__", "")
        is_lock = name == "__enter__" or (name == "__exit__" and event == "c_call")
        if event in ("call", "c_call", "c_return") and not is_lock:
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise KeyboardInterrupt
