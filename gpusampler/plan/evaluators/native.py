"""Slots evaluated in C: what a launch of a kernel does on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.tables import PatchOrder, PatchTables
from gpusampler.core.arrays import Int64
from gpusampler.permutation import _native
from gpusampler.permutation._native import address, contiguous_int64
from gpusampler.permutation.host import StoredOrder, look_up_at, order_address
from gpusampler.permutation.reference import Streams
from gpusampler.plan.evaluators.base import EvaluatorSettings

NUM_COLUMNS = 4
"""What the compiled module returns for each slot: group, batch, length and size."""
FEW_SLOTS = 256
"""Up to this many slots, the columns and the samples share an allocation."""


class Job(NamedTuple):
    """What the compiled code reads: ``words`` has addresses of tables, and of ``patch_order``."""

    patch_order: PatchOrder | None
    words: NDArray[np.int64]
    address: int


class SlotEvaluator:
    """Locates and evaluates slots by the compiled module; the arguments are `HostEvaluator`'s.

    This is possible if one permutation and one search locate a slot: see `can_evaluate`.
    """

    def __init__(self, tables: PatchTables, settings: EvaluatorSettings, streams: Streams) -> None:
        # The compiled code reads these arrays by their addresses, so they are kept.
        by_group = (tables.counts, tables.starts, tables.sizes, tables.larger)
        self._by_group = [
            None if column is None else contiguous_int64(column) for column in by_group
        ]
        self._offsets = contiguous_int64(tables.batch_offsets)
        self._num_groups, self._num_batches = tables.counts.size, tables.num_batches
        self._max_batch_size = tables.max_batch_size
        self._settings, self._streams = settings, streams
        self._order: tuple[Any, int] = None, 0
        self._jobs: dict[bool, Job] = {}

    @staticmethod
    def can_evaluate(tables: PatchTables) -> bool:
        """Whether the compiled module can evaluate slots of a plan."""
        return (
            tables.layout.width == 1
            and tables.buckets is None
            and tables.costliest is None
            and tables.batches_per_pass is None
        )

    def evaluate(
        self,
        epoch: int,
        slots: Int64 | range,
        patch_order: PatchOrder | None,
        order: NDArray[Any] | StoredOrder | None,
        max_samples: int,
        *,
        pad_rows: bool = False,
    ) -> tuple[Int64, Int64, Int64, Int64, Int64]:
        """Return the batches at slots and their samples, for as many slots as fit.

        Parameters
        ----------
        epoch : int
        slots : int64 array of shape (K,), or range
            Slots >= 0; those beyond the epoch's last repeat its first.
        patch_order : PatchOrder, or None
            The order of the patches in this epoch, if batches are not interleaved.
        order : integer array, StoredOrder or None
            As `PatchGroups.order`.
        max_samples : int
            Number of samples that fit. 0 to locate all slots without evaluating them.
        pad_rows : bool
            Evaluate as many samples in every row as the largest batch has.

        Returns
        -------
        group, j, length, size : int64 arrays, shape (R,)
            As in `BatchLocations`, for the first R slots.
        samples : int64 array, shape (T,)
            Their samples, batch after batch.
        """
        count = len(slots)
        end = NUM_COLUMNS * count
        # One allocation and one address, unless batches would keep many unused rows in memory.
        buffer = np.empty(end + max_samples * (count <= FEW_SLOTS), np.int64)
        samples = buffer[end:] if count <= FEW_SLOTS else np.empty(max_samples, np.int64)
        rows_address = address(buffer)
        samples_address = 0
        if max_samples:
            samples_address = rows_address + 8 * end if count <= FEW_SLOTS else address(samples)
        if isinstance(slots, range):
            where = 0, slots.start, slots.step
        else:
            slots = contiguous_int64(slots)
            where = address(slots), 0, 0
        # Kept until the call returns: another thread may replace it meanwhile.
        job = self._job(patch_order, pad_rows)
        num_rows, num_samples = _native.module.evaluate(
            job.address, epoch, *where, count, rows_address, samples_address, max_samples
        )
        samples = samples[:num_samples]
        if order is not None and num_samples:
            last_order = self._order
            if order is not last_order[0]:
                self._order = last_order = order, order_address(order)
            look_up_at(*last_order, samples, samples_address)
        return (
            buffer[:num_rows],
            buffer[count : count + num_rows],
            buffer[2 * count : 2 * count + num_rows],
            buffer[3 * count : 3 * count + num_rows],
            samples,
        )

    def _job(self, patch_order: PatchOrder | None, pad_rows: bool) -> Job:
        """Return the job for the batches of an epoch; the last one is cached."""
        cached = self._jobs.get(pad_rows)
        if cached is not None and cached.patch_order is patch_order:
            return cached
        settings = self._settings
        offsets, group_of = self._offsets, None
        if patch_order is not None:
            group_of, offsets = patch_order
        words = np.array(
            [
                self._num_groups,
                self._num_batches,
                *map(address, (*self._by_group, offsets, group_of)),
                settings.shuffle_batches and patch_order is None,
                settings.shuffle_samples,
                settings.pad,
                self._max_batch_size if pad_rows else 0,
                *self._streams.batches,
                *self._streams.samples,
            ],
            np.int64,
        )
        job = Job(patch_order, words, address(words))
        self._jobs[pad_rows] = job
        return job
