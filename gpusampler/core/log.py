"""The package's logger, and warnings that point to the caller's line."""

from __future__ import annotations

import logging
import sys
import warnings
from types import FrameType

logger = logging.getLogger("gpusampler")
"""Logs the main steps at level INFO; the program must configure logging to see them."""


def warn(text: str) -> None:
    """Emit a UserWarning at the line that called the package, at any call depth."""
    _, level = _find_caller()
    warnings.warn(text, stacklevel=level)


def calling_module() -> str:
    """Return the name of the module that called the package."""
    frame, _ = _find_caller()
    return str(frame.f_globals.get("__name__", ""))


def _find_caller() -> tuple[FrameType, int]:
    """Return the innermost stack frame outside the package, and its level for `warnings.warn`."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and is_own_frame(frame):
        level, frame = level + 1, frame.f_back
    return frame, level


def is_own_frame(frame: FrameType) -> bool:
    """Whether a stack frame runs code of this package."""
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "gpusampler"
