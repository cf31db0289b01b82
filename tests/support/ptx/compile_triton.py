"""Compile the Triton kernel to PTX for launches as they come: ``python compile_triton.py ARCH``.

A process of its own: Triton decides at its first import whether it compiles, and the tests' process
has it interpret. One request in JSON per line of standard input, one answer per line of standard
output. It does not import torch, which takes longer than the compilation of a kernel.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from gpusampler.plan.evaluators.kernels import triton_batches


class TensorType:
    """What Triton looks at in a tensor."""

    def __init__(self, dtype: str, address: int) -> None:
        self.dtype, self._address = dtype, address

    def data_ptr(self) -> int:
        return self._address


def as_value(described: Any) -> Any:
    return TensorType(*described) if isinstance(described, list) else described


def compile_for(request: dict[str, Any]) -> dict[str, Any]:
    """Return the PTX and how to launch it; ``parameters`` are the arguments that it takes."""
    arguments = [as_value(each) for each in request["args"]]
    options = {name: as_value(each) for name, each in request["options"].items()}
    kernel = getattr(triton_batches, request["kernel"])
    compiled = kernel.warmup(*arguments, grid=(1, 1), **options)
    types = compiled.src.signature
    return {
        "ptx": compiled.asm["ptx"],
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "arguments": kernel.arg_names[: len(arguments)],
        "parameters": [name for name in types if types[name] != "constexpr"],
    }


def main(arch: int) -> None:
    assert "TRITON_INTERPRET" not in os.environ
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    for line in sys.stdin:
        print(json.dumps(compile_for(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
