"""What a sample of each patch costs: numbers by patch, in whatever form they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.text import shown
from gpusampler.groups.patch_groups import PatchGroups

MOST = 2.0**512
"""Costs are below this: times any number of samples they are still finite."""


def checked_costs(costs: Any, groups: PatchGroups, steps: str) -> NDArray[np.float64] | None:
    """Return the costs that a plan's steps are to be balanced by, if they are given.

    Raises
    ------
    TypeError, ValueError
        If they are not as `costs_by_patch` takes them, or given where steps are not balanced.
    """
    if steps == "balanced":
        return None if costs is None else costs_by_patch(costs, groups)
    if costs is not None:
        raise ValueError(
            f"patch_costs must be left out under steps={steps!r}: only steps='balanced' has a use "
            "for them"
        )
    return None


def costs_by_patch(
    costs: Any, groups: PatchGroups, name: str = "patch_costs"
) -> NDArray[np.float64]:
    """Return the cost of a sample of each patch, or another positive number by patch.

    Parameters
    ----------
    costs : array (G,), mapping or callable
        By ascending patch id, from patch ids (others may be there too), or a function of the
        patch id.
    groups : PatchGroups
    name : str
        Of the argument, for errors.

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
    found = checked_numbers(listed_by_patch(costs, groups, name), groups.num_patches, name)
    wrong = np.flatnonzero(~((found > 0) & (found < MOST)))
    if wrong.size:
        group = int(wrong[0])
        raise ValueError(
            f"{name} must be > 0 and < 2**512, got {found[group]} for patch {groups.labels[group]}"
        )
    return found


def listed_by_patch(values: Any, groups: PatchGroups, name: str) -> Any:
    """Return what a mapping or a function of patch ids says, by ascending patch id; else as it is.

    Raises
    ------
    ValueError
        If a mapping lacks a patch.
    """
    # A column of a table with an index is a mapping, too: by place it would mix patches up.
    if isinstance(values, Mapping) or hasattr(values, "keys"):
        patch_ids = groups.labels.tolist()
        missing = [patch_id for patch_id in patch_ids if patch_id not in values]
        if missing:
            raise ValueError(
                f"{name} must have a number for every patch, got none for {_listed(missing)}"
                f"{_as_what(missing, values)}"
            )
        return [values[patch_id] for patch_id in patch_ids]
    if callable(values):
        return [values(patch_id) for patch_id in groups.labels.tolist()]
    return values


def checked_numbers(values: Any, count: int, name: str, of: str = "patch") -> NDArray[np.float64]:
    """Return numbers, one a patch (or sample), as float64; what is finite or positive is not asked.

    Raises
    ------
    TypeError
        If one is no number.
    ValueError
        If there are not ``count`` of them, in one dimension.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} must have a value for every {of}, got a masked array")
    try:
        found = np.asarray(on_host(values) if arrays.library_of(values) else values)
    except ValueError as error:
        raise ValueError(f"{name} must be one number a {of}: {error}") from error
    if found.dtype.kind not in "iuf":
        by = "one a sample"
        if of == "patch":
            by = "by ascending patch id, a mapping from patch ids, or a function of the patch id"
            if name == "weights":
                by = "by ascending patch id or a mapping from patch ids"
        raise TypeError(f"{name} must be numbers {by}, got {shown(values)}")
    if found.shape != (count,):
        raise ValueError(
            f"{name} must be one number a {of}, shape ({count},), got shape {found.shape}"
        )
    return found.astype(np.float64)


def on_host(values: Any) -> NDArray[Any]:
    """Return an array of numbers as one of NumPy."""
    if arrays.dtype_name(values).startswith(("bfloat", "float8")):
        # NumPy has no such numbers; each of them is one of float32.
        xp = arrays.namespace(arrays.device_of(values))
        values = xp.astype(values, xp.float32)
    return arrays.to_numpy(values)


def _listed(patch_ids: list[Any]) -> str:
    shown = ", ".join(map(str, patch_ids[:5]))
    return shown if len(patch_ids) <= 5 else f"{shown} and {len(patch_ids) - 5} more"


def _as_what(missing: list[Any], values: Any) -> str:
    """Say so where a mapping has an id as text, as after JSON, or a number that is a name."""
    for patch_id in missing:
        other: Any = str(patch_id)
        if isinstance(patch_id, str):
            if not patch_id.lstrip("-").isdecimal():
                continue
            other = int(patch_id)
        if other in values:
            return f" (it has {other!r}, and the id is {patch_id!r})"
    return ""
