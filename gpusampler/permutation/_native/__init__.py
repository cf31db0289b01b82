"""The permutation in C: loads the compiled module, or says why NumPy is used instead.

The module's functions take addresses of contiguous int64 arrays and their sizes. Both ways return
identical results; NumPy is slower.
"""

from __future__ import annotations

import os
from ctypes import addressof, c_char
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import log
from gpusampler.permutation._native.sources import FOLDER, MODULE, source_hash

VARIABLE = "GPUSAMPLER_NATIVE"
"""Environment variable. 0: use NumPy; 1: raise ImportError if there is no compiled module."""

HEADER = FOLDER / "permutation.h"
"""The arithmetic in C, which the CUDA kernel includes."""


def load(setting: str) -> tuple[Any, str]:
    """Return the compiled module or None, and why there is none.

    Parameters
    ----------
    setting : str
        Value of the environment variable `VARIABLE`.

    Raises
    ------
    ImportError
        If the setting is "1" and there is no usable module.

    Warns
    -----
    UserWarning
        If the module was compiled from other sources than those beside it.
    """
    if setting == "0":
        return None, f"{VARIABLE}=0"
    module, reason = None, ""
    try:
        module = import_module(f"{__name__}.{MODULE}")
    except ImportError as error:
        reason = f"no compiled module: {error}"
    else:
        if source_hash() not in ("", module.SOURCE_HASH):
            module = None
            reason = (
                "the compiled module is older than its sources: run `pip install -e .` again, "
                "which compiles it"
            )
            if setting != "1":
                log.warn(f"NumPy evaluates batches (identical, slower), because {reason}")
    if module is not None:
        return module, ""
    if setting == "1":
        raise ImportError(
            f"{VARIABLE}=1 needs the compiled module of gpusampler, but {reason}. Install "
            "gpusampler where a C compiler is found, or unset the variable"
        )
    return None, reason


module, _reason = load(os.environ.get(VARIABLE, ""))


def describe() -> str:
    """Return what evaluates batches on the host: "C (avx2)", or "NumPy" and the reason."""
    return f"NumPy ({_reason})" if module is None else f"C ({module.form()})"


log.logger.debug("what evaluates batches on the host: %s", describe())


def contiguous_int64(array: Any) -> NDArray[np.int64]:
    """Return an array as the compiled module reads it: int64, aligned and contiguous."""
    return np.require(array, np.int64, ("C", "A"))


def address(array: Any) -> int:
    """Return the address of a contiguous array's first element; 0 for None."""
    if array is None:
        return 0
    try:
        # A quarter of the time of the general way, for arrays that are writable and not empty.
        return addressof(c_char.from_buffer(array))
    except (TypeError, ValueError):
        return int(array.__array_interface__["data"][0])
