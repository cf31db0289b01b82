"""What a sample of each patch costs: numbers by patch, in whatever form they are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.text import short_repr
from gpusampler.groups.patch_groups import PatchGroups

COST_LIMIT = 2.0**512
"""Costs are below this: times any number of samples they are still finite."""


def check_step_costs(costs: Any, groups: PatchGroups, steps: str) -> NDArray[np.float64] | None:
    """Return the costs that a plan's steps are to be balanced by, if they are given.

    Raises
    ------
    TypeError, ValueError
        If they are not as `positive_by_patch` takes them, or given where steps are not balanced.
    """
    if steps == "balanced":
        return None if costs is None else positive_by_patch(costs, groups)
    if costs is not None:
        raise ValueError(
            f"patch_costs must be left out under steps={steps!r}: only steps='balanced' has a use "
            "for them"
        )
    return None


def positive_by_patch(
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
    values = values_by_patch(costs, groups, name)
    numbers = check_numbers(values, groups.num_patches, name).astype(np.float64)
    out_of_range = np.flatnonzero(~((numbers > 0) & (numbers < COST_LIMIT)))
    if out_of_range.size:
        group = int(out_of_range[0])
        raise ValueError(
            f"{name} must be > 0 and < 2**512, got {numbers[group]} for patch "
            f"{groups.labels[group]}"
        )
    return numbers


def values_by_patch(values: Any, groups: PatchGroups, name: str) -> Any:
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
                f"{name} must have a number for every patch, got none for {_join_ids(missing)}"
                f"{_id_type_hint(missing, values)}"
            )
        return [values[patch_id] for patch_id in patch_ids]
    if callable(values):
        return [values(patch_id) for patch_id in groups.labels.tolist()]
    return values


def check_numbers(values: Any, count: int, name: str, unit: str = "patch") -> NDArray[Any]:
    """Return numbers, one a patch (or sample), as a NumPy array; their range is not checked.

    Raises
    ------
    TypeError
        If one is no number.
    ValueError
        If there are not ``count`` of them, in one dimension.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name} must have a value for every {unit}, got a masked array")
    numbers = None
    try:
        if not arrays.library_of(values):
            numbers = np.asarray(values)
        elif arrays.is_numeric(values):
            numbers = _to_numpy(values)
    except ValueError as error:
        raise ValueError(f"{name} must be one number a {unit}: {error}") from error
    if numbers is None or numbers.dtype.kind not in "iuf":
        forms = ", one a sample"
        if unit == "patch":
            forms = (
                " by ascending patch id, a mapping from patch ids, or a function of the patch id"
            )
            if name == "weights":
                forms = " by ascending patch id or a mapping from patch ids"
        raise TypeError(f"{name} must be numbers{forms}, got {short_repr(values)}")
    if numbers.shape != (count,):
        raise ValueError(
            f"{name} must be one number a {unit}, shape ({count},), got shape {numbers.shape}"
        )
    return numbers


def _to_numpy(values: Any) -> NDArray[Any]:
    """Return an array of numbers as one of NumPy."""
    if arrays.dtype_name(values).startswith(("bfloat", "float8")):
        # NumPy has no such numbers; each of them is one of float32.
        xp = arrays.namespace(arrays.device_of(values))
        values = xp.astype(values, xp.float32)
    return arrays.to_numpy(values)


def _join_ids(patch_ids: list[Any]) -> str:
    first_ids = ", ".join(map(str, patch_ids[:5]))
    return first_ids if len(patch_ids) <= 5 else f"{first_ids} and {len(patch_ids) - 5} more"


def _id_type_hint(missing: list[Any], values: Any) -> str:
    """Say so where a mapping has an id as text, as after JSON, or a number that is a name."""
    for patch_id in missing:
        converted: Any = str(patch_id)
        if isinstance(patch_id, str):
            if not patch_id.lstrip("-").isdecimal():
                continue
            converted = int(patch_id)
        if converted in values:
            return f" (it has {converted!r}, and the id is {patch_id!r})"
    return ""
