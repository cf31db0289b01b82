"""NumPy, torch on the device, CuPy and both kernels make the same batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import OutOfTime
from benchmarks.gpu.workload import Int64
from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.core import arrays
from gpusampler.core import devices as devices_module

DRAWN = 42
MOST_FAILURES = 12
SHARE = 0.36
"""Of the budget: most of it goes into compiling a kernel for each form of plan."""

SEEDS = (0, 1 << 31, 1 << 63, (1 << 64) - (1 << 20))
EPOCHS = (0, 1, 1 << 31, (1 << 32) + 5, (1 << 63) - 2)

# Sizes between two bounds, both of which occur, so that a mix is one form of a kernel and not many;
# the batch size where the kernel finds out by itself what slots lead to, and where it is told.
MIXES = {
    "small": (1, 32, 300, (5, 32)),
    "large": (1024, 5000, 12, (64, 100)),
    "mixed": (1, 2000, 40, (48, 200)),
    "medium": (33, 1000, 60, (64, 7)),
    "wide": (1024, 70_000, 5, (256, 3000)),
    "few": (2, 5, 40, (2, 3)),
    "slots": (33, 100, 3, (16, 64)),
    "one": (100, 100, 1, (10, 128)),
}


# Every other one is told.
ORDERS: tuple[dict[str, Any], ...] = (
    {},
    {"interleave": False},
    {},
    {"steps": "balanced", "step_width": 8},
    {},
    {"steps": "same_patch", "step_width": 3},
    {},
    {"steps": "same_patch", "step_width": 2, "interleave": False},
)


class Drawn(NamedTuple):
    """One random plan: arguments of everything that makes its batches."""

    number: int
    mix: str
    counts: Int64
    ids: Any
    batch_size: int
    seed: int
    epoch: int
    settings: dict[str, Any]
    slots_seed: int

    def __str__(self) -> str:
        """Return what it takes to make it again."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        ids = "none" if self.ids is None else self.ids.dtype.name
        return (
            f"plan {self.number} ({self.mix}, {self.counts.size} patches, ids {ids}, "
            f"batch_size={self.batch_size}, seed={self.seed}, epoch={self.epoch}, {settings})"
        )

    def groups(self, device: str) -> PatchGroups:
        """Return the groups, sorted on a device where samples are not contiguous."""
        if self.ids is None:
            return PatchGroups.from_counts(self.counts)
        ids = arrays.to_device(self.ids, devices_module.parse_device(device))
        return PatchGroups.from_ids(ids)

    def plan(self, groups: PatchGroups, device: str) -> EpochPlan:
        """Return the plan on a device."""
        return EpochPlan(groups, self.batch_size, self.seed, device=device, **self.settings)

    def sampler(self, groups: PatchGroups, device: str) -> PatchBatchSampler:
        """Return a sampler of the same batches, at the epoch."""
        with warnings.catch_warnings():
            # Patches that "drop" leaves out are no news here.
            warnings.filterwarnings("ignore", message="partial='drop' leaves out")
            sampler = PatchBatchSampler(
                groups, self.batch_size, seed=self.seed, device=device, **self.settings
            )
        sampler.set_epoch(self.epoch)
        return sampler

    def slots(self, total: int, most: int) -> Int64:
        """Return some slots, in any order, the first and the last and repeated ones among them."""
        rng = np.random.default_rng(self.slots_seed)
        some = rng.integers(0, total, min(total, most))
        return np.concatenate([some, [0, total - 1]])


def random_plans(count: int) -> Iterator[Drawn]:
    """Draw plans; every combination of mix, layout and order of batches comes early on."""
    rng = np.random.default_rng(DRAWN)
    mixes = list(MIXES.items())
    for number in range(count):
        turn, place = divmod(number, len(mixes))
        mix, (least, most, patches, batch_sizes) = mixes[place]
        counts = rng.integers(least, most + 1, patches)
        counts[0], counts[-1] = least, most
        order, ids = ORDERS[turn % len(ORDERS)], None
        if (turn // 2 + place) % 2 == 0:
            ids = _shuffled_ids(rng, counts)
        plain = (turn + place) % 3 != 2
        yield Drawn(
            number=number,
            mix=mix,
            counts=counts,
            ids=ids,
            batch_size=batch_sizes[turn % 2],
            seed=SEEDS[rng.integers(len(SEEDS))] + int(rng.integers(1 << 20)),
            epoch=EPOCHS[rng.integers(len(EPOCHS))],
            settings={
                **order,
                "partial": _partial(rng, most, batch_sizes),
                "shuffle_within_batches": plain or bool(rng.integers(2)),
                "shuffle_patches": plain or bool(rng.integers(2)),
            },
            slots_seed=int(rng.integers(1 << 31)),
        )


def _partial(rng: np.random.Generator, most: int, batch_sizes: tuple[int, int]) -> str:
    # Under "drop" some patch must fill a batch.
    choices = ["keep", "pad", "drop"] if max(batch_sizes) <= most else ["keep", "pad"]
    return str(rng.choice(choices))


def _shuffled_ids(rng: np.random.Generator, counts: Int64) -> Any:
    """Return ids in random order: dense or anywhere, of a narrow or a wide type."""
    dtype = rng.choice(["int64", "int64", "int32", "int16"])
    bounds = np.iinfo(dtype)
    if rng.integers(2):
        names = np.arange(counts.size)
    else:
        names = rng.integers(bounds.min, bounds.max, 4 * counts.size, dtype=np.int64)
        names = rng.permutation(np.unique(names))[: counts.size]
    return rng.permutation(np.repeat(names, counts)).astype(dtype)


def kernel_in_use(bench: Bench) -> None:
    """A first evaluation is done by the kernel, which has not been given up."""
    groups = PatchGroups.from_counts([2000, 3000, 4000])
    devices = {"torch": bench.device, "cupy": bench.machine.cupy}
    for library, device in devices.items():
        if device is None:
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = EpochPlan(groups, 64, 0, device=device)
            plan.evaluate(0, np.arange(plan.num_batches))
            held = plan.evaluator.device_evaluator().has_kernel
        said = [f"{w.category.__name__}: {w.message}" for w in caught]
        detail = said or ("in use" if held else "there is none for this device")
        bench.record.check(f"{library}: the kernel was built and is in use", held, detail)
    if bench.machine.cupy is None:
        bench.record.found["header"]["cupy_left_out"] = bench.machine.cupy_missing


class Differences:
    """Where what was found is not what was wanted, in words, by what was compared."""

    def __init__(self) -> None:
        self.compared: dict[str, int] = {}
        self.failures: dict[str, list[str]] = {}

    def compare(self, drawn: Drawn, what: str, found: Any, wanted: Any) -> None:
        """Note whether an array, or anything with ``==``, is what was wanted."""
        self.compared[what] = self.compared.get(what, 0) + 1
        words = _difference(found, wanted)
        if words:
            self.failures.setdefault(what, []).append(f"{drawn}: {words}")

    def failed(self, drawn: Drawn, what: str, error: Exception) -> None:
        """Note that nothing was found."""
        self.compared[what] = self.compared.get(what, 0) + 1
        words = f"{drawn}: {type(error).__name__}: {str(error)[:400]}"
        self.failures.setdefault(what, []).append(words)

    def report(self, bench: Bench) -> None:
        """Make a check of everything that was compared."""
        for what, count in self.compared.items():
            wrong = self.failures.get(what, [])
            detail = [f"{len(wrong)} of {count} differ", *wrong[:MOST_FAILURES]]
            bench.record.check(what, not wrong, detail if wrong else f"{count} compared")


def _difference(found: Any, wanted: Any) -> str:
    if not isinstance(wanted, np.ndarray):
        return "" if found == wanted else f"got {str(found)[:120]}, wanted {str(wanted)[:120]}"
    found = arrays.to_numpy(found)
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return f"got {found.dtype}{found.shape}, wanted {wanted.dtype}{wanted.shape}"
    wrong = np.flatnonzero((found != wanted).ravel())
    if not wrong.size:
        return ""
    at = int(wrong[0])
    return (
        f"{wrong.size} of {wanted.size} wrong, first at {at}: got {found.ravel()[at]}, "
        f"wanted {wanted.ravel()[at]}"
    )


def a_hundred_plans(bench: Bench) -> None:
    """Indices, lengths, groups, iteration and grouping are the same everywhere."""
    seen = Differences()
    done = 0
    limit = bench.record.elapsed + SHARE * bench.record.found["budget_s"]
    devices = {"torch": bench.device, "cupy": bench.machine.cupy}
    for drawn in random_plans(bench.scale.plans):
        host_groups = drawn.groups("numpy")
        host = drawn.plan(host_groups, "numpy")
        for library, device in devices.items():
            if device is None:
                continue
            try:
                _compare(bench, seen, drawn, host, library, device)
            except Exception as error:
                seen.failed(drawn, f"{library}: works", error)
                if not bench.machine.alive():
                    seen.report(bench)
                    raise
        done += 1
        if bench.record.elapsed > limit:
            break
    seen.report(bench)
    bench.record.found["header"]["plans_compared"] = done
    if done < bench.scale.plans:
        raise OutOfTime(f"{done} of {bench.scale.plans} plans were compared in the time allowed")


def _compare(
    bench: Bench, seen: Differences, drawn: Drawn, host: EpochPlan, library: str, device: str
) -> None:
    """Compare one device with the host."""
    groups = drawn.groups(device)
    if drawn.ids is not None:
        for name in ("patch_ids", "counts", "starts", "fingerprint", "source_size"):
            wanted = getattr(host.groups, name)
            seen.compare(drawn, f"{library}: grouping", getattr(groups, name), wanted)
        if host.groups.order is None:
            seen.compare(drawn, f"{library}: grouping", groups.order is None, True)
        else:
            seen.compare(drawn, f"{library}: grouping", groups.order, host.groups.order)
    plan = drawn.plan(groups, device)
    slots = drawn.slots(plan.num_batches, bench.scale.slots)
    there = arrays.to_device(slots, plan.device)
    wanted = host.evaluate(drawn.epoch, slots)
    forms = {
        "kernel": plan.evaluate(drawn.epoch, there),
        "reference": plan.evaluator.block_by_arrays(drawn.epoch, there),
    }
    for form, block in forms.items():
        for name, part in zip(wanted._fields, block, strict=True):
            seen.compare(drawn, f"{library} {form}: {name}", part, getattr(wanted, name))
    if drawn.number % 8 == drawn.number // 8 % 8:
        narrow = plan.evaluate(drawn.epoch, there, dtype="int32").indices
        wide = host.evaluate(drawn.epoch, slots, dtype="int32").indices
        seen.compare(drawn, f"{library} kernel: int32 indices", narrow, wide)
    if drawn.number % 4 == drawn.number // 8 % 4:
        _compare_iteration(bench, seen, drawn, host, groups, library, device)
    in_use = plan.evaluator.device_evaluator().has_kernel
    seen.compare(drawn, f"{library}: every form of the kernel was built", in_use, True)


def _compare_iteration(
    bench: Bench,
    seen: Differences,
    drawn: Drawn,
    host: EpochPlan,
    groups: PatchGroups,
    library: str,
    device: str,
) -> None:
    """Compare what samplers hand out: lists, and batches on the device."""
    here = drawn.sampler(host.groups, "numpy")
    there = drawn.sampler(groups, device)
    seen.compare(drawn, f"{library}: length of an epoch", len(there), len(here))
    most = bench.scale.batches
    wanted = list(islice(here.batches(drawn.epoch), most))
    found = list(islice(there.batches(drawn.epoch), most))
    for ours, theirs in zip(found, wanted, strict=True):
        same = (ours.patch_id, ours.valid), (theirs.patch_id, theirs.valid)
        seen.compare(drawn, f"{library}: patch_id and valid of batches()", *same)
    joined = np.concatenate([arrays.to_numpy(batch.indices) for batch in found])
    seen.compare(
        drawn,
        f"{library}: indices of batches()",
        joined,
        np.concatenate([batch.indices for batch in wanted]),
    )
    lists = list(islice(there, most)), list(islice(here, most))
    seen.compare(drawn, f"{library}: lists", *lists)
    in_use = there.plan.evaluator.device_evaluator().has_kernel
    seen.compare(drawn, f"{library}: every form of the kernel was built", in_use, True)
