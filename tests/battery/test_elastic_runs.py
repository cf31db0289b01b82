"""The long form of `test_elastic`: other cases, and thousands of them."""

from __future__ import annotations

import pytest

from support.elastic_runs import MAX_RANKS, draw_case, rank_changes, run_cases

PLAIN, LOADED = 2, 3

pytestmark = pytest.mark.battery("thousands of runs")


@pytest.mark.parametrize("part", range(4))
def test_thousands_of_random_runs_without_loaders(part):
    cases = [draw_case(number, PLAIN) for number in range(1000 * part, 1000 * (part + 1))]
    assert len(rank_changes(run_cases(cases))) == MAX_RANKS**2


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_hundred_random_runs_through_data_loaders(workers):
    pytest.importorskip("torch")
    events = run_cases([draw_case(number, LOADED, workers, 4) for number in range(100)])
    assert len(rank_changes(events)) == 16
