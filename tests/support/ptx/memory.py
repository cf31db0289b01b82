"""Memory of the emulation: bounds, and a trace of accesses that finds missing barriers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from support.ptx.arithmetic import Values

WARP = 32
ALIGNMENT = 16
"""Of the widest access."""
UNWRITTEN = 0xA5


class PtxError(Exception):
    """What a GPU would answer with a fault or, at worst, not notice."""


class Array(NamedTuple):
    """A contiguous array in global memory; ``address`` is where the host has it."""

    name: str
    values: Values
    address: int
    is_writable: bool


class Trace:
    """Who accessed each unit of a memory.

    A stamp is a row: thread, barriers that its warp had passed, barriers that its block had passed.
    The thread is -1 where there was no access.
    """

    def __init__(self, size: int, unit: int, block_size: int) -> None:
        self.unit = unit
        num_units = -(-size // unit)
        self._group_sizes = np.array([1, WARP, block_size])
        self._writes = np.full((num_units, 3), -1, np.int64)
        self._reads = np.full((num_units, 3), -1, np.int64)
        # Only the last read has a stamp: whether others are of other threads, warps and blocks.
        self._several = np.zeros((num_units, 3), bool)

    def read(self, stamps: Values, units: Values) -> bool:
        """Note reads; return whether a barrier lies between them and earlier writes."""
        earlier, several = self._reads[units], self._several[units]
        unordered = ~self._is_ordered(earlier, stamps, several)
        self._several[units] = several & unordered[:, None]
        differs = unordered[:, None] & ~self._in_same_group(earlier, stamps)
        self._reads[units] = stamps
        # Of several reads at once of a unit, one was noted.
        differs |= ~self._in_same_group(self._reads[units], stamps)
        for level in range(3):
            self._several[units[differs[:, level]], level] = True
        return bool(self._is_ordered(self._writes[units], stamps).all())

    def write(self, stamps: Values, units: Values) -> str | None:
        """Note writes; return what no barrier separates them from: "write", "read" or None."""
        found = None
        if not self._is_ordered(self._reads[units], stamps, self._several[units]).all():
            found = "read"
        if not self._is_ordered(self._writes[units], stamps).all():
            found = "write"
        self._writes[units] = stamps
        return found

    def _in_same_group(self, earlier: Values, stamps: Values) -> Values:
        """Whether accesses are of the same thread, warp and block: shape (stamps, 3)."""
        return earlier[:, :1] // self._group_sizes == stamps[:, :1] // self._group_sizes

    def _is_ordered(self, earlier: Values, stamps: Values, several: Any = False) -> Values:
        """Whether one thread made both accesses, or a barrier of their group lies between them."""
        is_later = earlier < stamps
        is_later[:, 0] = True
        ordered = self._in_same_group(earlier, stamps) & is_later & ~np.asarray(several)
        return ordered.any(1) | (earlier[:, 0] < 0)


class Memory:
    """Bytes that threads address from 0, of one array or of all blocks' shared memory.

    Parameters
    ----------
    data : array of uint8
    size : int
        How many bytes a thread may access.
    block_size : int, or None
        Number of threads of a block, to trace accesses; None: the memory is read-only.
    misalignment : int
        Of the first byte.
    traced_unit : int
        How many bytes are traced as one.
    """

    def __init__(
        self,
        name: str,
        data: Values,
        size: int,
        block_size: int | None,
        *,
        misalignment: int = 0,
        traced_unit: int = 4,
    ) -> None:
        self.name, self.size, self.is_writable = name, size, block_size is not None
        self.first = misalignment
        length = -(-(self.first + data.size) // ALIGNMENT) * ALIGNMENT
        self._data = np.full(length, UNWRITTEN, np.uint8)
        self._data[self.first : self.first + data.size] = data
        self._trace = None if block_size is None else Trace(data.size, traced_unit, block_size)

    def read(self, at: Values, dtype: np.dtype[Any]) -> Values:
        return self._data.view(dtype)[(at + self.first) // dtype.itemsize]

    def write(self, at: Values, values: Values) -> None:
        self._data.view(values.dtype)[(at + self.first) // values.dtype.itemsize] = values

    def bytes(self) -> Values:
        return self._data[self.first : self.first + self.size]

    def trace_reads(self, stamps: Values, at: Values, nbytes: int) -> None:
        if self._trace and not self._trace.read(*self._by_unit(self._trace, stamps, at, nbytes)):
            raise PtxError(f"{self.name} is read without a barrier after another thread's write")

    def trace_writes(self, stamps: Values, at: Values, nbytes: int) -> None:
        assert self._trace
        found = self._trace.write(*self._by_unit(self._trace, stamps, at, nbytes))
        if found:
            raise PtxError(f"{self.name} is written without a barrier after another's {found}")

    @staticmethod
    def _by_unit(trace: Trace, stamps: Values, at: Values, nbytes: int) -> tuple[Values, Values]:
        """Return a stamp for every unit accessed, and the units."""
        num_units = -(-nbytes // trace.unit)
        units = at[:, None] // trace.unit + np.arange(num_units)
        return np.repeat(stamps, num_units, axis=0), units.ravel()
