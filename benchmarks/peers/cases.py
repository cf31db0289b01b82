"""Cases of random patch ids: three series (samples, patches, batch size) that share a case."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Numbers of samples and patches, and the batch size."""

    samples: int
    patches: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.samples:,} samples, {self.patches:,} patches, batches of {self.batch_size:,}"

    def ids(self) -> np.ndarray:
        """Return the patch of each sample, the same for every sampler."""
        random = np.random.default_rng([self.samples, self.patches])
        return random.integers(0, self.patches, self.samples)

    def costs_no_less(self, other: Case) -> bool:
        """Whether no sampler can be expected to be faster here than on the other case."""
        return (
            self.samples >= other.samples
            and self.patches >= other.patches
            and self.batch_size <= other.batch_size
        )


MIDDLE = Case(10**6, 100, 64)
"""The case that all series share."""
SERIES: dict[str, tuple[Case, ...]] = {
    # A thousand samples are few for 100 patches.
    "samples": (
        MIDDLE._replace(samples=10**3, patches=10),
        *(MIDDLE._replace(samples=size) for size in (10**4, 10**5, 10**6, 10**7)),
    ),
    "patches": tuple(MIDDLE._replace(patches=n) for n in (10, 100, 1_000, 10_000, 50_000)),
    "batch": tuple(MIDDLE._replace(batch_size=size) for size in (8, 64, 1_024)),
}
QUICK_MIDDLE = Case(4_000, 20, 16)
QUICK: dict[str, tuple[Case, ...]] = {
    "samples": (Case(1_000, 20, 16), QUICK_MIDDLE),
    "patches": (QUICK_MIDDLE, Case(4_000, 100, 16)),
    "batch": (Case(4_000, 20, 8), QUICK_MIDDLE),
}


def in_order(series: dict[str, tuple[Case, ...]]) -> list[Case]:
    """Return the cases once each, those that cost less before those that cost more."""
    return sorted({case for cases in series.values() for case in cases})
