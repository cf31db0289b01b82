"""What a dataset says that a sample of each patch costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpusampler.core import devices


def patch_costs(source: Any) -> Any:
    """Return what a dataset says that a sample of each patch costs; None if it says nothing.

    ``patch_costs()`` of the dataset (or an attribute of that name), or of what ``Subset`` and
    ``ConcatDataset`` wrap, all of whose parts must say so then.

    Raises
    ------
    TypeError
        If the parts of a ``ConcatDataset`` say so by anything but a mapping.
    ValueError
        If only some of its parts do, or two of them differ about a patch.
    """
    given = getattr(source, "patch_costs", None)
    if given is not None:
        return given() if callable(given) else given
    data = devices.loaded("torch.utils.data")
    if data is not None and isinstance(source, data.Subset):
        costs = patch_costs(source.dataset)
        if costs is not None and not isinstance(costs, Mapping):
            raise TypeError(
                "patch_costs() must be a mapping from patch ids where a Subset holds only some of "
                f"the patches, got {type(costs).__name__}"
            )
        return costs
    if data is not None and isinstance(source, data.ConcatDataset):
        return _merged([patch_costs(part) for part in source.datasets])
    return None


def _merged(parts: list[Any]) -> dict[Any, Any] | None:
    """Costs of all parts of a ConcatDataset together."""
    if all(part is None for part in parts):
        return None
    merged: dict[Any, Any] = {}
    for place, part in enumerate(parts):
        if part is None:
            raise ValueError(
                "patch_costs() must be there in every part of a ConcatDataset or in none, got none "
                f"in part {place}"
            )
        if not isinstance(part, Mapping):
            raise TypeError(
                "patch_costs() must be a mapping from patch ids in a part of a ConcatDataset, got "
                f"{type(part).__name__} in part {place}"
            )
        for patch_id, cost in part.items():
            if merged.setdefault(patch_id, cost) != cost:
                raise ValueError(
                    "patch_costs() must be the same in every part of a ConcatDataset, got "
                    f"{merged[patch_id]} and {cost} for patch {patch_id}"
                )
    return merged
