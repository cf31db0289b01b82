"""A map-style dataset of the sliding windows of a patch folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.validation import check_bool, check_int, check_real
from gpusampler.groundwater.checks import check_columns, check_targets
from gpusampler.groundwater.collate import collate_fn
from gpusampler.groundwater.folder import COLUMNS, Patch, PatchArrays, read_folder
from gpusampler.groundwater.normalize import Normalize
from gpusampler.groundwater.reader import WindowReader
from gpusampler.groundwater.windows import Windows

if TYPE_CHECKING:
    import torch

    Sample = dict[str, Any]
    Transform = Callable[[Sample], Sample]


class GWPatchDataset:
    """Sliding windows over the patches of a groundwater model.

    ``root`` has one folder ``patch_<id>`` per patch, with ``core_coords.npy`` [Nc, 3],
    ``core_obs.npy`` [T, Nc, C], ``ghost_coords.npy`` [Ng, 3] and ``ghost_obs.npy``
    [T, Ng, C]. Ghost points lie around a patch and belong to its neighbours. Other
    entries of ``root`` are skipped. Patches are sorted by folder name as text (patch_10 before
    patch_2), and the samples of a patch are consecutive, in order of time.

    The constructor reads only file headers. Reading a sample opens the files as memory maps,
    separately in each worker process, so memory holds only the samples that are read.

    The class has the interface of `torch.utils.data.Dataset` but does not derive from it, so
    importing it does not import torch. `gpusampler.PatchBatchSampler` finds its patch ids
    without reading a sample.

    Parameters
    ----------
    root : str or os.PathLike
        The folder of patches.
    input_window_size, output_window_size : int
        Number of input time steps of a sample, and of the output steps right after them.
    split : {"train", "val", "all"}, default "train"
        Train: the first ``floor((1 - val_ratio) * T)`` steps. Val: the remaining steps. All:
        every step; windows may then cross the cut between the two.
    val_ratio : float, default 0.2
        Fraction of the series used for validation, in [0, 1).
    gap : int, default 0
        Number of time steps after the cut that are in neither split. No window crosses the
        cut, even without a gap, but the last training and the first validation step are then
        adjacent.
    stride : int, optional
        Number of time steps between the starts of consecutive windows. Default:
        `output_window_size`, so that every step is an output exactly once.
    target_columns : str or int or sequence of str or int, optional
        Columns of ``core_out`` and ``ghost_out``, by name or position. Default: all.
    transform : callable, optional
        Takes a sample and returns one, e.g. `Normalize`. Must be picklable for workers.
    columns : sequence of str, default ("mass_concentration", "head", "pressure")
        Names of the C columns of the observations.
    origin : (3,) floats, default (0, 0, 0)
        Subtracted from every point, in the files' unit, before the conversion to float32.
        float32 resolves a projected northing of 5,000,000 m to half a metre only: pass a
        corner of the domain for such coordinates.
    max_open_patches : int, default 64
        Maximum number of patches with open files per process; each uses four file descriptors
        and four memory maps. Each additional reading thread may have one more patch open.
    progress : bool, default True
        Show a progress bar if reading the folder takes more than a second.

    Attributes
    ----------
    columns, target_columns : tuple of str
        Names of the columns of the inputs and of the outputs.
    num_points : int
        Number of points of all patches, core and ghost.
    nbytes : int
        Bytes of all arrays on disk.
    windows : gpusampler.groundwater.windows.Windows
        The time steps of each window, the same for every patch.

    Raises
    ------
    TypeError
        If an argument has the wrong type; a bool is not an int.
    ValueError
        If an argument is out of range, the folder has no patch, a file has the wrong shape or
        dtype, patches differ in T or C, or the split is shorter than one window. The message
        names the patch and the file.
    FileNotFoundError
        If `root` is not a folder or a patch lacks a file.
    OSError
        If a file cannot be opened. The message names the patch and the file.

    Examples
    --------
    >>> from gpusampler.demo.embedded import small_data
    >>> dataset = GWPatchDataset(small_data(), 6, 1, target_columns="head")
    >>> len(dataset)
    378
    >>> sample = dataset[0]
    >>> sample["core_in"].shape[0], sample["core_out"].shape[-1], sample["patch_id"]
    (6, 1, 0)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        input_window_size: int,
        output_window_size: int,
        *,
        split: str = "train",
        val_ratio: float = 0.2,
        gap: int = 0,
        stride: int | None = None,
        target_columns: str | int | Iterable[str | int] | None = None,
        transform: Transform | None = None,
        columns: Sequence[str] = COLUMNS,
        origin: Sequence[float] = (0.0, 0.0, 0.0),
        max_open_patches: int = 64,
        progress: bool = True,
    ) -> None:
        inputs = check_int(input_window_size, "input_window_size", low=1)
        outputs = check_int(output_window_size, "output_window_size", low=1)
        Windows(0, inputs, outputs, split, val_ratio, gap, stride)  # checks before reading files
        self.columns = check_columns(columns)
        self.target_columns = check_targets(target_columns, self.columns)
        self.transform = transform
        corner = check_real(
            origin,
            "origin",
            "be three finite numbers",
            lambda x: x.shape == (3,) and np.isfinite(x),
            is_sequence=True,
        )
        max_open = check_int(max_open_patches, "max_open_patches", low=1)
        check_bool(progress, "progress")
        self.root = Path(root)
        self._patches = read_folder(self.root, self.columns, progress=progress)
        self._positions = {patch.patch_id: i for i, patch in enumerate(self._patches)}
        first = self._patches[0]
        self.windows = Windows(first.steps, inputs, outputs, split, val_ratio, gap, stride)
        if self.windows.count == 0:
            num_steps = max(self.windows.last - self.windows.first, 0)
            raise ValueError(
                f"split {split!r} has {num_steps} of the {first.steps} time steps in "
                f"{first.path.name}/core_obs.npy, but a window needs {self.windows.length}: change "
                "val_ratio or gap, or use smaller windows"
            )
        targets = [self.columns.index(name) for name in self.target_columns]
        self._reader = WindowReader(self._patches, self.windows, targets, corner, max_open)
        self._patch_ids: NDArray[np.int64] | None = None
        self.num_points = sum(patch.core + patch.ghost for patch in self._patches)
        self.nbytes = sum(patch.nbytes for patch in self._patches)

    @property
    def transform(self) -> Transform | None:
        """Function applied to every sample; can be set after construction.

        Raises
        ------
        TypeError
            If set to a value that is neither callable nor None.
        ValueError
            If set to a `Normalize` whose columns differ from the dataset's.
        """
        return self._transform

    @transform.setter
    def transform(self, transform: Transform | None) -> None:
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be callable or None, got {transform!r}")
        if isinstance(transform, Normalize):
            transform.check_columns(self.columns, self.target_columns)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._patches) * self.windows.count

    def __repr__(self) -> str:
        return (
            f"GWPatchDataset({str(self.root)!r}, {self.windows.inputs}, {self.windows.outputs}, "
            f"split={self.windows.split!r}: {len(self._patches)} patches, {len(self)} samples)"
        )

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(
        self, indices: Sequence[int] | NDArray[np.integer[Any]] | torch.Tensor
    ) -> list[Sample]:
        """Return several samples, in the order of the indices.

        The windows of each patch are read in order of time; steps that they share are read
        once.

        Parameters
        ----------
        indices : list of int, or integer array or tensor, shape (B,)
            Sample indices; negative indices count from the end. Device tensors are copied to
            the host.

        Returns
        -------
        list of dict
            Per sample, float32 CPU tensors that share no memory with other samples:
            ``core_in`` [Tin, Nc, C], ``ghost_in`` [Tin, Ng, C], ``core_out`` [Tout, Nc, Ct],
            ``ghost_out`` [Tout, Ng, Ct], ``core_coords`` [Nc, 3], ``ghost_coords`` [Ng, 3];
            and ``patch_id``, an int. Units are those of the files, unless the transform, which
            has been applied, changes them.

        Raises
        ------
        IndexError
            If an index is out of range.
        TypeError
            If the indices are not integers or not one-dimensional.
        OSError, ValueError
            If a file was removed, shrank or changed shape after the dataset was created. The
            message names the patch and the file.
        """
        rows = self._check_indices(indices)
        samples: dict[int, Sample] = {}
        patches, windows = np.divmod(rows, self.windows.count)
        for position in np.unique(patches).tolist():
            patch_rows = np.flatnonzero(patches == position)
            patch_samples = self._reader.read(position, windows[patch_rows])
            for row, sample in zip(patch_rows.tolist(), patch_samples, strict=True):
                samples[row] = self._transform(sample) if self._transform else sample
        return [samples[row] for row in range(len(rows))]

    def _check_indices(self, indices: Any) -> NDArray[np.int64]:
        host_indices = indices.cpu() if hasattr(indices, "cpu") else indices
        rows = np.asarray(host_indices)
        if rows.size == 0:
            return np.empty(0, dtype=np.int64)
        if rows.dtype.kind not in "iu":
            raise TypeError(f"indices must be integers, got dtype {rows.dtype}")
        if rows.ndim != 1:
            raise TypeError(f"indices must be one-dimensional, got shape {rows.shape}")
        rows = rows.astype(np.int64)
        rows = np.where(rows < 0, rows + len(self), rows)
        out_of_range = np.flatnonzero((rows < 0) | (rows >= len(self)))
        if out_of_range.size:
            raise IndexError(
                f"index must be in [{-len(self)}, {len(self)}), "
                f"got {int(np.asarray(host_indices)[out_of_range[0]])}"
            )
        return rows

    @property
    def origin(self) -> tuple[float, float, float]:
        """The point subtracted from every point, in the files' unit."""
        x, y, z = self._reader.origin.tolist()
        return x, y, z

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The checked patches, in order of their samples."""
        return tuple(self._patches)

    def arrays(self, patch_id: int) -> PatchArrays:
        """Return the four arrays of one patch.

        Parameters
        ----------
        patch_id : int
            A patch id of this dataset.

        Returns
        -------
        PatchArrays
            Read-only memory maps in the dtype of the files, without the transform. If a file
            is truncated later, reading its map kills the process (SIGBUS).

        Raises
        ------
        KeyError
            If the dataset has no such patch.
        OSError, ValueError
            If a file was removed, shrank or changed shape after the dataset was created.
        """
        if patch_id not in self._positions:
            raise KeyError(
                f"patch_id must be one of the ids in dataset.patch_ids, got {patch_id!r}"
            )
        return self._reader.arrays(self._positions[patch_id])

    def get_all_patch_ids(self) -> NDArray[np.int64]:
        """Return the patch id of every sample, without reading any sample.

        Returns
        -------
        ndarray of int64, shape (len(self),)
            Read-only; computed once.

        Examples
        --------
        >>> from gpusampler.demo.embedded import small_data
        >>> GWPatchDataset(small_data(), 6, 1).get_all_patch_ids()[:3].tolist()
        [0, 0, 0]
        """
        if self._patch_ids is None:
            ids = np.array([patch.patch_id for patch in self._patches], dtype=np.int64)
            self._patch_ids = np.repeat(ids, self.windows.count)
            self._patch_ids.flags.writeable = False
        return self._patch_ids

    @property
    def patch_ids(self) -> NDArray[np.int64]:
        """The patch id of every sample, as from `get_all_patch_ids`."""
        return self.get_all_patch_ids()

    def patch_costs(self) -> dict[int, int]:
        """Return the cost of one sample of each patch: its number of core and ghost points.

        Returns
        -------
        dict of int to int
            Cost by patch id, in the order of the patches.

        Examples
        --------
        >>> from gpusampler.demo.embedded import small_data
        >>> dataset = GWPatchDataset(small_data(), 6, 1)
        >>> sum(dataset.patch_costs().values()) == dataset.num_points
        True
        """
        return {patch.patch_id: patch.core + patch.ghost for patch in self._patches}

    def collate_fn(self, samples: Sequence[Sample]) -> Sample:
        """Stack samples of one patch, as `gpusampler.groundwater.collate_fn` does.

        Parameters
        ----------
        samples : sequence of dict
            Samples of one patch.

        Returns
        -------
        dict
            The batch, with one point cloud.

        Raises
        ------
        ValueError
            If there are no samples, the samples come from several patches, or a transform gave
            samples of one patch different points.
        """
        return collate_fn(samples)
