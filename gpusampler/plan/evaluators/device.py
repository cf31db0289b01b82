"""Evaluation on a plan's device: by a kernel if there is one, else by array operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from gpusampler.batching.tables import PatchOrder, PatchTables
from gpusampler.core import arrays, devices, torch_compile
from gpusampler.core.devices import Device
from gpusampler.core.transfer import ReadyArrays
from gpusampler.permutation.reference import Streams
from gpusampler.plan.evaluators.array import ArrayEvaluator
from gpusampler.plan.evaluators.base import BatchLocations, EvaluatorSettings
from gpusampler.plan.evaluators.kernels.fused import (
    Advance,
    KernelEvaluator,
    kernel_evaluator_on,
)

T = TypeVar("T")

_warned: set[tuple[str, str]] = set()
"""Libraries and reasons of the failed kernel builds that this process has warned about."""


class DeviceEvaluator:
    """Batches of a plan on its device; the methods are those of `ArrayEvaluator`.

    If a kernel cannot be built (no Triton, no compiler, an incompatible driver), one warning gives
    the reason, and array operations return identical batches from then on. ``tables`` are on the
    host. ``order``, the samples sorted by patch, may be on any device; it is uploaded if necessary.
    """

    def __init__(
        self, tables: PatchTables, device: Device, order: Any, settings: EvaluatorSettings
    ) -> None:
        self.device = device
        device_tables = tables.on(device, order)
        self.array_evaluator = ArrayEvaluator(device_tables, device, settings)
        self._patch_of_bin = device_tables.patch_of_bin
        self._uploaded_order: tuple[PatchOrder, PatchOrder, ReadyArrays] | None = None
        self._previous_order: tuple[PatchOrder, PatchOrder, ReadyArrays] | None = None
        self._built_kernels: set[tuple[str, str]] = set()
        self.is_prepared = False
        """Whether `batch` may be traced."""
        self._kernel_evaluator: KernelEvaluator | None = None
        try:
            self._kernel_evaluator = kernel_evaluator_on(device_tables, device, settings)
        except Exception as error:
            # Not only ImportError: an incompatible library can raise anything on import.
            self._give_up_kernel(error)
        members = device_tables.members()
        if self._kernel_evaluator is not None:
            members += self._kernel_evaluator.members()
        self._ready = ReadyArrays(device, members)

    @property
    def block_samples(self) -> int:
        """Number of samples to evaluate per call; fewer without a kernel, for temporary arrays."""
        return 1 << 18 if self.has_kernel else 1 << 16

    @property
    def has_kernel(self) -> bool:
        """Whether a kernel evaluates; it may still fail to build at first use."""
        return self._kernel_evaluator is not None

    def prepare(self) -> None:
        """Create the arrays that `batch` needs; none may be created while it is traced."""
        self.array_evaluator.prepare_batch()
        if self._kernel_evaluator is not None:
            for array in self._kernel_evaluator.members():
                torch_compile.keep_in_place(array)
        # Graphs do not wait for uploads, so these must be complete.
        devices.synchronize_stream(self.device)
        self.is_prepared = True

    def block(
        self,
        streams: Streams,
        epoch: int,
        slots: Any,
        patch_order: PatchOrder | None,
        dtype: str = "int64",
    ) -> tuple[Any, Any, Any]:
        """Return what `ArrayEvaluator.block` returns; ``patch_order`` is on the host."""
        self._ready.wait()
        return self._try_kernel(
            ("block", dtype),
            lambda kernel: kernel.block(streams, epoch, slots, dtype),
            lambda: self._block_by_arrays(streams, epoch, slots, patch_order, dtype),
        )

    def _to_patches(self, block: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Return batches whose ``groups`` are patches instead of cost bins."""
        if self._patch_of_bin is None:
            return block
        indices, lengths, groups = block
        with devices.device_context(self.device):
            # With a 0-d index, torch.compile would read its value.
            patches = self._patch_of_bin[groups.reshape(-1)].reshape(groups.shape)
        return indices, lengths, patches

    def block_by_arrays(
        self, streams: Streams, epoch: int, slots: Any, patch_order: PatchOrder | None
    ) -> tuple[Any, Any, Any]:
        """Return `block` by array operations, even if there is a kernel."""
        self._ready.wait()
        return self._block_by_arrays(streams, epoch, slots, patch_order)

    def _block_by_arrays(
        self,
        streams: Streams,
        epoch: int,
        slots: Any,
        patch_order: PatchOrder | None,
        dtype: str = "int64",
    ) -> tuple[Any, Any, Any]:
        device_order = self._upload_order(patch_order)
        block = self.array_evaluator.block(streams, epoch, slots, device_order, dtype)
        return self._to_patches(block)

    def ragged(self, streams: Streams, epoch: int, locations: BatchLocations) -> Any:
        """Return ``locations.size`` samples of each located batch, end to end."""
        self._ready.wait()
        return self._try_kernel(
            ("ragged", "int64"),
            lambda kernel: kernel.ragged(streams, epoch, locations),
            lambda: self.array_evaluator.ragged(streams, epoch, locations),
        )

    def batch(self, streams: Streams, epoch: Any, slot: Any) -> tuple[Any, Any, Any]:
        """Return indices (B,), length and patch of one batch; ``epoch`` and ``slot`` are 0-d."""
        if torch_compile.is_compiling():
            kernel = self._kernel_evaluator
            if kernel is not None and kernel.has_operator:
                return kernel.compiled_batch(streams, epoch, slot)
            return self._batch_by_arrays(streams, epoch, slot)
        self._ready.wait()
        return self._try_kernel(
            ("batch", "int64"),
            lambda kernel: kernel.batch(streams, epoch, slot),
            lambda: self._batch_by_arrays(streams, epoch, slot),
        )

    def _batch_by_arrays(self, streams: Streams, epoch: Any, slot: Any) -> tuple[Any, Any, Any]:
        return self._to_patches(self.array_evaluator.batch(streams, epoch, slot))

    def next_batch(
        self, streams: Streams, epoch: Any, slot: Any, advance: Advance
    ) -> tuple[Any, Any, Any] | None:
        """Return a rank's batch of the step at ``slot``, and advance both counters in one launch.

        Return None if that needs more than a launch of a kernel.
        """
        if torch_compile.is_compiling() or self._kernel_evaluator is None:
            return None
        if not self._kernel_evaluator.can_advance:
            return None
        self._ready.wait()
        return self._try_kernel(
            ("next_batch", "int64"),
            lambda kernel: kernel.batch(streams, epoch, slot, advance),
            lambda: None,
        )

    def _upload_order(self, patch_order: PatchOrder | None) -> PatchOrder | None:
        """Return an epoch's order of patches on the device; the last one is cached."""
        if patch_order is None:
            return None
        if self._uploaded_order is None or self._uploaded_order[0] is not patch_order:
            # A different stream may still read the previous one.
            self._previous_order = self._uploaded_order
            device_order = PatchOrder(*(arrays.upload(array, self.device) for array in patch_order))
            ready = ReadyArrays(self.device, list(device_order))
            self._uploaded_order = patch_order, device_order, ready
        self._uploaded_order[2].wait()
        return self._uploaded_order[1]

    def _try_kernel(
        self, name: tuple[str, str], run: Callable[[KernelEvaluator], T], fallback: Callable[[], T]
    ) -> T:
        if self._kernel_evaluator is None:
            return fallback()
        try:
            result = run(self._kernel_evaluator)
        except Exception as error:
            # After a kernel has run once, a failure is not a build error.
            if name in self._built_kernels or devices.is_out_of_memory(error):
                raise
            self._give_up_kernel(error)
            return fallback()
        self._built_kernels.add(name)
        return result

    def _give_up_kernel(self, error: Exception) -> None:
        # Compilers name the cause in the last of many lines.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if len(reason) > 600:
            reason = f"{reason[:200]} ... {reason[-400:]}"
        warning_key = self.device.library, reason
        if warning_key not in _warned:
            # If the warning raises, the kernel is kept, so that every use raises.
            warnings.warn(
                f"the kernel for {self.device} could not be built; falling back to array "
                f"operations (identical batches, slower): {reason}",
                stacklevel=2,
            )
            _warned.add(warning_key)
        self._kernel_evaluator = None
