"""A side stream on the CPU whose copies are made as late as they may be, for want of a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpusampler.core.devices import Device

GARBAGE = 0xA5
NOTHING = np.empty(0, np.uint8)

# Sides outlive what uses them: the garbage collector clears weak references that are garbage
# themselves before it lets anything finish its copies.
KEPT: list[LateSide] = []


class TooEarlyError(AssertionError):
    """Memory was used for something else while a copy still needed it."""


def bytes_of(array: Any) -> np.ndarray:
    """The memory of a contiguous array of NumPy or torch: uint8, shape (bytes,)."""
    if isinstance(array, torch.Tensor):
        flat = array.reshape(-1)
        return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return array.reshape(-1).view(np.uint8)


def names_of(log: Sequence[tuple[str, int]], *names: str) -> list[tuple[str, int]]:
    """What a log says of some things only."""
    return [entry for entry in log if entry[0] in names]


@dataclass
class Copy:
    """A copy that was begun."""

    make: Callable[[], None]
    still_good: Callable[[], None]
    memory: weakref.ref[np.ndarray]
    start: int
    end: int
    there: Any = None
    made: bool = False


@dataclass
class LateEvent:
    side: LateSide
    number: int

    def synchronize(self) -> None:
        self.side.synchronize(self.number)


class LateSide:
    """A `Side` on the CPU that does the least that the protocol promises.

    A target holds garbage from the moment its copy is begun. The copy is made when its event, or
    a later one, is synchronized or waited for; it reads its source then. That the stream which
    computes waits for a copy is no news to the host, so pinned memory is in use until the event is
    synchronized. Whoever writes pinned memory in use, begins another copy there, gives it back, or
    drops the device array that is to be read, gets a `TooEarlyError`.

    Parameters
    ----------
    library : {"numpy", "torch"}
        Of pinned memory: NumPy as from CuPy's side stream, or torch.

    Attributes
    ----------
    log : list of (str, int)
        What was asked for, in order; the number is that of the copy, or the size for "pinned".
    """

    def __init__(self, library: str = "numpy") -> None:
        self.library = library
        self.log: list[tuple[str, int]] = []
        self._copies: dict[int, Copy] = {}
        self._memories: list[weakref.ref[np.ndarray]] = []
        self._begun = 0
        self._wrong: list[str] = []
        KEPT.append(self)

    @property
    def in_use(self) -> int:
        """How many copies the host does not know to be done."""
        return len(self._copies)

    def pinned(self, size: int, dtype: str) -> Any:
        self.log.append(("pinned", size))
        kind = getattr(torch, dtype, None)
        if size == 0:
            return torch.empty(0, dtype=kind) if self.library == "torch" else np.empty(0, dtype)
        width = kind.itemsize if self.library == "torch" else np.dtype(dtype).itemsize
        memory = np.full(size * width, GARBAGE, np.uint8)
        self._memories.append(weakref.ref(memory, self._given_back))
        if self.library == "torch":
            return torch.from_numpy(memory).view(kind)
        return memory.view(dtype)

    def to_host(self, source: Any, target: Any) -> LateEvent:
        memory, start, end = self._place_of(target)
        bytes_of(target)[:] = GARBAGE
        read = weakref.ref(source)
        kind = target.dtype

        def still_good() -> None:
            if not (memory()[start:end] == GARBAGE).all():
                raise TooEarlyError("pinned memory was written while it was to be copied to")

        def make() -> None:
            array = read()
            if array is None:
                raise TooEarlyError("an array was freed before it was copied")
            assert str(array.dtype).rpartition(".")[2] == str(kind).rpartition(".")[2]
            memory()[start:end] = bytes_of(array)

        return self._begin("to_host", Copy(make, still_good, memory, start, end))

    def to_device(self, source: Any, shape: tuple[int, ...]) -> tuple[Any, LateEvent]:
        memory, start, end = self._place_of(source)
        kept = memory()[start:end].copy()
        kind = source.dtype
        if not isinstance(kind, torch.dtype):
            kind = torch.from_numpy(np.empty(0, kind)).dtype
        there = torch.empty(shape, dtype=kind)
        bytes_of(there)[:] = GARBAGE

        def still_good() -> None:
            if not np.array_equal(memory()[start:end], kept):
                raise TooEarlyError("pinned memory was written while it was to be copied from")

        def make() -> None:
            bytes_of(there)[:] = memory()[start:end]

        return there, self._begin("to_device", Copy(make, still_good, memory, start, end, there))

    def wait_for(self, event: LateEvent, array: Any) -> None:
        self.log.append(("wait_for", event.number))
        if event.number in self._copies:
            assert self._copies[event.number].there is array
        self._make_up_to(event.number)

    def synchronize(self, number: int) -> None:
        self.log.append(("synchronize", number))
        self._make_up_to(number)
        # A stream passes its events in order.
        self._copies = {n: copy for n, copy in self._copies.items() if n > number}

    def finish(self) -> None:
        self.log.append(("finish", self._begun))
        self._make_up_to(self._begun)
        self._copies = {}

    def check(self) -> None:
        """Raise if anything was used too early so far."""
        if self._wrong:
            raise TooEarlyError(self._wrong[0])
        for copy in self._copies.values():
            # Once it is made, a target may be anything; a source is as it was, as it may be late.
            if not copy.made or copy.there is not None:
                copy.still_good()

    def _begin(self, name: str, copy: Copy) -> LateEvent:
        number = self._begun
        self._begun += 1
        self._copies[number] = copy
        self.log.append((name, number))
        return LateEvent(self, number)

    def _make_up_to(self, number: int) -> None:
        self.check()
        for n, copy in self._copies.items():
            if n <= number and not copy.made:
                copy.make()
                copy.made = True

    def _place_of(self, pinned: Any) -> tuple[weakref.ref[np.ndarray], int, int]:
        """Where memory from `pinned` lies in what it was cut from, checked to be free."""
        self.check()
        place = bytes_of(pinned)
        if place.size == 0:
            # It has no address, and no bytes, in torch.
            return weakref.ref(NOTHING), 0, 0
        address = pinned.data_ptr() if self.library == "torch" else pinned.ctypes.data
        for ref in self._memories:
            memory = ref()
            if memory is None:
                continue
            start = address - memory.ctypes.data
            if not 0 <= start <= start + place.size <= memory.size:
                continue
            for copy in self._copies.values():
                if copy.memory is ref and copy.start < start + place.size and start < copy.end:
                    raise TooEarlyError("pinned memory was used while a copy had it")
            return ref, start, start + place.size
        raise AssertionError("only pinned memory can be copied while something else is done")

    def _given_back(self, memory: weakref.ref[np.ndarray]) -> None:
        self._memories.remove(memory)
        if any(copy.memory is memory for copy in self._copies.values()):
            # Raised here it would be lost.
            self._wrong.append("pinned memory was given back while a copy had it")


@contextmanager
def late_sides(monkeypatch, module):
    """Let a module make late side streams where torch's "cpu" counts as a device elsewhere.

    Yields the list of those that were made; NumPy and torch take turns.
    """
    made = []

    def late_side_of(device):
        assert device == Device("torch", "cpu")
        made.append(LateSide(("numpy", "torch")[len(made) % 2]))
        return made[-1]

    monkeypatch.setattr(module, "side_of", late_side_of)
    yield made
    for side in made:
        side.check()
