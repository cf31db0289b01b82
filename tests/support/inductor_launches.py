"""Compile a call of a cursor for a GPU that is not there, and count what a step launches.

Run ``python -m support.inductor_launches SETTINGS``, settings of a plan in JSON, in ``tests``.
torch.compile traces and inductor writes its code, which is not run. Prints the names of the
kernels that the code launches, as JSON.

A process of its own: Triton must not interpret, and inductor must believe in the GPU throughout.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from triton.backends.compiler import GPUTarget

from gpusampler import PatchBatchSampler, PatchGroups
from support.fake_cuda import DEVICE, fake_cuda

COUNTS = np.array([40, 2000, 3000, 33, 1500, 7])
PROPERTIES = {
    "multi_processor_count": 132,
    "major": 9,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}


class CodeWritten(BaseException):
    """Inductor has written its code; nothing that catches errors may catch this."""


def stop_with_code(graph: GraphLowering) -> None:
    written = graph.codegen()[0]
    raise CodeWritten(getattr(written, "value", written))


def launches(settings: dict[str, Any]) -> list[str]:
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 1,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    properties = DeviceProperties(type="cuda", index=1, cc=90, **PROPERTIES)
    replaced = {
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.get_device_name": lambda *_: "GPU",
        "torch.cuda.get_device_properties": lambda *_: SimpleNamespace(**PROPERTIES, minor=0),
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch._inductor.runtime.hints.DeviceProperties.create": lambda device: properties,
        # Its patterns of attention would be traced with tensors on the GPU.
        "torch._inductor.fx_passes.joint_graph.lazy_init": lambda *_: None,
    }
    # What evaluates operations on the GPU while it compiles.
    changed = {"joint_graph_constant_folding": False, "pattern_matcher": False}
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_cuda(records=False))
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", stop_with_code))
        stack.enter_context(config.patch(fx_graph_cache=False, compile_threads=1, **changed))
        groups = PatchGroups.from_counts(COUNTS)
        cursor = PatchBatchSampler(groups, 64, seed=3, device=DEVICE, **settings).cursor()
        try:
            torch.compile(cursor, fullgraph=True)()
        except CodeWritten as written:
            code = str(written)
            # Inductor's kernels and the package's own; whatever is called by its name in torch.
            called = r"\b(\w+)\.run\(|(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\("
            found = re.findall(called, code[code.index("def call(") :])
            return ["".join(names) for names in found]
    raise AssertionError("nothing was compiled")


if __name__ == "__main__":
    print(json.dumps(launches(json.loads(sys.argv[1]))))
