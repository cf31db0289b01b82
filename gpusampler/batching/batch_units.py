"""What batches are cut from: patches, or the classes of cost that they are cut into."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.batch_sizes import one_of, sizes_of
from gpusampler.batching.cost_bins import parts_of
from gpusampler.batching.cost_budget import CostBudget
from gpusampler.core.arrays import Int64
from gpusampler.groups.fingerprint import combine, of_numbers
from gpusampler.groups.patch_groups import PatchGroups


def by_parent(values: NDArray[Any], parents: Int64 | None, gather: np.ufunc) -> NDArray[Any]:
    """Gather numbers of classes, shape (P,), by patch, (G,): those of a patch lie side by side."""
    if parents is None:
        return values
    found: NDArray[Any] = gather.reduceat(values, np.flatnonzero(np.diff(parents, prepend=-1)))
    return found


class Cut(NamedTuple):
    """What the batches of a plan are cut from.

    Attributes
    ----------
    groups : PatchGroups
        The patches, or the classes of cost that they are cut into.
    sizes : int64 array, shape (P,)
        Batch size of each; 0: left out.
    one_size : int, or None
        Where it is the same for all.
    costs : float64 array, shape (P,), or None
        Of a sample, where a budget knows it.
    parents : int64 array, shape (P,), or None
        The patch of each class, ascending.
    by_sample : bool
        The costs are the largest of samples that differ.
    """

    groups: PatchGroups
    sizes: Int64
    one_size: int | None
    costs: NDArray[Any] | None
    parents: Int64 | None
    by_sample: bool = False

    @classmethod
    def of(cls, groups: PatchGroups, batch_size: Any, partial: str) -> Cut:
        """Cut patches as a batch size asks for.

        Parameters
        ----------
        groups : PatchGroups
        batch_size : int, mapping from patch ids, or CostBudget
        partial : {"keep", "drop", "pad"}

        Raises
        ------
        TypeError, ValueError
            As by `sizes_of` and `parts_of`.
        """
        if isinstance(batch_size, CostBudget) and batch_size.sample_costs is not None:
            parts = parts_of(groups, batch_size, partial)
            if parts.groups.num_patches == groups.num_patches:
                # Nothing was cut: the samples of a class are in the order of its patch.
                return cls(groups, parts.sizes, one_of(parts.sizes), parts.costs, None, True)
            return cls(parts.groups, parts.sizes, None, parts.costs, parts.parents, True)
        sizes = sizes_of(batch_size, groups, partial)
        return cls(groups, sizes.sizes, sizes.one_size, sizes.costs, None)

    @property
    def fingerprint(self) -> int:
        """A 64-bit number of the sizes, and of which samples are in which class."""
        sizes = of_numbers(self.sizes)
        return sizes if self.parents is None else combine(sizes, self.groups.fingerprint)
