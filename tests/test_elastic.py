"""Elastic runs: whatever the ranks do, an epoch is handed out exactly; see `elastic`."""

from __future__ import annotations

import pytest
from elastic import carry_out_all, case_of, changes

PLAIN, LOADED = 0, 1


def test_three_hundred_random_runs_without_loaders():
    happened = carry_out_all([case_of(number, PLAIN) for number in range(300)])
    # They reach what they are for: 49 changes of the number of ranks are possible.
    assert len(changes(happened)) >= 40
    for name in (
        "between the steps of the new ranks",
        "repeated",
        "left out",
        "nothing left for so many",
        "nothing done",
        "in steps of other ranks",
    ):
        assert happened[name] >= 10, f"{name}: {happened}"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_eight_random_runs_through_data_loaders(workers):
    pytest.importorskip("torch")
    happened = carry_out_all([case_of(number, LOADED, workers, 3) for number in range(8)])
    assert len(changes(happened)) >= 3
