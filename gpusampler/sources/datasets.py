"""Patch ids and costs of a map-style dataset.

Ids come from ``get_all_patch_ids()``, else from ``patch_ids``, else from ``dataset[i]["patch_id"]``
sample by sample. For torch's ``Subset`` (as from ``random_split``) and ``ConcatDataset``, they come
from the wrapped datasets, unless a subclass returns samples in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpusampler.core import arrays, devices
from gpusampler.core.validation import is_mapping
from gpusampler.sources.base import PatchIds
from gpusampler.sources.formats import known_format_ids
from gpusampler.sources.in_memory import ArrayIds
from gpusampler.sources.sample_by_sample import sample_by_sample_ids
from gpusampler.sources.sample_order import keeps_order, overridden_methods, samples_match
from gpusampler.sources.strings import CategoricalIds


def dataset_patch_ids(dataset: Any, *, progress: bool = True, name: str = "ids") -> PatchIds:
    """Return the patch id of each sample of a map-style dataset.

    ``get_all_patch_ids()`` and ``patch_ids`` may give anything that `read_patch_ids` accepts except
    a dataset; samples must be mappings whose ``"patch_id"`` is an integer or a string. Errors
    call the ids ``name``.
    """
    size, type_name = _check_size(dataset), _type_name(dataset)
    if size == 0:
        raise ValueError(f"source must hold at least one sample, got an empty {type_name}")
    source = _declared_ids(dataset, progress)
    if source is None:
        return sample_by_sample_ids(dataset, size, progress, _order_advice(dataset))
    shape = getattr(source, "shape", None)
    if isinstance(source, (list, tuple, range)):
        shape = (len(source),)
    # Check the length first: otherwise no ids at all would raise a less helpful error.
    if isinstance(shape, tuple) and shape[:1] not in ((), (size,)):
        raise _length_error(dataset, size, tuple(shape))
    ids = known_format_ids(source, name=name, progress=progress)
    if ids is None:
        raise TypeError(
            f"ids of {type_name} must be an array, a list or a column of integers or strings, "
            f"got {type(source).__name__}"
        )
    if ids.size != size:
        raise _length_error(dataset, size, (ids.size,))
    return ids


def _length_error(dataset: Any, size: int, shape: tuple[Any, ...]) -> ValueError:
    return ValueError(
        f"source must have one patch id per sample: {_type_name(dataset)} has {size} samples, "
        f"got ids of shape {shape}"
    )


def _declared_ids(dataset: Any, progress: bool) -> Any:
    """Return the ids that a dataset provides without reading its samples, or None."""
    get_ids = getattr(dataset, "get_all_patch_ids", None)
    if callable(get_ids):
        return get_ids()
    ids = getattr(dataset, "patch_ids", None)
    if ids is not None:
        return ids() if callable(ids) else ids
    base = _wrapper_class(dataset)
    if base is None:
        return None
    order_kept = _keeps_order(dataset)
    if order_kept is False:
        return None
    read = _subset_ids if base.__name__ == "Subset" else _concatenated_ids
    wrapped_ids = read(dataset, progress)
    if order_kept or wrapped_ids is None:
        return wrapped_ids
    return wrapped_ids if samples_match(dataset, wrapped_ids, _order_advice(dataset)) else None


def _wrapper_class(dataset: Any) -> Any:
    """Return torch's ``Subset`` or ``ConcatDataset`` if a dataset is one, else None."""
    data = devices.loaded_module("torch.utils.data")
    wrappers = () if data is None else (data.Subset, data.ConcatDataset)
    return next((wrapper for wrapper in wrappers if isinstance(dataset, wrapper)), None)


def _keeps_order(wrapper: Any) -> bool | None:
    """Return whether a wrapper's samples are those that torch's class returns; None if unknown."""
    base = _wrapper_class(wrapper)
    if base.__name__ == "Subset":
        return keeps_order(wrapper, base, [wrapper.dataset], [wrapper.indices])
    parts = list(wrapper.datasets)
    return keeps_order(wrapper, base, parts, [range(len(part)) for part in parts])


def _order_advice(dataset: Any) -> str:
    """Return what to write if a wrapper's samples may be in another order than its parts'."""
    base = _wrapper_class(dataset)
    overridden = [] if base is None else overridden_methods(dataset, base)
    if not overridden:
        return ""
    name = _type_name(dataset)
    return (
        f". {name} overrides {' and '.join(overridden)} of {base.__name__}, so its samples may be "
        f"in another order: add `def get_all_patch_ids(self): return [...]` to {name}, which "
        "returns the patch id of each of its samples"
    )


def _concatenated_ids(dataset: Any, progress: bool) -> PatchIds:
    """Return the concatenated ids of all parts of a ConcatDataset."""
    parts = [
        dataset_patch_ids(part, progress=progress, name="ids of a part of ConcatDataset")
        for part in dataset.datasets
        if len(part)
    ]
    if len({part.names is None for part in parts}) > 1:
        raise TypeError(
            "ConcatDataset parts must all have string ids or all integer ids, got a mix; convert "
            "them to one type"
        )
    wholes = tuple(whole for part in parts for whole in part.wholes)
    joined: PatchIds
    if parts[0].names is None:
        joined = ArrayIds(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
        joined.wholes = wholes
        return joined
    # CategoricalIds needs distinct names, so parts share one numbering.
    code_of_name: dict[str, int] = {}
    codes = []
    for part in parts:
        part_codes = [code_of_name.setdefault(name, len(code_of_name)) for name in part.names or ()]
        codes.append(np.array(part_codes, np.int64)[np.asarray(part)])
    joined = CategoricalIds(np.concatenate(codes), list(code_of_name))
    joined.wholes = wholes
    return joined


def _subset_ids(subset: Any, progress: bool) -> PatchIds | None:
    """Return the ids of a Subset, or None if its samples must be read."""
    _check_size(subset.dataset)
    if not _has_declared_ids(subset.dataset):
        return None
    ids = dataset_patch_ids(subset.dataset, progress=progress)
    indices = np.asarray(subset.indices, dtype=np.int64)
    part: PatchIds
    if ids.names is not None:
        part = CategoricalIds(np.asarray(ids)[indices], ids.names)
    elif isinstance(ids, ArrayIds) and not arrays.is_numpy(ids.array):
        with devices.device_context(ids.device):
            part = ArrayIds(ids.array[arrays.to_device(indices, ids.device)])
    else:
        part = ArrayIds(np.asarray(ids)[indices])
    part.wholes = (*ids.wholes, ids)
    return part


def _has_declared_ids(dataset: Any) -> bool:
    """Whether a dataset, possibly wrapped, provides its ids without reading samples."""
    if callable(getattr(dataset, "get_all_patch_ids", None)):
        return True
    if getattr(dataset, "patch_ids", None) is not None:
        return True
    base = _wrapper_class(dataset)
    if base is None or not _keeps_order(dataset):
        return False
    parts = [dataset.dataset] if base.__name__ == "Subset" else dataset.datasets
    return all(_has_declared_ids(part) for part in parts)


def dataset_patch_costs(dataset: Any) -> Any:
    """Return the costs per patch from ``patch_costs()`` or ``patch_costs``, None if there are none.

    ``Subset`` and ``ConcatDataset`` use the costs of the wrapped datasets, which must be mappings.
    Either all parts of a ``ConcatDataset`` have costs or none, and parts must agree on a patch.
    """
    costs = getattr(dataset, "patch_costs", None)
    if costs is not None:
        return costs() if callable(costs) else costs
    data = devices.loaded_module("torch.utils.data")
    if data is not None and isinstance(dataset, data.Subset):
        costs = dataset_patch_costs(dataset.dataset)
        if costs is not None and not is_mapping(costs):
            raise TypeError(
                "patch_costs() must be a mapping from patch ids for a Subset, which may hold only "
                f"some patches, got {type(costs).__name__}"
            )
        return costs
    if data is not None and isinstance(dataset, data.ConcatDataset):
        return _merge_costs([dataset_patch_costs(part) for part in dataset.datasets])
    return None


def _merge_costs(mappings: list[Any]) -> dict[Any, Any] | None:
    """Return the merged costs of all parts of a ConcatDataset."""
    if all(costs is None for costs in mappings):
        return None
    merged: dict[Any, Any] = {}
    for i, costs in enumerate(mappings):
        if costs is None:
            raise ValueError(
                "patch_costs() must be defined in every part of a ConcatDataset or in none, "
                f"got none in part {i}"
            )
        if not is_mapping(costs):
            raise TypeError(
                "patch_costs() must be a mapping from patch ids in a part of a ConcatDataset, got "
                f"{type(costs).__name__} in part {i}"
            )
        for patch_id, cost in costs.items():
            if merged.setdefault(patch_id, cost) != cost:
                raise ValueError(
                    "patch_costs() must be the same in every part of a ConcatDataset, got "
                    f"{merged[patch_id]} and {cost} for patch {patch_id}"
                )
    return merged


def _check_size(dataset: Any) -> int:
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, bytes, Mapping)):
        hint = ""
        if not isinstance(dataset, type) and any(
            hasattr(dataset, name) for name in ("get_all_patch_ids", "patch_ids")
        ):
            hint = " without __getitem__ (pass its patch ids instead)"
        if _is_sampler(dataset):
            # Lightning rebuilds batch samplers with a different sampler in place of the source.
            hint = (
                "; if Lightning replaced the source, pass Trainer(use_distributed_sampler=False): "
                "PatchBatchSampler shards by itself"
            )
        if _type_name(dataset) == "PatchGroups":
            raise TypeError(
                "source must be patch ids, got PatchGroups, which are already grouped; pass the "
                "PatchGroups to PatchBatchSampler directly"
            )
        raise TypeError(
            "source must be a dataset, an array of patch ids or PatchGroups, "
            f"got {_type_name(dataset)}{hint}"
        )
    try:
        return len(dataset)
    except TypeError as error:
        raise TypeError(
            f"source must have a length (a map-style dataset), got {_type_name(dataset)}"
        ) from error


def _is_sampler(obj: Any) -> bool:
    data = devices.loaded_module("torch.utils.data")
    if data is not None and isinstance(obj, data.Sampler):
        return True
    return type(obj).__name__.endswith("Sampler")


def _type_name(obj: Any) -> str:
    return type(obj).__name__
