"""Build `PatchGroups` from any source that a sampler accepts."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays, devices, memory
from gpusampler.core.devices import Device
from gpusampler.core.log import logger
from gpusampler.core.text import format_bytes
from gpusampler.core.tracing import GROUP, LOAD_IDS, TRANSFER, Recorder
from gpusampler.groups.counting_sort import DEVICE_DTYPES, INT32_SAMPLES
from gpusampler.groups.index_format import is_index
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.sources.base import PatchIds
from gpusampler.sources.dispatch import read_patch_ids

MAX_FREE_SHARE = 0.8
"""Share of a device's free memory that grouping may take; otherwise the host groups."""


def groups_of(
    source: Any, device: Device | None, recorder: Recorder, *, progress: bool
) -> tuple[PatchGroups, Device]:
    """Return the groups of a source, and the device for the plan.

    ``source`` is a PatchGroups, the path of an index file, or any source of `read_patch_ids`.
    ``device`` is None for device="auto". Ids in the host's memory are grouped on the plan's device
    if they fit there, unless that would create a CUDA context that the caller did not ask for.
    """
    if isinstance(source, PatchGroups):
        return source, device or source.device
    if isinstance(source, (str, os.PathLike)) and _is_index(source):
        with recorder.range(GROUP):
            groups = PatchGroups.load(source, progress=progress)
        return groups, device or groups.device
    with recorder.range(LOAD_IDS):
        ids = read_patch_ids(source, progress=progress)
    may_initialize = device is not None
    if device is None:
        has_device = arrays.library_of(source) is not None or not ids.device.on_host
        device = ids.device if has_device else devices.default_device()
    with recorder.range(GROUP):
        if ids.device.on_host:
            ids = TimedIds(ids, recorder)
            if not device.on_host:
                ids = ids.for_grouping_on(device, may_initialize=may_initialize)
        return PatchGroups.from_ids(ids, progress=progress), device


def _is_index(path: str | os.PathLike[str]) -> bool:
    try:
        return is_index(path)
    except PermissionError:
        # `read_patch_ids` raises an error with advice.
        return False


class TimedIds(PatchIds):
    """Host ids that time their reads separately from the grouping."""

    def __init__(self, ids: PatchIds, recorder: Recorder) -> None:
        self._ids = ids
        self._recorder = recorder
        self.size, self.dtype, self.names = ids.size, ids.dtype, ids.names
        self.device, self.modified, self.seekable = ids.device, ids.modified, ids.seekable
        self.in_memory, self.wholes = ids.in_memory, ids.wholes

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids of samples ``start .. stop - 1``; see `PatchIds.read`."""
        with self._recorder.range(LOAD_IDS):
            return self._ids.read(start, stop)

    def for_grouping_on(self, device: Device, *, may_initialize: bool) -> TimedIds:
        """Return ids that are grouped on ``device`` if it can; otherwise log why the host groups.

        Unless ``may_initialize``, CUDA is used only if it is initialized in this process.
        """
        reason, dtype = None, ""
        if not (may_initialize or devices.is_cuda_initialized()):
            reason = "CUDA is not initialized in this process"
        elif not self.in_memory:
            reason = "they are not an array of integers in memory"
        elif self.size >= INT32_SAMPLES:
            reason = "there are 2**31 or more"
        else:
            dtype = self._narrowest_dtype()
            # A stable sort of keys of K bytes takes up to 4K + 24 bytes per id; 4 for the order.
            needed = (4 * np.dtype(dtype).itemsize + 28) * self.size
            free = memory.free_bytes(device)
            if free is None:
                reason = f"the free memory of {device} is unknown"
            elif needed >= MAX_FREE_SHARE * free:
                reason = (
                    f"sorting takes up to {format_bytes(needed)}, not below {MAX_FREE_SHARE:.0%} "
                    f"of the {format_bytes(free)} that are free on {device}"
                )
        if reason is None:
            return UploadedIds(self._ids, self._recorder, device, dtype)
        logger.info("the host, not %s, groups %d ids: %s", device, self.size, reason)
        return self

    def _narrowest_dtype(self) -> str:
        """Return the narrowest dtype that holds all ids and that devices sort."""
        low = high = 0
        for _, block in self.blocks():
            low, high = min(low, int(block.min())), max(high, int(block.max()))
        for name in DEVICE_DTYPES:
            if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
                return name
        raise AssertionError("blocks hold values that fit in int64")


class UploadedIds(TimedIds):
    """Ids of the host that are grouped on a device."""

    def __init__(self, ids: PatchIds, recorder: Recorder, device: Device, dtype: str) -> None:
        super().__init__(ids, recorder)
        self._upload_device, self._upload_dtype = device, dtype

    @property
    def grouping_device(self) -> Device:
        """Device on which the ids are grouped."""
        return self._upload_device

    @property
    def array(self) -> Any:
        """All ids, uploaded to the device in the narrow dtype, block by block."""
        device = self._upload_device
        xp, handle = arrays.namespace(device), devices.device_handle(device)
        with self._recorder.range(TRANSFER), devices.device_context(device):
            array = xp.empty(self.size, dtype=getattr(xp, self._upload_dtype), device=handle)
            for first, block in self.blocks():
                narrow = block.astype(self._upload_dtype, copy=False)
                array[first : first + block.size] = arrays.upload(narrow, device)
        return array
