"""What has been found so far, written to a JSON file after every case."""

from __future__ import annotations

import json
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.machine import Timing

ERROR_LINES = 40


class OutOfTime(Exception):
    """A case has stopped in the middle, since the budget is spent."""


class Case(NamedTuple):
    """A part of the proof: ``run(bench)``, begun only if about ``seconds`` are left."""

    name: str
    seconds: float
    run: Callable[[Any], None]


class Record:
    """Checks, goals and timings, by case.

    Parameters
    ----------
    path : Path
        Of the JSON file.
    budget : float
        Seconds for everything.
    resume : bool
        Go on from the file: the process that began it has lost its device.
    """

    def __init__(self, path: Path, budget: float, resume: bool = False) -> None:
        self.path = path
        if resume:
            self.found: dict[str, Any] = json.loads(path.read_text())
        else:
            self.found = {
                "header": {"date": time.strftime("%Y-%m-%d %H:%M:%S")},
                "started": time.time(),
                "budget_s": budget,
                "cases": [],
                "checks": [],
                "goals": [],
                "timings": [],
            }
        self._case = ""

    @property
    def elapsed(self) -> float:
        """Seconds since the first process of this run began."""
        return float(time.time() - self.found["started"])

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float(self.found["budget_s"]) - self.elapsed

    @property
    def failed(self) -> bool:
        """Whether a check does not hold or a case broke off with an error."""
        return any(not check["ok"] for check in self.found["checks"]) or any(
            case["status"] == "error" for case in self.found["cases"]
        )

    def stop_if_late(self) -> None:
        """End the case if the budget is spent.

        Raises
        ------
        OutOfTime
        """
        if self.left < 0:
            raise OutOfTime(f"the budget was spent after {self.elapsed:.0f} s")

    def run(self, case: Case, bench: Any) -> str:
        """Run a case, whatever becomes of it, and return its status: what it found is kept."""
        if self.left < case.seconds:
            return self._end(case.name, "skipped", 0.0, f"{self.left:.0f} s left", [])
        self._case = case.name
        start, status, error = time.perf_counter(), "ok", ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                case.run(bench)
            except OutOfTime as late:
                status, error = "partial", str(late)
            except Exception:
                status = "error"
                error = "\n".join(traceback.format_exc().splitlines()[-ERROR_LINES:])
        said = sorted({f"{w.category.__name__}: {str(w.message).strip()[:300]}" for w in caught})
        return self._end(case.name, status, time.perf_counter() - start, error, said)

    def _end(self, name: str, status: str, seconds: float, error: str, said: list[str]) -> str:
        self.found["cases"].append(
            {
                "name": name,
                "status": status,
                "seconds": round(seconds, 2),
                "error": error,
                "warnings": said,
            }
        )
        self.write()
        last = f": {error.splitlines()[-1][:160]}" if error else ""
        print(f"[{self.elapsed:6.1f} s] {name}: {status} in {seconds:.1f} s{last}", flush=True)
        return status

    def done(self, name: str) -> bool:
        """Whether a case is in the record."""
        return any(case["name"] == name for case in self.found["cases"])

    def check(self, name: str, ok: bool, detail: Any = "") -> bool:
        """Note something that must hold: the exit status says whether all of these do."""
        self.found["checks"].append(
            {"case": self._case, "name": name, "ok": bool(ok), "detail": detail}
        )
        return bool(ok)

    def goal(self, name: str, value: float, limit: float, unit: str, *, least: bool) -> None:
        """Note how far a goal of the project is reached; ``least``: more is better."""
        met = value >= limit if least else value <= limit
        self.found["goals"].append(
            {
                "case": self._case,
                "name": name,
                "value": value,
                "limit": limit,
                "unit": unit,
                "least": least,
                "met": bool(met),
            }
        )

    def timing(self, what: str, timing: Timing, samples: int = 0, **about: Any) -> float:
        """Note a timing, of so many indices where it is one of indices, and return its ms."""
        row: dict[str, Any] = {"case": self._case, "what": what, **about, **timing._asdict()}
        if samples:
            row |= {"n": samples, "ns_per_index": timing.ms * 1e6 / samples}
        self.found["timings"].append(row)
        return timing.ms

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.found["elapsed_s"] = round(self.elapsed, 1)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.found, indent=1, default=str))
        beside.replace(self.path)
