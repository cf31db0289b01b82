"""Hash table from sparse 64-bit ids to group numbers, several times faster than a binary search.

Multiplication by an odd number is a bijection of the 64-bit integers; the top bits of the product
are the bucket of an id. Buckets hold only a few ids, so a lookup needs few vector operations, on
data that fits in cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.permutation.reference import derive_key

CHUNK = 1 << 15
_PURPOSE = 0x49445442
_MAX_ATTEMPTS = 4


class IdTable:
    """Maps distinct, ascending int64 ids, shape (G,) with G >= 1, to their indices 0 .. G-1."""

    def __init__(self, ids: Int64) -> None:
        bits = min(max(8, int(ids.size - 1).bit_length() + 2), 40)
        self.size = ids.size
        self._shift = np.uint64(64 - bits)
        best: tuple[int, np.uint64, Int64] | None = None
        for attempt in range(_MAX_ATTEMPTS if ids.size <= CHUNK else 1):
            low, high = derive_key(0, _PURPOSE, attempt, 0)
            factor = np.uint64((high << 32) | low | 1)
            buckets = ((ids.view(np.uint64) * factor) >> self._shift).astype(np.int64)
            bucket_sizes = np.bincount(buckets, minlength=1 << bits)
            if best is None or int(bucket_sizes.max()) < best[0]:
                best = int(bucket_sizes.max()), factor, bucket_sizes
        assert best is not None
        self._max_bucket_size, self._factor, bucket_sizes = best
        hashed = ids.view(np.uint64) * self._factor
        hash_order = np.argsort(hashed)
        # Sentinels keep probes past the last bucket inside the table.
        num_sentinels = self._max_bucket_size
        self._hashed = np.concatenate([hashed[hash_order], np.full(num_sentinels, ~np.uint64(0))])
        self._groups = np.concatenate([hash_order, np.full(num_sentinels, -1)]).astype(np.int32)
        self._bucket_starts = (np.cumsum(bucket_sizes) - bucket_sizes).astype(np.int32)

    def lookup(self, ids: NDArray[Any]) -> NDArray[np.int32]:
        """Return the group number of each id, -1 for unknown ids: int32, shape (N,)."""
        hashed = ids.astype(np.int64, copy=False).view(np.uint64) * self._factor
        slots = self._bucket_starts[hashed >> self._shift]
        for _ in range(self._max_bucket_size - 1):
            slots += self._hashed[slots] < hashed
        return np.where(self._hashed[slots] == hashed, self._groups[slots], np.int32(-1))

    def lookup_all(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Return the group numbers of known ids in the narrowest dtype."""
        groups = np.empty(ids.size, arrays.narrowest_dtype("numpy", self.size)[0])
        for first in range(0, ids.size, CHUNK):
            groups[first : first + CHUNK] = self.lookup(ids[first : first + CHUNK])
        return groups
