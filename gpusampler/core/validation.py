"""Argument checks; every error names the argument, the rule and the value."""

from __future__ import annotations

import errno
import functools
import operator
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays, files
from gpusampler.core.arrays import Int64
from gpusampler.core.text import short_repr

F = TypeVar("F", bound=Callable[..., Any])


def explain_keywords(advice: Mapping[str, str]) -> Callable[[F], F]:
    """Return a decorator that raises TypeError with advice for arguments of other libraries."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in advice:
                    owner = function.__qualname__.removesuffix(".__init__")
                    raise TypeError(f"{owner} has no argument {name}: {advice[name]}")
            return function(*args, **kwargs)

        return cast(F, checked)

    return decorate


def check_int(value: Any, name: str, *, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int, ``low <= value < high``, or raise; booleans are rejected."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an int, got {short_repr(value)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {short_repr(value)}") from None
    if number < low:
        raise ValueError(f"{name} must be >= {low}, got {short_repr(number)}")
    if high is not None and number >= high:
        raise ValueError(f"{name} must be < {high}, got {short_repr(number)}")
    return number


def check_real(
    value: Any,
    name: str,
    rule: str,
    is_allowed: Callable[[Any], Any],
    *,
    is_sequence: bool = False,
    kind: str = "",
) -> Any:
    """Return a real number as an int or float, or a sequence of them as a float64 array.

    Raises ValueError "``name`` must ``rule``, got ..." unless ``is_allowed`` is true for the number
    or for all elements, and TypeError "``name`` must be ``kind``, got ..." for other types,
    booleans included.
    """
    numbers: Any = None
    if is_sequence:
        with suppress(TypeError, ValueError):
            numbers = np.asarray(list(value), np.float64)
    elif isinstance(value, Real) and not isinstance(value, bool):
        # A Python number: with a NumPy scalar, the rule's bounds would be cast to its dtype.
        numbers = int(value) if isinstance(value, Integral) else float(value)
    if numbers is None:
        kind = kind or ("a sequence of numbers" if is_sequence else "a number")
        raise TypeError(f"{name} must be {kind}, got {short_repr(value)}")
    if not np.all(is_allowed(numbers)):
        raise ValueError(f"{name} must {rule}, got {short_repr(value)}")
    return numbers


def is_mapping(value: Any) -> bool:
    """Whether ``value`` is a mapping, or has keys like one, as a pandas Series does."""
    return isinstance(value, Mapping) or hasattr(value, "keys")


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return ``seed`` as an int in 0 .. 2**64 - 1, or raise."""
    return check_int(seed, name, low=0, high=1 << 64)


def check_bool(value: Any, name: str) -> bool:
    """Return ``value`` as a bool, or raise TypeError."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {short_repr(value)}")


def check_path(value: Any, name: str = "path") -> Path:
    """Return ``value`` as a Path, or raise if it is a folder or is not in an existing folder."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a str or an os.PathLike[str], got {short_repr(value)}")
    path, path_text = Path(value), os.fspath(value)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{name} must be a file, got a folder", path_text)
    if not path.parent.exists():
        raise FileNotFoundError(errno.ENOENT, f"{name} must be in an existing folder", path_text)
    if not path.parent.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, f"{name} must be in a folder, but its parent is a file", path_text
        )
    files.check_regular(path, missing_ok=True)
    return path


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``, or raise ValueError."""
    if isinstance(value, str) and value in choices:
        return value
    choice_list = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"{name} must be one of {choice_list}, got {short_repr(value)}")


def check_ids(ids: Any) -> Any:
    """Return patch ids as a non-empty 1-D integer array whose values fit in int64, or raise."""
    ids = check_id_array(ids)
    _check_fits(ids, "ids")
    return ids


def check_id_shape(shape: tuple[int, ...], name: str = "ids") -> int:
    """Return the number of ids in an array of this shape; ValueError if not 1-D or empty."""
    if len(shape) != 1:
        advice = ""
        if len(shape) == 2:
            advice = ". If each row is one id, pass [tuple(row) for row in ids]"
        raise ValueError(f"{name} must be 1-D, one id per sample, got shape {tuple(shape)}{advice}")
    if shape[0] == 0:
        raise ValueError(f"{name} must name at least one sample, got none")
    return int(shape[0])


def check_id_array(ids: Any, name: str = "ids") -> Any:
    """Like `check_ids`, but without checking that uint64 values fit in int64."""
    original = ids
    ids = as_array(ids, name)
    if isinstance(ids, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must not be a masked array; fill it with .filled(id) or remove the masked "
            "samples"
        )
    check_id_shape(ids.shape, name)
    if not arrays.is_integer(ids):
        _check_python_integers(original, name)
        raise TypeError(f"{name} must be integers, got dtype {str(ids.dtype).rpartition('.')[2]}")
    return ids


def as_int64(values: Any, name: str) -> Int64:
    """Return a copy of an argument as a 1-D int64 NumPy array, or raise TypeError or ValueError."""
    array: NDArray[Any] = arrays.to_numpy(as_array(values, name))
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got shape {array.shape}")
    if array.size == 0:
        return array.astype(np.int64)
    if not arrays.is_integer(array):
        _check_python_integers(values, name)
        raise TypeError(f"{name} must be integers, got dtype {array.dtype}")
    _check_fits(array, name)
    return array.astype(np.int64)


def as_array(values: Any, name: str) -> Any:
    """Return an array unchanged, and a list or column as a NumPy array."""
    if arrays.library_of(values) is not None:
        return values
    # np.asarray would read a dataset without a length sample by sample, forever.
    if not (isinstance(values, (list, tuple, range, int, float)) or hasattr(values, "__array__")):
        raise TypeError(
            f"{name} must be an array or a list of integers, got {type(values).__name__}"
        )
    try:
        return np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a 1-D array of int64 integers: {error}") from error


def _check_python_integers(values: Any, name: str) -> None:
    """Raise ValueError for Python integers that do not fit in int64.

    NumPy stores them as objects or floats.
    """
    if isinstance(values, (list, tuple)) and all(type(value) is int for value in values):
        largest = max(values, key=abs)
        raise ValueError(f"{name} must fit in int64, got {largest}")


def _check_fits(array: Any, name: str) -> None:
    # uint64 is the only integer dtype with values outside int64.
    if arrays.dtype_name(array) == "uint64":
        smallest = int(arrays.as_signed(array).min())
        if smallest < 0:
            raise ValueError(f"{name} must fit in int64, got {smallest + (1 << 64)}")
