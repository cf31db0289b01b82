"""``python -m benchmarks.gpu --out DIR``: watch the processes that measure, and print a table."""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu import report, watch
from benchmarks.gpu.record import DONE, NOTHING_TO_RUN_ON, ResultsFile

NEEDED = ("numpy", "torch", "array_api_compat", "tqdm", "filelock")
BUDGET = 330.0
RESERVE = watch.GRACE + 2
"""Seconds of the budget in which a child that hangs is killed and the table is printed."""


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 1 if a check failed or a case broke off, or 2 if nothing can run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="where results go")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args(argv)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"benchmarks.gpu cannot import {', '.join(missing)}")
        return NOTHING_TO_RUN_ON
    args.out.mkdir(parents=True, exist_ok=True)
    results = ResultsFile(args.out / "gpu.jsonl")
    deadline = time.time() + args.budget - RESERVE
    command = [sys.executable, "-m", "benchmarks.gpu.worker", str(results.path), str(deadline)]
    code = watch.run_cases([*command, *["--dry-run"] * args.dry_run], results, deadline)
    found = report.collect(results.lines())
    if found["cases"]:
        print(report.table(found), flush=True)
    failed = code != DONE or report.has_failed(found)
    print(f"\n{results.path}\n{'FAILED' if failed else 'passed'}", flush=True)
    return code if code == NOTHING_TO_RUN_ON else int(failed)


if __name__ == "__main__":
    sys.exit(main())
