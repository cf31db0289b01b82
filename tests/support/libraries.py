"""The array libraries that tests run on, and whether a GPU is there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

if find_spec("torch"):
    with warnings.catch_warnings():
        # pytest makes warnings errors, and one of a package beside a GPU would end the whole run.
        warnings.simplefilter("default")
        import torch


def has_torch_cuda() -> bool:
    """Whether torch is there and sees a CUDA device."""
    return bool(find_spec("torch")) and torch.cuda.is_available()


def has_cupy_cuda() -> bool:
    """Whether CuPy is there and sees a CUDA device; importing it succeeds without a driver."""
    if not find_spec("cupy"):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cupy

        return bool(cupy.cuda.is_available())


@dataclass(frozen=True)
class Library:
    """An array library on a device, as a test parameter."""

    name: str
    device: str
    array: Callable[[Any], Any]
    """A fresh array of the library from anything NumPy takes."""

    def __repr__(self) -> str:
        return self.name

    def host(self, array: Any) -> np.ndarray:
        """Return an array as NumPy, after a check that it is one of this library and device."""
        if self.name == "numpy":
            assert type(array) is np.ndarray
            return array
        if self.name == "cupy":
            assert type(array).__module__.startswith("cupy")
            return array.get()
        assert isinstance(array, torch.Tensor)
        assert array.device == torch.device(self.device)
        return array.cpu().numpy()


def make_library(name: str) -> Library:
    """Return the library, or skip where it or its device is not there."""
    if name == "numpy":
        return Library(name, "numpy", np.array)
    if name == "torch":
        if not find_spec("torch"):
            pytest.skip("torch is not installed")
        return Library(name, "cpu", lambda values: torch.tensor(np.array(values)))
    if name == "torch-cuda":
        if not has_torch_cuda():
            pytest.skip("torch sees no CUDA device")
        return Library(name, "cuda:0", lambda values: torch.tensor(np.array(values)).to("cuda:0"))
    if not has_cupy_cuda():
        pytest.skip("cupy is not installed or sees no CUDA device")
    import cupy

    return Library(name, "cupy:0", cupy.array)
