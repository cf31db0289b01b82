"""What the package says while it works: bars for what takes long, and a logger instead of print."""

from __future__ import annotations

import logging
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("gpusampler")
"""Says at level INFO what was made, read or gone on with; silent unless the program listens."""

BAR_AFTER = 1.0
"""Seconds after which a bar is shown."""


def bar(total: int, what: str, unit: str, progress: bool) -> Any:
    """Return a tqdm bar for work that may take more than a second.

    Parameters
    ----------
    total : int
    what, unit : str
        What is counted.
    progress : bool
        False: no bar. No bar either where standard error is no terminal.
    """
    return tqdm(
        total=total,
        desc=what,
        unit=f" {unit}",
        unit_scale=True,
        delay=BAR_AFTER,
        disable=None if progress else True,
    )
