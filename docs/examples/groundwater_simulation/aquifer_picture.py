"""Draw the aquifer of a patch folder: log K, head, concentration, patches."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpusampler.demo.embedded import small_data

from .aquifer import Aquifer, build_aquifer
from .grid import Floats
from .patches import PatchMasks, cut_aquifer
from .provenance import PROVENANCE
from .settings import SimulationSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_aquifer(
    out: str | os.PathLike[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    step: int = -1,
) -> Path:
    """Draw maps of log K, head, concentration and patches of a simulated patch folder.

    log K is generated again from the seed and the settings in ``provenance.json``, without MODFLOW;
    head and concentration come from the folder's arrays. All maps show the top layer.

    Parameters
    ----------
    out : str or path-like
        File to write; its suffix gives the format (``.png``, ``.svg``, ``.pdf``).
    folder : str or path-like, optional
        A folder written by `simulate`. Default: the data embedded in gpusampler.
    step : int, default -1
        Time step to show; a negative step counts from the end.

    Returns
    -------
    Path
        The picture.

    Raises
    ------
    FileNotFoundError
        If the folder or its ``provenance.json`` is missing.
    ValueError
        If ``step`` is out of range.
    ImportError
        If matplotlib or gstools is not installed.
    """
    from matplotlib.figure import Figure

    source = small_data() if folder is None else Path(folder)
    record = json.loads((source / PROVENANCE).read_text(encoding="utf-8"))
    settings = SimulationSettings.from_dict(record["settings"])
    if not -settings.n_steps <= step < settings.n_steps:
        raise ValueError(f"step must be within {settings.n_steps} steps, got {step}")
    aquifer = build_aquifer(settings, record["seed"])
    patches = cut_aquifer(aquifer, settings, record["seed"])
    figure = Figure(figsize=(9.0, 7.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    log_k = np.where(aquifer.active, np.log10(aquifer.conductivity[0]), np.nan)
    day = record["time"]["first_day"] + record["time"]["step_days"] * (step % settings.n_steps)
    maps = (
        ("log10 K (K in m/d)", log_k, "viridis"),
        (f"head, day {day:.0f} (m)", _top_layer(source, patches, 1, step), "cividis"),
        (f"concentration, day {day:.0f} (g/m³)", _top_layer(source, patches, 0, step), "magma_r"),
    )
    for ax, (title, values, colours) in zip(axes.flat, maps, strict=False):
        mesh = ax.pcolormesh(aquifer.x_edges, aquifer.y_edges, values, cmap=colours)
        figure.colorbar(mesh, ax=ax, shrink=0.85)
        ax.set_title(title, fontsize=10)
    _draw_patches(axes[1, 1], aquifer, patches, settings.n_layers)
    for ax in axes.flat:
        ax.set_aspect("equal")
    for ax in axes[1]:
        ax.set_xlabel("east (m)")
    for ax in axes[:, 0]:
        ax.set_ylabel("north (m)")
    _mark_wells(axes[0, 0], aquifer)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def _top_layer(folder: Path, patches: list[PatchMasks], column: int, step: int) -> Floats:
    values = np.full(patches[0].core.shape, np.nan)
    for i, patch in enumerate(patches):
        obs = np.load(folder / f"patch_{i}" / "core_obs.npy", mmap_mode="r")
        # Points are ordered by layer, so the first ones are the top layer.
        values[patch.core] = obs[step, : int(patch.core.sum()), column]
    return values


def _draw_patches(ax: Axes, aquifer: Aquifer, patches: list[PatchMasks], layers: int) -> None:
    from matplotlib import colormaps

    colours = np.ones((*aquifer.active.shape, 4))
    palette = colormaps["tab20"]
    for i, patch in enumerate(patches):
        colours[patch.core] = palette(i % 20)
    ax.pcolormesh(aquifer.x_edges, aquifer.y_edges, colours, edgecolors="white", linewidth=0.3)
    grid_x, grid_y = np.meshgrid(aquifer.x, aquifer.y)
    for patch in patches:
        centre = (float(grid_x[patch.core].mean()), float(grid_y[patch.core].mean()))
        points = str(int(patch.core.sum()) * layers)
        ax.annotate(points, centre, ha="center", va="center", fontsize=8)
    ax.set_title("patches, with their points", fontsize=10)


def _mark_wells(ax: Axes, aquifer: Aquifer) -> None:
    for injects, marker, name in ((False, "v", "pumping"), (True, "^", "injection")):
        wells = [w for w in aquifer.wells if w.injects == injects]
        if wells:
            xs = [aquifer.x[w.col] for w in wells]
            ys = [aquifer.y[w.row] for w in wells]
            ax.plot(xs, ys, marker, color="red", markeredgecolor="white", label=name)
    if aquifer.wells:
        ax.legend(fontsize=8, loc="lower right")
