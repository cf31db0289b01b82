"""Read costs per patch or per sample: arrays, mappings and functions of the patch id."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.text import short_repr
from gpusampler.core.validation import is_mapping
from gpusampler.groups.patch_groups import PatchGroups

COST_LIMIT = 2.0**512
"""Exclusive limit on costs, so that a cost times any number of samples is finite."""


def check_batch_costs(
    costs: Any, groups: PatchGroups, steps: str, costliest_first: bool
) -> NDArray[np.float64] | None:
    """Return costs as numbers, None if not given; raise if given but no setting uses them."""
    if steps == "balanced" or costliest_first:
        return None if costs is None else positive_by_patch(costs, groups)
    if costs is not None:
        raise ValueError(
            f"patch_costs must be None if steps={steps!r}: only steps='balanced' and "
            "costliest_first=True use them"
        )
    return None


def positive_by_patch(
    costs: Any,
    groups: PatchGroups,
    name: str = "patch_costs",
    *,
    allow_zero: bool = False,
    extra_keys: bool = True,
) -> NDArray[np.float64]:
    """Return one number in (0, 2**512), or 0 if allowed, per patch: float64, shape (G,).

    ``costs`` is an array by ascending patch id, a mapping from patch ids, or a function of the
    patch id. With ``extra_keys``, a mapping may have ids that are not in the dataset. ``name`` is
    the argument named in errors.
    """
    values = values_by_patch(costs, groups, name, extra_keys=extra_keys)
    numbers = check_numbers(values, groups.num_patches, name).astype(np.float64)
    is_allowed = (numbers >= 0) if allow_zero else (numbers > 0)
    out_of_range = np.flatnonzero(~(is_allowed & (numbers < COST_LIMIT)))
    if out_of_range.size:
        group = int(out_of_range[0])
        raise ValueError(
            f"{name} must be {'>= 0' if allow_zero else '> 0'} and < 2**512, got {numbers[group]} "
            f"for patch {groups.labels[group]}"
        )
    return numbers


def values_by_patch(
    values: Any, groups: PatchGroups, name: str, *, extra_keys: bool = False
) -> Any:
    """Return values by ascending patch id from a mapping or function; return an array unchanged.

    Raise ValueError if a mapping lacks a patch or, unless ``extra_keys``, has a key that is not a
    patch of the dataset.
    """
    # Reading a pandas Series by position would mix up patches.
    if is_mapping(values):
        patch_ids = groups.labels.tolist()
        missing = [patch_id for patch_id in patch_ids if patch_id not in values]
        if missing:
            raise ValueError(
                f"{name} must have a number for every patch, got none for {_join_ids(missing)}"
                f"{_id_type_hint(missing, values)}"
            )
        unknown = [] if extra_keys else groups.unknown_patches(values.keys())
        if unknown:
            raise ValueError(
                f"{name} must have only patch ids of the dataset as keys, got {_join_ids(unknown)}:"
                f" pass {{key: value for key, value in {name}.items() if key in set(ids)}}"
            )
        return [values[patch_id] for patch_id in patch_ids]
    if callable(values):
        return [values(patch_id) for patch_id in groups.labels.tolist()]
    return values


def check_numbers(values: Any, count: int, name: str, unit: str = "patch") -> NDArray[Any]:
    """Return numbers as a NumPy array of shape (count,), or raise; the range is not checked."""
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must have a value for every {unit}, got a masked array: fill it with "
            ".filled(value)"
        )
    numbers = None
    try:
        if not arrays.library_of(values):
            numbers = np.asarray(values)
        elif arrays.is_numeric(values):
            numbers = _to_numpy(values)
    except ValueError as error:
        raise ValueError(f"{name} must be one number per {unit}: {error}") from error
    if numbers is None or numbers.dtype.kind not in "iuf":
        forms = ", one per sample"
        if unit == "patch":
            forms = (
                " by ascending patch id, a mapping from patch ids, or a function of the patch id"
            )
            if name == "weights":
                forms = " by ascending patch id or a mapping from patch ids"
        raise TypeError(f"{name} must be numbers{forms}, got {short_repr(values)}")
    if numbers.shape != (count,):
        raise ValueError(
            f"{name} must be one number per {unit}, shape ({count},), got shape {numbers.shape}"
        )
    return numbers


def _to_numpy(values: Any) -> NDArray[Any]:
    """Return an array of any library as a NumPy array."""
    if arrays.dtype_name(values).startswith(("bfloat", "float8")):
        # NumPy lacks these dtypes; float32 represents all their values.
        xp = arrays.namespace(arrays.device_of(values))
        values = xp.astype(values, xp.float32)
    return arrays.to_numpy(values)


def _join_ids(patch_ids: list[Any]) -> str:
    first_ids = ", ".join(map(str, patch_ids[:5]))
    return first_ids if len(patch_ids) <= 5 else f"{first_ids} and {len(patch_ids) - 5} more"


def _id_type_hint(missing: list[Any], values: Any) -> str:
    """Return a hint if a missing id has another type than the keys.

    A missing int is a str key, as after JSON, or a missing str an int key, or the start of the text
    of an Enum member, as in a NumPy array of members.
    """
    members = [key for key in list(values.keys()) if isinstance(key, Enum)]
    for patch_id in missing:
        if members and isinstance(patch_id, str) and str(members[0]).startswith(patch_id):
            return (
                f" (the mapping has the key {members[0]!r}, and np.array stores such members as "
                "text: pass the ids as [key.value for key in ids])"
            )
        converted: Any = str(patch_id)
        if isinstance(patch_id, str):
            if not patch_id.lstrip("-").isdecimal():
                continue
            converted = int(patch_id)
        if converted in values:
            return (
                f" (the mapping has the key {converted!r}, but the patch id is {patch_id!r}: "
                "convert its keys)"
            )
    return ""
