"""BatchUnits: what batches are cut from, whole patches or the cost bins of patches."""

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
    """What the batches of a plan are cut from: patches, or cost bins of patches.

    Attributes
    ----------
    groups : PatchGroups
        The patches, or the cost bins that they are cut into.
    sizes : int64 array, shape (P,)
        Batch size of each; 0: left out.
    common_size : int, or None
        Where it is the same for all.
    costs : float64 array, shape (P,), or None
        Of a sample, where a budget knows it.
    patch_of_bin : int64 array, shape (P,), or None
        The patch of each cost bin, ascending.
    has_sample_costs : bool
        The costs are the largest of samples that differ.
    """

    groups: PatchGroups
    sizes: Int64
    common_size: int | None
    costs: NDArray[Any] | None
    patch_of_bin: Int64 | None
    has_sample_costs: bool = False

    @classmethod
    def of(cls, groups: PatchGroups, batch_size: Any, partial: str) -> BatchUnits:
        """Cut patches as a batch size asks for.

        Parameters
        ----------
        groups : PatchGroups
        batch_size : int, mapping from patch ids, or CostBudget
        partial : {"keep", "drop", "pad"}

        Raises
        ------
        TypeError, ValueError
            As by `batch_sizes_of` and `cut_into_bins`.
        """
        if isinstance(batch_size, CostBudget) and batch_size.sample_costs is not None:
            bins = cut_into_bins(groups, batch_size, partial)
            if bins.groups.num_patches == groups.num_patches:
                # Nothing was cut: the samples of a bin are in the order of its patch.
                return cls(groups, bins.sizes, common_size(bins.sizes), bins.costs, None, True)
            return cls(bins.groups, bins.sizes, None, bins.costs, bins.patch_of_bin, True)
        sizes = batch_sizes_of(batch_size, groups, partial)
        return cls(groups, sizes.sizes, sizes.common_size, sizes.costs, None)

    @property
    def fingerprint(self) -> int:
        """A 64-bit number of the sizes, and of which samples are in which cost bin."""
        sizes = of_numbers(self.sizes)
        return sizes if self.patch_of_bin is None else combine(sizes, self.groups.fingerprint)
