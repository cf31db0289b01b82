"""Read windows from memory maps into tensors, with a limited number of open files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.groundwater.folder import Patch, PatchArrays
from gpusampler.groundwater.windows import Windows

if TYPE_CHECKING:
    import torch

_KEYS = (
    *("core_in", "ghost_in", "core_out", "ghost_out"),
    *("patch_id", "core_coords", "ghost_coords"),
)


class WindowReader:
    """Reads windows of one patch at a time.

    ``targets`` are positions of the output columns; ``origin``, float64 (3,), is subtracted from
    every point. The files of ``max_open`` patches stay open, with four file descriptors each; each
    additional thread may have one more patch open.
    """

    def __init__(
        self,
        patches: Sequence[Patch],
        windows: Windows,
        targets: Sequence[int],
        origin: NDArray[np.float64],
        max_open: int,
    ) -> None:
        self.origin = origin
        self._patches = patches
        self._windows = windows
        self._starts = windows.starts()
        self._targets = list(targets)
        self._max_open = max_open
        self._open_arrays: dict[int, PatchArrays] = {}

    def arrays(self, position: int) -> PatchArrays:
        """Return memory maps of the files of ``patches[position]``, opened or reused."""
        patch = self._patches[position]
        # Without a lock, since a fork could copy a locked one: each thread takes its entry out,
        # and the last to put one back removes the oldest entries above the limit.
        arrays = self._open_arrays.pop(position, None) or patch.open()
        arrays.check_sizes(patch.path)
        self._open_arrays[position] = arrays
        for oldest in list(self._open_arrays)[: -self._max_open]:
            self._open_arrays.pop(oldest, None)
        return arrays

    def read(self, position: int, windows: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Return windows (int64, shape (B,)) of ``patches[position]``; each step is read once."""
        import torch

        patch, arrays = self._patches[position], self.arrays(position)
        starts, num_inputs = self._starts[windows], self._windows.inputs
        tensors: dict[str, Sequence[torch.Tensor]] = {}
        for prefix in ("core", "ghost"):
            obs = np.asarray(getattr(arrays, f"{prefix}_obs"))
            values = _read_windows(obs, starts, self._windows.length)
            outputs = values[:, num_inputs:]
            if self._targets != list(range(patch.columns)):
                outputs = np.ascontiguousarray(outputs[..., self._targets])
            tensors[f"{prefix}_in"] = torch.from_numpy(values[:, :num_inputs]).unbind(0)
            tensors[f"{prefix}_out"] = torch.from_numpy(outputs).unbind(0)
            points = getattr(arrays, f"{prefix}_coords").astype(np.float64) - self.origin
            cloud = torch.from_numpy(points.astype(np.float32))
            # A transform may work in place, so samples must not share memory.
            tensors[f"{prefix}_coords"] = [cloud.clone() for _ in starts]
        return [
            {key: patch.patch_id if key == "patch_id" else tensors[key][i] for key in _KEYS}
            for i in range(len(starts))
        ]

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy the whole array; a spawned worker maps the files again.
        return {**self.__dict__, "_open_arrays": {}}


def _read_windows(obs: NDArray[Any], starts: NDArray[np.int64], length: int) -> NDArray[np.float32]:
    """Return windows (B, length, N, C) in the order of ``starts``, read in order of time.

    Steps that a window shares with the previous one are copied from it, already converted.
    Reading all steps into one array first would add a copy and double the time when the file is in
    the page cache.
    """
    windows = np.empty((len(starts), length, *obs.shape[1:]), dtype=np.float32)
    previous, previous_end = windows[:0], 0
    start_list: list[int] = starts.tolist()
    for index in np.argsort(starts, kind="stable").tolist():
        start, window = start_list[index], windows[index]
        overlap = max(previous_end - start, 0)
        if overlap:
            window[:overlap] = previous[length - overlap :]
        previous_end = start + length
        window[overlap:] = obs[start + overlap : previous_end]
        previous = window
    return windows
