"""Ids in a file or a folder: what it is, by its name and then by how it begins."""

from __future__ import annotations

import errno
import os
from typing import Any

from gpusampler.sources.base import PatchIds
from gpusampler.sources.npy import npy_ids
from gpusampler.sources.parquet import SUFFIXES, has_parquet, parquet_path_ids
from gpusampler.sources.zarr_hdf5 import hdf5_path_ids, zarr_path_ids

_UNDERSTOOD = (
    ".npy, .parquet or .pq (a file or a folder of them), .zarr (a folder), .h5, .hdf5 or .hdf"
)
_HDF5 = (".h5", ".hdf5", ".hdf")
_INDEX = b"gpusampl"
"""How `gpusampler.groups.index_format.MAGIC` begins."""
_ZARR = ("zarr.json", ".zarray", ".zgroup")
_BEGINNINGS = {b"\x93NUMPY": npy_ids, b"PAR1": parquet_path_ids, b"\x89HDF\r\n": hdf5_path_ids}


def path_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in a file or a folder.

    Raises
    ------
    FileNotFoundError, PermissionError
        If it is not there, or may not be read.
    RuntimeError
        If the library that reads it is not installed.
    OSError, TypeError, ValueError
        If it is of no kind that is understood, or holds no ids; see the readers of each.
    """
    try:
        if os.path.isdir(path):
            return _folder_ids(path, column, progress)
        with open(path, "rb") as file:
            begin = file.read(8)
        name = path.lower()
        if name.endswith(".npy"):
            return npy_ids(path, column, progress)
        if name.endswith(SUFFIXES):
            return parquet_path_ids(path, column, progress)
        if name.endswith(_HDF5):
            return hdf5_path_ids(path, column, progress)
        for known, reader in _BEGINNINGS.items():
            if begin.startswith(known):
                return reader(path, column, progress)
    except FileNotFoundError as error:
        if error.filename not in (None, path):
            raise
        raise FileNotFoundError(
            errno.ENOENT, "source must be there: no such file or folder", path
        ) from None
    except PermissionError as error:
        raise PermissionError(
            errno.EACCES,
            "source must be readable: this user may not read it; its owner can allow that "
            "(chmod a+r a file, a+rx a folder)",
            error.filename or path,
        ) from error
    if begin == _INDEX:
        raise ValueError(
            f"source must be patch ids, got an index file: {path!r}; PatchGroups.load opens it"
        )
    raise ValueError(f"source must be one of {_UNDERSTOOD}, got {path!r}")


def _folder_ids(path: str, column: Any, progress: bool) -> PatchIds:
    names = set(os.listdir(path))
    if path.rstrip(os.sep).lower().endswith(".zarr") or names.intersection(_ZARR):
        return zarr_path_ids(path, column, progress)
    if path.rstrip(os.sep).lower().endswith(SUFFIXES) or has_parquet(path):
        return parquet_path_ids(path, column, progress)
    raise ValueError(f"source must be one of {_UNDERSTOOD}, got the folder {path!r}")
