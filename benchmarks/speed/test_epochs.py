"""Drawing batches: the first one, whole epochs, and which part of the way their time goes to."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from benchmarks.forms import FORMS, evaluated_by
from benchmarks.gate_cases import FirstBatches
from benchmarks.peers.cases import Case
from benchmarks.peers.peer import Work
from benchmarks.peers.samplers.restated import SORTED, UNGROUPED
from benchmarks.timing import drain
from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.sampler import batches as batches_module
from gpusampler.sampler.iterator import EpochIterator

N = 2_000_000
PATCHES = 1000
SIZES = (8, 64)
OUTPUTS = ("list", "numpy", "tensor")
FIRST_DRAWS = 50
STAGES = ("evaluated", "cut into lists", "cut into arrays", "yielded")
STAGE_ROUNDS = 180
PATCHES_OF = {10**2: 5, 10**3: 10, 10**4: 100, 10**5: 100, 10**6: 1000, 10**7: 1000, 10**8: 1000}
"""Patches by number of samples."""
ARRAYS_FROM = 10**6
BY_SAMPLES = [
    pytest.param(
        samples,
        output,
        peer,
        id=f"{samples}-{output}-{'sorted' if peer is SORTED else 'ungrouped'}",
        marks=[pytest.mark.slow("takes minutes")] * (samples == 10**8),
    )
    for samples in PATCHES_OF
    for output, peer in (("list", UNGROUPED), ("list", SORTED), ("numpy", UNGROUPED))
    if output == "list" or samples >= ARRAYS_FROM
]


@lru_cache(1)
def ids_of(case: Case) -> np.ndarray:
    return case.ids()


def test_first_batch_at_any_size(against):
    against(
        f"first batch, N = 1e9 ({FIRST_DRAWS} times)",
        FirstBatches(10**9, FIRST_DRAWS)(),
        f"first batch, N = 1e4 ({FIRST_DRAWS} times)",
        FirstBatches(10**4, FIRST_DRAWS)(),
    )


@pytest.mark.parametrize(("samples", "output", "peer"), BY_SAMPLES)
def test_epoch_by_samples(against, scaled, request, samples, output, peer):
    case = Case(scaled(samples), PATCHES_OF[samples], 64)
    ids = ids_of(case)
    with evaluated_by(request.config.getoption("--form")):
        ours = PatchBatchSampler(ids, 64, seed=0, output=output)
        theirs = peer.make(Work(ids, ids, 64), 0)
        # Short epochs are repeated, up to some tenths of a second.
        against(
            f"epoch as {output}, {case}",
            lambda: drain(ours),
            peer.name,
            lambda: drain(theirs),
            repeats=max(1, 10**6 // samples),
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("form", FORMS)
def test_epoch(against, scaled, form, output, size):
    ids = ids_of(Case(scaled(N), PATCHES, size))
    ungrouped = UNGROUPED.make(Work(ids, ids, size), 0)
    with evaluated_by(form):
        ours = PatchBatchSampler(ids, size, seed=0, output=output)
        against(
            f"epoch as {output} of {size}, by {form}",
            lambda: drain(ours),
            UNGROUPED.name,
            lambda: drain(ungrouped),
        )


def test_contiguous_epoch(against, scaled):
    samples = scaled(N)
    ours = PatchBatchSampler(PatchGroups.from_counts([samples // PATCHES] * PATCHES), 64, seed=0)
    ids = np.zeros(samples, np.int8)
    ungrouped = UNGROUPED.make(Work(ids, ids, 64), 0)
    against(
        "epoch as list of 64, contiguous",
        lambda: drain(ours),
        UNGROUPED.name,
        lambda: drain(ungrouped),
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", FORMS)
def test_stage(benchmark, scaled, form, stage, size):
    """A whole block of batches, so that ``extra_info["batches"]`` divides the time."""
    sampler = PatchBatchSampler(ids_of(Case(scaled(N), PATCHES, size)), size, seed=0)
    plan, host = sampler.plan, sampler.plan.evaluator.host
    count = min(host.block_samples // size, plan.num_batches // 2)
    slots = range(count, 2 * count)

    def evaluate():
        if host.evaluates_slots:
            return host.slot_range(3, slots, count * size)
        return host.ragged(3, host.locate(3, np.arange(slots.start, slots.stop)))

    def cut(output):
        drain(batches_module._SPLITTERS[output](plan, block))

    with evaluated_by(form):
        block = evaluate()
        lists = np.zeros((count, size), np.int64).tolist()
        call, setup = {
            "evaluated": (evaluate, None),
            "cut into lists": (lambda: cut("list"), None),
            "cut into arrays": (lambda: cut("numpy"), None),
            "yielded": (drain, lambda: ((_yielding(sampler, lists),), {})),
        }[stage]
        benchmark.extra_info["batches"] = count
        benchmark.pedantic(call, setup=setup, rounds=STAGE_ROUNDS)


def _yielding(sampler, batches):
    """Return an iterator over batches that are there already."""

    class Reader:
        left = batches

        def read(self):
            there, self.left = self.left, None
            return there

    return EpochIterator(sampler._tracker, lambda share: Reader(), epoch=3)
