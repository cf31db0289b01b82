"""Read the header of an .npy file without evaluating it.

NumPy reads a header of up to 4 GB and parses it as Python: a damaged header raises errors of the
tokenizer, of the recursion limit or of memory.
"""

from __future__ import annotations

import math
import re
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from gpusampler.core.text import short_repr

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {(1, 0): 2, (2, 0): 4, (3, 0): 4}
_MAX_LENGTH = 10_000
"""Maximum header length in bytes; NumPy's default limit."""

_KEY = re.compile(r"\s*(['\"])(descr|fortran_order|shape)\1\s*:\s*")
_COMMA = re.compile(r"\s*,")
_VALUE = {
    "descr": re.compile(r"(?P<quote>['\"])(?P<value>[^'\"\\]*)(?P=quote)"),
    "fortran_order": re.compile(r"(?P<value>True|False)"),
    # Python 2 wrote long integers with an L.
    "shape": re.compile(
        r"\(\s*(?P<value>(?:\d{1,19}L?\s*,\s*)+(?:\d{1,19}L?\s*)?|)\)", flags=re.ASCII
    ),
}
_RULE = {
    "descr": "a string (structured dtypes are not supported)",
    "fortran_order": "True or False",
    "shape": "a tuple of integers >= 0",
}
_DTYPE = re.compile(r"[<>|=]?[?b-zA-Z]\d{0,10}(\[[\dA-Za-z/]{1,20}\])?", flags=re.ASCII)


class NpyHeader(NamedTuple):
    """Shape, dtype and memory order of an array, and the offset in bytes of its first value."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool
    offset: int

    @property
    def file_bytes(self) -> int:
        """Minimum size of the file in bytes."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(file: BinaryIO) -> NpyHeader:
    """Read the header at the start of a file, at most 10,000 bytes.

    Raises
    ------
    ValueError
        If the header is not a valid .npy header, or its dtype is structured. The caller names the
        file.
    """
    magic = file.read(len(_MAGIC) + 2)
    if not magic.startswith(_MAGIC):
        raise ValueError(f"its magic string must be {_MAGIC!r}, got {magic[: len(_MAGIC)]!r}")
    version = tuple(magic[len(_MAGIC) :])
    if version not in _LENGTH_BYTES:
        versions = ", ".join(map(str, _LENGTH_BYTES))
        raise ValueError(f"its format version must be one of {versions}, got {version}")
    prefix = file.read(_LENGTH_BYTES[version])
    length = int.from_bytes(prefix, "little")
    if length > _MAX_LENGTH:
        raise ValueError(f"its header must have at most {_MAX_LENGTH} bytes, got {length}")
    content = file.read(length)
    if len(prefix) < _LENGTH_BYTES[version] or len(content) < length:
        raise ValueError("its header is truncated")
    fields = _parse(content.decode("latin1"))
    sizes = [int(size.strip().rstrip("L")) for size in fields["shape"].split(",") if size.strip()]
    dtype = _parse_dtype(fields["descr"])
    # NumPy multiplies all sizes but 0, even of an empty array.
    if math.prod(size or 1 for size in sizes) * dtype.itemsize >= 1 << 63:
        raise ValueError(f"its array must have < 2**63 bytes, got shape {short_repr(tuple(sizes))}")
    is_fortran_order = fields["fortran_order"] == "True"
    return NpyHeader(tuple(sizes), dtype, is_fortran_order, len(magic) + len(prefix) + length)


def _parse(text: str) -> dict[str, str]:
    """Return the three values of a header; their text has the right form."""
    fields: dict[str, str] = {}
    text = text.strip()
    position = 1
    while text.startswith("{") and (key := _KEY.match(text, position)):
        name = key[2]
        value = _VALUE[name].match(text, key.end())
        if value is None:
            rest = short_repr(text[key.end() :])
            raise ValueError(f"{name!r} in its header must be {_RULE[name]}, got {rest}")
        if name in fields:
            raise ValueError(f"{name!r} must be in its header once, got it twice")
        fields[name] = value["value"]
        position = value.end()
        comma = _COMMA.match(text, position)
        if comma is None:
            break
        position = comma.end()
    if len(fields) < len(_VALUE) or text[position:].strip() != "}":
        raise ValueError(
            "its header must be a dictionary of 'descr', 'fortran_order' and 'shape', "
            f"got {short_repr(text)}"
        )
    return fields


def _parse_dtype(text: str) -> np.dtype[Any]:
    try:
        if not _DTYPE.fullmatch(text):
            raise ValueError("not the name of a dtype")
        dtype = np.dtype(text)
        if not dtype.itemsize:
            raise ValueError("its values have no bytes")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"'descr' in its header must be a dtype, got {short_repr(text)}: {error}"
        ) from error
    return dtype
