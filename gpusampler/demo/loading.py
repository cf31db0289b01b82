"""The demo's data: both parts of a patch folder, scaled by the statistics of the first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpusampler.demo.embedded import small_data
from gpusampler.demo.stopwatch import Stopwatch, TimedIterable
from gpusampler.groundwater import GWPatchDataset, Normalize, collate_fn
from gpusampler.sampler.batch_sampler import PatchBatchSampler

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset, Subset

INPUTS, OUTPUTS, STRIDE = 6, 1, 1
# Enough to tell a loss by; a large folder's whole validation part would outlast its training.
PROBE_SAMPLES = 256


@dataclass(frozen=True)
class DemoData:
    """What the demo trains and probes on.

    Attributes
    ----------
    train : GWPatchDataset
        Windows of the first 80 % of the steps.
    held_out : GWPatchDataset
        Windows of the rest.
    probe : torch.utils.data.Subset
        At most 256 of the held-out windows, evenly spread.
    normalize : Normalize
        The transform of both, from the training steps.
    """

    train: GWPatchDataset
    held_out: GWPatchDataset
    probe: Subset[dict[str, Any]]
    normalize: Normalize


def load(root: str | os.PathLike[str] | None = None) -> DemoData:
    """Load a patch folder for the demo.

    Parameters
    ----------
    root : str or os.PathLike, optional
        A patch folder. Default: the MODFLOW 6 output that comes with the package.

    Returns
    -------
    DemoData
        6 steps in, 1 out, a window at every step, all columns as targets.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder is broken or its series are too short; see `GWPatchDataset`.

    Examples
    --------
    >>> data = load()
    >>> len(data.train), len(data.probe)
    (378, 54)
    """
    from torch.utils.data import Subset

    folder = small_data() if root is None else root
    train = GWPatchDataset(folder, INPUTS, OUTPUTS, stride=STRIDE)
    held_out = GWPatchDataset(folder, INPUTS, OUTPUTS, stride=STRIDE, split="val")
    normalize = Normalize.from_dataset(train)
    train.transform = held_out.transform = normalize
    chosen = np.linspace(0, len(held_out) - 1, min(PROBE_SAMPLES, len(held_out)))
    probe = Subset(as_torch(held_out), chosen.astype(int).tolist())
    return DemoData(train, held_out, probe, normalize)


def as_torch(dataset: GWPatchDataset) -> Dataset[dict[str, Any]]:
    """Name a patch dataset by torch's type, which it has the interface of."""
    from typing import cast

    return cast("Dataset[dict[str, Any]]", dataset)


def loader(
    dataset: Dataset[dict[str, Any]], batches: Any, watch: Stopwatch | None = None
) -> DataLoader[dict[str, Any]]:
    """Return a DataLoader over batches of one patch each, timed if asked."""
    import torch
    from torch.utils.data import DataLoader

    # A DataLoader draws a seed for its workers each epoch, even without any: not from the
    # global generator.
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
    """Return the probe's batches, the same every time."""
    sampler = PatchBatchSampler(
        data.probe, batch_size, shuffle_within_batches=False, shuffle_patches=False, seed=0
    )
    return loader(data.probe, sampler)
