"""Patch ids in Zarr and HDF5 arrays, read in whole chunks.

The files may be damaged or hostile: metadata is checked before a library acts on it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.files import check_regular, open_regular
from gpusampler.core.validation import check_id_shape
from gpusampler.sources.base import BLOCK, IntegerIds, Load, PatchIds
from gpusampler.sources.checks import (
    check_no_column,
    choose_column,
    explain_errors,
    import_library,
    is_instance,
    list_names,
    wrong_dtype_error,
)
from gpusampler.sources.strings import (
    MAX_BYTES,
    READ_BYTES,
    NamedIds,
    fixed_width_factorizer,
)

_MIN_READ = 1 << 16
"""Minimum number of ids per read, because a chunk may be far smaller."""

_ZARR, _HDF5 = "a Zarr array or group", "a whole HDF5 file"
_MAX_METADATA_BYTES = 1 << 26
_MAX_LINKS = 16
_CODEC_KEYS = ("compressor", "filters", "codecs")
_UNSAFE_CODECS = ("pickle", "dill", "joblib", "marshal")
"""Parts of the names of codecs that execute code in a chunk."""


class Allowed(NamedTuple):
    """What a Zarr or HDF5 source may do, as in `read_patch_ids`."""

    external: bool = False
    missing: bool = False


def zarr_hdf5_ids(source: Any, column: Any, progress: bool, allowed: Allowed) -> PatchIds | None:
    """Return the ids in a zarr or h5py array or group; None for anything else."""
    if is_instance(source, "zarr", "Array", "Group"):
        label = f"a zarr {type(source).__name__}"
        return _zarr_ids(source, column, label, None, progress, allowed)
    if not is_instance(source, "h5py", "Dataset", "Group"):
        return None
    label = f"an HDF5 {type(source).__name__}"
    with explain_errors(_HDF5, label):
        if is_instance(source, "h5py", "Dataset"):
            check_no_column(column, label)
            dataset = source
            _check_hdf5_files(dataset, label, allowed)
        else:
            path = _choose_hdf5(source, column, label, allowed)
            dataset = _open_hdf5(source, path, label, allowed)
        try:
            modified = os.stat(dataset.file.filename).st_mtime_ns
        except OSError:
            modified = None

        def load(start: int, stop: int) -> Any:
            return dataset[start:stop]

        return _hdf5_ids(dataset, load, label, modified, progress, allowed)


def zarr_path_ids(path: str, column: Any, progress: bool, allowed: Allowed) -> PatchIds:
    """Return the ids in a Zarr folder, from its array or an array of its group."""
    zarr = import_library("zarr", path)
    with explain_errors(_ZARR, repr(path)):
        _check_zarr_metadata(path, repr(path))
        source = zarr.open(path, mode="r")
    return _zarr_ids(source, column, repr(path), path, progress, allowed)


def hdf5_path_ids(path: str, column: Any, progress: bool, allowed: Allowed) -> PatchIds:
    """Return the ids in a dataset of an HDF5 file, which is open only during reads."""
    h5py = import_library("h5py", path)
    label = repr(path)

    def open_file() -> Any:
        check_regular(path)
        return h5py.File(path, "r")

    def load(start: int, stop: int) -> Any:
        with open_file() as file:
            return _open_hdf5(file, name, label, allowed)[start:stop]

    with explain_errors(_HDF5, label), open_file() as file:
        name = _choose_hdf5(file, column, label, allowed)
        dataset = _open_hdf5(file, name, label, allowed)
        modified = os.stat(path).st_mtime_ns
        return _hdf5_ids(dataset, load, label, modified, progress, allowed)


def _chosen_array(
    has_path: Callable[[str], bool], names: list[str], groups: list[str], column: Any, label: str
) -> Any:
    """Return the name of the array to read in a group.

    It is ``column`` if that is a path in the group, else what `choose_column` returns.
    """
    if isinstance(column, str) and "/" in column and has_path(column):
        return column
    try:
        return choose_column(names, column, label)
    except ValueError as error:
        if not groups:
            raise
        raise ValueError(
            f"{error}; the source also has groups ({list_names(groups)}): for an array in a group, "
            f"pass its path as column, such as '{groups[0]}/...'"
        ) from None


def _missing_error(what: str) -> ValueError:
    return ValueError(
        f"source must store a value of every sample, but {what}; if the fill value is meant, pass "
        "read_patch_ids(..., allow_missing=True)"
    )


# Zarr


def _zarr_ids(
    source: Any, column: Any, label: str, path: str | None, progress: bool, allowed: Allowed
) -> PatchIds:
    with explain_errors(_ZARR, label):
        if is_instance(source, "zarr", "Group"):
            column = _choose_zarr(source, column, label)
            if path is not None:
                path = os.path.join(path, column.strip("/"))
                _check_zarr_metadata(path, label)
            source = source[column]
            if not is_instance(source, "zarr", "Array"):
                raise ValueError(f"column must be an array of {label}, got the group {column!r}")
        else:
            check_no_column(column, label)
        _check_codecs(_zarr_codecs(source), label)
        _check_layout(source.shape, source.chunks, source.dtype, label)
        if not allowed.missing:
            _check_zarr_complete(source, label)

        def load(start: int, stop: int) -> Any:
            return source[start:stop]

        modified = None if path is None else _last_modified(path)
        return _array_ids(source, load, _ZARR, label, modified, progress)


def _choose_zarr(group: Any, column: Any, label: str) -> Any:
    def has_path(path: str) -> bool:
        try:
            return path in group
        # Zarr raises for some paths, such as those with "..".
        except ValueError as error:
            raise ValueError(f"column must be a path in {label}, got {path!r}: {error}") from error

    names, groups = sorted(group.array_keys()), sorted(group.group_keys())
    return _chosen_array(has_path, names, groups, column, label)


def _check_zarr_metadata(folder: str, label: str) -> None:
    """Check the codecs of an array before zarr opens it.

    zarr 2 decodes a fill value with the codec of objects when it opens an array.
    """
    for name in (".zarray", "zarr.json"):
        path = os.path.join(folder, name)
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_METADATA_BYTES:
            raise ValueError(
                f"{name!r} of {label} must be a file of at most {_MAX_METADATA_BYTES} bytes, got "
                f"{status.st_size} bytes"
            )
        with open_regular(path) as file:
            metadata = json.load(file)
        if not isinstance(metadata, dict):
            raise ValueError(f"{name!r} of {label} must be a JSON object")
        _check_codecs([metadata.get(key) for key in _CODEC_KEYS], label)


def _zarr_codecs(array: Any) -> list[Any]:
    """Return the codecs of an array, as objects or configurations."""
    if hasattr(array, "metadata"):
        metadata = array.metadata.to_dict()
        return [metadata.get(key) for key in _CODEC_KEYS]
    # zarr 2
    return [array.compressor, array.filters]


def _check_codecs(config: Any, label: str) -> None:
    """Raise ValueError for a codec that executes code, at any depth of a configuration."""
    if hasattr(config, "get_config"):
        config = config.get_config()
    if isinstance(config, dict):
        for key in ("id", "name"):
            name = config.get(key)
            if isinstance(name, str) and any(part in name.lower() for part in _UNSAFE_CODECS):
                raise ValueError(
                    f"source must not have the codec {name!r}, which executes code in a chunk, "
                    f"got {label}; if you trust the file, read the array and pass its values"
                )
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for part in config:
            _check_codecs(part, label)


def _check_zarr_complete(array: Any, label: str) -> None:
    """Raise ValueError if a chunk or shard of an array is not stored."""
    chunk = array.chunks[0]
    shard = (getattr(array, "shards", None) or array.chunks)[0]
    num_shards = -(-array.shape[0] // shard)
    if hasattr(array, "metadata"):
        # `nchunks_initialized` goes through all chunks, and damaged metadata may have 2^60.
        is_complete = (
            num_shards <= array.nbytes_stored()
            and array.nchunks_initialized >= num_shards * (shard // chunk)
        )
    else:
        # In zarr 2, `nchunks_initialized` also counts other files.
        storage = import_library("zarr.storage", label)
        names = set(storage.listdir(array.chunk_store, array.path))
        is_complete = num_shards <= len(names) and all(str(i) in names for i in range(num_shards))
    if not is_complete:
        raise _missing_error(
            f"some chunks are not stored in {label} (zarr does not store chunks of its fill value, "
            f"{array.fill_value!r}, without write_empty_chunks=True)"
        )


def _last_modified(folder: str) -> int:
    """Return the latest modification time in a folder, in ns since 1970."""
    newest = os.stat(folder).st_mtime_ns
    for directory, _, files in os.walk(folder):
        for name in files:
            newest = max(newest, os.stat(os.path.join(directory, name)).st_mtime_ns)
    return newest


# HDF5


def _choose_hdf5(group: Any, column: Any, label: str, allowed: Allowed) -> Any:
    """Return the path of the dataset to read in a group."""
    datasets, groups = [], []
    for name in group:
        try:
            item = _follow_links(group, name, label, allowed)
        except ValueError:
            # The error of this link matters only if it is chosen.
            datasets.append(name)
            continue
        if is_instance(item, "h5py", "Dataset"):
            datasets.append(name)
        elif is_instance(item, "h5py", "Group"):
            groups.append(name)

    def has_path(path: str) -> bool:
        return _follow_links(group, path, label, allowed) is not None

    return _chosen_array(has_path, datasets, groups, column, label)


def _open_hdf5(group: Any, path: str, label: str, allowed: Allowed) -> Any:
    """Return the dataset at a path in a group, which reads no files that are not allowed."""
    dataset = _follow_links(group, path, label, allowed)
    if not is_instance(dataset, "h5py", "Dataset"):
        raise ValueError(f"column must be a dataset of {label}, got the group {path!r}")
    _check_hdf5_files(dataset, label, allowed)
    return dataset


def _follow_links(group: Any, path: str, label: str, allowed: Allowed) -> Any:
    """Return the object at a path in a group, or None if there is none.

    HDF5 would open the file of an external link; here, such a link is an error unless allowed.
    """
    h5py = import_library("h5py", label)
    item = group.file if path.startswith("/") else group
    names = path.split("/")[::-1]
    num_links = 0
    while names:
        name = names.pop()
        if name in ("", "."):
            continue
        link = item.get(name, getlink=True) if is_instance(item, "h5py", "Group") else None
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink) and not allowed.external:
            raise _external_error(f"the external link {path!r}", label)
        if not isinstance(link, h5py.SoftLink):
            item = item[name]
            continue
        num_links += 1
        if num_links > _MAX_LINKS:
            raise ValueError(
                f"a path must have at most {_MAX_LINKS} soft links, got {path!r} in {label}"
            )
        names += link.path.split("/")[::-1]
        if link.path.startswith("/"):
            item = item.file
    return item


def _check_hdf5_files(dataset: Any, label: str, allowed: Allowed) -> None:
    if not allowed.external and (dataset.is_virtual or dataset.external):
        kind = "virtual dataset" if dataset.is_virtual else "dataset with external storage"
        raise _external_error(f"the {kind} {dataset.name!r}", label)


def _external_error(what: str, label: str) -> ValueError:
    return ValueError(
        f"source must not read other files, got {what} in {label}; if you trust the file, pass "
        "read_patch_ids(..., allow_external=True)"
    )


def _hdf5_ids(
    dataset: Any, load: Load, label: str, modified: int | None, progress: bool, allowed: Allowed
) -> PatchIds:
    _check_layout(dataset.shape, dataset.chunks, dataset.dtype, label)
    if not allowed.missing:
        _check_hdf5_complete(dataset, label)
    return _array_ids(dataset, load, _HDF5, label, modified, progress)


def _check_hdf5_complete(dataset: Any, label: str, depth: int = 0) -> None:
    """Raise ValueError if a value of a dataset is not stored, here or in the files it names."""
    if dataset.is_virtual:
        _check_virtual_sources(dataset, label, depth)
    elif dataset.external:
        num_bytes = dataset.size * dataset.dtype.itemsize
        for name, offset, length in dataset.external:
            length = min(length, num_bytes)
            if not os.path.isfile(name) or os.path.getsize(name) < offset + length:
                raise _missing_error(f"{label} names {name!r}, which is missing or too short")
            num_bytes -= length
    elif dataset.chunks:
        sizes = zip(dataset.shape, dataset.chunks, strict=True)
        num_chunks = math.prod(-(-size // chunk) for size, chunk in sizes)
        num_stored = dataset.id.get_num_chunks()
        if num_stored < num_chunks:
            raise _missing_error(f"only {num_stored} of {num_chunks} chunks are stored in {label}")
    elif dataset.id.get_storage_size() < dataset.size * dataset.id.get_type().get_size():
        raise _missing_error(f"those of {dataset.name!r} are not stored in {label}")


def _check_virtual_sources(dataset: Any, label: str, depth: int) -> None:
    h5py = import_library("h5py", label)
    if depth == _MAX_LINKS:
        raise ValueError(f"{label} must have at most {_MAX_LINKS} virtual datasets in each other")
    folder = os.path.dirname(os.path.abspath(dataset.file.filename))
    num_mapped = 0
    for virtual_space, file_name, name, space in dataset.virtual_sources():
        path = os.path.join(folder, file_name)
        num_points = virtual_space.get_select_npoints()
        try:
            # A file that is open for writing cannot be opened twice.
            with nullcontext(dataset.file) if file_name == "." else h5py.File(path, "r") as file:
                part = file[name]
                # All of a source is saved without its shape.
                if space.get_select_type() == h5py.h5s.SEL_ALL:
                    is_stored = part.size == num_points
                else:
                    last = space.get_select_bounds()[1]
                    is_stored = all(i < size for i, size in zip(last, part.shape, strict=True))
                _check_hdf5_complete(part, f"{path!r}, which {label} names", depth + 1)
        except (OSError, KeyError):
            is_stored = False
        if not is_stored:
            raise _missing_error(f"{label} names {name!r} in {path!r}, which is missing or shorter")
        num_mapped += num_points
    if num_mapped != dataset.size:
        raise _missing_error(f"{num_mapped} of {dataset.size} have a virtual source in {label}")


# Both


def _check_layout(shape: Any, chunks: Any, dtype: Any, label: str) -> None:
    """Raise TypeError or ValueError for an array of no ids, or of chunks that are too large."""
    if dtype.kind not in "iuUSTO":
        raise wrong_dtype_error(dtype, f" in {label}")
    if shape is None:
        raise ValueError(f"ids in {label} must have a shape, got an empty dataspace")
    size = check_id_shape(shape, f"ids in {label}")
    if not 0 < size < 1 << 63:
        raise ValueError(f"the number of ids in {label} must be > 0 and < 2**63, got {size}")
    chunk = int(chunks[0]) if chunks else 1
    if chunk < 1:
        raise ValueError(f"the chunks of {label} must have a length >= 1, got {chunk}")
    num_bytes = chunk * np.dtype(dtype).itemsize
    if not 0 < num_bytes <= MAX_BYTES:
        raise ValueError(
            f"the chunks of {label} must have 1 to {MAX_BYTES} bytes, got {num_bytes}: write it "
            "with smaller chunks, or read the array and pass its values"
        )


def _array_ids(
    array: Any, load: Load, kind: str, label: str, modified: int | None, progress: bool
) -> PatchIds:
    size, dtype, chunks = int(array.shape[0]), array.dtype, array.chunks

    def explained_load(start: int, stop: int) -> NDArray[Any]:
        with explain_errors(kind, label):
            return load(start, stop)

    load_ids: Load = explained_load
    if chunks:
        num_rows = max(min(_MIN_READ, READ_BYTES // dtype.itemsize), 1)
        load_ids = _ChunkCache(explained_load, size, -(-num_rows // chunks[0]) * chunks[0])
    # Any read decodes whole chunks.
    seekable = not chunks or chunks[0] <= BLOCK
    # h5py returns strings as objects; zarr may use StringDType (T).
    if dtype.kind in "UST" or (dtype.kind == "O" and _holds_text(array)):
        return NamedIds(
            fixed_width_factorizer(load_ids, dtype, label),
            size,
            modified=modified,
            seekable=seekable,
            progress=progress,
        )
    if dtype.kind not in "iu":
        raise wrong_dtype_error(dtype, f" in {label}")
    return IntegerIds(load_ids, size, dtype.name, modified=modified, seekable=seekable)


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
