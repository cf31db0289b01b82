"""Choose the reader of a source by its type, or by the suffix and first bytes of a file."""

from __future__ import annotations

import errno
import os
from typing import Any

from gpusampler.core import arrays
from gpusampler.core.files import open_regular
from gpusampler.sources.arrow import arrow_ids
from gpusampler.sources.base import PatchIds
from gpusampler.sources.checks import check_no_column
from gpusampler.sources.dataframes import dataframe_ids
from gpusampler.sources.in_memory import array_ids, is_list_of_ids, list_ids
from gpusampler.sources.npy import npy_ids
from gpusampler.sources.parquet import SUFFIXES, has_parquet, parquet_ids, parquet_path_ids
from gpusampler.sources.zarr_hdf5 import (
    Allowed,
    hdf5_path_ids,
    zarr_hdf5_ids,
    zarr_path_ids,
)

_SUPPORTED = (
    ".npy, .parquet or .pq (a file or a folder of them), .zarr (a folder), .h5, .hdf5 or .hdf"
)
_HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")
_NOTHING = Allowed()
_INDEX_MAGIC = b"gpusampl"
"""First bytes of `gpusampler.groups.index_format.MAGIC`."""


def known_format_ids(
    source: Any,
    column: Any = None,
    *,
    name: str = "ids",
    progress: bool = True,
    allowed: Allowed = _NOTHING,
) -> PatchIds | None:
    """`read_patch_ids` for arrays, lists, files, tables and columns; None for anything else.

    ``name`` is the name of ids in memory in error messages.
    """
    if isinstance(source, PatchIds):
        check_no_column(column, f"a {type(source).__name__}")
        return source
    if isinstance(source, (str, os.PathLike)):
        # Make the path absolute, because the working directory may change before the ids are read.
        return _reopenable_ids(os.path.abspath(os.fsdecode(source)), column, progress, allowed)
    if arrays.library_of(source) is not None:
        return array_ids(source, column, name, progress)
    for reader in (dataframe_ids, arrow_ids, parquet_ids):
        ids = reader(source, column, progress)
        if ids is not None:
            return ids
    ids = zarr_hdf5_ids(source, column, progress, allowed)
    if ids is not None:
        return ids
    # Columns of other table libraries have __array__.
    if is_list_of_ids(source) or hasattr(source, "__array__"):
        check_no_column(column, f"a {type(source).__name__}")
        return list_ids(source, name, progress)
    return None


def _reopenable_ids(
    path: str, column: Any, progress: bool, allowed: Allowed = _NOTHING
) -> PatchIds:
    """Return the ids at a path; only the path is pickled."""
    ids = _path_ids(path, column, progress, allowed)
    ids.reopen = _reopenable_ids, (path, column, False, allowed)
    return ids


def _path_ids(path: str, column: Any, progress: bool, allowed: Allowed) -> PatchIds:
    """Return the ids in a file or folder; suffixes take precedence over the first bytes."""
    try:
        if os.path.isdir(path):
            return _folder_ids(path, column, progress, allowed)
        with open_regular(path) as file:
            head = file.read(8)
        name = path.lower()
        if name.endswith((".npy", *SUFFIXES, *_HDF5_SUFFIXES)):
            # The suffix takes precedence.
            head = b""
        if name.endswith(".npy") or head.startswith(b"\x93NUMPY"):
            return npy_ids(path, column, progress)
        if name.endswith(SUFFIXES) or head.startswith(b"PAR1"):
            return parquet_path_ids(path, column, progress)
        if name.endswith(_HDF5_SUFFIXES) or head.startswith(b"\x89HDF\r\n"):
            return hdf5_path_ids(path, column, progress, allowed)
    except FileNotFoundError as error:
        if error.filename not in (None, path):
            raise
        raise FileNotFoundError(
            errno.ENOENT, "source must be an existing file or folder", path
        ) from None
    except PermissionError as error:
        raise PermissionError(
            errno.EACCES,
            "source must be readable by this user; its owner can run chmod a+r on a file or "
            "chmod a+rx on a folder",
            error.filename or path,
        ) from error
    if head == _INDEX_MAGIC:
        raise ValueError(
            f"source must be patch ids, got an index file: {path!r}; open it with PatchGroups.load"
        )
    raise ValueError(f"source must be a path that ends in {_SUPPORTED}, got {path!r}")


def _folder_ids(path: str, column: Any, progress: bool, allowed: Allowed) -> PatchIds:
    names = set(os.listdir(path))
    if path.rstrip(os.sep).lower().endswith(".zarr") or names.intersection(_ZARR_FILES):
        return zarr_path_ids(path, column, progress, allowed)
    if path.rstrip(os.sep).lower().endswith(SUFFIXES) or has_parquet(path):
        return parquet_path_ids(path, column, progress)
    raise ValueError(
        f"source must be a file, a Zarr folder or a folder with .parquet or .pq files, got the "
        f"folder {path!r}"
    )
