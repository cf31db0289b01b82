"""The order of steps, and of batches inside classes: uniform, and every control is caught."""

from __future__ import annotations

import numpy as np
import pytest

from gpusampler.batching import steps
from gpusampler.permutation.reference import Streams, derive_key, key_of
from gpusampler.plan.evaluators import array

from . import statistics
from .statistics import Result
from .through_steps import (
    MIXED,
    WHOLE,
    by_sorting,
    chances_at,
    of_one_patch,
    of_the_package,
    samples_too,
    through_steps,
)

QUICK, LONG = 20_000, 1_000_000


def told(results: list[Result]) -> str:
    return "\n".join(f"{r.test}, n={r.n}: p={r.p:.3g}, {r.z:.1f} sd" for r in results)


def failed(results: list[Result]) -> list[Result]:
    return statistics.failures(results, statistics.bound(results))


def names_of_failed(orders=of_the_package) -> set[str]:
    return {result.test for result in failed(through_steps(orders, QUICK))}


def test_many_epochs_at_once_are_the_plan_s():
    for shape, _ in [*WHOLE.values(), (MIXED, 0)]:
        plan = shape.plan(3)
        before = np.cumsum([0, *shape.sizes[:-1]])
        for epoch, order in enumerate(of_the_package(shape, 3, np.arange(20))):
            at = plan.evaluator.locate(epoch, np.arange(shape.total))
            assert (before[at.group] + at.j).tolist() == order.tolist()


def test_quick():
    results = [*through_steps(of_the_package, QUICK), *samples_too(4_000), *of_one_patch(4_000)]
    assert len(results) == 26
    assert not failed(results), told(failed(results))


@pytest.mark.slow("the statistics of an order that is not ours")
def test_what_sorting_makes_passes():
    results = through_steps(by_sorting, QUICK)
    assert not failed(results), told(failed(results))


controls = pytest.mark.slow("the statistics of orders that are wrong")


@pytest.mark.battery("the long form of the statistics")
def test_long():
    results = [*through_steps(of_the_package, LONG), *samples_too(50_000), *of_one_patch(50_000)]
    print(told(sorted(results, key=lambda result: result.p)))
    assert not failed(results), told(failed(results))


@pytest.mark.battery("the long form of the statistics")
def test_what_sorting_makes_passes_the_long_form():
    results = through_steps(by_sorting, LONG)
    assert not failed(results), told(failed(results))


@controls
def test_classes_that_stay_as_they_are_are_caught(monkeypatch):
    monkeypatch.setattr(array, "permute", lambda xp, x, *_: x)
    assert names_of_failed() >= {"whole: a class", "whole: classes of a step", "grid: a class"}


@controls
def test_classes_that_share_a_key_are_caught(monkeypatch):
    monkeypatch.setattr(array, "key_of", lambda state, epoch, _: key_of(state, epoch, 0 * epoch))
    caught = names_of_failed()
    assert caught >= {"whole: classes of a step", "whole: a class a step", "grid: two classes"}
    assert "whole: a class" not in caught


@controls
def test_classes_with_the_key_of_the_steps_are_caught(monkeypatch):
    own = Streams.of

    def of(seed: int) -> Streams:
        streams = own(seed)
        return streams._replace(buckets=streams.batches)

    monkeypatch.setattr(
        "gpusampler.plan.epoch_plan.Streams", type("Shared", (), {"of": staticmethod(of)})
    )
    assert "whole: steps and large classes" in names_of_failed()


@controls
def test_a_short_step_in_one_place_is_caught(monkeypatch):
    monkeypatch.setattr(steps, "keyed_hash", lambda key, r, v: key[0] * 0)
    assert names_of_failed() >= {
        "whole: steps and a short one",
        "whole: one step and a short one",
        "slot: 22",
    }


@controls
def test_a_short_step_that_follows_from_the_order_is_caught(monkeypatch):
    # The first draw of the shuffle of three steps.
    own = steps.keyed_hash
    monkeypatch.setattr(steps, "keyed_hash", lambda key, r, v: own(key, 2, 2))
    assert "whole: steps and a short one" in names_of_failed()


@controls
def test_seed_plus_epoch_is_caught(monkeypatch):
    def added(stream, epoch, group):
        seed, purpose = stream
        return derive_key(0, purpose, seed + epoch, group)

    def of(seed: int) -> Streams:
        return Streams((seed, 1), (seed, 2), (seed, 3), (seed, 6))

    monkeypatch.setattr(
        "gpusampler.plan.epoch_plan.Streams", type("Unmixed", (), {"of": staticmethod(of)})
    )
    monkeypatch.setattr(array, "key_of", added)
    assert names_of_failed() >= {"couple: class, s,e+1 | s+1,e", "couple: steps, s,e+1 | s+1,e"}


def test_chances_add_up():
    for slot in range(MIXED.total):
        assert chances_at(MIXED, slot).sum() == pytest.approx(1)
    # Over all slots every batch comes once.
    total = sum(chances_at(MIXED, slot) for slot in range(MIXED.total))
    assert total == pytest.approx(np.ones(MIXED.total))
