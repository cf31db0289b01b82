"""Patch ids wherever they lie: how many, of which type, and any stretch of them on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.devices import HOST, Device
from gpusampler.sources.checks import check_fits_int64

Load = Callable[[int, int], NDArray[Any]]
"""Reads the values of samples ``start .. stop - 1``."""

BLOCK = 1 << 20
"""Ids that are read at once, unless who reads says otherwise."""


class PatchIds(ABC):
    """The patch id of every sample, read in blocks from where they lie.

    What `read_patch_ids` returns. ``PatchGroups.from_ids`` and ``PatchBatchSampler`` take it.

    Attributes
    ----------
    size : int
        Samples N, at least 1.
    dtype : str
        Name of the type that the ids are stored in, such as "int16"; "str" where they are names.
    names : tuple of str, or None
        Where patches have names: the names in ascending order. An id is then a place among them.
    device : Device
        Where they lie.
    modified : int or None
        When the file that they lie in was changed last, in nanoseconds since 1970; None where they
        lie in no file.
    seekable : bool
        Whether a few ids in the middle cost no more than as many at the start.
    in_memory : bool
        Whether they lie in an array in memory, where nobody changes them while they are read.
    reopen : tuple of a callable and its arguments, or None
        What makes the same ids in another process, where they lie in a file.
    """

    size: int
    dtype: str
    names: tuple[str, ...] | None = None
    device: Device = HOST
    modified: int | None = None
    seekable: bool = True
    in_memory: bool = False
    reopen: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids of samples ``start .. stop - 1`` as integers in NumPy, values of int64.

        Raises
        ------
        TypeError, ValueError
            If an id is missing, or is no integer that fits in int64; the text names the sample.
        OSError
            If a file cannot be read, or is shorter than it was.
        """

    def blocks(self, start: int = 0, size: int = BLOCK) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield the ids from ``start`` on, in order: (first sample, ids) of each block.

        Raises
        ------
        TypeError, ValueError, OSError
            As by `read`; also where a block is shorter than it should be.
        """
        for first in range(start, self.size, size):
            stop = min(first + size, self.size)
            block = self.read(first, stop)
            # Libraries cut off what is asked for beyond the end of an array that has shrunk.
            if block.size != stop - first:
                raise OSError(
                    f"source must keep its length while it is read, got {block.size} ids for "
                    f"samples {first} .. {stop - 1}"
                )
            yield first, block

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Travel as the file's name, where there is one."""
        return super().__reduce_ex__(protocol) if self.reopen is None else self.reopen

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return all ids at once."""
        ids = self.read(0, self.size)
        return np.array(ids, dtype=dtype, copy=True if copy else None)

    def __repr__(self) -> str:
        """Return how many, and of what type."""
        return f"{type(self).__name__}({self.size} samples, {self.dtype})"


class HostIds(PatchIds):
    """Ids in a NumPy array that has been checked.

    Parameters
    ----------
    ids : integer array, shape (N,)
    """

    in_memory = True

    def __init__(self, ids: NDArray[Any]) -> None:
        self.ids = ids
        self.size = ids.size
        self.dtype = ids.dtype.name

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a view."""
        return self.ids[start:stop]


class IntegerIds(PatchIds):
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
        return check_fits_int64(self._load(start, stop), start)
