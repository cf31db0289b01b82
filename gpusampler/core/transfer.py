"""Side streams, events and pinned memory: arrays that travel while something else is done.

`HostTransfer` brings arrays from a device to the host a step ahead of their use. What a library
calls its streams is behind `SideStream`, of which tests have one that copies as late as it may.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays, devices
from gpusampler.core.devices import Device

T = TypeVar("T")


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Wait on the host until the point is passed."""


class SideStream(Protocol):
    """A stream beside the one that computes, on a device of one library."""

    def allocate_pinned(self, size: int, dtype: str) -> Any:
        """Return page-locked host memory as a 1-D array of the library (NumPy's for CuPy)."""

    def copy_to_host(self, source: Any, target: Any) -> Event:
        """Begin to copy a device array to pinned memory, after what computes it.

        The caller keeps ``source`` until the event is passed, and ``target`` alone.
        """

    def copy_to_device(self, source: Any, shape: tuple[int, ...]) -> tuple[Any, Event]:
        """Begin to copy pinned memory to a new device array.

        The caller keeps ``source`` as it is until the event is passed.
        """

    def wait_for_copy(self, event: Event, array: Any) -> None:
        """Let the computing stream use an array from `copy_to_device`, once its copy is done."""

    def finish(self) -> None:
        """Wait until memory of the copies may be given back, even of those nobody waits for."""


class ReadyArrays:
    """Arrays that were made on the current stream, to be used on any.

    Parameters
    ----------
    device : Device
    arrays : list of arrays
        torch keeps their memory until every stream that has used them is done with them. CuPy knows
        no such thing: there they must live on for as long.
    """

    def __init__(self, device: Device, arrays: list[Any]) -> None:
        self._device = device
        self._arrays = arrays
        self._waiting_streams: set[int] = set()
        self._event: Any = None
        if device.library == "torch" and device.name.startswith("cuda"):
            import torch

            current = torch.cuda.current_stream(device.name)
            self._waiting_streams.add(current.cuda_stream)
            self._event = torch.cuda.Event()
            self._event.record(current)
        elif device.library == "cupy":
            with devices.device_context(device):
                self._waiting_streams.add(devices.cupy_stream().ptr)
                self._event = devices.cupy_stream().record()

    def wait(self) -> None:
        """Let the current stream use the arrays; the host does not wait."""
        if self._event is None:
            return
        if self._device.library == "cupy":
            with devices.device_context(self._device):
                current = devices.cupy_stream()
                if current.ptr not in self._waiting_streams:
                    current.wait_event(self._event)
                    self._waiting_streams.add(current.ptr)
            return
        import torch

        stream = torch.cuda.current_stream(self._device.name)
        # A graph that is captured waits for nothing outside it; what it uses was made before.
        if stream.cuda_stream in self._waiting_streams or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self._event)
        for array in self._arrays:
            array.record_stream(stream)
        self._waiting_streams.add(stream.cuda_stream)


class TorchSideStream:
    """A side stream of torch on CUDA."""

    def __init__(self, device: Device) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device.name)
        self._stream = torch.cuda.Stream(self._device)

    def allocate_pinned(self, size: int, dtype: str) -> Any:
        """Return a page-locked tensor."""
        return self._torch.empty(size, dtype=getattr(self._torch, dtype), pin_memory=True)

    def copy_to_host(self, source: Any, target: Any) -> Event:
        """Begin to copy a device array to pinned memory, after what computes it."""
        self._stream.wait_stream(self._torch.cuda.current_stream(self._device))
        with self._torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._record_event()

    def copy_to_device(self, source: Any, shape: tuple[int, ...]) -> tuple[Any, Event]:
        """Begin to copy pinned memory to a new device array."""
        with self._torch.cuda.stream(self._stream):
            device_array = self._torch.empty(shape, dtype=source.dtype, device=self._device)
            device_array.view(-1).copy_(source, non_blocking=True)
            return device_array, self._record_event()

    def wait_for_copy(self, event: Any, array: Any) -> None:
        """Let the current stream use an array from `copy_to_device`, once its copy is done."""
        current = self._torch.cuda.current_stream(self._device)
        current.wait_event(event)
        # It was made on the side stream: its memory must not be used anew before this stream is
        # done with it.
        array.record_stream(current)

    def finish(self) -> None:
        """Do nothing: torch gives no memory out again before the streams that used it are done."""

    def _record_event(self) -> Event:
        event = self._torch.cuda.Event()
        event.record(self._stream)
        result: Event = event
        return result


class CupySideStream:
    """A side stream of CuPy."""

    def __init__(self, device: Device) -> None:
        import cupy

        self._cupy = cupy
        self._device = device
        with devices.device_context(device):
            self._stream = cupy.cuda.Stream(non_blocking=True)

    def allocate_pinned(self, size: int, dtype: str) -> Any:
        """Return page-locked memory as a NumPy array."""
        import cupyx

        return cupyx.empty_pinned(size, dtype)

    def copy_to_host(self, source: Any, target: Any) -> Event:
        """Begin to copy a device array to pinned memory, after what computes it."""
        with devices.device_context(self._device):
            self._stream.wait_event(devices.cupy_stream().record())
            source.data.copy_to_host_async(target.ctypes.data, source.nbytes, self._stream)
            event: Event = self._stream.record()
            return event

    def copy_to_device(self, source: Any, shape: tuple[int, ...]) -> tuple[Any, Event]:
        """Begin to copy pinned memory to a new device array."""
        with devices.device_context(self._device):
            # Made on the stream that will use it, whose earlier work on the same memory comes
            # first.
            device_array = self._cupy.empty(shape, dtype=source.dtype)
            self._stream.wait_event(devices.cupy_stream().record())
            device_array.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._stream)
            return device_array, self._stream.record()

    def wait_for_copy(self, event: Any, array: Any) -> None:
        """Let the current stream use an array from `copy_to_device`, once its copy is done."""
        with devices.device_context(self._device):
            devices.cupy_stream().wait_event(event)

    def finish(self) -> None:
        """Wait for all copies: CuPy's pools give memory out again at once."""
        self._stream.synchronize()


def finish_copies(side: SideStream | None) -> None:
    """Do what `SideStream.finish` does, for objects that are about to go."""
    # When the program ends, the driver may be gone before them.
    if side is not None and not sys.is_finalizing():
        side.finish()


@cache
def side_stream(device: Device) -> SideStream | None:
    """Return the side stream on a device; None where copies are not asynchronous.

    One for the process: memory that is given back is kept for the stream it was made on, so every
    new stream would hold some of its own.
    """
    if device.library == "cupy":
        return CupySideStream(device)
    if device.library == "torch" and device.name.startswith("cuda"):
        return TorchSideStream(device)
    return None


class Prefetcher(Generic[T]):
    """Begins things one ahead of where they are used, so that they are on their way meanwhile."""

    def __init__(self) -> None:
        self._started = False
        self._next: T | None = None

    def get_next(self, start: Callable[[], T | None]) -> T | None:
        """Return the next one, the one after it having been begun; None after the last.

        ``start`` begins one, and returns None after the last. It is not kept: as a method of who
        holds this it would make a cycle, and pinned memory would wait for the garbage collector.
        """
        if not self._started:
            self._started = True
            self._next = start()
        item = self._next
        if item is not None:
            self._next = start()
        return item


class HostTransfer:
    """Device arrays on their way to the host, through two pinned buffers.

    `send` begins a copy, `take` waits for the oldest one. What `take` returned is good until the
    next `send` but one.

    Parameters
    ----------
    side : SideStream
    """

    BUFFERS = 2

    def __init__(self, side: SideStream) -> None:
        self._side = side
        self._buffers: list[Any] = [None] * self.BUFFERS
        self._pending: list[tuple[int, int, Any, Event]] = []
        self._next = 0

    def send(self, array: Any) -> None:
        """Begin to copy a 1-D array; at most two may be on their way."""
        if len(self._pending) == self.BUFFERS:
            raise RuntimeError("take must be called before a third array is sent")
        size = int(array.shape[0])
        buffer = self._buffers[self._next]
        if buffer is None or int(buffer.shape[0]) < size:
            buffer = self._side.allocate_pinned(size, arrays.dtype_name(array))
            self._buffers[self._next] = buffer
        event = self._side.copy_to_host(array, buffer[:size])
        # The array is kept until then: its memory could be used anew while it is read.
        self._pending.append((self._next, size, array, event))
        self._next = (self._next + 1) % self.BUFFERS

    def take(self) -> NDArray[Any]:
        """Wait for the oldest array and return it as NumPy, in pinned memory."""
        index, size, _, event = self._pending.pop(0)
        event.synchronize()
        return np.asarray(self._buffers[index][:size])

    def __del__(self) -> None:
        """Give the buffers back only when no copy is under way: an epoch may be left anywhere."""
        finish_copies(self._side)
