"""Instructions that compute registers from registers, on one NumPy array element per thread.

Registers are unsigned arrays, or boolean for predicates; `signed` and `unsigned` reinterpret them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]
Operation = Callable[..., Values]

TYPES = {
    f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}")
    for kind in "bus"
    for bits in (8, 16, 32, 64)
} | {"pred": np.dtype(bool)}


def unsigned(values: Values) -> Values:
    return values if values.dtype.kind in "ub" else values.view(f"u{values.dtype.itemsize}")


def bits_of(values: Values) -> int:
    return values.dtype.itemsize * 8


def widened(values: Values) -> Values:
    return values.astype(f"{values.dtype.kind}{values.dtype.itemsize * 2}")


def product_high(a: Values, b: Values) -> Values:
    bits = bits_of(a)
    if bits < 64:
        return (widened(a) * widened(b) >> bits).astype(a.dtype)
    x, y = unsigned(a), unsigned(b)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (x >> half) * (y & low) + ((x & low) * (y & low) >> half)
    other = (x & low) * (y >> half) + (middle & low)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, 0) - np.where(b < 0, x, 0)
    return high.view(a.dtype)


def quotient(a: Values, b: Values) -> Values:
    # PTX rounds towards zero, NumPy down.
    rounded_down = a // b
    return rounded_down + ((a % b != 0) & ((a < 0) != (b < 0)))


def shift_left(a: Values, amount: Values) -> Values:
    bits = bits_of(a)
    return np.where(amount < bits, unsigned(a) << (amount % bits).astype(unsigned(a).dtype), 0)


def shift_right(a: Values, amount: Values) -> Values:
    last = np.minimum(amount, bits_of(a) - 1).astype(a.dtype)
    shifted = a >> last
    return shifted if a.dtype.kind == "i" else np.where(amount < bits_of(a), shifted, 0)


def insert_bits(
    source: np.ndarray, into: np.ndarray, position: np.ndarray, length: np.ndarray
) -> np.ndarray:
    """Replace ``length`` bits of ``into``, from ``position`` on, by the lowest of ``source``."""
    width = 8 * into.dtype.itemsize
    place, count = (
        np.minimum(operand & 255, width).astype(np.uint64) for operand in (position, length)
    )
    ones = np.where(
        count >= 64, np.uint64(2**64 - 1), (np.uint64(1) << (count % np.uint64(64))) - np.uint64(1)
    )
    mask = np.where(place >= 64, np.uint64(0), ones << (place % np.uint64(64)))
    bits = np.where(place >= 64, np.uint64(0), source.astype(np.uint64) << (place % np.uint64(64)))
    return ((into.astype(np.uint64) & ~mask) | (bits & mask)).astype(into.dtype)


def extract_bits(a: Values, start: Values, length: Values) -> Values:
    bits = bits_of(a)
    start, length = start & 0xFF, length & 0xFF
    # The field at the top, then down again, with the sign that it has there.
    above = np.maximum(bits - np.minimum(start + length, bits), 0)
    field = shift_left(a, above).astype(unsigned(a).dtype).view(a.dtype)
    present = np.minimum(length, np.maximum(bits - start.astype(np.int64), 0))
    return np.where(present > 0, shift_right(field, (bits - present).astype(np.uint32)), 0)


def leading_zeros(a: Values) -> Values:
    spread = 1
    while spread < bits_of(a):
        a = a | a >> spread
        spread *= 2
    return bits_of(a) - np.bitwise_count(a)


def bitwise(name: str) -> Operation:
    return getattr(np, f"bitwise_{name}")


ALL_TYPED: dict[str, Operation] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.hi": product_high,
    "mul.wide": lambda a, b: widened(a) * widened(b),
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.hi": lambda a, b, c: product_high(a, b) + c,
    "mad.wide": lambda a, b, c: widened(a) * widened(b) + c,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "neg": lambda a: 0 - a,
    "and": bitwise("and"),
    "or": bitwise("or"),
    "xor": bitwise("xor"),
    "not": np.invert,
    "mov": lambda a: a,
    "cvta.to.global": lambda a: a,
    "cvta.global": lambda a: a,
    "shl": shift_left,
    "shr": shift_right,
    "bfe": extract_bits,
    "bfi": insert_bits,
    "popc": np.bitwise_count,
    "clz": leading_zeros,
    "selp": lambda a, b, chosen: np.where(chosen, a, b),
}
"""By opcode without its type: the operation on operands of that type, but for `OTHER_TYPES`."""

OTHER_TYPES = {
    ("shl", 1): "u32",
    ("shr", 1): "u32",
    ("bfe", 1): "u32",
    ("bfe", 2): "u32",
    ("bfi", 2): "u32",
    ("bfi", 3): "u32",
    ("selp", 2): "pred",
}
"""Type of the operands, by opcode and position, whose type is not that of the instruction."""

COMPARISONS: dict[str, Operation] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}

REDUCTIONS: dict[str, Operation] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
"""Of `redux.sync`, over the threads of a warp."""


def shuffle_source(mode: str, lane: Values, b: Values, clamp: Values) -> tuple[Values, Values]:
    """Return the lane that `shfl.sync` reads from, and whether it is inside the segment."""
    b, segment, limit = b & 31, clamp >> 8 & 31, clamp & 31
    last = lane & segment | limit & ~segment
    source = {
        "up": lane - b,
        "down": lane + b,
        "bfly": lane ^ b,
        "idx": lane & segment | b & ~segment,
    }[mode]
    inside = source >= last if mode == "up" else source <= last
    return np.where(inside, source, lane), inside
