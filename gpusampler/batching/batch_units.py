"""BatchUnits: the sets of samples that batches are cut from, patches or cost bins."""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import NDArray

from gpusampler.batching.batch_sizes import batch_sizes_of, common_size
from gpusampler.batching.cost_bins import cut_into_bins
from gpusampler.batching.cost_budget import CostBudget
from gpusampler.core.arrays import Int64
from gpusampler.groups.fingerprint import combine, of_numbers
from gpusampler.groups.patch_groups import PatchGroups


class BatchUnits(NamedTuple):
    """The P units that batches are cut from: patches, or their cost bins.

    Attributes
    ----------
    groups : PatchGroups
        One group per unit.
    sizes : int64 array, shape (P,)
        Batch size of each unit, 0 if it is over the budget.
    common_size : int, or None
        Batch size of all patches, if it is the same; always None if units are cost bins.
    costs : float64 array, shape (P,), or None
        Cost per sample (the largest in a bin); None without a budget.
    patch_of_bin : int64 array, shape (P,), or None
        Patch of each bin, ascending; None if units are patches.
    has_sample_costs : bool
        Whether samples of one unit may differ in cost.
    max_cost : float, or None
        Maximum cost of a batch; None without a budget.
    """

    groups: PatchGroups
    sizes: Int64
    common_size: int | None
    costs: NDArray[Any] | None
    patch_of_bin: Int64 | None
    has_sample_costs: bool = False
    max_cost: float | None = None

    @classmethod
    def of(cls, groups: PatchGroups, batch_size: Any, partial: str) -> BatchUnits:
        """Return cost bins if ``batch_size`` is a budget with ``sample_costs``, else patches."""
        max_cost = float(batch_size.max_cost) if isinstance(batch_size, CostBudget) else None
        if isinstance(batch_size, CostBudget) and batch_size.sample_costs is not None:
            bins = cut_into_bins(groups, batch_size, partial)
            if bins.groups.num_patches == groups.num_patches:
                # One bin per patch: the patches themselves are the units.
                size = common_size(bins.sizes)
                return cls(groups, bins.sizes, size, bins.costs, None, True, max_cost)
            return cls(bins.groups, bins.sizes, None, bins.costs, bins.patch_of_bin, True, max_cost)
        sizes = batch_sizes_of(batch_size, groups, partial)
        return cls(groups, sizes.sizes, sizes.common_size, sizes.costs, None, max_cost=max_cost)

    @property
    def fingerprint(self) -> int:
        """64-bit hash of the sizes and of the assignment of samples to cost bins."""
        sizes = of_numbers(self.sizes)
        return sizes if self.patch_of_bin is None else combine(sizes, self.groups.fingerprint)
