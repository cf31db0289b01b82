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

# Streams outlive what uses them: the garbage collector clears weak references that are garbage
# themselves before it lets anything finish its copies.
ALL_STREAMS: list[LateSideStream] = []


class TooEarlyError(AssertionError):
    """Memory was used for something else while a copy still needed it."""


def byte_view(array: Any) -> np.ndarray:
    """The memory of a contiguous array of NumPy or torch: uint8, shape (bytes,)."""
    if isinstance(array, torch.Tensor):
        flat = array.reshape(-1)
        return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return array.reshape(-1).view(np.uint8)


def entries_named(log: Sequence[tuple[str, int]], *names: str) -> list[tuple[str, int]]:
    """What a log says of some things only."""
    return [entry for entry in log if entry[0] in names]


@dataclass
class Copy:
    """A copy that was begun."""

    run: Callable[[], None]
    check_unchanged: Callable[[], None]
    memory: weakref.ref[np.ndarray]
    start: int
    end: int
    device_array: Any = None
    is_done: bool = False


@dataclass
class LateEvent:
    stream: LateSideStream
    number: int

    def synchronize(self) -> None:
        self.stream.synchronize(self.number)


class LateSideStream:
    """A `SideStream` on the CPU that does the least that the protocol promises.

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
        self._copies_begun = 0
        self._errors: list[str] = []
        ALL_STREAMS.append(self)

    @property
    def in_use(self) -> int:
        """How many copies the host does not know to be done."""
        return len(self._copies)

    def allocate_pinned(self, size: int, dtype: str) -> Any:
        self.log.append(("pinned", size))
        torch_dtype = getattr(torch, dtype, None)
        if size == 0:
            return (
                torch.empty(0, dtype=torch_dtype) if self.library == "torch" else np.empty(0, dtype)
            )
        width = torch_dtype.itemsize if self.library == "torch" else np.dtype(dtype).itemsize
        memory = np.full(size * width, GARBAGE, np.uint8)
        self._memories.append(weakref.ref(memory, self._on_freed))
        if self.library == "torch":
            return torch.from_numpy(memory).view(torch_dtype)
        return memory.view(dtype)

    def copy_to_host(self, source: Any, target: Any) -> LateEvent:
        memory, start, end = self._locate(target)
        byte_view(target)[:] = GARBAGE
        source_ref = weakref.ref(source)
        dtype = target.dtype

        def check_unchanged() -> None:
            if not (memory()[start:end] == GARBAGE).all():
                raise TooEarlyError("pinned memory was written while it was to be copied to")

        def run() -> None:
            array = source_ref()
            if array is None:
                raise TooEarlyError("an array was freed before it was copied")
            assert str(array.dtype).rpartition(".")[2] == str(dtype).rpartition(".")[2]
            memory()[start:end] = byte_view(array)

        return self._begin("to_host", Copy(run, check_unchanged, memory, start, end))

    def copy_to_device(self, source: Any, shape: tuple[int, ...]) -> tuple[Any, LateEvent]:
        memory, start, end = self._locate(source)
        source_bytes = memory()[start:end].copy()
        dtype = source.dtype
        if not isinstance(dtype, torch.dtype):
            dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        device_array = torch.empty(shape, dtype=dtype)
        byte_view(device_array)[:] = GARBAGE

        def check_unchanged() -> None:
            if not np.array_equal(memory()[start:end], source_bytes):
                raise TooEarlyError("pinned memory was written while it was to be copied from")

        def run() -> None:
            byte_view(device_array)[:] = memory()[start:end]

        copy = Copy(run, check_unchanged, memory, start, end, device_array)
        return device_array, self._begin("to_device", copy)

    def wait_for_copy(self, event: LateEvent, array: Any) -> None:
        self.log.append(("wait_for", event.number))
        if event.number in self._copies:
            assert self._copies[event.number].device_array is array
        self._copy_up_to(event.number)

    def synchronize(self, number: int) -> None:
        self.log.append(("synchronize", number))
        self._copy_up_to(number)
        # A stream passes its events in order.
        self._copies = {n: copy for n, copy in self._copies.items() if n > number}

    def finish(self) -> None:
        self.log.append(("finish", self._copies_begun))
        self._copy_up_to(self._copies_begun)
        self._copies = {}

    def check(self) -> None:
        """Raise if anything was used too early so far."""
        if self._errors:
            raise TooEarlyError(self._errors[0])
        for copy in self._copies.values():
            # Once it is made, a target may be anything; a source is as it was, as it may be late.
            if not copy.is_done or copy.device_array is not None:
                copy.check_unchanged()

    def _begin(self, name: str, copy: Copy) -> LateEvent:
        number = self._copies_begun
        self._copies_begun += 1
        self._copies[number] = copy
        self.log.append((name, number))
        return LateEvent(self, number)

    def _copy_up_to(self, number: int) -> None:
        self.check()
        for n, copy in self._copies.items():
            if n <= number and not copy.is_done:
                copy.run()
                copy.is_done = True

    def _locate(self, pinned: Any) -> tuple[weakref.ref[np.ndarray], int, int]:
        """Where memory from `pinned` lies in what it was cut from, checked to be free."""
        self.check()
        view = byte_view(pinned)
        if view.size == 0:
            # It has no address, and no bytes, in torch.
            return weakref.ref(NOTHING), 0, 0
        address = pinned.data_ptr() if self.library == "torch" else pinned.ctypes.data
        for ref in self._memories:
            memory = ref()
            if memory is None:
                continue
            start = address - memory.ctypes.data
            if not 0 <= start <= start + view.size <= memory.size:
                continue
            for copy in self._copies.values():
                if copy.memory is ref and copy.start < start + view.size and start < copy.end:
                    raise TooEarlyError("pinned memory was used while a copy had it")
            return ref, start, start + view.size
        raise AssertionError("only pinned memory can be copied while something else is done")

    def _on_freed(self, memory: weakref.ref[np.ndarray]) -> None:
        self._memories.remove(memory)
        if any(copy.memory is memory for copy in self._copies.values()):
            # Raised here it would be lost.
            self._errors.append("pinned memory was given back while a copy had it")


@contextmanager
def late_side_streams(monkeypatch, module):
    """Let a module make late side streams where torch's "cpu" counts as a device elsewhere.

    Yields the list of those that were made; NumPy and torch take turns.
    """
    streams = []

    def make_stream(device):
        assert device == Device("torch", "cpu")
        streams.append(LateSideStream(("numpy", "torch")[len(streams) % 2]))
        return streams[-1]

    monkeypatch.setattr(module, "side_stream", make_stream)
    yield streams
    for stream in streams:
        stream.check()
