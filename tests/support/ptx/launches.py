"""The package's launches of its kernels, compiled to PTX for a GPU and run on the CPU.

`PtxRawKernel` stands for CuPy's, `PtxTritonKernel` for what ``@triton.jit`` returns. Names and
order of arguments are those of the kernels' own signatures.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from support.processes import environment
from support.ptx.machine import run
from support.ptx.memory import Array
from support.ptx.program import Program

ARCH = 90
WRITTEN = {
    "batches_kernel": {"out", "lengths", "groups"},
    "patch_order_kernel": {"patches", "offsets"},
}
"""Arguments that Triton's kernels write; all other arrays are read-only."""
ADVANCED = {"slots", "epoch"}
"""What the batch kernel writes, too, if it advances the counters."""


class Launch(NamedTuple):
    """What was launched, and how many instructions were issued; see `machine.run`."""

    ptx: str
    threads: int
    issued: int


class Launches:
    """Runs kernels and keeps what was launched.

    Attributes
    ----------
    change : callable
        Applied to the PTX of every launch.
    done : list of Launch
    """

    def __init__(self) -> None:
        self.change: Callable[[str], str] = str
        self.done: list[Launch] = []

    def run(
        self, ptx: str, grid: tuple[int, int], threads: int, arguments: list[Any], shared: int = 0
    ) -> None:
        ptx = self.change(ptx)
        issued = run(parse(ptx), grid, threads, arguments, shared)
        self.done.append(Launch(ptx, threads, issued))


launches = Launches()
parse = cache(Program.parse)


def as_argument(name: str, value: Any, is_written: bool) -> int | Array | None:
    if value is None or isinstance(value, int):
        return value
    values = value if isinstance(value, np.ndarray) else value.numpy()
    assert values.flags.c_contiguous, name
    return Array(name, values, values.ctypes.data, is_written)


def ptx_of_cuda(source: str, options: tuple[str, ...]) -> str:
    """Compile CUDA C by nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cu"
        path.write_text(source)
        command = ["nvcc", "-ptx", f"-arch=sm_{ARCH}", *options, "-o", "kernel.ptx", path.name]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return (Path(folder) / "kernel.ptx").read_text()


class PtxRawKernel:
    """What `cupy.RawKernel` is to the package."""

    def __init__(self, source: str, name: str, options: tuple[str, ...]) -> None:
        self._ptx = ptx_of_cuda(source, options)
        listed = re.search(rf"KERNEL void {name}\((.*?)\)", source, re.S)
        assert listed
        self._parameters: list[tuple[str, bool]] = []
        for parameter in listed[1].split(","):
            type_name, name = parameter.strip().rpartition("*")[::2]
            is_result = bool(type_name) and not type_name.startswith("const")
            self._parameters.append((name.split()[-1], is_result))

    def __call__(self, grid: tuple[int, int], block: tuple[int], args: tuple[Any, ...]) -> None:
        values = [each if isinstance(each, np.ndarray) else int(each) for each in args]
        arguments = [
            as_argument(name, value, is_result)
            for (name, is_result), value in zip(self._parameters, values, strict=True)
        ]
        launches.run(self._ptx, grid, block[0], arguments)


class TritonCompiler:
    """A process that compiles the Triton kernel."""

    def __init__(self) -> None:
        self._cache = tempfile.TemporaryDirectory(prefix="gpusampler-triton-")
        script = Path(__file__).with_name("compile_triton.py")
        variables = {"TRITON_CACHE_DIR": self._cache.name, "TRITON_INTERPRET": None}
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(ARCH)],
            env=environment(**variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def compile(
        self, kernel: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what `compile_triton.compile_for` returns for the arguments of a launch."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "kernel": kernel,
            "args": [self._describe(each) for each in args],
            "options": {name: self._describe(each) for name, each in options.items()},
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that compiles has failed; see its standard error"
        return json.loads(answer)

    @staticmethod
    def _describe(value: Any) -> Any:
        if value is None or isinstance(value, int):
            return value
        return [str(value.dtype).rpartition(".")[2], value.data_ptr() % 16]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._cache.cleanup()


@cache
def triton_compiler() -> TritonCompiler:
    compiler = TritonCompiler()
    atexit.register(compiler.close)
    return compiler


class PtxTritonKernel:
    """What ``@triton.jit`` makes of a kernel is to the package."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            compiled = triton_compiler().compile(self._name, args, options)
            written = WRITTEN[self._name] | (ADVANCED if options.get("ADVANCE") else set())
            by_name = dict(zip(compiled["arguments"], args, strict=True)) | options
            arguments = [
                as_argument(name, by_name[name], name in written) for name in compiled["parameters"]
            ]
            # Then come two pointers to scratch memory, of which the kernel needs none.
            arguments += [None, None]
            blocks = (*grid, 1)[:2]
            launches.run(
                compiled["ptx"], blocks, compiled["threads"], arguments, compiled["shared"]
            )

        return launch


def launch_triton_ptx(spec: Any, geometry: Any, args: tuple[Any, ...]) -> None:
    """Run the Triton kernel over tensors of the host, as a GPU would."""
    from gpusampler.plan.evaluators.kernels import triton_batches

    with mock.patch.object(triton_batches, "batches_kernel", PtxTritonKernel("batches_kernel")):
        triton_batches.launch(spec, geometry, args)


def launch_patch_order_triton_ptx(form: int, epoch_on_device: bool, args: tuple[Any, ...]) -> None:
    """Run the Triton kernel of the patches' order, as `launch_triton_ptx` does."""
    from gpusampler.plan.evaluators.kernels import triton_batches

    kernel = PtxTritonKernel("patch_order_kernel")
    with mock.patch.object(triton_batches, "patch_order_kernel", kernel):
        triton_batches.launch_patch_order(form, epoch_on_device, args)
