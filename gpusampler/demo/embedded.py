"""The data embedded in the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def small_data() -> Path:
    """Return the folder of the small aquifer: 9 patches of MODFLOW 6 output, 60 steps.

    Examples
    --------
    >>> small_data().name
    'small'
    """
    folder = files("gpusampler.demo").joinpath("data", "small")
    if not isinstance(folder, Path) or not folder.is_dir():
        raise FileNotFoundError(
            f"the demo's data folder {folder} is missing or inside a zip archive: reinstall "
            "gpusampler with pip, which unpacks it"
        )
    return folder
