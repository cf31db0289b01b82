"""``python -m benchmarks.ratios`` and the loaders beside ours: every row is there and adds up."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

import torch

from benchmarks import ratios
from benchmarks.peers import loaders
from benchmarks.peers.cases import Case
from benchmarks.peers.peer import Work, missing
from gpusampler.permutation import _native


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(ratios, "SIDE_SECONDS", 1e-4)
    monkeypatch.setattr(ratios, "PAIRS", 3)


@pytest.mark.parametrize("form", ["NumPy", "plain"])
def test_a_line_for_each_output_and_baseline(monkeypatch, capsys, tmp_path, form):
    if form not in ratios.names():
        pytest.skip(_native.describe())
    monkeypatch.setattr(ratios, "ARRAYS_FROM", 1000)
    before = _native.describe()
    path = tmp_path / "ratios.json"
    ratios.main(["--samples", "100", "1e3", "--form", form, "--json", str(path)])
    assert _native.describe() == before
    found = json.loads(path.read_text())
    evaluated_by = {"NumPy": "NumPy", "plain": "C (plain)"}[form]
    assert found["machine"]["evaluated by"].startswith(evaluated_by)
    ungrouped, sort = "torch BatchSampler(RandomSampler)", "torch permute + stable sort"
    assert [(row["samples"], row["output"], row["baseline"]) for row in found["rows"]] == [
        (100, "list", ungrouped),
        (100, "list", sort),
        (1000, "list", ungrouped),
        (1000, "list", sort),
        (1000, "numpy", ungrouped),
    ]
    assert all(0 < row["lowest"] <= row["ratio"] <= row["highest"] for row in found["rows"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1")]
    assert len(printed) == len(found["rows"])


def test_long_epochs_make_fewer_pairs(monkeypatch):
    monkeypatch.setattr(ratios, "epoch_seconds", lambda batches, repeats: len(batches) / repeats)
    assert ratios.in_pairs(range(3), range(6)) == (3, 6, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("peer", loaders.LOADERS, ids=lambda peer: peer.name)
def test_loaders_hand_out_every_row_once(peer):
    if why := missing(peer):
        pytest.skip(why)
    case = Case(1000, 10, 64)
    rows = torch.arange(1000.0)[:, None]
    batches = list(peer.make(Work(rows, case.ids(), case.batch_size), 0))
    assert list(map(len, batches)) == [64] * 15 + [40]
    drawn = torch.cat(batches).flatten()
    assert not torch.equal(drawn, rows.flatten())
    assert torch.equal(drawn.sort().values, rows.flatten())
    assert loaders.ratio(peer, case, 8) > 0
