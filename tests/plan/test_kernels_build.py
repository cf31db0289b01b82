"""The kernels compile for GPUs, also where there is none, and nothing compiles before its use."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from gpusampler.plan.evaluators.kernels.kernel_spec import KernelSpec
from support.kernels import cuda_batches_on_host
from support.paths import SUPPORT
from support.processes import run_python

# Where every lane is a row of its own, what belongs to a row fills the registers.
MAY_SPILL = {"64-bit slots, width 1"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[dict]:
    if not find_spec("triton") or not find_spec("torch"):
        pytest.skip("torch or triton is not installed")
    folder = tmp_path_factory.mktemp("triton")
    variables = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_INTERPRET": None}
    return json.loads(run_python(SUPPORT / "build_triton.py", folder, **variables).stdout)


@pytest.mark.slow("compiles the kernel for two GPUs in every form")
class TestTriton:
    def test_compiles_for_both_gpus(self, built):
        assert {case["arch"] for case in built} == {80, 90}
        for case in built:
            assert Path(case["path"]).read_bytes().startswith(b"\x7fELF"), case["name"]

    def test_the_cases_are_of_every_form(self, built):
        constants = [case["constants"] for case in built if case["arch"] == 90]
        # Which flags are 0 somewhere and something else elsewhere: all of them.
        assert {constant["SLOTS"] for constant in constants} == {0, 1, 2, 3}
        for name in KernelSpec._fields:
            assert len({constant[name.upper()] for constant in constants}) > 1, name

    def test_registers_suffice(self, built):
        folder = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin"
        if not (folder / "cuobjdump").exists():
            pytest.skip("this Triton comes without cuobjdump")
        for case in built:
            if case["name"] not in MAY_SPILL:
                assert memory_of(folder / "cuobjdump", case["path"]) == 0, case["name"]


def memory_of(cuobjdump: Path | str, cubin: str) -> int:
    """Bytes a thread keeps in memory because it has no register for them."""
    usage = subprocess.run(
        [str(cuobjdump), "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


NONE = KernelSpec(*[0] * len(KernelSpec._fields))
PLAIN = NONE._replace(slots=2, samples=1, fewest=3, most=3)
CUDA_FORMS = {
    "plain": (PLAIN, "int64", "int64"),
    "mixed, gathered": (PLAIN._replace(slots=1, small=32, most=6, ordered=1), "int32", "int32"),
    "ragged, 64-bit slots": (
        PLAIN._replace(slots=3, ragged=1, pad=1, own=2, passes=1, ordered=1),
        "int64",
        "int64",
    ),
    "costliest, runs": (PLAIN._replace(steps=2, runs=2, costliest=2, bins=1), "int64", "int64"),
    "visits": (PLAIN._replace(slots=0, visits=2, passes=1), "int64", "int64"),
    "in order, small": (
        PLAIN._replace(slots=0, in_order=1, small=8, fewest=0, most=0, own=1),
        "int64",
        "int64",
    ),
    "as they are": (PLAIN._replace(samples=0, fewest=0, most=0), "int64", "int32"),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            form,
            id=name,
            marks=[pytest.mark.slow("nvcc compiles each form")] * (name != "mixed, gathered"),
        )
        for name, form in CUDA_FORMS.items()
    ],
)
def test_cuda_c_compiles_for_a_gpu(case, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    cubin = tmp_path / "batches.cubin"
    source = tmp_path / "batches.cu"
    source.write_text(cuda_batches_on_host().source())
    options = ["-std=c++17", "-DPATCH_ORDER=0", *cuda_batches_on_host().defines(*case)]
    quiet = ["-Werror", "all-warnings", "-Xcudafe", "--diag_suppress=declared_but_not_referenced"]
    subprocess.run(
        [nvcc, "-cubin", "-arch=sm_90", *options, *quiet, "-o", str(cubin), str(source)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert cubin.read_bytes().startswith(b"\x7fELF")
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is not None:
        assert memory_of(cuobjdump, str(cubin)) == 0


def test_a_numpy_plan_loads_no_kernel():
    code = (
        "import sys, gpusampler\n"
        "groups = gpusampler.PatchGroups.from_counts([50, 3])\n"
        "plan = gpusampler.EpochPlan(groups, 4, 0)\n"
        "assert plan.evaluate(0, [1, 2]).lengths.size == 2\n"
        "assert plan.evaluator.block_by_arrays(0, plan.sizes_by_patch[:1] * 0).lengths.size == 1\n"
        "print(*sys.modules)"
    )
    loaded = set(run_python("-c", code).stdout.split())
    assert "gpusampler.plan.evaluators.kernels.fused" in loaded
    assert not loaded & {"triton", "torch", "cupy"}
    assert not loaded & {
        f"gpusampler.plan.evaluators.kernels.{name}_batches" for name in ("triton", "cuda")
    }
