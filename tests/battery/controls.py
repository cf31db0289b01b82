"""Permutations that must fail, with the tests that must catch each, and those that must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from . import subjects
from .cases import CASES, PLAN, Case, Form
from .statistics import Result
from .subjects import Subject


class Control(NamedTuple):
    """A subject that must fail.

    Attributes
    ----------
    subject : Subject
    runs_at : callable
        Whether the subject is defined, and differs from the real one, at an n.
    caught_by : mapping
        Beginning of a test's name to the sizes at each of which such a test must catch it.
    form : {"quick", "long"}
        Sample sizes at which it must be caught.
    """

    subject: Subject
    runs_at: Callable[[int], bool]
    caught_by: Mapping[str, Sequence[int]]
    form: Form = "quick"

    def cases(self) -> list[Case]:
        """All cases that the subject can be put through; in the long form, only the decisive."""
        if self.form == "long":
            return self.decisive_cases()
        return self._all_cases()

    def _all_cases(self) -> list[Case]:
        return [case for case in CASES if self.runs_at(case.n) and PLAN not in case.yields]

    def decisive_cases(self) -> list[Case]:
        """Those among them that must catch it."""
        return [
            case
            for case in self._all_cases()
            if any(
                case.n in sizes and any(kind.startswith(name) for kind in case.yields)
                for name, sizes in self.caught_by.items()
            )
        ]

    def missed(self, failures: Sequence[Result]) -> list[tuple[str, int]]:
        """Return what should have caught it and is not among the failures."""
        return [
            (name, n)
            for name, sizes in self.caught_by.items()
            for n in sizes
            if not any(result.n == n and result.test.startswith(name) for result in failures)
        ]


def _grid(n: int) -> bool:
    return n > 32


def _small(n: int) -> bool:
    return n <= 32


def _anywhere(n: int) -> bool:
    return True


def _neighbours(*names: str) -> dict[str, tuple[int, ...]]:
    """Every joint test of some neighbours, at every size."""
    kinds = {"whole": (3, 4), "places": (20, 100, 1024), "distance": (20, 100, 1024)}
    return {f"joint {kind}: {name}": sizes for kind, sizes in kinds.items() for name in names}


ODD_SQUARES = (49, 81, 121, 225, 961, 3969)

CONTROLS: tuple[Control, ...] = (
    Control(
        subjects.FewRounds(2),
        _grid,
        {
            "pair places": (33, 34, 64, 100, 257, 1024, 65536),
            "pair lines": (33, 34, 64, 100, 257, 1024, 65536),
            "fixed points": (33, 64, 100),
            "successions": (33, 64, 100, 256, 1024),
            "displacement": (33, 64, 100),
            "line mates": (33, 64, 100),
        },
    ),
    Control(
        subjects.FewRounds(4),
        _grid,
        {
            "pair places": (33, 34, 64, 100, 257),
            "pair lines": (33, 34, 64, 100, 257, 1024),
            "fixed points": (33, 64, 100),
            "successions": (33, 64, 100, 256, 1024),
            "displacement": (33, 64, 100),
        },
    ),
    Control(
        subjects.FewRounds(6),
        _grid,
        {"pair lines": (33, 34, 64, 100), "successions": (33, 64, 100)},
    ),
    Control(subjects.NoXorshift(), _grid, {"pair places": (33, 34, 64, 100)}, "long"),
    Control(subjects.NoCoin(), _grid, {"sign": ODD_SQUARES}),
    Control(
        subjects.Feistel(),
        lambda n: n in (16, 64, 256, 1024, 4096, 65536),
        {"sign": (16, 64, 256, 1024, 4096)},
    ),
    Control(
        subjects.Shift(),
        _anywhere,
        {
            "all n!": (3, 4, 5, 6, 7),
            "repeats": (8, 10, 12, 20),
            "pair places": (17, 32, 33, 34, 64, 100, 257, 1024, 65536),
            "pair lines": (17, 32, 33, 34, 64, 100, 257, 1024, 65536),
            "fixed points": (20, 33, 64, 100, 256, 1024),
            "successions": (20, 33, 64, 100, 256, 1024),
            "line mates": (20, 33, 64, 100, 256, 1024),
            "rank product: variance": (20, 33, 64, 100, 256, 1024),
        },
    ),
    Control(
        subjects.Sattolo(),
        _small,
        {
            "all n!": (2, 3, 4, 5, 6, 7),
            "sign": (4, 8, 9, 16, 32),
            "fixed points": (20,),
            "rank product: mean": (20,),
        },
    ),
    Control(subjects.OneCombination(), _small, {"repeats": (20,)}),
    Control(
        subjects.SeedPlusEpoch(),
        _anywhere,
        _neighbours("s,e+1 | s+1,e", "batches s,e+1 | s+1,e"),
    ),
    Control(subjects.EpochPlusGroup(), _anywhere, _neighbours("e,g+1 | e+1,g")),
    Control(subjects.EpochXorGroup(), _anywhere, _neighbours("e,g+1 | g+1,e")),
    Control(subjects.LowWords(), _anywhere, _neighbours("s | s+2^32", "e | e+2^32")),
    Control(subjects.Forgets("seed"), _anywhere, _neighbours("s | s+1", "batches s | s+1")),
    Control(subjects.Forgets("epoch"), _anywhere, _neighbours("e | e+1", "batches e | e+1")),
    Control(subjects.Forgets("group"), _anywhere, _neighbours("g | g+1")),
    Control(subjects.Forgets("purpose"), _anywhere, _neighbours("purpose 3 | 1", "purpose 1 | 2")),
)

ORACLES: tuple[type[Subject], ...] = (subjects.SortedHashes, subjects.Permuted)
LARGEST_FOR_ORACLES = 64
"""They make whole permutations, so their cost grows with n."""
