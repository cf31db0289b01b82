"""Patch ids that are names: their places in the sorted names, made block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.progress_bar import Bar
from gpusampler.core.text import shown
from gpusampler.sources.base import BLOCK, PatchIds
from gpusampler.sources.column_checks import is_missing, missing

Factored = tuple[NDArray[Any], Sequence[str]]
"""For each sample a place in a list of names, and that list: in any order, some perhaps unused."""


class NamedIds(PatchIds):
    """Names, read by a function that factors a stretch of them.

    They are read once to learn which there are. Only the distinct names are kept.

    Parameters
    ----------
    factor : callable
        ``factor(start, stop)``: `Factored`; it raises if a name is missing.
    size : int
    modified, seekable
        As in `PatchIds`.
    progress : bool
        Show a bar if reading takes more than a second.

    Examples
    --------
    >>> names = ["sand", "clay", "sand"]
    >>> ids = NamedIds(lambda start, stop: factor_list(names[start:stop], start), 3)
    >>> ids.names, ids.read(0, 3).tolist()
    (('clay', 'sand'), [1, 0, 1])
    """

    dtype = "str"

    def __init__(
        self,
        factor: Callable[[int, int], Factored],
        size: int,
        *,
        modified: int | None = None,
        seekable: bool = True,
        progress: bool = False,
    ) -> None:
        self._factor = factor
        self.size = size
        self.modified = modified
        self.seekable = seekable
        found: set[str] = set()
        with Bar(size, "patch names", "samples", progress) as shown_bar:
            for start in range(0, size, BLOCK):
                stop = min(start + BLOCK, size)
                codes, labels = factor(start, stop)
                found.update(labels[i] for i in used(codes, len(labels)))
                shown_bar.update(stop - start)
        self.names = tuple(sorted(found))
        self._places = {name: place for place, name in enumerate(self.names)}
        self._type = np.dtype(arrays.narrowest("numpy", len(self.names))[0])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the places of the names of samples ``start .. stop - 1``; see `PatchIds.read`.

        Raises
        ------
        OSError
            If a name is there that was not when the names were collected.
        """
        if start == stop:
            return np.empty(0, self._type)
        codes, labels = self._factor(start, stop)
        places = np.array([self._places.get(label, -1) for label in labels], np.int64)
        found = places[codes]
        if found.min() < 0:
            at = int(found.argmin())
            raise OSError(
                "source must stay as it is while it is read, got the new name "
                f"{labels[int(codes[at])]!r} in sample {start + at}"
            )
        return found.astype(self._type)


class CodedIds(PatchIds):
    """Names whose places are in memory.

    Parameters
    ----------
    codes : integer array, shape (N,)
        Place of each sample's name in ``labels``.
    labels : sequence of str
        Distinct names in any order; those that no sample has are left out.
    """

    dtype = "str"

    def __init__(self, codes: NDArray[Any], labels: Sequence[str]) -> None:
        self.size = int(codes.shape[0])
        there = used(codes, len(labels))
        there = there[np.argsort(np.array([labels[i] for i in there], dtype=object))]
        self.names = tuple(labels[i] for i in there)
        places = np.zeros(len(labels), arrays.narrowest("numpy", len(self.names))[0])
        places[there] = np.arange(len(there))
        self._codes = places[codes]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the places of the names of samples ``start .. stop - 1``."""
        part: NDArray[Any] = self._codes[start:stop]
        return part


def used(codes: NDArray[Any], labels: int) -> NDArray[np.int64]:
    """Return which of a number of labels some code stands for, ascending."""
    there = np.zeros(labels, np.bool_)
    there[codes] = True
    return np.flatnonzero(there)


def factor_list(values: list[Any], first: int) -> Factored:
    """Factor names in a list, which may be bytes of UTF-8 too.

    Raises
    ------
    TypeError
        If one is no name.
    ValueError
        If one is missing, or is no UTF-8; ``first`` is the sample of ``values[0]``.
    """
    if not all(issubclass(kind, (str, bytes)) for kind in set(map(type, values))):
        for place, value in enumerate(values):
            if is_missing(value):
                missing(first + place)
            if not isinstance(value, (str, bytes)):
                raise TypeError(
                    "ids must be all names or all integers, "
                    f"got {shown(value)} in sample {first + place}"
                )
    distinct = dict.fromkeys(values)
    labels = []
    for code, value in enumerate(distinct):
        distinct[value] = code
        try:
            labels.append(value.decode() if isinstance(value, bytes) else str(value))
        except UnicodeDecodeError:
            raise ValueError(
                f"ids must be UTF-8, got {shown(value)} in sample {first + values.index(value)}"
            ) from None
    codes = np.fromiter(map(distinct.__getitem__, values), np.int64, len(values))
    return codes, labels
