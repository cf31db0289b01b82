"""Group, open and draw from datasets larger than memory: ``python -m benchmarks.scale``.

Needs some 13 GB of disk and ten minutes in full; ``--size`` cuts all of it down. One function a
claim, each returning plain numbers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.machine import machine, write
from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups, read_patch_ids
from gpusampler.core import memory

ROOT = Path(__file__).parent.parent
PATCHES = 500
_BLOCK = 1 << 24


def make_ids(path: Path, size: int, dtype: str = "int16", patches: int = PATCHES) -> None:
    """Write shuffled ids to a .npy file, block by block."""
    rng = np.random.default_rng(size)
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(size,))
    for first in range(0, size, _BLOCK):
        count = min(_BLOCK, size - first)
        mapped[first : first + count] = rng.integers(0, patches, count, dtype=dtype)
    mapped.flush()


class Held(NamedTuple):
    """What a process held at most, in bytes, and how it ended.

    ``anonymous`` is its memory outside the page cache (RssAnon of Linux); the pages of a file
    that it has mapped are the system's, which takes them back when it needs them.
    """

    anonymous: int
    seconds: float
    code: int
    output: str


def watched(
    arguments: list[str], kill_when: Callable[[float], bool] = lambda seconds: False
) -> Held:
    """Run this interpreter on arguments; look every few milliseconds, and kill it when asked to."""
    start = time.perf_counter()
    most = 0
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            if kill_when(time.perf_counter() - start):
                process.kill()
            time.sleep(0.005)
        output = process.communicate()[0]
    return Held(most, time.perf_counter() - start, process.returncode, output)


def anonymous(pid: int | str) -> int:
    """Return the anonymous resident memory of a process in bytes, 0 once it is gone."""
    return memory.kernel_field(Path(f"/proc/{pid}/status"), "RssAnon") or 0


ROUNDS = 3
BATCH_SIZE = 64

_GROUP = """
import sys
import gpusampler.groups.index_build
from gpusampler import PatchGroups
gpusampler.groups.index_build.CHECKPOINT_SECONDS = float(sys.argv[3])
print(PatchGroups.from_ids(sys.argv[1], path=sys.argv[2]))
"""

_OPEN = """
import sys, time
from gpusampler import PatchBatchSampler, PatchGroups
from benchmarks.scale import anonymous
before, start = anonymous("self"), time.perf_counter()
first = next(iter(PatchBatchSampler(PatchGroups.load(sys.argv[1]), 64, seed=0)))
print((time.perf_counter() - start) * 1e3, (anonymous("self") - before) / 1e6)
"""


def seconds(call: Callable[[], Any]) -> float:
    """Time a call by the clock: files and threads count."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def linearity(folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Group files of growing numbers of ids into index files; fit time = a * N**b."""
    took = {size: _grouping(folder, size, ROUNDS if size <= 10**8 else 1) for size in sizes}
    sizes, times = np.log(list(took)), np.log(list(took.values()))
    return {
        "seconds": {str(size): value for size, value in took.items()},
        "nanoseconds_an_id": {str(size): value / size * 1e9 for size, value in took.items()},
        "exponent": float(np.polyfit(sizes, times, 1)[0]),
        # Without the smallest, half of whose time is bringing files to the disk.
        "exponent_of_the_larger": float(np.polyfit(sizes[1:], times[1:], 1)[0]),
    }


def _grouping(folder: Path, size: int, rounds: int) -> float:
    """Return the seconds, best of some rounds, from a file of ids to an index file."""
    ids, index = folder / "linear.npy", folder / "linear.index"
    make_ids(ids, size)
    took = []
    for _ in range(rounds):
        index.unlink(missing_ok=True)
        took.append(seconds(lambda: PatchGroups.from_ids(ids, path=index)))
    index.unlink()
    ids.unlink()
    return min(took)


def against_argsort(size: int) -> dict[str, Any]:
    """Group int64 ids in memory; the baseline is np.argsort(ids, kind="stable") on them."""
    ids = np.random.default_rng(0).integers(0, PATCHES, size)
    tracemalloc.start()
    groups = PatchGroups.from_ids(ids)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    ours = min(seconds(lambda: PatchGroups.from_ids(ids)) for _ in range(ROUNDS))
    start = time.perf_counter()
    order = np.argsort(ids, kind="stable")
    baseline = time.perf_counter() - start
    return {
        "samples": size,
        "seconds": ours,
        "argsort_seconds": baseline,
        "times_faster": baseline / ours,
        "allocated_gb": peak / 1e9,
        "same": bool((groups.order == order).all()),
    }


def killed(
    folder: Path,
    size: int,
    patience: Sequence[float] = (3.0, 10.0, 15.0),
    checkpoint: float = 1.0,
) -> dict[str, Any]:
    """Group more ids than fit in the memory that is allowed, with several kills and resumes."""
    ids, index = folder / "killed.npy", folder / "killed.index"
    make_ids(ids, size)
    progress = index.with_name(f"{index.name}.progress")
    command = ["-c", _GROUP, str(ids), str(index), str(checkpoint)]
    runs = []
    for wait in patience:
        # Each run is killed once it has kept some work that was not there before.
        before = progress.stat().st_mtime_ns if progress.exists() else 0

        def come_further(seconds: float, before: int = before, wait: float = wait) -> bool:
            return seconds > wait and progress.exists() and progress.stat().st_mtime_ns > before

        runs.append(watched(command, come_further))
    runs.append(watched(command))
    start = time.perf_counter()
    groups = PatchGroups.load(index, source=ids, verify=True)
    found = {
        "samples": size,
        "codes": [run.code for run in runs],
        "seconds": [run.seconds for run in runs],
        "anonymous_gb": max(run.anonymous for run in runs) / 1e9,
        "index_gb": index.stat().st_size / 1e9,
        "verify_seconds": time.perf_counter() - start,
        "patches": groups.num_patches,
    }
    del groups
    index.unlink()
    ids.unlink()
    return found


def opening(folder: Path, size: int) -> dict[str, Any]:
    """Open a saved index in a new process and draw the first batch."""
    ids, index = folder / "opened.npy", folder / "opened.index"
    make_ids(ids, size)
    PatchGroups.from_ids(ids, path=index)
    ids.unlink()
    rounds = [
        [float(part) for part in watched(["-c", _OPEN, str(index)]).output.split()]
        for _ in range(2 * ROUNDS)
    ]
    index.unlink()
    return {
        "samples": size,
        "milliseconds": min(row[0] for row in rounds),
        "megabytes": max(row[1] for row in rounds),
    }


def from_counts(size: int, checked: int) -> dict[str, Any]:
    """Plan an epoch of samples that are given by counts; check its ends and random batches."""
    tracemalloc.start()
    counts = [size // PATCHES] * PATCHES
    plan = EpochPlan(PatchGroups.from_counts(counts), BATCH_SIZE, seed=7)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    slots = np.random.default_rng(1).integers(0, plan.num_batches, checked)
    slots = np.concatenate([[0, plan.num_batches - 1], slots])
    block = plan.evaluate(3, slots)
    again = plan.evaluator.block_by_arrays(3, slots)
    patch = block.indices // counts[0]
    positions = np.sort(block.indices, axis=1)
    return {
        "samples": plan.groups.num_samples,
        "batches": len(slots),
        "of_one_patch": bool((patch == block.groups[:, None]).all()),
        "distinct": bool(
            (positions[:, 1:] != positions[:, :-1])[block.lengths == BATCH_SIZE].all()
        ),
        "as_the_reference": bool((block.indices == again.indices).all()),
        "kilobytes": peak / 1e3,
    }


class Slow:
    """A dataset that takes a millisecond for a sample."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, int]:
        time.sleep(0.001)
        return {"patch_id": index % 7}


def asking(size: int) -> dict[str, Any]:
    """Read ids from a slow dataset; the baseline is a loop over its samples."""
    dataset = Slow(size)
    ours = seconds(lambda: read_patch_ids(dataset, progress=False))
    loop = seconds(lambda: [dataset[index]["patch_id"] for index in range(size)])
    return {"samples": size, "seconds": ours, "loop_seconds": loop, "times_faster": loop / ours}


def drained(folder: Path, size: int, batches: int) -> dict[str, Any]:
    """Draw batches of a mapped index, and of the same groups in memory."""
    ids, index = folder / "drained.npy", folder / "drained.index"
    make_ids(ids, size)
    mapped = PatchGroups.from_ids(ids, path=index)
    took = {}
    loaded = PatchGroups.load(index, mmap=False)
    for name, groups in {"mapped": mapped, "in memory": loaded}.items():
        sampler = PatchBatchSampler(groups, BATCH_SIZE, seed=0, output="numpy")

        def draw(sampler: PatchBatchSampler = sampler) -> None:
            for _, _ in zip(range(batches), sampler.batches(0), strict=False):
                pass

        took[name] = min(seconds(draw) for _ in range(ROUNDS)) / batches * 1e6
    index.unlink()
    ids.unlink()
    return {"samples": size, "microseconds_a_batch": took}


LARGEST = 2 * 10**9


def parts(folder: Path, largest: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what there is to measure, for a largest dataset of so many samples."""
    share = largest / LARGEST

    def cut(size: int) -> int:
        return max(round(size * share), 1000)

    sizes = [cut(size) for size in (10**6, 10**7, 10**8, 10**9)]
    return {
        "linearity": lambda: linearity(folder, sizes),
        "argsort": lambda: against_argsort(cut(10**8)),
        "opening": lambda: opening(folder, cut(10**9)),
        "drained": lambda: drained(folder, cut(10**9), 20_000),
        "counts": lambda: from_counts(10**12, 10_000),
        "asking": lambda: asking(10_000 if share == 1 else 1_500),
        "killed": lambda: killed(folder, largest),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the results; write them if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("parts", nargs="*", help="some of the parts only")
    parser.add_argument("--size", type=float, default=LARGEST, help="samples of the largest set")
    parser.add_argument("--folder", type=Path, help="where the ids are written, and removed again")
    parser.add_argument("--out", type=Path, help="folder for the figures, as JSON")
    asked = parser.parse_args(arguments)
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        offered = parts(Path(folder), int(asked.size))
        unknown = set(asked.parts) - set(offered)
        if unknown:
            parser.error(f"parts must be among {', '.join(offered)}, got {', '.join(unknown)}")
        for name, measure in offered.items():
            if not asked.parts or name in asked.parts:
                found[name] = measure()
                print(f"{name}: {json.dumps(found[name], indent=2)}", flush=True)
    if asked.out:
        write(found, asked.out, "scale")


if __name__ == "__main__":
    main()
