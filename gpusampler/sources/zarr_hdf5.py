"""Ids in arrays of Zarr and HDF5, read at the borders of their chunks."""

from __future__ import annotations

import os
from typing import Any

from gpusampler.sources.base import BLOCK, PatchIds
from gpusampler.sources.column_checks import (
    LISTED,
    checked_shape,
    chosen_column,
    imported,
    is_a,
    no_column,
    wrong_type,
)
from gpusampler.sources.column_reader import ColumnIds, Load, Pieces
from gpusampler.sources.strings import NamedIds, factor_list

_PIECE = 1 << 16
"""Ids that are read at least; a chunk may be far smaller."""


def chunked_ids(source: Any, column: Any, progress: bool) -> PatchIds | None:
    """Return the ids in an array or a group of zarr or h5py; None for anything else.

    Raises
    ------
    TypeError, ValueError
        If they are neither integers nor names, not 1-D, or none; if a column is due, or is none.
    """
    if is_a(source, "zarr", "Array", "Group"):
        return _zarr_ids(source, column, f"a zarr {type(source).__name__}", None, progress)
    if is_a(source, "h5py", "Dataset", "Group"):
        found = _hdf5_array(source, column, f"an HDF5 {type(source).__name__}")
        try:
            modified = os.stat(found.file.filename).st_mtime_ns
        except OSError:
            modified = None
        return _array_ids(found, lambda start, stop: found[start:stop], modified, progress)
    return None


def zarr_path_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in a folder of Zarr: an array, or one of a group.

    Raises
    ------
    RuntimeError
        If zarr is not installed.
    TypeError, ValueError
        As by `chunked_ids`, or if this is no Zarr.
    """
    zarr = imported("zarr", "zarr", path)
    try:
        source = zarr.open(path, mode="r")
    except PermissionError:
        raise
    except Exception as error:
        # Which one is raised changes from release to release.
        raise ValueError(f"source must be a Zarr array or group, got {path!r}: {error}") from error
    return _zarr_ids(source, column, repr(path), path, progress)


def hdf5_path_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in a dataset of an HDF5 file, which is open only while it is read.

    Raises
    ------
    RuntimeError
        If h5py is not installed.
    OSError
        If it is no HDF5 file, or is cut off.
    TypeError, ValueError
        As by `chunked_ids`.
    """
    h5py = imported("h5py", "hdf5", path)

    def opened() -> Any:
        try:
            return h5py.File(path, "r")
        except PermissionError:
            raise
        except OSError as error:
            raise OSError(f"source must be a whole HDF5 file, got {path!r}: {error}") from error

    with opened() as file:
        found = _hdf5_array(file, column, repr(path))
        name = found.name
        modified = os.stat(path).st_mtime_ns

        def load(start: int, stop: int) -> Any:
            with opened() as file:
                return file[name][start:stop]

        return _array_ids(found, load, modified, progress)


def _zarr_ids(source: Any, column: Any, what: str, path: str | None, progress: bool) -> PatchIds:
    if is_a(source, "zarr", "Group"):
        names = sorted(source.array_keys())
        column = _chosen_array(source, names, sorted(source.group_keys()), column, what)
        source = source[column]
        if not is_a(source, "zarr", "Array"):
            raise ValueError(f"column must be an array of {what}, got the group {column!r}")
        path = None if path is None else os.path.join(path, column.strip("/"))
    else:
        no_column(column, what)
    modified = None if path is None else _newest(path)
    return _array_ids(source, lambda start, stop: source[start:stop], modified, progress)


def _newest(folder: str) -> int:
    """Return when a file in a folder was changed last."""
    newest = os.stat(folder).st_mtime_ns
    for place, _, files in os.walk(folder):
        for name in files:
            newest = max(newest, os.stat(os.path.join(place, name)).st_mtime_ns)
    return newest


def _hdf5_array(source: Any, column: Any, what: str) -> Any:
    if is_a(source, "h5py", "Dataset"):
        no_column(column, what)
        return source
    names = [name for name, item in source.items() if is_a(item, "h5py", "Dataset")]
    groups = [name for name, item in source.items() if is_a(item, "h5py", "Group")]
    column = _chosen_array(source, names, groups, column, what)
    found = source[column]
    if not is_a(found, "h5py", "Dataset"):
        raise ValueError(f"column must be a dataset of {what}, got the group {column!r}")
    return found


def _chosen_array(source: Any, names: list[str], groups: list[str], column: Any, what: str) -> Any:
    """Return the array to read in a group: as by `chosen_column`, or by a path."""
    try:
        if isinstance(column, str) and "/" in column and column in source:
            return column
    # Zarr refuses "..", for one.
    except ValueError as error:
        raise ValueError(f"column must be a path in {what}, got {column!r}: {error}") from error
    try:
        return chosen_column(names, column, what)
    except ValueError as error:
        if not groups:
            raise
        listed = ", ".join(map(repr, groups[:LISTED])) + (", ..." if len(groups) > LISTED else "")
        raise ValueError(
            f"{error}; it has groups too ({listed}), whose arrays are named '{groups[0]}/...'"
        ) from None


def _array_ids(array: Any, load: Load, modified: int | None, progress: bool) -> PatchIds:
    size = checked_shape(array.shape)
    dtype, chunks = array.dtype, array.chunks
    if chunks:
        load = Pieces(load, size, -(-_PIECE // chunks[0]) * chunks[0])
    # A chunk is decoded whole, however little is asked for.
    seekable = not chunks or chunks[0] <= BLOCK
    # HDF5 gives strings as objects; zarr's may be T, of variable length.
    if dtype.kind in "UST" or (dtype.kind == "O" and _holds_text(array)):
        return NamedIds(
            lambda start, stop: factor_list(load(start, stop).tolist(), start),
            size,
            modified=modified,
            seekable=seekable,
            progress=progress,
        )
    if dtype.kind not in "iu":
        raise wrong_type(dtype)
    return ColumnIds(load, size, dtype.name, modified=modified, seekable=seekable)


def _holds_text(array: Any) -> bool:
    return isinstance(array[0], (str, bytes))
