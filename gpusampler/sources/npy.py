"""Patch ids in an .npy file.

If the file shrinks, `read` raises an error; a memory map would crash the process (SIGBUS).
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.files import open_regular
from gpusampler.core.npy_header import NpyHeader, read_npy_header
from gpusampler.core.validation import check_id_shape
from gpusampler.sources.base import IntegerIds, PatchIds
from gpusampler.sources.checks import check_no_column, wrong_dtype_error
from gpusampler.sources.strings import NamedIds, fixed_width_factorizer

_GZIP, _ZIP = b"\x1f\x8b", b"PK\x03\x04"


def npy_ids(path: str, column: Any, progress: bool) -> PatchIds:
    """Return the ids in an .npy file; only its header is read now, unless the ids are strings."""
    check_no_column(column, "an .npy file")
    with open_regular(path) as file:
        header = _read_header(file, path)
        length = os.fstat(file.fileno()).st_size
        modified = os.fstat(file.fileno()).st_mtime_ns
    start, dtype = header.offset, header.dtype
    if dtype.hasobject:
        raise wrong_dtype_error(dtype, f" (pickled arrays are not supported) in {path!r}")
    size = check_id_shape(header.shape, f"ids in {path!r}")
    needed = header.file_bytes
    if length < needed:
        raise ValueError(
            f"source must be a complete .npy file: {path!r} must have {needed} bytes, got "
            f"{length}, so {needed - length} bytes are missing"
        )

    def load(first: int, stop: int) -> NDArray[Any]:
        content = np.empty((stop - first) * dtype.itemsize, np.uint8)
        with open_regular(path) as file:
            file.seek(start + first * dtype.itemsize)
            num_bytes = _fill(file, content.data)
        if num_bytes < content.size:
            raise OSError(
                f"source must not shrink while it is read: {path!r} must have {needed} bytes, "
                f"got {os.path.getsize(path)}"
            )
        return content.view(dtype)

    if dtype.kind in "US":
        return NamedIds(
            fixed_width_factorizer(load, dtype, repr(path)),
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


def _read_header(file: BinaryIO, path: str) -> NpyHeader:
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
        return read_npy_header(file)
    except ValueError as error:
        raise ValueError(f"source must be an .npy file, got {path!r}: {error}") from None
