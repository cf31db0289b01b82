"""The list of tests with their sample sizes.

Power, as `tests.battery.power` measured it on 2026-11-29: stopped after too few rounds, the grid is
caught by

=======  ======  ============  ===========
n        chosen  quick, up to  long, up to
=======  ======  ============  ===========
33       12      7 rounds      11 rounds
64       12      7 rounds      9 rounds
128      10      7 rounds      9 rounds
1024     8       5 rounds      7 rounds
65536    6       3 rounds      5 rounds
=======  ======  ============  ===========
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from . import joint, single
from .statistics import Result
from .subjects import Subject
from .through_plan import through_plan
from .walks import NEIGHBOURS

Form = Literal["quick", "long"]


class Case(NamedTuple):
    """One pass over the keys; ``yields`` are the beginnings of the names of its tests.

    0 samples: not in that form.
    """

    yields: tuple[str, ...]
    n: int
    quick: int
    long: int
    run: Callable[[Subject, int, int], list[Result]]

    def samples(self, form: Form) -> int:
        return self.quick if form == "quick" else self.long


def _plan(subject: Subject, n: int, samples: int) -> list[Result]:
    return through_plan(samples)


def _sign_sizes() -> list[int]:
    powers = [1 << k for k in (2, 3, 4, 5, 6, 7, 8, 10, 12)]
    squares = [k * k for k in (3, 5, 6, 7, 9, 10, 11, 15, 31, 63)]
    return sorted({*powers, *(power - 1 for power in powers[1:]), *squares})


MILLION = 1_000_000
PLAN = "plan"
PAIRS = ("pair places", "pair lines")
WHOLE = ("fixed points", "successions", "displacement", "rank product", "line mates")

CASES: tuple[Case, ...] = (
    *(
        Case(("all n!",), n, 100_000, 5 * MILLION, single.all_permutations)
        for n in (2, 3, 4, 5, 6, 7)
    ),
    *(Case(("repeats",), n, 200_000, 2 * MILLION, single.repeats) for n in (8, 10, 12, 20)),
    *(
        Case(PAIRS, n, quick, long * MILLION, single.pairs)
        for n, quick, long in (
            (17, 200_000, 5),
            (32, 200_000, 5),
            (33, 400_000, 40),
            (34, 400_000, 20),
            (64, 400_000, 20),
            (100, 400_000, 20),
            (128, 400_000, 20),
            (129, 400_000, 10),
            (257, 400_000, 10),
            (512, 400_000, 10),
            (1000, 400_000, 10),
            (1024, 400_000, 20),
            (65536, 400_000, 20),
        )
    ),
    *(
        Case(("sign",), n, min(20_000, 2**19 // n), min(MILLION, 2**24 // n), single.sign)
        for n in _sign_sizes()
    ),
    *(
        Case(WHOLE, n, 2**21 // n, 2**28 // n, single.whole)
        for n in (20, 33, 64, 100, 128, 129, 256, 257, 512, 1000, 1024)
    ),
    Case(WHOLE, 65536, 0, 2**27 // 65536, single.whole),
    *(
        Case((f"joint whole: {name}",), n, 50_000, MILLION, partial(joint.whole, name=name))
        for n in (3, 4)
        for name in NEIGHBOURS
    ),
    *(
        Case(
            (f"joint places: {name}", f"joint distance: {name}"),
            n,
            50_000,
            MILLION,
            partial(joint.images, name=name),
        )
        for n in (20, 100, 1024)
        for name in NEIGHBOURS
    ),
    Case((PLAN,), 3, 2_000, 50_000, _plan),
)


def run(subject: Subject, form: Form, cases: Iterable[Case] = CASES) -> Iterator[list[Result]]:
    """Yield the results of each case that belongs to the form."""
    for case in cases:
        if samples := case.samples(form):
            yield case.run(subject, case.n, samples)


def below(n: int) -> list[Case]:
    """Cases of at most n elements that are about the permutation alone, not about the plan."""
    return [case for case in CASES if case.n <= n and PLAN not in case.yields]
