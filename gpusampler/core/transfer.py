"""Asynchronous copies between device and host: side streams, events and pinned memory.

`HostTransfer` copies each array to the host while the one before is used. `SideStream` hides the
differences between libraries. The tests use a `SideStream` that delays each copy until something
waits for it.
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
        """Block the host until the stream has reached this event."""


class SideStream(Protocol):
    """A stream for copies beside the compute stream, on a device of one library."""

    def allocate_pinned(self, size: int, dtype: str) -> Any:
        """Return page-locked host memory: a 1-D tensor for torch, a NumPy array for CuPy."""

    def copy_to_host(self, source: Any, target: Any) -> Event:
        """Begin to copy a device array to pinned memory, after the work that computes it.

        The caller must keep ``source`` alive, and must not access ``target``, until the returned
        event has completed.
        """

    def copy_to_device(self, source: Any, shape: tuple[int, ...]) -> tuple[Any, Event]:
        """Begin to copy pinned memory to a new device array.

        The caller must not change ``source`` until the returned event has completed.
        """

    def wait_for_copy(self, event: Event, array: Any) -> None:
        """Make the compute stream wait for the copy of an array from `copy_to_device`."""

    def finish(self) -> None:
        """Block the host until the memory of all copies can be freed."""


PER_THREAD_STREAM = 2
"""Pointer of the per-thread default stream: the same in all threads, for different streams."""


class ReadyArrays:
    """Arrays made on the current stream that any stream may use after `wait`.

    torch does not reuse their memory until every stream has finished with them. CuPy does not
    track this: the caller must keep the arrays alive.
    """

    def __init__(self, device: Device, arrays: list[Any]) -> None:
        self._device = device
        self._arrays = arrays
        self._waiting_streams: set[int] = set()
        self._event: Any = None
        if device.library == "torch" and device.name.startswith("cuda"):
            import torch

            current = torch.cuda.current_stream(device.name)
            self._remember(current.cuda_stream)
            self._event = torch.cuda.Event()
            self._event.record(current)
        elif device.library == "cupy":
            with devices.device_context(device):
                self._remember(devices.cupy_stream().ptr)
                self._event = devices.cupy_stream().record()

    def wait(self) -> None:
        """Make the current stream wait for the arrays; the host does not wait."""
        if self._event is None:
            return
        if self._device.library == "cupy":
            with devices.device_context(self._device):
                current = devices.cupy_stream()
                if current.ptr not in self._waiting_streams:
                    current.wait_event(self._event)
                    self._remember(current.ptr)
            return
        import torch

        stream = torch.cuda.current_stream(self._device.name)
        # A capturing stream cannot wait for events outside its graph; the arrays were made before.
        if stream.cuda_stream in self._waiting_streams or torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self._event)
        for array in self._arrays:
            array.record_stream(stream)
        self._remember(stream.cuda_stream)

    def _remember(self, pointer: int) -> None:
        if pointer != PER_THREAD_STREAM:
            self._waiting_streams.add(pointer)


class TorchSideStream:
    """`SideStream` implemented with torch, for CUDA devices."""

    def __init__(self, device: Device) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device.name)
        self._stream = torch.cuda.Stream(self._device)

    def allocate_pinned(self, size: int, dtype: str) -> Any:
        """Return a page-locked tensor."""
        return self._torch.empty(size, dtype=getattr(self._torch, dtype), pin_memory=True)

    def copy_to_host(self, source: Any, target: Any) -> Event:
        """Begin to copy a device array to pinned memory."""
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
        """Make the current stream wait for the copy of an array."""
        current = self._torch.cuda.current_stream(self._device)
        current.wait_event(event)
        # The array was allocated on the side stream; its memory must not be reused before the
        # current stream has finished with it.
        array.record_stream(current)

    def finish(self) -> None:
        """Do nothing: torch reuses memory only after the streams that used it are done."""

    def _record_event(self) -> Event:
        event = self._torch.cuda.Event()
        event.record(self._stream)
        result: Event = event
        return result


class CupySideStream:
    """`SideStream` implemented with CuPy."""

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
        """Begin to copy a device array to pinned memory."""
        with devices.device_context(self._device):
            self._stream.wait_event(devices.cupy_stream().record())
            source.data.copy_to_host_async(target.ctypes.data, source.nbytes, self._stream)
            event: Event = self._stream.record()
            return event

    def copy_to_device(self, source: Any, shape: tuple[int, ...]) -> tuple[Any, Event]:
        """Begin to copy pinned memory to a new device array."""
        with devices.device_context(self._device):
            # Allocated on the current stream, so the copy must wait for that stream's earlier work
            # on the same memory.
            device_array = self._cupy.empty(shape, dtype=source.dtype)
            self._stream.wait_event(devices.cupy_stream().record())
            device_array.data.copy_from_host_async(source.ctypes.data, source.nbytes, self._stream)
            return device_array, self._stream.record()

    def wait_for_copy(self, event: Any, array: Any) -> None:
        """Make the current stream wait for the copy of an array."""
        with devices.device_context(self._device):
            devices.cupy_stream().wait_event(event)

    def finish(self) -> None:
        """Wait for all copies, because CuPy's pools reuse freed memory at once."""
        self._stream.synchronize()


def finish_copies(side: SideStream | None) -> None:
    """Call `SideStream.finish` from a ``__del__`` method."""
    # At interpreter shutdown the driver may already be unloaded.
    if side is not None and not sys.is_finalizing():
        side.finish()


@cache
def side_stream(device: Device) -> SideStream | None:
    """Return the process-wide side stream of a device; None if its copies are synchronous.

    Allocators keep freed memory per stream, so further streams would waste memory.
    """
    if device.library == "cupy":
        return CupySideStream(device)
    if device.library == "torch" and device.name.startswith("cuda"):
        return TorchSideStream(device)
    return None


class Prefetcher(Generic[T]):
    """Starts each item while the one before is used."""

    def __init__(self) -> None:
        self._started = False
        self._next: T | None = None

    def get_next(self, start: Callable[[], T | None]) -> T | None:
        """Return the next item after starting the one that follows it; None after the last.

        ``start`` starts and returns an item, or returns None after the last. ``start`` is not
        stored: a bound method would form a reference cycle, which delays freeing pinned memory.
        """
        if not self._started:
            self._started = True
            self._next = start()
        item = self._next
        if item is not None:
            self._next = start()
        return item


class HostTransfer:
    """Copies device arrays to the host through two pinned buffers.

    `send` begins a copy and `take` waits for the oldest one. The array that `take` returns is
    overwritten by the second `send` after the `send` that copied it.
    """

    BUFFERS = 2

    def __init__(self, side: SideStream) -> None:
        self._side = side
        self._buffers: list[Any] = [None] * self.BUFFERS
        self._pending: list[tuple[int, int, Any, Event]] = []
        self._next = 0

    def send(self, array: Any) -> None:
        """Begin to copy a 1-D array; at most two copies may be pending."""
        if len(self._pending) == self.BUFFERS:
            raise RuntimeError("take must be called before a third array is sent")
        size = int(array.shape[0])
        buffer = self._buffers[self._next]
        if buffer is None or int(buffer.shape[0]) < size:
            buffer = self._side.allocate_pinned(size, arrays.dtype_name(array))
            self._buffers[self._next] = buffer
        event = self._side.copy_to_host(array, buffer[:size])
        # Keep the array alive until the copy is done, so that its memory is not reused.
        self._pending.append((self._next, size, array, event))
        self._next = (self._next + 1) % self.BUFFERS

    def take(self) -> NDArray[Any]:
        """Wait for the oldest array and return it as a NumPy array in pinned memory."""
        index, size, _, event = self._pending.pop(0)
        event.synchronize()
        return np.asarray(self._buffers[index][:size])

    def __del__(self) -> None:
        """Wait for pending copies (an epoch can be abandoned early) before freeing the buffers."""
        finish_copies(self._side)
