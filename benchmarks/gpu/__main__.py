"""``python -m benchmarks.gpu --out DIR``: run the cases in a child, and print a table.

This process imports no array library, so no error of a device can reach it. If a child dies in a
case (a lost device, a segmentation fault, a hang), that case is lost, and another child goes on
after it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu import report
from benchmarks.gpu.record import Record

NEEDED = ("numpy", "torch", "array_api_compat", "tqdm", "filelock")
NOTHING_TO_RUN_ON = 2
BUDGET = 330.0
GRACE = 10.0
"""Seconds in which a child that hangs at the end of the budget can show where it hung."""


def watch(command: Sequence[str], record: Record) -> int:
    """Start children until all cases have begun, and return the last one's exit code."""
    record.end_open_case("an earlier run ended in this case")
    while True:
        begun = record.begun()
        # Nothing is written to it: it closes when this process ends, however it does.
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            try:
                code = child.wait(record.left + GRACE)
                reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            except subprocess.TimeoutExpired:
                code, reason = 1, "all time was spent"
            finally:
                child.kill()
        record.end_open_case(f"its process ended: {reason}")
        # If it began nothing, another one would fail alike, for ever.
        if code == 0 or record.left < 0 or record.begun() == begun:
            return code


def end_with_parent() -> None:
    """End this process when standard input is closed: another run would find the device in use."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 1 if a check failed or a case broke off, or 2 if nothing can run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="where results go")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--child", type=float, metavar="DEADLINE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"benchmarks.gpu cannot import {', '.join(missing)}")
        return NOTHING_TO_RUN_ON
    path = args.out / "gpu.jsonl"
    if args.child:
        from benchmarks.gpu.cases import run

        end_with_parent()
        return run(Record(path, args.child), args.dry_run)
    args.out.mkdir(parents=True, exist_ok=True)
    record = Record(path, time.time() + args.budget - GRACE - 2)
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(args.out)]
    command += ["--child", str(record.deadline), *["--dry-run"] * args.dry_run]
    code = watch(command, record)
    if report.ended(record):
        print(report.table(record), flush=True)
    failed = code != 0 or report.has_failed(record)
    print(f"\n{path}\n{'FAILED' if failed else 'passed'}", flush=True)
    return code if code == NOTHING_TO_RUN_ON else int(failed)


if __name__ == "__main__":
    sys.exit(main())
