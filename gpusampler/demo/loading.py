"""The demo's data: scaled windows, the forcing of their steps, and the spread of changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpusampler.demo.embedded import small_data
from gpusampler.demo.stopwatch import Stopwatch, TimedIterable
from gpusampler.groundwater import GWPatchDataset, Normalize, collate_fn
from gpusampler.sampler.batch_sampler import PatchBatchSampler

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader, Dataset, Subset

INPUTS, OUTPUTS, STRIDE = 6, 1, 1
# Enough to measure the loss; the whole validation split of a large folder takes longer than
# training.
PROBE_SAMPLES = 256
FORCING = "forcing.csv"


@dataclass(frozen=True)
class DemoData:
    """Windows of the first 80 % of the steps (``train``) and of the rest (``held_out``).

    ``probe`` has at most 256 held-out windows, evenly spaced. ``normalize`` has the statistics of
    the training steps. ``change_std`` [Ct] is the root mean square, over the training windows, of
    the change of each scaled target since the last input step. ``num_forcing`` is the number F of
    forcing series; 0 without a file of them.
    """

    train: GWPatchDataset
    held_out: GWPatchDataset
    probe: Subset[dict[str, Any]]
    normalize: Normalize
    change_std: torch.Tensor
    num_forcing: int


class ForcedDataset(GWPatchDataset):
    """Windows of a patch folder, with the location of the points and the forcing of the steps.

    A sample has two more tensors: ``location`` [Nc + Ng, 3], the core and ghost points with the box
    of the domain scaled to [-1, 1], and ``forcing`` [1 + Tout, F], the rows of the last input step
    and of the output steps.
    """

    forcing: torch.Tensor  # [T, F], scaled

    def set_scaling(self, normalize: Normalize, forcing: torch.Tensor) -> None:
        """Scale values by ``normalize``, locate the points, and add the rows of ``forcing``."""
        import torch

        domain = replace(normalize, coords="domain")

        def transform(sample: dict[str, Any]) -> dict[str, Any]:
            points = torch.cat(domain.scale_points(sample["core_coords"], sample["ghost_coords"]))
            return {**normalize(sample), "location": 2 * points - 1}

        self.transform = transform
        self.forcing = forcing

    def __getitems__(self, indices: Any) -> list[dict[str, Any]]:
        """Return several samples, as `GWPatchDataset` does, each with its forcing."""
        samples = super().__getitems__(indices)
        windows = self.windows
        starts = windows.starts()
        for index, sample in zip(indices, samples, strict=True):
            start = int(starts[int(index) % windows.count])
            sample["forcing"] = self.forcing[start + windows.inputs - 1 : start + windows.length]
        return samples


def load(root: str | os.PathLike[str] | None = None) -> DemoData:
    """Load a patch folder, by default the embedded one.

    Windows have 6 input steps and 1 output step, start at every step, and have all columns as
    targets. ``forcing.csv`` in the folder, if there is one, has a line of names and a row of
    numbers per time step: what drives the change during the step, e.g. recharge and the rates of
    wells. Raises ValueError if it has another number of rows or a number is not finite.

    Examples
    --------
    >>> data = load()
    >>> len(data.train), len(data.probe)
    (378, 54)
    """
    from torch.utils.data import Subset

    folder = small_data() if root is None else root
    train = ForcedDataset(folder, INPUTS, OUTPUTS, stride=STRIDE)
    held_out = ForcedDataset(folder, INPUTS, OUTPUTS, stride=STRIDE, split="val")
    normalize = Normalize.from_dataset(train)
    forcing = _read_forcing(train.root / FORCING, train.windows.steps, train.windows.cut)
    for dataset in (train, held_out):
        dataset.set_scaling(normalize, forcing)
    chosen = np.linspace(0, len(held_out) - 1, min(PROBE_SAMPLES, len(held_out)))
    probe = Subset(as_torch(held_out), chosen.astype(int).tolist())
    return DemoData(
        train, held_out, probe, normalize, _change_std(train, normalize), forcing.shape[1]
    )


def persistence(batch: Mapping[str, Any], normalize: Normalize) -> torch.Tensor:
    """Return the forecast that nothing changes from the last input step: [B, 1, Nc, Ct]."""
    targets = [normalize.columns.index(name) for name in normalize.target_columns]
    last: torch.Tensor = batch["core_in"][:, -1:, :, targets]
    return last


def _read_forcing(path: Path, steps: int, cut: int) -> torch.Tensor:
    """Read the forcing, scaled by mean and standard deviation of the first ``cut`` steps."""
    import torch

    if not path.exists():
        return torch.empty(steps, 0)
    table = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    if len(table) != steps:
        raise ValueError(f"{path} must have one row per time step, {steps}, got {len(table)}")
    if not np.isfinite(table).all():
        raise ValueError(f"{path} must hold finite numbers, got NaN or infinity")
    std = table[:cut].std(0)
    scaled = (table - table[:cut].mean(0)) / np.where(std > 0, std, 1.0)
    return torch.from_numpy(scaled.astype(np.float32))


def _change_std(train: GWPatchDataset, normalize: Normalize) -> torch.Tensor:
    import torch

    sampler = PatchBatchSampler(
        train, 32, shuffle_within_batches=False, shuffle_patches=False, seed=0
    )
    total = torch.zeros(len(normalize.target_columns), dtype=torch.float64)
    count = 0
    for batch in loader(as_torch(train), sampler):
        change = (batch["core_out"] - persistence(batch, normalize)).double()
        total += change.square().sum((0, 1, 2))
        count += change[..., 0].numel()
    std = (total / count).sqrt().float()
    return torch.where(std > 0, std, 1.0)


def as_torch(dataset: GWPatchDataset) -> Dataset[dict[str, Any]]:
    """Cast a patch dataset to the type whose interface it has; for type checkers only."""
    from typing import cast

    return cast("Dataset[dict[str, Any]]", dataset)


def loader(
    dataset: Dataset[dict[str, Any]], batches: Any, watch: Stopwatch | None = None
) -> DataLoader[dict[str, Any]]:
    """Return a DataLoader over batches of one patch each, timed if ``watch`` is given."""
    import torch
    from torch.utils.data import DataLoader

    # A DataLoader draws a seed per epoch, even without workers. This generator keeps it from
    # changing the global one.
    generator = torch.Generator()
    if watch is None:
        return DataLoader(
            dataset, batch_sampler=batches, collate_fn=collate_fn, generator=generator
        )
    clock = watch

    def timed_collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        with clock.phase("collate"):
            return collate_fn(samples)

    timed: Any = TimedIterable(batches, clock, "sampler")
    return DataLoader(dataset, batch_sampler=timed, collate_fn=timed_collate, generator=generator)


def probe_loader(data: DemoData, batch_size: int) -> DataLoader[dict[str, Any]]:
    """Return a loader of the probe windows, in the same batches every time."""
    sampler = PatchBatchSampler(
        data.probe, batch_size, shuffle_within_batches=False, shuffle_patches=False, seed=0
    )
    return loader(data.probe, sampler)
