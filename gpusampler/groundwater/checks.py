"""Arguments of the groundwater dataset, checked: the name, the rule and the value received."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.validation import checked_int


def check_ratio(value: Any) -> float:
    """Return `val_ratio` as a float in [0, 1).

    Parameters
    ----------
    value : object
        A real number.

    Returns
    -------
    float
        The value.

    Raises
    ------
    TypeError
        If `value` is a bool or no real number.
    ValueError
        If `value` lies outside [0, 1).

    Examples
    --------
    >>> check_ratio(0.2)
    0.2
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"val_ratio must be a number, got {value!r}")
    ratio = float(value)
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"val_ratio must be in [0, 1), got {ratio}")
    return ratio


def check_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns as a tuple.

    Parameters
    ----------
    columns : sequence of str
        At least one name, no name twice.

    Returns
    -------
    tuple of str
        The names.

    Raises
    ------
    TypeError
        If `columns` is a str or holds something else than names.
    ValueError
        If there is no name or one comes twice.

    Examples
    --------
    >>> check_columns(["head", "pressure"])
    ('head', 'pressure')
    """
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise TypeError(f"columns must be a sequence of names, got {columns!r}")
    names = tuple(columns)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"columns must be names that differ, at least one, got {columns!r}")
    return names


def check_targets(
    targets: str | int | Iterable[str | int] | None, columns: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the names of the target columns.

    Parameters
    ----------
    targets : str or int or sequence of them, or None
        Names or positions; None for all columns.
    columns : tuple of str
        The names of all columns.

    Returns
    -------
    tuple of str
        The names, in the order asked for.

    Raises
    ------
    TypeError
        If a target is neither a name nor an integer.
    ValueError
        If a target is no column, comes twice, or there is none.

    Examples
    --------
    >>> check_targets(1, ("mass_concentration", "head"))
    ('head',)
    """
    if targets is None:
        return columns
    asked = [targets] if isinstance(targets, (str, int, np.integer)) else list(targets)
    names: list[str] = []
    for target in asked:
        if isinstance(target, str):
            if target not in columns:
                raise ValueError(
                    f"target_columns must be among {', '.join(columns)}, got {target!r}"
                )
            names.append(target)
            continue
        names.append(columns[checked_int(target, "target_columns", least=0, below=len(columns))])
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"target_columns must be columns that differ, at least one, got {targets!r}"
        )
    return tuple(names)


def check_origin(origin: Sequence[float]) -> NDArray[np.float64]:
    """Return a point in space.

    Parameters
    ----------
    origin : (3,) floats
        The point, in the unit of the coordinates.

    Returns
    -------
    ndarray of float64, shape (3,)
        The point.

    Raises
    ------
    ValueError
        If it is not three finite numbers.

    Examples
    --------
    >>> check_origin((1, 2, 3)).tolist()
    [1.0, 2.0, 3.0]
    """
    point = np.asarray(origin, dtype=np.float64)
    if point.shape != (3,) or not np.isfinite(point).all():
        raise ValueError(f"origin must be three finite numbers, got {origin!r}")
    return point
