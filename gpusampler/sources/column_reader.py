"""Ids that a function reads: any stretch of integers, or in pieces that are decoded whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.sources.base import PatchIds
from gpusampler.sources.column_checks import fitting

Load = Callable[[int, int], NDArray[Any]]
"""Values of samples start .. stop - 1."""


class ColumnIds(PatchIds):
    """Integers that a function reads.

    Parameters
    ----------
    load : callable
        ``load(start, stop)``: integers in NumPy, shape (stop - start,); it raises if one is
        missing.
    size : int
    dtype : str
    modified, seekable
        As in `PatchIds`.
    """

    def __init__(
        self,
        load: Load,
        size: int,
        dtype: str,
        *,
        modified: int | None = None,
        seekable: bool = True,
    ) -> None:
        self._load = load
        self.size = size
        self.dtype = dtype
        self.modified = modified
        self.seekable = seekable

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids of samples ``start .. stop - 1``; see `PatchIds.read`."""
        return fitting(self._load(start, stop), start)


class Pieces:
    """A stretch of values read at the borders of pieces, of which none is decoded twice in a row.

    Parameters
    ----------
    load : callable
        ``load(start, stop)``, where both are multiples of ``piece``, or ``stop`` is ``size``.
    size, piece : int
    """

    def __init__(self, load: Load, size: int, piece: int) -> None:
        self._load = load
        self._size = size
        self._piece = piece
        self._kept: tuple[int, NDArray[Any]] = (0, np.empty(0, np.int64))

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """Return the values of samples ``start .. stop - 1``."""
        first, values = self._kept
        head = values[:0]
        if first <= start < first + values.shape[0]:
            head = values[start - first : stop - first]
            start += head.shape[0]
            if start == stop:
                return head
        piece = self._piece
        begin, end = start // piece * piece, min(self._size, -(-stop // piece) * piece)
        values = self._load(begin, end)
        last = (end - 1) // piece * piece
        # A copy: a view would keep all that was read in memory.
        self._kept = last, values[last - begin :].copy()
        part = values[start - begin : stop - begin]
        return np.concatenate([head, part]) if head.shape[0] else part
