"""``python -m benchmarks.floors``: what its floors do is the least work, over the same batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpusampler import PatchBatchSampler

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import floors

    return floors


@pytest.mark.parametrize("batch_size", [8, 100])
def test_floors_are_of_our_own_batches(bench, monkeypatch, batch_size):
    monkeypatch.setattr(bench, "CHUNK", 256)
    ids = np.random.default_rng(1).integers(0, 7, 3000)
    floors = bench.Floors(ids, batch_size)
    drawn = list(PatchBatchSampler(ids, batch_size, seed=0))
    assert floors.lists == drawn
    assert floors.samples.tolist() == [sample for batch in drawn for sample in batch]
    # What the gather reads is what is drawn.
    assert np.array_equal(floors.order[floors.places], floors.samples)
    whole = ids.size // batch_size * batch_size
    handed_out = np.concatenate(list(floors._tables())).ravel()
    assert np.array_equal(handed_out, floors.samples[:whole])


def test_the_table_has_ours_beside_the_floors(bench, capsys):
    bench.main(["--samples", "5000", "--patches", "10", "--rounds", "1", "--markdown"])
    printed = capsys.readouterr().out
    assert "5000 samples, 10 patches" in printed
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {5}
    compared = [row for row in rows[2:] if row[3].strip()]
    assert len(compared) == 2 * len(bench.BATCH_SIZES)
    for _, _, floor, ours, ratio in compared:
        assert float(ratio) == pytest.approx(float(ours) / float(floor), rel=0.02)


def test_a_ratio_is_ours_by_the_floor(bench):
    line = bench.Line(8, "gather + lists of int", 2.0, 5.0)
    assert line.ratio == 2.5
    assert bench.Line(8, "write int64", 2.0).ratio is None
    assert bench.text_of([line], markdown=True).splitlines()[2].endswith("| 2 | 5 | 2.50 |")
    assert "2.50" in bench.text_of([line], markdown=False)
