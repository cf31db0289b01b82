"""The keyed permutation of 0 .. n-1: the reference, and its fast forms on the host."""

from gpusampler.permutation.reference import (
    PURPOSE_BATCHES,
    PURPOSE_PATCHES,
    PURPOSE_SAMPLES,
    derive_key,
    grid_of,
    permute,
)

__all__ = [
    "PURPOSE_BATCHES",
    "PURPOSE_PATCHES",
    "PURPOSE_SAMPLES",
    "derive_key",
    "grid_of",
    "permute",
]
