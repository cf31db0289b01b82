"""How long torch.compile takes over a cursor: ``python -m benchmarks.compiling``.

Forward and backward of a step, by torch's default compiler on the CPU, one thread, nothing cached:
with its own settings and with the option that docs/how-to/compiled-loops.md names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time

PLANS = {"small": ((30, 12, 25, 8), 8), "large": ((70_000, 65_536), 4096)}
OPTIONS: dict[str, dict[str, int]] = {"default": {}, "option": {"realize_opcount_threshold": 8}}
STEPS = 50


def measure(name: str, options: dict[str, int]) -> str:
    """Compile a step over a plan and return its line of the table."""
    import numpy as np
    import torch

    from gpusampler import PatchBatchSampler

    torch.set_num_threads(1)
    sizes, batch_size = PLANS[name]
    ids = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    cursor = PatchBatchSampler(torch.tensor(ids), batch_size, seed=5, partial="pad").cursor()
    x, weights = torch.randn(ids.size, 3), torch.randn(3, requires_grad=True)
    row = torch.arange(batch_size)

    def step() -> torch.Tensor:
        indices, valid, _ = cursor()
        errors = (x[indices] @ weights).square()
        return torch.where(row < valid, errors, 0).sum() / valid

    compiled = torch.compile(step, fullgraph=True, options=options or None)
    start = time.perf_counter()
    compiled().backward()
    seconds = time.perf_counter() - start
    fast, plain = (_per_call(call) * 1e3 for call in (compiled, step))
    return f"compiled in {seconds:5.1f} s, forward {fast:.3f} ms, not compiled {plain:.2f} ms"


def _per_call(call: object) -> float:
    """Return the seconds of a call, the best of five rounds."""
    assert callable(call)
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(STEPS):
            call()
        rounds.append((time.perf_counter() - start) / STEPS)
    return min(rounds)


def main() -> None:
    """Measure each in a process of its own, with an empty cache."""
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], OPTIONS[sys.argv[2]]))
        return
    for name in PLANS:
        for option in OPTIONS:
            with tempfile.TemporaryDirectory() as cache:
                line = subprocess.run(
                    [sys.executable, "-W", "ignore", "-m", "benchmarks.compiling", name, option],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"},
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            print(f"{name:6} {option:8} {line}", end="", flush=True)


if __name__ == "__main__":
    main()
