"""``python -m benchmarks.sizing``: its arithmetic, and that all it prints and draws is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers_sizing, sizing
from docs.figures.sizing import main as draw_sizing
from gpusampler import CostBudget
from support.processes import run_python
from support.strategies import quiet


def test_used_is_what_batches_hold():
    costs, fixed, samples = np.array([3.0, 10.0, 4.5]), 4, 37
    patch_of = np.repeat(range(3), samples)
    found = sizing.used(costs, samples, fixed)
    for size, fill, batches in (
        (fixed, "fill_fixed", "batches_fixed"),
        (CostBudget(40, cost=costs), "fill", "batches"),
    ):
        held = [costs[patch_of[batch]].sum() for batch in quiet(patch_of, size, seed=5)]
        assert found[batches] == len(held)
        assert found[fill] == pytest.approx(np.mean(held) / 40)
    assert found["budget"] == 40
    assert found["gain"] == pytest.approx(found["fill"] / found["fill_fixed"])
    assert found["possible"] == pytest.approx(10 / (17.5 / 3))
    assert found["ratio"] == pytest.approx(found["gain"] / found["possible"])


def test_where_sizes_come_out_even_all_of_the_gain_is_had():
    found = sizing.used(np.array([1.0, 2.0, 4.0]), 64, 4)
    assert found["fill"] == 1
    assert found["gain"] == found["possible"] == pytest.approx(12 / 7)
    assert found["ratio"] == pytest.approx(1)


def test_where_patches_fill_no_batch_the_gain_is_small():
    found = sizing.used(np.array([1.0, 1.0, 100.0]), 10, 10)
    assert found["batches"] == 3
    assert found["fill"] < 0.5
    assert found["ratio"] < sizing.WANTED


@pytest.mark.parametrize(("preset", "least", "most"), [("small", 46, 454), ("medium", 234, 1347)])
def test_groundwater_patches_have_most_of_the_gain(preset, least, most):
    pytest.importorskip("gstools")
    points = sizing.patch_points(preset)
    assert (min(points["core"]), max(points["core"])) == (least, most)
    for of_patches in points.values():
        found = sizing.used(np.array(of_patches, float), sizing.samples_of(365), 8)
        assert sizing.WANTED <= found["ratio"] <= 1
        assert found["fill"] >= sizing.WANTED


def test_the_small_preset_is_the_committed_data():
    pytest.importorskip("gstools")
    from gpusampler import GWPatchDataset
    from gpusampler.demo.embedded import small_data

    dataset = GWPatchDataset(small_data(), 6, 1, stride=1)
    assert sizing.patch_points("small")["core and ghost"] == [*dataset.patch_costs().values()]
    assert sizing.samples_of(60) * 9 == len(dataset)


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
    workload = peers_sizing.Workload("tiny", lengths, np.array([0, 0, 1, 1, 1]), 10)
    found = peers_sizing.filled(workload, [[0, 1], [2, 3], [3, 1], [], [4]])
    assert found["batches"] == 5
    assert found["empty_batches"] == 1
    assert found["fill"] == pytest.approx((3 + 7 + 6 + 11) / 40)
    assert found["fill_padded"] == pytest.approx((4 + 8 + 8 + 11) / 40)
    assert found["padding"] == pytest.approx(1 - 27 / 31)
    assert (found["over_budget"], found["over_budget_padded"]) == (1, 1)
    assert (found["most"], found["most_padded"]) == (11, 11)
    assert (found["lost"], found["repeated"], found["mixed"]) == (0, 2, 1)
    assert (found["too_long"], found["too_long_in_batches"]) == (1, 1)
    assert peers_sizing.filled(workload, [[0], [1]])["lost"] == 2


def test_our_batches_of_lengths_are_within_the_budget():
    workload = peers_sizing.some_too_long(3000)
    (found,) = peers_sizing.compare(workload, rounds=1, peers=peers_sizing.PEERS[:1])
    assert found["name"].startswith("gpusampler")
    assert found["over_budget"] == found["over_budget_padded"] == 0
    assert found["mixed"] == found["lost"] == found["repeated"] == 0
    assert (found["too_long"], found["too_long_in_batches"]) == (3, 0)
    assert found["len"] == found["batches"] == found["second_epoch_batches"]
    assert found["second_epoch_differs"]
    assert found["resume"] == "the same batches"


def test_peers_that_are_there_are_run():
    workload = peers_sizing.in_patches(1500, patches=5)
    for peer in peers_sizing.PEERS[1:]:
        if peers_sizing.version(peer.package) is None:
            continue
        found = peers_sizing.measured(peer, workload, rounds=1)
        assert found["lost"] == found["repeated"] == 0
        assert found["resume"] in ("no state_dict", "the same batches")
        assert 0 < found["fill"] <= 1


@pytest.mark.slow("the whole benchmark, on few samples")
def test_the_whole_is_printed_written_and_drawn(monkeypatch, capsys, tmp_path):
    pytest.importorskip("gstools")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sizing, "FIXED", (2, 8))
    monkeypatch.setattr(sizing, "STEPS", (365,))
    monkeypatch.setattr(peers_sizing, "ROUNDS", 1)
    monkeypatch.setattr(sizing, "SAMPLES", 1500)
    # Whether or not it is installed here.
    monkeypatch.setitem(peers_sizing._MODULES, peers_sizing.LHOTSE, "no_such_module")
    picture = tmp_path / "sizing.png"
    sizing.main(["memory", "peers", "--out", str(tmp_path)])
    (written,) = tmp_path.glob("sizing-*.json")
    draw_sizing([str(written), str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "| lhotse SimpleCutSampler | lhotse is not installed |" in out
    assert "| small, core, 365 steps | 46 to 454 | 286 | 324 | 80 |" in out
    found = json.loads(written.read_text())
    assert set(found) == {"machine", "memory", "peers"}
    assert {"date", "numpy", "python", "torch"} <= set(found["machine"])
    assert len(found["memory"]) == 2 * 2 * 2
    assert {one["fixed"] for one in found["memory"]["small, core, 60 steps"]["by_size"]} == {2, 8}
    names = [peer["name"] for peer in found["peers"]["workloads"][0]["peers"]]
    assert names == [peer.name for peer in peers_sizing.PEERS]
    assert found["peers"]["versions"]["lhotse"] is None


def test_wrong_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        sizing.main(["nonsense"])
    assert "parts must be among memory, training, peers, got nonsense" in capsys.readouterr().err
