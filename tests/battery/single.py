"""Tests of one permutation at a time, each key giving one independent sample."""

from __future__ import annotations

from math import factorial

import numpy as np

from gpusampler.permutation.reference import grid_of

from . import distributions, statistics
from .statistics import Result
from .subjects import Subject
from .walks import WALKS, batches, cube

LANES = 1 << 20
"""Images held at a time."""


def rank(images: np.ndarray) -> np.ndarray:
    """Number of each permutation among all n!, from its whole images (K, n)."""
    n = images.shape[1]
    number = np.zeros(images.shape[0], np.int64)
    for i in range(n - 1):
        smaller = (images[:, i + 1 :] < images[:, i : i + 1]).sum(axis=1)
        number = number * (n - i) + smaller
    return number


def all_permutations(subject: Subject, n: int, samples: int) -> list[Result]:
    """Chi-squared over all n! permutations, along consecutive seeds, epochs and groups."""
    out = []
    chances = np.full(factorial(n), 1 / factorial(n))
    for name, walk in WALKS.items():
        counts = np.zeros(factorial(n), np.int64)
        for keys in batches(walk, samples, LANES // n):
            counts += np.bincount(rank(subject.whole(n, keys)), minlength=counts.size)
        out.append(statistics.chi_squared(f"all n!: {name}", n, counts, chances))
    return out


def repeats(subject: Subject, n: int, samples: int) -> list[Result]:
    """Pairs of equal permutations among neighbouring keys, against the birthday's number.

    Where n! is beyond 63 bits, permutations are told apart by a 64-bit polynomial of the images.
    """
    powers = np.uint64(0xD1342543DE82EF95) ** np.arange(n, dtype=np.uint64)
    marks = []
    for keys in batches(cube, samples, LANES // n):
        marks.append((subject.whole(n, keys).astype(np.uint64) * powers).sum(axis=1))
    _, times = np.unique(np.concatenate(marks), return_counts=True)
    seen = int((times * (times - 1) // 2).sum())
    expected = samples * (samples - 1) / 2 / factorial(n)
    return [statistics.rare_events("repeats", n, samples, seen, expected)]


def pairs_of(n: int) -> list[tuple[int, int]]:
    """Inputs whose images are looked at together: in a row, a column, neither, at the ends."""
    b = grid_of(n).b
    return [(0, 1), (0, b), (0, b + 1), (1, b), (n - 2, n - 1), (0, n - 1)]


def pairs(subject: Subject, n: int, samples: int, most_cells: int = 1 << 17) -> list[Result]:
    """Images of two inputs jointly: by place, and by their distance along rows and columns."""
    couples = pairs_of(n)
    x = np.unique(couples)
    at = [tuple(np.searchsorted(x, couple)) for couple in couples]
    # Ten expected in a cell, unless every one of the n * n cells has them anyway.
    side = min(n, int(min(samples / 10, most_cells) ** 0.5))
    grid = grid_of(n)
    a, b, _ = grid
    by_place = np.zeros((len(couples), side * side), np.int64)
    by_line = np.zeros((len(couples), a + b + distributions.BLOCKS**2), np.int64)
    for keys in batches(cube, samples, LANES // x.size):
        images = subject.images(n, keys, x)
        block = images * side // n
        row = images // b
        column = images - row * b
        for k, (i, j) in enumerate(at):
            cell = block[:, i] * side + block[:, j]
            by_place[k] += np.bincount(cell, minlength=by_place.shape[1])
            steps = (row[:, i] - row[:, j]) % a, (column[:, i] - column[:, j]) % b
            cell = distributions.line_cells(grid, *steps)
            by_line[k] += np.bincount(cell, minlength=by_line.shape[1])
    place_chances = distributions.ordered_pairs(n, side)
    line_chances = distributions.line_chances(n)
    out = []
    for k, (i, j) in enumerate(couples):
        name = f"{i},{j}"
        out.append(statistics.chi_squared(f"pair places: {name}", n, by_place[k], place_chances))
        out.append(statistics.chi_squared(f"pair lines: {name}", n, by_line[k], line_chances))
    return out


def cycles(images: np.ndarray) -> np.ndarray:
    """Number of cycles of each permutation in the rows of (K, n)."""
    count, n = images.shape
    start = np.arange(n)
    flat = (images + n * np.arange(count)[:, None]).ravel()
    lowest = np.tile(start, count)
    reach = 1
    while reach < n:
        # The smallest element within `reach` steps; the reach doubles.
        lowest = np.minimum(lowest, lowest[flat])
        flat = flat[flat]
        reach *= 2
    return (lowest.reshape(count, n) == start).sum(axis=1)


def sign(subject: Subject, n: int, samples: int) -> list[Result]:
    """Share of even permutations."""
    even = 0
    for keys in batches(cube, samples, max(1, LANES // n)):
        even += int(((n - cycles(subject.whole(n, keys))) % 2 == 0).sum())
    return [statistics.coin("sign", n, even, samples)]


MOST = 7
"""Fixed points, and successions, from which on they are counted together."""


def whole(subject: Subject, n: int, samples: int) -> list[Result]:
    """What shows in a whole permutation: fixed points, displacement, neighbours, grid lines."""
    x = np.arange(n)
    b = grid_of(n).b
    row_pairs = np.flatnonzero(x[:-1] // b == x[1:] // b)
    names = "fixed", "after", "below", "moved", "product", "rr", "rc", "cr", "cc"
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for keys in batches(cube, samples, max(1, LANES // n)):
        images = subject.whole(n, keys)
        row = images // b
        column = images - row * b
        seen["fixed"].append((images == x).sum(axis=1))
        seen["after"].append((np.diff(images, axis=1) == 1).sum(axis=1))
        seen["below"].append((images[:, b:] - images[:, :-b] == b).sum(axis=1))
        seen["moved"].append(np.abs(images - x).sum(axis=1))
        seen["product"].append(images @ x)
        seen["rr"].append((np.diff(row, axis=1) == 0)[:, row_pairs].sum(axis=1))
        seen["rc"].append((np.diff(column, axis=1) == 0)[:, row_pairs].sum(axis=1))
        seen["cr"].append((row[:, b:] == row[:, :-b]).sum(axis=1))
        seen["cc"].append((column[:, b:] == column[:, :-b]).sum(axis=1))
    values = {name: np.concatenate(parts).astype(np.float64) for name, parts in seen.items()}
    in_row, in_column = distributions.line_mates(n)
    moved, product = distributions.footrule(n), distributions.rank_product(n)
    return [
        _histogram("fixed points", n, values["fixed"], distributions.fixed_points(n, MOST)),
        _histogram("successions: 1 apart", n, values["after"], distributions.successions(n, MOST)),
        statistics.mean_estimated(
            "successions: b apart", n, values["below"], (n - b) ** 2 / (n * (n - 1))
        ),
        statistics.mean("displacement: mean", n, values["moved"], *moved),
        statistics.variance("displacement: variance", n, values["moved"], moved[1]),
        statistics.mean("rank product: mean", n, values["product"], *product),
        statistics.variance("rank product: variance", n, values["product"], product[1]),
        *(
            statistics.mean_estimated(f"line mates: {name}", n, values[key], number * chance)
            for name, key, number, chance in (
                ("row to row", "rr", row_pairs.size, in_row),
                ("row to column", "rc", row_pairs.size, in_column),
                ("column to row", "cr", n - b, in_row),
                ("column to column", "cc", n - b, in_column),
            )
        ),
    ]


def _histogram(test: str, n: int, values: np.ndarray, chances: np.ndarray) -> Result:
    counts = np.bincount(np.minimum(values.astype(np.int64), MOST), minlength=MOST + 1)
    return statistics.chi_squared(test, n, counts, chances)
