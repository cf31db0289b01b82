"""Orders in index files, verified block by block when they are first used.

A block is 64 KiB of an order. Its checksum is the wrapping 64-bit sum of its little-endian 32-bit
words, with word i of the block multiplied by ``mix(i + 1)``. These factors are distinct and not 0,
so a changed word and two exchanged words always change the sum. Checksums detect damage, but not an
order that was replaced together with its checksums.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.arrays import Int64
from gpusampler.core.progress_bar import ProgressBar
from gpusampler.groups.index_checks import REBUILD
from gpusampler.permutation import _native
from gpusampler.permutation._native import address, contiguous_int64
from gpusampler.permutation.host import look_up, order_address
from gpusampler.permutation.position_ranges import check_positions
from gpusampler.permutation.reference import mix

BLOCK_BYTES = 1 << 16
AHEAD = 8
"""Largest number of blocks that are verified in advance per block that is verified on use."""
_BLOCKS_AT_ONCE = 256
_FACTORS = mix(np.arange(1, BLOCK_BYTES // 4 + 1)).astype(np.uint64)

BlockSums = NDArray[np.uint64]
"""Checksums of the blocks of an order, shape (B,)."""


def num_blocks(order_bytes: int) -> int:
    """Return the number B of blocks of an order."""
    return -(-order_bytes // BLOCK_BYTES)


def block_sums(order: NDArray[Any] | None) -> BlockSums:
    """Return the checksums of an int32 or int64 order; none without an order."""
    if order is None:
        return np.zeros(0, np.uint64)
    sums = np.empty(num_blocks(order.nbytes), np.uint64)
    first_item = _compiled_address(order)
    if first_item:
        _native.module.sums(first_item, order.itemsize, order.size, address(sums))
        return sums
    for block in range(sums.size):
        sums[block] = _sum_of(_block(order, block))
    return sums


def _block(order: NDArray[Any], block: int) -> NDArray[Any]:
    items = BLOCK_BYTES // order.itemsize
    return order[block * items : (block + 1) * items]


def _sum_of(block: NDArray[Any]) -> np.uint64:
    little_endian = np.ascontiguousarray(block, block.dtype.newbyteorder("<"))
    words = little_endian.view("<u4").astype(np.uint64)
    return np.uint64(np.dot(words, _FACTORS[: words.size]))


def _compiled_address(order: NDArray[Any]) -> int:
    """Return the address of an order for the compiled module; 0 if NumPy reads it."""
    # In C, words have the machine's byte order.
    return order_address(order) if sys.byteorder == "little" else 0


class OrderFile(Protocol):
    """An open index file; ``order`` raises OSError if the file has changed since it was opened."""

    path: Path
    unchecked_order: NDArray[Any]

    @property
    def order(self) -> NDArray[Any]:
        """The order, read-only, shape (N,)."""


class BlockVerifier:
    """Compares the blocks of an order with their checksums, each block once.

    It also checks that samples are in 0 .. source_size - 1. ``path`` is the file in error messages.
    Threads may share a verifier: two of them may verify the same block, with the same result.
    """

    def __init__(self, path: Path, sums: BlockSums, source_size: int) -> None:
        self._path = path
        self._sums = sums
        self._last_sample = source_size - 1
        self._is_verified = np.zeros(sums.size, np.uint8)
        self._addresses = address(sums), address(self._is_verified)
        self.is_complete = False
        """Whether all blocks are verified."""

    def verify(self, order: NDArray[Any], positions: Int64) -> None:
        """Verify the blocks that contain ``positions``, int64 of shape (T,).

        Raises
        ------
        ValueError
            If a block is damaged, or a position is not in the order.
        """
        if self.is_complete:
            return
        num_new = self._verify(order, positions)
        if num_new == 0:
            return
        # Looking for blocks in positions takes as long as verifying them, so a few uses are enough
        # to verify all, in the order of the file. No use verifies more blocks in advance than were
        # verified before it, so that the first batch does not wait for them.
        left = self._unverified(order)
        num_ahead = min(AHEAD * num_new, self._sums.size - left.size - num_new)
        if num_ahead:
            self._verify(order, left[:num_ahead])
        if left.size <= num_ahead:
            self.is_complete = True

    def _unverified(self, order: NDArray[Any]) -> Int64:
        """Return the first positions of the blocks that are not verified."""
        return np.flatnonzero(self._is_verified == 0) * (BLOCK_BYTES // order.itemsize)

    def _verify(self, order: NDArray[Any], positions: Int64) -> int:
        """Verify the blocks of ``positions``, and return how many were not verified before."""
        first_item = _compiled_address(order)
        if first_item:
            if not positions.flags.c_contiguous:
                positions = contiguous_int64(positions)
            num_new, wrong = _native.module.verify(
                first_item,
                order.itemsize,
                order.size,
                self._last_sample,
                *self._addresses,
                address(positions),
                positions.size,
            )
            if wrong:
                self._raise_damaged(order, wrong - 1)
            return int(num_new)
        return self._verify_in_numpy(order, positions)

    def verify_all(self, order: NDArray[Any], *, progress: bool = False) -> None:
        """Verify all blocks that are not verified yet."""
        first_positions = self._unverified(order)
        with ProgressBar(first_positions.size, "verifying the index", "blocks", progress) as bar:
            for start in range(0, first_positions.size, _BLOCKS_AT_ONCE):
                chunk = first_positions[start : start + _BLOCKS_AT_ONCE]
                self._verify(order, chunk)
                bar.update(chunk.size)
        self.is_complete = True

    def _verify_in_numpy(self, order: NDArray[Any], positions: Int64) -> int:
        """Do what `verify` does, and return the number of blocks that were verified."""
        check_positions(positions, order.size)
        blocks = positions // (BLOCK_BYTES // order.itemsize)
        new_blocks = np.unique(blocks[self._is_verified[blocks] == 0])
        for block in new_blocks.tolist():
            samples = _block(order, block)
            if _sum_of(samples) != self._sums[block] or not self._are_samples(samples):
                self._raise_damaged(order, block)
            self._is_verified[block] = 1
        return new_blocks.size

    def _are_samples(self, samples: NDArray[Any]) -> bool:
        return int(samples.min()) >= 0 and int(samples.max()) <= self._last_sample

    def _raise_damaged(self, order: NDArray[Any], block: int) -> None:
        samples = _block(order, block)
        reason = f"wrong checksum of block {block} of {self._sums.size} of the order"
        if _sum_of(samples) == self._sums[block]:
            reason = f"samples of the order must be in 0 .. {self._last_sample}"
        raise ValueError(f"{self._path} is damaged: {reason}. {REBUILD}")


class VerifiedOrder:
    """The order of an index file, which verifies the blocks that it reads.

    Each use also checks that the file has not changed. All errors name the file: OSError if it has
    changed, ValueError if a block is damaged.
    """

    def __init__(self, file: OrderFile, sums: BlockSums, source_size: int) -> None:
        self._file = file
        self._sums, self._source_size = sums, source_size
        self._verifier = BlockVerifier(file.path, sums, source_size)

    @property
    def is_verified(self) -> bool:
        """Whether all blocks are verified."""
        return self._verifier.is_complete

    @property
    def unchecked_order(self) -> NDArray[Any]:
        """The order without any check; use it only for dtype and size."""
        return self._file.unchecked_order

    def whole(self) -> NDArray[Any]:
        """Return the order, after all its blocks are verified."""
        order = self._file.order
        if not self.is_verified:
            self._verifier.verify_all(order)
        return order

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the samples at positions ``start .. stop - 1``; their blocks are verified."""
        order = self._file.order
        first = start * order.itemsize // BLOCK_BYTES
        blocks = np.arange(first, num_blocks(stop * order.itemsize))
        self._verifier.verify(order, blocks * (BLOCK_BYTES // order.itemsize))
        return order[start:stop]

    def look_up(self, positions: Int64) -> None:
        """Replace positions by the samples at them, after their blocks are verified."""
        order = self._file.order
        self._verifier.verify(order, positions)
        look_up(order, positions)

    def __reduce__(self) -> Any:
        """Pickle the file's path and the checksums: the receiving process verifies for itself."""
        return VerifiedOrder, (self._file, self._sums, self._source_size)

    def __deepcopy__(self, memo: Any) -> VerifiedOrder:
        """Return self: the object is immutable, and its file may be unlinked."""
        return self
