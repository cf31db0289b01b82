"""What ``partial`` makes of a patch's last batch, when it is short: keep it, drop it or pad it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from gpusampler.core.arrays import Int64

Partial = Literal["keep", "drop", "pad"]
PARTIALS = ("keep", "drop", "pad")


def count_batches(counts: Int64, sizes: Int64, partial: str) -> Int64:
    """Return how many batches patches of ``counts`` samples have: int64, shape (G,)."""
    return counts // sizes if partial == "drop" else -(-counts // sizes)


def returned_sizes(sizes: Int64, lengths: Int64, partial: str) -> Int64:
    """Return how many samples batches are returned with, of which ``lengths`` count.

    Under "pad" that is the batch size: positions beyond a patch's samples repeat some of them.
    """
    return sizes if partial == "pad" else np.minimum(sizes, lengths)
