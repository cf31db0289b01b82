"""Evaluation of a plan by a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpusampler.batching.tables import PatchTables
from gpusampler.core import arrays, devices
from gpusampler.core.devices import Device
from gpusampler.permutation.reference import Streams, absorb_pair, grid_of, key_of, rounds_for
from gpusampler.plan.evaluators.base import BatchLocations, EvaluatorSettings
from gpusampler.plan.evaluators.kernels.kernel_spec import (
    Geometry,
    KernelSpec,
    cuda_geometry,
    triton_geometry,
)

Launch = Callable[[KernelSpec, Geometry, tuple[Any, ...]], None]


class KernelEvaluator:
    """Evaluates a plan's batches with a kernel, on the device that holds ``tables``.

    ``launch(spec, geometry, args)`` runs the kernel on arrays and numbers. ``geometry(spec,
    num_rows, width)`` divides the launch into blocks.
    """

    def __init__(
        self,
        tables: PatchTables,
        device: Device,
        settings: EvaluatorSettings,
        launch: Launch,
        geometry: Callable[[KernelSpec, int, int], Geometry],
    ) -> None:
        self._tables = tables
        self._device = device
        self._settings = settings
        self._launch = launch
        self._geometry = geometry
        self._xp = arrays.namespace(device)
        # Both in one word, so that batches that differ by one in size need no extra argument.
        with devices.device_context(device):
            self._sizes = tables.sizes
            if tables.larger is not None:
                self._sizes = tables.sizes + (tables.larger << 32)

    def block(
        self, streams: Streams, epoch: int, slots: Any, dtype: str = "int64"
    ) -> tuple[Any, Any, Any]:
        """Return indices (K, B), lengths (K,) and groups (K,) of the batches at ``slots``.

        The kernel locates the slots itself. It can do so only if the plan interleaves and has
        neither steps of several slots, nor cost buckets, nor weights; else use `located_block`.
        """
        return self._block(streams, epoch, slots, (None, None), dtype)

    def located_block(
        self,
        streams: Streams,
        epoch: int,
        group: Any,
        j: Any,
        passes: Any = None,
        dtype: str = "int64",
    ) -> tuple[Any, Any, Any]:
        """Return what `block` returns, for batches ``j`` of ``group``, arrays on the device.

        ``passes`` is the number of each batch's pass over its group, or None if this is the epoch.
        """
        return self._block(streams, epoch, j, (group, passes), dtype)

    def _block(
        self, streams: Streams, epoch: int, slots: Any, rows: tuple[Any, Any], dtype: str
    ) -> tuple[Any, Any, Any]:
        num_rows, width = int(slots.shape[0]), self._tables.max_batch_size
        with devices.device_context(self._device):
            out = self._empty((num_rows, width), dtype)
            lengths, groups = self._empty((num_rows,)), self._empty((num_rows,))
            spec = self._kernel_spec(rows, ragged=False)
            keys = self._keys(streams, epoch, spec)
            self._run(spec, (slots, None, None, out, lengths, groups), rows, width, keys)
        return out, lengths, groups

    def batch(self, streams: Streams, epoch: Any, slot: Any) -> tuple[Any, Any, Any]:
        """Return indices (B,), length and group of one batch; ``epoch`` and ``slot`` are 0-d.

        The kernel reads both from device memory, so that a CUDA graph can replay the kernel for
        different values. The plan must meet the conditions of `block`.
        """
        width = self._tables.max_batch_size
        with devices.device_context(self._device):
            out = self._empty((1, width))
            lengths, groups = self._empty((1,)), self._empty((1,))
            spec = KernelSpec.of(self._tables, self._settings, ragged=False, epoch_on_device=True)
            slots = self._xp.reshape(slot, (1,))
            self._run(
                spec,
                (slots, None, epoch, out, lengths, groups),
                (None, None),
                width,
                (*streams.batches, *streams.samples),
            )
        return out[0], lengths[0], groups[0]

    def ragged(
        self, streams: Streams, epoch: int, locations: BatchLocations, *, is_located: bool
    ) -> Any:
        """Return ``locations.size`` samples of each located batch, end to end.

        If not ``is_located``, the kernel locates the slots again.
        """
        num_rows = locations.size.size
        if num_rows == 0:
            return self._empty((0,))
        # One small upload, which the host does not wait for.
        starts = np.cumsum(locations.size) - locations.size
        columns = [starts, locations.j, locations.group] if is_located else [starts, locations.slot]
        if locations.passes is not None:
            columns.append(locations.passes)
        starts, slots, *located_columns = arrays.upload(np.stack(columns), self._device)
        rows = (*located_columns, None, None)[:2]
        if self._tables.is_uniform:
            # The same kernel as for `block`, because each spec is compiled separately.
            block = self._block(streams, epoch, slots, rows, "int64")
            return self._xp.reshape(block[0], (-1,))
        spec = self._kernel_spec(rows, ragged=True)
        keys = self._keys(streams, epoch, spec)
        with devices.device_context(self._device):
            out = self._empty((int(locations.size.sum()),))
            row_arrays = (slots, starts, None, out, None, None)
            self._run(spec, row_arrays, rows, int(locations.size.max()), keys)
        return out

    def _kernel_spec(self, rows: tuple[Any, Any], *, ragged: bool) -> KernelSpec:
        group, passes = rows
        return KernelSpec.of(
            self._tables,
            self._settings,
            ragged=ragged,
            located=group is not None,
            passes=passes is not None,
        )

    def _empty(self, shape: tuple[int, ...], dtype: str = "int64") -> Any:
        handle = devices.device_handle(self._device)
        return self._xp.empty(shape, dtype=getattr(self._xp, dtype), device=handle)

    def _keys(self, streams: Streams, epoch: int, spec: KernelSpec) -> tuple[int, int, int, int]:
        # If each row has its own pass, the kernel absorbs it into the key.
        samples = streams.samples if spec.passes else absorb_pair(streams.samples, epoch)
        return *key_of(streams.batches, epoch, 0), *samples

    def _run(
        self,
        spec: KernelSpec,
        row_arrays: tuple[Any, ...],
        rows: tuple[Any, Any],
        max_lanes: int,
        keys: tuple[int, ...],
    ) -> None:
        """Launch the kernel for rows of at most ``max_lanes`` lanes."""
        tables = self._tables
        width = tables.max_batch_size
        num_rows = int(row_arrays[0].shape[0])
        if num_rows == 0:
            return
        num_groups = int(tables.counts.shape[0])
        grid = grid_of(tables.num_batches)
        # Unused sides are 0: those of large grids may not fit in 32 bits.
        slot_grid = grid if spec.slots > 1 else (0, 0, 0)
        args = (
            *row_arrays,
            tables.counts,
            self._sizes,
            tables.batch_offsets,
            *rows,
            tables.starts,
            *tables.grid,
            tables.order,
            num_rows,
            width,
            num_groups,
            (num_groups - 1).bit_length(),
            tables.num_batches if spec.slots == 1 else 0,
            *slot_grid,
            rounds_for(tables.num_batches) // 2,
            *map(_signed, keys),
        )
        # The shape of tiles depends on the plan, their number on these rows.
        geometry = self._geometry(spec, num_rows, width)
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
        from gpusampler.plan.evaluators.kernels.cuda_batches import launch as launch_cuda

        return KernelEvaluator(tables, device, settings, launch_cuda, cuda_geometry)
    if device.is_torch_cuda:
        import torch

        from gpusampler.plan.evaluators.kernels.triton_batches import launch as launch_triton

        def launch(spec: KernelSpec, geometry: Geometry, args: tuple[Any, ...]) -> None:
            # Triton launches on the current device, which need not be the plan's.
            with torch.cuda.device(device.name):
                launch_triton(spec, geometry, args)

        return KernelEvaluator(tables, device, settings, launch, triton_geometry)
    return None
