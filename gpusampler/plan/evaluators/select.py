"""Choice of a plan's evaluator: the device's, or the host's if the device cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from gpusampler.batching.tables import PatchTables
from gpusampler.core import arrays, devices, memory, torch_compile
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST, Device
from gpusampler.core.validation import as_array
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.permutation.reference import Streams
from gpusampler.plan.evaluators.base import (
    BatchBlock,
    BatchLocations,
    Evaluator,
    EvaluatorSettings,
    RaggedBlock,
)
from gpusampler.plan.evaluators.device import DeviceEvaluator
from gpusampler.plan.evaluators.host import HostEvaluator
from gpusampler.plan.evaluators.kernels.fused import Advance
from gpusampler.plan.evaluators.memory_fallback import DEVICE_HINT, FullDevices

T = TypeVar("T")


class PlanEvaluator(Evaluator):
    """An `Evaluator` that uses a plan's device if possible, and the host otherwise.

    The host evaluates if it is the plan's device, in a DataLoader worker, and after the device has
    run out of memory. The arguments are those of `HostEvaluator`; the tables and the order of
    ``groups`` are uploaded at first use.
    """

    def __init__(
        self,
        tables: PatchTables,
        groups: PatchGroups,
        device: Device,
        settings: EvaluatorSettings,
        streams: Streams,
    ) -> None:
        self._tables, self._groups = tables, groups
        self.device, self.settings, self.streams = device, settings, streams
        self.host = HostEvaluator(tables, groups, settings, streams)
        self._device_evaluator: DeviceEvaluator | None = None
        # Shared by copies.
        self._full_devices = FullDevices()

    def with_changes(
        self,
        tables: PatchTables | None = None,
        device: Device | None = None,
        streams: Streams | None = None,
    ) -> PlanEvaluator:
        """Return a copy with different tables, device or seed; the copy shares all other parts."""
        changed = PlanEvaluator.__new__(PlanEvaluator)
        changed.__dict__.update(self.__dict__)
        if tables is not None or device is not None:
            changed._device_evaluator = None
        changed._tables = self._tables if tables is None else tables
        changed.device = self.device if device is None else device
        changed.streams = self.streams if streams is None else streams
        if tables is not None or streams is not None:
            changed.host = self.host.with_changes(changed._tables, changed.streams)
        return changed

    @property
    def works_on_host(self) -> bool:
        """Whether the host currently evaluates in this process."""
        # A DataLoader worker must not use a GPU.
        return self.device.on_host or self.device in self._full_devices or devices.is_in_worker()

    @property
    def needs_upload(self) -> bool:
        """Whether the tables must still be uploaded."""
        return self._device_evaluator is None and not self.works_on_host

    @property
    def needs_verification(self) -> bool:
        """Whether the order must still be verified before it is uploaded."""
        return self._groups._needs_verification

    def verify_order(self) -> None:
        """Verify the whole order; raise ValueError if its file is damaged."""
        _ = self._groups.order

    @property
    def table_bytes(self) -> dict[str, int]:
        """See `EpochPlan.table_bytes`."""
        order = self._groups._unchecked_order
        host = str(HOST)
        sizes = {host: self._tables.nbytes}
        if order is not None:
            device = arrays.device_of(order)
            name = host if device.on_host else str(device)
            sizes[name] = sizes.get(name, 0) + int(order.nbytes)
            if self.works_on_host and not device.on_host:
                sizes[host] += int(order.nbytes)
        if not self.works_on_host or self._device_evaluator is not None:
            name = str(self.device)
            sizes[name] = sizes.get(name, 0) + self.upload_nbytes
        return sizes

    @property
    def upload_nbytes(self) -> int:
        """Number of bytes of the tables and the order that are uploaded to the device."""
        order = self._groups._unchecked_order
        needs_upload = order is not None and arrays.device_of(order) != self.device
        return self._tables.upload_nbytes + (int(order.nbytes) if needs_upload else 0)

    @property
    def block_samples(self) -> int:
        """Number of samples to evaluate per call: enough to amortize the overhead of a call."""
        evaluator = None if self.works_on_host else self.upload_tables()
        return self.host.block_samples if evaluator is None else evaluator.block_samples

    def locate(self, epoch: int, slots: Int64) -> BatchLocations:
        """Return the batches that slots map to, always computed on the host."""
        return self.host.locate(epoch, slots)

    def block(self, epoch: int, slots: Any, dtype: str = "int64") -> BatchBlock:
        """Return the batches at slots, on the plan's device; see `EpochPlan.evaluate`."""
        if self.works_on_host:
            block = self.host.block(epoch, self._check_host_slots(slots), dtype)
            device = HOST if devices.is_in_worker() and not self.device.on_host else self.device
            return BatchBlock(*(arrays.to_device(array, device) for array in block))
        # Checked before the upload: a bad slot must raise before memory can run out.
        checked_slots = self._check_slots(slots)

        def evaluate(evaluator: DeviceEvaluator) -> BatchBlock:
            device_slots = self._upload_slots(checked_slots)
            patch_order = self.host.patch_order(epoch)
            return BatchBlock(
                *evaluator.block(self.streams, epoch, device_slots, patch_order, dtype)
            )

        device_block = self._try_on_device(evaluate)
        # Once memory has run out, the host evaluates.
        return self.block(epoch, slots, dtype) if device_block is None else device_block

    def block_by_arrays(self, epoch: int, slots: Any) -> BatchBlock:
        """Return what `block` returns, by array operations that read no value on the host.

        Every faster evaluation must give the same result. ``slots`` (int64, on the plan's device)
        are not checked.
        """
        patch_order = self.host.patch_order(epoch)
        evaluator = self.device_evaluator()
        return BatchBlock(*evaluator.block_by_arrays(self.streams, epoch, slots, patch_order))

    def ragged(self, epoch: int, locations: BatchLocations) -> RaggedBlock:
        """Return the batches at ``locations``, each of its own size; falls back to the host."""
        samples = None
        if not self.works_on_host:
            samples = self._try_on_device(
                lambda evaluator: evaluator.ragged(self.streams, epoch, locations)
            )
        if samples is None:
            return self.host.ragged(epoch, locations)
        patches = self._tables.patches_of(locations.group)
        return RaggedBlock(samples, locations.size, locations.length, patches)

    def batch(self, epoch: Any, slot: Any) -> BatchBlock:
        """Return one batch; ``epoch`` and ``slot`` are 0-d tensors, as in `EpochPlan.batch`."""
        evaluator = self._device_evaluator
        if evaluator is None or not evaluator.is_prepared:
            evaluator = self.prepare_batch()
        # These checks read no values, so they also run while a graph is traced.
        torch_compile.check_counter(epoch, "epoch", self.device)
        torch_compile.check_counter(slot, "slot", self.device)
        return BatchBlock(*evaluator.batch(self.streams, epoch, slot))

    def next_batch(self, epoch: Any, slot: Any, advance: Advance) -> BatchBlock | None:
        """Return what `DeviceEvaluator.next_batch` returns, for a plan that is prepared."""
        evaluator = self._device_evaluator
        if evaluator is None or not evaluator.is_prepared:
            return None
        batch = evaluator.next_batch(self.streams, epoch, slot, advance)
        return None if batch is None else BatchBlock(*batch)

    def prepare_batch(self) -> DeviceEvaluator:
        """Upload what `batch` needs, at its first call; raise RuntimeError in compiled code."""
        if not self.device.is_torch:
            raise RuntimeError(
                f"plan.batch needs a torch device, but this plan is on {str(self.device)!r}. Use "
                "plan.on('cpu').batch, which returns identical batches."
            )
        if torch_compile.is_compiling():
            raise RuntimeError(
                "plan.batch was compiled before its first call, but compiled code cannot upload "
                "the plan's tables. Call plan.batch once, or create sampler.cursor(), before "
                "compiling."
            )
        evaluator = self.device_evaluator()
        # Without fullgraph=True, torch also traces functions in which a graph breaks.
        torch_compile.untraced(evaluator.prepare)()
        return evaluator

    def device_evaluator(self) -> DeviceEvaluator:
        """Return the evaluator on the plan's device; the first call uploads its tables."""
        if self._device_evaluator is None:
            purpose = f"the tables of {self._groups.num_samples} samples"
            memory.check_free_memory(self.upload_nbytes, self.device, purpose, DEVICE_HINT)
            self._device_evaluator = DeviceEvaluator(
                self._tables, self.device, self._groups.order, self.settings
            )
        return self._device_evaluator

    def upload_tables(self) -> DeviceEvaluator | None:
        """Return the device's evaluator, created at the first call; None if memory runs out."""
        return self._try_on_device(lambda evaluator: evaluator)

    def _try_on_device(self, call: Callable[[DeviceEvaluator], T]) -> T | None:
        """Return the device's result; fall back to the host and return None if memory runs out."""
        try:
            return call(self.device_evaluator())
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            self.fall_back_to_host(error)
            return None

    def fall_back_to_host(self, error: Exception) -> None:
        """Evaluate on the host from now on, because the device has run out of memory; warn once."""
        if self.device in self._full_devices:
            return
        self._full_devices.add(self.device, self.upload_nbytes, error)
        # A captured or compiled graph still reads the tables.
        if self._device_evaluator is not None and not self._device_evaluator.is_prepared:
            self._device_evaluator = None

    def _check_slots(self, slots: Any) -> Any:
        """Return slots after a check; their values are checked only if they are on the host."""
        if arrays.library_of(slots) is None or arrays.device_of(slots).on_host:
            return self._check_host_slots(slots)
        _check_slots_type(slots)
        return slots

    def _upload_slots(self, slots: Any) -> Any:
        """Return checked slots as int64 on the plan's device."""
        if arrays.is_numpy(slots):
            return arrays.upload(slots, self.device)
        slots = arrays.to_device(slots, self.device)
        xp = arrays.namespace(self.device)
        with devices.device_context(self.device):
            # Kernels read contiguous memory.
            return arrays.as_contiguous(xp.astype(slots, xp.int64, copy=False))

    def _check_host_slots(self, slots: Any) -> Int64:
        slots = arrays.to_numpy(as_array(slots, "slots"))
        if slots.size == 0 and slots.ndim == 1:
            return np.zeros(0, np.int64)
        _check_slots_type(slots)
        num_batches = self._tables.num_batches
        for extreme in (int(slots.min()), int(slots.max())):
            if not 0 <= extreme < num_batches:
                raise ValueError(f"slots must be in 0 .. {num_batches - 1}, got {extreme}")
        return np.asarray(slots, np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Drop device memory; the tables are uploaded again at first use."""
        return {**self.__dict__, "_device_evaluator": None, "_full_devices": FullDevices()}


def _check_slots_type(slots: Any) -> None:
    if slots.ndim != 1:
        raise ValueError(f"slots must be 1-D, got shape {tuple(slots.shape)}")
    if not arrays.is_integer(slots):
        raise TypeError(f"slots must be integers, got dtype {arrays.dtype_name(slots)}")
