"""The demo's data: training and held-out windows, scaled by statistics of the training steps."""

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
# Enough to measure the loss; the whole validation split of a large folder takes longer than
# training.
PROBE_SAMPLES = 256


@dataclass(frozen=True)
class DemoData:
    """Windows of the first 80 % of the steps (``train``) and of the rest (``held_out``).

    ``probe`` has at most 256 held-out windows, evenly spaced. ``normalize``, with statistics of the
    training steps, is the transform of both.
    """

    train: GWPatchDataset
    held_out: GWPatchDataset
    probe: Subset[dict[str, Any]]
    normalize: Normalize


def load(root: str | os.PathLike[str] | None = None) -> DemoData:
    """Load a patch folder, by default the embedded one.

    Windows have 6 input steps and 1 output step, start at every step, and have all columns as
    targets.

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
