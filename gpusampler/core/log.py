"""The package's logger, and warnings that point to the caller's line."""

from __future__ import annotations

import logging
import sys
import warnings

logger = logging.getLogger("gpusampler")
"""Logs the main steps at level INFO; the program must configure logging to see them."""


def warn(text: str) -> None:
    """Emit a UserWarning at the line that called the package, at any call depth."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "gpusampler"
