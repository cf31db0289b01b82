"""``pytest benchmarks --benchmark-enable``: its pairs, its floors, its loaders, and its tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from benchmarks import conftest as suite
from benchmarks import timing
from benchmarks.peers.peer import Work, missing
from benchmarks.peers.samplers import loaders
from benchmarks.speed import test_floors as floors
from docs.figures import speed
from gpusampler import PatchBatchSampler
from support.paths import ROOT
from support.processes import run_python


def test_a_ratio_is_the_median_of_pairs():
    found = timing.summary([(1.0, 2.0), (4.0, 2.0), (3.0, 3.0)])
    assert found == (3.0, 2.0, 1.0, 0.5, 2.0)


@pytest.mark.parametrize("batch_size", [8, 100])
def test_floors_are_of_our_own_batches(monkeypatch, batch_size):
    monkeypatch.setattr(floors, "CHUNK", 256)
    ids = np.random.default_rng(1).integers(0, 7, 3000)
    floor = floors.Floors(ids, batch_size)
    drawn = list(PatchBatchSampler(ids, batch_size, seed=0))
    assert floor.lists == drawn
    assert floor.samples.tolist() == [sample for batch in drawn for sample in batch]
    # What the gather reads is what is drawn.
    assert np.array_equal(floor.order[floor.places], floor.samples)
    full_size = ids.size // batch_size * batch_size
    handed_out = np.concatenate(list(floor._tables())).ravel()
    assert np.array_equal(handed_out, floor.samples[:full_size])


@pytest.mark.parametrize("peer", loaders.LOADERS, ids=lambda peer: peer.name)
def test_loaders_hand_out_every_row_once(peer):
    if why := missing(peer):
        pytest.skip(why)
    rows = torch.arange(1000.0)[:, None]
    batches = list(peer.make(Work(rows, np.zeros(1000), 64), 0))
    assert list(map(len, batches)) == [64] * 15 + [40]
    drawn = torch.cat(batches).flatten()
    assert not torch.equal(drawn, rows.flatten())
    assert torch.equal(drawn.sort().values, rows.flatten())


def test_a_part_of_a_baseline_counts_as_a_whole(monkeypatch):
    """Of repeated calls one counts, of a part of a baseline the whole."""
    taken = iter([5.0, 5.0, *[4.0] * 9])
    monkeypatch.setattr(suite, "seconds", lambda call: call() or next(taken))
    monkeypatch.setattr(suite, "LONG", 20.0)
    monkeypatch.setattr(suite, "_ROWS", [])
    calls = []

    def pedantic(call, args, setup, rounds):
        for _ in range(rounds):
            setup()
            call(*args)

    benchmark = SimpleNamespace(
        disabled=False,
        extra_info={},
        pedantic=pedantic,
        stats=SimpleNamespace(stats=SimpleNamespace(data=[6.0] * 9)),
    )
    run = suite.against.__wrapped__(benchmark)
    run("ours", lambda: calls.append("ours"), "theirs", lambda: None, repeats=2, scale=10.0)
    assert len(calls) == 2 * (1 + 9)
    found = benchmark.extra_info
    assert (found["ours_s"], found["baseline_s"], found["ratio"]) == (3.0, 20.0, 0.15)
    assert suite._ROWS == [("ours", "3000", "2e+04", "0.15", "0.15", "0.15", "theirs")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Figures of the suite, measured on few samples."""
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    code = (
        "import sys, pytest\n"
        "from benchmarks import conftest\n"
        "from benchmarks.speed import test_epochs, test_floors\n"
        "test_epochs.N = test_floors.SAMPLES = 20_000\n"
        "test_epochs.STAGE_ROUNDS = conftest.PAIRS = 1\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-enable", "--benchmark-json", path]
    some = "test_part or test_above or test_stage or (test_epoch and not by_samples) or 10000-"
    # Not a worker of this run: pytest-benchmark measures nothing in one.
    run_python(
        "-c",
        code,
        ROOT / "benchmarks",
        *("-n", 0, "-k", some),
        *options,
        cwd=ROOT,
        PYTEST_XDIST_WORKER=None,
        PYTEST_XDIST_WORKER_COUNT=None,
    )
    return path


@pytest.mark.slow("a part of the benchmarks, on few samples")
def test_the_pages_tables_and_pictures_are_made_of_what_is_written(written, tmp_path, capsys):
    speed.main([str(written), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"epochs.png", "floors.png", "host.png"}
    tables = [
        [line.strip("| ").split(" | ") for line in table.splitlines()]
        for table in capsys.readouterr().out.split("\n\n")
    ]
    heads = [table[0][0] for table in tables]
    assert heads == ["samples", "an epoch as", "nanoseconds per index, batches of", "part"]
    rows = [[float(cell) for cell in row[1:]] for row in tables[2][2:]]
    for floor, ours, ratio in (rows[2:5], rows[5:8]):
        assert ratio == pytest.approx([a / b for a, b in zip(ours, floor, strict=True)], rel=0.02)
    rows = {tuple(row) for row in tables[1]}
    assert {row[0] for row in rows} >= {"lists of 8", "NumPy arrays of 64", "tensors of 64"}
