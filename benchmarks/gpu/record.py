"""The results of a run, one line of JSON for each, written when they are found.

A line is in the file before the next thing begins, so a process that dies loses no result. This
module needs the standard library only: the process that watches a run imports it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


class Record:
    """Results in a file of lines of JSON, to which several processes append in turn.

    Parameters
    ----------
    path : Path
        The file.
    deadline : float
        When the whole run must end, by `time.time`.
    """

    def __init__(self, path: Path, deadline: float) -> None:
        self.path = path
        self.deadline = deadline
        self._case_ends = deadline
        self._case = ""

    @property
    def left(self) -> float:
        """Seconds until the run must end."""
        return self.deadline - time.time()

    def lines(self, *kinds: str) -> list[dict[str, Any]]:
        """Return all complete lines of some kinds, or of all."""
        if not self.path.exists():
            return []
        *complete, _ = self.path.read_bytes().split(b"\n")
        lines = map(json.loads, complete)
        return [line for line in lines if not kinds or line["kind"] in kinds]

    def append(self, kind: str, **values: Any) -> None:
        """Write a line, at once."""
        line = json.dumps({"kind": kind, **values}, default=str) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())

    def begun(self) -> set[str]:
        """Return the names of the cases that have begun."""
        return {line["case"] for line in self.lines("begin")}

    def end_open_case(self, reason: str) -> None:
        """Write the end of a case whose process has ended without it."""
        if self.path.exists():
            # An incomplete last line is of no use.
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        last = self.lines("begin", "end")[-1:]
        for line in last:
            if line["kind"] == "begin":
                self._end(line["case"], "lost", 0.0, reason, [])

    def stop_if_late(self) -> None:
        """Stop the case if its time is spent.

        Raises
        ------
        OutOfTime
        """
        if time.time() > self._case_ends:
            raise OutOfTime("its time was spent")

    def run_all(self, cases: list[Case], bench: Any) -> None:
        """Run the cases that have not begun yet."""
        begun = self.begun()
        for case in cases:
            if case.name not in begun and self.run(case, bench) in ("error", "partial"):
                # If the device is lost, this raises, and another process goes on.
                bench.machine.free()

    def run(self, case: Case, bench: Any) -> str:
        """Run a case and return its status: "ok", "partial", "error" or "skipped"."""
        if self.left < case.seconds + RESERVE:
            self.append("skipped", case=case.name, error=f"{self.left:.0f} s were left")
            return "skipped"
        self.append("begin", case=case.name)
        self._case = case.name
        start, status, error = time.time(), "ok", ""
        self._case_ends = start + min(2 * case.seconds, self.left - RESERVE)
        # A kernel that never ends cannot be interrupted from Python: the process ends itself.
        limit = min(2 * case.seconds + MARGIN, self.left)
        faulthandler.dump_traceback_later(limit, exit=True)
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
        self._end(case.name, status, round(time.time() - start, 2), error, said)
        return status

    def _end(self, case: str, status: str, seconds: float, error: str, said: list[str]) -> None:
        self.append("end", case=case, status=status, seconds=seconds, error=error, warnings=said)
        last = f": {error.splitlines()[-1][:160]}" if error else ""
        print(f"[{self.left:4.0f} s left] {case}: {status} in {seconds:.1f} s{last}", flush=True)

    def check(self, name: str, ok: bool, detail: Any = "") -> None:
        """Write something that must hold; the exit status says whether everything does."""
        self.append("check", case=self._case, name=name, ok=bool(ok), detail=detail)

    def goal(self, name: str, value: float, limit: float, unit: str, *, least: bool) -> None:
        """Write how far a goal of the project is reached; ``least``: more is better."""
        met = bool(value >= limit if least else value <= limit)
        values = {"name": name, "value": value, "limit": limit, "unit": unit}
        self.append("goal", case=self._case, **values, least=least, met=met)

    def note(self, text: str) -> None:
        """Write something that a reader of the results should know."""
        self.append("note", case=self._case, text=text)

    def timing(self, what: str, timing: Any, samples: int = 0, **about: Any) -> float:
        """Write a `Timing`, of ``samples`` indices if it is one of indices; return its ms."""
        row: dict[str, Any] = {"case": self._case, "what": what, **about, **timing._asdict()}
        if samples:
            row |= {"n": samples, "ns_per_index": timing.ms * 1e6 / samples}
        self.append("timing", **row)
        return float(timing.ms)
