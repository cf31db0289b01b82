"""Classes of cost inside a patch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.arrays import Int64
from gpusampler.grouping import PatchGroups
from gpusampler.sizing import CostBudget


class Parts(NamedTuple):
    """Patches cut into classes."""

    groups: PatchGroups
    parents: Int64
    costs: NDArray[np.float64]
    sizes: Int64


def parts_of(groups: PatchGroups, budget: CostBudget, partial: str) -> Parts:
    raise NotImplementedError("is being written")
