"""Statistics of the training steps, streamed from the memory maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.progress_bar import iterate_with_bar
from gpusampler.groundwater.folder import Patch, PatchArrays
from gpusampler.groundwater.windows import Windows

_BLOCK_VALUES = 1 << 20  # 8 MB as float64


class Statistics(NamedTuple):
    """Mean and population standard deviation per column, and the bounding box of all points.

    ``mean`` and ``std`` have shape (C,); ``low`` and ``high``, the corners of the box, have shape
    (3,). Units are those of the files. ``std`` is 1 for a constant column.
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def training_statistics(
    patches: Sequence[Patch],
    windows: Windows,
    *,
    open_patch: Callable[[Patch], PatchArrays] = Patch.open,
    progress: bool = True,
) -> Statistics:
    """Compute the statistics of the core points over the training steps, in one pass.

    ``windows`` gives the end of the training steps; its split is ignored. ``open_patch`` may
    return maps that are already open.

    Examples
    --------
    >>> from gpusampler.demo.embedded import small_data
    >>> from gpusampler.groundwater import GWPatchDataset
    >>> dataset = GWPatchDataset(small_data(), 6, 1)
    >>> training_statistics(dataset.patches, dataset.windows).mean.shape
    (3,)
    """
    num_steps = windows.cut
    if num_steps < 1:
        raise ValueError(
            f"the training split must have at least one time step, got {num_steps}: use a smaller "
            "val_ratio"
        )
    count = 0
    width = patches[0].columns
    mean, moment = np.zeros(width), np.zeros(width)
    column_min, column_max = np.full(width, np.inf), np.full(width, -np.inf)
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for patch in iterate_with_bar(patches, "statistics", "patches", progress):
        arrays = open_patch(patch)
        arrays.check_sizes(patch.path)
        for points, name in (
            (arrays.core_coords, "core_coords"),
            (arrays.ghost_coords, "ghost_coords"),
        ):
            if len(points):
                box = _check_finite(points, patch.path.name, name)
                low, high = np.minimum(low, box.min(0)), np.maximum(high, box.max(0))
        block_steps = max(1, _BLOCK_VALUES // max(1, patch.core * width))
        for start in range(0, num_steps, block_steps):
            arrays.check_sizes(patch.path)
            steps = arrays.core_obs[start : min(start + block_steps, num_steps)]
            block = _check_finite(steps, patch.path.name, "core_obs").reshape(-1, width)
            column_min = np.minimum(column_min, block.min(0))
            column_max = np.maximum(column_max, block.max(0))
            # Merge means and squared deviations: Chan, Golub and LeVeque (1983).
            block_mean = block.mean(0)
            total = count + len(block)
            shift = block_mean - mean
            moment += np.square(block - block_mean).sum(0)
            moment += np.square(shift) * (count * len(block) / total)
            mean += shift * (len(block) / total)
            count = total
    std = np.where(column_max > column_min, np.sqrt(moment / count), 1.0)
    # The deviation of a nearly constant column can underflow to 0.
    std[std == 0.0] = 1.0
    return Statistics(mean, std, low, high)


def _check_finite(values: NDArray[Any], patch: str, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{patch}/{name}.npy must hold finite numbers, got NaN or infinity")
    return array
