"""Run the long form and write its results: ``python -m tests.battery.report [FILE.json]``.

Prints the tables of docs/explanation/statistics.md. One core, four to six minutes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from gpusampler.permutation.reference import VERSION

from . import bijectivity, statistics
from .cases import CASES, below, run
from .controls import CONTROLS, LARGEST_FOR_ORACLES, ORACLES
from .statistics import Result
from .subjects import Subject


def machine() -> dict[str, Any]:
    model = "unknown"
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        model = next((v.strip() for k, _, v in lines if k.strip() == "model name"), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def flat(parts: Iterable[list[Result]]) -> list[Result]:
    return [result for part in parts for result in part]


def plain(result: Result) -> dict[str, Any]:
    """Return a result as JSON holds it; an impossible count has no z."""
    z = float(f"{result.z:.4g}") if np.isfinite(result.z) else None
    return {**result._asdict(), "p": float(f"{result.p:.4g}"), "z": z}


def strongest(failed: Sequence[Result]) -> list[Result]:
    """Return the smallest p of each kind of test."""
    best: dict[str, Result] = {}
    for result in failed:
        if result.kind not in best or result.p < best[result.kind].p:
            best[result.kind] = result
    return list(best.values())


def write(found: dict[str, Any], path: Path) -> None:
    """Write JSON with one result per line."""
    text = json.dumps(found, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"\{\s*(\"test\"[^{}]*?)\s*\}", _one_line, text) + "\n")


def _one_line(row: re.Match[str]) -> str:
    return "{" + re.sub(r"\s*\n\s*", " ", row[1]) + "}"


def collect() -> dict[str, Any]:
    """Run everything: long for the real permutation, quick for oracles and most controls."""
    began = time.perf_counter()
    sizes = bijectivity.large_sizes(10**7)
    not_bijective = bijectivity.exhaustive(0) + [
        n for n in sizes if not bijectivity.is_bijection(Subject(), n, seed=n)
    ]
    exact = time.perf_counter() - began
    parts = []
    for case, part in zip(CASES, run(Subject(), "long"), strict=True):
        print(f"{time.perf_counter() - began:6.0f} s  {case.yields[0]}, n={case.n}", flush=True)
        parts.append(part)
    real = flat(parts)
    limit = statistics.bound(real)
    took = time.perf_counter() - began
    oracles = {
        oracle.name: flat(run(oracle(), "quick", below(LARGEST_FOR_ORACLES))) for oracle in ORACLES
    }
    controls = {}
    for control in CONTROLS:
        results = flat(run(control.subject, control.form, control.cases()))
        failed = statistics.failures(results, limit)
        controls[control.subject.name] = {
            "tests": len(results),
            "failed": len(failed),
            "missed": control.missed(failed),
            "strongest": [plain(result) for result in strongest(failed)],
        }
    return {
        "permutation_version": VERSION,
        "machine": machine(),
        "alpha": statistics.ALPHA,
        "bound": limit,
        "seconds": {
            "bijectivity": round(exact, 1),
            "real": round(took - exact, 1),
            "oracles and controls": round(time.perf_counter() - began - took, 1),
        },
        "bijectivity": {
            "sizes": len(bijectivity.SMALL_SIZES) + len(sizes),
            "largest": max(sizes),
            "failed": not_bijective,
        },
        "real": [plain(result) for result in real],
        "oracles": {name: [plain(r) for r in results] for name, results in oracles.items()},
        "controls": controls,
    }


def count(number: int) -> str:
    """Number as the page writes it, such as 20e6 or 2 048."""
    if number >= 10**6 and number % 10**5 == 0:
        return f"{number / 10**6:g}e6"
    return f"{number:,}".replace(",", " ")


def sizes_of(results: Sequence[Result]) -> str:
    """Sizes as the page writes them; of more than six, the range."""
    sizes = [f"{n:,}".replace(",", " ") for n in sorted({r.n for r in results})]
    if len(sizes) <= 6:
        return ", ".join(sizes)
    return f"{len(sizes)} sizes, {sizes[0]} to {sizes[-1]}"


def table_of_real(found: dict[str, Any]) -> str:
    """One row per kind of test: sizes, samples, number of tests, smallest p."""
    kinds: dict[str, list[Result]] = defaultdict(list)
    for row in found["real"]:
        result = Result(**row)
        kinds[result.kind].append(result)
    lines = ["| test | n | samples per test | p-values | smallest p |", "|---|---|---|---|---|"]
    for kind, results in kinds.items():
        least, most = (f([r.samples for r in results]) for f in (min, max))
        samples = count(least) if least == most else f"{count(least)} to {count(most)}"
        worst = min(results, key=lambda r: r.p)
        where = f"{worst.p:.2g} (n={worst.n}{_detail(worst)})"
        lines.append(f"| {kind} | {sizes_of(results)} | {samples} | {len(results)} | {where} |")
    return "\n".join(lines)


def _detail(result: Result) -> str:
    detail = result.test.partition(":")[2].strip()
    return f"; {detail}".replace("|", "\\|") if detail else ""


def table_of_controls(found: dict[str, Any]) -> str:
    """One row per control: the number of failed tests, the smallest p, the kinds that failed."""
    lines = [
        "| control | failed tests | smallest p | kinds of tests that failed |",
        "|---|---|---|---|",
    ]
    for name, control in found["controls"].items():
        results = [Result(**row) for row in control["strongest"]]
        kinds = f"{len(results)} kinds"
        if len(results) <= 5:
            kinds = ", ".join(r.kind for r in results)
        failed = f"{control['failed']} of {control['tests']}"
        smallest = _p(min(r.p for r in results)) if results else "-"
        lines.append(f"| {name} | {failed} | {smallest} | {kinds} |")
    return "\n".join(lines)


def _p(p: float) -> str:
    return "< 1e-300" if p < 1e-300 else f"{p:.1g}"


def main() -> int:
    found = collect()
    if len(sys.argv) > 1:
        write(found, Path(sys.argv[1]))
    results = [Result(**row) for row in found["real"]]
    print(table_of_real(found), table_of_controls(found), sep="\n\n")
    for name, rows in found["oracles"].items():
        print(f"\n{name}: {len(rows)} tests, smallest p {min(row['p'] for row in rows):.2g}")
    print(f"bound {found['bound']:.3g}, seconds {found['seconds']}")
    failed = statistics.failures(results, found["bound"])
    missed = {name: c["missed"] for name, c in found["controls"].items() if c["missed"]}
    broken = found["bijectivity"]["failed"]
    print(
        f"failed: {failed or 'none'}; not bijective: {broken or 'none'}; missed: {missed or 'none'}"
    )
    return 1 if failed or missed or broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
