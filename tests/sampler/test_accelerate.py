"""Accelerate, run for real: one process, and two that share epochs out."""

from __future__ import annotations

import ast
import json
from itertools import chain, product
from types import SimpleNamespace

import numpy as np
import pytest

from support.paths import ROOT, SUPPORT
from support.processes import run_ranks
from support.strategies import epoch_of, quiet

pytest.importorskip("accelerate")
pytest.importorskip("torchdata")
pytest.importorskip("torch")

import torch

from gpusampler.sampler import accelerate_guard

IDS = np.repeat([3, 1, 2, 9], [9, 14, 7, 5])
SEED, EPOCH = 4, 2
SCRIPT = SUPPORT / "accelerate_script.py"
PAGE = ROOT / "docs" / "how-to" / "accelerate.md"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="alone", marks=pytest.mark.slow("one more run of everything")),
        pytest.param(2, id="two", marks=pytest.mark.expensive("the one run of Accelerate")),
    ],
)
def ranks(request, tmp_path_factory) -> list[dict]:
    results = run_ranks(SCRIPT, request.param, tmp_path_factory.mktemp("accelerate"))
    assert [result["rank"] for result in results] == list(range(request.param))
    for result in results:
        assert result["world"] == request.param
        assert (result["ids"], result["seed"], result["epoch"]) == (IDS.tolist(), SEED, EPOCH)
    return results


def whole(epoch=0, batch_size=4, partial="keep") -> list[list[int]]:
    """An epoch's batches, over all processes."""
    sampler = quiet(IDS, batch_size, seed=SEED, partial=partial, num_replicas=1, rank=0)
    return epoch_of(sampler, epoch)


def shares(batches, processes, even=True) -> list[list[list[int]]]:
    """Each process's batches in turn; to make it even, the first ones come again."""
    again = batches[: -len(batches) % processes] if even else []
    return [[*batches, *again][rank::processes] for rank in range(processes)]


def native_shares(epoch, processes, partial="keep") -> list[list[list[int]]]:
    """Each process's batches by our own sharding."""
    results = []
    for rank in range(processes):
        sampler = quiet(IDS, 4, seed=SEED, partial=partial, num_replicas=processes, rank=rank)
        sampler.set_epoch(epoch)
        results.append(list(sampler))
    return results


def dispatched(batches, processes, split=False) -> list[list[list[int]]]:
    """What Accelerate makes of batches that it joins, or not, and cuts into equal parts."""
    width = 1 if split else processes
    rounds = [
        list(chain.from_iterable(batches[at : at + width])) for at in range(0, len(batches), width)
    ]
    if len(rounds[-1]) % processes:
        rounds[-1] += rounds[0][:processes]
    parts = []
    for rank in range(processes):
        sizes = [len(joined) // processes for joined in rounds]
        parts.append(
            [
                joined[rank * size : (rank + 1) * size]
                for joined, size in zip(rounds, sizes, strict=True)
            ]
        )
    return parts


def unmixed(batches) -> bool:
    return all(len(set(IDS[batch].tolist())) == 1 for batch in batches)


def every_sample(batches) -> bool:
    return set(chain.from_iterable(batches)) == set(range(IDS.size))


def found_in(ranks, name, case) -> list:
    """What every process found, none of which failed."""
    outcomes = [result[name][case] for result in ranks]
    assert all(set(result) == {"found"} for result in outcomes), outcomes
    return [result["found"] for result in outcomes]


def errors_in(ranks, name, case) -> set[str]:
    outcomes = [result[name][case] for result in ranks]
    assert all(set(result) == {"error"} for result in outcomes), outcomes
    return {result["error"] for result in outcomes}


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
def test_accelerate_shares_whole_batches_out(ranks, partial, even):
    case = f"4 {partial} split=False even={even} dispatch=None"
    results = found_in(ranks, "sharded_by_accelerate", case)
    batches = whole(partial=partial)
    assert len(batches) % 2 == 1  # or there would be nothing to make even
    expected = shares(batches, len(ranks), even)
    assert [result["batches"] for result in results] == expected
    assert [result["len"] for result in results] == list(map(len, expected))
    drawn = list(chain.from_iterable(result["batches"] for result in results))
    assert unmixed(drawn)
    assert every_sample(drawn) == (partial != "drop")


@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
def test_accelerate_shares_out_what_the_sampler_would_by_itself(ranks, partial):
    case = f"4 {partial} split=False even=True dispatch=None"
    results = found_in(ranks, "sharded_by_accelerate", case)
    assert [result["batches"] for result in results] == native_shares(0, len(ranks), partial)


@pytest.mark.parametrize("dispatch", [None, True])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("partial", ["drop", "pad"])
def test_every_batch_is_split_where_all_have_one_size(ranks, partial, even, dispatch):
    case = f"4 {partial} split=True even={even} dispatch={dispatch}"
    results = found_in(ranks, "sharded_by_accelerate", case)
    batches = whole(partial=partial)
    size = 4 // len(ranks)
    expected = [
        [batch[rank * size : (rank + 1) * size] for batch in batches] for rank in range(len(ranks))
    ]
    assert [result["batches"] for result in results] == expected
    assert [result["len"] for result in results] == [len(batches)] * len(ranks)


@pytest.mark.parametrize("dispatch", [None, True])
@pytest.mark.parametrize("even", [True, False])
def test_batches_of_many_sizes_are_not_split(ranks, even, dispatch):
    case = f"4 keep split=True even={even} dispatch={dispatch}"
    assert errors_in(ranks, "sharded_by_accelerate", case) == {
        "TypeError: '>' not supported between instances of 'NoneType' and 'int'"
    }


@pytest.mark.parametrize("dispatch", [None, True])
def test_a_batch_size_that_the_processes_do_not_divide_is_not_split(ranks, dispatch):
    case = f"3 pad split=True even=True dispatch={dispatch}"
    if len(ranks) == 1:
        results = found_in(ranks, "sharded_by_accelerate", case)
        assert results[0]["batches"] == whole(batch_size=3, partial="pad")
    else:
        (error,) = errors_in(ranks, "sharded_by_accelerate", case)
        assert "needs to be a round multiple of the number of processes (2)" in error


@pytest.mark.parametrize(
    ("batch_size", "partial", "even"),
    [*product([4], ["keep", "drop", "pad"], [True, False]), (3, "pad", True)],
)
def test_dispatched_batches_are_joined_and_cut(ranks, batch_size, partial, even):
    case = f"{batch_size} {partial} split=False even={even} dispatch=True"
    results = [result["batches"] for result in found_in(ranks, "sharded_by_accelerate", case)]
    expected = dispatched(whole(batch_size=batch_size, partial=partial), len(ranks))
    assert results == expected
    drawn = list(chain.from_iterable(results))
    if len(ranks) == 1:
        assert unmixed(drawn)
    elif partial == "keep":
        # Halves of two batches of different sizes; the odd sample out is nobody's.
        assert not unmixed(drawn)
        assert not every_sample(drawn)
    elif batch_size == 3:
        # The last batch is filled up with samples of the first.
        assert not unmixed(drawn)
        assert every_sample(drawn)
    else:
        assert unmixed(drawn)


@pytest.mark.parametrize("output", ["numpy", "tensor"])
def test_arrays_are_refused_on_every_process_that_shares_out(ranks, output):
    # Otherwise one of them would raise at the end of an epoch, and the other wait for it.
    expected = shares(whole(), len(ranks))
    for result, share in zip(ranks, expected, strict=True):
        told = result["arrays_under_even_batches"]
        assert told["list"] == {"found": share}
        if len(ranks) == 1:
            assert told[output] == {"found": share}
        else:
            assert f"output must be 'list' in a loader .* 2 processes, got '{output}'" in (
                told[output]["error"].replace("that Accelerate shards over", ".*")
            )


def test_a_sampler_made_before_the_accelerator_is_shared_out(ranks):
    assert [result["made_before_the_group"] for result in ranks] == shares(whole(), len(ranks))


def trained(epochs_by_rank) -> list[float]:
    """Weights after plain data-parallel training, in one process."""
    weight = torch.tensor([[0.1, -0.2, 0.3]], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.1, momentum=0.9)
    for epoch in zip(*epochs_by_rank, strict=True):
        for batches in zip(*epoch, strict=True):
            optimizer.zero_grad()
            for batch in batches:
                rows = torch.tensor(batch)
                x = torch.stack([torch.ones(len(rows)), rows.sin(), (3 * rows).cos()], dim=1)
                loss = ((x @ weight.T + bias).squeeze(1) - rows / 10).square().mean()
                (loss / len(batches)).backward()
            optimizer.step()
    return [*weight.flatten().tolist(), *bias.tolist()]


@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
def test_a_loader_that_is_not_prepared_shards_and_trains(ranks, partial):
    results = [result["sharded_natively"][partial] for result in ranks]
    for epoch in range(2):
        expected = native_shares(epoch, len(ranks), partial)
        assert [result["epochs"][epoch] for result in results] == expected
        batches = whole(epoch, partial=partial)
        again = -len(batches) % len(ranks)
        drawn = list(chain.from_iterable(zip(*expected, strict=True)))
        assert drawn == [*batches, *batches[:again]]
        assert [result["len"] for result in results] == list(map(len, expected))
    assert all(result["weights"] == results[0]["weights"] for result in results)
    reference = trained([result["epochs"] for result in results])
    np.testing.assert_allclose(results[0]["weights"], reference, rtol=1e-4, atol=1e-6)


TWICE = [
    "as it comes",
    "batches of one size",
    "split",
    "uneven",
    "dispatched",
    "dispatched and split",
    "stateful",
    "skipped after",
    "skipped before",
    "wrapped",
]
CASES = [
    *(f"{case}, {how}" for case in TWICE for how in ("iter", "len")),
    "skipped after, dispatched, len",
]


@pytest.mark.parametrize("case", CASES)
def test_sharding_twice_is_refused(ranks, case):
    assert list(ranks[0]["sharded_twice"]) == CASES
    if len(ranks) == 1:
        found_in(ranks, "sharded_twice", case)
    elif case == "wrapped, len":
        # A length of its own, for which nobody asks us.
        assert found_in(ranks, "sharded_twice", case) == [2, 2]
    else:
        assert errors_in(ranks, "sharded_twice", case) == {
            "RuntimeError: num_replicas must be 1 in a loader that Accelerate shards over 2 "
            "processes, got 2: batches would be sharded twice and most of every epoch lost. Write "
            "PatchBatchSampler(..., num_replicas=1, rank=0), or leave the loader out of "
            "accelerator.prepare()"
        }


@pytest.mark.parametrize(
    "case",
    [
        "not prepared",
        "not prepared, skipped",
        "one process",
        "prepared",
        "prepared, skipped",
        "dispatched",
        "stateful",
        "asked within",
        "asked within, dispatched",
    ],
)
def test_sharding_once_is_not_refused(ranks, case):
    results = found_in(ranks, "not_sharded_twice", case)
    partial = "pad" if "dispatched" in case or "within" in case else "keep"
    batches = whole(EPOCH, partial=partial)
    if case == "one process":
        # The epoch goes past the loader, which begins with its own.
        expected = shares(whole(0), 2)[: len(ranks)]
    elif "dispatched" in case:
        expected = dispatched(batches, len(ranks))
    else:
        expected = shares(batches, len(ranks))
    if "skipped" in case:
        expected = [share[2:] for share in expected]
    assert [result["batches"] for result in results] == expected
    assert [result["len"] for result in results] == list(map(len, expected))


def test_nothing_is_looked_at_without_a_share_or_without_accelerate(monkeypatch):
    def looked(depth):
        raise AssertionError("looked at who asks")

    modules = {accelerate_guard.ACCELERATE: json}
    monkeypatch.setattr(accelerate_guard, "sys", SimpleNamespace(modules=modules, _getframe=looked))
    accelerate_guard.check_sharding(1, "list")
    for given in ((2, "list"), (1, "numpy")):
        with pytest.raises(AssertionError, match="looked at who asks"):
            accelerate_guard.check_sharding(*given)
    modules.clear()
    accelerate_guard.check_sharding(2, "list")


@pytest.mark.parametrize("how", ["plain", "stateful", "dispatched"])
def test_the_loaders_epoch_reaches_the_sampler(ranks, how):
    results = [result["epochs_reach_the_sampler"][how] for result in ranks]
    assert [result["epoch"] for result in results] == [7] * len(ranks)
    parts = dispatched if how == "dispatched" else shares
    for nth, epoch in enumerate([7, 8]):
        expected = parts(whole(epoch, partial="pad"), len(ranks))
        assert [result["seven"][nth] for result in results] == expected
    assert [result["zero"] for result in results] == parts(whole(0, partial="pad"), len(ranks))


def test_the_loader_knows_nothing_of_epochs_past_it(ranks):
    results = [result["epochs_reach_the_sampler"] for result in ranks]
    # It tells the sampler its own count, which begins at 0, and which a skip does not move.
    assert [result["told past the loader"] for result in results] == shares(whole(0), len(ranks))
    assert [result["not told after a skip"] for result in results] == shares(
        whole(EPOCH), len(ranks)
    )


def test_a_skip_reads_no_sample(ranks):
    for rank, result in enumerate(ranks):
        remaining = sum(map(len, shares(whole(0), len(ranks))[rank][3:]))
        for way in ("prepared", "native"):
            assert result["read_by_a_skip"][way] == {"read": remaining, "handed out": remaining}


def test_a_loaded_position_holds_where_the_loader_is_told_its_epoch(ranks):
    processes = len(ranks)
    results = [result["loaded_states"][str(EPOCH)] for result in ranks]
    remaining = whole(EPOCH)[processes:]
    # What comes again at the end are the first batches of the rest, not of the epoch.
    assert [result["rows"] for result in results] == shares(remaining, processes)
    assert [result["warned"] for result in results] == [[]] * processes


@pytest.mark.parametrize("told", ["None", "0"])
def test_a_loader_that_begins_anew_drops_a_loaded_position_and_it_is_said(ranks, told):
    results = [result["loaded_states"][told] for result in ranks]
    assert [result["rows"] for result in results] == shares(whole(0), len(ranks))
    message = f"set_epoch(0) drops the loaded position: epoch {EPOCH}, slot {len(ranks)}"
    message += f"; to resume there, call set_epoch({EPOCH}) instead"
    assert [result["warned"] for result in results] == [[message]] * len(ranks)


@pytest.mark.parametrize("run", ["skipping", "native", "stateful, native", "stateful, prepared"])
def test_a_resumed_run_equals_one_that_never_stopped(ranks, run):
    steps = -(-len(whole()) // len(ranks))
    for rank, result in enumerate(ranks):
        done, weights = result["resumed"][run]["straight"]
        expected = [shares(whole(epoch), len(ranks))[rank] for epoch in range(EPOCH + 2)]
        assert [rows for rows, _ in done] == list(chain.from_iterable(expected))
        stopped = result["resumed"][run]["stopped"]
        assert list(stopped) == [str(stop) for stop in (1, steps // 2, steps - 1, steps)]
        for stop, (before, (after, last)) in stopped.items():
            assert len(before) == EPOCH * steps + int(stop)
            assert before + after == done, stop
            assert last == weights, stop


@pytest.mark.parametrize("run", ["skipping", "native"])
def test_a_resumed_run_is_resumed_again(ranks, run):
    steps = -(-len(whole()) // len(ranks))
    for result in ranks:
        done, weights = result["resumed"][run]["straight"]
        between, (after, last) = result["resumed_twice"][run]
        assert len(between) == 2
        assert between + after == done[EPOCH * steps + 1 :]
        assert last == weights


def test_a_stateful_loader_that_is_not_told_its_epoch(ranks):
    # Alone, the sampler's state is in the loader's. A shard hides it: only a count is saved.
    epoch = EPOCH if len(ranks) == 1 else 0
    for rank, result in enumerate(ranks):
        expected = shares(whole(epoch), len(ranks))[rank][1:]
        done = result["not_told_the_epoch"]
        assert [rows for rows, _ in done[: len(expected)]] == expected


def test_the_samplers_own_position_runs_ahead_of_a_prepared_loader(ranks):
    processes = len(ranks)
    for result in ranks:
        assert result["looked_ahead"] == {"drawn": 3 * processes, "trained": 2 * processes}


def test_gather_for_metrics_cuts_a_full_batch_of_a_prepared_loader(ranks):
    processes = len(ranks)
    batches = whole(0, partial="pad")
    rounds = list(chain.from_iterable(zip(*shares(batches, processes), strict=True)))
    samples = list(chain.from_iterable(rounds))
    kept = len(samples) - 4 * processes + IDS.size % (4 * processes)
    for result in ranks:
        assert result["gathered"]["prepared pad"]["metrics"] == samples[:kept]
        assert not every_sample([samples[:kept]])
        # Not so in a loader that Accelerate does not know, nor where it knows of no size.
        assert result["gathered"]["native pad"]["metrics"] == samples
        for way in ("native keep", "prepared keep"):
            parts = shares(whole(0), processes)
            expected = chain.from_iterable(chain.from_iterable(zip(*parts, strict=True)))
            assert result["gathered"][way]["objects"] == list(expected)


@pytest.mark.parametrize("way", ["prepared pad", "prepared keep", "native pad", "native keep"])
def test_results_by_row_are_whole_whatever_comes_twice(ranks, way):
    for result in ranks:
        assert result["gathered"][way]["table"] == [2.0 * row for row in range(IDS.size)]


def test_only_a_prepared_loader_ends_an_accumulation_with_the_epoch(ranks):
    steps = -(-len(whole()) // len(ranks))
    each = [step for step in range(1, steps + 1) if step % 4 == 0 or step == steps]
    assert steps not in range(0, 99, 4)
    for result in ranks:
        results = result["accumulated"]
        assert results["prepared"] == [*each, *(steps + step for step in each)]
        assert results["native"] == list(range(4, 2 * steps + 1, 4))


def test_a_loader_of_tensors_passes_through_prepare(ranks):
    results = [result["tensor_loaders_pass_through"] for result in ranks]
    assert all(result["same"] for result in results)
    assert [result["rows"] for result in results] == native_shares(0, len(ranks))


@pytest.mark.parametrize("name", ["Drawn", "Position"])
def test_the_page_shows_what_is_run_here(name):
    # Importing the script would run an Accelerator.
    source = SCRIPT.read_text()
    pieces = {
        result.name: result for result in ast.parse(source).body if isinstance(result, ast.ClassDef)
    }
    assert ast.get_source_segment(source, pieces[name]) in PAGE.read_text()
