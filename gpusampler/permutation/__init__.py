"""The keyed permutation of 0 .. n-1: a reference and faster host implementations."""

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
