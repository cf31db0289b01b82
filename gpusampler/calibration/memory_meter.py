"""The memory that a step takes for a batch: measured in this process on CUDA, else in a child."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from gpusampler.calibration.forked_child import (
    call_in_child,
    check_there,
    high_water,
    is_out_of_memory,
    trim,
)
from gpusampler.calibration.snapshot import StateSnapshot, tensors_of
from gpusampler.core import arrays, devices, memory
from gpusampler.core.log import logger
from gpusampler.core.text import human
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.sampler.batches import Batch

T = TypeVar("T")
Step = Callable[[Batch], object]


class Probe(NamedTuple):
    """What a step has taken.

    Attributes
    ----------
    held : int
        Bytes held before the step, by a process in which one such step was made before.
    peak : int
        Bytes above that, at most, in the step.
    """

    held: int
    peak: int


class Meter(Protocol):
    """Measures steps on one device."""

    measurable: int
    """Bytes from which a peak tells more than what it is measured with."""

    limit: int
    """Bytes that there are, with what this process holds."""

    def held(self) -> int:
        """Return the bytes that this process holds now."""

    def measure(self, group: int, size: int) -> Probe | None:
        """Make a step with a batch of a patch, twice; None if memory ran out."""

    def walk(self, batches: Sequence[tuple[int, int]]) -> int | None:
        """Make steps with batches of patches, one after another, as training does.

        Returns
        -------
        int or None
            The most bytes that were held, all in all; None if memory ran out.
        """


def meter_for(
    step: Step, plan: EpochPlan, state: Sequence[Any], limit: int | None
) -> tuple[str, Meter]:
    """Return where a step works, and what measures it there.

    Raises
    ------
    ValueError
        If ``state`` is on several GPUs, on a device that is neither, or in memory that is shared.
    RuntimeError
        If the memory there cannot be measured, or nobody says how much there is.
    """
    device = device_of(plan, state)
    if device != "cpu":
        return device, CudaMeter(step, plan, state, device, limit)
    check_there()
    if any(tensor.is_shared() for tensor in tensors_of(state)):
        raise ValueError(
            "state must not be in shared memory, got a tensor that is: the step is measured in a "
            "child process, whose changes would be seen here"
        )
    return device, HostMeter(step, plan, limit)


def device_of(plan: EpochPlan, state: Sequence[Any]) -> str:
    """Return "cpu" or the CUDA device that a step works on: the state's, else the sampler's."""
    there = {tensor.device for tensor in tensors_of(state)}
    wrong = sorted({device.type for device in there} - {"cpu", "cuda"})
    if wrong:
        raise ValueError(f"state must be on the CPU or CUDA, got {', '.join(wrong)}")
    found = sorted(str(device) for device in there if device.type == "cuda")
    if len(found) > 1:
        raise ValueError(f"state must be on one CUDA device, got {', '.join(found)}")
    if found:
        return found[0]
    return "cpu" if plan.device.on_host else devices.on_torch(plan.device).name


def batch_of(plan: EpochPlan, group: int, size: int) -> Batch:
    """Return a batch of a patch: its samples, which come again where there are fewer."""
    groups = plan.groups
    start, taken = int(groups.starts[group]), min(size, int(groups.counts[group]))
    if groups.order is None:
        samples = np.arange(start, start + taken, dtype=np.int64)
    else:
        samples = arrays.to_numpy(groups.order[start : start + taken]).astype(np.int64)
    indices = arrays.to_device(np.resize(samples, size), plan.device)
    return Batch(groups.labels[group : group + 1].tolist()[0], indices, size)


class HostMeter:
    """The high-water mark of resident memory, in a child process for each measurement."""

    # Pages of code and of small objects come and go by tenths of a MiB.
    measurable = 4 << 20

    def __init__(self, step: Step, plan: EpochPlan, limit: int | None) -> None:
        self._step, self._plan = step, plan
        if limit is None:
            free, held = memory.free_bytes(devices.HOST), memory.resident()
            if free is None or held is None:
                raise RuntimeError(
                    "memory_limit must be given where the system does not say what is free"
                )
            limit = free + held
        self.limit = limit

    def held(self) -> int:
        """Return the bytes that are resident."""
        return memory.resident() or 0

    def measure(self, group: int, size: int) -> Probe | None:
        """Make the steps in a child process."""
        files = memory.of_files()
        try:
            done, found = call_in_child(lambda: self._steps(group, size, files), self.limit)
        except RuntimeError as error:
            _explain(error)
            raise
        _log(self._plan, group, size, found)
        return Probe(*found) if done else None

    def walk(self, batches: Sequence[tuple[int, int]]) -> int | None:
        """Make the steps in a child process, whose malloc is as this process has it.

        It keeps what is freed, in pieces that do not fit what comes next.
        """
        files = memory.of_files()
        done, most = call_in_child(lambda: self._walked(batches, files), self.limit, tidy=False)
        logger.info("calibrate: %d batches in a row: %s", len(batches), most)
        return int(most) if done else None

    def _walked(self, batches: Sequence[tuple[int, int]], files: int) -> int:
        high_water(reset=True)
        for group, size in batches:
            self._step(batch_of(self._plan, group, size))
        return high_water() + _not_mapped(files)

    def _steps(self, group: int, size: int, files: int) -> tuple[int, int]:
        batch = batch_of(self._plan, group, size)
        self._step(batch)
        trim()
        held = high_water(reset=True)
        self._step(batch)
        peak = max(high_water() - held, 1)
        return held + _not_mapped(files), peak


def _not_mapped(files: int) -> int:
    """Return the bytes of files that the parent holds and a child has not come to touch.

    Pages of code are not there in a copy of a process until it runs through them.
    """
    return max(files - memory.of_files(), 0)


class CudaMeter:
    """What torch has given out at most, in this process; state is put back after each measurement.

    Parameters
    ----------
    limit : int, optional
        Default: what is free on the device, and what this process has reserved. That is asked
        again after the first measurement, as libraries take some when they are first used.
    """

    measurable = 1 << 20

    def __init__(
        self, step: Step, plan: EpochPlan, state: Sequence[Any], device: str, limit: int | None
    ) -> None:
        import torch

        self._cuda = torch.cuda
        self._step, self._plan, self._device = step, plan, device
        self._asks = limit is None
        self.limit = self._room() if limit is None else limit
        self._kept = StateSnapshot(state)

    def _room(self) -> int:
        free, _ = self._cuda.mem_get_info(self._device)
        return int(free + self._cuda.memory_reserved(self._device))

    def held(self) -> int:
        """Return the bytes that torch has given out."""
        return int(self._cuda.memory_allocated(self._device))

    def measure(self, group: int, size: int) -> Probe | None:
        """Make the steps here, and put the state back."""
        found = self._and_back(lambda: self._steps(group, size))
        if self._asks and found is not None:
            self._asks = False
            self.limit = min(self.limit, self._room())
        _log(self._plan, group, size, found)
        return found

    def walk(self, batches: Sequence[tuple[int, int]]) -> int | None:
        """Make the steps here, and put the state back."""
        return self._and_back(lambda: self._walked(batches))

    def _and_back(self, work: Callable[[], T]) -> T | None:
        """Return what work returns, None if memory ran out, with the state as it was."""
        try:
            return self._or_none(work)
        finally:
            # What the step leaves is to be gone before there is to be room for anything else.
            gc.collect()
            self._cuda.empty_cache()
            self._kept.put_back()
            self._cuda.empty_cache()

    def _or_none(self, work: Callable[[], T]) -> T | None:
        # The error holds its frames, and they the tensors: both are gone when this returns.
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _walked(self, batches: Sequence[tuple[int, int]]) -> int:
        self._cuda.reset_peak_memory_stats(self._device)
        for group, size in batches:
            self._step(batch_of(self._plan, group, size))
        self._cuda.synchronize(self._device)
        return int(self._cuda.max_memory_allocated(self._device))

    def _steps(self, group: int, size: int) -> Probe:
        batch = batch_of(self._plan, group, size)
        self._step(batch)
        self._cuda.synchronize(self._device)
        gc.collect()
        self._cuda.reset_peak_memory_stats(self._device)
        held = self.held()
        self._step(batch)
        self._cuda.synchronize(self._device)
        peak = int(self._cuda.max_memory_allocated(self._device))
        return Probe(held, max(peak - held, 1))


def _log(plan: EpochPlan, group: int, size: int, found: tuple[int, int] | None) -> None:
    label = plan.groups.labels[group : group + 1].tolist()[0]
    took = "out of memory" if found is None else human(found[1])
    logger.info("calibrate: %d samples of patch %s: %s", size, label, took)


def _explain(error: RuntimeError) -> None:
    """Say what to do about errors that only a child has, on one more line of the traceback."""
    text = str(error)
    if "forked subprocess" in text or "fork-based multiprocessing" in text:
        raise RuntimeError(
            "step must not use CUDA, or follow a backward() in this process, where it is measured "
            "in a child process: name a model that is on CUDA in state=, or calibrate first of "
            f"all, got: {text}"
        ) from error
