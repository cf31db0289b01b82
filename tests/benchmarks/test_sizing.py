"""``python -m benchmarks.sizing``: what it counts, and that all it prints and draws is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sizing
from benchmarks.peers import budgets
from benchmarks.peers.peer import missing
from benchmarks.peers.samplers import budgeted
from docs.figures import sizing as page
from support.processes import run_python


@pytest.mark.slow("trains twice, in a process of its own")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_training_takes_fewer_steps_at_the_same_peak(capsys):
    pytest.importorskip("neuralop")
    # This process has memory to spare, in which a peak would not show.
    code = "import json; from benchmarks import sizing; print(json.dumps(sizing.training((8,), 1)))"
    found = json.loads(run_python("-c", code).stdout)
    sizing.print_training(found)
    assert "| 8 | budget | 16 |" in capsys.readouterr().out
    fixed, budget = found["rows"]
    assert (fixed["steps"], budget["steps"]) == (54, 16)
    assert budget["peak_mb"] == pytest.approx(fixed["peak_mb"], rel=0.15)
    assert budget["samples_a_second"] > 0
    assert 0 < budget["probe_loss"] < 2


def test_a_child_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="must send its result"):
        sizing.in_child(lambda: os._exit(3))


def test_what_is_counted_of_batches():
    lengths = np.array([1, 2, 3, 4, 11])
    workload = budgets.Workload("tiny", lengths, np.array([0, 0, 1, 1, 1]), 10)
    found = budgets.filled(workload, [[0, 1], [2, 3], [3, 1], [], [4]])
    assert found["batches"] == 5
    assert found["empty_batches"] == 1
    assert found["fill"] == pytest.approx((3 + 7 + 6 + 11) / 40)
    assert found["fill_padded"] == pytest.approx((4 + 8 + 8 + 11) / 40)
    assert found["padding"] == pytest.approx(1 - 27 / 31)
    assert (found["over_budget"], found["over_budget_padded"]) == (1, 1)
    assert (found["most"], found["most_padded"]) == (11, 11)
    assert (found["lost"], found["repeated"], found["mixed"]) == (0, 2, 1)
    assert (found["too_long"], found["too_long_in_batches"]) == (1, 1)
    assert budgets.filled(workload, [[0], [1]])["lost"] == 2


def test_our_batches_of_lengths_are_within_the_budget():
    workload = budgets.some_too_long(3000)
    found = budgets.measured(budgeted.PEERS[0], workload, rounds=1)
    assert found["name"].startswith("gpusampler")
    assert found["over_budget"] == found["over_budget_padded"] == 0
    assert found["mixed"] == found["lost"] == found["repeated"] == 0
    assert (found["too_long"], found["too_long_in_batches"]) == (3, 0)
    assert found["len"] == found["batches"] == found["second_epoch_batches"]
    assert found["second_epoch_differs"]
    assert found["resume"] == "the same batches"


def test_peers_that_are_there_are_run():
    workload = budgets.in_patches(1500, patches=5)
    for peer in budgeted.PEERS[1:]:
        if missing(peer):
            continue
        found = budgets.measured(peer, workload, rounds=1)
        assert found["lost"] == found["repeated"] == 0
        assert found["resume"] in ("no state_dict", "the same batches")
        assert 0 < found["fill"] <= 1


@pytest.mark.slow("the whole benchmark, on few samples")
def test_the_whole_is_printed_written_and_drawn(monkeypatch, capsys, tmp_path):
    pytest.importorskip("gstools")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(page, "FIXED", (2, 8))
    monkeypatch.setattr(page, "STEPS", (365,))
    monkeypatch.setattr(budgets, "ROUNDS", 1)
    monkeypatch.setattr(sizing, "SAMPLES", 1500)
    # Whether or not it is installed here.
    absent = [peer._replace(package="no-such-sampler") for peer in budgeted.PEERS[-4:-3]]
    monkeypatch.setattr(budgeted, "PEERS", (*budgeted.PEERS[:-4], *absent, *budgeted.PEERS[-3:]))
    picture = tmp_path / "sizing.png"
    sizing.main(["peers", "--out", str(tmp_path)])
    (written,) = tmp_path.glob("sizing-*.json")
    page.main(["--picture", str(written), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "| lhotse SimpleCutSampler | no-such-sampler is not installed | - |" in out
    assert "| small, core, 365 steps | 46 to 454 | 286 | 324 | 80 |" in out
    found = json.loads(written.read_text())
    assert set(found) == {"machine", "peers"}
    assert {"date", "numpy", "python", "torch"} <= set(found["machine"])
    names = [peer["name"] for peer in found["peers"]["workloads"][0]["peers"]]
    assert names == [peer.name for peer in budgeted.PEERS]


def test_wrong_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        sizing.main(["nonsense"])
    assert "parts must be among training, peers, got nonsense" in capsys.readouterr().err
