"""Run the proof: ``python -m benchmarks.gpu --out DIR``."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu import epochs, identity, loaders, report, steps, tuning, waiting
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.machine import Machine, Rehearsal, versions
from benchmarks.gpu.record import Case, Record
from benchmarks.gpu.workload import DRY, GPU

GRACE = 45.0
"""Seconds beyond the budget after which a run that hangs is ended."""


def main(argv: list[str] | None = None) -> int:
    """Run all cases and return the exit status: 1 if a check failed or a case broke off."""
    args = _parse(argv)
    missing = None if args.dry_run else Machine.missing()
    if missing:
        print(f"benchmarks.gpu needs a CUDA device: {missing}. --dry-run needs none.")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.resume or args.out / f"gpu-{time.strftime('%Y-%m-%d')}.json"
    record = Record(path, args.budget, resume=args.resume is not None)
    # A kernel that never ends cannot be interrupted: what was found is in the file.
    faulthandler.dump_traceback_later(max(30.0, record.left + GRACE), exit=True)
    machine = Rehearsal() if args.dry_run else Machine()
    bench = Bench(machine, record, DRY if args.dry_run else GPU)
    record.found["header"] |= {**machine.about(), **versions(), "dry_run": args.dry_run}
    for case in _cases(bench):
        if record.done(case.name):
            continue
        status = record.run(case, bench)
        machine.free()
        if status == "error" and not machine.alive():
            _begin_again(args, path)
    print(report.table(record.found), flush=True)
    record.run(Case("picture", float("-inf"), partial(_draw, path=path)), bench)
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{path}\n{'FAILED' if record.failed else 'passed'}", flush=True)
    return int(record.failed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-proof"), help="where results go")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _cases(bench: Bench) -> list[Case]:
    """Return all cases, what matters most first."""
    timed = [part.cases(bench) for part in (epochs, steps, loaders, tuning)]
    first, following, last = (
        [case for cases in timed for case in cases.get(rank, [])]
        for rank in ("first", "next", "last")
    )
    return [
        Case("kernel", 5, identity.kernel_in_use),
        Case("identity", 30, identity.a_hundred_plans),
        Case("no waiting", 5, waiting.nothing_waits),
        *first,
        Case("peak memory", 15, epochs.peak_memory),
        *following,
        *last,
    ]


def _begin_again(args: argparse.Namespace, path: Path) -> None:
    """Go on in a new process: an illegal access has ended the device for this one."""
    print("the device is lost to this process: going on in another", flush=True)
    faulthandler.cancel_dump_traceback_later()
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(args.out)]
    command += ["--budget", str(args.budget), "--resume", str(path)]
    os.execv(sys.executable, [*command, "--dry-run"] if args.dry_run else command)


def _draw(bench: Bench, path: Path) -> None:
    report.draw(bench.record.found, path.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
