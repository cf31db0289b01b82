"""Ranks that make different batches are found through the store of their process group."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchTensorLoader
from gpusampler.sampler import fingerprint, rank_check
from gpusampler.sampler.distributed import world_and_rank
from support.paths import SUPPORT
from support.processes import run_ranks

torch = pytest.importorskip("torch")
distributed = pytest.importorskip("torch.distributed")
fake_group = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

IDS = np.random.default_rng(5).integers(0, 7, 50).repeat(4)
OTHER_ORDER = np.roll(IDS, 100)
SETTINGS: dict[str, Any] = {"source": IDS, "batch_size": 8, "seed": 1, "device": "numpy"}


@contextmanager
def group(rank: int, store: Any, ranks: int = 2) -> Iterator[None]:
    """Be one rank of a group; its store keeps the keys for the rank that comes next."""
    distributed.init_process_group("fake", rank=rank, world_size=ranks, store=store)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def draw_first(sampler: PatchBatchSampler) -> None:
    next(iter(sampler))


def use_in_turn(
    settings: list[dict[str, Any]],
    use: Callable[[Any], Any] = draw_first,
    store: Any = None,
    order: Iterable[int] = (),
) -> None:
    """Rank by rank, make a sampler with these settings at one line of code, and use it."""
    store = distributed.HashStore() if store is None else store
    for rank, changed in zip(order or range(len(settings)), settings, strict=True):
        with group(rank, store, len(settings)):
            use(PatchBatchSampler(**{**SETTINGS, **changed}))


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def requests(monkeypatch) -> list[str]:
    """What ranks ask of a store."""
    names: list[str] = []
    for name in ("compare_set", "set", "get", "check"):
        original = getattr(distributed.Store, name)

        def asked(self, *arguments, name=name, original=original):
            names.append(name)
            time.sleep(0.001)  # so that other threads come between
            return original(self, *arguments)

        monkeypatch.setattr(distributed.Store, name, asked)
    return names


DIFFERENT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "files in another order": ({}, {"source": OTHER_ORDER}, "hash of ids is .*same order"),
    "files lost": (
        {},
        {"source": IDS[36:]},
        "num_samples is 200 on rank 0, 164 on rank 1.*no rank lacks files",
    ),
    "batch_size": (
        {},
        {"batch_size": 7},
        "batch_size is 8 on rank 0, 7 on rank 1.*: pass the same batch_size on every rank",
    ),
    "seed": ({}, {"seed": 0}, "seed is 1 on rank 0, 0 on rank 1.*: pass the same seed on every"),
    "uneven": ({}, {"uneven": "drop"}, "uneven is 'pad' on rank 0, 'drop' on rank 1"),
    "shuffle": ({}, {"shuffle_patches": False}, "shuffle_patches is True on rank 0, False on"),
    "step_width": (
        {"steps": "balanced"},
        {"steps": "balanced", "step_width": 4},
        "step_width is 2 on rank 0, 4 on rank 1",
    ),
    "sizes by patch": (
        {"batch_size": dict.fromkeys(range(7), 8)},
        {"batch_size": {**dict.fromkeys(range(7), 8), 3: 9}},
        "batch_size",
    ),
    "weights": (
        {"weights": dict.fromkeys(range(7), 1)},
        {"weights": {**dict.fromkeys(range(7), 1), 2: 3}},
        "hash of weights is .*pass the same weights",
    ),
}


@pytest.mark.parametrize(("first", "second", "match"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_rank_that_differs_from_the_first_raises(first, second, match):
    with pytest.raises(RuntimeError, match=f"^ranks disagree: at test_rank_check.py:.*{match}"):
        use_in_turn([first, second])


def test_another_release_is_named(monkeypatch):
    def use(sampler):
        draw_first(sampler)
        monkeypatch.setattr(fingerprint, "VERSION", 2)

    with pytest.raises(RuntimeError, match=r"permutation is 1 on .*install the same release"):
        use_in_turn([{}, {}], use)


PASSES: dict[str, Callable[[Any], Any]] = {
    "iter": draw_first,
    "batches": lambda sampler: next(sampler.batches()),
    "batches of an epoch": lambda sampler: next(sampler.batches(3)),
    "cursor": lambda sampler: sampler.cursor(),
    "tensor loader": lambda sampler: next(
        iter(PatchTensorLoader(sampler, x=torch.zeros(sampler.plan.groups.num_samples)))
    ),
    "loaded state": lambda sampler: (
        sampler.load_state_dict(sampler.state_dict(step=2)),
        draw_first(sampler),
    ),
    "loaded iterator": lambda sampler: resume_iterator(sampler),
}


def resume_iterator(sampler: PatchBatchSampler) -> None:
    iterator = iter(sampler)
    iterator.load_state_dict(sampler.state_dict(step=2))
    next(iterator)


@pytest.mark.parametrize("use", PASSES.values(), ids=PASSES)
def test_every_kind_of_first_pass_is_checked(use):
    use_in_turn([{}, {}], use)
    with pytest.raises(RuntimeError, match=r"^ranks disagree"):
        use_in_turn([{}, {"source": OTHER_ORDER}], use)


def test_a_pass_that_is_tried_again_raises_again():
    def use(sampler):
        if sampler.rank == 0:
            draw_first(sampler)
            return
        iterator = iter(sampler)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"^ranks disagree"):
                next(iterator)
        sampler.set_epoch(0)
        with pytest.raises(RuntimeError, match=r"^ranks disagree"):
            draw_first(sampler)

    use_in_turn([{}, {"seed": 2}], use)


EQUAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "output": ({}, {"output": "numpy"}),
    "device": ({}, {"device": "cpu"}),
    "type of the ids": ({}, {"source": IDS.tolist()}),
    "seed without shuffling": (
        {"shuffle_patches": False, "shuffle_within_batches": False},
        {"shuffle_patches": False, "shuffle_within_batches": False, "seed": 9},
    ),
    "drawn seed": ({"seed": None}, {"seed": None}),
}


@pytest.mark.parametrize(("first", "second"), EQUAL.values(), ids=EQUAL)
def test_what_may_differ_between_ranks(first, second):
    use_in_turn([first, second])


@pytest.mark.parametrize(
    "settings", [{"check_ranks": False}, {"num_replicas": 2}, {"num_replicas": 2, "rank": 0}]
)
def test_only_ranks_of_the_process_group_are_checked(settings):
    use_in_turn([settings, {**settings, "seed": 2}])


def test_one_rank_asks_the_store_nothing(requests):
    with group(0, distributed.HashStore(), ranks=1):
        draw_first(PatchBatchSampler(**SETTINGS))
        requests.append("end")
    assert requests == ["end"]


def test_check_ranks_must_be_a_bool():
    for make in (PatchBatchSampler, PatchBatchSampler.for_evaluation):
        with pytest.raises(TypeError, match="check_ranks must be a bool"):
            make(IDS, 8, check_ranks=1)


def test_an_evaluation_sampler_can_be_left_unchecked():
    store = distributed.HashStore()
    for rank, ids in enumerate([IDS, OTHER_ORDER]):
        with group(rank, store):
            draw_first(PatchBatchSampler.for_evaluation(ids, 8, check_ranks=False))


def test_a_later_group_on_the_same_store_has_references_of_its_own():
    store = distributed.HashStore()
    for settings in ({}, {"seed": 2}, {"source": OTHER_ORDER}):
        use_in_turn([settings, settings], store=store)
        with pytest.raises(RuntimeError, match=r"^ranks disagree"):
            use_in_turn([settings, {**settings, "batch_size": 7}], store=store)


def test_ranks_come_in_any_order_after_a_restart():
    store = distributed.HashStore()
    use_in_turn([{}] * 3, store=store)
    use_in_turn([{"seed": 2}] * 3, store=store, order=[2, 0, 1])
    with pytest.raises(RuntimeError, match="batch_size is 6 on rank 1, 8 on rank 2"):
        use_in_turn([{"batch_size": 6}, {}, {}], store=store, order=[1, 2, 0])


def test_a_group_of_another_size_has_references_of_its_own():
    store = distributed.HashStore()
    use_in_turn([{}, {}], store=store)
    # Rank 2 has not been in the earlier group.
    use_in_turn([{"batch_size": 5}] * 3, store=store, order=[2, 0, 1])


def test_a_sampler_of_only_one_rank_at_its_own_line_matters_to_no_other():
    def use(sampler):
        if sampler.rank == 0:
            draw_first(PatchBatchSampler(IDS[:50], 4, seed=3))
        draw_first(sampler)
        draw_first(PatchBatchSampler.for_evaluation(IDS[:80], 4))

    use_in_turn([{}, {}], use)


def make_and_draw(**changed: Any) -> None:
    draw_first(PatchBatchSampler(**{**SETTINGS, **changed}))


def test_a_sampler_of_only_one_rank_at_a_shared_line_warns():
    store = distributed.HashStore()
    with group(0, store):
        for seed in (1, 2, 3):
            make_and_draw(seed=seed)
    with group(1, store):
        with pytest.warns(UserWarning, match="sampler 1 of rank 1 made at .* equals sampler 2 of"):
            make_and_draw(seed=2)
        # From there on, both ranks count alike.
        for seed in (3, 4):
            make_and_draw(seed=seed)


def test_samplers_that_different_calls_made_only_warn():
    store = distributed.HashStore()
    with group(0, store):
        make_and_draw(source=IDS[:50])
    with group(1, store), pytest.warns(UserWarning, match=r"^ranks may disagree: .*num_samples"):
        make_and_draw()


def test_a_sampler_that_was_made_for_another_group_is_not_checked():
    store = distributed.HashStore()
    use_in_turn([{}, {}, {}], store=store)
    with group(0, store):
        sampler = PatchBatchSampler(**SETTINGS)
    with group(0, store, ranks=3):
        draw_first(sampler)
    assert not sampler._tracker._rank_check._is_done


def test_a_sampler_costs_one_request_and_a_group_three(requests):
    def use(sampler):
        for _ in range(3):
            draw_first(sampler)
            sampler.set_epoch(0)
        sampler.cursor()
        requests.append("another")
        draw_first(PatchBatchSampler(**SETTINGS))
        requests.append("end")

    joining = ["compare_set", "compare_set", "set"]
    use_in_turn([{}, {}], use)
    assert requests == [*joining, "compare_set", "another", "compare_set", "end"] * 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_is_checked_once(duplicate, requests):
    def use(sampler):
        early = duplicate(sampler)
        draw_first(sampler)
        sampler.set_epoch(0)
        late = duplicate(sampler)
        requests.clear()
        draw_first(late)
        assert requests == []
        draw_first(early)
        assert requests == ["compare_set"]

    use_in_turn([{}, {}], use)


def test_threads_share_the_count(requests):
    def use(sampler):
        samplers = [sampler, *(PatchBatchSampler(**SETTINGS) for _ in range(5))]
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(draw_first, samplers))

    use_in_turn([{}, {}], use)
    assert requests.count("set") == 2
    assert requests.count("compare_set") == 2 * (2 + 6)


def test_threads_check_one_sampler_once(requests, monkeypatch):
    all_began = threading.Barrier(6)

    def world_when_all_began():
        all_began.wait(60)
        return world_and_rank()

    monkeypatch.setattr(rank_check, "world_and_rank", world_when_all_began)

    def use(sampler):
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(lambda _: draw_first(sampler), range(6)))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a second pass on 2 ranks")
        use_in_turn([{}, {}], use)
    assert requests.count("compare_set") == 2 * (2 + 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_asks_the_store_nothing(requests):
    def draw() -> None:
        requests.clear()
        draw_first(sampler)
        make_and_draw()
        sys.exit(len(requests))

    with group(0, distributed.HashStore()):
        sampler = PatchBatchSampler(**SETTINGS)
        child = multiprocessing.get_context("fork").Process(target=draw)
        child.start()
        child.join(60)
        assert child.exitcode == 0
        requests.clear()
        draw_first(sampler)
    assert requests


def test_a_worker_asks_the_store_nothing(requests, monkeypatch):
    monkeypatch.setattr(rank_check.devices, "is_in_worker", lambda: True)
    with group(0, distributed.HashStore()):
        make_and_draw()
        requests.append("end")
    assert requests == ["end"]


def test_a_store_that_cannot_compare_is_noted_once(caplog):
    caplog.set_level(logging.DEBUG, "gpusampler")
    with group(0, fake_group.FakeStore()):
        for _ in range(3):
            draw_first(PatchBatchSampler(**SETTINGS))
    noted = [record for record in caplog.records if "not compared" in record.getMessage()]
    assert [record.levelname for record in noted] == ["DEBUG"]


def test_a_store_that_fails_later_does_not_end_the_run(monkeypatch, caplog):
    def fail(*_):
        raise distributed.DistNetworkError("connection reset by peer")

    caplog.set_level(logging.DEBUG, "gpusampler")
    with group(0, distributed.HashStore()):
        draw_first(PatchBatchSampler(**SETTINGS))
        monkeypatch.setattr(rank_check.GroupReferences, "propose", fail)
        draw_first(PatchBatchSampler(**SETTINGS))
    assert "not compared: connection reset by peer" in caplog.text


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(SUPPORT / "rank_check_script.py", 2, tmp_path_factory.mktemp("ranks"))


NAMED = {
    "order": r"hash of ids is \d+ on rank {first}, \d+ on rank {later}.*same order",
    "lost": "num_samples is .* on rank {first}, .* on rank {later}.*no rank lacks files",
    "batch_size": "batch_size is .* on rank {first}, .* on rank {later}.*the same batch_size on",
    "seed": "seed is . on rank {first}, . on rank {later}.*pass the same seed on every rank",
}


@pytest.mark.expensive("two real ranks, once for all tests")
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("case", NAMED)
def test_two_ranks_that_differ(outcomes, case, first):
    results = [outcome[f"{case}, rank {first} first"] for outcome in outcomes]
    assert results[first].endswith(" steps")
    assert results[1 - first].startswith("RuntimeError: ranks disagree: at rank_check_script.py:")
    pattern = NAMED[case].format(first=first, later=1 - first)
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(results[1 - first])


@pytest.mark.expensive("two real ranks, once for all tests")
def test_two_equal_ranks_never_raise(outcomes):
    for outcome in outcomes:
        for name, result in outcome.items():
            if name.startswith("equal: "):
                assert result == "no word", name


@pytest.mark.expensive("two real ranks, once for all tests")
def test_two_ranks_of_which_one_makes_more_samplers_only_warn(outcomes):
    # By one line of code. Rank 1 comes after both samplers of rank 0, and between them.
    after, between = "one more on rank 0, then rank 1", "one more on rank 0, rank 1 between"
    assert [outcomes[0][name] for name in (after, between)] == ["no word"] * 2
    assert outcomes[1][after].startswith("UserWarning: some ranks use more samplers than others")
    assert outcomes[1][between].startswith("UserWarning: ranks may disagree: at rank_check_script")


@pytest.mark.expensive("two real ranks, once for all tests")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_leave_the_store_alone(outcomes, start):
    for outcome in outcomes:
        assert outcome[f"worker by {start}"] == [7] * 28
