"""Patch ids in an .npy file.

If the file shrinks, `read` raises an error; a memory map would crash the process (SIGBUS).
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from gpusampler.core.validation import check_id_shape
from gpusampler.sources.base import IntegerIds, PatchIds
from gpusampler.sources.checks import check_no_column, wrong_dtype_error
from gpusampler.sources.strings import NamedIds, factorize_list

_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"


def npy_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in an .npy file; only its header is read now, unless the ids are strings."""
    check_no_column(column, "an .npy file")
    with open(path, "rb") as file:
        shape, dtype = _read_header(file, path)
        start, length = file.tell(), os.fstat(file.fileno()).st_size
        modified = os.fstat(file.fileno()).st_mtime_ns
    if dtype.hasobject:
        raise wrong_dtype_error(dtype, f" (pickled arrays are not supported) in {path!r}")
    size = check_id_shape(shape, f"ids in {path!r}")
    needed = start + size * dtype.itemsize
    if length < needed:
        raise ValueError(
            f"source must be a complete .npy file: {path!r} must have {needed} bytes, got "
            f"{length}, so {needed - length} bytes are missing"
        )

    def load(first: int, stop: int) -> NDArray[Any]:
        content = np.empty((stop - first) * dtype.itemsize, np.uint8)
        with open(path, "rb", buffering=0) as raw:
            raw.seek(start + first * dtype.itemsize)
            num_bytes = _fill(raw, content.data)
        if num_bytes < content.size:
            raise OSError(
                f"source must not shrink while it is read: {path!r} must have {needed} bytes, "
                f"got {os.path.getsize(path)}"
            )
        return content.view(dtype)

    if dtype.kind in "US":
        return NamedIds(
            lambda first, stop: factorize_list(load(first, stop).tolist(), first),
            size,
            modified=modified,
            progress=progress,
        )
    if dtype.kind not in "iu":
        raise wrong_dtype_error(dtype, f" in {path!r}")
    return IntegerIds(load, size, dtype.name, modified=modified)


def _fill(file: Any, buffer: memoryview) -> int:
    """Read until a buffer is full or the file ends; return the number of bytes read."""
    num_bytes = 0
    while num_bytes < len(buffer):
        # One call returns at most 2 GB.
        count = file.readinto(buffer[num_bytes:])
        if not count:
            break
        num_bytes += count
    return num_bytes


def _read_header(file: BinaryIO, path: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    magic = file.read(4)
    file.seek(0)
    if magic[:2] == _GZIP:
        raise ValueError(
            f"source must be an .npy file, got a gzip file: {path!r}; decompress it first"
        )
    if magic == _ZIP:
        raise ValueError(
            f"source must be an .npy file, got an .npz archive: {path!r}; save one of its arrays "
            "with numpy.save"
        )
    try:
        version = npy.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = npy.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = npy.read_array_header_2_0(file)
        else:
            raise ValueError(
                f"its format version must be (1, 0) or (2, 0), got {version}; save a 1-D array of "
                "the ids with numpy.save"
            )
    except ValueError as error:
        raise ValueError(f"source must be an .npy file, got {path!r}: {error}") from None
    return shape, dtype
