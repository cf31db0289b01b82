"""A whole epoch of indices, and grouping, against baselines and the floors of the memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.gpu.workload import (
    BATCH,
    SEED,
    Bench,
    Dataset,
    contiguous,
    gathered,
)
from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups

RANDPERM_GOAL = 10.0
GATHER_GOAL = 2.0
COPY_GOAL = 6.0
PEAK_GOAL_MB = 64.0


class Epoch:
    """The ways to make all indices of an epoch that are timed for one dataset."""

    def __init__(self, bench: Bench, data: Dataset, dtype: str) -> None:
        self.bench = bench
        self.data = data
        self.dtype = dtype
        self.plan = data.plan(bench.device)
        self.slots = bench.torch.arange(self.plan.num_batches, device=bench.device)

    def in_one_call(self) -> Any:
        """Evaluate all slots at once."""
        return self.plan.evaluate(0, self.slots, self.dtype).indices

    def in_chunks(self) -> None:
        """Evaluate so many slots at once as make up a chunk of lanes."""
        for slots in self.slots.split(self.bench.scale.lanes // BATCH):
            self.plan.evaluate(0, slots, self.dtype)

    def check_kernel(self) -> None:
        """Write whether a kernel made the timed batches."""
        data = self.data
        self.bench.check_kernel(self.plan, f"{data.mix} {data.layout} {self.dtype}")

    def timed(self, what: str, call: Callable[[], Any], repeats: int | None = None) -> float:
        """Time one of the ways, or a baseline, and note it."""
        self.bench.record.stop_if_late()
        timing = self.bench.machine.time(call, repeats or self.bench.scale.repeats)
        return self.bench.record.timing(
            what,
            timing,
            self.data.samples,
            dtype=self.dtype,
            layout=self.data.layout,
            mix=self.data.mix,
        )


def epoch(bench: Bench, samples: int) -> None:
    """Large patches, contiguous and gathered, int64 and int32, and all that they compare with."""
    one_call = samples <= bench.scale.main
    repeats = bench.scale.repeats if one_call else 3
    best: dict[tuple[str, str], float] = {}
    floors: dict[tuple[str, str], float] = {}

    def ours(data: Dataset, dtype: str) -> Epoch:
        made = Epoch(bench, data, dtype)
        found = [made.timed("ours, chunks", made.in_chunks, repeats)]
        if one_call:
            found.append(made.timed("ours, one call", made.in_one_call, repeats))
        best[data.layout, dtype] = min(found)
        made.check_kernel()
        return made

    flat = contiguous(samples, "large")
    for dtype in ("int64", "int32"):
        made = ours(flat, dtype)
        floors["copy", dtype] = made.timed("copy", _copy(made), repeats)
        bench.machine.free()
    made = Epoch(bench, flat, "int64")
    found = {
        what: _try(made, what, prepare, repeats)
        for what, prepare in _baselines(bench, flat).items()
    }

    data = gathered(bench.torch, samples, "large", bench.device, written=one_call)
    for dtype in ("int64", "int32"):
        made = ours(data, dtype)
        bench.machine.free()
        floor = _try(made, "pure gather", partial(_pure_gather, made, flat), repeats)
        if floor is not None:
            floors["gather", dtype] = floor
    if samples == bench.scale.main:
        _goals(bench, best, floors, found["randperm"])


def _try(
    made: Epoch, what: str, prepare: Callable[[], list[Callable[[], Any]]], repeats: int
) -> float | None:
    """Time a baseline, in the fastest of its forms; it may want more memory than there is."""
    bench = made.bench
    try:
        return min(made.timed(what, call, repeats) for call in prepare())
    except bench.torch.cuda.OutOfMemoryError as error:
        size = f"{what} of {made.data.samples}, {made.dtype}"
        bench.record.note(f"out of memory: {size}: {str(error)[:120]}")
        return None
    finally:
        bench.machine.free()


def _copy(made: Epoch) -> Callable[[], None]:
    """Return a copy, from device to device, of as many bytes as the indices are.

    In parts of the chunk's size where all at once would not fit; too much for any cache either way.
    """
    torch, samples = made.bench.torch, made.data.samples
    part = min(samples, 4 * made.bench.scale.lanes)
    dtype = getattr(torch, made.dtype)
    source = torch.zeros(part, dtype=dtype, device=made.bench.device)
    target = torch.empty_like(source)
    whole, rest = divmod(samples, part)

    def copy() -> None:
        for _ in range(whole):
            target.copy_(source)
        if rest:
            target[:rest].copy_(source[:rest])

    return copy


def _pure_gather(made: Epoch, flat: Dataset) -> list[Callable[[], None]]:
    """Return gathers of the same samples from an order, by positions that are known.

    The positions are the contiguous plan's own indices, so that memory is read in the same places.
    Order, positions and results are of one type. torch has two ways to do it.
    """
    torch, bench = made.bench.torch, made.bench
    order = made.data.groups.order.to(getattr(torch, made.dtype))
    known = Epoch(bench, flat, made.dtype)
    positions = [
        known.plan.evaluate(0, slots, made.dtype).indices.view(-1)
        for slots in known.slots.split(bench.scale.lanes // BATCH)
    ]

    def select() -> None:
        for part in positions:
            torch.index_select(order, 0, part)

    def index() -> None:
        for part in positions:
            order[part]

    return [select, index]


def _baselines(bench: Bench, data: Dataset) -> dict[str, Callable[[], list[Callable[[], Any]]]]:
    """Return what makes a random order of as many samples; only the last one keeps to patches."""
    torch, samples, device = bench.torch, data.samples, bench.device
    found: dict[str, Callable[[], list[Callable[[], Any]]]] = {
        "randperm": lambda: [lambda: torch.randperm(samples, device=device)],
        "randperm, int32": lambda: [
            lambda: torch.randperm(samples, dtype=torch.int32, device=device)
        ],
    }
    if samples > bench.scale.main:
        return found
    if bench.machine.cupy:
        import cupy

        found["cupy.random.permutation"] = lambda: [lambda: cupy.random.permutation(samples)]

    def hashed_keys() -> list[Callable[[], Any]]:
        counts = torch.from_numpy(data.groups.counts.copy()).to(device)
        groups = torch.arange(counts.shape[0], device=device) << 32
        high = torch.repeat_interleave(groups, counts, output_size=samples)

        def argsort() -> Any:
            # Patch above, 32 random bits below: sorting them groups and shuffles at once.
            keys = torch.randint(1 << 32, (samples,), dtype=torch.int64, device=device)
            keys += high
            return torch.argsort(keys)

        return [argsort]

    found["argsort of hashed keys"] = hashed_keys
    return found


def _goals(
    bench: Bench,
    best: dict[tuple[str, str], float],
    floors: dict[tuple[str, str], float],
    randperm: float | None,
) -> None:
    record, size = bench.record, f"{bench.scale.main:.0e} int64"
    for layout in ("contiguous", "gathered"):
        if randperm is not None:
            value = randperm / best[layout, "int64"]
            name = f"{size} {layout}: times faster than randperm"
            record.goal(name, value, RANDPERM_GOAL, "x", least=True)
    for dtype in ("int64", "int32"):
        size = f"{bench.scale.main:.0e} {dtype}"
        value = best["contiguous", dtype] / floors["copy", dtype]
        record.goal(f"{size} contiguous: of a copy", value, COPY_GOAL, "x", least=False)
        if ("gather", dtype) in floors:
            value = best["gathered", dtype] / floors["gather", dtype]
            record.goal(f"{size} gathered: of a pure gather", value, GATHER_GOAL, "x", least=False)


def other_mix(bench: Bench, mix: str, samples: int) -> None:
    """Patches of other sizes, which other forms of the kernel serve."""
    for data in (
        contiguous(samples, mix),
        gathered(bench.torch, samples, mix, bench.device, written=True),
    ):
        made = Epoch(bench, data, "int64")
        made.timed("ours, one call", made.in_one_call)
        made.timed("ours, chunks", made.in_chunks)
        made.check_kernel()
    bench.machine.free()


def by_cupy(bench: Bench) -> None:
    """The kernel in CUDA C, by CuPy's arrays."""
    if bench.machine.cupy is None:
        bench.record.note(f"left out: {bench.machine.cupy_missing}")
        return
    import cupy

    samples = bench.scale.main
    there = gathered(bench.torch, samples, "large", bench.device, written=True)
    groups = there.groups
    lent = PatchGroups(
        groups.patch_ids,
        groups.counts,
        groups.starts,
        cupy.from_dlpack(groups.order),
        source_size=samples,
    )
    for data in (contiguous(samples, "large"), Dataset(samples, "large", lent)):
        plan = data.plan(bench.machine.cupy)
        slots = cupy.arange(plan.num_batches, dtype=cupy.int64)
        for dtype in ("int64", "int32"):
            bench.record.stop_if_late()
            call = partial(plan.evaluate, 0, slots, dtype)
            timing = bench.machine.time(call, bench.scale.repeats)
            about = {"dtype": dtype, "layout": data.layout, "mix": "large"}
            bench.record.timing("CuPy, one call", timing, samples, **about)
            bench.check_kernel(plan, f"CuPy {data.layout} {dtype}")
            bench.machine.free()


def grouping(bench: Bench) -> None:
    """Ids in random order, a thousand patches, on the device."""
    torch, samples = bench.torch, bench.scale.main
    generator = torch.Generator(bench.device).manual_seed(SEED)
    ids = torch.randint(
        1000, (samples,), dtype=torch.int32, device=bench.device, generator=generator
    )
    wide = ids.long()
    calls: dict[str, Callable[[], Any]] = {
        "grouping": lambda: PatchGroups.from_ids(ids),
        "stable argsort, int64": lambda: torch.argsort(wide, stable=True),
        "sort, int64": lambda: torch.sort(wide),
    }
    found = {}
    for what, call in calls.items():
        bench.machine.free()
        bench.machine.forget_peak()
        before = bench.machine.allocated()
        timing = bench.machine.time(call, bench.scale.repeats)
        extra = (bench.machine.peak() - before) / samples
        found[what] = bench.record.timing(what, timing, samples, bytes_per_sample=round(extra, 1))
    ratio = found["stable argsort, int64"] / found["grouping"]
    bench.record.goal("grouping: times faster than argsort", ratio, 1.0, "x", least=True)


def peak_memory(bench: Bench) -> None:
    """An epoch drained in chunks takes what the tables and the order take, and little more."""
    samples = bench.scale.main
    for layout in ("contiguous", "gathered"):
        bench.machine.free()
        before = bench.machine.allocated()
        if layout == "contiguous":
            data = contiguous(samples, "large")
        else:
            data = gathered(bench.torch, samples, "large", bench.device, written=True)
        sampler = PatchBatchSampler(data.groups, BATCH, seed=SEED, device=bench.device)
        bench.machine.free()
        bench.machine.forget_peak()
        deque(sampler.batches(), maxlen=0)
        extra = (bench.machine.peak() - before - _kept(sampler.plan)) / 1e6
        name = f"peak of an epoch of {samples:.0e}, {layout}: above tables and order"
        bench.record.goal(name, extra, PEAK_GOAL_MB, "MB", least=False)


def _kept(plan: EpochPlan) -> int:
    tables = plan.evaluator.device_evaluator().array_evaluator._tables
    return sum(int(array.nbytes) for array in tables.members())
