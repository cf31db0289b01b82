"""Ids in an .npy file, read by file reads: where the file shrinks, these fail, a map would kill."""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from gpusampler.sources.base import PatchIds
from gpusampler.sources.column_checks import checked_shape, no_column, wrong_type
from gpusampler.sources.column_reader import ColumnIds
from gpusampler.sources.strings import NamedIds, factor_list

_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"


def npy_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in an .npy file, of which only the header is read now (names: all of it).

    Raises
    ------
    TypeError
        If it holds neither integers nor names.
    ValueError
        If it is no .npy file, is cut off, is not 1-D, is empty, or a column is named.
    """
    no_column(column, "an .npy file")
    with open(path, "rb") as file:
        shape, dtype = _header(file, path)
        start, length = file.tell(), os.fstat(file.fileno()).st_size
        modified = os.fstat(file.fileno()).st_mtime_ns
    if dtype.hasobject:
        raise wrong_type(dtype, f" (pickled, which is not read) in {path!r}")
    size = checked_shape(shape, f"ids in {path!r}")
    whole = start + size * dtype.itemsize
    if length < whole:
        raise ValueError(
            f"source must be a whole .npy file: {path!r} must have {whole} bytes, got {length}, "
            f"so {whole - length} bytes are missing"
        )

    def load(first: int, last: int) -> NDArray[Any]:
        content = np.empty((last - first) * dtype.itemsize, np.uint8)
        with open(path, "rb", buffering=0) as raw:
            raw.seek(start + first * dtype.itemsize)
            done = _fill(raw, content.data)
        if done < content.size:
            raise OSError(
                f"source must keep its length while it is read: {path!r} must have {whole} bytes, "
                f"got {os.path.getsize(path)}"
            )
        return content.view(dtype)

    if dtype.kind in "US":
        return NamedIds(
            lambda first, last: factor_list(load(first, last).tolist(), first),
            size,
            modified=modified,
            progress=progress,
        )
    if dtype.kind not in "iu":
        raise wrong_type(dtype, f" in {path!r}")
    return ColumnIds(load, size, dtype.name, modified=modified)


def _fill(file: Any, into: memoryview) -> int:
    """Read until a buffer is full or the file ends; return how many bytes came."""
    done = 0
    while done < len(into):
        # One call gives 2 GB at most.
        count = file.readinto(into[done:])
        if not count:
            break
        done += count
    return done


def _header(file: BinaryIO, path: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    begin = file.read(4)
    file.seek(0)
    if begin[:2] == _GZIP:
        raise ValueError(
            f"source must be an .npy file, got one packed by gzip: {path!r}; unpack it first"
        )
    if begin == _ZIP:
        raise ValueError(
            f"source must be an .npy file, got an archive of several (.npz): {path!r}; save one of "
            "its arrays by numpy.save"
        )
    try:
        version = npy.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = npy.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = npy.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} of the format is not read")
    except ValueError as error:
        raise ValueError(f"source must be an .npy file, got {path!r}: {error}") from None
    return shape, dtype
