"""Picture of an epoch: batches by patch, their sizes, padding, and costs under a budget.

Importing this module imports matplotlib, but neither pyplot nor a backend with windows.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.sampler.batch_sampler import PatchBatchSampler
from gpusampler.sampler.epoch_batches import Binning, EpochBatches, FixedSize
from gpusampler.sampler.state import check_epoch

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, MaxNLocator
except ImportError as error:
    raise ImportError("gpusampler.sampler.plot needs matplotlib: pip install matplotlib") from error

MAX_ROWS = 40
MAX_COLUMNS = 150
MAX_BINS = 40
"""Maximum numbers of rows of patches, columns of slots, and bins of sizes or costs."""
_MAX_LABELED_ROWS = 24
_MAX_GRID_COLUMNS = 60
_MAX_LABEL_LENGTH = 16

_COUNTED, _PADDING, _FIXED = "#2a7f77", "#d9a441", "#b3502e"
_SHADES = LinearSegmentedColormap.from_list("batches", ["#f3f3f0", "#a9cdc8", _COUNTED, "#123c38"])


class EpochFigure(Figure):
    """A figure that notebooks display although it was made without pyplot."""

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png", dpi=100)
        return png.getvalue()


def plot_epoch(
    sampler: PatchBatchSampler, epoch: int | None = None, *, figure: Any = None
) -> Figure:
    """Draw the batches of an epoch: their patches, sizes, padding, and costs under a budget.

    The left side follows the epoch from its first batch to its last, over all ranks. The right side
    sums up by patch, size and cost. With many patches or batches, ranges of them share a row or a
    column. With a `CostBudget`, the last row compares the batches with those of one size for all,
    the largest that does not exceed ``max_cost`` either. With ``sample_costs``, a sample has the
    largest cost in its cost bin.

    Only the batches' patches and sizes are computed, not their samples. If an epoch has more than
    4,194,304 batches, a sample of them is drawn evenly, and the title says that numbers are
    estimates. The sampler's epoch and position do not change.

    Parameters
    ----------
    sampler : PatchBatchSampler
    epoch : int, optional
        0 .. 2**63 - 1. Default: ``sampler.epoch``.
    figure : matplotlib Figure or SubFigure, optional
        Figure to draw into. Default: a new one, made without pyplot.

    Returns
    -------
    matplotlib Figure
        ``figure``, or a new one, which notebooks display; ``savefig`` writes it to a file.

    Raises
    ------
    TypeError
        If ``sampler`` is not a `PatchBatchSampler`, ``figure`` is not a Figure, or ``epoch`` is not
        an integer.
    ValueError
        If ``epoch`` is out of range.
    ImportError
        If matplotlib is not installed, when this module is imported.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
    >>> figure = plot_epoch(sampler, epoch=3)
    >>> print(figure.get_suptitle())
    Epoch 3: 3 batches from 2 patches, 5 samples, no padding
    """
    if not isinstance(sampler, PatchBatchSampler):
        raise TypeError(f"sampler must be a PatchBatchSampler, got {type(sampler).__name__}")
    if figure is not None and not isinstance(figure, FigureBase):
        raise TypeError(f"figure must be a matplotlib Figure, got {type(figure).__name__}")
    epoch = check_epoch(sampler.epoch if epoch is None else epoch)
    batches = EpochBatches.of(sampler._tracker.shard_of(epoch))
    num_rows = 2 if batches.cost is None else 3
    if figure is None:
        figure = EpochFigure(figsize=(10, 2.8 + 1.9 * num_rows), layout="constrained")
    axes: Any = figure.subplots(
        num_rows,
        2,
        sharey="row",
        width_ratios=[3.2, 1],
        height_ratios=[1.9, *[1] * (num_rows - 1)],
    )
    figure.suptitle(_heading(sampler, epoch, batches), fontsize=11)
    _draw_patches(sampler.plan, batches, *axes[0])
    _draw_sizes(sampler.plan, batches, *axes[1])
    if batches.cost is not None:
        _draw_costs(sampler.plan, batches, *axes[2])
    columns = Binning.at_most(MAX_COLUMNS, batches.num_slots)
    shared = "" if columns.width == 1 else f" (a column is {columns.width:,} batches)"
    axes[-1, 0].set_xlabel(f"batches in the order of the epoch{shared}", fontsize=9)
    for panel in axes[:, 0]:
        panel.set_xlim(0, batches.num_slots)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.align_ylabels(axes[:, 0])
    _draw_legend(figure, batches)
    drawn: Figure = figure
    return drawn


def _heading(sampler: PatchBatchSampler, epoch: int, batches: EpochBatches) -> str:
    num_patches, present = sampler.plan.groups.num_patches, np.unique(batches.patch).size
    share = f"{present:,} of " if present < num_patches else ""
    samples, padding = int(batches.length.sum()), int(batches.padding.sum())
    parts = [
        f"{_number(batches.num_slots, 'batch')} from {share}{_number(num_patches, 'patch')}",
        _number(round(samples * batches.scale), "sample"),
        f"{100 * padding / (samples + padding):.1f} % padding" if padding else "no padding",
    ]
    if sampler.num_replicas > 1:
        parts.append(f"{sampler.num_replicas:,} ranks together")
    heading = f"Epoch {epoch}: {', '.join(parts)}"
    if batches.scale > 1:
        heading += f"\nestimated from {batches.slot.size:,} batches, evenly drawn"
    return heading


def _draw_patches(plan: EpochPlan, batches: EpochBatches, left: Axes, right: Axes) -> None:
    """Draw which patch each batch is from, and the samples of each patch."""
    columns = Binning.at_most(MAX_COLUMNS, batches.num_slots)
    rows = Binning.at_most(MAX_ROWS, plan.groups.num_patches)
    row = batches.patch // rows.width
    cells = row * columns.num_bins + batches.slot // columns.width
    counts = np.bincount(cells, minlength=rows.num_bins * columns.num_bins)
    counts = counts.reshape(rows.num_bins, columns.num_bins)
    left.pcolormesh(
        columns.edges,
        rows.edges,
        counts,
        cmap=_SHADES,
        vmin=0,
        # A single batch has the colour of the bars.
        vmax=max(1.5, float(counts.max())),
        edgecolors="white" if columns.num_bins <= _MAX_GRID_COLUMNS else "none",
        linewidth=0.8,
    )
    left.invert_yaxis()
    most = round(counts.max() * batches.scale)
    darker = f" (darker: more batches, at most {most:,})" if most > 1 else ""
    left.set_title(f"Patch of each batch{darker}", fontsize=10)
    left.set_ylabel("patch" if rows.width == 1 else f"patch ({rows.width:,} to a row)", fontsize=9)
    every = -(-rows.num_bins // (_MAX_LABELED_ROWS if rows.width == 1 else 8))
    first = rows.edges[:-1]
    # Names of patches are no formulas, whatever characters they contain.
    labels = [_label(patch) for patch in plan.labels[first[::every]].tolist()]
    middles = (first + rows.edges[1:]) / 2
    left.set_yticks(middles[::every], labels, parse_math=False)

    scale, num_rows, heights = batches.scale, rows.num_bins, 0.8 * np.diff(rows.edges)
    samples = scale * np.bincount(row, batches.length, num_rows)
    padding = scale * np.bincount(row, batches.padding, num_rows)
    bars = right.barh(middles, samples, heights, color=_COUNTED)
    if padding.any():
        bars = right.barh(middles, padding, heights, left=samples, color=_PADDING)
    unit = "samples"
    if rows.num_bins <= _MAX_LABELED_ROWS and rows.width == 1:
        num_batches = np.rint(scale * np.bincount(row, minlength=num_rows)).astype(np.int64)
        right.bar_label(bars, [f"{count:,}" for count in num_batches], padding=3, fontsize=7)
        right.margins(x=0.15)
        unit += " (number: batches)"
    right.set_xlabel(unit, fontsize=9)
    right.set_title("Samples by patch", fontsize=10)
    _set_scale(right, log=False)


def _draw_sizes(plan: EpochPlan, batches: EpochBatches, left: Axes, right: Axes) -> None:
    """Draw the number of samples in batches, in order and by size."""
    _draw_amounts(left, batches, batches.length, batches.padding)
    bins = Binning.at_most(MAX_BINS, plan.max_batch_size + 1)
    counts = batches.scale * np.bincount(batches.length // bins.width, minlength=bins.num_bins)
    edges = bins.edges - 0.5
    right.barh((edges[:-1] + edges[1:]) / 2, counts, 0.9 * np.diff(edges), color=_COUNTED)
    left.set_ylim(0, 1.06 * (plan.max_batch_size + 0.5))
    left.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    left.set_ylabel("samples", fontsize=9)
    mean = batches.length.mean()
    left.set_title(f"Samples in a batch: {mean:,.1f} on average", fontsize=10)
    right.set_title("Batches by samples", fontsize=10)
    right.set_xlabel("batches", fontsize=9)
    _set_scale(right, log=_is_wide(counts))


def _draw_costs(plan: EpochPlan, batches: EpochBatches, left: Axes, right: Axes) -> None:
    """Draw the cost of batches as a share of the budget, beside batches of one size for all."""
    max_cost = plan.units.max_cost
    assert batches.cost is not None
    assert max_cost is not None
    costs = batches.length * batches.cost
    fixed = FixedSize.of(batches, costs, max_cost)
    _draw_amounts(
        left, batches, 100 * costs / max_cost, 100 * batches.padding * batches.cost / max_cost
    )
    left.axhline(100, color="0.3", linestyle="--", linewidth=1)
    edges = np.linspace(0, 100, MAX_BINS + 1)
    counts = batches.scale * np.histogram(100 * costs / max_cost, edges)[0]
    # Mean costs may exceed the budget by a rounding error.
    shares = np.minimum(100 * fixed.costs / max_cost, 100)
    fixed_counts = np.histogram(shares, edges, weights=fixed.times)[0]
    right.barh((edges[:-1] + edges[1:]) / 2, counts, 0.9 * np.diff(edges), color=_COUNTED)
    right.stairs(fixed_counts, edges, orientation="horizontal", color=_FIXED, linewidth=1.3)
    left.set_ylim(0, 108)
    left.set_ylabel("% of max_cost", fontsize=9)
    mean = 100 * costs.mean() / max_cost
    fixed_mean = batches.scale * 100 * costs.sum() / (fixed.num_batches * max_cost)
    left.set_title(
        f"Cost of a batch: {mean:.1f} % of max_cost={max_cost:,.6g} on average\n"
        f"One size for all, {fixed.size:,} (red): {fixed_mean:.1f} %, and "
        f"{_number(fixed.num_batches, 'batch')} instead of {batches.num_slots:,}",
        fontsize=10,
    )
    right.set_title("Batches by cost", fontsize=10)
    right.set_xlabel("batches", fontsize=9)
    _set_scale(right, log=_is_wide(np.append(counts, fixed_counts)))


def _draw_amounts(axes: Axes, batches: EpochBatches, counted: Any, padding: Any) -> None:
    """Draw what counts in each batch and what is padding, as means of the batches in a column."""
    columns = Binning.at_most(MAX_COLUMNS, batches.num_slots)
    column, edges = batches.slot // columns.width, columns.edges
    num_batches = np.bincount(column)
    heights = np.bincount(column, counted) / num_batches
    axes.stairs(heights, edges, fill=True, color=_COUNTED)
    if batches.padding.any():
        tops = heights + np.bincount(column, padding) / num_batches
        axes.stairs(tops, edges, baseline=heights, fill=True, color=_PADDING)
    if columns.num_bins <= _MAX_GRID_COLUMNS:
        for edge in edges[1:-1].tolist():
            axes.axvline(edge, color="white", linewidth=0.8)


def _draw_legend(figure: Any, batches: EpochBatches) -> None:
    handles = [Patch(color=_COUNTED, label="samples that count")]
    if batches.padding.any():
        handles.append(Patch(color=_PADDING, label="padding"))
    if batches.cost is not None:
        handles.append(Patch(fill=False, edgecolor=_FIXED, label="one size for all"))
    if len(handles) > 1:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=len(handles),
            frameon=False,
            fontsize=8,
        )


def _number(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}{'es' if noun.endswith('ch') else 's'}"


def _label(patch: Any) -> str:
    text = " ".join(str(patch).split())
    return text if len(text) <= _MAX_LABEL_LENGTH else f"{text[: _MAX_LABEL_LENGTH - 1]}…"


def _is_wide(counts: NDArray[Any]) -> bool:
    return bool(counts.max() > 100 * counts[counts > 0].min())


def _set_scale(axes: Axes, *, log: bool) -> None:
    """Prepare the x axis of a panel of counts."""
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=0.5)
        return
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
