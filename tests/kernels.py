"""Kernels where there is no GPU: CUDA C as C++ of the host, Triton in its interpreter."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gpusampler import EpochPlan, arrays
from gpusampler.arrays import Device
from gpusampler.kernels import fused
from gpusampler.kernels.form import cuda_geometry, triton_geometry
from gpusampler.tables import Shuffles

SOURCE = Path(fused.__file__).with_name("batches.cu")
TYPES = {"int64": "long long", "int32": "int"}
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused", "-fPIC", "-shared")
BUILD = tempfile.TemporaryDirectory(prefix="gpusampler-kernels-")


@cache
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@cache
def compiled(form, order: str, out: str):
    """The CUDA C source as a library of the host, for one form."""
    # Given as text: the file must not be found by its suffix, which names another language.
    path = Path(BUILD.name) / f"{abs(hash((form, order, out)))}.so"
    macros = [f"-D{name}={value}" for name, value in form.flags().items()]
    macros += [f"-DORDER_T={TYPES[order]}", f"-DOUT_T={TYPES[out]}"]
    text = SOURCE.read_text() + (
        'extern "C" void at_block(int x, int y) { blockIdx.x = x; blockIdx.y = y; }\n'
    )
    subprocess.run(
        [compiler(), *FLAGS, *macros, "-x", "c++", "-", "-o", str(path)],
        input=text,
        text=True,
        check=True,
    )
    return ctypes.CDLL(str(path))


def launch_on_host(form, geometry, args) -> None:
    """Run the CUDA C kernel over NumPy arrays, block by block."""
    slots, starts, _, out, *rest = args
    order = rest[10]
    library = compiled(form, "int64" if order is None else order.dtype.name, out.dtype.name)
    given = []
    for value in (slots, starts, out, *rest, geometry.rows, geometry.columns, geometry.span):
        if value is None:
            given.append(ctypes.c_void_p(0))
        elif isinstance(value, int):
            assert -(1 << 31) <= value < 1 << 31
            given.append(ctypes.c_int(value))
        else:
            assert value.flags.c_contiguous
            given.append(ctypes.c_void_p(value.ctypes.data))
    for y in range(geometry.blocks[1]):
        for x in range(geometry.blocks[0]):
            library.at_block(x, y)
            library.gpusampler_batches(*given)


def launch_interpreted(form, geometry, args) -> None:
    """Run the Triton kernel over tensors of the host."""
    from gpusampler.kernels.triton_batches import launch

    for value in args:
        assert not isinstance(value, int) or -(1 << 31) <= value < 1 << 31
    launch(form, geometry, args)


def interpreting() -> bool:
    return bool(find_spec("triton")) and os.environ.get("TRITON_INTERPRET") == "1"


KERNELS = ["cuda-c", "triton"]
DEVICES = {"cuda-c": "numpy", "triton": "cpu"}


def kernel_of(plan: EpochPlan, kind: str) -> fused.Fused:
    """A plan's evaluation by a kernel, on the host."""
    if kind == "triton" and not interpreting():
        pytest.skip("triton is not installed, or there is a GPU, where it is compiled")
    device = Device("numpy") if kind == "cuda-c" else Device("torch", "cpu")
    shuffles = Shuffles(
        plan.shuffle_within_batches, plan.shuffle_patches, plan.interleave, plan.partial == "pad"
    )
    launch, geometry = {
        "cuda-c": (launch_on_host, cuda_geometry),
        "triton": (launch_interpreted, triton_geometry),
    }[kind]
    tables = plan._tables.on(device, plan.groups.order)
    return fused.Fused(tables, device, shuffles, launch, geometry)


def host(array) -> np.ndarray:
    return arrays.to_numpy(array)
