"""Samplers of other projects beside ours, on the same ids: ``python -m benchmarks``.

Each peer runs on each case in a process of its own. Prints one table, with ratios against torch's
ungrouped ``BatchSampler(RandomSampler)`` and against ours; ``--out`` writes all figures as JSON, of
which ``python -m docs.figures.peers`` makes the pictures and tables of the page. Times are those of
the processor, on one thread: other work on the machine disturbs them less. Peers come with the
``bench`` extra; one that is not there is named, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.peers import cases, tables
from benchmarks.peers.measure import ROUNDS
from benchmarks.peers.ours import OURS, UNGROUPED
from benchmarks.peers.registry import PEERS
from benchmarks.peers.running import LIMIT, described, run

QUICK_ROUNDS = 1


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the figures, as JSON")
    parser.add_argument("--quick", action="store_true", help="small cases, one round: a rehearsal")
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=sorted(cases.SERIES),
        help="some series of cases only",
    )
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only peers named so in part")
    parser.add_argument(
        "--limit-seconds", type=float, default=LIMIT, help=f"for a peer and a case ({LIMIT:g})"
    )
    parser.add_argument(
        "--read",
        type=Path,
        metavar="FILE",
        help="print a file of figures, measure nothing",
    )
    return parser.parse_args(arguments)


def chosen(names: list[str] | None) -> list[Any]:
    """Return the peers whose names hold one of these, and what ratios are against."""
    if not names:
        return list(PEERS)
    found = [peer for peer in PEERS if any(name in peer.name for name in names)]
    if not found:
        raise SystemExit(f"--peers must name some of {', '.join(peer.name for peer in PEERS)}")
    return [peer for peer in PEERS if peer in (*found, OURS[0], UNGROUPED)]


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Run what was asked for."""
    torch.set_num_threads(1)
    series = cases.QUICK if asked.quick else cases.SERIES
    series = {name: series[name] for name in asked.cases or series}
    middle = cases.QUICK_MIDDLE if asked.quick else cases.MIDDLE
    peers, some = chosen(asked.peers), cases.in_order(series)
    rounds = QUICK_ROUNDS if asked.quick else ROUNDS
    found: dict[str, Any] = {
        "machine": machine(),
        "limit_s": asked.limit_seconds,
        "rounds": rounds,
        "middle": middle._asdict(),
        "series": {name: [case._asdict() for case in held] for name, held in series.items()},
        "peers": described(peers),
        "rows": [],
    }
    # A thread of tqdm's would be forked with every process.
    tqdm.monitor_interval = 0
    with tqdm(total=len(peers) * len(some), disable=not sys.stderr.isatty()) as bar:
        for row in run(peers, some, asked.limit_seconds, rounds):
            found["rows"].append(row)
            bar.set_postfix_str(f"{row['peer']}, {tables.case_of(row)}", refresh=False)
            bar.update()
            if asked.out:
                write(found, asked.out)
    return found


def write(found: dict[str, Any], folder: Path) -> Path:
    """Write what was found so far, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"peers-{found['machine']['date']}.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(path)
    return path


def main(arguments: list[str] | None = None) -> None:
    """Print what was measured; write it if asked to."""
    asked = parsed(arguments)
    found = json.loads(asked.read.read_text()) if asked.read else measure(asked)
    print(tables.everything(found))
    print(tables.machine(found), end="")
    if asked.out:
        print(f"wrote {write(found, asked.out)}")


if __name__ == "__main__":
    main()
