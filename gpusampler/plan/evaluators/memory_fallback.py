"""What happens when a device's memory runs out: a warning, and the host evaluates from then on."""

from __future__ import annotations

from gpusampler.core import devices, log, memory
from gpusampler.core.devices import Device
from gpusampler.core.text import format_bytes

DEVICE_HINT = (
    "keep ids of a patch side by side (no order is needed then), or write device='numpy': the "
    "batches are the same"
)
SORT_HINT = "sort the dataset by patch, so that no order is needed"


class FullDevices:
    """Devices whose memory has run out. Plans that are alike share what they have found out."""

    def __init__(self) -> None:
        self._devices: set[Device] = set()

    def __contains__(self, device: Device) -> bool:
        return device in self._devices

    def add(self, device: Device, table_bytes: int, error: Exception) -> None:
        """Warn that a device is full; ``table_bytes`` is what the plan's tables take there."""
        self._devices.add(device)
        # Kernels that were launched may still read the tables.
        devices.synchronize(device)
        free = memory.free_bytes(device)
        free_text = "" if free is None else f", {format_bytes(free)} are free"
        error_text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        text = (
            f"the memory of {device} has run out (the plan's tables take "
            f"{format_bytes(table_bytes)} there{free_text}): batches are evaluated on "
            f"the host from now on, the same ones, more slowly; {DEVICE_HINT} ({error_text})"
        )
        log.logger.info("%s", text)
        log.warn(text)
