"""What every case is given, and the datasets that are timed: the same on every machine."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.record import Record
from gpusampler import EpochPlan, PatchGroups
from gpusampler.core import devices

BATCH = 64
SEED = 2026

Int64 = NDArray[np.int64]


class Scale(NamedTuple):
    """How much of everything: a GPU's, or what a dry run takes."""

    samples: tuple[int, ...]
    lanes: int
    main: int
    mixes: int
    rows: int
    wide_rows: int
    replays: int
    together: int
    repeats: int


GPU = Scale(
    samples=(10**6, 10**7, 10**8, 10**9),
    lanes=1 << 26,
    main=10**8,
    mixes=10**7,
    rows=10**6,
    wide_rows=1 << 21,
    replays=2000,
    together=16,
    repeats=5,
)
DRY = Scale(
    samples=(2100, 3000),
    lanes=1 << 11,
    main=3000,
    mixes=2100,
    rows=2100,
    wide_rows=2100,
    replays=1,
    together=2,
    repeats=1,
)


class Bench(NamedTuple):
    """The device, where results go, and how much is to be done."""

    machine: Machine
    record: Record
    scale: Scale

    @property
    def torch(self) -> Any:
        """The library."""
        return self.machine.torch

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return self.machine.device

    def check_kernel(self, plan: Any, what: str) -> None:
        """Write whether a kernel evaluates: otherwise the times are those of array operations."""
        in_use = plan.evaluator.device_evaluator().has_kernel
        self.record.check(f"{what}: a kernel evaluates", in_use)


def patch_counts(samples: int, mix: str, rng: np.random.Generator) -> Int64:
    """Return how many samples each patch has; they add up to ``samples``.

    Parameters
    ----------
    mix : {"large", "wide", "mixed", "small"}
        "large": 1,025 .. 65,535, about 10,000; "wide": from 1,025 to several 100,000; "mixed":
        10 .. 100,000, evenly on a logarithmic scale; "small": 20 .. 60.
    """
    if mix == "small":
        counts = rng.integers(20, 61, samples // 40 + 1)
        return _adding_up(counts, samples, 20, 60)
    if mix == "mixed":
        most = min(10**5, samples // 2)
        patches = max(2, int(samples / ((most - 10) / np.log(most / 10))))
        counts = np.exp(rng.uniform(np.log(10), np.log(most), patches)).astype(np.int64)
        counts[:2] = 10, most
        return _adding_up(counts, samples, 10, most)
    # Patches of less than 4 * 1,024 on average would not all stay above 1,024.
    patches = max(2, min(int(np.clip(samples / 1e4, 1000, 50_000)), samples // 4096))
    spread = 0.5 if mix == "large" else 1.0
    mean = samples / patches
    counts = rng.lognormal(np.log(mean) - spread**2 / 2, spread, patches).astype(np.int64)
    most = 65_535 if mix == "large" else 1 << 20
    return _adding_up(counts, samples, 1025, most)


def _adding_up(counts: Int64, samples: int, least: int, most: int) -> Int64:
    """Return counts in ``least .. most``, close to the given ones, that add up to ``samples``."""
    counts = np.clip(counts, least, most).astype(np.int64)
    # In proportion first, so that little is left to even out.
    for _ in range(20):
        counts = np.clip(counts * (samples / counts.sum()), least, most).astype(np.int64)
    while (missing := samples - int(counts.sum())) != 0:
        room = most - counts if missing > 0 else counts - least
        able = np.flatnonzero(room > 0)
        if able.size == 0:
            # A patch more, or one less: as many as the bounds allow.
            counts = np.append(counts, least) if missing > 0 else counts[:-1]
            continue
        step = np.minimum(room[able], max(1, abs(missing) // able.size))
        step[abs(missing) :] = 0
        counts[able] += np.sign(missing) * step
    return counts


class Dataset(NamedTuple):
    """Groups of one size and mix; ``order`` on the device where they are gathered, else None."""

    samples: int
    mix: str
    groups: PatchGroups

    @property
    def layout(self) -> str:
        """Whether indices are gathered from an order."""
        return "contiguous" if self.groups.is_contiguous else "gathered"

    def plan(self, device: str, batch_size: int = BATCH) -> EpochPlan:
        """Return the plan that is timed."""
        return EpochPlan(self.groups, batch_size, SEED, device=device)


def contiguous(samples: int, mix: str) -> Dataset:
    """Return samples that lie patch after patch."""
    counts = patch_counts(samples, mix, np.random.default_rng(SEED))
    return Dataset(samples, mix, PatchGroups.from_counts(counts))


def gathered(torch: Any, samples: int, mix: str, device: str, written: bool) -> Dataset:
    """Return samples that lie anywhere, with their order on a device.

    ``written``: the order is that of shuffled ids. Otherwise it is made up, since sorting 1e9 ids
    takes more memory than there is; what an order holds has no influence on the time, only where it
    is read does.
    """
    counts = patch_counts(samples, mix, np.random.default_rng(SEED))
    if written:
        groups = PatchGroups.from_ids(shuffled_ids(torch, counts, device))
        return Dataset(samples, mix, groups)
    order = torch.arange(samples, dtype=torch.int32, device=device)
    groups = PatchGroups(
        np.arange(counts.size),
        counts,
        np.cumsum(counts) - counts,
        order,
        source_size=samples,
        device=devices.parse_device(device),
        fingerprint=0,
    )
    return Dataset(samples, mix, groups)


def shuffled_ids(torch: Any, counts: Int64, device: str) -> Any:
    """Return int32 patch ids in random order, made on the device."""
    there = torch.from_numpy(counts).to(device)
    numbers = torch.arange(counts.size, dtype=torch.int32, device=device)
    ids = torch.repeat_interleave(numbers, there, output_size=int(counts.sum()))
    generator = torch.Generator(device).manual_seed(SEED)
    shuffle = torch.randperm(ids.shape[0], generator=generator, device=device)
    return ids[shuffle]
