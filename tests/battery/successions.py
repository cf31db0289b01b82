"""Count neighbours that stay neighbours: ``python -m tests.battery.successions N ROUNDS COUNT``.

The statistic that sees too few rounds first, taken alone so that it reaches far beyond the long
form. A fourth argument is the number of the first key, for keys that no other run has used.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from gpusampler.permutation.reference import grid_of

from .subjects import FewRounds
from .walks import batches, cube

LANES = 1 << 19


def count(n: int, rounds: int, samples: int, first_key: int = 0) -> list[dict[str, Any]]:
    """Excess of places whose neighbour, 1 on or one row on, is still that after the permutation.

    One row each: mean number in a permutation, its exact expectation, and the distance between
    them in standard errors.
    """
    x = np.arange(n)
    subject = FewRounds(rounds)
    steps = {"1 apart": 1, "b apart": grid_of(n).b}
    sums = dict.fromkeys(steps, 0)
    squares = dict.fromkeys(steps, 0)
    for keys in batches(lambda i: cube(i + first_key), samples, max(1, LANES // n)):
        images = subject.images(n, keys, x).astype(np.int32)
        for name, step in steps.items():
            kept = (images[:, step:] - images[:, :-step] == step).sum(axis=1)
            sums[name] += int(kept.sum())
            squares[name] += int(kept @ kept)
    out = []
    for name, step in steps.items():
        mean = sums[name] / samples
        expected = (n - step) ** 2 / (n * (n - 1))
        error = ((squares[name] / samples - mean**2) / samples) ** 0.5
        out.append(
            {
                "n": n,
                "rounds": rounds,
                "permutations": samples,
                "first_key": first_key,
                "neighbours": name,
                "mean": mean,
                "expected": expected,
                "z": (mean - expected) / error,
            }
        )
    return out


def main() -> None:
    began = time.perf_counter()
    n, rounds, samples, *first_key = map(int, sys.argv[1:])
    for row in count(n, rounds, samples, *first_key):
        print(json.dumps(row))
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
