"""Array operations that differ between NumPy, torch and CuPy: dtypes, copies, gathers and sorts.

torch and CuPy are imported only when one of their arrays or devices is used. The algorithms in
other modules take the array namespace from here and do not depend on the library.
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
MAX_SHORT_ROW = 512
"""Rows of up to this many bytes are gathered by NumPy, also those of torch's tensors."""
MAX_PINNED_BYTES = 1 << 25
"""Largest array that `upload` copies through pinned memory."""


def library_of(obj: Any) -> Library | None:
    """Return the library of an array, or None if ``obj`` is not an array."""
    if isinstance(obj, np.ndarray):
        return "numpy"
    torch = loaded_module("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        return "torch"
    cupy = loaded_module("cupy")
    if cupy is not None and isinstance(obj, cupy.ndarray):
        return "cupy"
    return None


def is_numpy(array: Any) -> bool:
    """Whether an object is a NumPy array."""
    return isinstance(array, np.ndarray)


def dtype_name(array: Any) -> str:
    """Return the name of an array's dtype, such as "int64", without its byte order."""
    name = getattr(array.dtype, "name", None)
    return str(array.dtype).rpartition(".")[2] if name is None else str(name)


def is_integer(array: Any) -> bool:
    """Whether an array holds integers; False for booleans."""
    return dtype_name(array).startswith(("int", "uint"))


def is_numeric(array: Any) -> bool:
    """Whether an array is dense and holds numbers or booleans (False if masked, sparse, ...)."""
    library = library_of(array)
    if library == "torch":
        import torch

        if array.is_nested or array.is_quantized or array.is_meta:
            return False
        dense: bool = array.layout == torch.strided
        return dense
    return array.dtype.kind in "biufc" and not isinstance(array, np.ma.MaskedArray)


def has_dtype(library: Library, name: str) -> bool:
    """Whether a library supports a numeric dtype of this name."""
    if library == "torch":
        import torch

        return isinstance(getattr(torch, name, None), torch.dtype)
    try:
        dtype = np.dtype(name)
    except TypeError:
        return False
    # CuPy supports NumPy's numeric dtypes except longdouble and clongdouble.
    return dtype.kind in "biufc" and (library == "numpy" or dtype.char not in "gG")


def as_signed(array: Any) -> Any:
    """Return an int64 view of a uint64 array."""
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
    # NumPy 2.1 and later provides every function itself. Importing array_api_compat.numpy would
    # import every NumPy module and take most of the time of a first batch.
    if device.library == "numpy" and hasattr(np, "cumulative_sum"):
        return np
    return import_module(f"array_api_compat.{device.library}")


def reference_namespace(device: Device) -> Any:
    """Return the array functions of `ArrayEvaluator`, in a form that torch.compile can trace."""
    # torch.compile would trace the dispatch code of array-api-compat and warn about its caches.
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
    """Make glibc reuse the memory of freed arrays of up to 32 MiB; no effect on other systems."""
    # By default glibc maps every array above 128 KiB anew, and zeroing its pages costs more than
    # the computation. The threshold rises to the size of the largest freed array.
    np.empty(31 << 20, np.uint8)


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array as NumPy: a view if it is on the host, else a copy."""
    library = library_of(array)
    if library == "torch":
        return np.asarray(array.detach().cpu().numpy())
    if library == "cupy":
        return np.asarray(array.get())
    return np.asarray(array)


def to_device(array: Any, device: Device) -> Any:
    """Return an array on ``device``: itself or a view if possible, else a copy."""
    if device_of(array) == device:
        return array
    if device.library == "numpy":
        return to_numpy(array)
    if device.library == "torch":
        import torch

        if library_of(array) == "cupy":
            # CuPy lets torch wait for the current stream of the current device.
            with device_context(device_of(array)):
                return torch.utils.dlpack.from_dlpack(array).to(device.name)
        tensor = array if library_of(array) == "torch" else _from_numpy(array)
        return tensor.to(device.name)
    import cupy

    with device_context(device):
        if library_of(array) == "torch" and array.is_cuda:
            return cupy.from_dlpack(array)
        return cupy.asarray(to_numpy(array))


def _from_numpy(array: NDArray[Any]) -> Any:
    # torch warns about read-only memory, because it could write to it, and does not support
    # negative strides.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return tensor_from_numpy(array)


def tensor_from_numpy(array: NDArray[Any]) -> Any:
    """Return a torch tensor that shares the memory of a writable NumPy array."""
    import torch

    return torch.from_numpy(array)


def upload(array: NDArray[Any], device: Device) -> Any:
    """Copy a NumPy array to ``device``, asynchronously if possible.

    The caller may change the array as soon as this returns.
    """
    array = np.ascontiguousarray(array)
    if device.is_torch_cuda:
        tensor = _from_numpy(array)
        if array.nbytes <= MAX_PINNED_BYTES:
            # torch does not reuse the pinned buffer until the copy is done.
            tensor = tensor.pin_memory()
        # An asynchronous copy from pageable memory returns only after it has read that memory.
        return tensor.to(device.name, non_blocking=True)
    # CuPy copies through its own pinned memory.
    return to_device(array, device)


def as_contiguous(array: Any) -> Any:
    """Return a 1-D array if it is contiguous, else a contiguous copy on its device."""
    if library_of(array) == "torch":
        return array.contiguous()
    if array.flags.c_contiguous:
        return array
    with device_context(device_of(array)):
        return array.copy()


def stable_argsort(array: Any) -> Any:
    """Return the stable ascending argsort of a 1-D array as int64, on its device."""
    device = device_of(array)
    with device_context(device):
        # The libraries' own methods differ in arguments and in whether they are stable by default.
        return namespace(device).argsort(array, stable=True)


def unique_consecutive(array: Any) -> tuple[Any, Any]:
    """Return (values, int64 lengths), shape (R,), of the R runs of equal values; R may be 0."""
    device = device_of(array)
    if device.library == "torch":
        import torch

        values, counts = torch.unique_consecutive(array, return_counts=True)
        return values, counts
    xp = namespace(device)
    size = int(array.shape[0])
    with device_context(device):
        if size == 0:
            return array, xp.zeros(0, dtype=xp.int64)
        starts = xp.flatnonzero(array[1:] != array[:-1]) + 1
        starts = xp.concat([xp.zeros(1, dtype=xp.int64), starts])
        counts = xp.diff(starts, append=xp.full(1, size, dtype=xp.int64))
        return array[starts], counts


def to_index(index: Any, device: Device) -> Any:
    """Return int64 row indices as an array that `take_rows` accepts for arrays on ``device``."""
    if device.library == "numpy" or device.on_host:
        return index if library_of(index) == "numpy" else to_numpy(index)
    return upload(index, device) if library_of(index) == "numpy" else to_device(index, device)


def take_rows(array: Any, index: Any) -> Any:
    """Return a new array of the rows at ``index``, which `to_index` made for the array's device.

    Raise IndexError for an index outside the array. On a GPU indices are not checked, which would
    wait for the device: the sampler has checked its samples before it uploads them.
    """
    library = library_of(array)
    if library == "torch":
        import torch

        if library_of(index) == "numpy":
            rows = _numpy_view_of_short_rows(array)
            if rows is not None:
                _check_rows(index, rows.shape[0])
                return torch.from_numpy(np.take(rows, index, axis=0, mode="clip"))
            index = _from_numpy(index)
        return torch.index_select(_selectable(array), 0, index).view(array.dtype)
    if library == "cupy":
        with device_context(device_of(array)):
            return array.take(index, axis=0)
    _check_rows(index, array.shape[0])
    if not array.flags.c_contiguous:
        # np.take would first copy the whole array.
        return array[index]
    return np.take(array, index, axis=0, mode="clip")


def _check_rows(index: Int64, num_rows: int) -> None:
    """Raise IndexError unless all indices are in 0 .. num_rows - 1.

    NumPy's own mode "raise" takes negative indices, and copies through a buffer.
    """
    if not are_indices(index, num_rows):
        wrong = index[(index < 0) | (index >= num_rows)]
        raise IndexError(f"samples must be in 0 .. {num_rows - 1}, got {int(wrong[0])}")


def are_indices(numbers: Int64, size: int) -> bool:
    """Return whether all numbers, int64 of shape (T,), are in 0 .. size - 1."""
    # As unsigned numbers, negative ones are too large.
    return not numbers.size or int(numbers.view(np.uint64).max()) < size


def _numpy_view_of_short_rows(tensor: Any) -> Any:
    """Return a view of a host tensor in NumPy, which gathers short rows faster; None if not short.

    torch gathers long rows with several threads.
    """
    is_lazy = tensor.is_conj() or tensor.is_neg()
    if is_lazy or not tensor.is_contiguous() or tensor.stride(0) * tensor.itemsize > MAX_SHORT_ROW:
        return None
    try:
        return tensor.numpy()
    except TypeError:
        # NumPy has no bfloat16, for example.
        return None


def _selectable(tensor: Any) -> Any:
    """View uint16/32/64 tensors as signed, because torch cannot gather unsigned ones."""
    import torch

    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    return tensor.view(signed[tensor.dtype]) if tensor.dtype in signed else tensor


def take_rows_into(pinned: Any, array: Any, index: Int64) -> None:
    """Gather rows of a host array into pinned memory, a 1-D buffer of exactly their size.

    Raise IndexError for an index outside the array.
    """
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
    _check_rows(index, array.shape[0])
    if array.flags.c_contiguous:
        np.take(array, index, axis=0, out=rows, mode="clip")
    else:
        rows[...] = array[index]


def split_rows(array: Any, sizes: list[int]) -> list[Any]:
    """Split an array into consecutive views of ``sizes`` rows; the sizes add up to its length."""
    if library_of(array) == "torch":
        import torch

        # One call is several times as fast as separate slices. "unsafe" skips what autograd records
        # of views, and rows have no gradients here.
        return list(torch.unsafe_split_with_sizes(array, sizes))
    views, start = [], 0
    for size in sizes:
        views.append(array[start : start + size])
        start += size
    if start != array.shape[0]:
        raise ValueError(f"sizes must add up to {array.shape[0]} rows, got {start}")
    return views


def repeat_rows(counts: Any, total: int) -> Any:
    """Return each row number i repeated ``counts[i]`` times, ascending: int64, shape (total,).

    ``total`` must be the sum of ``counts``; passing it avoids a device synchronization.
    """
    device = device_of(counts)
    if device.library == "torch":
        import torch

        return torch.repeat_interleave(counts, output_size=total)
    xp = namespace(device)
    with device_context(device):
        # Count the row ends at or before each element: cupy.repeat would need the counts on the
        # host.
        lanes = xp.arange(total, dtype=xp.int64)
        return xp.searchsorted(xp.cumulative_sum(counts), lanes, side="right")


def narrowest_dtype(library: Library, values: int) -> tuple[str, int]:
    """Return the narrowest sortable dtype for 0 .. values - 1, and an offset to add to the values.

    uint8 is the only unsigned dtype that torch sorts, so for torch up to 2**16 values become int16,
    shifted by -2**15.
    """
    if values <= 1 << 8:
        return "uint8", 0
    if values <= 1 << 16:
        return ("int16", -(1 << 15)) if library == "torch" else ("uint16", 0)
    if values <= 1 << 31:
        return "int32", 0
    return "int64", 0
