"""Write the golden vectors of permutation version 1.

Run ``python -m support.make_golden`` in ``tests``.

They come from `oracle` alone. Run it when the permutation gets another version, into other files;
never to make a failing test pass, for then the package has changed its users' batches. Epochs in
steps are in a file of their own, also those of sizes by patch and of weights, and those of even and
short batches, so that the older ones stay as they were.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

from support import oracle
from support.paths import GOLDEN

VERSION = 1
PATH = GOLDEN / f"permutation_v{VERSION}.json"
STEPS_PATH = PATH.with_name(f"steps_v{VERSION}.json")
MIXING_PATH = PATH.with_name(f"mixing_v{VERSION}.json")
SHORT_PATH = PATH.with_name(f"short_batches_v{VERSION}.json")

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
WHOLE = (1, 2, 3, 7, 31, 32, 33, 34, 63, 64, 65, 100, 127, 128)
SAMPLED = (1023, 1024, 1025, 65535, 65536, 65537, 10**6, 2**31 - 1, 2**33 + 5, 15 * 10**9)

PATCHES = (
    # One patch; equal patches; every size from 1 to beyond two batches, sparse and negative ids,
    # mixed up; one patch beyond the small form.
    [5] * 7,
    [3, 3, 3, 3, -1, -1, -1, -1],
    [9, -4, 9, 10**12, 9, -4, 9, 0, 9, 9, -(2**63), 9, 0, 10**12, 9, 2**63 - 1, 0, 9],
    [2 * (i % 3 == 0) + (i > 60) for i in range(90)],
)

STEP_PATCHES: tuple[tuple[list[int], tuple[list[float] | None, ...]], ...] = (
    # With what a sample of each patch may cost. One patch; sizes 1 to 9 mixed up, sparse and
    # negative ids; equal patches, side by side; classes beyond the small form.
    ([5] * 7, (None, [0.3])),
    (
        [9, -4, 9, 10**12, 9, -4, 9, 0, 9, 9, -(2**63), 9, 0, 10**12, 9, 2**63 - 1, 0, 9],
        # Patches of one class and of neighbouring ones; costs that are no binary fractions.
        ([1, 1, 1.1, 1.124, 1.125, 2], [0.1, 0.3, 1e-9, 0.7, 1e3, 2 / 3]),
    ),
    ([3] * 5 + [-1] * 5 + [8] * 5 + [20] * 5, (None, [1e150, 2.0**511, 1e-300, 1])),
    (
        [2 * (i % 3 == 0) + (i > 60) + 3 * (i > 80) for i in range(100)],
        (None, [1, 1.05, 1.1, 0.99, 5, 1.01]),
    ),
)

# Patches with sizes, weights and lengths that turn at paces of their own. One patch; sizes 1 to 9
# mixed up, sparse and negative ids; patches beyond the small form.
MIXED_PATCHES: tuple[dict[str, Any], ...] = (
    {
        "ids": [5] * 7,
        "sizes": (3, [2], [9]),
        "weights": (None, [0.3]),
        "lengths": (1, None, 2, 9, 23),
        "costs": (None, [0.3]),
    },
    {
        "ids": [9, -4, 9, 10**12, 9, -4, 9, 0, 9, 9, -(2**63), 9, 0, 10**12, 9, 2**63 - 1, 0, 9],
        # One of them leaves a patch out, others do so under "drop".
        "sizes": ([1, 2, 2, 4, 1, 1], 1, [3, 1, 2, 3, 1, 2], [1, 1, 3, 0, 2, 1], 2),
        # As integers, equal, rounded to 0, no binary fractions; ties.
        "weights": (
            [1, 2, 3, 4, 5, 6],
            [1, 1, 1, 1, 1, 1],
            [0.1, 0.3, 1e-30, 0.7, 1e3, 2 / 3],
            None,
            [2.0**52, 3.0, 2.0**51, 2.0**50, 1.0, 0.7],
        ),
        "lengths": (17, None, 7, 29, 40, 13),
        "costs": ([1, 1, 1.1, 1.124, 1.125, 2], None, [0.1, 0.3, 1e-9, 0.7, 1e3, 2 / 3]),
    },
    {
        "ids": [2 * (i % 3 == 0) + (i > 60) + 3 * (i > 75) for i in range(90)],
        "sizes": (4, [3, 2, 5, 1, 4, 3], [7, 3, 4, 50, 2, 3]),
        "weights": ([9, 1, 5, 1, 3, 1], None, [0.2, 0.7, 0.1, 1.3, 1.1, 1 / 3]),
        "lengths": (18, 37, None, 12),
        "costs": (None, [1, 1.05, 1.1, 0.99, 5, 1.01]),
    },
)
MIXED_EPOCHS = (0, 1, 5, 2**32, 2**63 - 1)


def positions(n: int) -> list[int]:
    """Both ends, both sides of the first row's end, and some in between."""
    inner_positions = (n // 3, n // 2, 7919 * 104729 % n, n - n // 7)
    side = int(n**0.5)
    return sorted({0, 1, 2, side - 1, side, side + 1, *inner_positions, n - 3, n - 2, n - 1})


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
    golden_epochs = [
        epoch_of(ids, seed, number, settings)
        for ids, (settings, seed, number) in product(PATCHES, rows)
    ]
    return [epoch for epoch in golden_epochs if epoch["batches"]]


def epoch_of(ids: list[int], seed: int, number: int, settings: oracle.Settings) -> dict[str, Any]:
    """Return one epoch; of what steps depend on, only what is not the default."""
    fields = settings._asdict()
    defaults = oracle.Settings(1)._asdict()
    named = list(fields)
    for name in named[named.index("steps") :]:
        if fields[name] == defaults[name]:
            del fields[name]
    return {
        "ids": ids,
        "seed": seed,
        "epoch": number,
        "settings": fields,
        "batches": [list(batch) for batch in oracle.epoch(ids, seed, number, settings)],
    }


def epochs_in_steps() -> list[dict[str, Any]]:
    """Return epochs of both kinds of steps; settings turn at paces of their own."""
    out = []
    keys = ((20261122, 3), (2**64 - 1, 2**32), (0, 2**63 - 1))
    for turn, (ids, costs) in enumerate(STEP_PATCHES):
        for column, width in enumerate((1, 2, 3, 4, 5, 50)):
            number = 6 * turn + column
            fields = {
                "batch_size": (2, 3, 1, 4, 2)[number % 5],
                "partial": ("keep", "drop", "pad")[(turn + column) % 3],
                "step_width": width,
                # Most of them shuffle both.
                "shuffle_patches": number % 4 != 1,
                "shuffle_within_batches": number % 4 != 2,
            }
            kinds = [
                {"steps": "balanced", "patch_costs": costs[number // 2 % len(costs)]},
                {"steps": "same_patch", "uneven": ("pad", "drop")[(turn + column) % 2]},
                {
                    "steps": "same_patch",
                    "interleave": False,
                    "uneven": ("drop", "pad")[(turn + column) % 2],
                },
            ]
            for kind in kinds:
                out.append(epoch_of(ids, *keys[number % 3], oracle.Settings(**fields, **kind)))
    # Steps, and batches of a class, beyond the small form, with a short step.
    for patch_costs in STEP_PATCHES[-1][1]:
        settings = oracle.Settings(1, steps="balanced", step_width=3, patch_costs=patch_costs)
        out.append(epoch_of(STEP_PATCHES[-1][0], 7, 5, settings))
    # One full step and a short one, which comes from before it in some epochs.
    settings = oracle.Settings(1, steps="balanced", step_width=5)
    out += [epoch_of(STEP_PATCHES[0][0], 7, number, settings) for number in range(4)]
    return [epoch for epoch in out if epoch["batches"]]


def possible_epochs(
    ids: list[int], number: int, fields: dict[str, Any], kind: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return an epoch of some settings, or nothing if they leave no batch or are refused."""
    settings = oracle.Settings(**fields, **kind)
    seed = (20261122, 2**64 - 1, 0)[number % 3]
    try:
        epoch = epoch_of(ids, seed, MIXED_EPOCHS[(number + len(kind)) % 5], settings)
    except ValueError as error:
        # Fewer batches, or steps, than patches.
        if "less than one for each" not in str(error):
            raise
        return []
    return [epoch] if epoch["batches"] else []


def epochs_mixed() -> list[dict[str, Any]]:
    """Return epochs of sizes by patch, of weights, and of both, in steps of every kind."""
    out = []
    for turn, patches in enumerate(MIXED_PATCHES):
        for column in range(12):
            number = 12 * turn + column
            fields = {
                "batch_size": patches["sizes"][number % len(patches["sizes"])],
                "partial": ("keep", "drop", "pad")[(column + column // 3) % 3],
                "shuffle_patches": number % 7 != 3,
                "shuffle_within_batches": number % 9 != 4,
                "weights": patches["weights"][number % len(patches["weights"])],
                "epoch_batches": patches["lengths"][number // 2 % len(patches["lengths"])],
            }
            width = (1, 2, 3, 5, 4)[number % 5]
            uneven = ("pad", "drop")[(column // 3 + turn) % 2]
            costs = patches["costs"][number // 3 % len(patches["costs"])]
            same = {"steps": "same_patch", "step_width": width, "uneven": uneven}
            for kind in (
                {"interleave": (column // 2 + turn) % 2 > 0},
                {"steps": "balanced", "step_width": width, "patch_costs": costs},
                same,
                same | {"interleave": False},
            ):
                out += possible_epochs(patches["ids"], number, fields, kind)
    return out


def epochs_of_short_batches() -> list[dict[str, Any]]:
    """Return epochs of even and short batches, costliest first, weights of 0, and few visits."""
    out = []
    for turn, patches in enumerate(MIXED_PATCHES):
        num_patches = len(set(patches["ids"]))
        for column in range(10):
            number = 11 * turn + column
            costs = patches["costs"][number // 3 % len(patches["costs"])]
            width = (1, 2, 3, 5, 8)[number % 5]
            costliest = {"costliest_first": True, "patch_costs": costs, "step_width": width}
            weights = [(0, 1, 3, 0.5)[(number + g) % 4] for g in range(num_patches)]
            fields = {
                "batch_size": patches["sizes"][number % len(patches["sizes"])],
                "partial": ("even", "keep", "even", "pad", "drop")[(column + column // 5) % 5],
                "shuffle_patches": number % 7 != 3,
                "shuffle_within_batches": number % 9 != 4,
            }
            if fields["partial"] in ("even", "keep"):
                largest = max(sizes) if isinstance(sizes := fields["batch_size"], list) else sizes
                fields["min_partial"] = min((1, 2, 3)[(column // 5 + column + turn) % 3], largest)
            mixed = {"weights": weights, "epoch_batches": patches["lengths"][1 - turn % 2]}
            for kind in (
                {"steps": "same_patch", "step_width": width},
                {"interleave": False},
                costliest,
                costliest | {"steps": "balanced"},
                costliest | mixed,
                costliest | mixed | {"steps": "balanced"},
                mixed,
                {"epoch_batches": max(1, num_patches - 1 - column % 3)},
            ):
                out += possible_epochs(patches["ids"], number, fields, kind)
    return out


def build_steps() -> dict[str, Any]:
    """Return what is pinned of steps."""
    return {"version": VERSION, "epochs": epochs_in_steps()}


def build_mixing() -> dict[str, Any]:
    """Return what is pinned of sizes by patch and of weights."""
    return {"version": VERSION, "epochs": epochs_mixed()}


def build_short_batches() -> dict[str, Any]:
    """Return what is pinned of even and short batches, and of the settings that came with them."""
    return {"version": VERSION, "epochs": epochs_of_short_batches()}


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


def write(path: Path, built: dict[str, Any]) -> None:
    """Write a file, one vector a line."""
    lines = []
    for name, value in built.items():
        if isinstance(value, list):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f'"{name}": [\n{rows}\n]')
        else:
            lines.append(f'"{name}": {json.dumps(value)}')
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write(PATH, build())
    write(STEPS_PATH, build_steps())
    write(MIXING_PATH, build_mixing())
    write(SHORT_PATH, build_short_batches())
