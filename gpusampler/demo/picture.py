"""The demo's picture: observed and forecast hydraulic head, loss, and the patch of each batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.files import save_png
from gpusampler.demo.head_map import HeadMap
from gpusampler.demo.report import DemoReport, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPOCHS_SHOWN = 4
_NAMED_PATCHES = 20


def draw(report: DemoReport, heads: HeadMap, path: Path) -> None:
    """Draw the report and the head map of one patch to a PNG file."""
    # Without pyplot there is no global state and no display, and the figure needs no close().
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
    figure = Figure(figsize=(11, 7.2), layout=layout)
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1.0])
    upper, lower = halves
    _draw_heads(upper, heads)
    left, right = lower.subplots(1, 2, width_ratios=[1.0, 1.25])
    _draw_loss(left, report.training)
    _draw_batches(lower, right, report.training)
    save_png(figure, path)


def _draw_heads(figure: Any, heads: HeadMap) -> None:
    observed, forecast, error = figure.subplots(1, 3, sharex=True, sharey=True)
    low = float(min(heads.observed.min(), heads.forecast.min()))
    high = float(max(heads.observed.max(), heads.forecast.max()))
    difference = heads.forecast - heads.observed
    max_error = float(np.abs(difference).max()) or 1.0
    shared: dict[str, Any] = {"vmin": low, "vmax": high, "cmap": "viridis"}
    for axes, values, title, scale in (
        (observed, heads.observed, "observed", shared),
        (forecast, heads.forecast, "forecast (GINO)", shared),
        (
            error,
            difference,
            "forecast minus observed",
            {"vmin": -max_error, "vmax": max_error, "cmap": "RdBu_r"},
        ),
    ):
        points = _draw_cells(axes, heads, values, scale)
        axes.set_title(title, fontsize=10)
        axes.set_aspect("equal", adjustable="box")
        axes.margins(0.08)
        axes.set_xlabel("x (m)")
        if axes is not observed:
            figure.colorbar(
                points,
                ax=[observed, forecast] if axes is forecast else axes,
                label="head (m)" if axes is forecast else "error (m)",
                shrink=0.85,
            )
    observed.set_ylabel("y (m)")
    figure.suptitle(
        f"Patch {heads.patch_id}, head in the uppermost cells at held-out step {heads.step}",
        fontsize=11,
    )


def _draw_cells(
    axes: Axes, heads: HeadMap, values: NDArray[np.float64], scale: dict[str, Any]
) -> Any:
    columns, column_index = np.unique(heads.x, return_inverse=True)
    rows, row_index = np.unique(heads.y, return_inverse=True)
    if min(len(columns), len(rows)) > 1 and len(columns) * len(rows) <= 4 * len(values):
        grid = np.full((len(rows), len(columns)), np.nan)
        grid[row_index, column_index] = values
        return axes.pcolormesh(columns, rows, grid, shading="nearest", **scale)
    # The points form no grid, so draw each as a square of about its cell's size, in a panel that
    # is 150 points wide.
    extent = max(float(np.ptp(heads.x)), float(np.ptp(heads.y))) or 1.0
    spacing = extent / np.sqrt(len(values))
    size = float(np.clip(150.0 * spacing / extent, 2.0, 14.0)) ** 2
    return axes.scatter(heads.x, heads.y, c=values, s=size, marker="s", linewidths=0, **scale)


def _draw_loss(axes: Axes, training: Training) -> None:
    from matplotlib.ticker import MaxNLocator

    losses = np.asarray(training.batch_loss)
    per_epoch = len(losses) / training.epochs
    axes.plot(
        (np.arange(len(losses)) + 1) / per_epoch,
        losses,
        color="0.72",
        linewidth=0.8,
        label="each training batch",
    )
    axes.plot(
        np.arange(len(training.probe_loss)),
        training.probe_loss,
        color="tab:red",
        marker="o",
        markersize=4,
        label="probe, held out",
    )
    axes.axhline(
        training.persistence_loss,
        color="tab:blue",
        linestyle="--",
        linewidth=1,
        label="probe, persistence",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log")
    axes.set_xlabel("epochs")
    axes.set_ylabel("mean squared error (changes, scaled)")
    axes.set_title(
        f"Held-out head error: {training.head_rmse:.3f} m, "
        f"persistence {training.head_rmse_persistence:.3f} m",
        fontsize=10,
    )
    axes.legend(fontsize=8, frameon=False)


def _draw_batches(figure: Any, axes: Axes, training: Training) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm, ListedColormap

    epochs = training.batch_patches[:EPOCHS_SHOWN]
    patches = np.unique(np.concatenate([np.asarray(epoch) for epoch in epochs]))
    patch_rows = np.stack([np.searchsorted(patches, np.asarray(epoch)) for epoch in epochs])
    is_named = len(patches) <= _NAMED_PATCHES
    if is_named:
        base = colormaps["tab10" if len(patches) <= 10 else "tab20"]
        colours = [base(index) for index in range(len(patches))]
    else:
        colours = list(colormaps["turbo"](np.linspace(0, 1, len(patches))))
    grid = axes.pcolormesh(
        np.arange(patch_rows.shape[1] + 1),
        np.arange(len(epochs) + 1) + 0.5,
        patch_rows,
        cmap=ListedColormap(colours),
        norm=BoundaryNorm(np.arange(len(patches) + 1) - 0.5, len(patches)),
        edgecolors="white",
        linewidth=0.8 if patch_rows.shape[1] <= 100 else 0.0,
    )
    axes.set_ylim(len(epochs) + 0.5, 0.5)
    axes.set_yticks(range(1, len(epochs) + 1))
    axes.set_ylabel("epoch")
    axes.set_xlabel("batch")
    axes.set_title("Every batch holds one patch; every epoch its own order", fontsize=10)
    if is_named:
        bar = figure.colorbar(grid, ax=axes, ticks=range(len(patches)), label="patch")
        bar.minorticks_off()
        bar.ax.set_yticklabels([str(patch) for patch in patches])
    else:
        bar = figure.colorbar(grid, ax=axes, ticks=[], label=f"{len(patches)} patches")
