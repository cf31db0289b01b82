"""Batch size of each patch: from one number, a mapping by patch id, or a cost budget."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_budget import CostBudget, check_over_budget, check_size
from gpusampler.batching.costs import positive_by_patch, values_by_patch
from gpusampler.core.arrays import Int64
from gpusampler.core.text import short_repr
from gpusampler.core.validation import is_mapping
from gpusampler.groups.patch_groups import PatchGroups


class BatchSizes(NamedTuple):
    """Batch sizes of patches: int64, shape (G,), 0 for patches over the budget.

    ``common_size`` is the size if all patches have the same one, else None. ``costs`` is the cost
    of one sample of each patch: float64, shape (G,); None without a budget.
    """

    sizes: Int64
    common_size: int | None
    costs: NDArray[np.float64] | None


def batch_sizes_of(batch_size: Any, groups: PatchGroups, partial: str) -> BatchSizes:
    """Return the batch size of each patch, or raise TypeError or ValueError.

    ``batch_size`` is an int, a mapping from patch ids, or a CostBudget without ``sample_costs``.
    """
    if isinstance(batch_size, CostBudget):
        return _sizes_within_budget(batch_size, groups, partial)
    if is_mapping(batch_size):
        sizes = _sizes_by_patch(batch_size, groups)
        return BatchSizes(sizes, common_size(sizes), None)
    check_batch_size(batch_size)
    size = int(batch_size)
    # A broadcast scalar needs no memory.
    return BatchSizes(np.broadcast_to(np.int64(size), groups.counts.shape), size, None)


def common_size(sizes: Int64) -> int | None:
    """Return the size common to all patches, None if sizes differ or a patch has size 0."""
    first = int(sizes[0])
    return first if first and bool((sizes == first).all()) else None


def check_batch_size(batch_size: Any) -> None:
    """Raise the errors of `batch_sizes_of` that do not depend on the patches."""
    if isinstance(batch_size, CostBudget) or is_mapping(batch_size):
        return
    # Arrays define __index__ too.
    if not hasattr(batch_size, "__index__") or getattr(batch_size, "shape", ()) != ():
        raise TypeError(
            "batch_size must be an int, a mapping from patch ids to ints, or a CostBudget, got "
            f"{short_repr(batch_size)}"
        )
    check_size(batch_size, "batch_size")


def _sizes_by_patch(batch_size: Any, groups: PatchGroups) -> Int64:
    sizes = values_by_patch(batch_size, groups, "batch_size")
    named_sizes = zip(groups.labels.tolist(), sizes, strict=True)
    checked = [check_size(size, f"batch_size of patch {label}") for label, size in named_sizes]
    return np.array(checked, np.int64)


def _sizes_within_budget(budget: CostBudget, groups: PatchGroups, partial: str) -> BatchSizes:
    if budget.cost is None:
        raise ValueError(
            "cost must be given in CostBudget if the dataset has no patch_costs(), got None"
        )
    costs = positive_by_patch(budget.cost, groups, "cost")
    sizes = budget.sizes_for(costs)
    check_over_budget(budget, sizes, costs, groups.labels)
    sizes = np.where(sizes > 0, budget.sizes_of_use(sizes, groups.counts, partial), 0)
    return BatchSizes(sizes, common_size(sizes), costs)
