"""The results of a run, one line of JSON for each, written when they are found.

A line is in the file before the next thing begins, so a process that dies loses no result. This
module needs the standard library only: the process that watches a run imports it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

DONE, NOTHING_TO_RUN_ON = 0, 2
"""Exit codes of a process that runs cases."""

ERROR_LINES = 40
MARGIN = 15.0
"""Seconds that one measurement may take after its case should have stopped."""

RESERVE = 10.0
"""Seconds before the end of the run in which a case that is late can still stop by itself."""


class OutOfTime(Exception):
    """A case stopped in the middle because its time is spent."""


class Case(NamedTuple):
    """One part of a run: ``run(bench)``, which should take about ``seconds``."""

    name: str
    seconds: float
    run: Callable[[Any], None]

    @property
    def soft_limit(self) -> float:
        """Seconds after which the case stops before its next measurement."""
        return 2 * self.seconds

    @property
    def hard_limit(self) -> float:
        """Seconds after which the process that runs the case ends itself."""
        return self.soft_limit + MARGIN


class ResultsFile:
    """A file of lines of JSON, to which several processes append in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """Return all complete lines; the last one may still be in the middle of being written."""
        if not self.path.exists():
            return []
        *complete, _ = self.path.read_bytes().split(b"\n")
        return [json.loads(line) for line in complete]

    def append(self, kind: str, **values: Any) -> None:
        """Write a line, at once."""
        line = json.dumps({"kind": kind, **values}, default=str) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())

    def remove_incomplete_line(self) -> None:
        """Remove what a process that was killed has written of its last line."""
        if self.path.exists():
            text = self.path.read_bytes()
            os.truncate(self.path, text.rfind(b"\n") + 1)

    def begun(self) -> list[dict[str, Any]]:
        """Return the lines of the cases that have begun."""
        return [line for line in self.lines() if line["kind"] == "begin"]

    def open_case(self) -> dict[str, Any] | None:
        """Return the line of the case that has begun and not ended."""
        marks = [line for line in self.lines() if line["kind"] in ("begin", "end")]
        return marks[-1] if marks and marks[-1]["kind"] == "begin" else None


def _end_with_parent() -> None:
    """End this process when standard input is closed: another run would find the device in use."""
    os.read(0, 1)
    os._exit(1)


class Record:
    """What the cases of a process find: checks, goals and timings.

    Parameters
    ----------
    results : ResultsFile
        Where they go.
    deadline : float
        When the whole run must end, by `time.time`.
    """

    def __init__(self, results: ResultsFile, deadline: float) -> None:
        self.results = results
        self.deadline = deadline
        self._case_ends = deadline
        self._case = ""

    @property
    def left(self) -> float:
        """Seconds until the run must end."""
        return self.deadline - time.time()

    def stop_if_late(self) -> None:
        """Stop the case if its time is spent.

        Raises
        ------
        OutOfTime
        """
        if time.time() > self._case_ends:
            raise OutOfTime("its time was spent")

    def run_all(self, cases: list[Case], bench: Any) -> int:
        """Run the cases that have not begun yet, and return the exit code of this process."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        begun = {line["case"] for line in self.results.begun()}
        for case in cases:
            if case.name not in begun and self.run(case, bench) in ("error", "partial"):
                # If the device is lost, this raises, and another process goes on.
                bench.machine.free()
        return DONE

    def run(self, case: Case, bench: Any) -> str:
        """Run a case and return its status: "ok", "partial", "error" or "skipped"."""
        if self.left < case.seconds + RESERVE:
            self.results.append("skipped", case=case.name, error=f"{self.left:.0f} s were left")
            return "skipped"
        hard_limit = min(case.hard_limit, self.left)
        self.results.append("begin", case=case.name, limit_s=round(hard_limit, 1))
        self._case = case.name
        start, status, error = time.time(), "ok", ""
        self._case_ends = start + min(case.soft_limit, self.left - RESERVE)
        # A kernel that never ends cannot be interrupted from Python.
        faulthandler.dump_traceback_later(hard_limit, exit=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                case.run(bench)
                # Errors of the device arrive late: those of this case must be found in it.
                bench.machine.free()
            except OutOfTime as late:
                status, error = "partial", str(late)
            except Exception:
                status = "error"
                error = "\n".join(traceback.format_exc().splitlines()[-ERROR_LINES:])
        faulthandler.cancel_dump_traceback_later()
        said = sorted({f"{w.category.__name__}: {str(w.message).strip()[:300]}" for w in caught})
        seconds = round(time.time() - start, 2)
        self.results.append(
            "end", case=case.name, status=status, seconds=seconds, error=error, warnings=said
        )
        last = f": {error.splitlines()[-1][:160]}" if error else ""
        left = f"[{self.left:4.0f} s left]"
        print(f"{left} {case.name}: {status} in {seconds:.1f} s{last}", flush=True)
        return status

    def check(self, name: str, ok: bool, detail: Any = "") -> None:
        """Write something that must hold; the exit status says whether everything does."""
        self.results.append("check", case=self._case, name=name, ok=bool(ok), detail=detail)

    def goal(self, name: str, value: float, limit: float, unit: str, *, least: bool) -> None:
        """Write how far a goal of the project is reached; ``least``: more is better."""
        met = bool(value >= limit if least else value <= limit)
        values = {"name": name, "value": value, "limit": limit, "unit": unit}
        self.results.append("goal", case=self._case, **values, least=least, met=met)

    def note(self, text: str) -> None:
        """Write something that a reader of the results should know."""
        self.results.append("note", case=self._case, text=text)

    def timing(self, what: str, timing: Any, samples: int = 0, **about: Any) -> float:
        """Write a `Timing`, of ``samples`` indices if it is one of indices; return its ms."""
        row: dict[str, Any] = {"case": self._case, "what": what, **about, **timing._asdict()}
        if samples:
            row |= {"n": samples, "ns_per_index": timing.ms * 1e6 / samples}
        self.results.append("timing", **row)
        return float(timing.ms)
