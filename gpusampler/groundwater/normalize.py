"""Scaling by statistics of the training steps, and its inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from gpusampler.core.validation import check_real
from gpusampler.groundwater.folder import Patch, PatchArrays
from gpusampler.groundwater.statistics import training_statistics
from gpusampler.groundwater.windows import Windows

if TYPE_CHECKING:
    import torch

_FORMAT = 1


class PatchSeries(Protocol):
    """The part of `GWPatchDataset` that statistics are computed from."""

    columns: tuple[str, ...]
    target_columns: tuple[str, ...]
    windows: Windows

    @property
    def patches(self) -> Sequence[Patch]:
        """The checked patches."""

    @property
    def origin(self) -> tuple[float, float, float]:
        """The point that has the coordinates (0, 0, 0) in samples."""

    def arrays(self, patch_id: int) -> PatchArrays:
        """Return the arrays of a patch as memory maps of its files."""


@dataclass(frozen=True)
class Normalize:
    """Scale columns to mean 0 and standard deviation 1, and points to the unit cube.

    Values become ``(value - mean) / std`` per column; a constant column has std 1. Points are
    scaled per axis, because an aquifer is a hundred times wider than thick and the latent grid
    of a GINO is a cube:

    - ``coords="patch"``, the default, maps the box around the core and ghost points of the
      sample's patch to [0, 1]^3. The latent grid of a GINO then covers this one patch. With the
      domain's box, a patch with a ninth of the area would use a ninth of the grid, and the
      radii of the graph would depend on the number of patches. On the embedded data, the
      demo's GINO reaches a probe loss of 0.64 with "patch" (two seeds), and of 0.81 and 1.06 with
      "domain".
    - ``coords="domain"`` maps the box around all patches to [0, 1]^3. It keeps the location and
      the relative size of a patch, for models that need them.

    An axis without extent becomes 0.5. Use `from_dataset` to compute the statistics, and the
    constructor for known ones.

    Parameters
    ----------
    columns, target_columns : tuple of str
        Columns of the inputs and of the outputs.
    mean, std : tuple of float
        Per input column, in its unit; std > 0.
    low, high : tuple of three floats
        Corners of the domain's box, in the unit of the points.
    coords : {"patch", "domain"}
        Which box becomes the unit cube.

    Raises
    ------
    ValueError
        If lengths differ, a target is not a column, a std is not positive, a number is not
        finite, or `coords` is unknown.

    Examples
    --------
    >>> from gpusampler.demo.embedded import small_data
    >>> from gpusampler.groundwater import GWPatchDataset
    >>> dataset = GWPatchDataset(small_data(), 6, 1, target_columns="head")
    >>> dataset.transform = Normalize.from_dataset(dataset)
    >>> sample = dataset[0]
    >>> bool(sample["core_coords"].min() >= 0), bool(sample["core_coords"].max() <= 1)
    (True, True)
    >>> head = dataset.transform.inverse(sample["core_out"])  # metres again
    """

    columns: tuple[str, ...]
    target_columns: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    coords: Literal["patch", "domain"] = "patch"

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            if len(getattr(self, name)) != len(self.columns):
                raise ValueError(
                    f"{name} must have {len(self.columns)} numbers, got {len(getattr(self, name))}"
                )
        for name in ("low", "high"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must have 3 numbers, got {len(getattr(self, name))}")
        for name in ("mean", "std", "low", "high"):
            check_real(getattr(self, name), name, "be finite", np.isfinite, is_sequence=True)
        if min(self.std) <= 0:
            raise ValueError(f"std must be > 0, got {min(self.std)}")
        for target in self.target_columns:
            if target not in self.columns:
                raise ValueError(
                    f"target_columns must be among {', '.join(self.columns)}, got {target!r}"
                )
        if self.coords not in ("patch", "domain"):
            raise ValueError(f"coords must be 'patch' or 'domain', got {self.coords!r}")

    @classmethod
    def from_dataset(
        cls,
        dataset: PatchSeries,
        coords: Literal["patch", "domain"] = "patch",
        *,
        progress: bool = True,
    ) -> Normalize:
        """Compute the statistics from the training steps of a dataset.

        Only the training steps are read, the first ``floor((1 - val_ratio) * T)``, whatever the
        split of the dataset. Mean and standard deviation use core points only: a ghost point is a
        core point of a neighbouring patch and would count twice. The files are read in blocks of
        about 8 MB and summed in float64.

        Parameters
        ----------
        dataset : GWPatchDataset
            The dataset; its transform is ignored.
        coords : {"patch", "domain"}, default "patch"
            Which box becomes the unit cube.
        progress : bool, default True
            Show a progress bar if this takes more than a second.

        Returns
        -------
        Normalize
            The transform.

        Raises
        ------
        ValueError
            If there are no training steps, or a value is not finite; the message then names the
            patch and the file.
        """
        statistics = training_statistics(
            dataset.patches,
            dataset.windows,
            open_patch=lambda patch: dataset.arrays(patch.patch_id),
            progress=progress,
        )
        origin = dataset.origin
        return cls(
            columns=dataset.columns,
            target_columns=dataset.target_columns,
            mean=tuple(statistics.mean.tolist()),
            std=tuple(statistics.std.tolist()),
            low=tuple((statistics.low - origin).tolist()),
            high=tuple((statistics.high - origin).tolist()),
            coords=coords,
        )

    def check_columns(self, columns: Sequence[str], target_columns: Sequence[str]) -> None:
        """Raise if the columns of a dataset differ from those of the statistics.

        Parameters
        ----------
        columns, target_columns : sequence of str
            Columns of the dataset's inputs and outputs.

        Raises
        ------
        ValueError
            If they differ from the columns of this transform.
        """
        for name, expected, actual in (
            ("columns", self.columns, tuple(columns)),
            ("target_columns", self.target_columns, tuple(target_columns)),
        ):
            if expected != actual:
                raise ValueError(
                    f"transform must have the dataset's {name} {actual}, got {expected}: create it "
                    "with Normalize.from_dataset"
                )

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Scale one sample.

        Parameters
        ----------
        sample : dict
            A sample of `GWPatchDataset`.

        Returns
        -------
        dict
            A new sample; the input is not modified.

        Raises
        ------
        ValueError
            If the last axis of a value does not have one entry per column.
        """
        scaled = dict(sample)
        for key, columns in (
            ("core_in", self.columns),
            ("ghost_in", self.columns),
            ("core_out", self.target_columns),
            ("ghost_out", self.target_columns),
        ):
            mean, std = self._statistics(sample[key], columns)
            scaled[key] = (sample[key] - mean) / std
        points = self.scale_points(sample["core_coords"], sample["ghost_coords"])
        scaled["core_coords"], scaled["ghost_coords"] = points
        return scaled

    def scale_points(
        self, core: torch.Tensor, ghost: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale the points of one patch to the unit cube, as ``coords`` says.

        Parameters
        ----------
        core, ghost : torch.Tensor, shapes (Nc, 3) and (Ng, 3)
            Core and ghost points of a sample.

        Returns
        -------
        tuple of torch.Tensor
            The scaled core and ghost points, same shapes, dtype and device.
        """
        if self.coords == "domain":
            low, high = core.new_tensor(self.low), core.new_tensor(self.high)
        else:
            low, high = core.amin(0), core.amax(0)
            if len(ghost):
                low, high = low.minimum(ghost.amin(0)), high.maximum(ghost.amax(0))
        extent = high - low
        flat = extent <= 0
        extent = extent.masked_fill(flat, 1.0)
        core, ghost = (((points - low) / extent).masked_fill(flat, 0.5) for points in (core, ghost))
        return core, ghost

    def inverse(
        self, values: torch.Tensor, columns: str | Sequence[str] | None = None
    ) -> torch.Tensor:
        """Convert scaled values back to their units.

        Parameters
        ----------
        values : torch.Tensor, shape (..., k)
            Scaled values, on any device, of any floating dtype.
        columns : str or sequence of str, optional
            Names of the k columns. Default: the target columns.

        Returns
        -------
        torch.Tensor, shape (..., k)
            ``values * std + mean``, same dtype and device.

        Raises
        ------
        ValueError
            If a column is unknown, or the last axis does not have one entry per column.
        """
        if columns is None:
            names = self.target_columns
        else:
            names = (columns,) if isinstance(columns, str) else tuple(columns)
        for name in names:
            if name not in self.columns:
                raise ValueError(f"columns must be among {', '.join(self.columns)}, got {name!r}")
        mean, std = self._statistics(values, names)
        return values * std + mean

    def _statistics(
        self, values: torch.Tensor, names: tuple[str, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if values.ndim == 0 or values.shape[-1] != len(names):
            raise ValueError(
                f"values must have a last axis of {len(names)} columns ({', '.join(names)}), "
                f"got shape {list(values.shape)}"
            )
        indices = [self.columns.index(name) for name in names]
        mean = values.new_tensor([self.mean[i] for i in indices])
        return mean, values.new_tensor([self.std[i] for i in indices])

    def to_dict(self) -> dict[str, Any]:
        """Return the transform as a JSON-serializable dict.

        Returns
        -------
        dict
            Strings, lists of strings and of floats, and the version of the format.
        """
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"format": _FORMAT, **fields}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Normalize:
        """Create a transform from the result of `to_dict`.

        Parameters
        ----------
        state : dict
            Result of `to_dict`, also after a JSON round trip.

        Returns
        -------
        Normalize
            An equal transform.

        Raises
        ------
        ValueError
            If the format version is unsupported, a field is missing or unknown, or a value is
            invalid.
        """
        fields = dict(state)
        version = fields.pop("format", None)
        if version != _FORMAT:
            raise ValueError(
                f"format must be {_FORMAT}, got {version!r}: pass a result of Normalize.to_dict "
                "from this release of gpusampler"
            )
        expected = set(cls.__dataclass_fields__)
        if set(fields) != expected:
            raise ValueError(
                f"state must have the fields {', '.join(sorted(expected))}, "
                f"got {', '.join(sorted(fields))}"
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return cls(**values)
