"""`PatchIds`, the base class of all sources: patch ids that are read in ranges of samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.devices import HOST, Device
from gpusampler.sources.checks import check_fits_int64

Load = Callable[[int, int], NDArray[Any]]
"""``load(start, stop)`` returns the values of samples ``start .. stop - 1``."""

BLOCK = 1 << 20
"""Default number of ids per read."""


class PatchIds(ABC):
    """The patch id of every sample, read in blocks from its source.

    Returned by `read_patch_ids`; accepted by ``PatchGroups.from_ids`` and ``PatchBatchSampler``.

    Attributes
    ----------
    size : int
        Number of samples N, at least 1.
    dtype : str
        Name of the stored dtype, such as "int16", or "str" for names.
    names : tuple, or None
        Distinct patch names in ascending order if patches have names, else None: strings, or other
        keys that hash and sort, such as tuples. An id is then an index into ``names``.
    device : Device
        Device that stores the ids.
    modified : int or None
        Last modification time of the source file in ns since 1970; None without a file.
    seekable : bool
        Whether reading a few ids in the middle costs no more than at the start.
    in_memory : bool
        Whether the ids are an array in memory, which does not change while it is read.
    wholes : tuple of PatchIds
        Ids of the datasets that these are a part of, as for torch's ``Subset``.
    reopen : tuple of a callable and its arguments, or None
        Call that opens the same ids in a different process; None without a file.
    """

    size: int
    dtype: str
    names: tuple[Any, ...] | None = None
    device: Device = HOST
    modified: int | None = None
    seekable: bool = True
    in_memory: bool = False
    wholes: tuple[PatchIds, ...] = ()
    reopen: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    @property
    def grouping_device(self) -> Device:
        """Device on which the ids are to be grouped."""
        return self.device

    @abstractmethod
    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids of samples ``start .. stop - 1``.

        Returns
        -------
        integer array, shape (stop - start,)
            A NumPy array of any integer dtype, whose values fit in int64.

        Raises
        ------
        TypeError, ValueError
            If an id is missing, is not an integer, or does not fit in int64; the message names the
            sample.
        OSError
            If a file cannot be read or has become shorter.
        """

    def blocks(self, start: int = 0, size: int = BLOCK) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (first sample, ids) of consecutive blocks of ``size`` ids from ``start`` on.

        Raises
        ------
        TypeError, ValueError, OSError
            What `read` raises, and OSError if a block has fewer ids than requested.
        """
        for first in range(start, self.size, size):
            stop = min(first + size, self.size)
            block = self.read(first, stop)
            # Slices past the end of an array that has shrunk are silently truncated.
            if block.size != stop - first:
                raise OSError(
                    f"source must not shrink while it is read, got {block.size} ids for "
                    f"samples {first} .. {stop - 1}"
                )
            yield first, block

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the call that opens the file again, if there is a file."""
        return super().__reduce_ex__(protocol) if self.reopen is None else self.reopen

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Return all ids as an array."""
        ids = self.read(0, self.size)
        return np.array(ids, dtype=dtype, copy=True if copy else None)

    def __repr__(self) -> str:
        """Return the number of samples and the dtype."""
        return f"{type(self).__name__}({self.size} samples, {self.dtype})"


class HostIds(PatchIds):
    """Ids in a validated 1-D integer NumPy array."""

    in_memory = True

    def __init__(self, ids: NDArray[Any], names: tuple[Any, ...] | None = None) -> None:
        self.ids = ids
        self.names = names
        self.size = ids.size
        self.dtype = ids.dtype.name

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a view of the ids of samples ``start .. stop - 1``."""
        return self.ids[start:stop]


class IntegerIds(PatchIds):
    """Integer ids from ``load(start, stop)``, which raises if one is missing."""

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
