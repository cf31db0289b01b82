"""What a sample of each patch costs: numbers by patch, in whatever form they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler import arrays
from gpusampler.grouping import PatchGroups
from gpusampler.validation import shown

MOST = 2.0**512
"""Costs are below this: times any number of samples they are still finite."""


def checked_costs(costs: Any, groups: PatchGroups, steps: str) -> NDArray[np.float64] | None:
    """Return the costs that a plan's steps are balanced by, 1 each by default; else None.

    Raises
    ------
    TypeError, ValueError
        If they are not as `costs_by_patch` takes them, or given where steps are not balanced.
    """
    if steps == "balanced":
        given = np.ones(groups.num_patches) if costs is None else costs
        return costs_by_patch(given, groups)
    if costs is not None:
        raise ValueError(
            f"patch_costs must be left out under steps={steps!r}: only steps='balanced' has a use "
            "for them"
        )
    return None


def costs_by_patch(costs: Any, groups: PatchGroups) -> NDArray[np.float64]:
    """Return the cost of a sample of each patch.

    Parameters
    ----------
    costs : array (G,), mapping or callable
        By ascending patch id, from patch ids (others may be there too), or a function of the
        patch id.
    groups : PatchGroups

    Returns
    -------
    float64 array, shape (G,)

    Raises
    ------
    TypeError
        If a cost is no number.
    ValueError
        If there are not as many as patches, a patch has none, or one is not in (0, 2**512).
    """
    # A column of a table with an index is a mapping, too: by place it would mix patches up.
    if isinstance(costs, Mapping) or hasattr(costs, "keys"):
        patch_ids = groups.labels.tolist()
        missing = [patch_id for patch_id in patch_ids if patch_id not in costs]
        if missing:
            raise ValueError(
                f"patch_costs must have a cost for every patch, got none for {_listed(missing)}"
            )
        costs = [costs[patch_id] for patch_id in patch_ids]
    elif callable(costs):
        costs = [costs(patch_id) for patch_id in groups.labels.tolist()]
    if isinstance(costs, np.ma.MaskedArray):
        raise TypeError("patch_costs must have a value for every patch, got a masked array")
    try:
        found = np.asarray(arrays.to_numpy(costs) if arrays.library_of(costs) else costs)
    except ValueError as error:
        raise ValueError(f"patch_costs must be one number a patch: {error}") from error
    if found.dtype.kind not in "iuf":
        raise TypeError(
            "patch_costs must be numbers by ascending patch id, a mapping from patch ids, or a "
            f"function of the patch id, got {shown(costs)}"
        )
    if found.shape != (groups.num_patches,):
        raise ValueError(
            f"patch_costs must be one number a patch, shape ({groups.num_patches},), got shape "
            f"{found.shape}"
        )
    found = found.astype(np.float64)
    wrong = np.flatnonzero(~((found > 0) & (found < MOST)))
    if wrong.size:
        group = int(wrong[0])
        raise ValueError(
            f"patch_costs must be > 0 and < 2**512, got {found[group]} for patch "
            f"{groups.labels[group]}"
        )
    return found


def _listed(patch_ids: list[Any]) -> str:
    shown = ", ".join(map(str, patch_ids[:5]))
    return shown if len(patch_ids) <= 5 else f"{shown} and {len(patch_ids) - 5} more"
