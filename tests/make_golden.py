"""Write the golden vectors of permutation version 1: ``python tests/make_golden.py``.

They come from `oracle` alone. Run it when the permutation gets another version, into another file;
never to make a failing test pass, for then the package has changed its users' batches.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import oracle

VERSION = 1
PATH = Path(__file__).parent / "golden" / f"permutation_v{VERSION}.json"

WORDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1)
SEEDS = (*WORDS, 2**63, 2**64 - 1)
KEYS = (
    (0, 0),
    (1, 0),
    (0, 1),
    (0x12345678, 0x0FEDCBA9),
    (2**31, 2**31),
    (2**31 - 1, 2**32 - 1),
    (2**32 - 1, 2**31 - 1),
    (2**32 - 1, 2**32 - 1),
    oracle.derive(0, 3, 0, 0),
    oracle.derive(2**64 - 1, 3, 2**63 - 1, 2**63 - 1),
)
WHOLE = (1, 2, 3, 7, 31, 32, 33, 34, 63, 64, 65, 100)
SAMPLED = (1023, 1024, 1025, 65535, 65536, 65537, 10**6, 2**31 - 1, 2**33 + 5, 15 * 10**9)

PATCHES = (
    # One patch; equal patches; every size from 1 to beyond two batches, sparse and negative ids,
    # mixed up; one patch beyond the small form.
    [5] * 7,
    [3, 3, 3, 3, -1, -1, -1, -1],
    [9, -4, 9, 10**12, 9, -4, 9, 0, 9, 9, -(2**63), 9, 0, 10**12, 9, 2**63 - 1, 0, 9],
    [2 * (i % 3 == 0) + (i > 60) for i in range(90)],
)


def positions(n: int) -> list[int]:
    """Both ends, both sides of the first row's end, and some in between."""
    inside = (n // 3, n // 2, 7919 * 104729 % n, n - n // 7)
    side = int(n**0.5)
    return sorted({0, 1, 2, side - 1, side, side + 1, *inside, n - 3, n - 2, n - 1})


def keys() -> list[list[int]]:
    rows = [(seed, 3, pass_, 0) for seed, pass_ in product(SEEDS, WORDS)]
    rows += [(0, 3, pass_, group) for pass_, group in product(WORDS, WORDS)]
    rows += [(seed, purpose, 5, 7) for seed, purpose in product(SEEDS, (1, 2, 3, 4, 5))]
    return [[*row, *oracle.derive(*row)] for row in dict.fromkeys(rows)]


def epochs() -> list[dict[str, Any]]:
    rows = [
        (oracle.Settings(size, partial, interleave), 20261122, number)
        for partial, interleave, (size, number) in product(
            ("keep", "drop", "pad"), (True, False), ((3, 0), (4, 1))
        )
    ]
    rows += [
        (oracle.Settings(2, interleave=interleave, **{flag: False}), 2**64 - 1, 2**32)
        for interleave, flag in product(
            (True, False), ("shuffle_patches", "shuffle_within_batches")
        )
    ]
    rows += [(oracle.Settings(1), 0, 0), (oracle.Settings(100, "pad"), 1, 2**63 - 1)]
    out = []
    for ids, (settings, seed, number) in product(PATCHES, rows):
        batches = oracle.epoch(ids, seed, number, settings)
        if batches:
            out.append(
                {
                    "ids": ids,
                    "seed": seed,
                    "epoch": number,
                    "settings": settings._asdict(),
                    "batches": [[patch, samples] for patch, samples in batches],
                }
            )
    return out


def build() -> dict[str, Any]:
    """Return everything that is pinned."""
    return {
        "version": VERSION,
        "keys": keys(),
        "whole": [
            {"n": n, "key": list(key), "images": [oracle.permuted(x, n, key) for x in range(n)]}
            for n, key in product(WHOLE, KEYS)
        ],
        "sampled": [
            {
                "n": n,
                "key": list(key),
                "x": positions(n),
                "images": [oracle.permuted(x, n, key) for x in positions(n)],
            }
            for n, key in product(SAMPLED, KEYS)
        ],
        "epochs": epochs(),
    }


def write() -> None:
    """Write the file, one vector a line."""
    parts = []
    for name, value in build().items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f'"{name}": [\n{rows}\n]')
        else:
            parts.append(f'"{name}": {json.dumps(value)}')
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    write()
