"""One batch a step inside a CUDA graph, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu.machine import Timing
from benchmarks.gpu.workload import SEED, Bench, Dataset, contiguous, gathered
from gpusampler import PatchBatchSampler
from gpusampler.sampler.cursor import BatchCursor, CursorBatch

STEP_GOAL_US = 10.0
BATCHES = (64, 256)


def in_graph(bench: Bench, compiled: bool) -> None:
    """Capture a step, check that replays go through an epoch's end, and time them."""
    data = [
        contiguous(bench.scale.rows, "large"),
        gathered(bench.torch, bench.scale.rows, "large", bench.device, written=True),
    ]
    for batch_size in BATCHES:
        for dataset in data if batch_size == BATCHES[0] else data[:1]:
            bench.record.stop_if_late()
            _one(bench, dataset, batch_size, compiled)


def _one(bench: Bench, dataset: Dataset, batch_size: int, compiled: bool) -> None:
    how = "compiled" if compiled else "eager"
    name = f"{how}, {dataset.layout}, batch {batch_size}"
    about = {"layout": dataset.layout, "batch": batch_size}
    several = bench.scale.together
    cursor = _cursor(bench, dataset, batch_size)
    step: Callable[[], CursorBatch] = cursor.forward
    if compiled:
        # A compilation of its own for each plan, without the ones before in its way.
        bench.torch.compiler.reset()
        step = bench.machine.compile(lambda: cursor())
    _check(bench, cursor, step, f"{name}, without a graph")
    _noted(bench, f"{how}, no graph", _per_call(bench, step, 1), about)
    replay, written = bench.machine.capture(step)

    def replayed() -> CursorBatch:
        replay()
        return written

    _check(bench, cursor, replayed, f"{name}, in a graph")
    alone = _per_call(bench, replay, 1)
    _noted(bench, f"{how}, a graph of 1 step", alone, about)

    def steps() -> CursorBatch:
        return [step() for _ in range(several)][-1]

    replay_steps, _ = bench.machine.capture(steps)
    together = _per_call(bench, replay_steps, several)
    _noted(bench, f"{how}, a graph of {several} steps", together, about)
    bench.check_kernel(cursor.plan, name)
    best = min(alone.ms, together.ms) * 1e3
    bench.record.goal(f"step in a graph, {name}", best, STEP_GOAL_US, "us", least=False)


def _cursor(bench: Bench, dataset: Dataset, batch_size: int) -> BatchCursor:
    sampler = PatchBatchSampler(
        dataset.groups, batch_size, seed=SEED, partial="pad", device=bench.device
    )
    return sampler.cursor()


def _check(bench: Bench, cursor: BatchCursor, step: Callable[[], CursorBatch], name: str) -> None:
    """A few steps on both sides of the end of an epoch are what the plan says."""
    plan = cursor.plan
    total, before = plan.num_batches, 3
    cursor.seek(5, total - before)
    found = []
    for _ in range(2 * before):
        batch = step()
        # A replay writes where the last one wrote.
        found.append([part.cpu().numpy().copy() for part in batch])
    host = plan.on("numpy")
    wanted = []
    for epoch, slots in ((5, range(total - before, total)), (6, range(before))):
        block = host.evaluate(epoch, np.asarray(slots))
        wanted += list(zip(*block, strict=True))
    same = all(
        np.array_equal(ours.reshape(theirs.shape), theirs)
        for batch, right in zip(found, wanted, strict=True)
        for ours, theirs in zip(batch, right, strict=True)
    )
    place = cursor.position() == (6, before)
    detail = "" if same and place else f"at {cursor.position()}, batches right: {same}"
    bench.record.check(f"steps through an epoch's end: {name}", same and place, detail)


def _per_call(bench: Bench, call: Callable[[], Any], steps: int) -> Timing:
    """Time calls of ``steps`` steps, many in a row, and return the time of a step."""
    inner = max(1, bench.scale.replays // steps)
    bench.machine.span(call, max(1, inner // 10))
    spans = sorted(bench.machine.span(call, inner) / steps for _ in range(bench.scale.repeats))
    return Timing(spans[len(spans) // 2], spans[0], spans[-1], len(spans))


def _noted(bench: Bench, what: str, timing: Timing, about: dict[str, Any]) -> None:
    bench.record.timing(what, timing, us_per_step=timing.ms * 1e3, **about)
