"""Plans of every setting, of which all backends must make the same batches: see `make_case`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from gpusampler import CostBudget, PatchBatchSampler, PatchGroups
from gpusampler.core import arrays, devices

SEEDS = (0, 1 << 31, 1 << 63, (1 << 64) - 1)
EPOCHS = (0, 1, 1 << 31, (1 << 32) + 5, (1 << 63) - 2)
DTYPES = ("int64", "int32", "int16")

# Smallest and largest patch, number of patches, and batch size. Both sizes occur, so that a mix is
# one form of a kernel.
MIXES = {
    "few": (2, 5, 40, 2),
    "small": (1, 32, 300, 5),
    "one": (100, 100, 1, 10),
    "slots": (33, 100, 3, 16),
    "medium": (33, 1000, 60, 7),
    "mixed": (1, 2000, 40, 48),
    "large": (1024, 5000, 12, 64),
    "wide": (1024, 70_000, 5, 256),
}

BALANCED = {"steps": "balanced", "step_width": 8}
SAME_PATCH = {"steps": "same_patch", "step_width": 3}
IN_A_ROW = {"interleave": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "in a row": IN_A_ROW,
    "drop": {"partial": "drop"},
    "pad": {"partial": "pad"},
    "even": {"partial": "even"},
    "min_partial": {"min_partial": 2},
    "even, min_partial": {"partial": "even", "min_partial": 2},
    "samples in order": {"shuffle_within_batches": False},
    "batches in order": {"shuffle_patches": False},
    "balanced": BALANCED,
    "balanced, by costs, pad": {**BALANCED, "patch_costs": True, "partial": "pad"},
    "same patch": SAME_PATCH,
    "same patch, drop": {**SAME_PATCH, "uneven": "drop"},
    "same patch, in a row": {**SAME_PATCH, **IN_A_ROW},
    "costliest first": {"costliest_first": True, "step_width": 4, "patch_costs": True},
    "costliest first, balanced": {**BALANCED, "costliest_first": True, "patch_costs": True},
    "weights": {"weights": True},
    "weights, some 0": {"weights": 0},
    "weights, some 0, even": {"weights": 0, "partial": "even"},
    "weights, in a row": {"weights": True, **IN_A_ROW},
    "weights, balanced": {"weights": True, **BALANCED},
    "weights, same patch": {"weights": True, **SAME_PATCH},
    "fewer batches than patches": {"epoch_batches": True},
    "sizes by patch": {"batch_size": "by patch"},
    "sizes by patch, weights": {"batch_size": "by patch", "weights": True},
    "budget": {"batch_size": "budget"},
    "budget, balanced": {"batch_size": "budget", **BALANCED},
    "cost bins": {"batch_size": "cost bins"},
    "cost bins, weights, even": {"batch_size": "cost bins", "weights": True, "partial": "even"},
}


class Case(NamedTuple):
    """A plan's arguments; ids are None where the samples of a patch are contiguous."""

    counts: np.ndarray
    ids: np.ndarray | None
    batch_size: Any
    seed: int
    epoch: int
    settings: dict[str, Any]

    def groups(self, device: str) -> PatchGroups:
        if self.ids is None:
            return PatchGroups.from_counts(self.counts)
        return PatchGroups.from_ids(arrays.to_device(self.ids, devices.parse_device(device)))

    def sampler(self, groups: PatchGroups, device: str) -> PatchBatchSampler:
        sampler = PatchBatchSampler(
            groups, self.batch_size, seed=self.seed, device=device, **self.settings
        )
        sampler.set_epoch(self.epoch)
        return sampler


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings about samples that a plan leaves out or repeats, and about wide rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".* (leaves? out|makes batches|row of a cursor)", category=UserWarning
        )
        yield


def make_case(mix: str, name: str, gathered: bool) -> tuple[Case, np.random.Generator]:
    """Return a case, the same one in every run, and a generator to draw its slots with."""
    rng = np.random.default_rng([list(SETTINGS).index(name), list(MIXES).index(mix), gathered])
    smallest, largest, patches, batch_size = MIXES[mix]
    counts = rng.integers(smallest, largest + 1, patches)
    counts[[0, -1]] = smallest, largest
    settings: dict[str, Any] = dict(SETTINGS[name])
    ids = patch_ids = None
    if gathered:
        dtype = DTYPES[rng.integers(len(DTYPES))]
        bounds = np.iinfo(dtype)
        names = rng.integers(bounds.min, bounds.max, 4 * patches, dtype=np.int64)
        patch_ids = np.sort(rng.permutation(np.unique(names))[:patches])
        ids = rng.permutation(np.repeat(patch_ids, counts)).astype(dtype)
    sizes: Any = settings.pop("batch_size", batch_size)
    if sizes == "by patch":
        keys = range(patches) if patch_ids is None else patch_ids.tolist()
        sizes = dict(zip(keys, rng.integers(1, batch_size + 1, patches).tolist(), strict=True))
    elif sizes == "budget":
        sizes = CostBudget(4.0 * batch_size, cost=rng.uniform(1, 4, patches))
    elif sizes == "cost bins":
        sizes = CostBudget(8.0 * batch_size, sample_costs=rng.choice([1.0, 3, 8], counts.sum()))
    if settings.get("patch_costs"):
        settings["patch_costs"] = rng.choice([0.5, 1, 1.05, 7], patches)
    if "weights" in settings:
        weights = rng.choice([0.1, 1, 30], patches)
        if not settings["weights"]:
            weights[1::2] = 0
        settings |= {"weights": weights, "epoch_batches": 1000}
    elif "epoch_batches" in settings:
        settings["epoch_batches"] = max(1, patches // 3)
    seed, epoch = SEEDS[rng.integers(len(SEEDS))], EPOCHS[rng.integers(len(EPOCHS))]
    return Case(counts, ids, sizes, seed, epoch, settings), rng
