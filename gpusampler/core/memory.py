"""Memory that there is, that is about to be taken, and that was: host and device.

What is not known (no Linux, no such question in a library) is None, and nothing is warned of.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from gpusampler.core import devices, log
from gpusampler.core.devices import Device
from gpusampler.core.text import human

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60
"""A cgroup's limit that is none."""
ASKED_FROM = 1 << 20
"""Bytes that are worth the question what is free, which takes as long as a small sampler does."""
GROWN_EPOCHS = 5
GROWN_EACH = 8 << 20
GROWN_TOGETHER = 128 << 20
"""What is called growing: in each of so many epochs running, and together, so many bytes.

Allocators and caches settle within an epoch or two; what is still growing after five, by more than
losses that are kept as numbers would take, ends a long run.
"""
_said_growth: list[bool] = []


def resident(process: int | None = None) -> int | None:
    """Return the bytes of memory that a process holds, by default this one."""
    pages = _statm("self" if process is None else str(process))
    return None if pages is None else pages[0]


def anonymous() -> int | None:
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


def of_files() -> int:
    """Return the bytes of resident memory that are pages of files: code, and memory maps."""
    return field(PROC / "self" / "status", "RssFile") or 0


def peak_resident() -> int | None:
    """Return the most bytes that this process has ever held."""
    return field(PROC / "self" / "status", "VmHWM")


def field(path: Path, name: str) -> int | None:
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
        known = [field(PROC / "meminfo", "MemAvailable"), *_left_by_cgroups()]
        return min((free for free in known if free is not None), default=None)
    # Asking initialises the device, which what is about to be allocated would do anyway.
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device.name)
        pool = torch.cuda.memory_reserved(device.name) - torch.cuda.memory_allocated(device.name)
        return int(free + pool)
    if device.library == "cupy":
        import cupy

        with devices.on(device):
            free, _ = cupy.cuda.Device().mem_info
            return int(free + cupy.get_default_memory_pool().free_bytes())
    return None


def _left_by_cgroups() -> list[int]:
    """Return what each limit on this process leaves, of cgroups version 1 and 2."""
    left = []
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        root = CGROUPS / "memory" if version == 1 else CGROUPS
        # In a container the path may be the host's, of which only the root is to be seen.
        inner = root / path.lstrip("/")
        for folder in {root, inner, *(up for up in inner.parents if root in up.parents)}:
            free = _left_in(folder, version)
            if free is not None:
                left.append(free)
    return left


def _left_in(folder: Path, version: int) -> int | None:
    limit_in, used_in, reclaimed = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    try:
        limit = int((folder / limit_in).read_text())
        used = int((folder / used_in).read_text())
    except (OSError, ValueError):
        # "max" is no number: no limit.
        return None
    if limit >= NO_LIMIT:
        return None
    # Pages of files that were read once are given back before anything is refused.
    return max(0, limit - used + (field(folder / "memory.stat", reclaimed) or 0))


def peak_on_device(device: Device) -> int | None:
    """Return the most bytes that were ever given out on a GPU, None where that is not counted."""
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device.name))
    return None


def taken_on_device(device: Device) -> int | None:
    """Return the bytes that are given out on a GPU now, None for anything else."""
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_allocated(device.name))
    if device.library == "cupy":
        import cupy

        with devices.on(device):
            return int(cupy.get_default_memory_pool().used_bytes())
    return None


def check_room(needed: int, device: Device, what: str, instead: str) -> None:
    """Warn if what is about to be allocated takes more than half of the memory that is free.

    Not if it is less than a MiB.

    Parameters
    ----------
    needed : int
        Bytes.
    device : Device
        The host's memory or a GPU's.
    what : str
        What is made, for the text.
    instead : str
        What to do, for the text.

    Warns
    -----
    UserWarning
        With both figures.

    Examples
    --------
    >>> from gpusampler.core.arrays import HOST
    >>> check_room(1000, HOST, "a table", "make it smaller")
    """
    if needed < ASKED_FROM:
        return
    free = free_bytes(device)
    if free is not None and needed > free // 2:
        log.warn(
            f"{what} will take {human(needed)} of the {human(free)} that are free on {device}, "
            f"more than half; {instead}"
        )


class GrowthWatch:
    """Warns, once in a process, when its memory grows from epoch to epoch.

    `look` is called where an epoch begins; see `GROWN_EPOCHS` for what is called growing.
    """

    def __init__(self) -> None:
        self._sizes: list[int] = []

    def look(self) -> None:
        """Compare with the epochs before.

        Warns
        -----
        UserWarning
            With the figures.
        """
        size = anonymous()
        if size is None or _said_growth:
            return
        sizes = self._sizes
        if sizes and size - sizes[-1] < GROWN_EACH:
            sizes.clear()
        sizes.append(size)
        del sizes[: -GROWN_EPOCHS - 1]
        grown = size - sizes[0]
        if len(sizes) <= GROWN_EPOCHS or grown < GROWN_TOGETHER:
            return
        _said_growth.append(True)
        log.warn(
            f"the memory of this process has grown in each of the last {GROWN_EPOCHS} epochs, from "
            f"{human(sizes[0])} to {human(size)}, {human(grown // GROWN_EPOCHS)} an epoch: "
            "something keeps what an epoch makes, such as losses with their graphs "
            "(sum loss.item()), batches in a list, or a cache without an end"
        )

    def __reduce__(self) -> tuple[type[GrowthWatch], tuple[()]]:
        """Travel as a new one: another process has another size."""
        return GrowthWatch, ()
