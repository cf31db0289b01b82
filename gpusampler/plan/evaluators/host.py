"""Evaluation on the host, in C if possible: see `native`, and `permutation.host`."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from gpusampler.batching.mixture import pass_and_batch, visits
from gpusampler.batching.short_batches import returned_sizes
from gpusampler.batching.tables import PatchOrder, PatchTables
from gpusampler.core import arrays, devices, memory
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.permutation import _native
from gpusampler.permutation.host import keys_of, permute_one, permute_ranges
from gpusampler.permutation.reference import Grid, Streams, key_of, permute
from gpusampler.plan.evaluators.base import (
    BatchBlock,
    BatchLocations,
    Evaluator,
    EvaluatorSettings,
    RaggedBlock,
)
from gpusampler.plan.evaluators.memory_fallback import SORT_HINT
from gpusampler.plan.evaluators.native import SlotEvaluator


class HostEvaluator(Evaluator):
    """An `Evaluator` on the host, where ``tables`` must be.

    ``groups`` are patches or cost bins; their order may be on a device or in a file. ``streams``
    are the random-number states derived from the plan's seed.
    """

    def __init__(
        self,
        tables: PatchTables,
        groups: PatchGroups,
        settings: EvaluatorSettings,
        streams: Streams,
    ) -> None:
        self._tables = tables
        self._groups = groups
        self._settings = settings
        self._streams = streams
        self._patch_orders: dict[int, PatchOrder] = {}
        self._order_copy: Any = None
        self._can_evaluate_slots = SlotEvaluator.can_evaluate(tables)
        self._slot_evaluator: SlotEvaluator | None = None

    def with_changes(self, tables: PatchTables, streams: Streams) -> HostEvaluator:
        """Return a copy with different tables or random-number states."""
        changed = type(self)(tables, self._groups, self._settings, streams)
        changed._order_copy = self._order_copy
        return changed

    @property
    def block_samples(self) -> int:
        """Number of samples to evaluate per call: few enough that they stay in cache."""
        return 1 << 15

    def locate(self, epoch: int, slots: Int64) -> BatchLocations:
        """Return the batches that slots map to."""
        tables, passes = self._tables, None
        patch_order = self.patch_order(epoch)
        evaluator = self._compiled()
        if evaluator is not None:
            group, j, length, size, _ = evaluator.evaluate(epoch, slots, patch_order, None, 0)
            return BatchLocations(slots, group, j, length, size, None)
        if tables.visited is not None:
            state = self._streams.patches if self._settings.shuffle_batches else None
            settings = tables.visited, tables.own_batches, tables.num_batches
            xp = arrays.namespace(HOST)
            group, passes, j = visits(xp, *settings, epoch, slots, state)
        elif patch_order is not None:
            groups, offsets = patch_order
            index = np.searchsorted(offsets, slots, side="right") - 1
            group, j = groups[index], slots - offsets[index]
        else:
            permute_slots = functools.partial(self._batch_indices, epoch)
            if tables.costliest is None:
                batch_index = permute_slots(slots)
            else:
                batch_index = tables.costliest.batch_indices(np, epoch, slots, permute_slots)
            if tables.buckets is None:
                group = np.searchsorted(tables.batch_offsets, batch_index, side="right") - 1
                j = batch_index - tables.batch_offsets[group]
            else:
                group, j = tables.buckets.locate(np, batch_index)
        if tables.batches_per_pass is not None and passes is None:
            own_batches = tables.batches_per_pass[group]
            if tables.slot_shares is None:
                j = j % own_batches
            else:
                passes, j = pass_and_batch(epoch, j, tables.batches[group], own_batches)
        first, size = tables.first_position_and_size(np, group, j)
        length = np.minimum(size, tables.counts[group] - first)
        size = returned_sizes(size, length, pad=self._settings.pad)
        return BatchLocations(slots, group, j, length, size, passes)

    def block(self, epoch: int, slots: Int64, dtype: str = "int64") -> BatchBlock:
        """Return the batches at slots, each padded to the largest batch size."""
        width = self._tables.max_batch_size
        evaluator = self._compiled()
        if evaluator is not None:
            num_samples = slots.size * width
            patch_order = self.patch_order(epoch)
            group, _, length, _, samples = evaluator.evaluate(
                epoch, slots, patch_order, self._order(), num_samples, pad_rows=True
            )
            indices = samples.reshape(slots.size, width).astype(dtype, copy=False)
            return BatchBlock(indices, length, self._tables.patches_of(group))
        locations = self.locate(epoch, slots)
        samples = self._samples(epoch, locations, np.full(slots.size, width, np.int64))
        rows = samples.reshape(slots.size, width)
        patches = self._tables.patches_of(locations.group)
        return BatchBlock(rows.astype(dtype, copy=False), locations.length, patches)

    def ragged(self, epoch: int, locations: BatchLocations) -> RaggedBlock:
        """Return the batches at ``locations``."""
        samples = self._samples(epoch, locations, locations.size)
        patches = self._tables.patches_of(locations.group)
        return RaggedBlock(samples, locations.size, locations.length, patches)

    @property
    def evaluates_slots(self) -> bool:
        """Whether `slot_range` can be called."""
        return self._can_evaluate_slots and _native.module is not None

    def slot_range(self, epoch: int, slots: range, max_samples: int) -> RaggedBlock:
        """Return the batches at the first of ``slots``, as many as fit in ``max_samples`` samples.

        Slots beyond the epoch's last repeat its first.
        """
        evaluator = self._compiled()
        assert evaluator is not None
        patch_order = self.patch_order(epoch)
        group, _, length, size, samples = evaluator.evaluate(
            epoch, slots, patch_order, self._order(), max_samples
        )
        return RaggedBlock(samples, size, length, self._tables.patches_of(group))

    def _compiled(self) -> SlotEvaluator | None:
        """Return the evaluator in C, if there is one and it can locate this plan's slots."""
        if not self.evaluates_slots:
            return None
        if self._slot_evaluator is None:
            self._slot_evaluator = SlotEvaluator(self._tables, self._settings, self._streams)
        return self._slot_evaluator

    def permute_positions(
        self, group: Int64, passes: Any, first: Int64, length: Int64, base: Int64, order: Any = None
    ) -> Int64:
        """Return permuted positions, int64 of shape (T,), range after range.

        Each range is ``length`` positions from ``first`` on, in a pass over a group; ``passes`` may
        be an int. ``base`` is added to every permuted position. If ``order`` is given, each sum is
        then replaced by ``order[sum]``.
        """
        key = None
        if self._settings.shuffle_samples:
            key = keys_of(self._streams.samples, passes, group)
        return permute_ranges(first, length, self._tables.counts[group], key, base, order)

    def patch_order(self, epoch: int) -> PatchOrder | None:
        """Return an epoch's order of patches, None if interleaved; the last two are cached."""
        if self._settings.interleave:
            return None
        patch_order = self._patch_orders.get(epoch)
        if patch_order is None:
            tables = self._tables
            patches = np.arange(tables.num_patches, dtype=np.int64)
            if self._settings.shuffle_batches:
                key = key_of(self._streams.patches, epoch, 0)
                patches = permute_one(patches, patches.size, key)
            group_numbers = np.arange(tables.counts.size, dtype=np.int64)
            patch_order = tables.patch_order(arrays.namespace(HOST), patches, group_numbers)
            # Replaced rather than updated: a different thread may be reading it.
            self._patch_orders = {**dict([*self._patch_orders.items()][-1:]), epoch: patch_order}
        return patch_order

    def _batch_indices(self, epoch: int, slots: Int64) -> Int64:
        """Return each slot's batch, as an index into the batches before shuffling."""
        if not self._settings.shuffle_batches:
            return slots
        layout, buckets = self._tables.layout, self._tables.buckets
        index = slots
        if layout.has_step_order:
            key = key_of(self._streams.batches, epoch, 0)
            index = layout.batch_indices(
                np, slots, key, lambda steps: permute_one(steps, layout.full, key)
            )
        if buckets is None or slots.size == 0:
            return index
        bucket = buckets.bucket_of(np, index)
        offset, n = buckets.offsets[bucket], buckets.counts[bucket]
        key = key_of(self._streams.buckets, epoch, bucket)
        within = index - offset
        if buckets.largest >= 1 << 31:
            grid = Grid(*(side[bucket] for side in buckets.grid))
            xp, bounds = arrays.namespace(HOST), (buckets.smallest, buckets.largest)
            return np.asarray(offset + permute(xp, within, n, key, grid, *bounds))
        ones = np.ones_like(within)
        return permute_ranges(within, ones, n, key, offset, None)

    def _samples(self, epoch: int, locations: BatchLocations, sizes: Int64) -> Int64:
        """Return the samples of all batches, ``sizes[k]`` of batch k."""
        group, tables = locations.group, self._tables
        passes = epoch if locations.passes is None else locations.passes
        first, _ = tables.first_position_and_size(np, group, locations.j)
        base = tables.starts[group]
        return self.permute_positions(group, passes, first, sizes, base, self._order())

    def _order(self) -> Any:
        # Not cached: each read checks the file that the order may be mapped from.
        order = self._groups._order_to_look_up
        if order is None or arrays.library_of(order) in ("numpy", None):
            return order
        if self._order_copy is None:
            device = arrays.device_of(order)
            if devices.is_in_worker() and not device.on_host:
                raise RuntimeError(
                    f"Forked workers cannot read the samples' order on {device}. Use "
                    "device='numpy' with ids on the host, or "
                    "DataLoader(..., multiprocessing_context='spawn')."
                )
            if not device.on_host:
                purpose = "the host's copy of the samples' order"
                memory.check_free_memory(int(order.nbytes), HOST, purpose, SORT_HINT)
            self._order_copy = arrays.to_numpy(order)
        return self._order_copy

    def __getstate__(self) -> dict[str, Any]:
        """Drop caches; they are filled again at first use."""
        return {**self.__dict__, "_patch_orders": {}, "_order_copy": None, "_slot_evaluator": None}
