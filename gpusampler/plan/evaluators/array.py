"""A plan's arithmetic in plain array operations, on any device of any array library.

The host evaluator and every kernel must return the same integers. No value is read on the host, and
no shape depends on a value, so that torch.compile can trace `batch` and a CUDA graph can capture
it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpusampler.batching.mixture import pass_and_batch, visits
from gpusampler.batching.steps import search_offsets
from gpusampler.batching.tables import PatchOrder, PatchTables
from gpusampler.core import arrays, devices, torch_compile
from gpusampler.core.devices import Device
from gpusampler.permutation.reference import Grid, Streams, key_of, permute, permute_all
from gpusampler.plan.evaluators.base import BatchLocations, EvaluatorSettings


class ArrayEvaluator:
    """Batches of a plan, evaluated on a device, where ``tables`` must be."""

    def __init__(self, tables: PatchTables, device: Device, settings: EvaluatorSettings) -> None:
        self._device = device
        self._xp = arrays.reference_namespace(device)
        self._tables = tables
        self._settings = settings
        self._arange_cache: dict[int, Any] = {}

    def block(
        self,
        streams: Streams,
        epoch: int,
        slots: Any,
        patch_order: PatchOrder | None,
        dtype: str = "int64",
    ) -> tuple[Any, Any, Any]:
        """Return indices (K, B), lengths (K,) and groups (K,) of the batches at ``slots``.

        ``patch_order``, on the device, is None if batches are interleaved.
        """
        with devices.device_context(self._device):
            column = self._arange(self._tables.max_batch_size)
            block, length, group = self._block(streams, epoch, slots, patch_order, column)
            return self._xp.astype(block, getattr(self._xp, dtype), copy=False), length, group

    def batch(self, streams: Streams, epoch: Any, slot: Any) -> tuple[Any, Any, Any]:
        """Return indices (B,), length and group of one batch; ``epoch`` and ``slot`` are 0-d."""
        patch_order = None
        if not self._settings.interleave:
            patch_order = self._patch_order(streams, epoch)
        # An arange inside a compiled graph would compute in 32 bits (pytorch #175966).
        column = self._arange_cache[self._tables.max_batch_size]
        slots = self._xp.reshape(slot, (1,))
        samples, length, group = self._block(streams, epoch, slots, patch_order, column)
        return samples[0], length[0], group[0]

    def prepare_batch(self) -> None:
        """Create the arrays that `batch` needs; none may be created while it is traced."""
        tables = self._tables
        sizes = {tables.max_batch_size}
        if not self._settings.interleave:
            sizes |= {int(tables.counts.shape[0]), tables.num_patches}
        with devices.device_context(self._device):
            for size in sizes - set(self._arange_cache):
                self._arange_cache[size] = self._arange(size)
        for array in (*tables.members(), *self._arange_cache.values()):
            torch_compile.keep_in_place(array)

    def ragged(self, streams: Streams, epoch: int, locations: BatchLocations) -> Any:
        """Return ``locations.size`` samples of each located batch, end to end."""
        total = int(locations.size.sum())
        columns = [locations.group, locations.j, locations.size]
        if locations.passes is not None:
            columns.append(locations.passes)
        with devices.device_context(self._device):
            group, j, sizes, *passes = arrays.upload(np.stack(columns), self._device)
            rows = arrays.repeat_rows(sizes, total)
            offset = self._xp.cumulative_sum(sizes) - sizes
            first, _ = self._tables.first_position_and_size(self._xp, group, j)
            position = (first - offset)[rows] + self._arange(total)
            passes_of_samples = passes[0][rows] if passes else epoch
            return self._samples(streams, passes_of_samples, group[rows], position)

    def _arange(self, count: int) -> Any:
        handle = devices.device_handle(self._device)
        return self._xp.arange(count, dtype=self._xp.int64, device=handle)

    def _block(
        self, streams: Streams, epoch: Any, slots: Any, patch_order: PatchOrder | None, column: Any
    ) -> tuple[Any, Any, Any]:
        tables = self._tables
        group, j, passes = self.locate(streams, epoch, slots, patch_order)
        first, size = tables.first_position_and_size(self._xp, group, j)
        length = self._xp.minimum(size, tables.counts[group] - first)
        position = first[:, None] + column[None, :]
        pass_ = epoch if passes is None else passes[:, None]
        return self._samples(streams, pass_, group[:, None], position), length, group

    def locate(
        self, streams: Streams, epoch: Any, slots: Any, patch_order: PatchOrder | None
    ) -> tuple[Any, Any, Any]:
        """Return the group of each slot, its batch in the group, and its pass (None: the epoch)."""
        xp, tables = self._xp, self._tables
        if tables.visited is not None:
            state = streams.patches if self._settings.shuffle_batches else None
            settings = tables.visited, tables.own_batches, tables.num_batches
            group, passes, j = visits(xp, *settings, epoch, slots, state)
            return group, j, passes
        if patch_order is not None:
            groups, offsets = patch_order
            index = search_offsets(xp, offsets, slots)
            group, j = groups[index], slots - offsets[index]
        else:
            permute_slots = functools.partial(self._batch_indices, streams, epoch)
            if tables.costliest is None:
                batch_index = permute_slots(slots)
            else:
                batch_index = tables.costliest.batch_indices(xp, epoch, slots, permute_slots)
            if tables.buckets is not None:
                group, j = tables.buckets.locate(xp, batch_index)
            else:
                group = search_offsets(xp, tables.batch_offsets[:-1], batch_index)
                j = batch_index - tables.batch_offsets[group]
        if tables.batches_per_pass is None:
            return group, j, None
        own_batches = tables.batches_per_pass[group]
        if tables.slot_shares is not None:
            passes, j = pass_and_batch(epoch, j, tables.batches[group], own_batches)
            return group, j, passes
        # Padded steps repeat a patch's first batches.
        return group, j % own_batches, None

    def _batch_indices(self, streams: Streams, epoch: Any, slots: Any) -> Any:
        """Return each slot's batch, as an index into the batches before shuffling."""
        if not self._settings.shuffle_batches:
            return slots
        layout, buckets = self._tables.layout, self._tables.buckets
        index = slots
        if layout.has_step_order:
            key = key_of(streams.batches, epoch, 0)
            index = layout.batch_indices(
                self._xp,
                slots,
                key,
                lambda steps: permute_all(self._xp, steps, layout.full, key),
            )
        if buckets is None:
            return index
        bucket = buckets.bucket_of(self._xp, index)
        offset = buckets.offsets[bucket]
        image = permute(
            self._xp,
            index - offset,
            buckets.counts[bucket],
            key_of(streams.buckets, epoch, bucket),
            Grid(*(side[bucket] for side in buckets.grid)),
            buckets.smallest,
            buckets.largest,
        )
        return offset + image

    def _patch_order(self, streams: Streams, epoch: Any) -> PatchOrder:
        """Return an epoch's order of patches, computed on the device."""
        num_patches = self._tables.num_patches
        patches = self._arange_cache[num_patches]
        if self._settings.shuffle_batches:
            key = key_of(streams.patches, epoch, 0)
            patches = permute_all(self._xp, patches, num_patches, key)
        group_numbers = self._arange_cache[int(self._tables.counts.shape[0])]
        return self._tables.patch_order(self._xp, patches, group_numbers)

    def _samples(self, streams: Streams, pass_: Any, group: Any, position: Any) -> Any:
        """Return samples at positions modulo the group's size; the arguments broadcast."""
        tables = self._tables
        n = tables.counts[group]
        position = position % n
        if self._settings.shuffle_samples:
            key = key_of(streams.samples, pass_, group)
            grid = Grid(*(side[group] for side in tables.grid))
            position = permute(
                self._xp, position, n, key, grid, tables.smallest_patch, tables.largest_patch
            )
        index = tables.starts[group] + position
        if tables.order is None:
            return index
        return self._xp.astype(tables.order[index], self._xp.int64)
