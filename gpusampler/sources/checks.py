"""What the readers of ids share: which column, whether it is there, and what is no id."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import devices
from gpusampler.core.text import shown

PATCH_ID = "patch_id"
"""The column that is read where none is named."""

LISTED = 20


def is_a(source: Any, module: str, *names: str) -> bool:
    """Whether ``source`` is of a class of a module, which is not imported for the question."""
    there = devices.loaded(module)
    classes = [getattr(there, name, None) for name in names]
    return any(isinstance(kind, type) and isinstance(source, kind) for kind in classes)


def imported(module: str, extra: str, source: Any) -> Any:
    """Return a library that a source needs.

    Raises
    ------
    RuntimeError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise RuntimeError(
            f"source must be readable: {library} is not installed, got {str(source)!r}; "
            f"install gpusampler[{extra}]"
        ) from error


def chosen_column(columns: Sequence[Any], column: Any, what: str) -> Any:
    """Return the column to read: the one named, else "patch_id", else the only one.

    Raises
    ------
    ValueError
        If it is not there, or several are and none is named.
    """
    listed = ", ".join(map(repr, columns[:LISTED])) + (", ..." if len(columns) > LISTED else "")
    if column is None:
        if not len(columns):
            raise ValueError(f"source must have a column of patch ids, got {what} without columns")
        if PATCH_ID not in columns and len(columns) > 1:
            raise ValueError(f"column must be given for {what}, got None; it has {listed}")
        column = PATCH_ID if PATCH_ID in columns else columns[0]
    if column not in columns:
        raise ValueError(f"column must be one of {listed or 'none'} of {what}, got {column!r}")
    if list(columns).count(column) > 1:
        raise ValueError(f"column must be there once, got {column!r} more than once in {what}")
    return column


def no_column(column: Any, what: str) -> None:
    """Raise ValueError if a column is named in a source that has none."""
    if column is not None:
        raise ValueError(f"column must be None for {what}, which has no columns, got {column!r}")


def checked_shape(shape: tuple[int, ...], what: str = "ids") -> int:
    """Return how many ids an array of this shape holds, or raise ValueError."""
    if len(shape) != 1:
        raise ValueError(f"{what} must be 1-D, one id a sample, got shape {tuple(shape)}")
    if shape[0] == 0:
        raise ValueError(f"{what} must name at least one sample, got none")
    return int(shape[0])


def wrong_type(dtype: Any, detail: str = "", name: str = "ids") -> TypeError:
    """Return the error for a column of another type than integers or strings."""
    return TypeError(f"{name} must be integers, got dtype {dtype}{detail}")


def missing(sample: int) -> NoReturn:
    """Raise ValueError for a sample without an id."""
    raise ValueError(f"ids must have a value for every sample, got none in sample {sample}")


def check_all_there(gone: NDArray[np.bool_], first: int) -> None:
    """Raise ValueError naming the first sample that has no id, of those from ``first`` on."""
    if gone.any():
        missing(first + int(gone.argmax()))


def is_missing(value: Any) -> bool:
    """Whether a Python value stands for a missing one: None, NaN or the NA of pandas."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and bool(value != value)


def fitting(ids: NDArray[Any], first: int) -> NDArray[Any]:
    """Return integers in native byte order, checked to fit in int64.

    Raises
    ------
    ValueError
        If one does not; ``first`` is the sample of ``ids[0]``.
    """
    if not ids.dtype.isnative:
        ids = ids.astype(ids.dtype.newbyteorder("="))
    if ids.dtype == np.uint64:
        large = ids > np.uint64((1 << 63) - 1)
        if large.any():
            place = int(large.argmax())
            raise ValueError(
                f"ids must fit in int64, got {int(ids[place])} in sample {first + place}"
            )
    return ids


def integers_of(values: list[Any], first: int, name: str = "ids") -> NDArray[np.int64]:
    """Return Python integers as int64; what is none of them is named with its sample."""
    kinds = set(map(type, values))
    if not all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
        for place, value in enumerate(values):
            if is_missing(value):
                missing(first + place)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise TypeError(
                    f"{name} must be integers, got {shown(value)} in sample {first + place}"
                )
    try:
        return np.array(values, np.int64)
    except OverflowError:
        place = next(i for i, value in enumerate(values) if not -(1 << 63) <= value < 1 << 63)
        raise ValueError(
            f"{name} must fit in int64, got {shown(values[place])} in sample {first + place}"
        ) from None
