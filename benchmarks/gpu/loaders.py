"""What a DataLoader's user sees: lists of indices, and batches of rows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from benchmarks.gpu.machine import Timing
from benchmarks.gpu.workload import BATCH, SEED, Bench, contiguous, gathered
from gpusampler import PatchBatchSampler, PatchTensorLoader
from gpusampler.core import arrays

COLUMNS = 16
WIDE_COLUMNS = 128
SLOW_BATCHES = 300


def lists(bench: Bench) -> None:
    """An epoch as lists, evaluated on the device a block ahead, and by NumPy on this host."""
    samples = bench.scale.mixes
    for data in (
        contiguous(samples, "large"),
        gathered(bench.torch, samples, "large", bench.device, written=True),
    ):
        for name, device in (("the device", bench.device), ("NumPy", "numpy")):
            sampler = PatchBatchSampler(data.groups, BATCH, seed=SEED, device=device)
            _drained(bench, f"lists, by {name}", sampler, samples, data.layout)
        sampler = PatchBatchSampler(data.groups, BATCH, seed=SEED, device=bench.device)
        _drained(bench, "batches()", _Again(sampler.batches), samples, data.layout)
    plan = contiguous(samples, "large").plan("numpy")
    known = arrays.to_numpy(plan.evaluate(0, range(plan.num_batches)).indices)
    rows = (1 << 15) // BATCH
    parts = [known[first : first + rows] for first in range(0, known.shape[0], rows)]
    _drained(bench, "tolist() alone", _Again(lambda: (p.tolist() for p in parts)), samples, "")


class _Again:
    """What can be iterated again and again, as a sampler can."""

    def __init__(self, begin: Callable[[], Iterable[Any]]) -> None:
        self._begin = begin

    def __iter__(self) -> Any:
        return iter(self._begin())


def _drained(bench: Bench, what: str, source: Iterable[Any], samples: int, layout: str) -> None:
    bench.record.stop_if_late()
    timing = bench.machine.wall(lambda: deque(source, maxlen=0), min(3, bench.scale.repeats))
    bench.record.timing(what, timing, samples, layout=layout)


def resident(bench: Bench) -> None:
    """Rows of tensors on the device, for batches on the device."""
    from torch.utils.data import DataLoader, TensorDataset

    torch, scale = bench.torch, bench.scale
    groups = gathered(torch, scale.rows, "large", bench.device, written=True).groups
    x = torch.rand((scale.rows, COLUMNS))
    y = torch.arange(scale.rows)
    x_there, y_there = x.to(bench.device), y.to(bench.device)

    sampler = PatchBatchSampler(groups, BATCH, seed=SEED, device=bench.device)
    data_loader = DataLoader(TensorDataset(x, y), batch_sampler=sampler)

    def by_hand() -> Iterable[Any]:
        for batch in sampler.batches():
            yield x_there[batch.indices], y_there[batch.indices]

    def by_loader() -> Iterable[Any]:
        for rows in data_loader:
            yield tuple(part.to(bench.device) for part in rows)

    loader = PatchTensorLoader(sampler, x=x_there, y=y_there)
    about = {"rows": f"{COLUMNS} float32 and an int64", "layout": "on the device"}
    ours = _per_batch(bench, "PatchTensorLoader", loader, None, about)
    _per_batch(bench, "a gather by hand for each batch", _Again(by_hand), None, about)
    theirs = _per_batch(bench, "DataLoader and .to(device)", _Again(by_loader), SLOW_BATCHES, about)
    name = "PatchTensorLoader on the device: times faster than DataLoader"
    bench.record.goal(name, theirs / ours, 20.0, "x", least=True)


def travelling(bench: Bench) -> None:
    """Rows of about a gigabyte on the host, for batches on the device."""
    from torch.utils.data import DataLoader, TensorDataset

    torch, scale = bench.torch, bench.scale
    groups = contiguous(scale.wide_rows, "large").groups
    x = torch.rand((scale.wide_rows, WIDE_COLUMNS))

    sampler = PatchBatchSampler(groups, BATCH, seed=SEED, device=bench.device)
    pin = not bench.machine.dry
    data_loader = DataLoader(TensorDataset(x), batch_sampler=sampler, pin_memory=pin)

    def by_loader() -> Iterable[Any]:
        for rows in data_loader:
            yield tuple(part.to(bench.device, non_blocking=True) for part in rows)

    loader = PatchTensorLoader(sampler, device=bench.device, x=x)
    about = {"rows": f"{WIDE_COLUMNS} float32", "layout": "on the host"}
    ours = _per_batch(bench, "PatchTensorLoader", loader, 20 * SLOW_BATCHES, about)
    theirs = _per_batch(
        bench, "DataLoader(pin_memory) and .to(device)", _Again(by_loader), SLOW_BATCHES, about
    )
    name = "PatchTensorLoader from the host: times faster than DataLoader"
    bench.record.goal(name, theirs / ours, 1.0, "x", least=True)


def _per_batch(
    bench: Bench, what: str, source: Iterable[Any], batches: int | None, about: dict[str, Any]
) -> float:
    """Time an epoch, or its first batches, and return microseconds of a batch."""
    bench.record.stop_if_late()
    found = []
    for _ in range(bench.scale.repeats + 1):
        bench.machine.synchronize()
        start = time.perf_counter()
        count = sum(1 for _ in islice(source, batches))
        bench.machine.synchronize()
        found.append((time.perf_counter() - start) * 1e3 / count)
    # The first one was to warm up.
    found = sorted(found[1:])
    timing = Timing(found[len(found) // 2], found[0], found[-1], len(found))
    bench.record.timing(what, timing, us_per_batch=timing.ms * 1e3, **about)
    return timing.ms * 1e3
