"""Each peer on each case in a process of its own, with a limit on its time."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import Case
from benchmarks.peers.measure import ROUNDS, measured
from benchmarks.peers.peer import Peer, missing

LIMIT = 30.0
PATIENCE = 10.0
"""A process may take so many times the limit by the wall clock: it may have to wait for others."""
LOOK = 0.1
"""Seconds between looks at how much of the processor a process has used."""


def run(
    peers: Iterable[Peer],
    cases: Iterable[Case],
    limit: float = LIMIT,
    rounds: int = ROUNDS,
) -> Iterator[dict[str, Any]]:
    """Measure all peers on all cases: a dict each, as it comes.

    Each holds the ``peer``, its ``case`` and what was found; ``missing``, ``error``, ``over`` or
    ``skipped`` say why something was not.
    """
    peers = list(peers)
    # Here, so that the processes find them imported.
    why = {peer.name: missing(peer) for peer in peers}
    late: dict[str, list[Case]] = {peer.name: [] for peer in peers}
    for case in cases:
        # All peers one after the other, so that compared results were measured together.
        for peer in peers:
            row: dict[str, Any] = {"peer": peer.name, "case": case._asdict()}
            after = next((one for one in late[peer.name] if case.costs_no_less(one)), None)
            if why[peer.name]:
                yield row | {"missing": why[peer.name]}
            elif after:
                yield row | {"skipped": f"over {limit:g} s with {after}"}
            else:
                row |= apart(partial(measured, peer, case, rounds=rounds), limit)
                if "over" in row:
                    late[peer.name].append(case)
                yield row


def apart(call: Callable[[Callable[[dict[str, Any]], None]], None], limit: float) -> dict[str, Any]:
    """Run ``call(say)`` in a forked process; return its results, and how it ended.

    The limit is on the seconds of the processor from the first thing said on.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        # Garbage collections that a sampler's lists trigger skip all that is imported already.
        gc.freeze()
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call(theirs.send)
            except Exception as error:
                first = str(error).splitlines()[:1] or [""]
                theirs.send({"error": f"{type(error).__name__}: {first[0]}"})
        if caught:
            theirs.send({"warnings": sorted({str(one.message).split(". ")[0] for one in caught})})

    child = context.Process(target=work)
    child.start()
    theirs.close()
    found: dict[str, Any] = {}
    deadline = time.monotonic() + limit * PATIENCE
    allowed = float("inf")
    try:
        while True:
            if ours.poll(LOOK):
                found |= ours.recv()
                if allowed == float("inf"):
                    allowed = processor_seconds(child.pid) + limit
            elif processor_seconds(child.pid) > allowed or time.monotonic() > deadline:
                found["over"] = limit
                child.kill()
                break
    except EOFError:
        child.join()
        if child.exitcode:
            found["error"] = f"its process ended with {child.exitcode}"
    child.join()
    ours.close()
    return found


def processor_seconds(pid: int | None) -> float:
    """Return what a process has used of the processor, 0 once it is gone.

    Asked from outside: a limit of the system's on it (RLIMIT_CPU) makes the process's own clock of
    the processor go in steps of 4 ms.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    # The second field is the name, in brackets, with any character in it.
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
