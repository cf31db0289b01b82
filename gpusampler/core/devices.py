"""Devices: parsing and availability, synchronization, and use in DataLoader workers."""

from __future__ import annotations

import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, cast

from gpusampler.core.log import warn

Library = Literal["numpy", "torch", "cupy"]


@dataclass(frozen=True)
class Device:
    """Location of arrays: a library and its name for the device.

    Parameters
    ----------
    library : {"numpy", "torch", "cupy"}
    name : str
        "cpu" for NumPy; "cpu", "cuda:0", "mps", ... for torch; "0", "1", ... for CuPy.
    """

    library: Library
    name: str = "cpu"

    def __str__(self) -> str:
        """Return the form that `parse_device` reads."""
        if self.library == "numpy":
            return "numpy"
        return self.name if self.library == "torch" else f"cupy:{self.name}"

    @property
    def on_host(self) -> bool:
        """Whether NumPy can view arrays on this device without a copy."""
        return self.name == "cpu"

    @property
    def is_torch(self) -> bool:
        """Whether this is a torch device."""
        return self.library == "torch"

    @property
    def is_torch_cuda(self) -> bool:
        """Whether this is a torch CUDA device."""
        return self.library == "torch" and self.name.startswith("cuda")


HOST = Device("numpy")


def loaded_module(module: str) -> ModuleType | None:
    """Return a module that is already imported, else None."""
    return sys.modules.get(module)


def parse_device(device: Any) -> Device:
    """Return the device of a ``device`` argument: "numpy", "cupy", "cupy:1" or a torch device.

    Raises ValueError for an unknown name, and RuntimeError if the library or device is not
    available or if a DataLoader worker asks for a GPU.
    """
    parsed = _parse(device)
    check_not_in_worker(parsed)
    return parsed


def _parse(device: Any) -> Device:
    name = str(device)
    if name == "numpy":
        return HOST
    if name.split(":")[0] == "cupy":
        return _parse_cupy(name)
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(
            f"device={name!r} requested, but torch is not installed. "
            "Run `pip install torch`, or pass device='numpy'."
        ) from error
    try:
        parsed = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device must be 'numpy', 'cupy', 'cupy:<index>' or a torch device, got {name!r}"
        ) from error
    if parsed.type == "cuda":
        return _parse_cuda(name, parsed.index)
    if parsed.type == "cpu":
        return Device("torch", "cpu")
    try:
        # The full name, as tensors report it: "mps:0" for "mps".
        full_name = str(torch.empty(0, device=parsed).device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"device={name!r} requested, but torch cannot use it ({reason}). Pass 'cpu' or 'numpy'."
        ) from error
    if parsed.type == "meta":
        raise ValueError(
            f"device must not be {name!r}, which stores no data; pass 'cpu', 'cuda' or 'numpy'"
        )
    return Device("torch", full_name)


def _parse_cuda(name: str, index: int | None) -> Device:
    import torch

    if not torch.cuda.is_available():
        fault = _driver_fault() if torch.cuda.device_count() else None
        problem = f"finds no CUDA device{'' if fault is None else f' that it can use: {fault}'}"
        raise RuntimeError(
            f"device={name!r} requested, but torch {problem}. Check nvidia-smi and that torch was "
            "built with CUDA, or pass device='cpu'."
        )
    count = torch.cuda.device_count()
    if index is not None and index >= count:
        raise RuntimeError(
            f"device={name!r} requested, but torch finds {count} CUDA device(s). Pass an index "
            f"below {count}."
        )
    fault = cuda_fault(Device("torch", name))
    if fault is not None:
        raise RuntimeError(
            f"device={name!r} requested, but torch cannot use it: {fault}. Check nvidia-smi and "
            "for which GPUs torch was built, or pass device='cpu'."
        )
    # "cuda" is the current device of this process, which may differ from cuda:0.
    return Device("torch", f"cuda:{torch.cuda.current_device() if index is None else index}")


def _parse_cupy(name: str) -> Device:
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            f"device={name!r} requested, but cupy is not installed. "
            "Run `pip install cupy-cuda12x` or `pip install cupy-cuda13x`."
        ) from error
    _, _, index = name.partition(":")
    if index and not index.isdecimal():
        raise ValueError(f"device must be 'cupy' or 'cupy:<index>', got {name!r}")
    # `import cupy` succeeds without a driver; with a wrong driver, counting the devices raises.
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"device={name!r} requested, but cupy finds no CUDA device ({error}). Check "
            "nvidia-smi, or pass device='numpy'."
        ) from error
    if int(index or 0) >= count:
        raise RuntimeError(
            f"device={name!r} requested, but cupy finds {count} CUDA device(s). Pass an index "
            f"below {count}."
        )
    return Device("cupy", str(int(index)) if index else str(cupy.cuda.Device().id))


def default_device() -> Device:
    """Return the default device: CUDA if torch is imported and can use it, else NumPy.

    Warns once if there is a CUDA device that torch cannot use. CUDA is not initialized, so that the
    process can still fork; faults that only show later are found by `usable_default`.
    """
    torch = loaded_module("torch")
    if torch is None or is_in_worker():
        return HOST
    if is_cuda_initialized():
        index = torch.cuda.current_device()
        return usable_default(Device("torch", f"cuda:{index}"))
    # is_available() would initialize CUDA.
    count = torch.cuda.device_count()
    if count == 0:
        return HOST
    # A rank that has not set its device yet will use the one of its local rank.
    local_rank = os.environ.get("LOCAL_RANK", "0")
    index = int(local_rank) if local_rank.isdecimal() and int(local_rank) < count else 0
    device = Device("torch", f"cuda:{index}")
    fault = _driver_fault()
    return device if fault is None else _host_instead_of(device, fault)


def usable_default(device: Device) -> Device:
    """Return a default device, or the host with one warning if torch cannot use the device.

    Initializes CUDA, so call this only before the device is used.
    """
    if not device.is_torch_cuda or is_in_worker():
        return device
    fault = _default_fault(device)
    return device if fault is None else _host_instead_of(device, fault)


@cache
def _host_instead_of(device: Device, fault: str) -> Device:
    # If the warning raises, nothing is cached, so that every use raises.
    warn(f"device='auto' uses the host instead of {device}: {fault}")
    return HOST


def cuda_fault(device: Device) -> str | None:
    """Return why torch cannot use a CUDA device, or None; initializes CUDA."""
    import torch

    try:
        torch.cuda.init()
        capability = torch.cuda.get_device_capability(device.name)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        return f"CUDA cannot be initialized ({reason})"
    # A build for ROCm names architectures differently.
    architectures = [] if torch.version.cuda is None else torch.cuda.get_arch_list()
    return _architecture_fault(capability, architectures)


_default_fault = cache(cuda_fault)


def _architecture_fault(capability: tuple[int, int], architectures: list[str]) -> str | None:
    """Return why no code of a build runs on a GPU; ``architectures`` are "sm_90", "compute_90"."""
    major, minor = capability
    for kind, digits in re.findall(r"(sm|compute)_(\d+)", " ".join(architectures)):
        # Machine code runs on later minor versions, PTX ("compute") on all later versions.
        code_major, code_minor = divmod(int(digits), 10)
        is_same_major = code_major == major and code_minor <= minor
        if is_same_major or (kind == "compute" and code_major < major):
            return None
    if not architectures:
        return None
    return (
        f"its compute capability is {major}.{minor}, and torch was built for "
        f"{', '.join(architectures)}"
    )


def _driver_fault() -> str | None:
    """Return why the driver cannot run this build of torch, or None if it can or is unknown.

    NVML, with which torch counts devices, does not initialize CUDA. Architectures are not compared:
    both get_arch_list() and torch.__config__ would keep forked children from using CUDA.
    """
    from ctypes import CDLL, byref, c_int

    import torch

    if torch.version.cuda is None:
        return None
    driver = c_int()
    try:
        nvml = CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit() or nvml.nvmlSystemGetCudaDriverVersion_v2(byref(driver)):
            return None
    except (OSError, AttributeError):
        return None
    # 12040 is CUDA 12.4. Within a major version, older drivers run newer builds.
    major, minor = driver.value // 1000, driver.value % 1000 // 10
    built_for = torch.version.cuda
    if major >= int(built_for.partition(".")[0]):
        return None
    return f"its driver supports CUDA {major}.{minor}, and torch was built for CUDA {built_for}"


def is_cuda_initialized() -> bool:
    """Whether torch has initialized CUDA in this process."""
    torch = loaded_module("torch")
    return torch is not None and torch.cuda.is_initialized()


def is_in_worker() -> bool:
    """Whether this process is a worker of a torch DataLoader, which must not use a GPU."""
    data = loaded_module("torch.utils.data")
    return data is not None and data.get_worker_info() is not None


def synchronize_stream(device: Device) -> None:
    """Block the host until the current stream of a torch CUDA device is idle."""
    if device.is_torch_cuda:
        import torch

        torch.cuda.current_stream(device.name).synchronize()


def synchronize(device: Device) -> None:
    """Block the host until all streams of a GPU are idle; do nothing for other devices."""
    if device.is_torch_cuda:
        import torch

        torch.cuda.synchronize(device.name)
    elif device.library == "cupy":
        device_handle(device).synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports that host or device memory ran out."""
    # CuPy raises a MemoryError, torch a RuntimeError. Errors of the driver, from pinned memory or
    # a kernel launch, can only be recognized by their text.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower())
    )


def check_not_in_worker(device: Device) -> None:
    """Raise RuntimeError if ``device`` is a GPU and this process is a DataLoader worker."""
    if not device.on_host and is_in_worker():
        raise RuntimeError(
            f"device must be 'numpy' or 'cpu' in a DataLoader worker, got {str(device)!r}: workers "
            "cannot return GPU arrays. Iterate in the main process, or use device='numpy'"
        )


def has_torch() -> bool:
    """Whether torch can be imported."""
    return find_spec("torch") is not None


def as_torch_device(device: Device) -> Device:
    """Return the torch device at the same location as ``device``."""
    if device.library == "torch":
        return device
    return Device("torch", "cpu" if device.on_host else f"cuda:{device.name}")


def device_context(device: Device) -> AbstractContextManager[Any]:
    """Return a context that makes ``device`` CuPy's current device; no effect for others."""
    if device.library != "cupy":
        return nullcontext()
    return cast("AbstractContextManager[Any]", device_handle(device))


def cupy_stream() -> Any:
    """Return CuPy's current stream on the current device."""
    import cupy

    return cupy.cuda.get_current_stream()


def device_handle(device: Device) -> Any:
    """Return the value to pass as ``device=`` to NumPy, torch or CuPy."""
    if device.library == "numpy":
        return "cpu"
    if device.library == "torch":
        return device.name
    import cupy

    return cupy.cuda.Device(int(device.name))
