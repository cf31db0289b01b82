"""A 64-bit fingerprint of the patch id of every sample.

The fingerprint is the wrapping sum over all samples i of ``(2 * m(id_i) + 1) * w(i)``. m mixes all
64 bits of a patch id; the weight w(i) is the product of eight odd pseudo-random numbers, one for
each byte of i. The sum does not depend on order, device or chunk size. The sum of w over a range of
samples has a closed form, so the fingerprint of 1e12 samples given by counts needs no loop over
samples. It equals the fingerprint of an array of the same ids.

The fingerprint detects accidental differences; it is not a cryptographic hash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.arrays import Int64, to_numpy
from gpusampler.permutation.reference import MASK, derive_key

LEVELS = 8
_HALF_BITS = np.uint64(32)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
BLOCK = 1 << 16
WRAP = (1 << 64) - 1
_PURPOSE = 0x46505250


def _odd_factors() -> NDArray[np.uint64]:
    """Return odd factors, shape (8, 256): one for each byte of an index and value of this byte."""
    level, digit = np.divmod(np.arange(LEVELS * 256, dtype=np.int64), 256)
    low, high = derive_key(0, _PURPOSE, level, digit)
    factors = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64) | np.uint64(1)
    return np.asarray(factors.reshape(LEVELS, 256))


FACTORS = _odd_factors()
_SUM_BEFORE = np.cumsum(FACTORS, axis=1, dtype=np.uint64) - FACTORS
_LEVEL_SUMS = FACTORS.sum(axis=1, dtype=np.uint64)
_BLOCK_WEIGHTS = np.multiply.outer(FACTORS[1], FACTORS[0]).ravel()


def mix_ids(ids: Int64) -> NDArray[np.uint64]:
    """Return m(id), a bijection of 64-bit integers that mixes high bits into low ones.

    Without m, the sum modulo 2**64 would miss differences in the highest bits of ids.
    """
    mixed = ids.view(np.uint64)
    mixed = (mixed ^ (mixed >> _HALF_BITS)) * _ODD
    mixed ^= mixed >> _HALF_BITS
    return mixed


def weights_before(index: Int64) -> NDArray[np.uint64]:
    """Return the wrapping sum of w(i) over ``0 <= i < index`` for each index, in closed form."""
    high_product = np.ones(index.shape, np.uint64)
    low_totals = np.multiply.accumulate(np.concatenate([np.ones(1, np.uint64), _LEVEL_SUMS[:-1]]))
    total = np.zeros(index.shape, np.uint64)
    for level in range(LEVELS - 1, -1, -1):
        digit = (index >> (8 * level)) & 0xFF
        total += high_product * _SUM_BEFORE[level][digit] * low_totals[level]
        high_product *= FACTORS[level][digit]
    return total


def weights_of(index: NDArray[Any]) -> NDArray[np.uint64]:
    """Return w(i) for arbitrary indices, in the same shape."""
    index = index.astype(np.int64, copy=False)
    weights: NDArray[np.uint64] = _BLOCK_WEIGHTS[index & (BLOCK - 1)]
    for level in range(2, LEVELS):
        digit = (index >> (8 * level)) & 0xFF
        weights *= FACTORS[level][digit] if digit.any() else FACTORS[level][0]
    return weights


class IdSum:
    """Accumulates the fingerprint of ids block by block, in any order of blocks."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, first: int, ids: Int64) -> None:
        """Add the ids of consecutive samples that start at ``first``."""
        start = 0
        while start < ids.size:
            offset = (first + start) & (BLOCK - 1)
            mixed = mix_ids(ids[start : start + BLOCK - offset])
            scale = 1
            for level in range(2, LEVELS):
                scale *= int(FACTORS[level][((first + start) >> (8 * level)) & 0xFF])
            self.total += scale * int(np.dot(mixed, _BLOCK_WEIGHTS[offset : offset + mixed.size]))
            start += mixed.size
        self.total &= WRAP

    def value(self, size: int) -> int:
        """Return the fingerprint after the ids of samples 0 .. size - 1 have been added."""
        return (2 * self.total + total_weight(size)) & WRAP


@lru_cache(maxsize=64)
def total_weight(size: int) -> int:
    """Return the wrapping sum of w(i) over ``0 <= i < size``."""
    return int(weights_before(np.array([size], np.int64))[0])


def of_device_ids(xp: Any, ids: Any, device: Any) -> int:
    """Return the fingerprint of an integer array, shape (N,), computed on its device."""
    size = int(ids.shape[0])
    weights = xp.asarray(_BLOCK_WEIGHTS.view(np.int64), device=device)
    # Limits the temporary arrays to 32 MiB each.
    chunk_size = 64 * BLOCK
    inverse_weight = np.uint64(pow(int(_BLOCK_WEIGHTS[0]), -1, 1 << 64))
    total = 0
    for first in range(0, size, chunk_size):
        chunk = xp.astype(ids[first : first + chunk_size], xp.int64, copy=False)
        mixed = _mix_device_ids(chunk)
        num_rows, tail_size = divmod(int(mixed.shape[0]), BLOCK)
        tail = num_rows * BLOCK
        blocks = xp.reshape(mixed[:tail], (num_rows, BLOCK))
        for offset, rows in ((0, blocks), (tail, xp.reshape(mixed[tail:], (1, tail_size)))):
            sums = to_numpy(xp.sum(rows * weights[: rows.shape[1]], axis=1)).view(np.uint64)
            first_samples = first + offset + np.arange(sums.size, dtype=np.int64) * BLOCK
            scales = weights_of(first_samples) * inverse_weight
            total += int((sums * scales).sum(dtype=np.uint64))
    return (2 * total + total_weight(size)) & WRAP


def _mix_device_ids(ids: Any) -> Any:
    """`mix_ids` in int64 arithmetic, with masks because int64 shifts keep the sign."""
    mixed = (ids ^ ((ids >> 32) & MASK)) * int(_ODD.astype(np.int64))
    return mixed ^ ((mixed >> 32) & MASK)


def of_runs(patch_ids: Int64, starts: Int64, counts: Int64) -> int:
    """Return the fingerprint of patches that are single runs, in closed form."""
    weights = weights_before(starts + counts) - weights_before(starts)
    factors = mix_ids(patch_ids) * np.uint64(2) + np.uint64(1)
    return int((factors * weights).sum(dtype=np.uint64))


def of_order(patch_ids: Int64, counts: Int64, order: NDArray[Any]) -> int:
    """Return the fingerprint of samples sorted by patch."""
    blocks = blocks_of_order(counts, order)
    return sum(of_samples(patch_ids, group, samples) for group, samples in blocks) & WRAP


def blocks_of_order(counts: Int64, order: NDArray[Any]) -> Iterator[tuple[Int64, NDArray[Any]]]:
    """Yield blocks of the samples sorted by patch, as (group of each sample, samples)."""
    ends = np.cumsum(counts)
    for first in range(0, order.shape[0], BLOCK):
        samples = order[first : first + BLOCK]
        yield np.searchsorted(ends, np.arange(first, first + samples.size), side="right"), samples


def of_samples(patch_ids: Int64, group: Int64, samples: NDArray[Any]) -> int:
    """Return the contribution of samples and their groups, in any order, to the fingerprint."""
    sample_sum = SampleSum(patch_ids)
    sample_sum.add(group, samples)
    return sample_sum.value


class SampleSum:
    """Accumulates the fingerprint of samples with their groups, in any order.

    ``weight`` is the wrapping sum of w(i) over the samples. All N samples of a dataset, each once,
    have the weight ``total_weight(N)``.
    """

    def __init__(self, patch_ids: Int64) -> None:
        self._patch_ids = patch_ids
        self.value = 0
        self.weight = 0

    def add(self, group: Int64, samples: NDArray[Any]) -> None:
        """Add samples, shape (K,) with K >= 1, and the group of each."""
        first, last = int(group.min()), int(group.max()) + 1
        factors = mix_ids(self._patch_ids[first:last]) * np.uint64(2) + np.uint64(1)
        weights = weights_of(samples)
        products = factors[group - first] * weights
        self.value = (self.value + int(products.sum(dtype=np.uint64))) & WRAP
        self.weight = (self.weight + int(weights.sum(dtype=np.uint64))) & WRAP


def of_numbers(numbers: Int64) -> int:
    """Return a 64-bit hash of a sequence of integers."""
    id_sum = IdSum()
    id_sum.add(0, np.ascontiguousarray(numbers, np.int64))
    return id_sum.value(int(numbers.size))


def _name_text(name: Any) -> str:
    """Return a string for a name, the same in every process and with every release of NumPy."""
    if isinstance(name, tuple):
        return f"({', '.join(map(_part_text, name))})"
    return str.__str__(name) if isinstance(name, str) else str(name)


def _part_text(part: Any) -> str:
    part = part.value if isinstance(part, Enum) else part
    part = part.item() if isinstance(part, np.generic) else part
    return _name_text(part) if isinstance(part, tuple) else repr(part)


def of_names(names: Sequence[Any]) -> int:
    """Return a 64-bit hash of a sequence of names: strings or other keys."""
    # Lazy import: takes milliseconds, and few programs need it.
    import hashlib

    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        data = _name_text(name).encode("utf-8", "surrogatepass")
        # The length keeps ("ab", "c") different from ("a", "bc").
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def combine(*numbers: int) -> int:
    """Return a 64-bit hash of the integers that depends on their order."""
    state = 0
    for number in numbers:
        low, high = derive_key(state, _PURPOSE, number & ((1 << 63) - 1), (number >> 63) & MASK)
        state = (high << 32) | low
    return state
