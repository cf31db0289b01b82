"""CuPy on a machine with two GPUs, played by NumPy: it raises where CuPy would leave a device.

CuPy allocates and computes on the current device. A kernel that gets an array of another device
raises, or is slow where the GPUs can read each other's memory. Here it always raises.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

NUM_DEVICES = 2


class WrongDeviceError(AssertionError):
    """An array was used while another device was current."""


class Device:
    """A device, and the context that makes it current."""

    current = 0

    def __init__(self, index: int | None = None) -> None:
        self.id = Device.current if index is None else index
        self._previous: list[int] = []

    def __enter__(self) -> Device:
        self._previous.append(Device.current)
        Device.current = self.id
        return self

    def __exit__(self, *error: object) -> None:
        Device.current = self._previous.pop()

    def synchronize(self) -> None:
        pass

    @property
    def mem_info(self) -> tuple[int, int]:
        return 1 << 34, 1 << 35


def check(value: Any) -> Any:
    """Return what an operation reads as NumPy, after a check that its device is current."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(check, value))
    if not isinstance(value, Array):
        # CuPy takes no arrays of NumPy.
        if isinstance(value, np.ndarray):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return value
    if value.device.id != Device.current:
        raise WrongDeviceError(f"device {Device.current} reads an array of {value.device.id}")
    return value.get()


def made(value: Any) -> Any:
    """Return what an operation has computed as an array on the current device."""
    if isinstance(value, tuple):
        return tuple(map(made, value))
    is_array = isinstance(value, np.generic | np.ndarray)
    return Array(np.asarray(value), Device.current) if is_array else value


class Array:
    """`cupy.ndarray`."""

    def __init__(self, values: np.ndarray, device: int) -> None:
        self._values = values
        self.device = Device(device)

    def get(self) -> np.ndarray:
        return self._values

    def _view(self, values: np.ndarray) -> Array:
        return Array(values, self.device.id)

    @property
    def flags(self) -> Any:
        return self._values.flags

    shape = property(lambda self: self._values.shape)
    size = property(lambda self: self._values.size)
    ndim = property(lambda self: self._values.ndim)
    dtype = property(lambda self: self._values.dtype)
    itemsize = property(lambda self: self._values.itemsize)
    nbytes = property(lambda self: self._values.nbytes)
    strides = property(lambda self: self._values.strides)

    def reshape(self, *shape: Any) -> Array:
        return self._view(self._values.reshape(*shape))

    def view(self, dtype: Any) -> Array:
        return self._view(self._values.view(dtype))

    def copy(self) -> Any:
        return made(check(self).copy())

    def min(self) -> Any:
        return made(check(self).min())

    def take(self, index: Any, axis: int | None = None) -> Any:
        return made(check(self).take(check(index), axis=axis))

    def __getitem__(self, key: Any) -> Any:
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(part, (Array, np.ndarray, list)) for part in parts):
            return made(check(self)[check(key)])
        return self._view(self._values[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        check(self)[check(key)] = check(value)

    def __iter__(self) -> Iterator[Any]:
        return map(self._view, self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __int__(self) -> int:
        return int(self._values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


def _operator(name: str) -> Any:
    def operate(array: Array, *others: Any) -> Any:
        return made(getattr(check(array), name)(*map(check, others)))

    return operate


for _name in ["add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"]:
    for _prefix in ("", "r"):
        setattr(Array, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))
for _name in ["eq", "ne", "lt", "le", "gt", "ge", "neg", "invert"]:
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))
Array.__hash__ = object.__hash__  # type: ignore[method-assign]


class Namespace(ModuleType):
    """`array_api_compat.cupy`: NumPy's functions, on the current device.

    Like array-api-compat 1.16, only `asarray` heeds ``device``.
    """

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name)
        if not callable(function) or isinstance(function, type):
            return function

        def call(*args: Any, device: Device | None = None, **kwargs: Any) -> Any:
            if device is not None and name == "asarray":
                with device:
                    return call(*args, **kwargs)
            arguments = {key: check(value) for key, value in kwargs.items()}
            if name == "asarray" and not isinstance(args[0], Array):
                # The one function that takes arrays of NumPy.
                return made(np.array(args[0], **arguments))
            return made(function(*map(check, args), **arguments))

        return call


class Stream:
    """A stream, which takes notes only."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr
        self.waited: list[Any] = []

    def record(self) -> tuple[str, int]:
        return "event", self.ptr

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


@contextmanager
def two_gpus(monkeypatch: Any) -> Iterator[ModuleType]:
    """Install the fake as ``cupy`` and ``array_api_compat.cupy``; device 0 is current.

    ``cuda.stream`` of the yielded module is the current stream.
    """
    cupy: Any = Namespace("cupy")
    cupy.ndarray = Array
    cupy.cuda = ModuleType("cupy.cuda")
    cupy.cuda.Device = Device
    cupy.cuda.stream = Stream(0)
    cupy.cuda.get_current_stream = lambda: cupy.cuda.stream
    cupy.cuda.runtime = ModuleType("cupy.cuda.runtime")
    cupy.cuda.runtime.getDeviceCount = lambda: NUM_DEVICES
    cupy.cuda.runtime.CUDARuntimeError = RuntimeError
    cupy.get_default_memory_pool = _Pool
    monkeypatch.setattr(Device, "current", 0)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", Namespace("array_api_compat.cupy"))
    yield cupy
    assert Device.current == 0


class _Pool:
    def free_bytes(self) -> int:
        return 0

    def used_bytes(self) -> int:
        return 0
