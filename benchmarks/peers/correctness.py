"""What an epoch's batches hold, against what they should."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np


class Epoch:
    """The batches of an epoch, end to end."""

    def __init__(self, batches: Iterable[Any]) -> None:
        held = [batch for batch in batches]  # noqa: C416 - list() asks for a length first
        self.batches = len(held)
        held = [batch for batch in held if len(batch)]
        self.empty = self.batches - len(held)
        self.sizes = np.fromiter(map(len, held), np.int64, len(held))
        self.samples = np.fromiter(chain.from_iterable(held), np.int64, int(self.sizes.sum()))
        self.begins = np.cumsum(self.sizes) - self.sizes

    def signatures(self, of_sample: np.ndarray) -> np.ndarray:
        """Return a number for the members of each batch, whatever their order."""
        return np.add.reduceat(of_sample[self.samples], self.begins)


def counted(epoch: Epoch, patch_of: np.ndarray) -> dict[str, int]:
    """Count samples missed and repeated, and batches of more than one patch."""
    seen = np.bincount(epoch.samples, minlength=patch_of.size)
    if seen.size > patch_of.size:
        raise ValueError(f"samples must be below {patch_of.size}, got {int(epoch.samples.max())}")
    patches = patch_of[epoch.samples]
    first = np.repeat(patches[epoch.begins], epoch.sizes)
    mixed = np.logical_or.reduceat(patches != first, epoch.begins)
    return {
        "batches": epoch.batches,
        "empty": epoch.empty,
        "largest": int(epoch.sizes.max()),
        "missed": int((seen == 0).sum()),
        "repeated": int(np.maximum(seen - 1, 0).sum()),
        "mixed": int(mixed.sum()),
    }


def compared(first: Epoch, second: Epoch, patch_of: np.ndarray) -> dict[str, Any]:
    """Say how much of the second epoch the first one had already."""
    random = np.random.default_rng(0)
    of_sample = random.integers(0, 2**63, patch_of.size, np.int64).astype(np.uint64)
    before, after = first.signatures(of_sample), second.signatures(of_sample)
    # A batch of one sample, or of a whole patch, has the same members in every epoch.
    whole = np.bincount(patch_of)[patch_of[second.samples[second.begins]]]
    free = (second.sizes > 1) & (second.sizes < whole)
    return {
        "second_batches": second.batches,
        "same_members": float(np.isin(after[free], before).mean()) if free.any() else None,
        "same_epoch": bool(
            np.array_equal(first.samples, second.samples)
            and np.array_equal(first.sizes, second.sizes)
        ),
    }
