"""The cases of the gate, each declared once: the timed work, its baseline, and its limit.

A new case is one entry of `CASES`; ``python -m benchmarks.gate --measure`` says what its reference
would be. `docs/explanation/gate.md` tells how to choose the parts of a baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import yardsticks as by
from benchmarks.forms import evaluated_by
from benchmarks.timing import drain
from benchmarks.yardsticks import TILE, Part, Work, part
from gpusampler import PatchBatchSampler, PatchGroups, PatchTensorLoader, Temperature
from gpusampler.groups.census import Census
from gpusampler.groups.counting_sort import OrderWriter
from gpusampler.sampler import batches as batches_module
from gpusampler.sampler.batches import BlockReader

SLACK = 1.4
"""What a limit is beyond its reference: more than machines differ, and well below 2."""

N = 1 << 17
"""Samples of an epoch: a few milliseconds."""

PATCHES = 100
SLOTS = 4096


@dataclass(frozen=True)
class Case:
    """One line of the gate; cases whose modules or form are missing are left out, visibly."""

    name: str
    ours: Part
    """Prepares the input, and returns the call that is timed."""
    baseline: tuple[Part, ...]
    """Timed in turn with ours."""
    reference: float
    """Ratio of the two as committed."""
    slack: float = SLACK
    needs: tuple[str, ...] = ()
    """Modules."""
    form: str = "NumPy"
    """What ours runs on, "C" or "NumPy"."""

    @property
    def limit(self) -> float:
        return self.reference * self.slack


def shuffled_ids(samples: int = N, patches: int = PATCHES) -> Any:
    """Ids in no order."""
    return np.random.default_rng(0).integers(0, patches, samples)


def epoch(source: Callable[[], Any], batch_size: int, **options: Any) -> Work:
    """Time a pass of a sampler."""

    def ours() -> Work:
        sampler = PatchBatchSampler(source(), batch_size, seed=0, **options)
        return lambda: drain(sampler)

    return ours


def unshuffled_pass(samples: int, batch_size: int, output: str) -> Work:
    """Time a pass over one patch without shuffling: it only yields batches."""
    asked = {"shuffle_within_batches": False, "shuffle_patches": False, "output": output}
    return epoch(lambda: PatchGroups.from_counts([samples]), batch_size, **asked)


def cut_up(batch_size: int, output: str) -> Work:
    """Time cutting an evaluated block into batches of an output."""

    def ours() -> Work:
        plan = PatchBatchSampler(PatchGroups.from_counts([N]), batch_size, seed=0).plan
        locations = plan.evaluator.locate(0, np.arange(TILE // batch_size))
        block = plan.evaluator.ragged(0, locations)

        def work() -> None:
            for _ in range(N // TILE):
                drain(batches_module._SPLITTERS[output](plan, block))

        return work

    return ours


def located(**options: Any) -> Work:
    """Time looking up which batches slots are, in ever other epochs."""

    def ours() -> Work:
        counts = np.random.default_rng(0).integers(200, 1801, PATCHES)
        if options.get("steps") == "balanced":
            options["patch_costs"] = np.random.default_rng(1).lognormal(size=PATCHES)
        plan = PatchBatchSampler(PatchGroups.from_counts(counts), 8, seed=0, **options).plan
        slots = np.arange(SLOTS) % plan.num_batches
        epochs = iter(range(1 << 40))

        def work() -> None:
            for _ in range(4):
                plan.evaluator.locate(next(epochs), slots)

        return work

    return ours


def evaluated_there() -> Work:
    """Time evaluating an epoch, block by block, without cutting blocks into batches."""
    sampler = PatchBatchSampler(shuffled_ids(), 64, seed=0)
    shard = sampler._tracker.shard_of(1)
    return lambda: drain(iter(BlockReader(shard).read, None))


@part
def Ungrouped(samples: int, batch_size: int) -> Work:
    """torch's own batches, of samples from anywhere."""
    from torch.utils.data import BatchSampler, RandomSampler

    sampler = BatchSampler(RandomSampler(range(samples)), batch_size, False)
    return lambda: drain(sampler)


@part
def FirstBatches(samples: int, draws: int) -> Work:
    """The first batch of an epoch, a number of times."""
    sampler = PatchBatchSampler(PatchGroups.from_counts([samples // 1000] * 1000), 64, seed=0)

    def work() -> None:
        for _ in range(draws):
            next(iter(sampler))

    return work


def resumed() -> Work:
    """Time loading a state of the middle of an epoch, and its next batch."""
    sampler = PatchBatchSampler(PatchGroups.from_counts([1024] * 1000), 64, seed=0)
    next(iter(sampler))
    # Of the next pass, of which nothing has been drawn yet.
    sampler.set_epoch(0)
    state = sampler.state_dict(step=len(sampler) // 2)

    def work() -> None:
        for _ in range(20):
            sampler.load_state_dict(state)
            next(iter(sampler))

    return work


def saved_and_loaded() -> Work:
    """Time saving a state in mid-epoch, and loading it."""
    sampler = PatchBatchSampler(PatchGroups.from_counts([1024] * 1000), 64, seed=0)
    next(iter(sampler))

    def work() -> None:
        for _ in range(300):
            sampler.load_state_dict(sampler.state_dict())

    return work


def grouped(ids: Callable[[], Any]) -> Work:
    """Time grouping ids."""

    def ours() -> Work:
        made = ids()
        return lambda: PatchGroups.from_ids(made)

    return ours


def placed() -> Work:
    """Time the second pass of grouping: samples written to where their patches begin."""
    ids = shuffled_ids(4 * N, 1000)
    census = Census(ids.size, None)
    census.add(ids)
    found = census.result()
    order = np.empty(ids.size, np.int32)
    return lambda: OrderWriter(found, order, None, verify=False).add(ids)


def sparse_ids() -> Any:
    """64-bit numbers from anywhere, as hashes are."""
    names = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 1000)
    return names[shuffled_ids(4 * N, 1000)]


def loaded() -> Work:
    """Time an epoch of rows in memory."""
    table = np.random.default_rng(0).random((N, 8), dtype=np.float32)
    sampler = PatchBatchSampler(shuffled_ids(), 64, seed=0, device="numpy")
    loader = PatchTensorLoader(sampler, x=table)
    return lambda: drain(loader)


def evaluated(lanes: int, rounds: int, rows: int, table: int = N) -> tuple[Part, ...]:
    """What permuting positions takes: arithmetic, lookups by row, keys of rows, and a gather."""
    gather = (by.Gather(lanes, table),) if table else ()
    keys = by.Calls(150 * -(-lanes // TILE), TILE * rows // lanes)
    return (by.Arithmetic(lanes, rounds), by.Lookups(lanes, 10), keys, *gather)


def against_ungrouped(what: str, batch_size: int, reference: float, **options: Any) -> Case:
    """Return the case of an epoch against torch's own, which groups nothing."""
    return Case(
        f"epoch as {what} of {batch_size}, against ungrouped",
        epoch(shuffled_ids, batch_size, **options),
        (Ungrouped(N, batch_size),),
        reference,
        slack=1.5,
        needs=("torch",),
        form="C",
    )


def against_default(name: str, reference: float, **options: Any) -> Case:
    """Return the case of an epoch with options against one without."""
    return Case(
        f"arrays of 64, {name}, against the default",
        epoch(shuffled_ids, 64, output="numpy", **options),
        (epoch(shuffled_ids, 64, output="numpy"),),
        reference,
        slack=1.3,
        form="C",
    )


CASES: tuple[Case, ...] = (
    Case(
        "group shuffled ids, 1,000 patches",
        grouped(lambda: shuffled_ids(4 * N, 1000)),
        (by.RadixSorts(4 * N, 1000), by.Reads(4 * N, 9)),
        1.8,
        form="C",
    ),
    Case(
        "group sparse 64-bit ids, 1,000 patches",
        grouped(sparse_ids),
        (by.RadixSorts(4 * N, 1000), by.Reads(4 * N, 9), by.Lookups(4 * N, 10)),
        2.15,
        form="C",
    ),
    Case("sort samples by patch, NumPy", placed, (by.RadixSorts(4 * N, 1000),), 1.05),
    Case(
        "sort samples by patch, C against NumPy",
        placed,
        (lambda: evaluated_by("NumPy")(placed()),),
        0.37,
        form="C",
    ),
    Case(
        "find that ids are in order",
        grouped(lambda: np.sort(shuffled_ids(4 * N, 1000))),
        (by.Reads(4 * N, 9),),
        1.75,
    ),
    Case(
        "first batch, N = 1e9",
        FirstBatches(10**9, 20),
        (FirstBatches(10**4, 20),),
        0.78,
        form="C",
    ),
    Case("first batch, N = 1e6", FirstBatches(10**6, 20), (by.Calls(3000, 8),), 0.76, form="C"),
    Case("save a state and load it", saved_and_loaded, (by.PlainCalls(30_000),), 0.72),
    Case("load a state of mid-epoch, draw a batch", resumed, (by.Calls(3000, 8),), 0.78, form="C"),
    Case(
        "look slots up",
        located(),
        (by.Arithmetic(4 * SLOTS, 8), by.Searches(4 * SLOTS, 100), by.Calls(160, SLOTS)),
        1.35,
    ),
    Case(
        "look slots up, interleave=False",
        located(interleave=False),
        (by.Calls(800, 100), by.Calls(160, SLOTS)),
        1.3,
    ),
    Case(
        'look slots up, steps="balanced"',
        located(steps="balanced", step_width=8),
        (
            *evaluated(4 * SLOTS, 8, 4 * SLOTS, 0),
            by.Searches(12 * SLOTS, 100),
            by.Calls(600, SLOTS),
        ),
        1.8,
    ),
    Case(
        "look slots up, weights",
        located(weights=Temperature(2), epoch_batches=SLOTS),
        (by.Arithmetic(4 * SLOTS, 8), by.Searches(4 * SLOTS, 100), by.Calls(240, SLOTS)),
        1.45,
    ),
    Case(
        "cut into lists of 64",
        cut_up(64, "list"),
        (by.Lists(N // 64, 64),),
        1.17,
        # Both sides are the same call of NumPy, and forgetting the lists is no part of cutting.
        slack=1.25,
    ),
    Case("cut into views of 8", cut_up(8, "numpy"), (by.Views(N // 8, 8),), 1.15, slack=1.3),
    Case(
        "yield lists of 8",
        unshuffled_pass(N, 8, "list"),
        (by.Lists(N // 8, 8), by.Lookups(N, 4)),
        1.42,
        form="C",
    ),
    Case(
        "yield views of 8",
        unshuffled_pass(N, 8, "numpy"),
        (by.Slices(N // 8, 8), by.Lookups(N, 4)),
        0.97,
        form="C",
    ),
    Case(
        "yield tensors of 8",
        unshuffled_pass(N, 8, "tensor"),
        (by.Tensors(N // 8, 8), by.Lookups(N, 4)),
        1.35,
        needs=("torch",),
        form="C",
    ),
    Case("evaluate 2,048 batches of 64, NumPy", evaluated_there, evaluated(N, 8, N // 64), 1.3),
    Case(
        "arrays of 20, patches of 20, NumPy",
        epoch(lambda: PatchGroups.from_counts([20] * (N // 40)), 20, output="numpy"),
        # An epoch's first blocks are small, so that the first batch comes at once.
        (
            by.Repeats(N // 2, TILE // 20, 19),
            by.Calls(1500, TILE // 20),
            by.Calls(5000, 32),
            by.Views(N // 40, 20),
        ),
        0.95,
    ),
    Case(
        "evaluate 2,048 batches of 64, C against NumPy",
        evaluated_there,
        (lambda: evaluated_by("NumPy")(evaluated_there()),),
        0.18,
        slack=1.3,
        form="C",
    ),
    against_ungrouped("lists", 64, 0.33),
    against_ungrouped("lists", 8, 0.53),
    against_ungrouped("NumPy arrays", 64, 0.18, output="numpy"),
    against_default("interleave=False", 1.03, interleave=False),
    against_default('partial="pad"', 0.86, partial="pad"),
    against_default('steps="balanced"', 1.45, steps="balanced", step_width=8),
    against_default("weights", 1.25, weights=Temperature(2), epoch_batches=N // 64),
    Case(
        "PatchTensorLoader, 64 of 8",
        loaded,
        (by.Rows(N, 8, 64), by.Gather(N, N), by.Lookups(N, 10)),
        1.3,
        form="C",
    ),
)
