"""Free, used and peak memory of host and device, and warnings about it.

Functions return None for a value that the system or library does not report (the host's values
need Linux); the warnings are then skipped.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from time import monotonic

from gpusampler.core import devices, log
from gpusampler.core.devices import Device
from gpusampler.core.text import format_bytes

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED_FROM = 1 << 60
"""A limit of a cgroup from this size on means no limit."""
MIN_CHECKED_BYTES = 1 << 20
"""Smaller allocations are not checked: the check takes as long as creating a small sampler."""
GROWTH_EPOCHS = 5
MIN_GROWTH_PER_EPOCH = 8 << 20
MIN_GROWTH_TOTAL = 128 << 20
"""Memory is growing if it grew by these bytes in each of `GROWTH_EPOCHS` epochs and in total.

Allocators and caches settle within two epochs, and a list of losses as floats grows more slowly.
"""
MIN_SECONDS_BETWEEN_CHECKS = 0.001
"""Shorter epochs count as one: reading the memory takes 10 microseconds, as long as a short epoch.
"""
_growth_warned: list[bool] = []


def resident_bytes(process: int | None = None) -> int | None:
    """Return the resident bytes of a process, by default this one."""
    pages = _statm("self" if process is None else str(process))
    return None if pages is None else pages[0]


def anonymous_bytes() -> int | None:
    """Return the resident bytes of this process that are neither file-backed nor shared.

    The kernel may drop pages of memory maps at any time, but not these.
    """
    pages = _statm("self")
    return None if pages is None else pages[0] - pages[1]


def _statm(process: str) -> tuple[int, int] | None:
    try:
        fields = (PROC / process / "statm").read_bytes().split()
        page = os.sysconf("SC_PAGE_SIZE")
        return int(fields[1]) * page, int(fields[2]) * page
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def file_backed_bytes() -> int:
    """Return the resident bytes of this process that are pages of files: code and memory maps."""
    return kernel_field(PROC / "self" / "status", "RssFile") or 0


def peak_resident_bytes() -> int | None:
    """Return the peak resident bytes of this process."""
    return kernel_field(PROC / "self" / "status", "VmHWM")


def kernel_field(path: Path, name: str) -> int | None:
    """Return a number of bytes from a kernel table such as /proc/meminfo; None if missing."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            words = line.replace(":", " ").split()
            if words and words[0] == name:
                return int(words[1]) * (1024 if words[-1] == "kB" else 1)
    return None


def free_bytes(device: Device) -> int | None:
    """Return the bytes that can still be allocated on a device.

    On the host, the minimum over the machine and the cgroups of this process. On a GPU, including
    unused memory in the library's pool.
    """
    if device.name == "cpu":
        limits = [kernel_field(PROC / "meminfo", "MemAvailable"), *_free_in_cgroups()]
        return min((free for free in limits if free is not None), default=None)
    # This query initializes CUDA, as the allocation that follows would do.
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device.name)
        pool = torch.cuda.memory_reserved(device.name) - torch.cuda.memory_allocated(device.name)
        return int(free + pool)
    if device.library == "cupy":
        import cupy

        with devices.device_context(device):
            free, _ = cupy.cuda.Device().mem_info
            return int(free + cupy.get_default_memory_pool().free_bytes())
    return None


def _free_in_cgroups() -> list[int]:
    """Return the free bytes under each memory limit of this process, of cgroups v1 and v2."""
    free_sizes = []
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, _, tail = line.partition(":")
        controllers, _, path = tail.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        root = CGROUPS / "memory" if version == 1 else CGROUPS
        # In a container the path may be that of the host, where only the root is visible.
        inner = root / path.lstrip("/")
        for folder in {root, inner, *(p for p in inner.parents if root in p.parents)}:
            free = _free_in_cgroup(folder, version)
            if free is not None:
                free_sizes.append(free)
    return free_sizes


def _free_in_cgroup(folder: Path, version: int) -> int | None:
    limit_file, usage_file, reclaimable = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    try:
        limit = int((folder / limit_file).read_text())
        used = int((folder / usage_file).read_text())
    except (OSError, ValueError):
        # "max" means no limit.
        return None
    if limit >= UNLIMITED_FROM:
        return None
    # The kernel reclaims inactive file pages before an allocation fails.
    return max(0, limit - used + (kernel_field(folder / "memory.stat", reclaimable) or 0))


def peak_device_bytes(device: Device) -> int | None:
    """Return the peak bytes that torch allocated on a GPU; None for other devices."""
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device.name))
    return None


def allocated_device_bytes(device: Device) -> int | None:
    """Return the bytes that are currently allocated on a GPU; None for other devices."""
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_allocated(device.name))
    if device.library == "cupy":
        import cupy

        with devices.device_context(device):
            return int(cupy.get_default_memory_pool().used_bytes())
    return None


def check_free_memory(needed: int, device: Device, purpose: str, advice: str) -> None:
    """Warn if ``needed`` bytes are at least 1 MiB and more than half of the free memory.

    The text is "``purpose`` will take ..., more than half of ...; ``advice``".
    """
    if needed < MIN_CHECKED_BYTES:
        return
    free = free_bytes(device)
    if free is not None and needed > free // 2:
        log.warn(
            f"{purpose} will take {format_bytes(needed)}, more than half of the "
            f"{format_bytes(free)} that are free on {device}; {advice}"
        )


class GrowthWatch:
    """Warns once per process if its memory grows in each of `GROWTH_EPOCHS` epochs."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        # A first epoch has none to be compared with.
        self._last_check = monotonic()

    def check(self) -> None:
        """Compare the memory at the start of an epoch with that of earlier epochs."""
        now = monotonic()
        if now - self._last_check < MIN_SECONDS_BETWEEN_CHECKS:
            return
        self._last_check = now
        size = anonymous_bytes()
        if size is None or _growth_warned:
            return
        sizes = self._sizes
        if sizes and size - sizes[-1] < MIN_GROWTH_PER_EPOCH:
            sizes.clear()
        sizes.append(size)
        del sizes[: -GROWTH_EPOCHS - 1]
        grown = size - sizes[0]
        if len(sizes) <= GROWTH_EPOCHS or grown < MIN_GROWTH_TOTAL:
            return
        _growth_warned.append(True)
        log.warn(
            f"the memory of this process has grown in each of the last {GROWTH_EPOCHS} epochs, "
            f"from {format_bytes(sizes[0])} to {format_bytes(size)}, "
            f"{format_bytes(grown // GROWTH_EPOCHS)} per epoch; common causes are losses kept "
            "with their graphs (sum loss.item() instead), batches kept in a list, and caches "
            "without a size limit"
        )

    def __reduce__(self) -> tuple[type[GrowthWatch], tuple[()]]:
        """Pickle as a new watch, because sizes of this process mean nothing in another."""
        return GrowthWatch, ()
