"""Rows of arrays in files: HDF5 datasets, zarr arrays and memory maps, read in file order.

HDF5 takes microseconds for a call, and zarr a part of a millisecond for a chunk, however few rows
are wanted. So many rows are read at once, ascending, and each chunk is decoded once for all of
them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from math import prod
from threading import Event
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.arrays import Int64
from gpusampler.sources.checks import is_instance

PIECE_BYTES = 1 << 22
"""Number of bytes read per call, unless a chunk of the file is larger."""
CELL_BYTES = 1 << 15
"""Number of bytes that are copied from the page cache in the time of one call to HDF5."""


class FileRows:
    """Rows of an array in a file, by ascending sample.

    A subclass reads the rows; ``array`` must have a shape (N, ...) and a dtype of NumPy.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype[Any] = np.dtype(array.dtype)
        self.itemsize = self.dtype.itemsize
        self.row_bytes: int = prod(self.shape[1:]) * self.itemsize

    def read(self, rows: Int64, stop: Event) -> NDArray[Any]:
        """Return the rows at ascending, distinct indices; fewer if ``stop`` is set meanwhile."""
        result = np.empty((rows.size, *self.shape[1:]), self.dtype)
        self.check_readable()
        for start, end in self.pieces(rows):
            if stop.is_set():
                return result[:start]
            try:
                self.read_piece(rows[start:end], result[start:end])
            except Exception:
                # Only the reason may be unclear.
                self.check_readable()
                raise
        return result

    def check_readable(self) -> None:
        """Raise an error if rows can no longer be read."""

    def pieces(self, rows: Int64) -> Iterator[tuple[int, int]]:
        """Yield the first and last place, exclusive, of the rows to read in one call."""
        size = max(1, PIECE_BYTES // max(self.row_bytes, 1))
        return pairwise([*range(0, rows.size, size), rows.size])

    def read_piece(self, rows: Int64, out: NDArray[Any]) -> None:
        """Read the rows of a piece into ``out``."""
        raise NotImplementedError


class MappedRows(FileRows):
    """Rows of a memory map."""

    def read_piece(self, rows: Int64, out: NDArray[Any]) -> None:
        """Copy the rows; the file is read as its pages are touched."""
        array = np.asarray(self._array)
        if array.flags.c_contiguous:
            np.take(array, rows, axis=0, out=out, mode="clip")
        else:
            # np.take would first copy the whole array.
            out[...] = array[rows]


class ZarrRows(FileRows):
    """Rows of a zarr array."""

    def read_piece(self, rows: Int64, out: NDArray[Any]) -> None:
        """Read the rows in one call, which decodes each chunk once."""
        out[...] = self._array.get_orthogonal_selection((rows,))


class Hdf5Rows(FileRows):
    """Rows of an HDF5 dataset that is chunked, or otherwise not mapped."""

    def __init__(self, array: Any) -> None:
        super().__init__(array)
        self._name = f"{array.name!r} of {array.file.filename!r}"
        self._pid = os.getpid()
        cell = CELL_BYTES // max(self.row_bytes, 1)
        if array.chunks:
            chunk_bytes = prod(array.chunks) * self.itemsize
            cache_bytes = array.id.get_access_plist().get_chunk_cache()[1]
            # HDF5 loads a chunk for any of its rows, except a large one without filters.
            if array.id.get_create_plist().get_nfilters() or chunk_bytes <= cache_bytes:
                cell = array.chunks[0]
        self._cell_rows = max(cell, 1)
        """Number of rows of the file that are read as easily as one of them."""

    def check_readable(self) -> None:
        """Raise ValueError for a closed file, RuntimeError in a forked process."""
        if not self._array:
            raise ValueError(f"the HDF5 file must stay open while rows are read: {self._name}")
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"{self._name} was opened before this process was forked, which HDF5 does not "
                "support: open the file, and make the loader, in the process that reads it"
            )

    def pieces(self, rows: Int64) -> Iterator[tuple[int, int]]:
        """Yield runs of neighbouring cells, up to `PIECE_BYTES` or one cell."""
        cells = rows // self._cell_rows
        cells_per_piece = max(1, PIECE_BYTES // max(self._cell_rows * self.row_bytes, 1))
        is_end = np.diff(cells) > 1
        is_end |= np.diff(cells // cells_per_piece) > 0
        ends = np.flatnonzero(is_end) + 1
        return pairwise([0, *ends.tolist(), rows.size])

    def read_piece(self, rows: Int64, out: NDArray[Any]) -> None:
        """Read all rows from the first to the last one, and keep those that are wanted."""
        first, end = int(rows[0]), int(rows[-1]) + 1
        if (end - first) * self.row_bytes > max(PIECE_BYTES, 2 * out.nbytes):
            # Of a large chunk, only the wanted rows should be in memory.
            out[...] = self._array[rows]
            return
        span = self._array[first:end]
        if end - first == rows.size:
            out[...] = span
        else:
            np.take(span, rows - first, axis=0, out=out, mode="clip")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a loader of {self._name} cannot be pickled, because an open HDF5 file cannot: open "
            "the file, and make the loader, in the process that reads it"
        )


class MappedHdf5Rows(Hdf5Rows):
    """Rows of an HDF5 dataset whose values lie one after another in the file, as a memory map."""

    def __init__(self, array: Any, mapped: NDArray[Any]) -> None:
        super().__init__(array)
        self._mapped = MappedRows(mapped)

    def pieces(self, rows: Int64) -> Iterator[tuple[int, int]]:
        """Yield pieces of `PIECE_BYTES`."""
        return self._mapped.pieces(rows)

    def read_piece(self, rows: Int64, out: NDArray[Any]) -> None:
        """Copy the rows."""
        self._mapped.read_piece(rows, out)


def in_file(name: str, array: Any) -> Any:
    """Return the `FileRows` of an array that is in a file, and anything else unchanged.

    Raise ValueError for a closed HDF5 file, TypeError for an array without numbers.
    """
    if isinstance(array, np.memmap):
        return MappedRows(array) if array.ndim else array
    is_hdf5 = is_instance(array, "h5py", "Dataset")
    if not (is_hdf5 or is_instance(array, "zarr", "Array")):
        return array
    if is_hdf5 and not array:
        raise ValueError(f"{name} must be a dataset of an open HDF5 file, got {array!r}")
    kind = "an HDF5 dataset" if is_hdf5 else "a zarr array"
    if array.dtype.kind not in "biufc" or array.shape is None:
        # A null dataset of HDF5.
        detail = " without a shape" if array.shape is None else ""
        raise TypeError(f"{name} must be {kind} of numbers, got dtype {array.dtype}{detail}")
    if not array.shape:
        raise ValueError(f"{name} must be {kind} with a row for each sample, got shape ()")
    if not is_hdf5:
        return ZarrRows(array)
    mapped = _map_hdf5(array)
    return Hdf5Rows(array) if mapped is None else MappedHdf5Rows(array, mapped)


def _map_hdf5(dataset: Any) -> NDArray[Any] | None:
    """Return the values of a dataset as a memory map, or None if they must be read through HDF5.

    A map has no cost per call. The values must lie in the file as NumPy has them, and nobody may
    write to the file through HDF5, which has buffers.
    """
    file, size = dataset.file, dataset.nbytes
    is_plain_file = os.name == "posix" and file.driver == "sec2"
    if not is_plain_file or file.mode != "r" or file.swmr_mode:
        return None
    # Chunked, virtual, external and compact datasets have no offset; one that was never written has
    # no size.
    offset = dataset.id.get_offset()
    if offset is None or size == 0 or dataset.id.get_storage_size() != size:
        return None
    if dataset.id.get_type() != import_module("h5py").h5t.py_create(dataset.dtype):
        return None
    mapped = mmap.mmap(file.id.get_vfd_handle(), offset + size, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, dataset.dtype, dataset.size, offset).reshape(dataset.shape)
