"""Iterating on the device waits for nothing, as torch's own detector sees it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.workload import shuffled_ids
from gpusampler import PatchBatchSampler, PatchTensorLoader

COUNTS = np.array([40, 2000, 3000, 1500, 33, 7])
BATCH = 64


def nothing_waits(bench: Bench) -> None:
    """A whole epoch runs while torch raises at every synchronisation."""
    _detector_works(bench)
    ids = shuffled_ids(bench.torch, COUNTS, bench.device)
    rows = bench.torch.ones((int(COUNTS.sum()), 4), device=bench.device)

    def sampler() -> PatchBatchSampler:
        return PatchBatchSampler(ids, BATCH, seed=0)

    def in_order() -> PatchBatchSampler:
        return PatchBatchSampler(ids, BATCH, seed=0, interleave=False, partial="pad")

    def balanced() -> PatchBatchSampler:
        return PatchBatchSampler(ids, BATCH, seed=0, steps="balanced", step_width=4)

    def loader() -> PatchTensorLoader:
        return PatchTensorLoader(sampler(), x=rows)

    makers: dict[str, Callable[[], Any]] = {
        "batches()": sampler,
        "batches(), interleave=False": in_order,
        "batches(), steps='balanced'": balanced,
        "PatchTensorLoader": loader,
    }
    for name, make in makers.items():
        made = make()
        # After another epoch, so that kernels are compiled and tables are there.
        deque(_epoch_of(made), maxlen=0)
        error = _error_of(bench, made)
        bench.record.check(f"{name} waits for nothing", not error, error)
    for name, make in makers.items():
        error = _error_of(bench, make())
        waits = 1.0 if error else 0.0
        bench.record.goal(f"{name} right after construction: waits", waits, 0, "", least=False)
        if error:
            bench.record.found["header"].setdefault("fresh_waits", {})[name] = error


def _epoch_of(made: PatchBatchSampler | PatchTensorLoader) -> Iterable[Any]:
    return made.batches() if isinstance(made, PatchBatchSampler) else made


def _error_of(bench: Bench, made: PatchBatchSampler | PatchTensorLoader) -> str:
    """Return what waits in an epoch, or an empty string."""
    try:
        with bench.machine.no_waiting():
            deque(_epoch_of(made), maxlen=0)
    except RuntimeError as error:
        return str(error)[:400]
    sampler = made if isinstance(made, PatchBatchSampler) else made.batch_sampler
    # A kernel that waited at its first use would have been given up, and nothing raised.
    return "" if sampler.plan.evaluator.device_evaluator().has_kernel else "the kernel was given up"


def _detector_works(bench: Bench) -> None:
    """What waits is found to: otherwise the rest would show nothing."""
    number = bench.torch.ones((), device=bench.device)
    try:
        with bench.machine.no_waiting():
            number.item()
    except RuntimeError:
        found = True
    else:
        found = bench.machine.dry
    bench.record.check("torch notices .item()", found)
