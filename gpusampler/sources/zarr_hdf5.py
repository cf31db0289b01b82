"""Patch ids in Zarr and HDF5 arrays, read in whole chunks."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.validation import check_id_shape
from gpusampler.sources.base import BLOCK, IntegerIds, Load, PatchIds
from gpusampler.sources.checks import (
    check_no_column,
    choose_column,
    import_library,
    is_instance,
    list_names,
    wrong_dtype_error,
)
from gpusampler.sources.strings import NamedIds, factorize_list

_MIN_READ = 1 << 16
"""Minimum number of ids per read, because a chunk may be far smaller."""


def zarr_hdf5_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    """Return the ids in a zarr or h5py array or group; None for anything else."""
    if is_instance(source, "zarr", "Array", "Group"):
        return _zarr_ids(source, column, f"a zarr {type(source).__name__}", None, progress)
    if is_instance(source, "h5py", "Dataset", "Group"):
        dataset = _hdf5_array(source, column, f"an HDF5 {type(source).__name__}")
        try:
            modified = os.stat(dataset.file.filename).st_mtime_ns
        except OSError:
            modified = None
        return _array_ids(dataset, lambda start, stop: dataset[start:stop], modified, progress)
    return None


def zarr_path_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in a Zarr folder, from its array or an array of its group."""
    zarr = import_library("zarr", path)
    try:
        source = zarr.open(path, mode="r")
    except PermissionError:
        raise
    except Exception as error:
        # Releases of zarr differ in the exception they raise.
        raise ValueError(f"source must be a Zarr array or group, got {path!r}: {error}") from error
    return _zarr_ids(source, column, repr(path), path, progress)


def hdf5_path_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in a dataset of an HDF5 file, which is open only during reads."""
    h5py = import_library("h5py", path)

    def open_file() -> Any:
        try:
            return h5py.File(path, "r")
        except PermissionError:
            raise
        except OSError as error:
            raise OSError(f"source must be a whole HDF5 file, got {path!r}: {error}") from error

    with open_file() as file:
        dataset = _hdf5_array(file, column, repr(path))
        name = dataset.name
        modified = os.stat(path).st_mtime_ns

        def load(start: int, stop: int) -> Any:
            with open_file() as file:
                return file[name][start:stop]

        return _array_ids(dataset, load, modified, progress)


def _zarr_ids(source: Any, column: Any, label: str, path: str | None, progress: bool) -> PatchIds:
    if is_instance(source, "zarr", "Group"):
        names = sorted(source.array_keys())
        column = _chosen_array(source, names, sorted(source.group_keys()), column, label)
        source = source[column]
        if not is_instance(source, "zarr", "Array"):
            raise ValueError(f"column must be an array of {label}, got the group {column!r}")
        path = None if path is None else os.path.join(path, column.strip("/"))
    else:
        check_no_column(column, label)
    modified = None if path is None else _last_modified(path)
    return _array_ids(source, lambda start, stop: source[start:stop], modified, progress)


def _last_modified(folder: str) -> int:
    """Return the latest modification time in a folder, in ns since 1970."""
    newest = os.stat(folder).st_mtime_ns
    for directory, _, files in os.walk(folder):
        for name in files:
            newest = max(newest, os.stat(os.path.join(directory, name)).st_mtime_ns)
    return newest


def _hdf5_array(source: Any, column: Any, label: str) -> Any:
    if is_instance(source, "h5py", "Dataset"):
        check_no_column(column, label)
        return source
    names = [name for name, item in source.items() if is_instance(item, "h5py", "Dataset")]
    groups = [name for name, item in source.items() if is_instance(item, "h5py", "Group")]
    column = _chosen_array(source, names, groups, column, label)
    item = source[column]
    if not is_instance(item, "h5py", "Dataset"):
        raise ValueError(f"column must be a dataset of {label}, got the group {column!r}")
    return item


def _chosen_array(source: Any, names: list[str], groups: list[str], column: Any, label: str) -> Any:
    """Return the name of the array to read in a group.

    It is ``column`` if that is a path in the group, else what `choose_column` returns.
    """
    try:
        if isinstance(column, str) and "/" in column and column in source:
            return column
    # Zarr raises for some paths, such as those with "..".
    except ValueError as error:
        raise ValueError(f"column must be a path in {label}, got {column!r}: {error}") from error
    try:
        return choose_column(names, column, label)
    except ValueError as error:
        if not groups:
            raise
        raise ValueError(
            f"{error}; the source also has groups ({list_names(groups)}): for an array in a group, "
            f"pass its path as column, such as '{groups[0]}/...'"
        ) from None


def _array_ids(array: Any, load: Load, modified: int | None, progress: bool) -> PatchIds:
    size = check_id_shape(array.shape)
    dtype, chunks = array.dtype, array.chunks
    if chunks:
        load = _ChunkCache(load, size, -(-_MIN_READ // chunks[0]) * chunks[0])
    # Any read decodes whole chunks.
    seekable = not chunks or chunks[0] <= BLOCK
    # h5py returns strings as objects; zarr may use StringDType (T).
    if dtype.kind in "UST" or (dtype.kind == "O" and _holds_text(array)):
        return NamedIds(
            lambda start, stop: factorize_list(load(start, stop).tolist(), start),
            size,
            modified=modified,
            seekable=seekable,
            progress=progress,
        )
    if dtype.kind not in "iu":
        raise wrong_dtype_error(dtype)
    return IntegerIds(load, size, dtype.name, modified=modified, seekable=seekable)


def _holds_text(array: Any) -> bool:
    return isinstance(array[0], (str, bytes))


class _ChunkCache:
    """Reads whole chunks and keeps the last one, so that consecutive reads do not decode it twice.

    ``load(start, stop)`` is called with multiples of ``chunk``; ``stop`` may also be ``size``.
    """

    def __init__(self, load: Load, size: int, chunk: int) -> None:
        self._load = load
        self._size = size
        self._chunk = chunk
        self._last: tuple[int, NDArray[Any]] = (0, np.empty(0, np.int64))

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """Return the values of samples ``start .. stop - 1``."""
        first, values = self._last
        head = values[:0]
        if first <= start < first + values.shape[0]:
            head = values[start - first : stop - first]
            start += head.shape[0]
            if start == stop:
                return head
        chunk = self._chunk
        first, end = start // chunk * chunk, min(self._size, -(-stop // chunk) * chunk)
        values = self._load(first, end)
        last = (end - 1) // chunk * chunk
        # A copy, because a view would keep all values of this read in memory.
        self._last = last, values[last - first :].copy()
        tail = values[start - first : stop - first]
        return np.concatenate([head, tail]) if head.shape[0] else tail
