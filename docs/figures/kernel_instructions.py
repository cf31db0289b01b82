"""Instructions per index of both kernels, for every kind of plan, without a GPU.

Run ``python -m docs.figures.kernel_instructions [KIND ...]``. Triton compiles for sm_90, nvcc does
where there is one. An index is one sample of one batch; batches have 64, of patches of 70,000
samples, except where the kind says otherwise. Two counts, neither of which measures time:

- *PTX executed*: instructions that run when the tests' emulation evaluates 1,024 batches, from the
  first instruction of the kernel to the last, divided by the indices. Every warp counts as 32
  threads, also where some of them idle. Loops count as often as they run; what a row costs is in
  the count, spread over its indices.
- *SASS in the loop*: machine instructions of the innermost loop that stores indices, divided by the
  indices that a thread computes in one turn. Where there is no such loop, because one tile is the
  whole row, it is all of the kernel. Both branches of an ``if`` count. ptxas and cuobjdump make
  it; they come with CUDA and with Triton.

At commit 84c9c43, with Triton 3.7.1 and nvcc 13.0, plain plans took 151 and 171 in Triton, 150 and
138 in CUDA C.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpusampler import CostBudget, EpochPlan, PatchGroups

# The emulation is part of the tests.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from support.kernels import kernel_of
from support.ptx.launches import launches

NUM_ROWS = 1024
"""A multiple of what a block of either kernel computes."""
LARGE = (70_000,) * 40
MIXED = (20, 70_000, 300, 1200, 33) * 8
COSTS = np.arange(1, 41)
KINDS: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "plain": (LARGE, 64, {}),
    "plain, int32": (LARGE, 64, {}),
    "gathered": (LARGE, 64, {}),
    "rows of 100": (LARGE, 100, {}),
    "rows of 1,000": (LARGE, 1000, {}),
    "few patches": (LARGE[:9], 64, {}),
    "pad": (LARGE, 64, {"partial": "pad"}),
    "even": (LARGE, 64, {"partial": "even"}),
    "patches of 1,024 to 5,000": ((1024, 5000, 3000) * 13, 64, {}),
    "patches of 33 to 1,000": ((33, 1000, 500) * 13, 64, {}),
    "patches of 2 to 32": ((2, 32, 20) * 13, 16, {}),
    "patches of 20 to 70,000": (MIXED, 64, {}),
    "slots as they are": (LARGE, 64, {"shuffle_patches": False}),
    "samples as they are": (LARGE, 64, {"shuffle_within_batches": False}),
    "in a row": (LARGE, 64, {"interleave": False}),
    "balanced": (LARGE, 64, {"steps": "balanced", "step_width": 8, "patch_costs": COSTS}),
    "same patch": (LARGE, 64, {"steps": "same_patch", "step_width": 8}),
    "same patch, in a row": (
        LARGE,
        64,
        {"steps": "same_patch", "step_width": 8, "interleave": False},
    ),
    "costliest first": (
        LARGE,
        64,
        {"costliest_first": True, "step_width": 8, "patch_costs": COSTS},
    ),
    "weights": (LARGE, 64, {"weights": COSTS, "epoch_batches": 10_000}),
    "fewer slots than patches": (LARGE, 64, {"epoch_batches": 20}),
    "cost budget": (LARGE, CostBudget(640, cost=COSTS % 7 + 4), {}),
}
KERNELS = {"Triton": "triton ptx", "CUDA C": "cuda-c ptx"}


class Count(NamedTuple):
    executed: float
    in_loop: float | None
    registers: int | None


def count(name: str, kernel: str) -> Count:
    """Evaluate some batches of a kind of plan by a kernel ("Triton" or "CUDA C")."""
    counts, batch_size, settings = KINDS[name]
    groups = PatchGroups.from_counts(counts)
    if name == "gathered":
        order = np.arange(groups.source_size, dtype=np.int32)
        tables = groups.patch_ids, groups.counts, groups.starts, order
        groups = PatchGroups(*tables, source_size=groups.source_size)
    plan = EpochPlan(groups, batch_size, 2**64 - 1, **settings)
    slots = np.random.default_rng(0).integers(0, plan.num_batches, NUM_ROWS)
    evaluator = kernel_of(plan, KERNELS[kernel])
    indices, _, _ = evaluator.block(plan, 3, slots, "int32" if name == "plain, int32" else "int64")
    _, geometry = evaluator.launches[-1]
    launch = launches.done[-1]
    # A block of Triton's computes a tile at once, one of CUDA C a lane per thread.
    tile = geometry.rows * geometry.columns if kernel == "Triton" else launch.threads
    in_loop, registers = _sass_of(launch.ptx)
    if in_loop is not None:
        in_loop /= max(1, tile // launch.threads)
    return Count(launch.issued / indices.size, in_loop, registers)


def _find(tool: str) -> str | None:
    spec = find_spec("triton")
    bundled = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin") if spec else None
    return shutil.which(tool) or shutil.which(tool, path=bundled)


def _sass_of(ptx: str) -> tuple[float | None, int | None]:
    """Return the machine instructions of the loop that stores indices, and registers a thread."""
    ptxas, cuobjdump = _find("ptxas"), _find("cuobjdump")
    if ptxas is None or cuobjdump is None:
        return None, None
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        command = [ptxas, "-v", f"-arch={target[1]}", str(source), "-o", str(cubin)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        sass = subprocess.run(
            [cuobjdump, "-sass", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    registers = re.search(r"Used (\d+) registers", said)
    return float(_loop_that_stores(sass)), int(registers[1]) if registers else None


def _loop_that_stores(sass: str) -> int:
    """Return the number of instructions of the innermost loop with a store, or of the kernel."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, re.M)
    code = {int(address, 16): text for address, text in lines if "NOP" not in text}
    stores = [address for address, text in code.items() if "STG" in text]
    jumps = {
        address: int(target[1], 16)
        for address, text in code.items()
        if (target := re.search(r"\bBRA(?:\.\w+)* (?:.*, )?(?:`\(.*\)|0x([0-9a-f]+))", text))
        and target[1]
    }
    loops = [
        sum(start <= each <= end for each in code)
        for end, start in jumps.items()
        if start < end and any(start <= store <= end for store in stores)
    ]
    return min(loops, default=len(code))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    names = parser.parse_args(arguments).kinds or list(KINDS)
    if unknown := sorted(set(names) - set(KINDS)):
        parser.error(f"no kind of plan: {', '.join(unknown)}")
    kernels = [kernel for kernel in KERNELS if kernel == "Triton" or shutil.which("nvcc")]
    print("| plan | kernel | PTX executed | SASS in the loop | registers |\n|---|---|---|---|---|")
    for name in names:
        for kernel in kernels:
            executed, in_loop, registers = count(name, kernel)
            cells = name, kernel, f"{executed:.1f}", f"{in_loop:.1f}" if in_loop else "", registers
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
