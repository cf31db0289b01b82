"""Elastic runs: whatever the ranks do, an epoch is handed out exactly; see `elastic_runs`."""

from __future__ import annotations

import pytest

from support.elastic_runs import draw_case, rank_changes, run_cases

PLAIN, LOADED = 0, 1


@pytest.mark.parametrize(
    ("runs", "different", "often"),
    [
        (range(60), 20, 1),
        pytest.param(range(300), 40, 10, marks=pytest.mark.slow("300 runs")),
    ],
    ids=["60", "300"],
)
def test_random_runs_without_loaders(runs, different, often):
    events = run_cases([draw_case(number, PLAIN) for number in runs])
    # They reach what they are for: 49 changes of the number of ranks are possible.
    assert len(rank_changes(events)) >= different
    for name in (
        "between the steps of the new ranks",
        "repeated",
        "left out",
        "nothing left for so many",
        "nothing done",
        "in steps of other ranks",
    ):
        assert events[name] >= often, f"{name}: {events}"


with_workers = pytest.mark.slow("starts workers dozens of times")


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=with_workers), pytest.param(2, marks=with_workers)]
)
def test_eight_random_runs_through_data_loaders(workers):
    pytest.importorskip("torch")
    events = run_cases([draw_case(number, LOADED, workers, 3) for number in range(8)])
    assert len(rank_changes(events)) >= 3
