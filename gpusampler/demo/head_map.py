"""Observed and forecast hydraulic head of one patch at one held-out step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpusampler.demo.gino import PatchGino
from gpusampler.demo.loading import DemoData
from gpusampler.groundwater import collate_fn


@dataclass(frozen=True)
class HeadMap:
    """Hydraulic head in the top cell of each vertical column of grid cells of one patch.

    Positions and heads have shape (n,) and are in metres.
    """

    patch_id: int
    step: int
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    observed: NDArray[np.float64]
    forecast: NDArray[np.float64]


def head_map(model: PatchGino, data: DemoData) -> HeadMap:
    """Forecast the head at the end of the last held-out window of the largest patch."""
    import torch

    held_out = data.held_out
    position, patch = max(enumerate(held_out.patches), key=lambda item: item[1].core)
    windows = held_out.windows
    batch = collate_fn([held_out[(position + 1) * windows.count - 1]])
    with torch.no_grad():
        scaled = torch.stack([batch["core_out"], model(batch)])[:, 0, -1]
    head = data.normalize.target_columns.index("head")
    metres = data.normalize.inverse(scaled)[..., head].double().numpy()
    points = np.asarray(held_out.arrays(patch.patch_id).core_coords, dtype=np.float64)
    top = _uppermost(points)
    return HeadMap(
        patch_id=patch.patch_id,
        step=int(windows.starts()[-1]) + windows.length - 1,
        x=points[top, 0],
        y=points[top, 1],
        observed=metres[0, top],
        forecast=metres[1, top],
    )


def _uppermost(points: NDArray[np.float64]) -> NDArray[np.intp]:
    order = np.lexsort((-points[:, 2], points[:, 1], points[:, 0]))
    xy = points[order, :2]
    is_top = np.ones(len(order), dtype=bool)
    is_top[1:] = (xy[1:] != xy[:-1]).any(axis=1)
    return order[is_top]
