"""Gathers: an index outside the array is an error, and never the nearest row."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from gpusampler.core import arrays
from gpusampler.permutation import host, position_ranges

ROWS = np.arange(20.0).reshape(10, 2)
RIGHT = np.array([9, 0, 3, 3])
WRONG = [10, -1, 16_777_221, 2**62, -(2**63)]


def to_torch(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array.copy())


SOURCES = {
    "contiguous": lambda: ROWS,
    "strided": lambda: np.repeat(ROWS, 2, axis=0)[::2],
    "of Fortran": lambda: np.asfortranarray(ROWS),
    "short rows of torch": lambda: to_torch(ROWS),
    "long rows of torch": lambda: to_torch(np.repeat(ROWS, 100, axis=1)),
    "unsigned rows of torch": lambda: to_torch(np.repeat(ROWS, 300, axis=1).astype(np.uint16)),
}


@pytest.fixture(params=SOURCES)
def source(request):
    if "torch" in request.param and not find_spec("torch"):
        pytest.skip("torch is not installed")
    return SOURCES[request.param]()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_row_that_is_not_there_is_an_error(source, wrong):
    rows = arrays.take_rows(source, RIGHT)
    np.testing.assert_array_equal(np.asarray(rows), np.asarray(source)[RIGHT])
    for at in (0, 2, 4):
        with pytest.raises(IndexError, match=r"samples must be in 0 \.\. 9, got|out of range"):
            arrays.take_rows(source, np.insert(RIGHT, at, wrong))


@pytest.mark.parametrize("wrong", WRONG)
def test_nor_is_it_gathered_into_a_buffer(source, wrong):
    def gather(index: np.ndarray) -> Any:
        shape = (index.size, *source.shape[1:])
        buffer = np.empty(shape, np.asarray(source).dtype).reshape(-1)
        arrays.take_rows_into(buffer, source, index)
        return buffer.reshape(shape)

    np.testing.assert_array_equal(gather(RIGHT), np.asarray(source)[RIGHT])
    with pytest.raises(IndexError, match=r"samples must be in 0 \.\. 9, got|out of range"):
        gather(np.append(RIGHT, wrong))


def test_no_rows_are_no_error(source):
    assert arrays.take_rows(source, RIGHT[:0]).shape[0] == 0


def test_rows_are_split_as_a_whole():
    assert [part.tolist() for part in arrays.split_rows(RIGHT, [1, 0, 3])] == [[9], [], [0, 3, 3]]
    for sizes in ([1, 2], [1, 4], [], [5]):
        with pytest.raises(ValueError, match="sizes must add up to 4 rows, got"):
            arrays.split_rows(RIGHT, sizes)


@pytest.mark.usefixtures("host_form")
@pytest.mark.parametrize("dtype", ["int32", "int64", ">i8", "uint16"])
@pytest.mark.parametrize("wrong", [10, -1, 2**62, -(2**63)])
def test_a_position_outside_an_order_is_an_error(dtype, wrong):
    order = np.arange(10, 0, -1).astype(dtype)
    positions = RIGHT.copy()
    host.look_up(order, positions)
    np.testing.assert_array_equal(positions, order[RIGHT])
    with pytest.raises(ValueError, match=r"a position is not in 0 \.\. 9, the order's last"):
        host.look_up(order, np.append(RIGHT, wrong))


@pytest.mark.usefixtures("host_form")
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("base", [4, -1, 2**40])
def test_rows_beyond_the_order_are_an_error(dtype, base):
    order = np.arange(10).astype(dtype)
    row = [np.array([value]) for value in (0, 7, 7)]
    for permute in (host.permute_ranges, position_ranges.permute_ranges):
        assert permute(*row, None, np.array([3]), order).tolist() == list(range(3, 10))
        with pytest.raises(ValueError, match=r"a position is not in 0 \.\. 9, the order's last"):
            permute(*row, None, np.array([base]), order)
