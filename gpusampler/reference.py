"""A plan's arithmetic in plain array operations, on any device of any array library.

The form that the host's fast one and every kernel must equal, integer for integer. No value is
inspected on the host, and no shape depends on one.
"""

from __future__ import annotations

from typing import Any

from gpusampler import arrays
from gpusampler.arrays import Device, Int64
from gpusampler.permutation import (
    PURPOSE_BATCHES,
    PURPOSE_SAMPLES,
    Grid,
    derive_key,
    grid_of,
    permute,
)
from gpusampler.tables import PatchTables


class Reference:
    """Batches of a plan, evaluated on a device.

    Parameters
    ----------
    tables : PatchTables
        The plan's, on the host.
    device : Device
    order : integer array, shape (N,), or None
        Samples sorted by patch, anywhere; uploaded if it is elsewhere.
    shuffle_within_batches, shuffle_patches : bool
    """

    def __init__(
        self,
        tables: PatchTables,
        device: Device,
        order: Any,
        *,
        shuffle_within_batches: bool,
        shuffle_patches: bool,
    ) -> None:
        self._device = device
        self._xp = arrays.namespace(device)
        with arrays.on(device):
            self._tables = tables.on(device, order)
        self._patch_order: tuple[Any, Any] | None = None
        self._shuffle_within_batches = shuffle_within_batches
        self._shuffle_patches = shuffle_patches

    def block(
        self, seed: int, epoch: int, slots: Any, patch_order: tuple[Int64, Int64] | None
    ) -> tuple[Any, Any, Any]:
        """Return indices (K, B), lengths (K,) and groups (K,) of the batches at ``slots``.

        ``patch_order`` is None where batches are interleaved; else the patches in this epoch's
        order, and the slots before each.
        """
        tables = self._tables
        with arrays.on(self._device):
            group, j = self._locate(seed, epoch, slots, patch_order)
            size = tables.sizes[group]
            length = self._xp.minimum(size, tables.counts[group] - j * size)
            column = self._numbers(tables.max_batch_size)
            position = (j * size)[:, None] + column[None, :]
            return self._samples(seed, epoch, group[:, None], position), length, group

    def ragged(self, seed: int, epoch: int, group: Int64, j: Int64, sizes: Int64) -> Any:
        """Return the samples of batches end to end, ``sizes`` of each; the arguments are NumPy."""
        total = int(sizes.sum())
        group, j, sizes = (arrays.to_device(part, self._device) for part in (group, j, sizes))
        with arrays.on(self._device):
            row = arrays.repeat_rows(sizes, total)
            before = self._xp.cumulative_sum(sizes) - sizes
            position = (j * self._tables.sizes[group] - before)[row] + self._numbers(total)
            return self._samples(seed, epoch, group[row], position)

    def _numbers(self, count: int) -> Any:
        handle = arrays.device_handle(self._device)
        return self._xp.arange(count, dtype=self._xp.int64, device=handle)

    def _locate(
        self, seed: int, epoch: int, slots: Any, patch_order: tuple[Int64, Int64] | None
    ) -> tuple[Any, Any]:
        """Return the patch, and which batch of it, that each slot leads to."""
        xp, tables = self._xp, self._tables
        if patch_order is not None:
            patches, before = self._uploaded(patch_order)
            place = xp.searchsorted(before, slots, side="right") - 1
            return patches[place], slots - before[place]
        size = tables.num_batches
        if self._shuffle_patches and size > 1:
            full = xp.full_like
            key = derive_key(seed, PURPOSE_BATCHES, epoch, 0)
            lane_key = (full(slots, key[0]), full(slots, key[1]))
            grid = Grid(*(full(slots, side) for side in grid_of(size)))
            slots = permute(xp, slots, full(slots, size), lane_key, grid, size, size)
        group = xp.searchsorted(tables.batch_offsets, slots, side="right") - 1
        return group, slots - tables.batch_offsets[group]

    def _uploaded(self, patch_order: tuple[Int64, Int64]) -> list[Any]:
        """Return an epoch's order of the patches on the device; the last one is kept."""
        if self._patch_order is None or self._patch_order[0] is not patch_order:
            there = [arrays.to_device(part, self._device) for part in patch_order]
            self._patch_order = patch_order, there
        uploaded: list[Any] = self._patch_order[1]
        return uploaded

    def _samples(self, seed: int, epoch: int, group: Any, position: Any) -> Any:
        """Return the samples at positions (any, from 0 on) of groups; the two broadcast."""
        tables = self._tables
        n = tables.counts[group]
        position = position % n
        if self._shuffle_within_batches:
            key = derive_key(seed, PURPOSE_SAMPLES, epoch, group)
            grid = Grid(*(side[group] for side in tables.grid))
            position = permute(self._xp, position, n, key, grid, tables.smallest, tables.largest)
        index = tables.starts[group] + position
        if tables.order is None:
            return index
        return self._xp.astype(tables.order[index], self._xp.int64)
