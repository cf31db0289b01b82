"""The picture of an epoch, read back from its artists, against the batches of iteration."""

from __future__ import annotations

import json
import pickle
import sys
import tracemalloc
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpusampler import CostBudget, PatchBatchSampler, PatchGroups, Temperature
from gpusampler.sampler import epoch_batches
from support.processes import run_python
from support.strategies import quiet

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from gpusampler.sampler.plot import MAX_BINS, MAX_COLUMNS, MAX_ROWS, plot_epoch

EPOCH = 3
IDS = np.random.default_rng(0).permutation(np.repeat([5, -2, 9, 40], [30, 7, 50, 3]))
NAMES = np.array(["$x_1$", "$\\none$", "a\nb", "c" * 90])[np.unique(IDS, return_inverse=True)[1]]
COUNTS = np.random.default_rng(1).integers(1, 60, 300)
MANY = np.random.default_rng(2).permutation(np.repeat(np.arange(300), COUNTS))
POINTS = {5: 10, -2: 35, 9: 70, 40: 22}
LENGTHS = np.random.default_rng(2).integers(1, 40, IDS.size)

CASES: dict[str, dict[str, Any]] = {
    "keep": {},
    "drop": {"partial": "drop"},
    "pad": {"partial": "pad"},
    "even": {"partial": "even"},
    "min_partial": {"min_partial": 2},
    "unmixed": {"interleave": False},
    "balanced": {"steps": "balanced", "num_replicas": 3},
    "same patch": {"steps": "same_patch", "num_replicas": 2},
    "same patch, dropped": {"steps": "same_patch", "step_width": 2, "uneven": "drop"},
    "costliest first": {"costliest_first": True},
    "repeated on ranks": {"num_replicas": 5},
    "dropped on ranks": {"num_replicas": 5, "uneven": "drop"},
    "more ranks than batches": {"num_replicas": 40, "partial": "pad"},
    "weights": {"weights": {5: 1, -2: 3, 9: 0, 40: 2}, "epoch_batches": 50, "partial": "pad"},
    "temperature": {"weights": Temperature(2), "num_replicas": 2},
    "fewer batches than patches": {"source": MANY, "epoch_batches": 70},
    "sizes by patch": {"batch_size": {5: 3, -2: 20, 9: 7, 40: 1}, "partial": "pad"},
    "names": {"source": NAMES},
    "many patches": {"source": MANY, "batch_size": 8, "partial": "pad"},
    "budget": {"batch_size": CostBudget(200, cost=POINTS)},
    "budget, padded": {"batch_size": CostBudget(200, cost=POINTS), "partial": "pad"},
    "over the budget": {"batch_size": CostBudget(50, cost=POINTS, over_budget="skip")},
    "budget of lengths": {"batch_size": CostBudget(150, sample_costs=LENGTHS), "num_replicas": 2},
}


class Row(NamedTuple):
    """A batch as iteration yields it."""

    patch: int
    valid: int
    size: int
    cost: float


def ranks_of(**settings: Any) -> list[PatchBatchSampler]:
    settings = {"source": IDS, "batch_size": 4, "seed": 7, "num_replicas": 1, **settings}
    return [quiet(rank=rank, **settings) for rank in range(settings["num_replicas"])]


def iterated(ranks: list[PatchBatchSampler], epoch: int = EPOCH) -> list[Row]:
    """The batches of all ranks in the order of their slots."""
    plan = ranks[0].plan
    patches = {label: place for place, label in enumerate(plan.labels.tolist())}
    units = plan.units
    unit_of_sample = np.zeros(plan.groups.source_size, np.int64)
    for unit in range(units.groups.num_patches):
        start, count = int(units.groups.starts[unit]), int(units.groups.counts[unit])
        unit_of_sample[np.asarray(units.groups.order)[start : start + count]] = unit
    rows = []
    for step in zip(*(rank.batches(epoch) for rank in ranks), strict=True):
        for batch in step:
            unit = unit_of_sample[batch.indices[0]]
            cost = 0.0 if units.costs is None else float(units.costs[unit])
            rows.append(Row(patches[batch.patch_id], batch.valid, len(batch.indices), cost))
    return rows


def panels(figure: Any) -> list[Any]:
    """The panels, row by row, the left before the right."""
    return figure.get_axes()


def widths(axes: Any, container: int = 0) -> list[float]:
    return [bar.get_width() for bar in axes.containers[container]]


def steps(axes: Any, which: int = 0) -> np.ndarray:
    return np.asarray(axes.patches[which].get_data().values)


def sums(keys: Any, values: Any, count: int) -> np.ndarray:
    total = np.zeros(count)
    for key, value in zip(keys, values, strict=True):
        total[key] += value
    return total


@pytest.fixture(params=CASES)
def drawn(request) -> tuple[list[PatchBatchSampler], list[Row], Figure]:
    ranks = ranks_of(**CASES[request.param])
    return ranks, iterated(ranks), plot_epoch(ranks[-1], EPOCH)


def test_patches_are_those_of_the_batches(drawn):
    ranks, rows, figure = drawn
    num_patches = ranks[0].plan.groups.num_patches
    left, right = panels(figure)[:2]
    patches_to_a_row = -(-num_patches // MAX_ROWS)
    batches_to_a_column = -(-len(rows) // MAX_COLUMNS)
    cells = np.asarray(left.collections[0].get_array())
    expected = np.zeros((-(-num_patches // patches_to_a_row), -(-len(rows) // batches_to_a_column)))
    for slot, row in enumerate(rows):
        expected[row.patch // patches_to_a_row, slot // batches_to_a_column] += 1
    np.testing.assert_array_equal(cells, expected)

    at = [row.patch // patches_to_a_row for row in rows]
    counted = sums(at, [row.valid for row in rows], len(expected))
    padding = sums(at, [row.size - row.valid for row in rows], len(expected))
    np.testing.assert_array_equal(widths(right), counted)
    if padding.any():
        np.testing.assert_array_equal(widths(right, 1), padding)
        assert [bar.get_x() for bar in right.containers[1]] == counted.tolist()
    else:
        assert len(right.containers) == 1
    if patches_to_a_row == 1:
        assert [int(text.get_text()) for text in right.texts] == expected.sum(axis=1).tolist()


def test_sizes_are_those_of_the_batches(drawn):
    _, rows, figure = drawn
    left, right = panels(figure)[2:4]
    to_a_column = -(-len(rows) // MAX_COLUMNS)
    columns = [rows[start : start + to_a_column] for start in range(0, len(rows), to_a_column)]
    counted = [np.mean([row.valid for row in column]) for column in columns]
    np.testing.assert_allclose(steps(left), counted)
    if any(row.size > row.valid for row in rows):
        np.testing.assert_allclose(steps(left, 1), [np.mean([r.size for r in c]) for c in columns])
    else:
        assert len(left.patches) == 1
    bars = right.containers[0]
    for bar in bars:
        low, high = bar.get_y(), bar.get_y() + bar.get_height()
        assert bar.get_width() == sum(low < row.valid < high for row in rows)
    assert sum(widths(right)) == len(rows)


def test_the_heading_counts(drawn):
    ranks, rows, figure = drawn
    heading = figure.get_suptitle()
    samples, places = sum(row.valid for row in rows), sum(row.size for row in rows)
    present = len({row.patch for row in rows})
    num_patches = ranks[0].plan.groups.num_patches
    assert heading.startswith(f"Epoch {EPOCH}: {len(rows):,} batches from {present} ")
    assert (f" of {num_patches} patches," in heading) == (present < num_patches)
    assert f", {samples:,} samples, " in heading
    share = f"{100 * (1 - samples / places):.1f} % padding"
    assert (share if places > samples else "no padding") in heading
    assert (f"{len(ranks)} ranks together" in heading) == (len(ranks) > 1)
    legend = [text.get_text() for each in figure.legends for text in each.get_texts()]
    assert ("padding" in legend) == (places > samples)


def test_costs_are_those_of_the_batches(drawn):
    ranks, rows, figure = drawn
    max_cost = ranks[0].plan.units.max_cost
    if max_cost is None:
        assert len(panels(figure)) == 4
        return
    left, right = panels(figure)[4:]
    shares = np.array([100 * row.valid * row.cost / max_cost for row in rows])
    np.testing.assert_allclose(steps(left), shares)
    assert [100, 100] in [list(line.get_ydata()) for line in left.lines]
    if any(row.size > row.valid for row in rows):
        np.testing.assert_allclose(steps(left, 1), [100 * r.size * r.cost / max_cost for r in rows])
    np.testing.assert_array_equal(widths(right), np.histogram(shares, MAX_BINS, (0, 100))[0])
    assert f"{shares.mean():.1f} % of max_cost={max_cost:g} on average" in left.get_title()


@pytest.mark.parametrize("points", [POINTS, {5: 0.125, -2: 0.375, 9: 1, 40: 0.25}])
def test_one_size_for_all_is_that_of_a_sampler(points):
    max_cost = 3.5 * max(points.values())
    ranks = ranks_of(batch_size=CostBudget(max_cost, cost=points))
    fixed = ranks_of(batch_size=3)  # the largest with 3 * max(points) <= max_cost
    shares = [
        100 * batch.valid * points[batch.patch_id] / max_cost for batch in fixed[0].batches(EPOCH)
    ]
    left, right = panels(plot_epoch(ranks[0], EPOCH))[4:]
    outline = right.patches[-1].get_data()
    np.testing.assert_array_equal(outline.values, np.histogram(shares, outline.edges)[0])
    assert (
        f"One size for all, 3 (red): {np.mean(shares):.1f} %, and {len(fixed[0])} batches instead "
        f"of {len(ranks[0])}" in left.get_title()
    )


def test_one_size_for_all_lengths():
    budget = CostBudget(150, sample_costs=LENGTHS)
    (sampler,) = ranks_of(batch_size=budget)
    size = int(150 // LENGTHS.max())
    (fixed,) = ranks_of(batch_size=size)
    rows = iterated([sampler])
    used = sum(row.valid * row.cost for row in rows)
    left = panels(plot_epoch(sampler, EPOCH))[4]
    share = 100 * used / (150 * len(fixed))
    assert f"One size for all, {size} (red): {share:.1f} %, and {len(fixed)} " in left.get_title()


def test_repeats_of_an_evaluation_do_not_count():
    ranks = [
        PatchBatchSampler.for_evaluation(IDS, 4, num_replicas=5, rank=rank) for rank in range(5)
    ]
    rows = iterated(ranks, 0)
    repeats = [row.size for row in rows if row.valid == 0]
    assert len(rows) % 5 == 0
    assert repeats
    figure = plot_epoch(ranks[2])
    assert sum(widths(panels(figure)[1])) == IDS.size
    assert sum(widths(panels(figure)[1], 1)) == sum(repeats)
    assert widths(panels(figure)[3])[0] == len(repeats)
    assert f", {IDS.size} samples, " in figure.get_suptitle()


def test_labels_are_ids_or_names_as_they_are():
    def labels(**settings: Any) -> list[str]:
        figure = plot_epoch(ranks_of(**settings)[0])
        figure.savefig(BytesIO())  # no name is read as a formula
        return [text.get_text() for text in panels(figure)[0].get_yticklabels()]

    assert labels() == ["-2", "5", "9", "40"]
    assert labels(source=NAMES) == ["$\\none$", "$x_1$", "a b", "c" * 15 + "…"]
    assert labels(source=MANY) == [str(first) for first in range(0, 300, 40)]


def test_the_default_epoch_is_the_next():
    (sampler,) = ranks_of()
    assert plot_epoch(sampler).get_suptitle().startswith("Epoch 0:")
    sampler.set_epoch(5)
    assert plot_epoch(sampler).get_suptitle().startswith("Epoch 5:")
    cells = [panels(plot_epoch(sampler, epoch))[0].collections[0].get_array() for epoch in (5, 6)]
    assert (cells[0] != cells[1]).any()


@pytest.mark.parametrize("settings", [{}, {"interleave": False}, {"partial": "even"}])
def test_the_sampler_does_not_change(settings):
    (sampler, *_), (untouched, *_) = ranks_of(**settings), ranks_of(**settings)
    running, expected = iter(sampler), iter(untouched)
    for _ in range(3):
        assert next(running) == next(expected)
    before = json.dumps(sampler.state_dict())
    plot_epoch(sampler, 9)
    plot_epoch(sampler)
    assert json.dumps(sampler.state_dict()) == before
    assert sampler.epoch == untouched.epoch
    assert list(running) == list(expected)
    assert list(sampler) == list(untouched)


def test_bad_arguments():
    (sampler,) = ranks_of()
    with pytest.raises(ValueError, match=r"epoch must be >= 0, got -1"):
        plot_epoch(sampler, -1)
    with pytest.raises(TypeError, match="epoch"):
        plot_epoch(sampler, 1.5)
    with pytest.raises(TypeError, match="sampler must be a PatchBatchSampler, got EpochPlan"):
        plot_epoch(sampler.plan)
    with pytest.raises(TypeError, match="figure must be a matplotlib Figure, got str"):
        plot_epoch(sampler, figure="epoch.png")


def test_into_a_figure_or_a_part_of_one():
    (sampler,) = ranks_of(partial="pad")
    figure = Figure(figsize=(8, 5))
    assert plot_epoch(sampler, figure=figure) is figure
    halves = Figure(figsize=(16, 5), layout="constrained").subfigures(1, 2)
    for epoch, half in enumerate(halves):
        assert plot_epoch(sampler, epoch, figure=half) is half
        assert len(half.get_axes()) == 4
    halves[0].figure.savefig(BytesIO())


def test_a_notebook_displays_it():
    figure = plot_epoch(ranks_of()[0])
    # IPython asks for this method unless pyplot has registered its own.
    assert figure._repr_png_().startswith(b"\x89PNG\r\n\x1a\n")
    assert pickle.loads(pickle.dumps(figure)).get_suptitle() == figure.get_suptitle()


def test_neither_pyplot_nor_torch_is_imported():
    code = (
        "import sys; from gpusampler import PatchBatchSampler\n"
        "from gpusampler.sampler.plot import plot_epoch\n"
        "plot_epoch(PatchBatchSampler([1, 1, 2], 2, seed=0))._repr_png_()\n"
        "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)"
    )
    run_python("-c", code)


def test_without_matplotlib(monkeypatch):
    monkeypatch.delitem(sys.modules, "gpusampler.sampler.plot")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install matplotlib"):
        import gpusampler.sampler.plot  # noqa: F401


# Large plans


def test_a_million_patches_take_few_artists_and_little_memory():
    counts = np.full(10**6, 3)
    counts[:5] = 1000
    sampler = quiet(PatchGroups.from_counts(counts), 4, seed=0)
    tracemalloc.start()
    try:
        figure = plot_epoch(sampler)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(figure.findobj()) < 3000
    assert peak < 120 << 20
    assert sum(widths(panels(figure)[1])) == counts.sum()
    assert f"{len(sampler):,} batches from 1,000,000 patches, " in figure.get_suptitle()


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_longer_epoch_is_estimated_from_a_sample(monkeypatch, shuffle):
    # Every patch has a full batch and a short one: every second batch is full if unshuffled.
    counts = np.full(50_000, 12)
    sampler = PatchBatchSampler(
        PatchGroups.from_counts(counts), 8, shuffle_patches=shuffle, seed=0, partial="pad"
    )
    exact = plot_epoch(sampler)
    monkeypatch.setattr(epoch_batches, "MAX_LOCATED", 60_000)
    estimate = plot_epoch(sampler)
    assert "estimated" not in exact.get_suptitle()
    assert estimate.get_suptitle().endswith("\nestimated from 50,000 batches, evenly drawn")
    for left, right in zip(panels(exact)[1::2], panels(estimate)[1::2], strict=True):
        np.testing.assert_allclose(widths(left), widths(right), rtol=0.1)
    shown, true = panels(estimate)[2], panels(exact)[2]
    np.testing.assert_allclose(steps(shown), steps(true), rtol=0.15)
    assert "% padding" in estimate.get_suptitle()


def test_an_estimate_of_one_size_for_all(monkeypatch):
    budget = CostBudget(64, cost=np.resize([1.0, 2.0, 8.0], 300))
    sampler = PatchBatchSampler(PatchGroups.from_counts(np.full(300, 4000)), budget, seed=0)
    titles = [panels(plot_epoch(sampler))[4].get_title()]
    monkeypatch.setattr(epoch_batches, "MAX_LOCATED", 20_000)
    titles.append(panels(plot_epoch(sampler))[4].get_title())
    exact, estimate = (int(title.split(" and ")[1].split()[0].replace(",", "")) for title in titles)
    assert exact == 300 * 500
    assert estimate == pytest.approx(exact, rel=0.03)


def test_more_batches_than_fit_in_32_bits():
    groups = PatchGroups.from_counts(np.full(1000, 10**9))
    sampler = PatchBatchSampler(groups, 2, seed=0)
    figure = plot_epoch(sampler, 2**63 - 1)
    assert "500,000,000,000 batches from 1,000 patches" in figure.get_suptitle()
    assert sum(widths(panels(figure)[1])) == pytest.approx(10**12)
