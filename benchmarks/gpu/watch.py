"""Run cases in child processes, and start another one after a child that died.

This process imports no array library, so no error of a device can reach it. A child says in the
results' file which case it begins. If it dies in a case (a lost device, a segmentation fault, a
hang), that case is lost, and the next child goes on after it.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence

from benchmarks.gpu.record import DONE, ResultsFile

START_LIMIT = 90.0
"""Seconds that a child may take until it begins a case: it imports torch and prepares a device."""

GRACE = 10.0
"""Seconds beyond a case's limit: a child that can still end itself shows where it hung."""

POLL = 0.2


def run_cases(command: Sequence[str], results: ResultsFile, deadline: float) -> int:
    """Start children until all cases have begun, and return the last one's exit code.

    Parameters
    ----------
    command : sequence of str
        Starts a child. It goes on after the cases that have begun.
    results : ResultsFile
        Where children write.
    deadline : float
        When everything must end, by `time.time`.
    """
    results.remove_incomplete_line()
    _end_open_case(results, "an earlier run ended in this case")
    while True:
        begun = len(results.begun())
        # Nothing is written to it: it closes when this process ends, however it does.
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            try:
                reason = _wait(child, results, deadline)
            finally:
                child.kill()
        results.remove_incomplete_line()
        _end_open_case(results, reason)
        if child.returncode == DONE:
            return DONE
        print(f"the process that measures has ended: {reason}", flush=True)
        # If it began nothing, another one would fail alike, for ever.
        if time.time() > deadline or len(results.begun()) == begun:
            return child.returncode


def _wait(child: subprocess.Popen[bytes], results: ResultsFile, deadline: float) -> str:
    """Wait until a child ends, or has taken too long; return how it ended."""
    num_lines, since = -1, time.monotonic()
    while (code := child.poll()) is None:
        lines = results.lines()
        marks = [line for line in lines if line["kind"] in ("begin", "end")]
        if len(marks) != num_lines:
            num_lines, since = len(marks), time.monotonic()
        limit = START_LIMIT
        if marks and marks[-1]["kind"] == "begin":
            limit = marks[-1]["limit_s"] + GRACE
        if time.monotonic() - since > limit:
            return f"it was killed after {limit:.0f} s without an end"
        if time.time() > deadline + GRACE:
            return "it was killed when all time was spent"
        time.sleep(POLL)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end_open_case(results: ResultsFile, reason: str) -> None:
    """Write the end of a case whose process has ended without it."""
    case = results.open_case()
    if case is not None:
        results.append(
            "end", case=case["case"], status="lost", seconds=0.0, error=reason, warnings=[]
        )
        print(f"{case['case']}: lost: {reason}", flush=True)
