"""Memory that there is, that is about to be taken, and that was: host and device.

What is not known (no Linux, no such question in a library) is None, and nothing is warned of.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from gpusampler.core import devices, log
from gpusampler.core.devices import Device
from gpusampler.core.text import format_bytes

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED_FROM = 1 << 60
"""A cgroup's limit that is none."""
MIN_CHECKED_BYTES = 1 << 20
"""Bytes that are worth the question what is free, which takes as long as a small sampler does."""
GROWTH_EPOCHS = 5
MIN_GROWTH_PER_EPOCH = 8 << 20
MIN_GROWTH_TOTAL = 128 << 20
"""What is called growing: in each of so many epochs running, and together, so many bytes.

Allocators and caches settle within an epoch or two; what is still growing after five, by more than
losses that are kept as numbers would take, ends a long run.
"""
_growth_warned: list[bool] = []


def resident_bytes(process: int | None = None) -> int | None:
    """Return the bytes of memory that a process holds, by default this one."""
    pages = _statm("self" if process is None else str(process))
    return None if pages is None else pages[0]


def anonymous_bytes() -> int | None:
    """Return the bytes of memory that this process holds and that are of no file and not shared.

    Pages of a memory map come and go as the kernel likes; these stay.
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
    """Return the bytes of resident memory that are pages of files: code, and memory maps."""
    return kernel_field(PROC / "self" / "status", "RssFile") or 0


def peak_resident_bytes() -> int | None:
    """Return the most bytes that this process has ever held."""
    return kernel_field(PROC / "self" / "status", "VmHWM")


def kernel_field(path: Path, name: str) -> int | None:
    """Return a number of bytes from a table of the kernel's, None if it is not there."""
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            words = line.replace(":", " ").split()
            if words and words[0] == name:
                return int(words[1]) * (1024 if words[-1] == "kB" else 1)
    return None


def free_bytes(device: Device) -> int | None:
    """Return the bytes that may still be allocated on a device.

    On the host, the smallest of what the machine has and what the cgroups of this process leave.
    On a GPU, with what the library's pool holds and has not given out.
    """
    if device.name == "cpu":
        limits = [kernel_field(PROC / "meminfo", "MemAvailable"), *_free_in_cgroups()]
        return min((free for free in limits if free is not None), default=None)
    # Asking initialises the device, which what is about to be allocated would do anyway.
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
    """Return what each limit on this process leaves, of cgroups version 1 and 2."""
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
        # In a container the path may be the host's, of which only the root is to be seen.
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
        # "max" is no number: no limit.
        return None
    if limit >= UNLIMITED_FROM:
        return None
    # Pages of files that were read once are given back before anything is refused.
    return max(0, limit - used + (kernel_field(folder / "memory.stat", reclaimable) or 0))


def peak_device_bytes(device: Device) -> int | None:
    """Return the most bytes that were ever given out on a GPU, None where that is not counted."""
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device.name))
    return None


def allocated_device_bytes(device: Device) -> int | None:
    """Return the bytes that are given out on a GPU now, None for anything else."""
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_allocated(device.name))
    if device.library == "cupy":
        import cupy

        with devices.device_context(device):
            return int(cupy.get_default_memory_pool().used_bytes())
    return None


def check_free_memory(needed: int, device: Device, purpose: str, advice: str) -> None:
    """Warn if what is about to be allocated takes more than half of the memory that is free.

    Not if it is less than a MiB.

    Parameters
    ----------
    needed : int
        Bytes.
    device : Device
        The host's memory or a GPU's.
    purpose : str
        What is made, for the text.
    advice : str
        What to do, for the text.

    Warns
    -----
    UserWarning
        With both figures.

    Examples
    --------
    >>> from gpusampler.core.arrays import HOST
    >>> check_free_memory(1000, HOST, "a table", "make it smaller")
    """
    if needed < MIN_CHECKED_BYTES:
        return
    free = free_bytes(device)
    if free is not None and needed > free // 2:
        log.warn(
            f"{purpose} will take {format_bytes(needed)} of the {format_bytes(free)} that are free "
            f"on {device}, more than half; {advice}"
        )


class GrowthWatch:
    """Warns, once in a process, when its memory grows from epoch to epoch.

    `check` is called where an epoch begins; see `GROWTH_EPOCHS` for what is called growing.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []

    def check(self) -> None:
        """Compare with the epochs before.

        Warns
        -----
        UserWarning
            With the figures.
        """
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
            f"{format_bytes(grown // GROWTH_EPOCHS)} an epoch: "
            "something keeps what an epoch makes, such as losses with their graphs "
            "(sum loss.item()), batches in a list, or a cache without an end"
        )

    def __reduce__(self) -> tuple[type[GrowthWatch], tuple[()]]:
        """Travel as a new one: another process has another size."""
        return GrowthWatch, ()
