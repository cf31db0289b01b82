"""Measure the memory of a training step: on CUDA in this process, on the CPU in a forked child."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from gpusampler.calibration.forked_child import (
    call_in_child,
    check_platform,
    high_water_mark,
    is_out_of_memory,
    release_freed_memory,
)
from gpusampler.calibration.snapshot import StateSnapshot, tensors_of
from gpusampler.core import arrays, devices, memory
from gpusampler.core.log import logger
from gpusampler.core.text import format_bytes
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.sampler.batches import Batch

T = TypeVar("T")
Step = Callable[[Batch], object]
Batches = Sequence[tuple[int, int]]
"""(group of the patch, batch size) of each batch."""


class Probe(NamedTuple):
    """Bytes in use before a step (after one warm-up step), and the peak above that in the step."""

    baseline: int
    peak: int


class Meter(Protocol):
    """Measures the memory of steps on one device."""

    min_measurable: int
    """Smallest peak in bytes that stands out from measurement noise."""

    limit: int
    """Available bytes, including those that this process uses."""

    def memory_in_use(self) -> int:
        """Return the bytes that this process uses now."""

    def measure(self, group: int, size: int) -> Probe | None:
        """Run the step twice with ``size`` samples of patch number ``group``.

        Return the memory of the second run, or None if memory ran out.
        """

    def measure_sequence(self, batches: Batches) -> int | None:
        """Run the step on several batches in a row, as training does.

        Return the peak bytes, or None if memory ran out.
        """


def meter_for(
    step: Step, plan: EpochPlan, state: Sequence[Any], limit: int | None
) -> tuple[str, Meter]:
    """Return the device of a step and the meter for it."""
    device = device_of(plan, state)
    if device != "cpu":
        return device, CudaMeter(step, plan, state, device, limit)
    check_platform()
    if any(tensor.is_shared() for tensor in tensors_of(state)):
        raise ValueError(
            "state must not be in shared memory, got a shared tensor: the step runs in a child "
            "process, whose changes to shared memory would not be undone. Call calibrate() before "
            "share_memory()."
        )
    return device, HostMeter(step, plan, limit)


def device_of(plan: EpochPlan, state: Sequence[Any]) -> str:
    """Return "cpu" or the CUDA device that a step works on: the state's, else the sampler's."""
    state_devices = {tensor.device for tensor in tensors_of(state)}
    other_types = sorted({device.type for device in state_devices} - {"cpu", "cuda"})
    if other_types:
        raise ValueError(f"state must be on the CPU or CUDA, got {', '.join(other_types)}")
    cuda_devices = sorted(str(device) for device in state_devices if device.type == "cuda")
    if len(cuda_devices) > 1:
        raise ValueError(f"state must be on one CUDA device, got {', '.join(cuda_devices)}")
    if cuda_devices:
        return cuda_devices[0]
    return "cpu" if plan.device.on_host else devices.as_torch_device(plan.device).name


def batch_of(plan: EpochPlan, group: int, size: int) -> Batch:
    """Return a batch of a patch's first samples, repeated if the patch has fewer."""
    groups = plan.groups
    start = int(groups.starts[group])
    stop = start + min(size, int(groups.counts[group]))
    indices = arrays.to_device(np.resize(groups._samples_between(start, stop), size), plan.device)
    return Batch(groups.labels[group : group + 1].tolist()[0], indices, size)


class HostMeter:
    """Measures the peak resident memory, in one child process per measurement."""

    # Pages of code and small objects vary by tenths of a MiB.
    min_measurable = 4 << 20

    def __init__(self, step: Step, plan: EpochPlan, limit: int | None) -> None:
        self._step, self._plan = step, plan
        if limit is None:
            free, resident = memory.free_bytes(devices.HOST), memory.resident_bytes()
            if free is None or resident is None:
                raise RuntimeError(
                    "memory_limit must be given if the system does not report free memory, got None"
                )
            limit = free + resident
        self.limit = limit

    def memory_in_use(self) -> int:
        """Return the resident bytes."""
        return memory.resident_bytes() or 0

    def measure(self, group: int, size: int) -> Probe | None:
        """Run the step twice in a child process."""
        file_bytes = memory.file_backed_bytes()
        try:
            _, probe = call_in_child(lambda: self._probe(group, size, file_bytes), self.limit)
        except RuntimeError as error:
            _explain_fork_error(error)
            raise
        return _logged(self._plan, group, size, probe)

    def measure_sequence(self, batches: Batches) -> int | None:
        """Run the steps in a child process with unchanged malloc settings, as in training.

        malloc then keeps freed pieces that do not fit later batches.
        """
        file_bytes = memory.file_backed_bytes()
        _, peak = call_in_child(
            lambda: self._sequence_peak(batches, file_bytes), self.limit, release_freed=False
        )
        total = "out of memory" if peak is None else f"{format_bytes(peak)} in total"
        logger.info("calibrate: %d batches in a row: %s", len(batches), total)
        return peak

    def _probe(self, group: int, size: int, file_bytes: int) -> Probe:
        batch = batch_of(self._plan, group, size)
        self._step(batch)
        release_freed_memory()
        baseline = high_water_mark(reset=True)
        self._step(batch)
        peak = max(high_water_mark() - baseline, 1)
        return Probe(baseline + _unmapped_bytes(file_bytes), peak)

    def _sequence_peak(self, batches: Batches, file_bytes: int) -> int:
        high_water_mark(reset=True)
        for group, size in batches:
            self._step(batch_of(self._plan, group, size))
        return high_water_mark() + _unmapped_bytes(file_bytes)


def _unmapped_bytes(file_bytes: int) -> int:
    """Return the file-backed bytes of the parent that a child has not touched.

    A forked child maps pages of code only when it executes them.
    """
    return max(file_bytes - memory.file_backed_bytes(), 0)


class CudaMeter:
    """Measures the peak that torch has allocated in this process; restores the state afterwards.

    Without ``limit``, the limit is the free memory of the device plus what this process has
    reserved. This limit is updated after the first measurement, because libraries allocate memory
    at first use.
    """

    min_measurable = 1 << 20

    def __init__(
        self, step: Step, plan: EpochPlan, state: Sequence[Any], device: str, limit: int | None
    ) -> None:
        import torch

        self._cuda = torch.cuda
        self._step, self._plan, self._device = step, plan, device
        self._refreshes_limit = limit is None
        self.limit = self._available_bytes() if limit is None else limit
        self._snapshot = StateSnapshot(state)

    def _available_bytes(self) -> int:
        free, _ = self._cuda.mem_get_info(self._device)
        return int(free + self._cuda.memory_reserved(self._device))

    def memory_in_use(self) -> int:
        """Return the bytes that torch has allocated."""
        return int(self._cuda.memory_allocated(self._device))

    def measure(self, group: int, size: int) -> Probe | None:
        """Run the step twice in this process, then restore the state."""
        probe = self._call_and_restore(lambda: self._probe(group, size))
        if self._refreshes_limit and probe is not None:
            self._refreshes_limit = False
            self.limit = min(self.limit, self._available_bytes())
        return _logged(self._plan, group, size, probe)

    def measure_sequence(self, batches: Batches) -> int | None:
        """Run the steps in this process, then restore the state."""
        return self._call_and_restore(lambda: self._sequence_peak(batches))

    def _call_and_restore(self, function: Callable[[], T]) -> T | None:
        """Return a function's result, or None if memory ran out, after restoring the state."""
        try:
            return self._call(function)
        finally:
            # Free the step's memory before restoring, which needs memory itself.
            gc.collect()
            self._cuda.empty_cache()
            self._snapshot.restore()
            self._cuda.empty_cache()

    def _call(self, function: Callable[[], T]) -> T | None:
        # The error refers to its frames and they to tensors; all are released on return.
        try:
            return function()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _probe(self, group: int, size: int) -> Probe:
        batch = batch_of(self._plan, group, size)
        self._step(batch)
        self._cuda.synchronize(self._device)
        gc.collect()
        self._cuda.reset_peak_memory_stats(self._device)
        baseline = self.memory_in_use()
        self._step(batch)
        return Probe(baseline, max(self._peak() - baseline, 1))

    def _sequence_peak(self, batches: Batches) -> int:
        self._cuda.reset_peak_memory_stats(self._device)
        for group, size in batches:
            self._step(batch_of(self._plan, group, size))
        return self._peak()

    def _peak(self) -> int:
        self._cuda.synchronize(self._device)
        return int(self._cuda.max_memory_allocated(self._device))


def _logged(plan: EpochPlan, group: int, size: int, probe: Probe | None) -> Probe | None:
    label = plan.groups.labels[group : group + 1].tolist()[0]
    peak_text = "out of memory" if probe is None else format_bytes(probe.peak)
    logger.info("calibrate: %d samples of patch %s: %s", size, label, peak_text)
    return probe


def _explain_fork_error(error: RuntimeError) -> None:
    """Raise an error with advice if a step failed only because it runs in a forked child."""
    message = str(error)
    if "forked subprocess" in message or "fork-based multiprocessing" in message:
        raise RuntimeError(
            "calibrate() forks to run step, but this process already used CUDA or autograd. Pass "
            "CUDA models in state=, or call calibrate() before any CUDA or autograd work."
        ) from error
