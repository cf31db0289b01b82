"""Patch ids in memory: arrays of NumPy, torch and CuPy, memory maps, and lists."""

from __future__ import annotations

import enum
import mmap
import os
from array import array as stdlib_array
from numbers import Number
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.log import warn
from gpusampler.core.text import short_repr
from gpusampler.core.validation import as_array, check_id_array, check_id_shape
from gpusampler.sources.base import IntegerIds, PatchIds
from gpusampler.sources.checks import (
    check_fits_int64,
    check_no_column,
    check_no_missing,
    check_no_plain_enum,
    choose_column,
    integers_from_list,
    is_key,
    is_missing,
)
from gpusampler.sources.strings import NamedIds, factorize_list

MANY_TUPLES = 100
"""Number of tuples, all different, that are probably samples rather than ids."""


class ArrayIds(PatchIds):
    """Integer ids in a 1-D NumPy, torch or CuPy ``array`` on any device, which is not copied.

    ``name`` is the array's name in error messages.
    """

    def __init__(self, array: Any, name: str = "ids") -> None:
        self.array = check_id_array(array, name)
        self.size = int(self.array.shape[0])
        self.dtype = arrays.dtype_name(self.array)
        self.device = arrays.device_of(self.array)
        self._file = BackingFile.of(self.array)
        self.in_memory = self._file is None
        self.modified = None if self._file is None else self._file.modified()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids of samples ``start .. stop - 1``; see `PatchIds.read`."""
        ids = self.array[start:stop]
        if self._file is not None:
            self._file.check_size(ids)
        return check_fits_int64(arrays.to_numpy(ids), start)


class BackingFile:
    """File of a memory map; reading past the end of a shortened file would crash (SIGBUS)."""

    def __init__(self, mapped: mmap.mmap, name: str | None, offset: int) -> None:
        self._mapped = mapped
        self._name = name
        # A map starts at a multiple of the granularity, unlike the offset of np.memmap.
        self._offset = offset - offset % mmap.ALLOCATIONGRANULARITY
        self._address = byte_bounds(np.frombuffer(mapped, np.uint8))[0]

    @classmethod
    def of(cls, array: Any) -> BackingFile | None:
        """Return the file under an array that is a view of a memory map, or None."""
        name, offset, base = None, 0, array
        while isinstance(base, (np.ndarray, memoryview)):
            if isinstance(base, np.memmap) and base.filename is not None:
                name, offset = os.fspath(base.filename), base.offset
            base = base.obj if isinstance(base, memoryview) else base.base
        if not isinstance(base, mmap.mmap):
            return None
        try:
            base.size()
        except (OSError, ValueError):
            # Anonymous shared memory, or a map whose file is closed.
            return None
        return cls(base, name, offset)

    def modified(self) -> int | None:
        """Return the modification time of the file in ns since 1970; None if it has no path."""
        try:
            return None if self._name is None else os.stat(self._name).st_mtime_ns
        except OSError:
            return None

    def check_size(self, array: NDArray[Any]) -> None:
        """Raise OSError if the file ends before the end of an array in the map."""
        end = byte_bounds(array)[1] - self._address + self._offset
        size = self._mapped.size()
        if array.size and size < end:
            name = "the file under the memory map" if self._name is None else repr(self._name)
            raise OSError(
                f"source must not shrink while it is read: {name} must have {end} bytes or "
                f"more, got {size}"
            )


def array_ids(source: Any, column: Any, name: str, progress: bool) -> PatchIds:
    """Return the ids in a NumPy, torch or CuPy array."""
    if isinstance(source, np.ndarray):
        if source.dtype.names is not None:
            source = source[choose_column(source.dtype.names, column, "a structured array")]
            column = None
        if isinstance(source, np.ma.MaskedArray):
            check_id_shape(source.shape, name)
            check_no_missing(np.ma.getmaskarray(source), 0)
            source = source.data
        check_no_column(column, f"a {type(source).__name__}")
        # T is StringDType. The first value of an object array decides between names and integers.
        if source.dtype.kind in "UST" or (source.dtype.kind == "O" and source.ndim == 1):
            return _object_array_ids(source, check_id_shape(source.shape, name), name, progress)
    check_no_column(column, f"a {type(source).__name__}")
    return ArrayIds(source, name)


def _object_array_ids(array: NDArray[Any], size: int, name: str, progress: bool) -> PatchIds:
    file = BackingFile.of(array)
    modified = None if file is None else file.modified()

    def values(start: int, stop: int) -> list[Any]:
        stretch = array[start:stop]
        if file is not None:
            file.check_size(stretch)
        result: list[Any] = stretch.tolist()
        return result

    return object_ids(values, size, name, progress, modified=modified)


def object_ids(
    values: Any, size: int, name: str, progress: bool, *, modified: int | None = None
) -> PatchIds:
    """Return ids from ``values(start, stop)``, a list of str, bytes or other keys, or of int."""
    first = _first_value(values, size)
    check_no_plain_enum(first, name)
    if is_key(first):
        ids = NamedIds(
            lambda start, stop: factorize_list(values(start, stop), start),
            size,
            modified=modified,
            progress=progress,
        )
        if isinstance(first, tuple) and len(ids.names or ()) == size >= MANY_TUPLES:
            warn(
                f"each of {size} tuples names a patch of its own: if they are samples, pass the "
                "patch ids of the samples instead"
            )
        return ids
    # Check the first values now, so that a column of a wrong type fails at once.
    integers_from_list(values(0, min(size, 1000)), 0, name)
    return IntegerIds(
        lambda start, stop: integers_from_list(values(start, stop), start, name),
        size,
        "int64",
        modified=modified,
    )


def _first_value(values: Any, size: int) -> Any:
    """Return the first value that is not missing, or None."""
    for start in range(0, size, 1000):
        for value in values(start, min(start + 1000, size)):
            if not is_missing(value):
                return value
    return None


def is_list_of_ids(source: Any) -> bool:
    """Whether ``source`` is a list, tuple or range of ids rather than of samples."""
    if isinstance(source, (range, stdlib_array, memoryview)):
        return True
    if not isinstance(source, (list, tuple)):
        return False
    first = next((item for item in source if item is not None), None)
    if first is not None and arrays.library_of(first) is not None:
        # A 0-d array is an id, any other array a sample.
        return np.ndim(first) == 0
    plain = (Number, np.generic, list, tuple, enum.Enum)
    return not source or isinstance(first, plain) or is_key(first)


def list_ids(source: Any, name: str, progress: bool) -> PatchIds:
    """Return the ids in a list, tuple, range, or object with ``__array__``."""
    if isinstance(source, (list, tuple)) and any(
        isinstance(item, enum.Enum) or item is None or is_key(item) for item in source[:1]
    ):
        return object_ids(lambda start, stop: list(source[start:stop]), len(source), name, progress)
    if isinstance(source, (stdlib_array, memoryview)):
        source = np.asarray(source)
    array = as_array(source, name)
    if array.ndim == 2:
        check_id_shape(array.shape, name)
    if array.dtype.kind == "O" and array.ndim == 1 and isinstance(source, (list, tuple)):
        return ArrayIds(integers_from_list(list(source), 0, name), name)
    if array.dtype.kind in "UST" and isinstance(source, (list, tuple)):
        # NumPy converts integers next to names to strings.
        for i, item in enumerate(source):
            if not isinstance(item, (int, np.integer)):
                raise TypeError(
                    f"{name} must be all strings or all integers, got {short_repr(item)} in sample "
                    f"{i}; convert them to one type"
                )
    if array.dtype.kind in "UOST":
        return array_ids(array, None, name, progress)
    return ArrayIds(source if array.dtype.kind not in "iu" else array, name)
