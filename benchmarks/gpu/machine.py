"""The device, behind the few things that a rehearsal on a CPU must do otherwise.

`Machine` is torch's current CUDA device, with CuPy beside it where that is there. `Rehearsal` is a
CPU that plays one: torch's "cpu" counts as a device that NumPy does not see, and the Triton kernel
is interpreted, so that everything but the clock and the streams is the code that runs on a GPU.
"""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

ENOUGH_MS = 2.0
"""Calls that are shorter than this are timed several at once."""


class Timing(NamedTuple):
    """Milliseconds of one call: the median of some repeats, and their extremes."""

    ms: float
    least: float
    most: float
    repeats: int


class Machine:
    """Torch's current CUDA device; what works on CuPy lies on the same one."""

    dry = False

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.index = torch.cuda.current_device()
        self.device = f"cuda:{self.index}"
        self.cupy_missing = _why_no_cupy()
        self.cupy = None if self.cupy_missing else f"cupy:{self.index}"

    @staticmethod
    def missing() -> str | None:
        """Say why there is no CUDA device, or return None."""
        if not find_spec("torch"):
            return "torch is not installed"
        import torch

        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
        return None

    def about(self) -> dict[str, Any]:
        """Return what the device is, in words and numbers."""
        torch = self.torch
        found = torch.cuda.get_device_properties(self.index)
        free, total = torch.cuda.mem_get_info(self.index)
        return {
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(total / 2**30, 1),
            "free_gib": round(free / 2**30, 1),
            "l2_mib": round(getattr(found, "L2_cache_size", 0) / 2**20, 1),
            "cuda": torch.version.cuda,
            **_nvidia_smi(self.index),
        }

    def synchronize(self) -> None:
        """Wait for the device."""
        self.torch.cuda.synchronize()

    def free(self) -> None:
        """Give cached memory back, so that one case leaves the next one all of it."""
        self.synchronize()
        gc.collect()
        self.torch.cuda.empty_cache()
        if self.cupy:
            import cupy

            cupy.get_default_memory_pool().free_all_blocks()

    def allocated(self) -> int:
        """Return the bytes that tensors take."""
        return int(self.torch.cuda.memory_allocated(self.index))

    def forget_peak(self) -> None:
        """Begin to look for the most bytes anew."""
        self.torch.cuda.reset_peak_memory_stats(self.index)

    def peak(self) -> int:
        """Return the most bytes that tensors took since `forget_peak`."""
        return int(self.torch.cuda.max_memory_allocated(self.index))

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return a function that replays one call of ``step``, and the tensors it writes.

        ``step`` is called a few times first, on a side stream, as capturing wants it.
        """
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            written = step()
        return graph.replay, written

    def compile(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``step`` compiled as one graph."""
        compiled: Callable[[], Any] = self.torch.compile(step, fullgraph=True)
        return compiled

    def time(self, call: Callable[[], Any], repeats: int) -> Timing:
        """Time a call on the device, after it was called once to warm up, or more.

        Calls of microseconds are timed several in a row, so that the gap between two events does
        not count.
        """
        call()
        inner = 1
        found = [self.span(call, inner)]
        if found[0] < ENOUGH_MS:
            inner = max(1, min(200, int(ENOUGH_MS / max(self.span(call, 1), 1e-4))))
            found = [self.span(call, inner)]
        found += [self.span(call, inner) for _ in range(repeats - 1)]
        return Timing(median(found), min(found), max(found), repeats)

    def span(self, call: Callable[[], Any], inner: int) -> float:
        """Return the milliseconds of one of ``inner`` calls, by events of the device."""
        torch = self.torch
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / inner

    def wall(self, call: Callable[[], Any], repeats: int) -> Timing:
        """Time a call by the host's clock, until the device has finished its work."""
        call()
        found = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            found.append((time.perf_counter() - start) * 1e3)
        return Timing(median(found), min(found), max(found), repeats)


class Rehearsal(Machine):
    """A CPU that plays the device, at toy sizes."""

    dry = True

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.device = "cpu"
        self.cupy = None
        self.cupy_missing = "a dry run"
        _play_device()

    def about(self) -> dict[str, Any]:
        return {"device": f"none: a dry run on {platform.processor() or platform.machine()}"}

    def synchronize(self) -> None:
        pass

    def free(self) -> None:
        gc.collect()

    def allocated(self) -> int:
        return 0

    def forget_peak(self) -> None:
        pass

    def peak(self) -> int:
        return 0

    def capture(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Play a graph: a replay calls ``step`` and writes into the tensors of the first call."""
        for _ in range(3):
            step()
        written = step()

        def replay() -> None:
            for there, part in zip(written, step(), strict=True):
                there.copy_(part)

        return replay, written

    def compile(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``step`` traced as one graph, without a code generator."""
        compiled: Callable[[], Any] = self.torch.compile(step, fullgraph=True, backend="eager")
        return compiled

    def span(self, call: Callable[[], Any], inner: int) -> float:
        """Return the milliseconds of one of ``inner`` calls by the host's clock."""
        start = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - start) * 1e3 / inner


def _play_device() -> None:
    """Let torch's "cpu" count as a device, with the Triton kernel where Triton is installed."""
    from gpusampler.core.devices import Device
    from gpusampler.plan.evaluators import device as device_module
    from gpusampler.plan.evaluators.kernels.fused import KernelEvaluator
    from gpusampler.plan.evaluators.kernels.kernel_spec import triton_geometry

    Device.on_host = property(lambda device: device.library == "numpy")  # type: ignore[assignment]
    if find_spec("triton") is None:
        return
    # Triton decides whether it interprets when it is first imported.
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"

    def kernel_evaluator_on(tables: Any, device: Device, settings: Any) -> KernelEvaluator | None:
        if device.library == "numpy":
            return None
        kernels = import_module("gpusampler.plan.evaluators.kernels.triton_batches")
        launches = kernels.launch, kernels.launch_patch_order
        return KernelEvaluator(tables, device, settings, *launches, triton_geometry)

    device_module.kernel_evaluator_on = kernel_evaluator_on


def _why_no_cupy() -> str | None:
    if not find_spec("cupy"):
        return "cupy is not installed"
    try:
        import cupy

        if not cupy.cuda.is_available():
            return f"cupy {cupy.__version__} sees no CUDA device"
        cupy.arange(2).sum().get()
    except Exception as error:
        return f"cupy does not work: {type(error).__name__}: {error}"
    return None


def _nvidia_smi(index: int) -> dict[str, str]:
    """Driver and clocks, where nvidia-smi is; it only reads."""
    names = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"]
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        values = found.stdout.splitlines()[-1].split(",")
        return dict(zip(names, (value.strip() for value in values), strict=True))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return {"nvidia_smi": f"{type(error).__name__}: {error}"}
