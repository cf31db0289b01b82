"""Checks shared by all readers: choice of the column, missing values, shapes and dtypes."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from importlib import import_module
from numbers import Number
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays, devices
from gpusampler.core.text import short_repr

PATCH_ID = "patch_id"
"""Default column."""

MAX_LISTED = 20
"""Maximum number of columns in an error message."""


def is_instance(source: Any, module: str, *names: str) -> bool:
    """Whether ``source`` is an instance of a class of a module, without importing the module."""
    loaded = devices.loaded_module(module)
    classes = [getattr(loaded, name, None) for name in names]
    return any(isinstance(cls, type) and isinstance(source, cls) for cls in classes)


def import_library(module: str, source: Any) -> Any:
    """Import a module that reading ``source`` needs, or raise RuntimeError."""
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise RuntimeError(
            f"Cannot read {str(source)!r}: {library} is not installed. Run `pip install {library}`."
        ) from error


@contextmanager
def explain_errors(kind: str, label: str) -> Iterator[None]:
    """Turn any exception of a library into an OSError or ValueError that names the source.

    Damaged files make libraries raise almost any exception, MemoryError among them, and releases
    differ. Errors of the types that we raise pass if they already name the source.
    """
    try:
        yield
    except PermissionError:
        raise
    except Exception as error:
        if isinstance(error, (OSError, TypeError, ValueError)) and label in str(error):
            raise
        detail = str(error) or type(error).__name__
        # The source exists: zarr means that it found no metadata in it.
        is_os_error = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        error_type = OSError if is_os_error else ValueError
        raise error_type(f"source must be {kind}, got {label}: {detail}") from error


def list_names(names: Sequence[Any]) -> str:
    """Return the first `MAX_LISTED` names of columns or groups for an error message."""
    return ", ".join(map(repr, names[:MAX_LISTED])) + (", ..." if len(names) > MAX_LISTED else "")


def choose_column(columns: Sequence[Any], column: Any, label: str) -> Any:
    """Return the column to read: ``column`` if given, else "patch_id", else the only one."""
    listing = list_names(columns)
    if column is None:
        if not len(columns):
            raise ValueError(f"source must have a column of patch ids, got {label} without columns")
        if PATCH_ID not in columns and len(columns) > 1:
            advice = ""
            if label == "a pandas DataFrame":
                pair = ", ".join(map(repr, columns[:2]))
                advice = f". For one patch per combination, pass frame.groupby([{pair}]).ngroup()"
            raise ValueError(
                f"column must be given for {label}, got None; it has {listing}. Pass one to "
                f"read_patch_ids(source, column){advice}"
            )
        column = PATCH_ID if PATCH_ID in columns else columns[0]
    if column not in columns:
        raise ValueError(f"column must be one of {listing or 'none'} of {label}, got {column!r}")
    if list(columns).count(column) > 1:
        raise ValueError(
            f"{label} has more than one column named {column!r}; rename the duplicates"
        )
    return column


def check_no_column(column: Any, label: str) -> None:
    """Raise ValueError if a column is given for a source without columns."""
    if column is not None:
        raise ValueError(f"column must be None for {label}, which has no columns, got {column!r}")


def wrong_dtype_error(dtype: Any, detail: str = "", name: str = "ids") -> TypeError:
    """Return the error for a column whose dtype is neither integer nor string."""
    return TypeError(f"{name} must be integers or strings, got dtype {dtype}{detail}")


def raise_missing(sample: int) -> NoReturn:
    """Raise ValueError for a sample without an id."""
    raise ValueError(f"ids must have a value for every sample, got none in sample {sample}")


def check_no_missing(is_missing: NDArray[np.bool_], first: int) -> None:
    """Raise ValueError for the first missing id; ``is_missing[0]`` is of sample ``first``."""
    if is_missing.any():
        raise_missing(first + int(is_missing.argmax()))


def is_missing(value: Any) -> bool:
    """Whether a Python value is a missing value: None, NaN, or NA or NaT of pandas."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and bool(value != value)


def is_key(value: Any) -> bool:
    """Whether a value can be a name: a string, or another key that hashes, sorts and prints."""
    if isinstance(value, (str, bytes)):
        return True
    if isinstance(value, tuple):
        return all(
            isinstance(part, (Number, np.generic)) or is_missing(part) or is_key(part)
            for part in value
        )
    # Sets are only partially ordered, and floats are rarely meant as ids.
    if isinstance(value, (Number, np.generic, Set)) or arrays.library_of(value) is not None:
        return False
    kind: Any = type(value)
    if kind.__hash__ is None or hasattr(value, "__getitem__"):
        return False
    own = {name for base in kind.__mro__[:-1] for name in vars(base)}
    return "__lt__" in own and not own.isdisjoint({"__repr__", "__str__"})


def check_key(key: Any, sample: int) -> Any:
    """Return a key; raise ValueError if it, or a part of a tuple, is missing."""
    if is_missing(key):
        raise_missing(sample)
    if isinstance(key, tuple):
        for part in key:
            check_key(part, sample)
    return key


def check_no_plain_enum(value: Any, name: str) -> None:
    """Raise TypeError for a member of an Enum that is neither an int nor sorts."""
    if isinstance(value, enum.Enum) and not isinstance(value, int) and not is_key(value):
        raise TypeError(
            f"{name} must be integers, strings or keys that sort, got {value!r}: pass "
            "[key.name for key in ids]"
        )


def check_fits_int64(ids: NDArray[Any], first: int) -> NDArray[Any]:
    """Return integers in native byte order, checked to fit in int64."""
    if not ids.dtype.isnative:
        ids = ids.astype(ids.dtype.newbyteorder("="))
    if ids.dtype == np.uint64:
        too_large = ids > np.uint64((1 << 63) - 1)
        if too_large.any():
            i = int(too_large.argmax())
            raise ValueError(f"ids must fit in int64, got {int(ids[i])} in sample {first + i}")
    return ids


def integers_from_list(values: list[Any], first: int, name: str = "ids") -> NDArray[np.int64]:
    """Return Python integers as int64, or raise an error that names the first bad sample."""
    types = set(map(type, values))
    if not all(issubclass(t, (int, np.integer)) and t is not bool for t in types):
        for i, value in enumerate(values):
            if is_missing(value):
                raise_missing(first + i)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise TypeError(
                    f"{name} must be integers, got {short_repr(value)} in sample {first + i}"
                )
    try:
        return np.array(values, np.int64)
    except OverflowError:
        i = next(i for i, value in enumerate(values) if not -(1 << 63) <= value < 1 << 63)
        raise ValueError(
            f"{name} must fit in int64, got {short_repr(values[i])} in sample {first + i}"
        ) from None
