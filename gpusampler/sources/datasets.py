"""The patch ids of a map-style dataset: one that knows them, or one that must be asked.

A dataset is asked, in this order, for ``get_all_patch_ids()``, ``patch_ids``, and at last for
``dataset[i]["patch_id"]``, sample by sample. ``Subset`` (``random_split`` makes these) and
``ConcatDataset`` of torch pass the question on to what they wrap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpusampler.core import arrays, devices
from gpusampler.sources.base import PatchIds
from gpusampler.sources.in_memory import ArrayIds
from gpusampler.sources.known_formats import known_ids
from gpusampler.sources.sample_by_sample import ask_samples
from gpusampler.sources.strings import CodedIds


def dataset_patch_ids(dataset: Any, *, progress: bool = True, name: str = "ids") -> PatchIds:
    """Return the patch id of each sample of a map-style dataset.

    Parameters
    ----------
    dataset : object
        With ``__len__``, and one of ``get_all_patch_ids()``, ``patch_ids`` (both may give whatever
        `read_patch_ids` takes, but a dataset), or samples that are mappings with a ``"patch_id"``,
        an integer or a name.
    progress : bool
    name : str
        What errors call ids that are no integers.

    Returns
    -------
    PatchIds, of len(dataset) samples

    Raises
    ------
    TypeError
        If this is no dataset, or a sample has no patch id, or one of another kind.
    ValueError
        If it is empty, or gives ids of another number than samples.
    RuntimeError
        If it raises when it is asked for a sample.
    """
    size = _size_of(dataset)
    if size == 0:
        raise ValueError(f"source must hold at least one sample, got an empty {_name(dataset)}")
    given = _given_ids(dataset, progress)
    if given is None:
        return ask_samples(dataset, size, progress)
    shape = getattr(given, "shape", None)
    if isinstance(given, (list, tuple, range)):
        shape = (len(given),)
    # Another number of ids is told first: none at all would be refused for being none.
    if isinstance(shape, tuple) and shape[:1] not in ((), (size,)):
        raise _uneven(dataset, size, tuple(shape))
    ids = known_ids(given, name=name, progress=progress)
    if ids is None:
        raise TypeError(
            f"ids of {_name(dataset)} must be an array, a list or a column of integers or names, "
            f"got {type(given).__name__}"
        )
    if ids.size != size:
        raise _uneven(dataset, size, (ids.size,))
    return ids


def _uneven(dataset: Any, size: int, shape: tuple[Any, ...]) -> ValueError:
    return ValueError(
        f"source must give one patch id a sample: {_name(dataset)} has {size} samples, "
        f"got ids of shape {shape}"
    )


def _given_ids(dataset: Any, progress: bool) -> Any:
    """Ids that are there without touching a sample (of this dataset), or None."""
    given = getattr(dataset, "get_all_patch_ids", None)
    if callable(given):
        return given()
    given = getattr(dataset, "patch_ids", None)
    if given is not None:
        return given() if callable(given) else given
    data = devices.loaded("torch.utils.data")
    if data is None:
        return None
    if isinstance(dataset, data.Subset):
        return _subset_ids(dataset, progress)
    if isinstance(dataset, data.ConcatDataset):
        return _concatenated_ids(dataset, progress)
    return None


def _concatenated_ids(dataset: Any, progress: bool) -> PatchIds:
    """Ids of all parts of a ConcatDataset, end to end."""
    parts = [
        dataset_patch_ids(part, progress=progress, name="ids of a part of ConcatDataset")
        for part in dataset.datasets
        if len(part)
    ]
    if len({part.names is None for part in parts}) > 1:
        raise TypeError(
            "ids of a part of ConcatDataset must be names in every part or in none, got both"
        )
    if parts[0].names is None:
        return ArrayIds(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
    # Places in the names of all parts, one behind the other; CodedIds takes each name once.
    place: dict[str, int] = {}
    codes = []
    for part in parts:
        own = [place.setdefault(label, len(place)) for label in part.names or ()]
        codes.append(np.array(own, np.int64)[np.asarray(part)])
    return CodedIds(np.concatenate(codes), list(place))


def _subset_ids(subset: Any, progress: bool) -> PatchIds | None:
    """Ids of a Subset, by its indices, if what it wraps can tell; else it is read itself."""
    _size_of(subset.dataset)
    if not _can_tell(subset.dataset):
        return None
    whole = dataset_patch_ids(subset.dataset, progress=progress)
    indices = np.asarray(subset.indices, dtype=np.int64)
    if whole.names is not None:
        return CodedIds(np.asarray(whole)[indices], whole.names)
    if isinstance(whole, ArrayIds) and arrays.library_of(whole.array) != "numpy":
        return ArrayIds(whole.array[arrays.to_device(indices, whole.device)])
    return ArrayIds(np.asarray(whole)[indices])


def _can_tell(dataset: Any) -> bool:
    """Whether no sample has to be read for the ids of a dataset, however deeply it is wrapped."""
    if callable(getattr(dataset, "get_all_patch_ids", None)):
        return True
    if getattr(dataset, "patch_ids", None) is not None:
        return True
    data = devices.loaded("torch.utils.data")
    if data is not None and isinstance(dataset, data.Subset):
        return _can_tell(dataset.dataset)
    if data is not None and isinstance(dataset, data.ConcatDataset):
        return all(_can_tell(part) for part in dataset.datasets)
    return False


def _size_of(dataset: Any) -> int:
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, bytes, Mapping)):
        extra = ""
        if not isinstance(dataset, type) and any(
            hasattr(dataset, known) for known in ("get_all_patch_ids", "patch_ids")
        ):
            extra = " without __getitem__ (give its patch ids instead)"
        if _is_sampler(dataset):
            # Lightning rebuilds batch samplers with another sampler where our source stood.
            extra = (
                "; if Lightning put it there, pass Trainer(use_distributed_sampler=False): "
                "this sampler shards by itself"
            )
        if _name(dataset) == "PatchGroups":
            raise TypeError("source must be patch ids, got PatchGroups, which are grouped already")
        raise TypeError(
            "source must be a dataset, an array of patch ids or PatchGroups, "
            f"got {_name(dataset)}{extra}"
        )
    try:
        return len(dataset)
    except TypeError as error:
        raise TypeError(
            f"source must have a length (a map-style dataset), got {_name(dataset)}"
        ) from error


def _is_sampler(obj: Any) -> bool:
    data = devices.loaded("torch.utils.data")
    if data is not None and isinstance(obj, data.Sampler):
        return True
    return type(obj).__name__.endswith("Sampler")


def _name(obj: Any) -> str:
    return type(obj).__name__
