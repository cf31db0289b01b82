"""How long torch.compile takes over a cursor: ``pytest -m slow`` on this file.

Forward and backward of a step, by torch's default compiler on the CPU, one thread, nothing cached:
with its own settings and with the option that docs/how-to/in-memory.md names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLANS = {"small": ((30, 12, 25, 8), 8), "large": ((70_000, 65_536), 4096)}
OPTIONS: dict[str, dict[str, int]] = {"default": {}, "option": {"realize_opcount_threshold": 8}}
STEPS = 50

CHILD = """
import sys, timeit
import numpy as np
import torch
from gpusampler import PatchBatchSampler

torch.set_num_threads(1)
sizes, batch_size, options, steps = eval(sys.argv[1])
ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
cursor = PatchBatchSampler(torch.tensor(ids), batch_size, seed=5, partial="pad").cursor()
x, weights = torch.randn(ids.size, 3), torch.randn(3, requires_grad=True)
row = torch.arange(batch_size)

def step():
    indices, valid, _ = cursor()
    errors = (x[indices] @ weights).square()
    return torch.where(row < valid, errors, 0).sum() / valid

compiled = torch.compile(step, fullgraph=True, options=options or None)
seconds = timeit.timeit(lambda: compiled().backward(), number=1)
fast, plain = (min(timeit.repeat(call, number=steps)) / steps * 1e3 for call in (compiled, step))
print(f"compiled in {seconds:5.1f} s, forward {fast:.3f} ms, not compiled {plain:.2f} ms")
"""


@pytest.mark.slow("compiles, with nothing cached")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_compile(say, tmp_path, plan, option):
    """Each is in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, repr((*PLANS[plan], OPTIONS[option], STEPS))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    say(f"{plan:6} {option:8} {done.stdout.strip()}")
