"""Checks of arguments that several wings share: each names the argument, the rule and the value."""

from __future__ import annotations

import errno
import operator
import os
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.core.text import short_repr


def check_int(value: Any, name: str, *, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int, or raise.

    Raises
    ------
    TypeError
        If it is no integer; booleans are none here.
    ValueError
        If it is smaller than ``low``, or not smaller than ``high``.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an int, got {value!r}")
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
    """Return a real number as an int or a float, or a sequence of them as float64, or raise.

    Parameters
    ----------
    value : object
    name, rule : str
        For the text of errors: "``name`` must ``rule``, got ...".
    is_allowed : callable
        Whether the number, or each element of the array, obeys the rule.
    is_sequence : bool
        Whether ``value`` must be a sequence.
    kind : str, optional
        What ``value`` must be, for the text of the TypeError.

    Raises
    ------
    TypeError
        If it is no real number, or no sequence of them; a boolean is none here.
    ValueError
        If it does not obey the rule.
    """
    numbers: Any = None
    if is_sequence:
        with suppress(TypeError, ValueError):
            numbers = np.asarray(list(value), np.float64)
    elif isinstance(value, Real) and not isinstance(value, bool):
        # A Python number: NumPy would convert the bounds to its narrower types.
        numbers = int(value) if isinstance(value, Integral) else float(value)
    if numbers is None:
        kind = kind or ("a sequence of numbers" if is_sequence else "a number")
        raise TypeError(f"{name} must be {kind}, got {short_repr(value)}")
    if not np.all(is_allowed(numbers)):
        raise ValueError(f"{name} must {rule}, got {short_repr(value)}")
    return numbers


def check_seed(seed: Any, name: str = "seed") -> int:
    """Return ``seed`` as an int in 0 .. 2**64 - 1, or raise."""
    return check_int(seed, name, low=0, high=1 << 64)


def check_bool(value: Any, name: str) -> bool:
    """Return ``value`` as a bool, or raise TypeError."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {value!r}")


def check_path(value: Any, name: str = "path") -> Path:
    """Return where a file is, or is to be, or raise before anything else is done.

    Raises
    ------
    TypeError
        If it is neither a str nor a path.
    FileNotFoundError, IsADirectoryError, NotADirectoryError
        If its folder is not there, or it is a folder itself.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be a str or an os.PathLike of one, got {short_repr(value)}")
    path, path_text = Path(value), os.fspath(value)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{name} must be a file, got a folder", path_text)
    if not path.parent.exists():
        raise FileNotFoundError(
            errno.ENOENT, f"{name} must be in a folder that is there, got no such folder", path_text
        )
    if not path.parent.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, f"{name} must be in a folder, got one in a file", path_text
        )
    return path


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``, or raise ValueError."""
    if isinstance(value, str) and value in choices:
        return value
    choice_list = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"{name} must be one of {choice_list}, got {value!r}")


def check_ids(ids: Any) -> Any:
    """Return patch ids as an array of one of the libraries, 1-D, of integers that fit in int64.

    Raises
    ------
    TypeError
        If they are no integers (booleans and floats included).
    ValueError
        If they are not 1-D, are empty, or do not fit.
    """
    ids = check_id_array(ids)
    _check_fits(ids, "ids")
    return ids


def check_id_array(ids: Any, name: str = "ids") -> Any:
    """Return patch ids as `check_ids` does, without a look at the values of an array.

    Raises
    ------
    TypeError, ValueError
        As by `check_ids`, but for ids of uint64 that do not fit in int64.
    """
    original = ids
    ids = as_array(ids, name)
    if isinstance(ids, np.ma.MaskedArray):
        raise TypeError(f"{name} must have a value for every sample, got a masked array")
    if len(ids.shape) != 1:
        raise ValueError(f"{name} must be 1-D, one id a sample, got shape {tuple(ids.shape)}")
    if int(ids.shape[0]) == 0:
        raise ValueError(f"{name} must name at least one sample, got none")
    if not arrays.is_integer(ids):
        _check_python_integers(original, name)
        raise TypeError(f"{name} must be integers, got dtype {str(ids.dtype).rpartition('.')[2]}")
    return ids


def as_int64(values: Any, name: str) -> Int64:
    """Return an argument as a 1-D int64 NumPy array, a copy, or raise TypeError or ValueError."""
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
    """Return an array of one of the libraries as it is, a list or a column as a NumPy array.

    Raises
    ------
    TypeError
        If it is neither: NumPy would ask a dataset for sample after sample, without an end.
    ValueError
        If NumPy can make no array of it.
    """
    if arrays.library_of(values) is not None:
        return values
    if not (isinstance(values, (list, tuple, range, int, float)) or hasattr(values, "__array__")):
        raise TypeError(
            f"{name} must be an array or a list of integers, got {type(values).__name__}"
        )
    try:
        return np.asarray(values)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a 1-D array of int64 integers: {error}") from error


def _check_python_integers(values: Any, name: str) -> None:
    """Tell a list of integers that NumPy made objects or floats of, for want of a wider type."""
    if isinstance(values, (list, tuple)) and all(type(value) is int for value in values):
        largest = max(values, key=abs)
        raise ValueError(f"{name} must fit in int64, got {largest}")


def _check_fits(array: Any, name: str) -> None:
    # Nothing else is wider than int64 on one side only.
    if arrays.dtype_name(array) == "uint64":
        smallest = int(arrays.as_signed(array).min())
        if smallest < 0:
            raise ValueError(f"{name} must fit in int64, got {smallest + (1 << 64)}")
