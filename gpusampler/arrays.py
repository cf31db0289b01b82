"""What array libraries differ in: which one an array belongs to, where it is, copies and gathers.

Neither torch nor CuPy is imported until an array of theirs, or a device of theirs, is met. The
algorithms elsewhere take the namespace from here and never ask which library it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

Library = Literal["numpy", "torch", "cupy"]
Int64 = NDArray[np.int64]


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

PINNED_BYTES = 1 << 25
"""Largest array that is put into pinned memory for one upload."""


def loaded(module: str) -> ModuleType | None:
    """Return the module if the program has imported it already, else None."""
    return sys.modules.get(module)


def library_of(obj: Any) -> Library | None:
    """Return the array library that ``obj`` is an array of, or None."""
    if isinstance(obj, np.ndarray):
        return "numpy"
    torch = loaded("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        return "torch"
    cupy = loaded("cupy")
    if cupy is not None and isinstance(obj, cupy.ndarray):
        return "cupy"
    return None


def dtype_name(array: Any) -> str:
    """Return the name of an array's dtype, such as "int64", in any byte order."""
    name = getattr(array.dtype, "name", None)
    return str(array.dtype).rpartition(".")[2] if name is None else str(name)


def is_integer(array: Any) -> bool:
    """Whether an array holds integers; booleans are none."""
    return dtype_name(array).startswith(("int", "uint"))


def is_numbers(array: Any) -> bool:
    """Whether every element of an array is a number or a boolean that lies in its memory."""
    library = library_of(array)
    if library == "torch":
        import torch

        if array.is_nested or array.is_quantized or array.is_meta:
            return False
        dense: bool = array.layout == torch.strided
        return dense
    return array.dtype.kind in "biufc" and not isinstance(array, np.ma.MaskedArray)


def has_dtype(library: Library, name: str) -> bool:
    """Whether a library has numbers of a dtype, by its name."""
    if library == "torch":
        import torch

        return isinstance(getattr(torch, name, None), torch.dtype)
    try:
        known = np.dtype(name)
    except TypeError:
        return False
    # CuPy has NumPy's, but for what a GPU has no numbers for.
    return known.kind in "biufc" and (library == "numpy" or known.char not in "gG")


def as_signed(array: Any) -> Any:
    """Return the bits of a uint64 array as int64, without a copy."""
    if library_of(array) == "torch":
        import torch

        return array.view(torch.int64)
    return array.view(np.int64)


def device_of(array: Any) -> Device:
    """Return the device of a NumPy, torch or CuPy array."""
    library = library_of(array)
    if library == "numpy":
        return HOST
    if library == "torch":
        return Device("torch", str(array.device))
    if library == "cupy":
        return Device("cupy", str(array.device.id))
    raise TypeError(f"expected a numpy, torch or cupy array, got {type(array).__name__}")


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
        there = str(torch.empty(0, device=parsed).device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"device must be there: {reason} (got {name!r})") from error
    if parsed.type == "meta":
        raise ValueError(f"device must hold values, got {name!r}")
    return Device("torch", there)


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
    torch = loaded("torch")
    if torch is None or in_worker():
        return HOST
    if torch.cuda.is_initialized():
        return Device("torch", f"cuda:{torch.cuda.current_device()}")
    # Counted without CUDA being initialised: a process that makes a sampler may fork yet.
    count = torch.cuda.device_count()
    # A rank that has set no device yet will take its own: launchers number the ranks of a machine.
    local_rank = os.environ.get("LOCAL_RANK", "0")
    own = int(local_rank) if local_rank.isdecimal() and int(local_rank) < count else 0
    return Device("torch", f"cuda:{own}") if count > 0 else HOST


def in_worker() -> bool:
    """Whether this process is a worker of a torch DataLoader, where no GPU may be touched."""
    data = loaded("torch.utils.data")
    return data is not None and data.get_worker_info() is not None


def is_compiling() -> bool:
    """Whether torch.compile is tracing the caller."""
    torch = loaded("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def check_counter(value: Any, name: str, device: Device) -> None:
    """Raise unless ``value`` is a 0-d int64 tensor on a device of torch's."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a 0-d int64 tensor, got {type(value).__name__}")
    if value.dtype != torch.int64 or value.ndim != 0:
        raise TypeError(
            f"{name} must be a 0-d int64 tensor, got {value.dtype} of shape {tuple(value.shape)}"
        )
    if value.device != torch.device(device.name):
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def wait_for(device: Device) -> None:
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


def untraced(function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that torch.compile runs as it stands."""
    import torch

    compiler: Any = torch.compiler
    disabled: Callable[[], None] = compiler.disable(function)
    return disabled


def keep_in_place(array: Any) -> None:
    """Tell torch.compile that a tensor stays where it is.

    Graphs that it captures would otherwise copy the tensor, however large, at every replay.
    """
    from torch._dynamo import mark_static_address

    mark_static_address(array)


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
    if not device.on_host and in_worker():
        raise RuntimeError(
            f"device must be the host in a worker of a DataLoader, got {str(device)!r}: a worker "
            "can hand out no arrays of a GPU. Iterate in the main process, or use device='numpy'"
        )


def has_torch() -> bool:
    """Whether torch can be imported."""
    return find_spec("torch") is not None


def on_torch(device: Device) -> Device:
    """Return the device by which torch knows where arrays of ``device`` are."""
    if device.library == "torch":
        return device
    return Device("torch", "cpu" if device.on_host else f"cuda:{device.name}")


def namespace(device: Device) -> Any:
    """Return the array-api-compat namespace of a device's library."""
    # NumPy has all of it itself by now; its namespace of array-api-compat takes every module of
    # NumPy's along, which is most of the time that a first batch would take.
    if device.library == "numpy" and hasattr(np, "cumulative_sum"):
        return np
    return import_module(f"array_api_compat.{device.library}")


def reference_namespace(device: Device) -> Any:
    """Return the functions that the reference evaluation uses, in a form that can be compiled.

    array-api-compat's, but for torch, where torch.compile takes its dispatch for code to trace
    (and warns of the caches in it): there the same functions are torch's own.
    """
    if device.library != "torch":
        return namespace(device)
    import torch

    return SimpleNamespace(
        int32=torch.int32,
        int64=torch.int64,
        arange=torch.arange,
        astype=lambda x, dtype, copy=True: x.to(dtype, copy=copy),
        broadcast_arrays=torch.broadcast_tensors,
        cumulative_sum=lambda x: torch.cumsum(x, 0),
        minimum=torch.minimum,
        reshape=torch.reshape,
        searchsorted=torch.searchsorted,
        where=torch.where,
    )


def on(device: Device) -> AbstractContextManager[Any]:
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


@cache
def reuse_temporaries() -> None:
    """Let the allocator keep what arrays of up to 32 MiB leave, for those that come after.

    By default glibc takes each array above 128 KiB from the system anew, which fills it with zeros
    page by page: more work than what is done with a chunk that lies in cache. Its limit rises to
    the largest array that was given back, so one is. Elsewhere this is of no effect.
    """
    np.empty(31 << 20, np.uint8)


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array as NumPy: the same memory where it is on the host, else one copy."""
    library = library_of(array)
    if library == "torch":
        return np.asarray(array.detach().cpu().numpy())
    if library == "cupy":
        return np.asarray(array.get())
    return np.asarray(array)


def to_device(array: Any, device: Device) -> Any:
    """Return an array on ``device``: itself or the same memory where it can be, else one copy."""
    if device_of(array) == device:
        return array
    if device.library == "numpy":
        return to_numpy(array)
    if device.library == "torch":
        import torch

        if library_of(array) == "cupy":
            return torch.utils.dlpack.from_dlpack(array).to(device.name)
        tensor = array if library_of(array) == "torch" else _from_numpy(array)
        return tensor.to(device.name)
    import cupy

    with on(device):
        if library_of(array) == "torch" and array.is_cuda:
            return cupy.from_dlpack(array)
        return cupy.asarray(to_numpy(array))


def _from_numpy(array: NDArray[Any]) -> Any:
    # torch warns of, and could write through, a view of read-only memory; it knows no negative
    # strides.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return tensor_from_numpy(array)


def tensor_from_numpy(array: NDArray[Any]) -> Any:
    """Return a host torch tensor over the memory of a writable NumPy array."""
    import torch

    return torch.from_numpy(array)


def upload(array: NDArray[Any], device: Device) -> Any:
    """Return a NumPy array on ``device`` without waiting for the device, where that is possible.

    The array may be changed as soon as this returns.
    """
    array = np.ascontiguousarray(array)
    if device.library == "torch" and device.name.startswith("cuda"):
        tensor = _from_numpy(array)
        if array.nbytes <= PINNED_BYTES:
            # The allocator of pinned memory keeps it until the copy is done.
            tensor = tensor.pin_memory()
        # Pageable memory has been read when an asynchronous copy of it returns.
        return tensor.to(device.name, non_blocking=True)
    # CuPy copies by way of pinned memory of its own.
    return to_device(array, device)


def contiguous(array: Any) -> Any:
    """Return a 1-D array whose elements lie side by side: itself, or a copy on its device."""
    if library_of(array) == "torch":
        return array.contiguous()
    return array if array.flags.c_contiguous else array.copy()


def stable_argsort(array: Any) -> Any:
    """Return the stable ascending argsort of a 1-D array as int64, on its device."""
    # Libraries differ in what their own method takes, and in whether its default is stable.
    return namespace(device_of(array)).argsort(array, stable=True)


def unique_consecutive(array: Any) -> tuple[Any, Any]:
    """Return the value and the length of every run of equal neighbours in a 1-D array.

    Parameters
    ----------
    array : integer array, shape (N,)
        Of any library; N may be 0.

    Returns
    -------
    values : array of the same dtype, shape (R,)
    counts : int64 array, shape (R,)
        Both on the device of ``array``.
    """
    device = device_of(array)
    if device.library == "torch":
        import torch

        values, counts = torch.unique_consecutive(array, return_counts=True)
        return values, counts
    xp = namespace(device)
    size = int(array.shape[0])
    if size == 0:
        return array, xp.zeros(0, dtype=xp.int64)
    starts = xp.flatnonzero(array[1:] != array[:-1]) + 1
    starts = xp.concat([xp.zeros(1, dtype=xp.int64), starts])
    counts = xp.diff(starts, append=xp.full(1, size, dtype=xp.int64))
    return array[starts], counts


def to_index(index: Any, device: Device) -> Any:
    """Return int64 row numbers in the form that `take` takes on a device."""
    if device.library == "numpy" or device.on_host:
        return index if library_of(index) == "numpy" else to_numpy(index)
    return upload(index, device) if library_of(index) == "numpy" else to_device(index, device)


def take(array: Any, index: Any) -> Any:
    """Return rows of an array, by `to_index` of its device: a new array of its library."""
    library = library_of(array)
    if library == "torch":
        import torch

        if library_of(index) == "numpy":
            index = _from_numpy(index)
        return torch.index_select(_selectable(array), 0, index).view(array.dtype)
    if library == "cupy":
        with on(device_of(array)):
            return array.take(index, axis=0)
    if not array.flags.c_contiguous:
        # np.take would first copy the whole of it.
        return array[index]
    # The numbers are known to be rows; "raise" would copy by way of a buffer.
    return np.take(array, index, axis=0, mode="clip")


def _selectable(tensor: Any) -> Any:
    """Return a tensor as a type that torch gathers: its wide unsigned ones as signed."""
    import torch

    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    return tensor.view(signed[tensor.dtype]) if tensor.dtype in signed else tensor


def take_into(pinned: Any, array: Any, index: Int64) -> None:
    """Gather rows of a host array into pinned memory, which is flat and of their size."""
    shape = (index.size, *array.shape[1:])
    if library_of(array) == "torch":
        import torch

        flat = pinned if library_of(pinned) == "torch" else torch.from_numpy(pinned)
        source = _selectable(array.detach())
        rows = flat.view(source.dtype).view(shape)
        torch.index_select(source, 0, _from_numpy(index), out=rows)
        return
    flat = pinned.numpy() if library_of(pinned) == "torch" else pinned
    rows = flat.reshape(shape)
    if array.flags.c_contiguous:
        np.take(array, index, axis=0, out=rows, mode="clip")
    else:
        rows[...] = array[index]


def split(array: Any, sizes: list[int]) -> list[Any]:
    """Return views of an array, side by side, of these numbers of rows (they add up to its own)."""
    if library_of(array) == "torch":
        # One call for all of them: a slice at a time costs several times as much.
        if sizes and sizes.count(sizes[0]) == len(sizes):
            return list(array.unflatten(0, (len(sizes), sizes[0])).unbind())
        return list(array.split(sizes))
    views, start = [], 0
    for size in sizes:
        views.append(array[start : start + size])
        start += size
    return views


def repeat_rows(counts: Any, total: int) -> Any:
    """Return each row's number as often as its count says, end to end: int64, shape (total,).

    ``total`` is the sum of ``counts``; knowing it beforehand spares a device a synchronisation.
    """
    device = device_of(counts)
    if device.library == "torch":
        import torch

        return torch.repeat_interleave(counts, output_size=total)
    xp = namespace(device)
    # The number of row ends at or before a lane: counts may lie on a device, so no np.repeat.
    lanes = xp.arange(total, dtype=xp.int64)
    return xp.searchsorted(xp.cumulative_sum(counts), lanes, side="right")


def narrowest(library: Library, values: int) -> tuple[str, int]:
    """Return the narrowest dtype that can be sorted and holds 0 .. values - 1, and its shift.

    torch sorts no unsigned type but uint8, so 2**15 .. 2**16 values go into int16 shifted down.
    """
    if values <= 1 << 8:
        return "uint8", 0
    if values <= 1 << 16:
        return ("int16", -(1 << 15)) if library == "torch" else ("uint16", 0)
    if values <= 1 << 31:
        return "int32", 0
    return "int64", 0
