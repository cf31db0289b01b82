"""The batch kernel in CUDA C for CuPy; NVRTC compiles it. Imported at first use only."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from gpusampler.permutation._native import HEADER
from gpusampler.plan.evaluators.kernels.kernel_spec import THREADS, Geometry, KernelSpec

SOURCE = Path(__file__).with_name("batches.cu")
TYPES = {"int64": "long long", "int32": "int"}


def defines(spec: KernelSpec, order: str, out: str) -> tuple[str, ...]:
    """Return the compiler options of a spec."""
    flags = {name: str(value) for name, value in spec.flags().items()}
    flags |= {"ORDER_T": TYPES[order], "OUT_T": TYPES[out]}
    return tuple(f"-D{name}={value}" for name, value in flags.items())


def source() -> str:
    """Return the kernel's text, with the arithmetic in place of its ``#include``."""
    # NVRTC has no search path for the package's folders.
    return SOURCE.read_text().replace(f'#include "{HEADER.name}"', HEADER.read_text())


@cache
def _kernel(spec: KernelSpec, order: str, out: str) -> Any:
    return cupy.RawKernel(
        source(),
        "gpusampler_batches",
        options=("-std=c++17", *defines(spec, order, out)),
    )


def launch(spec: KernelSpec, geometry: Geometry, args: tuple[Any, ...]) -> None:
    """Run the kernel on CuPy arrays, on CuPy's current device and stream."""
    slots, starts, _, out, *arguments = args
    order = arguments[11]
    kernel = _kernel(spec, "int64" if order is None else order.dtype.name, out.dtype.name)
    values = (slots, starts, out, *arguments, geometry.rows, geometry.columns, geometry.span)
    kernel(geometry.blocks, (THREADS,), tuple(map(_as_argument, values)))


def _as_argument(value: Any) -> Any:
    if value is None:
        return np.uint64(0)  # a null pointer
    return np.int32(value) if isinstance(value, int) else value
