"""What every case is given."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.record import Record
from benchmarks.gpu.workload import Scale


class Bench(NamedTuple):
    """The device, where results go, and how much is to be done."""

    machine: Machine
    record: Record
    scale: Scale

    @property
    def torch(self) -> Any:
        """The library, which this package imports only once there is something to run it on."""
        return self.machine.torch

    @property
    def device(self) -> str:
        """Torch's name of the device."""
        return self.machine.device

    def check_kernel(self, plan: Any, what: str) -> None:
        """Write whether a kernel evaluates: otherwise the times are those of array operations."""
        in_use = plan.evaluator.device_evaluator().has_kernel
        self.record.check(f"{what}: a kernel evaluates", in_use)
