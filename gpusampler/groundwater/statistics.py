"""Statistics of the training part, streamed over the memory maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.progress_bar import over
from gpusampler.groundwater.folder import Patch, PatchArrays
from gpusampler.groundwater.windows import Windows

_BLOCK_VALUES = 1 << 20  # 8 MB as float64


class Statistics(NamedTuple):
    """Mean and standard deviation per column (C,), corners of the domain's box (3,)."""

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
    """Read the training steps of all core points once.

    Parameters
    ----------
    patches : sequence of Patch
        Checked patches of a folder, of the same columns.
    windows : Windows
        Says where the training part ends; its split is not used.
    open_patch : callable
        Maps the files of a patch; a dataset returns maps that it has open.
    progress : bool
        Show a bar if it takes more than a second.

    Returns
    -------
    Statistics
        In float64, in the units of the files. The standard deviation is the population's; it
        is 1 for a column that never changes.

    Raises
    ------
    ValueError
        If there are no training steps, or a value is not finite (named by patch and file).
    OSError
        If a file went away or shrank since the patches were checked.

    Examples
    --------
    >>> from gpusampler.demo.embedded import small_data
    >>> from gpusampler.groundwater import GWPatchDataset
    >>> dataset = GWPatchDataset(small_data(), 6, 1)
    >>> training_statistics(dataset.patches, dataset.windows).mean.shape
    (3,)
    """
    cut = windows.cut
    if cut < 1:
        raise ValueError(f"the training part must have at least one time step, got {cut}")
    count = 0
    width = patches[0].columns
    mean, moment = np.zeros(width), np.zeros(width)
    least, most = np.full(width, np.inf), np.full(width, -np.inf)
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for patch in over(patches, "statistics", "patches", progress):
        arrays = open_patch(patch)
        arrays.check_sizes(patch.path)
        for points, name in (
            (arrays.core_coords, "core_coords"),
            (arrays.ghost_coords, "ghost_coords"),
        ):
            if len(points):
                box = _finite(points, patch.path.name, name)
                low, high = np.minimum(low, box.min(0)), np.maximum(high, box.max(0))
        rows = max(1, _BLOCK_VALUES // max(1, patch.core * width))
        for start in range(0, cut, rows):
            arrays.check_sizes(patch.path)
            part = arrays.core_obs[start : min(start + rows, cut)]
            block = _finite(part, patch.path.name, "core_obs").reshape(-1, width)
            least, most = np.minimum(least, block.min(0)), np.maximum(most, block.max(0))
            # Merging of means and squared deviations: Chan, Golub and LeVeque (1983).
            block_mean = block.mean(0)
            total = count + len(block)
            shift = block_mean - mean
            moment += np.square(block - block_mean).sum(0)
            moment += np.square(shift) * (count * len(block) / total)
            mean += shift * (len(block) / total)
            count = total
    std = np.where(most > least, np.sqrt(moment / count), 1.0)
    # A column that hardly moves can underflow to a deviation of 0.
    std[std == 0.0] = 1.0
    return Statistics(mean, std, low, high)


def _finite(values: NDArray[Any], patch: str, name: str) -> NDArray[np.float64]:
    exact = np.asarray(values, dtype=np.float64)
    if not np.isfinite(exact).all():
        raise ValueError(f"{patch}/{name}.npy must hold finite numbers, got NaN or infinity")
    return exact
