"""The permutation on the host: in C where the package was compiled, else in NumPy."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST
from gpusampler.permutation import _native, numpy_impl, position_ranges
from gpusampler.permutation._native import address, contiguous_int64
from gpusampler.permutation.reference import grid_of, key_of, permute


class StoredOrder(Protocol):
    """An order that is not an array in memory, such as one in a file."""

    def look_up(self, positions: Int64) -> None:
        """Replace positions, int64 of shape (T,), by the samples at them."""


def permute_one(x: Int64, n: int, key: tuple[int, int]) -> Int64:
    """Return the images of positions ``x``, int64 of shape (T,), under a permutation of 0 .. n-1.

    ``n`` is below 2**62, and ``x`` below n.
    """
    native = _native.module
    if native is not None:
        x = contiguous_int64(x)
        images = np.empty_like(x)
        native.permute(address(x), address(images), x.size, n, *key)
        return images
    grid = grid_of(n)
    if n <= numpy_impl.MAX_N:
        return numpy_impl.permute_one(x, n, key, grid)
    return np.asarray(permute(arrays.namespace(HOST), x, n, key, grid, n, n))


def keys_of(state: tuple[int, int], passes: Any, groups: Int64) -> tuple[Int64, Int64]:
    """Return `key_of` for groups, int64 of shape (K,); ``passes`` is an int or of this shape."""
    native = _native.module
    if native is None:
        return key_of(state, passes, groups)
    groups = contiguous_int64(groups)
    k0, k1 = np.empty_like(groups), np.empty_like(groups)
    one_pass, pass_array = passes, None
    if not isinstance(passes, int):
        one_pass, pass_array = 0, contiguous_int64(np.broadcast_to(passes, groups.shape))
    arguments = address(pass_array), one_pass, address(groups), groups.size
    native.keys(*state, *arguments, address(k0), address(k1))
    return k0, k1


def permute_ranges(
    first: Int64,
    lengths: Int64,
    n: Int64,
    key: tuple[Int64, Int64] | None,
    base: Int64,
    order: NDArray[Any] | StoredOrder | None,
) -> Int64:
    """Permute ranges of consecutive positions, one range per row, and look up their samples.

    Parameters
    ----------
    first, lengths : int64 arrays, shape (K,)
        First position and number of positions of each row; lengths are >= 0, and T is their sum.
        Positions wrap around at n.
    n : int64 array, shape (K,)
        Size of each row's patch, 1 .. 2**31 - 1.
    key : pair of int64 arrays, shape (K,), or None
        None for no permutation.
    base : int64 array, shape (K,)
        Start of each row's patch in ``order``, or its first sample if ``order`` is None.
    order : integer array, StoredOrder or None
        Samples sorted by patch; None if the samples of each patch are contiguous.

    Returns
    -------
    int64 array, shape (T,)
        Samples of all rows, end to end.
    """
    native = _native.module
    if native is None:
        array = order if isinstance(order, np.ndarray) else None
        samples = position_ranges.permute_ranges(first, lengths, n, key, base, array)
        if order is not None and array is None:
            look_up(order, samples)
        return samples
    columns = [
        contiguous_int64(np.broadcast_to(column, n.shape)) for column in (first, lengths, n, base)
    ]
    keys: list[Int64 | None] = [None, None]
    if key is not None:
        keys = [contiguous_int64(np.broadcast_to(word, n.shape)) for word in key]
    samples = np.empty(int(columns[1].sum()), np.int64)
    addresses = [address(array) for array in (*columns, *keys)]
    native.ranges(*addresses, n.size, address(samples), samples.size)
    if order is not None:
        look_up(order, samples)
    return samples


def look_up(order: NDArray[Any] | StoredOrder, positions: Int64) -> None:
    """Replace positions, int64 of shape (T,), by the elements of ``order`` at them.

    Raise ValueError if a position is outside the order.
    """
    look_up_at(order, order_address(order), positions, address(positions))


def look_up_at(
    order: NDArray[Any] | StoredOrder, first_item: int, positions: Int64, first_position: int
) -> None:
    """`look_up`, with the addresses `order_address` of the order and that of the positions."""
    if not isinstance(order, np.ndarray):
        order.look_up(positions)
        return
    if not first_item:
        position_ranges.check_positions(positions, order.size)
        np.copyto(positions, order[positions])
        return
    _native.module.look_up(
        first_item, order.itemsize, order.size, first_position, first_position, positions.size
    )


def order_address(order: NDArray[Any] | StoredOrder) -> int:
    """Return the address of an order; 0 if there is no compiled code that can read it."""
    if _native.module is None or not isinstance(order, np.ndarray):
        return 0
    # Not the package's own, which are contiguous: big-endian, unaligned or strided ones.
    is_plain = order.dtype in (np.int32, np.int64) and order.flags.aligned
    return address(order) if is_plain and order.flags.c_contiguous else 0
