"""Compare gpusampler with other samplers on the same ids: ``python -m benchmarks``.

Each sampler runs on each case in its own process. The command prints one table per case; ``--out``
writes all results as JSON, from which ``python -m docs.figures.peers`` makes the tables and
pictures of the page. Times are CPU times on one thread, which other work on the machine disturbs
less than wall times. The ``bench`` extra installs the other samplers; the table names those that
are missing, with the reason.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import markdown
from benchmarks.machine import line, machine, write
from benchmarks.peers import cases
from benchmarks.peers.measure import ROUNDS
from benchmarks.peers.ours import OURS
from benchmarks.peers.peer import version
from benchmarks.peers.registry import PEERS
from benchmarks.peers.running import LIMIT, run
from benchmarks.peers.samplers.restated import UNGROUPED

TIMES = "construct_s", "first_s", "epoch_s", "second_epoch_s"
FIGURES = (*TIMES, "peak_mb", "len", "batches", "missed", "repeated", "mixed", "same_members")
WHY = ("missing", "skipped", "error", "over")
TOLD = ("name", "package", "given", "pure", "note", "drawn")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results, as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="small cases, one round: check that all runs"
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=sorted(cases.SERIES),
        help="run only these series of cases",
    )
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="run only samplers with NAME in their name"
    )
    parser.add_argument(
        "--limit-seconds",
        type=float,
        default=LIMIT,
        help=f"CPU time per sampler and case ({LIMIT:g})",
    )
    return parser.parse_args(arguments)


def chosen(names: list[str] | None) -> list[Any]:
    """Return the samplers whose names contain one of these, and the baselines of the ratios."""
    if not names:
        return list(PEERS)
    found = [peer for peer in PEERS if any(name in peer.name for name in names)]
    if not found:
        raise SystemExit(f"--peers must name some of {', '.join(peer.name for peer in PEERS)}")
    return [peer for peer in PEERS if peer in (*found, OURS[0], UNGROUPED)]


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen samplers on the chosen cases."""
    torch.set_num_threads(1)
    series = cases.QUICK if asked.quick else cases.SERIES
    series = {name: series[name] for name in asked.cases or series}
    middle = cases.QUICK_MIDDLE if asked.quick else cases.MIDDLE
    peers, some = chosen(asked.peers), cases.in_order(series)
    rounds = 1 if asked.quick else ROUNDS
    found: dict[str, Any] = {
        "machine": machine(),
        "limit_s": asked.limit_seconds,
        "rounds": rounds,
        "middle": middle._asdict(),
        "series": {name: [case._asdict() for case in held] for name, held in series.items()},
        "peers": [
            {**{f: getattr(peer, f) for f in TOLD}, "version": version(peer)} for peer in peers
        ],
        "rows": [],
    }
    for row in run(peers, some, asked.limit_seconds, rounds):
        found["rows"].append(row)
        if asked.out:
            write(found, asked.out, "peers")
        if len(found["rows"]) % len(peers) == 0:
            print(f"\n{cases.Case(**row['case'])}\n\n{table(found['rows'][-len(peers) :])}")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the results of all samplers on one case."""
    ungrouped = next(row for row in rows if row["peer"] == UNGROUPED.name).get("epoch_s")
    lines = []
    for row in rows:
        ratio = row["epoch_s"] / ungrouped if ungrouped and "epoch_s" in row else "-"
        why = next((row[name] for name in WHY if name in row), "")
        values = [row["peer"], ratio, *(row.get(name, "-") for name in FIGURES), why]
        lines.append([f"{v:.3g}" if isinstance(v, float) else v for v in values])
    return markdown.table(("sampler", "epoch / ungrouped", *FIGURES, "not measured because"), lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the results; write them if asked to."""
    asked = parsed(arguments)
    found = measure(asked)
    print(f"\n{line(found['machine'])}")
    if asked.out:
        print(f"wrote {write(found, asked.out, 'peers')}")


if __name__ == "__main__":
    main()
