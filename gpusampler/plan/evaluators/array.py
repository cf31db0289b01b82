"""A plan's arithmetic in plain array operations, on any device of any array library.

The form that the host's fast one and every kernel must equal, integer for integer. No value is
inspected on the host, and no shape depends on one: torch.compile traces it, and a CUDA graph
captures it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpusampler.batching.mixture import pass_and_batch
from gpusampler.batching.steps import last_at_most
from gpusampler.batching.tables import PatchOrder, PatchTables
from gpusampler.core import arrays, devices, torch_compile
from gpusampler.core.devices import Device
from gpusampler.permutation.reference import Grid, Streams, grid_of, key_of, permute
from gpusampler.plan.evaluators.base import BatchLocations, Shuffles


class Reference:
    """Batches of a plan, evaluated on a device.

    Parameters
    ----------
    tables : PatchTables
        The plan's, on the device.
    device : Device
    shuffles : Shuffles
    """

    def __init__(self, tables: PatchTables, device: Device, shuffles: Shuffles) -> None:
        self._device = device
        self._xp = arrays.reference_namespace(device)
        self._tables = tables
        self._shuffles = shuffles
        self._numbers_kept: dict[int, Any] = {}

    def block(
        self,
        streams: Streams,
        epoch: int,
        slots: Any,
        patch_order: PatchOrder | None,
        dtype: str = "int64",
    ) -> tuple[Any, Any, Any]:
        """Return indices (K, B), lengths (K,) and groups (K,) of the batches at ``slots``.

        ``patch_order``, on the device, is None where batches are interleaved.
        """
        with devices.on(self._device):
            column = self._numbers(self._tables.max_batch_size)
            block, length, group = self._block(streams, epoch, slots, patch_order, column)
            return self._xp.astype(block, getattr(self._xp, dtype), copy=False), length, group

    def batch(self, streams: Streams, epoch: Any, slot: Any) -> tuple[Any, Any, Any]:
        """Return indices (B,), length and group of one batch; ``epoch`` and ``slot`` are 0-d."""
        patch_order = None
        if not self._shuffles.interleave:
            patch_order = self._patch_order(streams, epoch)
        # Numbers made inside a compiled graph would be 32-bit there (pytorch #175966).
        column = self._numbers_kept[self._tables.max_batch_size]
        slots = self._xp.reshape(slot, (1,))
        samples, length, group = self._block(streams, epoch, slots, patch_order, column)
        return samples[0], length[0], group[0]

    def prepare_batch(self) -> None:
        """Make what `batch` needs beforehand; nothing of it may be made while it is traced."""
        tables = self._tables
        wanted = {tables.max_batch_size}
        if not self._shuffles.interleave:
            wanted |= {int(tables.counts.shape[0]), tables.num_patches}
        with devices.on(self._device):
            for count in wanted - set(self._numbers_kept):
                self._numbers_kept[count] = self._numbers(count)
        for array in (*tables.members(), *self._numbers_kept.values()):
            torch_compile.keep_in_place(array)

    def ragged(self, streams: Streams, epoch: int, at: BatchLocations) -> Any:
        """Return the samples of located batches end to end, ``at.size`` of each."""
        total = int(at.size.sum())
        parts = [at.group, at.j, at.size, *([] if at.passes is None else [at.passes])]
        with devices.on(self._device):
            group, j, sizes, *passes = arrays.upload(np.stack(parts), self._device)
            row = arrays.repeat_rows(sizes, total)
            before = self._xp.cumulative_sum(sizes) - sizes
            position = (j * self._tables.sizes[group] - before)[row] + self._numbers(total)
            pass_ = passes[0][row] if passes else epoch
            return self._samples(streams, pass_, group[row], position)

    def _numbers(self, count: int) -> Any:
        handle = devices.device_handle(self._device)
        return self._xp.arange(count, dtype=self._xp.int64, device=handle)

    def _block(
        self, streams: Streams, epoch: Any, slots: Any, patch_order: PatchOrder | None, column: Any
    ) -> tuple[Any, Any, Any]:
        tables = self._tables
        group, j, passes = self.locate(streams, epoch, slots, patch_order)
        size = tables.sizes[group]
        length = self._xp.minimum(size, tables.counts[group] - j * size)
        position = (j * size)[:, None] + column[None, :]
        pass_ = epoch if passes is None else passes[:, None]
        return self._samples(streams, pass_, group[:, None], position), length, group

    def locate(
        self, streams: Streams, epoch: Any, slots: Any, patch_order: PatchOrder | None
    ) -> tuple[Any, Any, Any]:
        """Return the patch, which batch of it, and of which pass, that each slot leads to.

        The passes are None where that is the epoch.
        """
        xp, tables = self._xp, self._tables
        if patch_order is not None:
            groups, before = patch_order
            place = last_at_most(xp, before, slots)
            group, j = groups[place], slots - before[place]
        else:
            places = slots
            if self._shuffles.batches:
                places = self._shuffled(streams, epoch, slots)
            if tables.classes is not None:
                group, j = tables.classes.batch_at(xp, places)
            else:
                group = last_at_most(xp, tables.batch_offsets[:-1], places)
                j = places - tables.batch_offsets[group]
        if tables.own is None:
            return group, j, None
        own = tables.own[group]
        if tables.shares is not None:
            passes, j = pass_and_batch(epoch, j, tables.batches[group], own)
            return group, j, passes
        # Where a step is filled up, a patch's first batches come again.
        return group, j % own, None

    def _shuffled(self, streams: Streams, epoch: Any, slots: Any) -> Any:
        """Return the places in the natural order of batches that slots lead to."""
        layout, classes = self._tables.layout, self._tables.classes
        places = slots
        if layout.has_an_order:
            key = key_of(streams.batches, epoch, 0)
            places = layout.places(
                self._xp, slots, key, lambda steps: self._permute_all(steps, layout.full, key)
            )
        if classes is None:
            return places
        which = classes.class_at(self._xp, places)
        before = classes.offsets[which]
        image = permute(
            self._xp,
            places - before,
            classes.counts[which],
            key_of(streams.classes, epoch, which),
            Grid(*(side[which] for side in classes.grid)),
            classes.smallest,
            classes.largest,
        )
        return before + image

    def _patch_order(self, streams: Streams, epoch: Any) -> PatchOrder:
        """Return an epoch's order of the patches, worked out on the device."""
        count = self._tables.num_patches
        patches = self._numbers_kept[count]
        if self._shuffles.batches:
            patches = self._permute_all(patches, count, key_of(streams.patches, epoch, 0))
        numbers = self._numbers_kept[int(self._tables.counts.shape[0])]
        return self._tables.ordered(self._xp, patches, numbers)

    def _permute_all(self, x: Any, n: int, key: tuple[Any, Any]) -> Any:
        """Return the images of ``x`` under one permutation of 0 .. n-1."""
        if n == 1:
            return x
        # Added to zeros of x's shape: the key is an array itself where the epoch is one.
        zero = x * 0
        grid = Grid(*(zero + side for side in grid_of(n)))
        return permute(self._xp, x, zero + n, (zero + key[0], zero + key[1]), grid, n, n)

    def _samples(self, streams: Streams, pass_: Any, group: Any, position: Any) -> Any:
        """Return the samples at positions (any, from 0 on) of groups; all of them broadcast."""
        tables = self._tables
        n = tables.counts[group]
        position = position % n
        if self._shuffles.samples:
            key = key_of(streams.samples, pass_, group)
            grid = Grid(*(side[group] for side in tables.grid))
            position = permute(self._xp, position, n, key, grid, tables.smallest, tables.largest)
        index = tables.starts[group] + position
        if tables.order is None:
            return index
        return self._xp.astype(tables.order[index], self._xp.int64)
