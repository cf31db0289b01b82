"""Choice between NumPy and the functions that Numba compiles, `jit_runs`, to evaluate batches.

NumPy always works. Numba, if it is installed, takes half a second to import, and longer to compile
before its cache is filled. A process therefore switches to Numba only after NumPy has evaluated so
many samples that this took about as long. Both return identical batches.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

from gpusampler.core import arrays, log
from gpusampler.core.devices import HOST
from gpusampler.permutation.reference import SMALL, Grid, grids_of, permute

VARIABLE = "GPUSAMPLER_COMPILED"
"""Environment variable: when to use Numba. 0: never, 1: at once, else: after `WORTH` samples."""

WORTH = 1 << 25
"""Number of samples before a switch to Numba: NumPy takes a few seconds for them."""

SIZES = (1, 2, 31, SMALL, SMALL + 1, 37, 127, 128, 500, 1023, 1024, 65535, 65536, 3_000_000)
"""Patch sizes for which compiled functions must equal the reference before they are used."""


class Compiled:
    """The compiled functions of this process, imported when ``setting`` asks for them.

    Parameters
    ----------
    setting : str
        Value of the environment variable `VARIABLE`: "0" for never, "1" from the first batch on,
        anything else after `WORTH` samples.
    module : str
        Module that contains the compiled functions.
    """

    def __init__(self, setting: str, module: str = "gpusampler.permutation.numba.jit_runs") -> None:
        self._name = module
        self._at_once = setting == "1"
        self._decided = setting == "0"
        self._evaluated = 0
        self._form: ModuleType | None = None

    def form(self, lanes: int) -> ModuleType | None:
        """Return the module of compiled functions, or None if NumPy should evaluate.

        Parameters
        ----------
        lanes : int
            Number of samples that are about to be evaluated.

        Raises
        ------
        ImportError
            If the setting is "1" and Numba is not installed.

        Warns
        -----
        UserWarning
            Once, if the functions cannot be compiled, or differ from the reference.
        """
        if self._decided:
            return self._form
        self._evaluated += lanes
        if self._at_once or self._evaluated > WORTH:
            there = find_spec("numba") is not None
            if self._at_once and not there:
                raise ImportError(
                    f"{VARIABLE}=1 needs Numba, which is not installed: pip install "
                    "'gpusampler[numba]', or unset the variable"
                )
            # Once, also where a warning is an error.
            self._decided = True
            self._form = self._load() if there else None
        return self._form

    def _load(self) -> ModuleType | None:
        try:
            form = import_module(self._name)
            if not self._at_once and not form.COMPILES:
                log.logger.info("NUMBA_DISABLE_JIT is set: NumPy evaluates batches")
                return None
            _check(form)
        except Exception as error:
            # A Numba that does not know this NumPy, a compiler that fails, a form that is wrong.
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            text = (
                "functions compiled by Numba cannot be used: NumPy evaluates batches (identical, "
                f"slower). To avoid the attempt, set {VARIABLE}=0. The error was {said}"
            )
            log.logger.info("%s", text)
            log.warn(text)
            return None
        log.logger.info("from now on, functions compiled by Numba evaluate batches")
        return form


def _check(form: Any) -> None:
    """Raise RuntimeError if compiled functions give other results than the reference.

    Numba caches compiled code between runs, and a wrong function would return wrong batches. The
    check covers all kinds of patches and takes milliseconds.
    """
    xp = arrays.namespace(HOST)
    n = np.array(SIZES + SIZES, np.int64)
    first = n // 3
    lengths = np.minimum(n + 3, 700)
    # Runs of a few lanes go another way.
    lengths[len(SIZES) :] = 5
    base = 5 * n
    key = (n * 0x9E3779B1 & 0xFFFFFFFF, n * 0x85EBCA6B & 0xFFFFFFFF)
    grid = grids_of(xp, n)
    # Not what an earlier check may have left in memory.
    found = np.full(int(lengths.sum()), -1, np.int64)
    form.runs(found, np.stack([first, lengths, n, base, *key, *grid]), True)
    row = np.repeat(np.arange(n.size), lengths)
    within = np.arange(row.size) - (np.cumsum(lengths) - lengths)[row]
    x = (first[row] + within) % n[row]
    keys, sides = (key[0][row], key[1][row]), Grid(*(side[row] for side in grid))
    expected = permute(xp, x, n[row], keys, sides, min(SIZES), max(SIZES)) + base[row]
    if not np.array_equal(found, expected):
        raise RuntimeError("compiled permutations differ from the reference")


compiled_form = Compiled(os.environ.get(VARIABLE, "")).form
