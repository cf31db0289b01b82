"""Keep, drop or pad the last batch of a patch if it is short, as ``partial`` requests."""

from __future__ import annotations

from typing import Literal

import numpy as np

from gpusampler.core.arrays import Int64

Partial = Literal["keep", "drop", "pad"]
PARTIALS = ("keep", "drop", "pad")


def count_batches(counts: Int64, sizes: Int64, partial: str) -> Int64:
    """Return the number of batches of patches with ``counts`` samples: int64, shape (G,)."""
    return counts // sizes if partial == "drop" else -(-counts // sizes)


def returned_sizes(sizes: Int64, lengths: Int64, *, pad: bool) -> Int64:
    """Return the number of samples in returned batches with ``lengths`` valid samples.

    With ``pad`` this is the batch size, because padding repeats samples of the patch.
    """
    return sizes if pad else np.minimum(sizes, lengths)
