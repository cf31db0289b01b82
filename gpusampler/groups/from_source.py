"""Build `PatchGroups` from any source that a sampler accepts."""

from __future__ import annotations

import os
from typing import Any

from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.tracing import GROUP, LOAD_IDS, Recorder
from gpusampler.groups.index_format import is_index
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.sources.base import PatchIds
from gpusampler.sources.dispatch import read_patch_ids


def groups_of(source: Any, recorder: Recorder, *, progress: bool) -> tuple[PatchGroups, bool]:
    """Return the groups of a source, and whether device="auto" means the device of the groups.

    ``source`` is a PatchGroups, the path of an index file, or any source of `read_patch_ids`.
    """
    if isinstance(source, PatchGroups):
        return source, True
    if isinstance(source, (str, os.PathLike)) and _is_index(source):
        with recorder.range(GROUP):
            return PatchGroups.load(source, progress=progress), True
    with recorder.range(LOAD_IDS):
        ids = read_patch_ids(source, progress=progress)
    with recorder.range(GROUP):
        timed_ids = TimedIds(ids, recorder) if ids.device.on_host else ids
        groups = PatchGroups.from_ids(timed_ids, progress=progress)
    return groups, arrays.library_of(source) is not None or not ids.device.on_host


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
        self.in_memory = ids.in_memory

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the ids of samples ``start .. stop - 1``; see `PatchIds.read`."""
        with self._recorder.range(LOAD_IDS):
            return self._ids.read(start, stop)
