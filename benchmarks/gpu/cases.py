"""The cases, what matters most first, and the process that runs those that have not begun."""

from __future__ import annotations

import faulthandler
from functools import partial

from benchmarks.gpu import epochs, loaders, steps, tuning
from benchmarks.gpu.__main__ import NOTHING_TO_RUN_ON
from benchmarks.gpu.machine import Machine, Rehearsal
from benchmarks.gpu.record import Case, Record
from benchmarks.gpu.workload import DRY, GPU, Bench, Scale
from benchmarks.machine import commit
from benchmarks.machine import machine as host


def run(record: Record, dry_run: bool) -> int:
    """Run the cases that are left, and return an exit code."""
    faulthandler.enable()
    if not dry_run and (missing := Machine.missing()):
        print(f"benchmarks.gpu needs a CUDA device, but {missing}; --dry-run needs none")
        return NOTHING_TO_RUN_ON
    kind = {"commit": commit(), "dry_run": dry_run}
    for line in record.lines("machine"):
        # Results of two kinds in a file would not compare.
        if (earlier := {name: line[name] for name in kind}) != kind:
            print(f"{record.path} has results of {earlier}, not of {kind}: give another --out")
            return NOTHING_TO_RUN_ON
    machine = Rehearsal() if dry_run else Machine()
    versions = host("triton", "cupy-cuda12x", "cupy-cuda13x", "array-api-compat")
    record.append("machine", **{**versions, **machine.about(), **kind})
    bench = Bench(machine, record, DRY if dry_run else GPU)
    record.run_all(cases(bench.scale), bench)
    return 0


def cases(scale: Scale) -> list[Case]:
    """Return all cases, what matters most first."""
    *smaller, largest = [samples for samples in scale.samples if samples != scale.main]

    def epoch(samples: int, seconds: float) -> Case:
        return Case(f"epoch of {samples:.0e}", seconds, partial(epochs.epoch, samples=samples))

    def other_mix(mix: str, samples: int) -> Case:
        run = partial(epochs.other_mix, mix=mix, samples=samples)
        return Case(f"epoch of {mix} patches", 6, run)

    return [
        epoch(scale.main, 15),
        Case("steps in a graph", 15, partial(steps.in_graph, compiled=False)),
        Case("peak memory", 15, epochs.peak_memory),
        *(epoch(samples, 8) for samples in smaller),
        Case("grouping", 8, epochs.grouping),
        Case("epoch by CuPy", 8, epochs.by_cupy),
        Case("lists", 15, loaders.lists),
        Case("rows on the device", 10, loaders.resident),
        Case("rows on the host", 20, loaders.travelling),
        epoch(largest, 25),
        *(other_mix(mix, scale.mixes) for mix in ("small", "mixed")),
        other_mix("wide", scale.main),
        Case("compiled steps", 45, partial(steps.in_graph, compiled=True)),
        Case("tiles of CUDA C", 20, tuning.cuda_tiles),
        Case("tiles of Triton", 40, tuning.triton_tiles),
    ]
