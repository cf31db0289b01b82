"""The same kernels cut into other tiles, to choose their constants by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.gpu.workload import Bench, Dataset, contiguous, gathered
from gpusampler.core import arrays, devices
from gpusampler.plan.evaluators.base import EvaluatorSettings
from gpusampler.plan.evaluators.kernels.fused import KernelEvaluator
from gpusampler.plan.evaluators.kernels.kernel_spec import (
    Geometry,
    KernelSpec,
    cuda_geometry,
    triton_geometry,
)

TILES = (512, 1024, 2048, 4096)
WARPS = (2, 4, 8)
TRITON_COLUMNS = (32, 64)
CUDA_ROWS = (8, 16, 32, 64)
CUDA_COLUMNS = (16, 32, 64)
CHECKED = 4096

SETTINGS = EvaluatorSettings(shuffle_samples=True, shuffle_batches=True, interleave=True, pad=False)


def triton_tiles(bench: Bench) -> None:
    """Lanes of a tile, lanes side by side in a row, and warps."""
    triton_batches = _module("triton_batches")
    for data in _datasets(bench):
        trial = Trial(bench, data, bench.device, "Triton", triton_batches)
        # Interpreted, a tile is as slow as another, and all of them are very slow.
        for lanes in TILES[-1:] if bench.machine.dry else TILES:
            for columns in TRITON_COLUMNS:
                for warps in WARPS:
                    with patch.object(triton_batches, "WARPS", warps):
                        tile = f"{lanes} lanes, {columns} wide, {warps} warps"
                        trial.run(
                            tile, partial(_tile, triton_geometry, max(1, lanes // columns), columns)
                        )


def cuda_tiles(bench: Bench) -> None:
    """Rows of a block, and threads side by side in a row."""
    if bench.machine.cupy is None:
        bench.record.note(f"left out: {bench.machine.cupy_missing}")
        return
    cuda_batches = _module("cuda_batches")
    for data in _datasets(bench):
        trial = Trial(bench, data, bench.machine.cupy, "CUDA C", cuda_batches)
        for rows in CUDA_ROWS:
            for columns in CUDA_COLUMNS:
                trial.run(
                    f"{rows} rows, {columns} wide", partial(_tile, cuda_geometry, rows, columns)
                )


def _module(name: str) -> Any:
    # A kernel's module imports its library.
    return import_module(f"gpusampler.plan.evaluators.kernels.{name}")


def _datasets(bench: Bench) -> list[Dataset]:
    samples = bench.scale.main
    return [
        contiguous(samples, "large"),
        gathered(bench.torch, samples, "large", bench.device, written=True),
    ]


def _tile(
    usual: Callable[..., Geometry], rows: int, columns: int, spec: KernelSpec, num: int, width: int
) -> Geometry:
    found = usual(spec, num, width)
    return Geometry(rows, columns, found.span, (-(-num // rows), found.blocks[1]))


class Trial:
    """A dataset's epoch by a kernel, cut in one way after another."""

    def __init__(self, bench: Bench, data: Dataset, device: str, kind: str, kernels: Any) -> None:
        self._bench = bench
        self._data = data
        self._kind = kind
        self._launches = kernels.launch, kernels.launch_patch_order
        self._device = devices.parse_device(device)
        self._plan = data.plan("numpy")
        self._tables = self._plan._tables.on(self._device, data.groups.order)
        # A tile that is wrong is not to be taken for a fast one.
        first = np.arange(min(self._plan.num_batches, CHECKED))
        self._wanted = self._plan.evaluate(0, first).indices

    def run(self, tile: str, geometry: Callable[[KernelSpec, int, int], Geometry]) -> None:
        """Check and time one way to cut the launch."""
        self._bench.record.stop_if_late()
        evaluator = KernelEvaluator(self._tables, self._device, SETTINGS, *self._launches, geometry)
        with devices.device_context(self._device):
            xp, handle = arrays.namespace(self._device), devices.device_handle(self._device)
            slots = xp.arange(self._plan.num_batches, dtype=xp.int64, device=handle)
            call = partial(evaluator.block, self._plan.evaluator.streams, 0, slots)
            found = arrays.to_numpy(call()[0][: self._wanted.shape[0]])
            name = f"{self._kind}, {tile}"
            right = bool(np.array_equal(found, self._wanted))
            self._bench.record.check(f"{name}, {self._data.layout}: right", right)
            timing = self._bench.machine.time(call, self._bench.scale.repeats)
        about = {"layout": self._data.layout, "dtype": "int64", "mix": self._data.mix}
        self._bench.record.timing(name, timing, self._data.samples, **about)
