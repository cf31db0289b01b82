"""``python -m benchmarks.floors``: what its floors do is the least work, over the same batches."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import floors
from gpusampler import PatchBatchSampler


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


def test_the_table_has_ours_beside_the_floors(capsys, tmp_path):
    picture = tmp_path / "floors.png"
    small = ["--samples", "5000", "--patches", "10", "--rounds", "1"]
    floors.main([*small, "--markdown", "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert "5000 samples, 10 patches" in printed
    table = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    assert [int(size) for size in table[0][1:]] == list(floors.BATCH_SIZES)
    rows = [[float(cell) for cell in row[1:]] for row in table[2:]]
    for floor, ours, ratio in (rows[2:5], rows[5:8]):
        assert ratio == pytest.approx([a / b for a, b in zip(ours, floor, strict=True)], rel=0.02)
    assert picture.stat().st_size > 1000


def test_floors_add_up():
    floor = floors.Found(8, 1.0, 10.0, 2.0, 30.0, 20.0, 24.0, 100.0, None)
    assert (floor.numpy_floor, floor.lists_floor) == (12.0, 40.0)
    rows = {tuple(row) for row in floors.rows_of([floor])}
    assert {("ours / floor", "2.00"), ("ours / floor", "2.50"), ("ours", "24")} <= rows
    assert "2.50" in floors.text_of(floors.rows_of([floor]), markdown=False)
