"""Argument checks: errors that name any value."""

from __future__ import annotations

import pytest

from gpusampler.core.text import short_repr
from gpusampler.core.validation import check_bool, check_choice, check_int, check_path, check_real


def nested(depth=100_000):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "check",
    [
        lambda value: check_int(value, "x", low=0),
        lambda value: check_bool(value, "x"),
        lambda value: check_choice(value, "x", ("a", "b")),
        lambda value: check_path(value, "x"),
        lambda value: check_real(value, "x", "be > 0", lambda number: number > 0),
    ],
)
def test_a_deeply_nested_value_is_named(check):
    with pytest.raises((TypeError, ValueError), match=r"^x must .*, got a deeply nested list$"):
        check(nested())


def test_long_values_are_truncated():
    assert short_repr([1, 2]) == "[1, 2]"
    assert short_repr("x" * 300) == "'" + "x" * 199 + " ..."
    assert short_repr(10**5000) == "an int of 16610 bits"
