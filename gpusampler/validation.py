"""Checks of arguments that several rooms share: each names the argument, the rule and the value."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np


def checked_int(value: Any, name: str, *, least: int, below: int | None = None) -> int:
    """Return ``value`` as an int, or raise.

    Raises
    ------
    TypeError
        If it is no integer; booleans are none here.
    ValueError
        If it is smaller than ``least``, or not smaller than ``below``.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}")
    if below is not None and number >= below:
        raise ValueError(f"{name} must be < {below}, got {number}")
    return number


def checked_seed(seed: Any) -> int:
    """Return ``seed`` as an int in 0 .. 2**64 - 1, or raise."""
    return checked_int(seed, "seed", least=0, below=1 << 64)


def checked_bool(value: Any, name: str) -> bool:
    """Return ``value`` as a bool, or raise TypeError."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {value!r}")


def checked_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``, or raise ValueError."""
    if isinstance(value, str) and value in choices:
        return value
    listed = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"{name} must be one of {listed}, got {value!r}")
