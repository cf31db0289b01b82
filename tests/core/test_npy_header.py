"""Headers of .npy files: as NumPy reads them where they are valid, else a ValueError."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pytest
from numpy.lib import format as npy

from gpusampler.core.npy_header import read_npy_header


def header(text, version=1, length=None):
    content = text.encode("latin1")
    length = len(content) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes((version, 0))
        + struct.pack("<H" if version == 1 else "<I", length)
        + content
    )


VALID = "{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }"


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    "array",
    [
        np.arange(5, dtype=">u2"),
        np.array(3.5),
        np.zeros((0, 3), np.complex64),
        np.asfortranarray(np.ones((2, 3, 4), np.float16)),
        np.array(["a", "bcd"]),
        np.array([b"a"]),
        np.zeros(2, "M8[25s]"),
        np.zeros(2, bool),
        np.array([None]),
    ],
    ids=str,
)
def test_valid_headers_are_read_as_numpy_reads_them(array, version):
    file = io.BytesIO()
    npy.write_array(file, array, version)
    file.seek(0)
    header = read_npy_header(file)
    fortran_order = array.flags.f_contiguous and not array.flags.c_contiguous
    assert header[:3] == (array.shape, array.dtype, fortran_order)
    assert header.offset == file.tell()
    if not array.dtype.hasobject:
        assert header.file_bytes == len(file.getvalue())


@pytest.mark.parametrize(
    "text",
    [
        "{'shape': (3L,), 'descr': \"<i8\", 'fortran_order': False}   \n",
        " {\t'descr':'<i8','fortran_order':False,'shape':(3,)}",
    ],
)
def test_headers_of_other_writers(text):
    assert read_npy_header(io.BytesIO(header(text)))[:3] == ((3,), np.dtype("<i8"), False)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "magic string must be"),
        (b"\x93NUMPY", r"version must be one of \(1, 0\), \(2, 0\), \(3, 0\), got \(\)"),
        (header(VALID).replace(b"Y\x01", b"Y\x04"), r"got \(4, 0\)"),
        (b"\x93NUMPY\x01\x00\x01", "header is truncated"),
        (header(VALID, length=300), "header is truncated"),
        # 14 bytes; NumPy asked for 4 GB.
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xffab", "at most 10000 bytes, got 4294967295"),
        # TokenError, RecursionError and MemoryError.
        (header("{'descr': (((( \n"), "'descr' in its header must be a string"),
        (header("{'descr': " + "(" * 9000), "'descr' in its header must be a string"),
        (header("-" * 9000 + "1"), "must be a dictionary"),
        (header("[" * 9000), "must be a dictionary"),
        (header("{" * 9000), "must be a dictionary"),
        (header(VALID.replace("(3,)", "(-5,)")), r"must be a tuple of integers >= 0, got '\(-5"),
        (header(VALID.replace("(3,)", "(3)")), "must be a tuple of integers"),
        (header(VALID.replace("(3,)", "3")), "must be a tuple of integers"),
        (header(VALID.replace("(3,)", "(True,)")), "must be a tuple of integers"),
        (header(VALID.replace("(3,)", f"({'9' * 5000},)")), "must be a tuple of integers"),
        (header(VALID.replace("(3,)", "(\xb3,)")), "must be a tuple of integers"),
        (header(VALID.replace("'<i8'", "[('a', '<i8')]")), "structured dtypes are not supported"),
        (header(VALID.replace("'<i8'", "'<i8, <f4'")), "must be a dtype, got '<i8, <f4'"),
        (header(VALID.replace("<i8", "<i9")), "must be a dtype, got '<i9'"),
        (header(VALID.replace("<i8", "<U9999999999")), "must be a dtype"),
        (header(VALID.replace("<i8", "<U0")), "its values have no bytes"),
        (header(VALID.replace("<i8", "a5")), "must be a dtype, got 'a5'"),
        (
            header(VALID.replace("False", "0")),
            "'fortran_order' in its header must be True or False",
        ),
        (header(VALID.replace(" 'shape': (3,),", "")), "must be a dictionary"),
        (header(VALID.replace("}", "'shape': (4,)}")), "'shape' must be in its header once"),
        (header(VALID.replace("}", "'more': 1}")), "must be a dictionary"),
        (header(VALID + "; import os"), "must be a dictionary"),
    ],
)
def test_damaged_headers_are_clear_errors_in_little_memory(content, match):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            read_npy_header(io.BytesIO(content))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("sizes", [(2**62, 2**62), (2**63, 0), (0, 2**62, 2**62), (2**60,)])
def test_sizes_that_overflow(sizes):
    with pytest.raises(ValueError, match=r"must have < 2\*\*63 bytes, got shape"):
        read_npy_header(io.BytesIO(header(VALID.replace("(3,)", str(sizes)))))
