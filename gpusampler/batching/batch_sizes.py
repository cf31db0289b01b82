"""How many samples a patch's batches hold: one number, a number by patch, or a budget of cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_budget import CostBudget, check_over_budget, check_size
from gpusampler.batching.costs import positive_by_patch, values_by_patch
from gpusampler.core.arrays import Int64
from gpusampler.core.text import short_repr
from gpusampler.groups.patch_groups import PatchGroups


class BatchSizes(NamedTuple):
    """Batch sizes of patches, and what went into them.

    Attributes
    ----------
    sizes : int64 array, shape (G,)
        0 where a patch is left out, as it is over the budget.
    common_size : int, or None
        The size, where all have the same.
    costs : float64 array, shape (G,), or None
        Of a sample of each patch, where a budget knows them.
    """

    sizes: Int64
    common_size: int | None
    costs: NDArray[np.float64] | None


def batch_sizes_of(batch_size: Any, groups: PatchGroups, partial: str) -> BatchSizes:
    """Return the batch size of each patch.

    Parameters
    ----------
    batch_size : int, mapping from patch ids, or CostBudget without ``sample_costs``
    groups : PatchGroups
    partial : {"keep", "drop", "pad"}

    Raises
    ------
    TypeError, ValueError
        If it is none of these, a patch has no size, a size is no integer in 1 .. 2**31 - 1, or a
        patch is over the budget and is not to be skipped.
    """
    if isinstance(batch_size, CostBudget):
        return _sizes_within_budget(batch_size, groups, partial)
    if isinstance(batch_size, Mapping):
        sizes = _sizes_by_patch(batch_size, groups)
        return BatchSizes(sizes, common_size(sizes), None)
    check_batch_size(batch_size)
    size = int(batch_size)
    # A broadcast scalar takes no memory.
    return BatchSizes(np.broadcast_to(np.int64(size), groups.counts.shape), size, None)


def common_size(sizes: Int64) -> int | None:
    """Return the size that all patches have, None if they differ or one is left out."""
    first = int(sizes[0])
    return first if first and bool((sizes == first).all()) else None


def check_batch_size(batch_size: Any) -> None:
    """Raise, as `batch_sizes_of` does, what can be told before patches are known."""
    if isinstance(batch_size, (CostBudget, Mapping)):
        return
    # An array of one number has an index too, and says so only when it is asked.
    if not hasattr(batch_size, "__index__") or getattr(batch_size, "shape", ()) != ():
        raise TypeError(
            "batch_size must be an int, a mapping from patch ids to ints, or a CostBudget, got "
            f"{short_repr(batch_size)}"
        )
    check_size(batch_size, "batch_size")


def _sizes_by_patch(batch_size: Mapping[Any, Any], groups: PatchGroups) -> Int64:
    sizes = values_by_patch(batch_size, groups, "batch_size")
    named_sizes = zip(groups.labels.tolist(), sizes, strict=True)
    checked = [check_size(size, f"batch_size of patch {label}") for label, size in named_sizes]
    return np.array(checked, np.int64)


def _sizes_within_budget(budget: CostBudget, groups: PatchGroups, partial: str) -> BatchSizes:
    if budget.cost is None:
        raise ValueError(
            "cost must be given in a CostBudget where no dataset says it by patch_costs(), got None"
        )
    costs = positive_by_patch(budget.cost, groups, "cost")
    sizes = budget.sizes_for(costs)
    check_over_budget(budget, sizes, costs, groups.labels)
    sizes = np.where(sizes > 0, budget.sizes_of_use(sizes, groups.counts, partial), 0)
    return BatchSizes(sizes, common_size(sizes), costs)
