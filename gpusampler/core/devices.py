"""Devices: which library, which name, whether it is there, and what the caller may do with it."""

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
    """Where arrays live: a library, and the name by which it knows the device.

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
        """Whether NumPy sees the memory of this device without a copy."""
        return self.name == "cpu"


HOST = Device("numpy")


def loaded_module(module: str) -> ModuleType | None:
    """Return the module if the program has imported it already, else None."""
    return sys.modules.get(module)


def parse_device(device: Any) -> Device:
    """Return the device that a user's ``device`` argument names, checked to be there.

    Parameters
    ----------
    device : str or torch.device
        "numpy", "cpu", "cuda", "cuda:1", "mps", ..., "cupy" or "cupy:1".

    Raises
    ------
    ValueError
        If the name is not known to the library.
    RuntimeError
        If the library or the device is not there, or the caller is a DataLoader's worker and the
        device is no host.
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
            f"device must be 'numpy' where torch is not installed, got {name!r}; "
            "install gpusampler[torch]"
        ) from error
    try:
        parsed = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device must be 'numpy', 'cupy', 'cupy:<index>' or a torch device, got {name!r}"
        ) from error
    if parsed.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(f"device must be there: torch sees no CUDA device, got {name!r}")
        # "cuda" is the device that this process uses, which need not be cuda:0.
        index = torch.cuda.current_device() if parsed.index is None else parsed.index
        if index >= torch.cuda.device_count():
            raise RuntimeError(
                f"device must be there: torch sees {torch.cuda.device_count()} CUDA devices, "
                f"got {name!r}"
            )
        return Device("torch", f"cuda:{index}")
    if parsed.type == "cpu":
        return Device("torch", "cpu")
    try:
        # The name in full, as arrays that lie there have it: "mps" is "mps:0".
        full_name = str(torch.empty(0, device=parsed).device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"device must be there: {reason} (got {name!r})") from error
    if parsed.type == "meta":
        raise ValueError(f"device must hold values, got {name!r}")
    return Device("torch", full_name)


def _parse_cupy(name: str) -> Device:
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            f"device must be there: cupy is not installed, got {name!r}; "
            "install gpusampler[cupy12] or gpusampler[cupy13]"
        ) from error
    _, _, index = name.partition(":")
    if index and not index.isdecimal():
        raise ValueError(f"device must be 'cupy' or 'cupy:<index>', got {name!r}")
    # `import cupy` succeeds without a driver, and with a wrong one even the question raises.
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(
            f"device must be there: cupy sees no CUDA device ({error}), got {name!r}"
        ) from error
    if int(index or 0) >= count:
        raise RuntimeError(f"device must be there: cupy sees {count} devices, got {name!r}")
    return Device("cupy", str(int(index)) if index else str(cupy.cuda.Device().id))


def default_device() -> Device:
    """Device for ids that came from no array: CUDA when torch is loaded and sees it, else NumPy."""
    torch = loaded_module("torch")
    if torch is None or is_in_worker():
        return HOST
    if torch.cuda.is_initialized():
        return Device("torch", f"cuda:{torch.cuda.current_device()}")
    # Counted without CUDA being initialised: a process that makes a sampler may fork yet.
    count = torch.cuda.device_count()
    # A rank that has set no device yet will take its own: launchers number the ranks of a machine.
    local_rank = os.environ.get("LOCAL_RANK", "0")
    index = int(local_rank) if local_rank.isdecimal() and int(local_rank) < count else 0
    return Device("torch", f"cuda:{index}") if count > 0 else HOST


def is_in_worker() -> bool:
    """Whether this process is a worker of a torch DataLoader, where no GPU may be touched."""
    data = loaded_module("torch.utils.data")
    return data is not None and data.get_worker_info() is not None


def synchronize_stream(device: Device) -> None:
    """Wait on the host for what a device has been told to do on its current stream."""
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        torch.cuda.current_stream(device.name).synchronize()


def synchronize(device: Device) -> None:
    """Wait on the host for all that a GPU has been told to do; nothing is to be waited for else."""
    if device.library == "torch" and device.name.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device.name)
    elif device.library == "cupy":
        device_handle(device).synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory has run out."""
    # CuPy's own is a MemoryError, torch's a RuntimeError. Where a driver says it by itself, of
    # pinned memory or at a kernel's start, only the text tells.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower())
    )


def check_not_in_worker(device: Device) -> None:
    """Raise RuntimeError if arrays of a GPU are about to be made in a worker of a DataLoader."""
    if not device.on_host and is_in_worker():
        raise RuntimeError(
            f"device must be the host in a worker of a DataLoader, got {str(device)!r}: a worker "
            "can hand out no arrays of a GPU. Iterate in the main process, or use device='numpy'"
        )


def has_torch() -> bool:
    """Whether torch can be imported."""
    return find_spec("torch") is not None


def as_torch_device(device: Device) -> Device:
    """Return the device by which torch knows where arrays of ``device`` are."""
    if device.library == "torch":
        return device
    return Device("torch", "cpu" if device.on_host else f"cuda:{device.name}")


def device_context(device: Device) -> AbstractContextManager[Any]:
    """Return the context in which a library's functions work on ``device``.

    CuPy makes new arrays on the current device, whatever its functions are told.
    """
    if device.library != "cupy":
        return nullcontext()
    return cast("AbstractContextManager[Any]", device_handle(device))


def cupy_stream() -> Any:
    """Return CuPy's current stream on the current device."""
    import cupy

    return cupy.cuda.get_current_stream()


def device_handle(device: Device) -> Any:
    """Return what the library's own functions take as ``device=``."""
    if device.library == "numpy":
        return "cpu"
    if device.library == "torch":
        return device.name
    import cupy

    return cupy.cuda.Device(int(device.name))
