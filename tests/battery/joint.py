"""Tests of two neighbouring permutations together: neither may tell anything of the other."""

from __future__ import annotations

from math import factorial

import numpy as np

from . import distributions, statistics
from .single import LANES, rank
from .statistics import Result
from .subjects import Subject
from .walks import neighbours

PLACES = 32
"""Blocks of images along one side of the table."""

DISTANCES = 1024
"""Blocks of the distance between the two images."""


def whole(subject: Subject, n: int, samples: int, name: str) -> list[Result]:
    """Both whole permutations: the (n!)**2 pairs are equally likely."""
    ways = factorial(n)
    counts = np.zeros(ways * ways, np.int64)
    for left, right in neighbours(name, samples, LANES // n):
        cell = rank(subject.whole(n, left)) * ways + rank(subject.whole(n, right))
        counts += np.bincount(cell, minlength=counts.size)
    chances = np.full(counts.size, 1 / counts.size)
    return [statistics.chi_squared(f"joint whole: {name}", n, counts, chances)]


def images(subject: Subject, n: int, samples: int, name: str) -> list[Result]:
    """Image of x under one key against image of x under the other: by place and by distance."""
    x = np.unique([0, n // 2, n - 1])
    side, far = min(n, PLACES), min(n, DISTANCES)
    by_place = np.zeros((x.size, side * side), np.int64)
    by_distance = np.zeros(far, np.int64)
    for left, right in neighbours(name, samples, LANES // x.size):
        one, other = subject.images(n, left, x), subject.images(n, right, x)
        cell = one * side // n * side + other * side // n
        for k in range(x.size):
            by_place[k] += np.bincount(cell[:, k], minlength=side * side)
        # The distances of several x under one pair of keys are no independent samples.
        apart = (one[:, 0] - other[:, 0]) % n
        by_distance += np.bincount(apart * far // n, minlength=far)
    sizes = distributions.blocks(n, side) / n
    chances = np.multiply.outer(sizes, sizes)
    apart_chances = distributions.blocks(n, far) / n
    return [
        *(
            statistics.chi_squared(f"joint places: {name}, x={x[k]}", n, by_place[k], chances)
            for k in range(x.size)
        ),
        statistics.chi_squared(f"joint distance: {name}", n, by_distance, apart_chances),
    ]
