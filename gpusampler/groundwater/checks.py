"""Argument checks of the groundwater dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from gpusampler.core.validation import check_int


def check_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """Return the column names as a tuple; there must be at least one, each only once."""
    if isinstance(columns, str) or not all(isinstance(name, str) for name in columns):
        raise TypeError(f"columns must be a sequence of names, got {columns!r}")
    names = tuple(columns)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"columns must name at least one column, each only once, got {columns!r}")
    return names


def check_targets(
    targets: str | int | Iterable[str | int] | None, columns: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the names of the target columns, given by name or position.

    Examples
    --------
    >>> check_targets(1, ("mass_concentration", "head"))
    ('head',)
    """
    if targets is None:
        return columns
    requested = [targets] if isinstance(targets, (str, int, np.integer)) else list(targets)
    names: list[str] = []
    for target in requested:
        if isinstance(target, str):
            if target not in columns:
                raise ValueError(
                    f"target_columns must be among {', '.join(columns)}, got {target!r}"
                )
            names.append(target)
            continue
        names.append(columns[check_int(target, "target_columns", low=0, high=len(columns))])
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"target_columns must name at least one column, each only once, got {targets!r}"
        )
    return tuple(names)
