"""``python -m docs.figures.steps``: what it prints is what ranks would wait."""

from __future__ import annotations

import numpy as np
import pytest

from docs.figures import steps as bench
from gpusampler import PatchGroups
from support.paths import ROOT
from support.strategies import quiet

STEPS = ("free", "balanced", "same_patch")


@pytest.mark.parametrize("steps", STEPS)
def test_waiting_is_what_ranks_wait(steps):
    counts, costs = [90, 33, 50, 7], np.array([1.0, 4.5, 2.0, 9.0])
    workload = bench.Workload(PatchGroups.from_counts(counts), costs, 4)
    width = {} if steps == "free" else {"step_width": 3}
    costing = {"patch_costs": costs} if steps == "balanced" else {}
    patch_of = np.repeat(range(4), counts)
    took, batches = [], 0
    for epoch in range(2):
        ranks = [
            quiet(patch_of, 4, seed=0, num_replicas=3, rank=r, steps=steps, **width, **costing)
            for r in range(3)
        ]
        for sampler in ranks:
            sampler.set_epoch(epoch)
        together = [*zip(*ranks, strict=True)]
        batches = ranks[0].plan.num_batches
        took.append(sum(max(costs[patch_of[b]].sum() for b in step) for step in together))
    waiting = bench.waiting(workload, steps, 3, epochs=2)
    assert waiting.time == pytest.approx(np.mean(took) / (np.array(counts) @ costs / 3))
    own_batches = 23 + 9 + 13 + 2
    assert waiting.padding == pytest.approx(batches / own_batches - 1)


def test_ranks_whose_batches_all_cost_the_same_do_not_wait():
    workload = bench.Workload(PatchGroups.from_counts([32, 64]), np.array([2.0, 2.0]), 4)
    for steps in STEPS:
        assert bench.waiting(workload, steps, 8) == (1.0, 0.0)


def test_the_page_shows_the_table_of_the_groundwater_patches():
    """The other rows take longer; all change together with the permutation."""
    pytest.importorskip("torch")
    page = (ROOT / "docs" / "how-to" / "balanced-steps.md").read_text().splitlines()
    rows = [bench.row_of(*row) for row in bench.table(bench.cases(()))]
    assert len(rows) == 3
    assert set(rows) <= set(page)


def test_the_table_and_the_picture(capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "PATCHES", (12,))
    monkeypatch.setattr(bench, "DRAWS", 1)
    monkeypatch.setattr(bench, "cases", lambda own=bench.cases: own((12,)))
    path = tmp_path / "steps.png"
    bench.main(["--picture", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("| lognormal", "| groundwater"))
    ]
    assert len(rows) == 2 * 2 + 3
    for _, ranks, free, balanced, same, padding in rows:
        assert 1 <= float(balanced) < float(free) < int(ranks)
        assert float(same) > 1
        assert padding.endswith("%")
