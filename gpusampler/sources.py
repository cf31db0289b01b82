"""Where patch ids come from: an array, a dataset that knows them, or one that must be asked.

A dataset is asked, in this order, for ``get_all_patch_ids()``, ``patch_ids``, and at last for
``dataset[i]["patch_id"]``, sample by sample. ``Subset`` (``random_split`` makes these) and
``ConcatDataset`` of torch pass the question on to what they wrap.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gpusampler import arrays
from gpusampler.grouping import PatchGroups
from gpusampler.validation import as_array, as_int64

THREADED_ABOVE = 1000
"""Samples above which a dataset is read by a pool of threads, with a progress bar."""


def resolve(source: Any, *, progress: bool = True) -> tuple[PatchGroups, bool]:
    """Return the groups of any source that a sampler accepts.

    Parameters
    ----------
    source : PatchGroups, integer array, sequence of int, or dataset
    progress : bool
        Whether a dataset that is read sample by sample shows a bar (never when piped).

    Returns
    -------
    groups : PatchGroups
    placed : bool
        Whether the source lies on a device of its own, so that "auto" stays there.

    Raises
    ------
    TypeError
        If the source is none of these, or its ids are no integers.
    ValueError
        If it is empty, or has ids of another number than samples.
    """
    if isinstance(source, PatchGroups):
        return source, True
    if arrays.library_of(source) is not None:
        return PatchGroups.from_ids(source), True
    if _is_ids(source):
        return PatchGroups.from_ids(source), False
    ids = dataset_patch_ids(source, progress=progress)
    return PatchGroups.from_ids(ids), not arrays.device_of(ids).on_host


def _is_ids(source: Any) -> bool:
    """Whether a source is numbers in a list or a column, not a dataset or a list of samples."""
    # A column of a table (pandas, polars, Arrow) says that it is an array by this method.
    if isinstance(source, range) or hasattr(source, "__array__"):
        return True
    if not isinstance(source, (list, tuple)):
        return False
    return all(isinstance(item, (int, float, np.generic, list, tuple)) for item in source[:1])


def dataset_patch_ids(dataset: Any, *, progress: bool = True) -> Any:
    """Return the patch id of each sample of a map-style dataset.

    Parameters
    ----------
    dataset : object
        With ``__len__``, and one of ``get_all_patch_ids()``, ``patch_ids``, or samples that are
        mappings with an integer ``"patch_id"``.
    progress : bool

    Returns
    -------
    array, shape (len(dataset),)

    Raises
    ------
    TypeError
        If this is no dataset, or a sample has no integer patch id.
    ValueError
        If it is empty, or gives ids of another number than samples.
    """
    size = _size_of(dataset)
    if size == 0:
        raise ValueError(f"source must hold at least one sample, got an empty {_name(dataset)}")
    ids = _known_ids(dataset, progress)
    if ids is None:
        return _read_samples(dataset, size, progress)
    ids = as_array(ids, f"ids of {_name(dataset)}")
    if tuple(ids.shape[:1]) != (size,):
        raise ValueError(
            f"source must give one patch id a sample: {_name(dataset)} has {size} samples, "
            f"got ids of shape {tuple(ids.shape)}"
        )
    return ids


def _known_ids(dataset: Any, progress: bool) -> Any:
    """Ids that are there without touching a sample (of this dataset), or None."""
    given = getattr(dataset, "get_all_patch_ids", None)
    if callable(given):
        return given()
    given = getattr(dataset, "patch_ids", None)
    if given is not None:
        return given() if callable(given) else given
    data = arrays.loaded("torch.utils.data")
    if data is None:
        return None
    if isinstance(dataset, data.Subset):
        return _subset_ids(dataset, progress)
    if isinstance(dataset, data.ConcatDataset):
        parts = [
            as_int64(dataset_patch_ids(part, progress=progress), "ids of a part of ConcatDataset")
            for part in dataset.datasets
            if len(part)
        ]
        return np.concatenate(parts)
    return None


def _subset_ids(subset: Any, progress: bool) -> Any:
    """Ids of a Subset, by its indices, if what it wraps can tell; else it is read itself."""
    _size_of(subset.dataset)
    if not _can_tell(subset.dataset):
        return None
    whole = dataset_patch_ids(subset.dataset, progress=progress)
    indices = np.asarray(subset.indices, dtype=np.int64)
    if arrays.library_of(whole) == "numpy":
        return whole[indices]
    return whole[arrays.to_device(indices, arrays.device_of(whole))]


def _can_tell(dataset: Any) -> bool:
    """Whether no sample has to be read for the ids of a dataset, however deeply it is wrapped."""
    if callable(getattr(dataset, "get_all_patch_ids", None)):
        return True
    if getattr(dataset, "patch_ids", None) is not None:
        return True
    data = arrays.loaded("torch.utils.data")
    if data is not None and isinstance(dataset, data.Subset):
        return _can_tell(dataset.dataset)
    if data is not None and isinstance(dataset, data.ConcatDataset):
        return all(_can_tell(part) for part in dataset.datasets)
    return False


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
    data = arrays.loaded("torch.utils.data")
    if data is not None and isinstance(source, data.Subset):
        costs = patch_costs(source.dataset)
        if costs is not None and not isinstance(costs, Mapping):
            raise TypeError(
                "patch_costs() must be a mapping from patch ids where a Subset holds only some of "
                f"the patches, got {_name(costs)}"
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
                f"{_name(part)} in part {place}"
            )
        for patch_id, cost in part.items():
            if merged.setdefault(patch_id, cost) != cost:
                raise ValueError(
                    "patch_costs() must be the same in every part of a ConcatDataset, got "
                    f"{merged[patch_id]} and {cost} for patch {patch_id}"
                )
    return merged


def _size_of(dataset: Any) -> int:
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, (str, bytes, Mapping)):
        extra = ""
        if _is_sampler(dataset):
            # Lightning rebuilds batch samplers with another sampler where our source stood.
            extra = (
                "; if Lightning put it there, pass Trainer(use_distributed_sampler=False): "
                "this sampler shards by itself"
            )
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
    data = arrays.loaded("torch.utils.data")
    if data is not None and isinstance(obj, data.Sampler):
        return True
    return type(obj).__name__.endswith("Sampler")


def _name(obj: Any) -> str:
    return type(obj).__name__


def _read_samples(dataset: Any, size: int, progress: bool) -> NDArray[np.int64]:
    """Read ``dataset[i]["patch_id"]`` for every i; an error names the sample."""
    ids = np.empty(size, np.int64)

    stopped = threading.Event()

    def read(part: range) -> int:
        for i in part:
            if stopped.is_set():
                break
            ids[i] = _id_of_sample(dataset, i)
        return len(part)

    if size <= THREADED_ABOVE:
        read(range(size))
        return ids
    workers = min(32, (os.cpu_count() or 1) + 4)
    step = max(1, min(256, size // (workers * 8)))
    parts = [range(first, min(first + step, size)) for first in range(0, size, step)]
    bar = tqdm(total=size, desc="patch ids", unit=" samples", disable=None if progress else True)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gpusampler-ids")
    try:
        with bar:
            for done in _in_flight(pool, read, parts, 2 * workers):
                bar.update(done)
    finally:
        # After an exception or Ctrl-C no further sample is begun, and no thread stays behind.
        stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return ids


def _in_flight(
    pool: ThreadPoolExecutor, call: Any, parts: Sequence[range], most: int
) -> Iterable[int]:
    """Yield each part's result as it comes, with a bounded number of parts submitted."""
    waiting: set[Future[int]] = set()
    for part in parts:
        waiting.add(pool.submit(call, part))
        if len(waiting) >= most:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _id_of_sample(dataset: Any, i: int) -> int:
    try:
        sample = dataset[i]
    except Exception as error:
        raise RuntimeError(f"source must give every sample: sample {i} raised {error!r}") from error
    try:
        value = sample["patch_id"]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise TypeError(
            "source must have get_all_patch_ids(), patch_ids or samples with a 'patch_id', "
            f"got a {_name(sample)} without one as sample {i} of {_name(dataset)}"
        ) from error
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"patch_id must fit in int64, got {value} in sample {i}")
    array = np.asarray(arrays.to_numpy(value) if arrays.library_of(value) else value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"patch_id must be an int, got {value!r} in sample {i}")
    if int(array.item()) >= 1 << 63:
        raise ValueError(f"patch_id must fit in int64, got {value!r} in sample {i}")
    return int(array.item())
