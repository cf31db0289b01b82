"""The kernels as tests run them, on a GPU where there is one and on the host where there is none.

CUDA C is compiled as C++ and launched by the package's own code, for which CuPy is played; Triton
is interpreted. Whatever a kernel writes to lies between guards.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpusampler import EpochPlan
from gpusampler.core import arrays, devices
from gpusampler.core.devices import Device
from gpusampler.plan.evaluators.base import BatchLocations, EvaluatorSettings
from gpusampler.plan.evaluators.kernels import fused
from gpusampler.plan.evaluators.kernels.kernel_spec import THREADS, cuda_geometry, triton_geometry
from support.libraries import has_cupy_cuda, has_torch_cuda
from support.ptx.launches import PtxRawKernel, launch_patch_order_triton_ptx, launch_triton_ptx
from support.triton_interpreter import interpreter_in_haste

SOURCE = Path(fused.__file__).with_name("batches.cu")
# No warning but of what another form than the one compiled uses. Hundreds of forms are compiled:
# -Og is the quickest level that warns of variables without a value.
FLAGS = ("-Og", "-Wall", "-Wextra", "-Werror", "-Wno-unused", "-fPIC", "-shared")
if sys.platform == "linux":
    # Nothing of a library is used; to look for them takes a third of the time.
    FLAGS += ("-nostdlib",)
BUILD = tempfile.TemporaryDirectory(prefix="gpusampler-kernels-")
NUMBER = count()
WIDTHS = {"i64": 8, "long long": 8, "int": 4}


@cache
def find_compiler() -> str:
    path = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if path is None:
        pytest.skip("no C++ compiler")
    return path


class HostKernel:
    """What `cupy.RawKernel` is to the package: the same source and options, made C++."""

    def __init__(self, source: str, name: str, options: tuple[str, ...]) -> None:
        # Given as text: the file must not be found by its suffix, which names another language.
        path = Path(BUILD.name) / f"{next(NUMBER)}.so"
        set_block = 'extern "C" void set_block(int x, int y) { blockIdx.x = x; blockIdx.y = y; }\n'
        subprocess.run(
            [find_compiler(), *FLAGS, *options, "-x", "c++", "-", "-o", str(path)],
            input=source + set_block,
            text=True,
            check=True,
        )
        self._library = ctypes.CDLL(str(path))
        self._function = getattr(self._library, name)
        listed = re.search(rf"KERNEL void {name}\((.*?)\)", source, re.S)
        assert listed
        self._parameters = [parameter.strip() for parameter in listed[1].split(",")]
        self._macros = dict(o[2:].split("=") for o in options if o.startswith("-D"))

    def __call__(self, grid: tuple[int, int], block: tuple[int], args: tuple[Any, ...]) -> None:
        assert block == (THREADS,)
        assert all(1 <= side <= limit for side, limit in zip(grid, (2**31 - 1, 65535), strict=True))
        arguments = [self._as_ctypes(*pair) for pair in zip(self._parameters, args, strict=True)]
        for y in range(grid[1]):
            for x in range(grid[0]):
                self._library.set_block(x, y)
                self._function(*arguments)

    def _as_ctypes(self, parameter: str, value: Any) -> Any:
        """A value as its parameter takes it; a GPU would not notice that they do not fit."""
        if "*" not in parameter:
            assert type(value) is np.int32, parameter
            return ctypes.c_int(int(value))
        if not isinstance(value, np.ndarray):
            assert type(value) is np.uint64, parameter
            assert value == 0
            return ctypes.c_void_p(0)
        assert value.flags.c_contiguous, parameter
        name = parameter.removeprefix("const ").partition("*")[0].strip()
        assert value.dtype.itemsize == WIDTHS[self._macros.get(name, name)], parameter
        return ctypes.c_void_p(value.ctypes.data)


@cache
def cuda_batches_on_host(raw_kernel: type = HostKernel) -> Any:
    """The module that launches the CUDA C kernel, loaded where ``raw_kernel`` stands for CuPy's."""
    path = SOURCE.with_name("cuda_batches.py")
    spec = spec_from_file_location("cuda_batches_on_host", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", SimpleNamespace(RawKernel=raw_kernel))
        spec.loader.exec_module(module)
    return module


def launch_on_host(form, geometry, args) -> None:
    """Run the CUDA C kernel over NumPy arrays, block by block, a thread after the other."""
    cuda_batches_on_host().launch(form, geometry, args)


def launch_patch_order_on_host(form, epoch_on_device, args) -> None:
    cuda_batches_on_host().launch_patch_order(form, epoch_on_device, args)


def launch_cuda_ptx(form, geometry, args) -> None:
    """Run the CUDA C kernel over NumPy arrays, as a GPU would."""
    cuda_batches_on_host(PtxRawKernel).launch(form, geometry, args)


def launch_patch_order_cuda_ptx(form, epoch_on_device, args) -> None:
    cuda_batches_on_host(PtxRawKernel).launch_patch_order(form, epoch_on_device, args)


def launch_interpreted(form, geometry, args) -> None:
    """Run the Triton kernel over tensors of the host."""
    from gpusampler.plan.evaluators.kernels.triton_batches import launch

    with interpreter_in_haste():
        launch(form, geometry, args)


def launch_patch_order_interpreted(form, epoch_on_device, args) -> None:
    from gpusampler.plan.evaluators.kernels.triton_batches import launch_patch_order

    with interpreter_in_haste():
        launch_patch_order(form, epoch_on_device, args)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernel here, as `conftest` has decided."""
    return bool(find_spec("triton")) and os.environ.get("TRITON_INTERPRET") == "1"


on_gpu = [pytest.mark.gpu] if has_torch_cuda() and not is_interpreted() else []
TRITON = pytest.param("triton", marks=on_gpu)
KERNELS = ["cuda-c", TRITON, pytest.param("cupy", marks=pytest.mark.gpu)]
every_kernel = pytest.mark.parametrize("kind", KERNELS)


def device_of_kernel(kind: str) -> Device:
    """Where a kernel runs here; skips where it cannot."""
    if kind == "cuda-c ptx" and not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    if kind.startswith("cuda-c"):
        return Device("numpy")
    if kind == "cupy":
        if not has_cupy_cuda():
            pytest.skip("cupy is not installed or sees no CUDA device")
        return Device("cupy", "0")
    if not find_spec("torch") or not find_spec("triton"):
        pytest.skip("torch or triton is not installed")
    return Device("torch", "cpu" if kind == "triton ptx" or is_interpreted() else "cuda:0")


GUARD = 32
UNTOUCHED = -0x5EED


class GuardedLaunch:
    """A launch whose results lie in the middle of larger arrays, which must stay as they were."""

    def __init__(self, launch: fused.Launch, device: Device) -> None:
        self._launch = launch
        self._xp = arrays.namespace(device)
        self.launches: list[tuple[Any, Any]] = []

    def __call__(self, form, geometry, args) -> None:
        assert all(-(1 << 31) <= value < 1 << 31 for value in args if isinstance(value, int))
        arguments = list(args)
        # out, lengths, groups: see `KernelEvaluator._run`.
        guarded_arrays = {i: self._with_guards(args[i]) for i in (3, 4, 5) if args[i] is not None}
        for position, guarded in guarded_arrays.items():
            arguments[position] = self._between_guards(guarded, args[position])
        self._launch(form, geometry, tuple(arguments))
        self.launches.append((form, geometry))
        for position, guarded in guarded_arrays.items():
            edges = np.concatenate([host(guarded[:GUARD]), host(guarded[-GUARD:])])
            assert (edges == UNTOUCHED).all(), f"argument {position} was written beyond its ends"
            args[position][...] = arguments[position]

    def _with_guards(self, array: Any) -> Any:
        size = int(np.prod(array.shape)) + 2 * GUARD
        handle = devices.device_handle(arrays.device_of(array))
        return self._xp.full((size,), UNTOUCHED, dtype=array.dtype, device=handle)

    def _between_guards(self, guarded: Any, array: Any) -> Any:
        return self._xp.reshape(guarded[GUARD:-GUARD], tuple(array.shape))


class Kernel(NamedTuple):
    """A plan's evaluation by a kernel; ``launches`` grows by (form, geometry) at every launch."""

    evaluator: fused.KernelEvaluator
    device: Device
    launches: list[tuple[Any, Any]]

    def to_device(self, array: Any) -> Any:
        return arrays.to_device(np.ascontiguousarray(array), self.device)

    def block(self, plan: EpochPlan, epoch: int, slots: Any, dtype: str = "int64") -> list[Any]:
        """Indices, lengths and groups at some slots, on the host."""
        slots = np.asarray(slots, np.int64)
        with devices.device_context(self.device):
            block = self.evaluator.block(
                plan.evaluator.streams, epoch, self.to_device(slots), dtype
            )
            return [*map(host, block)]

    def ragged(self, plan: EpochPlan, epoch: int, locations: BatchLocations) -> np.ndarray:
        """The samples of located batches, end to end, on the host."""
        with devices.device_context(self.device):
            return host(self.evaluator.ragged(plan.evaluator.streams, epoch, locations))


def evaluator_settings_of(plan: EpochPlan) -> EvaluatorSettings:
    return EvaluatorSettings(
        plan.shuffle_within_batches, plan.shuffle_patches, plan.interleave, plan.partial == "pad"
    )


def kernel_evaluator_of(
    tables, device: Device, settings: EvaluatorSettings, kind: str
) -> fused.KernelEvaluator:
    """What `kernel_evaluator_on` makes of tables on a device, with a kernel of this kind."""
    if device.name == "cpu":
        launches = {
            "cuda-c": (launch_on_host, launch_patch_order_on_host, cuda_geometry),
            "cuda-c ptx": (launch_cuda_ptx, launch_patch_order_cuda_ptx, cuda_geometry),
            "triton": (launch_interpreted, launch_patch_order_interpreted, triton_geometry),
            "triton ptx": (launch_triton_ptx, launch_patch_order_triton_ptx, triton_geometry),
        }[kind]
        return fused.KernelEvaluator(tables, device, settings, *launches)
    evaluator = fused.kernel_evaluator_on(tables, device, settings)
    assert evaluator is not None
    return evaluator


def kernel_of(plan: EpochPlan, kind: str) -> Kernel:
    """A plan's evaluation by a kernel, guarded."""
    device = device_of_kernel(kind)
    settings = evaluator_settings_of(plan)
    evaluation = kernel_evaluator_of(
        plan._tables.on(device, plan.units.groups.order), device, settings, kind
    )
    guarded_launch = GuardedLaunch(evaluation._launch, device)
    evaluation._launch = guarded_launch
    return Kernel(evaluation, device, guarded_launch.launches)


def host(array: Any) -> np.ndarray:
    return arrays.to_numpy(array)
