"""Evaluation of a plan by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpusampler.batching.tables import PatchTables
from gpusampler.core import arrays, devices
from gpusampler.core.devices import Device
from gpusampler.permutation.reference import (
    MASK,
    Streams,
    absorb_pair,
    grid_of,
    key_of,
    rounds_for,
)
from gpusampler.plan.evaluators.base import BatchLocations, EvaluatorSettings
from gpusampler.plan.evaluators.kernels.kernel_spec import (
    SLOTS_AS_THEY_ARE,
    SLOTS_FISHER_YATES,
    Geometry,
    KernelSpec,
    cuda_geometry,
    first_batches,
    plan_words,
    search_bits,
    search_table,
    side_words,
    slots_form,
    triton_geometry,
)

Launch = Callable[[KernelSpec, Geometry, tuple[Any, ...]], None]
LaunchPatchOrder = Callable[[int, bool, tuple[Any, ...]], None]


class Advance(NamedTuple):
    """How a launch advances epoch and slot to the next step: the arguments of `BatchCursor`."""

    num_replicas: int
    rank: int
    drops_uneven: bool
    repeats_count: bool


class KernelEvaluator:
    """Evaluates a plan's batches with a kernel, on the device that holds ``tables``.

    ``launch(spec, geometry, args)`` runs the kernel on arrays and numbers; ``launch_patch_order``
    runs the one that finds an epoch's order of patches. ``geometry(spec, num_rows, width)`` divides
    the launch into blocks. ``operator`` is `triton_op.batch_operator`, or None.
    """

    def __init__(
        self,
        tables: PatchTables,
        device: Device,
        settings: EvaluatorSettings,
        launch: Launch,
        launch_patch_order: LaunchPatchOrder,
        geometry: Callable[[KernelSpec, int, int], Geometry],
        operator: Any = None,
    ) -> None:
        self._tables = tables
        self._device = device
        self._settings = settings
        self._launch = launch
        self._launch_patch_order = launch_patch_order
        self._geometry = geometry
        self._operator = operator
        self._xp = arrays.namespace(device)

        def to_device(numbers: list[int]) -> Any:
            return arrays.upload(np.array(numbers, np.int64), device)

        with devices.device_context(device):
            # Several numbers in a word take one load.
            self._sizes = tables.sizes
            if tables.larger is not None:
                self._sizes = tables.sizes + (tables.larger << 32)
            self._sides, self._rests = side_words(tables.grid)
            offsets = first_batches(tables)
            self._num_offsets = int(offsets.shape[0])
            self._search = search_table(self._xp, offsets, to_device)
            self._plan_words = plan_words(self._xp, tables, to_device)

    def members(self) -> list[Any]:
        """Return the arrays that the kernel reads besides the tables."""
        return [self._sizes, self._search, self._sides, self._rests, self._plan_words]

    def block(
        self, streams: Streams, epoch: int, slots: Any, dtype: str = "int64"
    ) -> tuple[Any, Any, Any]:
        """Return indices (K, B), lengths (K,) and patches (K,) of the batches at ``slots``."""
        num_rows, width = int(slots.shape[0]), self._tables.max_batch_size
        with devices.device_context(self._device):
            out = self._empty((num_rows, width), dtype)
            lengths, groups = self._empty((num_rows,)), self._empty((num_rows,))
            spec = KernelSpec.of(self._tables, self._settings, ragged=False)
            self._run(spec, streams, epoch, (slots, None, None, out, lengths, groups), width)
        return out, lengths, groups

    def batch(
        self, streams: Streams, epoch: Any, slot: Any, advance: Advance | None = None
    ) -> tuple[Any, Any, Any]:
        """Return indices (B,), length and patch of one batch; ``epoch`` and ``slot`` are 0-d.

        The kernel reads both from device memory, so that a CUDA graph can replay the kernel for
        different values. If ``advance`` is given, it returns the batch of this rank in the step
        that begins at ``slot``, and writes where the next step begins to ``epoch`` and ``slot``.
        """
        width = self._tables.max_batch_size
        with devices.device_context(self._device):
            out = self._empty((1, width))
            lengths, groups = self._empty((1,)), self._empty((1,))
            spec = KernelSpec.of(self._tables, self._settings, ragged=False, epoch_on_device=True)
            if advance is not None:
                spec = spec._replace(
                    advance=1 + advance.drops_uneven, skip_repeats=not advance.repeats_count
                )
            row_arrays = (self._xp.reshape(slot, (1,)), None, epoch, out, lengths, groups)
            self._run(spec, streams, epoch, row_arrays, width, advance)
        return out[0], lengths[0], groups[0]

    @property
    def has_operator(self) -> bool:
        """Whether `compiled_batch` can be called."""
        return self._operator is not None

    def compiled_batch(self, streams: Streams, epoch: Any, slot: Any) -> tuple[Any, Any, Any]:
        """Return what `batch` returns, for torch.compile to trace as one operator."""
        spec = KernelSpec.of(self._tables, self._settings, ragged=False, epoch_on_device=True)
        width = self._tables.max_batch_size
        geometry = self._geometry(spec, 1, width)
        order = [] if self._tables.order is None else [self._tables.order]
        order_numbers: list[int] = []
        if spec.in_order:
            form, arguments = self._patch_order_numbers(streams.patches)
            order_numbers = [form, *arguments]
        out, lengths, groups = self._operator(
            epoch,
            slot,
            [*self._kernel_tables(), *order],
            [int(value) for value in spec],
            self._numbers(spec, streams, 0, 1, None),
            order_numbers,
            [geometry.rows, geometry.columns, geometry.span, *geometry.blocks],
            width,
        )
        return out[0], lengths[0], groups[0]

    @property
    def can_advance(self) -> bool:
        """Whether a launch may advance the counters: one program reads and writes them."""
        spec = KernelSpec.of(self._tables, self._settings, ragged=False, epoch_on_device=True)
        return self._geometry(spec, 1, self._tables.max_batch_size).blocks == (1, 1)

    def ragged(self, streams: Streams, epoch: int, locations: BatchLocations) -> Any:
        """Return ``locations.size`` samples of the batches at ``locations.slot``, end to end."""
        num_rows = locations.size.size
        if num_rows == 0:
            # array-api-compat ignores ``device`` for CuPy.
            with devices.device_context(self._device):
                return self._empty((0,))
        # One small upload, which the host does not wait for.
        starts = np.cumsum(locations.size) - locations.size
        starts, slots = arrays.upload(np.stack([starts, locations.slot]), self._device)
        if self._tables.is_uniform:
            # The same kernel as for `block`, because each spec is compiled separately.
            return self._xp.reshape(self.block(streams, epoch, slots)[0], (-1,))
        spec = KernelSpec.of(self._tables, self._settings, ragged=True)
        with devices.device_context(self._device):
            out = self._empty((int(locations.size.sum()),))
            row_arrays = (slots, starts, None, out, None, None)
            self._run(spec, streams, epoch, row_arrays, int(locations.size.max()))
        return out

    def _empty(self, shape: tuple[int, ...], dtype: str = "int64") -> Any:
        handle = devices.device_handle(self._device)
        return self._xp.empty(shape, dtype=getattr(self._xp, dtype), device=handle)

    def _keys(self, streams: Streams, epoch: Any, spec: KernelSpec) -> tuple[int, ...]:
        """Return the keys of a launch: pairs of words for slots, samples, and buckets or visits."""
        other = streams.patches if spec.visits else streams.buckets
        if spec.epoch_on_device:
            return *streams.batches, *streams.samples, *other
        # If each row has its own pass, the kernel absorbs it into the key.
        samples = streams.samples if spec.passes else absorb_pair(streams.samples, epoch)
        other = other if spec.visits else absorb_pair(other, epoch)
        return *key_of(streams.batches, epoch, 0), *samples, *other

    def _patch_order(self, streams: Streams, epoch: Any, spec: KernelSpec) -> tuple[Any, Any]:
        """Return the order of an epoch's patches and the first slot of each; one launch."""
        num_patches = self._tables.num_patches
        patches, offsets = self._empty((num_patches,)), self._empty((num_patches,))
        key = streams.patches if spec.epoch_on_device else key_of(streams.patches, epoch, 0)
        form, numbers = self._patch_order_numbers(key)
        epoch_array = epoch if spec.epoch_on_device else None
        args = (patches, offsets, self._plan_words, epoch_array, *numbers)
        self._launch_patch_order(form, spec.epoch_on_device, args)
        return patches, offsets

    def _patch_order_numbers(self, key: tuple[int, int]) -> tuple[int, list[int]]:
        """Return form and integer arguments of the kernel of the patches' order."""
        num_patches, form = self._tables.num_patches, SLOTS_AS_THEY_ARE
        if self._settings.shuffle_batches and num_patches > 1:
            form = slots_form(num_patches)
        grid, pairs = grid_of(num_patches), rounds_for(num_patches) // 2
        return form, [num_patches, *grid, pairs, *map(_signed, key)]

    def _kernel_tables(self) -> list[Any]:
        """Return the tables that the kernel reads, in its order of arguments, without `order`."""
        tables = self._tables
        by_slot = [tables.counts, self._sizes, self._search, self._plan_words]
        return [*by_slot, tables.starts, self._sides, self._rests]

    def _numbers(
        self, spec: KernelSpec, streams: Streams, epoch: Any, num_rows: int, advance: Advance | None
    ) -> list[int]:
        """Return the integer arguments of the kernel."""
        num_steps = self._tables.layout.full
        # Unused sides are 0: those of large grids may not fit in 32 bits.
        slot_grid = grid_of(num_steps) if spec.slots > 1 else (0, 0, 0)
        number = 0 if spec.epoch_on_device else epoch
        return [
            num_rows,
            self._tables.max_batch_size,
            self._num_offsets,
            search_bits(self._num_offsets),
            num_steps if spec.slots == SLOTS_FISHER_YATES else 0,
            *slot_grid,
            rounds_for(num_steps) // 2 if spec.slots else 0,
            *map(_signed, self._keys(streams, epoch, spec)),
            _signed(number & MASK),
            _signed(number >> 32),
            *((1, 0) if advance is None else advance[:2]),
        ]

    def _run(
        self,
        spec: KernelSpec,
        streams: Streams,
        epoch: Any,
        row_arrays: tuple[Any, ...],
        max_lanes: int,
        advance: Advance | None = None,
    ) -> None:
        """Launch the kernel for rows of at most ``max_lanes`` lanes."""
        num_rows = int(row_arrays[0].shape[0])
        if num_rows == 0:
            return
        epoch_patches = (None, None)
        if spec.in_order:
            epoch_patches = self._patch_order(streams, epoch, spec)
        tables = self._kernel_tables()
        args = (
            *row_arrays,
            *tables[:4],
            *epoch_patches,
            *tables[4:],
            self._tables.order,
            *self._numbers(spec, streams, epoch, num_rows, advance),
        )
        # The shape of tiles depends on the plan, their number on these rows.
        geometry = self._geometry(spec, num_rows, self._tables.max_batch_size)
        num_spans = -(-max_lanes // geometry.span)
        geometry = geometry._replace(blocks=(geometry.blocks[0], num_spans))
        self._launch(spec, geometry, args)


def _signed(word: int) -> int:
    """Return the signed number with the same 32 bits."""
    return word - (1 << 32) if word >> 31 else word


def kernel_evaluator_on(
    tables: PatchTables, device: Device, settings: EvaluatorSettings
) -> KernelEvaluator | None:
    """Return an evaluator with the kernel for a device, or None if the device has no kernel.

    Raises ImportError if the library of the kernel is not installed.
    """
    if device.library == "cupy":
        from gpusampler.plan.evaluators.kernels import cuda_batches

        launches = cuda_batches.launch, cuda_batches.launch_patch_order
        return KernelEvaluator(tables, device, settings, *launches, cuda_geometry)
    if device.is_torch_cuda:
        import torch

        from gpusampler.plan.evaluators.kernels import triton_batches
        from gpusampler.plan.evaluators.kernels.triton_op import batch_operator

        def launch(spec: KernelSpec, geometry: Geometry, args: tuple[Any, ...]) -> None:
            # Triton launches on the current device, which need not be the plan's.
            with torch.cuda.device(device.name):
                triton_batches.launch(spec, geometry, args)

        def launch_patch_order(form: int, epoch_on_device: bool, args: tuple[Any, ...]) -> None:
            with torch.cuda.device(device.name):
                triton_batches.launch_patch_order(form, epoch_on_device, args)

        launches = launch, launch_patch_order
        return KernelEvaluator(
            tables, device, settings, *launches, triton_geometry, batch_operator()
        )
    return None
