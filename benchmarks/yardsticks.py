"""Plain work that the gate's cases are measured against: ``python -m benchmarks.gate``.

A ratio says the same on another machine only if both sides do the same kinds of work: processors
differ in how wide their vectors are, how fast memory is, and how fast CPython is, each by itself.
So a baseline here is put together from parts, in about the amounts that the case needs of each.
Nothing of gpusampler is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

TILE = 1 << 15
"""Elements of a buffer of `Arithmetic`: 128 KiB, in the second-level cache."""


Work = Callable[[], Any]
"""A call that does some work; all that it reads is there."""
Part = Callable[[], Work]
"""A kind and an amount of work: prepares the input, and returns the call."""


def part(prepare: Callable[..., Work]) -> Callable[..., Part]:
    """Let a function be called with amounts now, and prepare later."""
    return lambda *amounts: partial(prepare, *amounts)


@part
def Arithmetic(elements: int, rounds: int) -> Work:
    """Rounds of 24 operations on uint32, in place, over tiles of eleven buffers.

    Most are multiplications, shifts and exclusive ors of two hot buffers; a few read the others,
    make a mask, and use it as a number. More than the second-level cache of some processors holds.
    """
    buffers = np.arange(11 * TILE, dtype=np.uint32).reshape(11, TILE)
    mask = np.empty(TILE, np.bool_)
    factor, shift, low = np.uint32(0x21F0AAAD), np.uint32(15), np.uint32(0xFFFF)
    tiles = _tiles(elements, TILE)

    def one(x: Any, flag: Any, r: int) -> None:
        a, b = x[0], x[1]
        lines, others = (x[2], x[3]), x[4:]
        np.add(lines[r % 2], others[0], out=a)
        for _ in range(4):
            np.multiply(a, factor, out=a)
            np.right_shift(a, shift, out=b)
            np.bitwise_xor(a, b, out=a)
        np.bitwise_and(a, low, out=b)
        np.multiply(b, others[1], out=b)
        np.greater_equal(b, others[2], out=flag)
        np.subtract(others[3], flag.view(np.uint8), out=a)
        np.multiply(b, a, out=b)
        np.right_shift(b, shift, out=b)
        np.add(b, lines[1 - r % 2], out=b)
        np.subtract(b, others[4], out=a)
        np.minimum(a, b, out=lines[r % 2])
        np.add(others[0], others[5], out=others[0])
        np.subtract(others[4], a, out=others[6])

    def work() -> None:
        for size in tiles:
            for r in range(rounds):
                one(buffers[:, :size], mask[:size], r)

    return work


@part
def Lookups(elements: int, passes: int) -> Work:
    """Passes that look every element of tiles up in a small table of uint32."""
    table = np.arange(1000, dtype=np.uint32)
    row = np.arange(TILE) * table.size // TILE
    out = np.empty(TILE, np.uint32)
    tiles = _tiles(elements, TILE)

    def work() -> None:
        for size in tiles:
            for _ in range(passes):
                np.take(table, row[:size], out=out[:size], mode="clip")

    return work


@part
def Gather(elements: int, rows: int) -> Work:
    """Reading int32 at random places of a table, into int64."""
    rng = np.random.default_rng(0)
    table = np.arange(rows, dtype=np.int32)
    places = rng.integers(0, rows, elements)
    out = np.empty(elements, np.int64)
    short = np.empty(TILE, np.int32)

    def work() -> None:
        for first in range(0, places.size, TILE):
            part = places[first : first + TILE]
            np.take(table, part, out=short[: part.size], mode="clip")
            np.copyto(out[first : first + TILE], short[: part.size])

    return work


@part
def Lists(lists: int, size: int) -> Work:
    """Lists of Python integers made of an int64 array, and forgotten."""
    block = _block(size)
    return _again(-(-lists // block.shape[0]), block.tolist)


@part
def Views(views: int, size: int) -> Work:
    """Views of the rows of an int64 array."""
    block = _block(size)
    return _again(-(-views // block.shape[0]), lambda: list(block))


@part
def Slices(slices: int, size: int) -> Work:
    """Views cut out of an int64 array by their ends, in a Python loop."""
    flat = _block(size).reshape(-1)
    ends = list(range(size, flat.size + 1, size))
    return _again(-(-slices // len(ends)), lambda: [flat[end - size : end] for end in ends])


@part
def Tensors(tensors: int, size: int) -> Work:
    """Tensors made of copies of the rows of an int64 array."""
    import torch

    block = _block(size)
    rounds = -(-tensors // block.shape[0])
    return _again(rounds, lambda: [torch.from_numpy(row.copy()) for row in block])


@part
def Calls(calls: int, size: int) -> Work:
    """Calls of NumPy on short int64 arrays, a few of them from Python functions."""
    a = np.arange(size)
    offsets = np.arange(1000)

    def mixed(x: Any) -> Any:
        x = (x * 0x2C1B3C6D) & 0xFFFFFFFF
        return x ^ (x >> 15)

    def work() -> None:
        for _ in range(calls // 12):
            b = mixed(mixed(a)) & 255
            offsets[b].cumsum()
            bool((b < 3).all())

    return work


@part
def Repeats(elements: int, rows: int, passes: int) -> Work:
    """Passes that give every element of tiles of bytes its row's value, and compare and mix."""
    values = np.arange(rows, dtype=np.uint8)
    lengths = np.full(rows, TILE // rows)
    x = np.zeros(TILE // rows * rows, np.uint8)
    same = np.empty(x.shape, np.bool_)
    rounds = -(-elements // x.size)

    def work() -> None:
        for _ in range(rounds):
            for _ in range(passes):
                spread = np.repeat(values, lengths)
                np.equal(x, spread, out=same)
                np.bitwise_xor(spread, x, out=spread)
                np.multiply(spread, same.view(np.uint8), out=spread)
                np.bitwise_xor(x, spread, out=x)

    return work


@part
def PlainCalls(calls: int) -> Work:
    """Calls of Python functions that make and read small dictionaries of integers."""

    def made(step: int) -> dict[str, int]:
        return {"version": 1, "epoch": 0, "slot": step, "seed": 7}

    def read(state: dict[str, int]) -> int:
        return state["slot"] + int(state.get("width", 1))

    def work() -> None:
        for step in range(calls // 2):
            read(made(step))

    return work


@part
def Searches(searches: int, rows: int) -> Work:
    """Numbers looked for in a sorted table, in no order, and the table read where they are."""
    table = np.arange(rows) * 40
    wanted = np.random.default_rng(0).integers(0, int(table[-1]), searches)

    def work() -> None:
        place = np.searchsorted(table, wanted, side="right") - 1
        wanted - table[place]

    return work


@part
def Reads(elements: int, passes: int) -> Work:
    """Passes over int64 arrays block by block: differences, comparisons, sums."""
    x = np.arange(elements)

    def work() -> None:
        for first in range(0, x.size, TILE):
            part = x[first : first + TILE]
            for i in range(passes):
                if i % 3 == 0:
                    part.sum()
                elif i % 3 == 1:
                    (part[1:] != part[:-1]).any()
                else:
                    part - first

    return work


@part
def RadixSorts(elements: int, keys: int) -> Work:
    """Chunks of keys of 16 bits sorted, counted, and written to where they belong."""
    chunk = 1 << 16
    ids = np.random.default_rng(0).integers(0, keys, elements)
    counts = np.bincount(ids, minlength=keys)
    out = np.empty(elements, np.int32)

    def work() -> None:
        cursor = np.cumsum(counts) - counts
        for first in range(0, ids.size, chunk):
            group = ids[first : first + chunk].astype(np.uint16)
            ranked = group.argsort(kind="stable")
            found = np.bincount(group, minlength=keys)
            target = np.repeat(cursor - (np.cumsum(found) - found), found)
            target += np.arange(group.size)
            ranked += first
            out[target] = ranked
            cursor += found

    return work


@part
def Rows(rows: int, width: int, batch: int) -> Work:
    """Rows of float32 gathered at random places, many at once, and cut into batches."""
    rng = np.random.default_rng(0)
    table = rng.random((rows, width), dtype=np.float32)
    places = rng.integers(0, rows, rows)

    def work() -> None:
        for first in range(0, places.size, TILE):
            taken = np.take(table, places[first : first + TILE], axis=0)
            whole = taken.shape[0] // batch * batch
            for _ in list(taken[:whole].reshape(-1, batch, width)):
                pass

    return work


def together(parts: tuple[Part, ...]) -> Callable[[], Any]:
    """Return one call that does all the work."""
    calls = [part() for part in parts]

    def work() -> None:
        for call in calls:
            call()

    return work


def _again(rounds: int, make: Callable[[], list[Any]]) -> Work:
    """Return the work of making lists, and of going through them."""

    def work() -> None:
        for _ in range(rounds):
            for _ in make():
                pass

    return work


def _tiles(elements: int, tile: int) -> list[int]:
    whole, rest = divmod(elements, tile)
    return [tile] * whole + [rest] * (rest > 0)


def _block(size: int) -> Any:
    """Return the rows that one block of iteration would hold."""
    return np.arange(TILE // size * size, dtype=np.int64).reshape(-1, size)
