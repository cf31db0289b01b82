"""Compile the Triton kernel for GPUs that are not there.

Run ``python -m support.build_triton FOLDER`` in ``tests``.

A process of its own: Triton decides at its first import that it compiles, and the tests' process
has it interpret. The kernel is launched as the package launches it, up to the point where a GPU is
needed, so that what is compiled is what these arguments ask for on a machine that has one. Writes
a cubin for every case, and prints what each was compiled for as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from gpusampler import CostBudget, EpochPlan, PatchGroups
from gpusampler.core.devices import Device
from gpusampler.plan.evaluators.base import EvaluatorSettings
from gpusampler.plan.evaluators.kernels import fused, triton_batches
from gpusampler.plan.evaluators.kernels.kernel_spec import triton_geometry

CPU = Device("torch", "cpu")
LARGE = [70_000] * 40


class Compiled:
    """The kernel; launching it compiles it, and keeps what for and what came of it."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.constants: dict[str, int] = {}
        self.cubin = b""

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            self.constants = constants
            self.cubin = self._kernel.warmup(*args, grid=grid, **constants).asm["cubin"]

        return launch


def gathered(dtype: str) -> PatchGroups:
    groups = PatchGroups.from_ids(np.arange(300_000) % 4)
    tables = groups.patch_ids, groups.counts, groups.starts, groups.order.astype(dtype)
    return PatchGroups(*tables, source_size=groups.source_size)


def contiguous(counts: list[int]) -> PatchGroups:
    return PatchGroups.from_counts(counts)


# Name: groups, batch size, method, and settings.
CASES: dict[str, tuple[PatchGroups, Any, str, dict[str, Any]]] = {
    "plain": (contiguous(LARGE), 64, "block", {}),
    "plain int32": (contiguous(LARGE), 64, "block int32", {}),
    "gathered": (gathered("int32"), 64, "block", {}),
    "gathered int64, odd width": (gathered("int64"), 33, "block", {"partial": "pad"}),
    "slots as they are": (contiguous(LARGE), 64, "block", {"shuffle_patches": False}),
    "in order": (contiguous(LARGE), 64, "block", {"interleave": False}),
    "weights": (contiguous(LARGE), 64, "block", {"weights": range(1, 41)}),
    "few visits": (contiguous(LARGE), 64, "block", {"epoch_batches": 10}),
    "same patch": (contiguous(LARGE), 64, "block", {"steps": "same_patch", "step_width": 3}),
    "balanced": (contiguous(LARGE), 64, "block", {"steps": "balanced", "step_width": 7}),
    "costliest first": (contiguous(LARGE), 64, "block", {"costliest_first": True, "step_width": 8}),
    "costliest first, weights": (
        contiguous([70_001] * 40),
        64,
        "block",
        {"costliest_first": True, "step_width": 8, "weights": range(1, 41)},
    ),
    "cost bins": (
        contiguous([70_000] * 4),
        CostBudget(64.0, sample_costs=1.0 + np.arange(280_000) % 3),
        "block",
        {},
    ),
    "few slots, wide": (contiguous([70_000] * 2), 5000, "block", {}),
    "64-bit slots, width 1": (contiguous([2**31 - 1] * 3), 1, "block", {}),
    "samples as they are": (contiguous(LARGE), 64, "block", {"shuffle_within_batches": False}),
    "small": (contiguous([20, 30] * 20), 16, "block", {}),
    "mixed": (contiguous([20, 70_000, 2000]), 64, "ragged", {}),
    "ragged, padded": (gathered("int32"), 48, "ragged", {"partial": "pad"}),
    "step": (contiguous(LARGE), 64, "step", {}),
    "step, mixed": (contiguous([20, 70_000, 2000]), 48, "step", {}),
    "advance": (contiguous(LARGE), 64, "advance", {}),
    "advance, in order": (contiguous(LARGE), 64, "advance", {"interleave": False}),
}
# The older GPU needs no more than one of each kind of work.
CASES_OF = {90: list(CASES), 80: ["plain", "mixed", "step, mixed", "64-bit slots, width 1"]}


def evaluate(case: tuple[PatchGroups, int, str, dict[str, Any]]) -> None:
    groups, batch_size, method, settings = case
    plan = EpochPlan(groups, batch_size, 2**64 - 1, **settings)
    # As if every patch had a size of its own.
    host_tables = replace(plan._tables, is_uniform=method != "ragged")
    tables = host_tables.on(CPU, plan.units.groups.order)
    evaluator_settings = EvaluatorSettings(
        plan.shuffle_within_batches, plan.shuffle_patches, plan.interleave, plan.partial == "pad"
    )
    evaluation = fused.KernelEvaluator(
        tables,
        CPU,
        evaluator_settings,
        triton_batches.launch,
        triton_batches.launch_patch_order,
        triton_geometry,
    )
    slots = np.arange(min(plan.num_batches, 1000))
    locations = plan.evaluator.locate(3, slots)
    if method == "step":
        evaluation.batch(plan.evaluator.streams, torch.tensor(3), torch.tensor(1))
    elif method == "advance":
        advance = fused.Advance(3, 1, drops_uneven=True, repeats_count=False)
        evaluation.batch(plan.evaluator.streams, torch.tensor(3), torch.tensor(1), advance)
    elif method == "ragged":
        evaluation.ragged(plan.evaluator.streams, 3, locations)
    else:
        dtype = "int32" if method.endswith("int32") else "int64"
        evaluation.block(plan.evaluator.streams, 3, torch.from_numpy(slots), dtype)


def main(folder: Path) -> None:
    assert "TRITON_INTERPRET" not in os.environ
    kernel = Compiled(triton_batches.batches_kernel)
    triton_batches.batches_kernel = kernel
    triton_batches.patch_order_kernel = Compiled(triton_batches.patch_order_kernel)
    built = []
    for arch, names in CASES_OF.items():
        # Triton keeps what it has compiled by the number of the device.
        driver = SimpleNamespace(
            get_current_target=lambda arch=arch: GPUTarget("cuda", arch, 32),
            get_current_device=lambda arch=arch: arch,
            get_current_stream=lambda device: 0,
        )
        triton.runtime.driver.set_active(driver)
        for name in names:
            kernel.cubin = b""
            evaluate(CASES[name])
            path = folder / f"{len(built)}.cubin"
            path.write_bytes(kernel.cubin)
            case = {"arch": arch, "name": name, "path": str(path), "constants": kernel.constants}
            built.append(case)
    print(json.dumps(built))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
