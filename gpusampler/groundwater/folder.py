"""Find the patches of a folder and check that their files match.

A patch is a folder ``patch_<id>`` with ``core_coords.npy`` [Nc, 3], ``core_obs.npy``
[T, Nc, C], ``ghost_coords.npy`` [Ng, 3] and ``ghost_obs.npy`` [T, Ng, C]. Only headers
are read.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.files import open_regular
from gpusampler.core.npy_header import read_npy_header
from gpusampler.core.progress_bar import iterate_with_bar

COLUMNS = ("mass_concentration", "head", "pressure")

_FOLDER_NAME = re.compile(r"patch_(.*)", re.DOTALL)
_PATCH_NUMBER = re.compile(r"-?[0-9]+")
_INT64 = np.iinfo(np.int64)


class PatchArrays(NamedTuple):
    """The four arrays of a patch, as read-only memory maps with one file descriptor each."""

    core_coords: NDArray[Any]
    core_obs: NDArray[Any]
    ghost_coords: NDArray[Any]
    ghost_obs: NDArray[Any]

    def check_sizes(self, path: Path) -> None:
        """Raise if a file is shorter than its map.

        A read past the end of the file kills the process (SIGBUS), and this cannot be caught. A
        file that is truncated between this check and the read still kills the process.
        """
        for name, array in zip(self._fields, self, strict=True):
            memory_map: Any = array.base
            size, needed_size = memory_map.size(), array.offset + array.nbytes  # type: ignore[attr-defined]
            if size < needed_size:
                raise OSError(
                    f"{path.name}/{name}.npy has shrunk to {size} bytes since it was mapped, "
                    f"but its array needs {needed_size}: restore the file"
                )


@dataclass(frozen=True)
class Patch:
    """Sizes of a checked patch; its files are not open.

    Attributes
    ----------
    patch_id : int
        The number in the folder's name.
    path : pathlib.Path
        The folder.
    steps, columns : int
        Time steps T and columns C.
    core, ghost : int
        Number of core points Nc and of ghost points Ng.
    nbytes : int
        Bytes of the four arrays.
    """

    patch_id: int
    path: Path
    steps: int
    columns: int
    core: int
    ghost: int
    nbytes: int

    def open(self) -> PatchArrays:
        """Map the four files; raise if one is missing or its shape has changed."""
        arrays = open_arrays(self.path)
        checked = (
            (self.core, 3),
            (self.steps, self.core, self.columns),
            (self.ghost, 3),
            (self.steps, self.ghost, self.columns),
        )
        for name, array, shape in zip(arrays._fields, arrays, checked, strict=True):
            if array.shape != shape:
                raise ValueError(
                    f"{self.path.name} changed on disk since the dataset was made: {name}.npy has "
                    f"shape {list(array.shape)} instead of {list(shape)}. Restore the file or "
                    "create the dataset again."
                )
        return arrays


def _open_array(path: Path) -> NDArray[Any]:
    file_name = f"{path.parent.name}/{path.name}"
    try:
        # NumPy resolves the links of a Path, not of a str, which takes a third of the time.
        with open_regular(str(path)) as file:
            header = read_npy_header(file)
            if header.dtype.hasobject:
                raise ValueError("its values are Python objects")
            size = os.fstat(file.fileno()).st_size
            if size < header.file_bytes:
                raise ValueError(f"it must have {header.file_bytes} bytes, got {size}")
            return np.memmap(
                file,
                header.dtype,
                "r",
                header.offset,
                header.shape,
                "F" if header.fortran_order else "C",
            )
    except FileNotFoundError:
        raise FileNotFoundError(f"{file_name} is missing: no file {path}") from None
    except OSError as error:
        # An error of mmap does not name the file.
        reason = error.strerror or str(error)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            reason += "; reduce max_open_patches of the dataset, or raise `ulimit -n`"
        raise OSError(error.errno, f"{file_name} cannot be opened: {reason}", str(path)) from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file_name} cannot be mapped as a .npy array: {error}") from error


def open_arrays(path: Path) -> PatchArrays:
    """Map the four files of the patch in `path`."""
    return PatchArrays(*(_open_array(path / f"{name}.npy") for name in PatchArrays._fields))


def _check_patch(path: Path, patch_id: int, columns: Sequence[str]) -> Patch:
    arrays = open_arrays(path)
    for name, array in arrays._asdict().items():
        file_name = f"{path.name}/{name}.npy"
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{file_name} must hold real numbers, got dtype {array.dtype}")
        if name.endswith("coords"):
            if array.ndim != 2 or array.shape[1] != 3:
                raise ValueError(
                    f"{file_name} must have shape [points, 3], got {list(array.shape)}"
                )
        elif array.ndim != 3:
            raise ValueError(
                f"{file_name} must have shape [time steps, points, columns], "
                f"got {list(array.shape)}"
            )
        elif array.shape[2] != len(columns):
            raise ValueError(
                f"{file_name} must have {len(columns)} columns ({', '.join(columns)}), "
                f"got {array.shape[2]}"
            )
    for prefix in ("core", "ghost"):
        coords, obs = getattr(arrays, f"{prefix}_coords"), getattr(arrays, f"{prefix}_obs")
        if len(coords) != obs.shape[1]:
            raise ValueError(
                f"{path.name}/{prefix}_obs.npy must have the {len(coords)} points of "
                f"{prefix}_coords.npy, got {obs.shape[1]}"
            )
    if len(arrays.core_coords) == 0:
        raise ValueError(f"{path.name}/core_coords.npy must have at least one point, got 0")
    steps = arrays.core_obs.shape[0]
    if arrays.ghost_obs.shape[0] != steps:
        raise ValueError(
            f"{path.name}/ghost_obs.npy must have the {steps} time steps of core_obs.npy, "
            f"got {arrays.ghost_obs.shape[0]}"
        )
    return Patch(
        patch_id,
        path,
        steps,
        len(columns),
        len(arrays.core_coords),
        len(arrays.ghost_coords),
        sum(array.nbytes for array in arrays),
    )


def read_folder(
    root: Path, columns: Sequence[str] = COLUMNS, *, progress: bool = True
) -> list[Patch]:
    """Find and check the patches of a folder, sorted by folder name as text.

    Entries that are not folders named ``patch_<id>`` are skipped. All patches must have the same
    number of time steps.

    Examples
    --------
    >>> from gpusampler.demo.embedded import small_data
    >>> len(read_folder(small_data()))
    9
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"root must be an existing folder with folders patch_<id>, got {str(root)!r}"
        )
    patches: list[Patch] = []
    names: dict[int, str] = {}
    entries = sorted(root.iterdir(), key=lambda entry: entry.name)
    for path in iterate_with_bar(entries, "reading headers", "folders", progress):
        match = _FOLDER_NAME.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        number = match[1]
        if not _PATCH_NUMBER.fullmatch(number) or not _INT64.min <= int(number) <= _INT64.max:
            raise ValueError(f"the id in a patch folder's name must be an int64, got {path.name!r}")
        patch_id = int(number)
        if patch_id in names:
            raise ValueError(
                f"patch ids must be unique, got {patch_id} from {names[patch_id]!r} "
                f"and {path.name!r}"
            )
        names[patch_id] = path.name
        patch = _check_patch(path, patch_id, columns)
        if patches and patch.steps != patches[0].steps:
            raise ValueError(
                f"{path.name}/core_obs.npy must have the {patches[0].steps} time steps of "
                f"{patches[0].path.name}/core_obs.npy, got {patch.steps}"
            )
        patches.append(patch)
    if not patches:
        raise ValueError(f"root must have folders patch_<id>, got none in {str(root)!r}")
    return patches
