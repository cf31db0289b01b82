"""How small a bias the battery sees: ``python -m tests.battery.power FILE.json [n ...]``.

For each n, the permutation is stopped after fewer rounds than it should have. Two things are kept:
the bias of one statistic against the number of rounds, and from how many rounds on neither form
of the battery notices. The results of several runs are gathered in one file; `picture` draws it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from gpusampler.permutation.reference import grid_of, rounds_for

from . import statistics
from .cases import CASES, PAIRS, WHOLE, Form, run
from .single import pairs
from .subjects import FewRounds, Subject

SIZES = (33, 64, 128, 257, 1024, 65536)
CURVE_ONLY = (257,)
SAMPLES = 4_000_000
BOUND = 2.3e-6
"""Bonferroni's bound of either form, about 420 tests."""


def bias(n: int, rounds: int) -> dict[str, Any]:
    """Bias of the distance between the images of 0 and of the place below it, b places on."""
    name = f"pair lines: 0,{grid_of(n).b}"
    result = next(r for r in pairs(FewRounds(rounds), n, SAMPLES) if r.test == name)
    return {"rounds": rounds, "z": result.z, "p": result.p, "samples": result.samples}


def noticed(n: int, rounds: int, form: Form) -> dict[str, Any]:
    """Strongest test of one form, pairs before whole permutations, until one fails."""
    strongest = None
    for kinds in (PAIRS, WHOLE):
        cases = [case for case in CASES if case.yields == kinds and case.n == n]
        for results in run(FewRounds(rounds), form, cases):
            best = min(results, key=lambda r: r.p)
            strongest = best if strongest is None or best.p < strongest.p else strongest
        if strongest is not None and strongest.p < BOUND:
            break
    assert strongest is not None
    caught = bool(statistics.failures([strongest], BOUND))
    return {"rounds": rounds, "form": form, "caught": caught, **strongest._asdict()}


def power(n: int) -> dict[str, Any]:
    """Fall of the bias, and the largest number of rounds that each form still catches."""
    began = time.perf_counter()
    chosen = rounds_for(n)
    assert Subject().rounds(n) == chosen
    falls = [bias(n, rounds) for rounds in range(2, chosen + 1)]
    tried = []
    for form in () if n in CURVE_ONLY else ("quick", "long"):
        for rounds in range(chosen - 1, 1, -1):
            tried.append(noticed(n, rounds, form))
            print(n, tried[-1], flush=True)
            if tried[-1]["caught"]:
                break
    took = round(time.perf_counter() - began, 1)
    return {"n": n, "chosen": chosen, "bias": falls, "tried": tried, "seconds": took}


def main() -> None:
    path = Path(sys.argv[1])
    found = json.loads(path.read_text()) if path.exists() else {}
    for n in [int(arg) for arg in sys.argv[2:]] or SIZES:
        found[str(n)] = power(n)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
