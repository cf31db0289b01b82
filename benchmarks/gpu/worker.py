"""The process that measures: ``python -m benchmarks.gpu.worker FILE DEADLINE [--dry-run]``.

`benchmarks.gpu.watch` starts it. It runs the cases that have not begun yet, what matters most
first.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import epochs, loaders, steps, tuning
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.machine import Machine, Rehearsal, commit, versions
from benchmarks.gpu.record import NOTHING_TO_RUN_ON, Case, Record, ResultsFile
from benchmarks.gpu.workload import DRY, GPU, Scale


def main(argv: list[str] | None = None) -> int:
    """Run the cases that are left, and return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("deadline", type=float)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    faulthandler.enable()
    results = ResultsFile(args.results)
    kind = {"commit": commit(), "dry_run": args.dry_run}
    if reason := _why_not(results, kind):
        print(f"benchmarks.gpu: {reason}", flush=True)
        return NOTHING_TO_RUN_ON
    machine = Rehearsal() if args.dry_run else Machine()
    results.append("machine", **{**machine.about(), **versions(), **kind})
    bench = Bench(machine, Record(results, args.deadline), DRY if args.dry_run else GPU)
    return bench.record.run_all(cases(bench.scale), bench)


def _why_not(results: ResultsFile, kind: dict[str, Any]) -> str | None:
    """Return why nothing can run here: results of two kinds in a file would not compare."""
    if not kind["dry_run"] and (missing := Machine.missing()):
        return f"it needs a CUDA device, but {missing}; --dry-run needs none"
    for line in results.lines():
        if line["kind"] == "machine":
            earlier = {name: line[name] for name in kind}
            if earlier != kind:
                return f"{results.path} has results of {earlier}, not of {kind}: give another --out"
    return None


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


if __name__ == "__main__":
    sys.exit(main())
