"""Devices: parsing and availability, synchronization, and use in DataLoader workers."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, cast

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
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"device={name!r} requested, but torch finds no CUDA device. Check nvidia-smi and "
                "that torch was built with CUDA, or pass device='cpu'."
            )
        # "cuda" is the current device of this process, which may differ from cuda:0.
        index = torch.cuda.current_device() if parsed.index is None else parsed.index
        count = torch.cuda.device_count()
        if index >= count:
            raise RuntimeError(
                f"device={name!r} requested, but torch finds {count} CUDA device(s). Pass an index "
                f"below {count}."
            )
        return Device("torch", f"cuda:{index}")
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
    """Return the default device: CUDA if torch is imported and finds it, else NumPy."""
    torch = loaded_module("torch")
    if torch is None or is_in_worker():
        return HOST
    if torch.cuda.is_initialized():
        return Device("torch", f"cuda:{torch.cuda.current_device()}")
    # device_count() does not initialize CUDA, so the process can still fork.
    count = torch.cuda.device_count()
    # A rank that has not set its device yet will use the one of its local rank.
    local_rank = os.environ.get("LOCAL_RANK", "0")
    index = int(local_rank) if local_rank.isdecimal() and int(local_rank) < count else 0
    return Device("torch", f"cuda:{index}") if count > 0 else HOST


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
