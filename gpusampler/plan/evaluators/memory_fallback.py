"""Fallback to the host, with one warning, when a device runs out of memory."""

from __future__ import annotations

from gpusampler.core import devices, log, memory
from gpusampler.core.devices import Device
from gpusampler.core.text import format_bytes

SORT_HINT = "sort the dataset by patch, so that no order of its samples is stored"
DEVICE_HINT = f"{SORT_HINT}, or pass device='numpy' (identical batches)"


class FullDevices:
    """Devices that have run out of memory; copies of a plan share one such object."""

    def __init__(self) -> None:
        self._devices: set[Device] = set()

    def __contains__(self, device: Device) -> bool:
        return device in self._devices

    def add(self, device: Device, table_bytes: int, error: Exception) -> None:
        """Add a full device, and warn; the plan's tables take ``table_bytes`` on the device."""
        self._devices.add(device)
        # Launched kernels may still read the tables.
        devices.synchronize(device)
        free = memory.free_bytes(device)
        free_text = "" if free is None else f", {format_bytes(free)} are free"
        error_text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        text = (
            f"{device} has run out of memory (the plan's tables take "
            f"{format_bytes(table_bytes)} on it{free_text}); falling back to the host (identical "
            f"batches, slower). To avoid this, {DEVICE_HINT}. The error was {error_text}"
        )
        log.logger.info("%s", text)
        log.warn(text)
