"""Array operations in which NumPy, torch and CuPy differ: kinds, copies, gathers and sorts.

Neither torch nor CuPy is imported until an array of theirs, or a device of theirs, is met. The
algorithms elsewhere take the namespace from here and never ask which library it is.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.devices import HOST, Device, Library, device_context, loaded_module

Int64 = NDArray[np.int64]
MAX_PINNED_BYTES = 1 << 25
"""Largest array that is put into pinned memory for one upload."""


def library_of(obj: Any) -> Library | None:
    """Return the array library that ``obj`` is an array of, or None."""
    if isinstance(obj, np.ndarray):
        return "numpy"
    torch = loaded_module("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        return "torch"
    cupy = loaded_module("cupy")
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


def is_numeric(array: Any) -> bool:
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
        dtype = np.dtype(name)
    except TypeError:
        return False
    # CuPy has NumPy's, but for what a GPU has no numbers for.
    return dtype.kind in "biufc" and (library == "numpy" or dtype.char not in "gG")


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

    with device_context(device):
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
        if array.nbytes <= MAX_PINNED_BYTES:
            # The allocator of pinned memory keeps it until the copy is done.
            tensor = tensor.pin_memory()
        # Pageable memory has been read when an asynchronous copy of it returns.
        return tensor.to(device.name, non_blocking=True)
    # CuPy copies by way of pinned memory of its own.
    return to_device(array, device)


def as_contiguous(array: Any) -> Any:
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
    """Return int64 row numbers in the form that `take_rows` takes on a device."""
    if device.library == "numpy" or device.on_host:
        return index if library_of(index) == "numpy" else to_numpy(index)
    return upload(index, device) if library_of(index) == "numpy" else to_device(index, device)


def take_rows(array: Any, index: Any) -> Any:
    """Return rows of an array, by `to_index` of its device: a new array of its library."""
    library = library_of(array)
    if library == "torch":
        import torch

        if library_of(index) == "numpy":
            index = _from_numpy(index)
        return torch.index_select(_selectable(array), 0, index).view(array.dtype)
    if library == "cupy":
        with device_context(device_of(array)):
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


def take_rows_into(pinned: Any, array: Any, index: Int64) -> None:
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


def split_rows(array: Any, sizes: list[int]) -> list[Any]:
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


def narrowest_dtype(library: Library, values: int) -> tuple[str, int]:
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
