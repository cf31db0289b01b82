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
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and is_own_frame(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def is_own_frame(frame: FrameType) -> bool:
    """Whether a stack frame runs code of this package."""
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0] == "gpusampler"
