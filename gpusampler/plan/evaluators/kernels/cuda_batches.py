"""The batch kernel in CUDA C for CuPy; NVRTC compiles it. Imported at first use only."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from gpusampler.permutation._native import HEADER
from gpusampler.plan.evaluators.kernels.kernel_spec import (
    ORDER_ARGUMENT,
    PLAN_WORDS,
    THREADS,
    Geometry,
    KernelSpec,
)

SOURCE = Path(__file__).with_name("batches.cu")
NO_SPEC = KernelSpec._make([0] * len(KernelSpec._fields))
"""What the patch-order kernel is compiled for: it reads no setting."""
BATCHES, PATCH_ORDER = "gpusampler_batches", "gpusampler_patch_order"
TYPES = {"int64": "long long", "int32": "int"}


def defines(spec: KernelSpec, order: str, out: str) -> tuple[str, ...]:
    """Return the compiler options of a spec."""
    flags = {name: str(value) for name, value in spec.flags().items()}
    flags |= {"ORDER_T": TYPES[order], "OUT_T": TYPES[out]}
    flags |= {f"AT_{name.upper()}": str(place) for place, name in enumerate(PLAN_WORDS)}
    return tuple(f"-D{name}={value}" for name, value in flags.items())


def source() -> str:
    """Return the kernel's text, with the arithmetic in place of its ``#include``."""
    # NVRTC has no search path for the package's folders.
    return SOURCE.read_text().replace(f'#include "{HEADER.name}"', HEADER.read_text())


@cache
def _kernel(name: str, spec: KernelSpec, order: str, out: str) -> Any:
    options = "-std=c++17", f"-DPATCH_ORDER={int(name == PATCH_ORDER)}"
    return cupy.RawKernel(source(), name, options=(*options, *defines(spec, order, out)))


def launch(spec: KernelSpec, geometry: Geometry, args: tuple[Any, ...]) -> None:
    """Run the batch kernel on CuPy arrays, on CuPy's current device and stream."""
    # CuPy has no cursor, so neither epoch nor slot advance on the device.
    slots, starts, _epoch, out, *arguments, _num_replicas, _rank = args
    order = args[ORDER_ARGUMENT]
    kernel = _kernel(
        BATCHES,
        spec,
        "int64" if order is None else order.dtype.name,
        out.dtype.name,
    )
    values = (slots, starts, out, *arguments, geometry.rows, geometry.columns, geometry.span)
    kernel(geometry.blocks, (THREADS,), tuple(map(_as_argument, values)))


def launch_patch_order(form: int, epoch_on_device: bool, args: tuple[Any, ...]) -> None:
    """Run the patch-order kernel, as `launch` does; the epoch is in the key."""
    assert not epoch_on_device
    kernel = _kernel(PATCH_ORDER, NO_SPEC, "int64", "int64")
    patches, offsets, plan, _, num_patches, a, b, rem, _, key0, key1 = args
    values = (patches, offsets, plan, num_patches, a, b, rem, key0, key1, int(form > 0))
    kernel((1, 1), (THREADS,), tuple(map(_as_argument, values)))


def _as_argument(value: Any) -> Any:
    if value is None:
        return np.uint64(0)  # a null pointer
    return np.int32(value) if isinstance(value, int) else value
