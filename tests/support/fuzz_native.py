"""Call the compiled module with random tables, for a build with sanitizers: no result is checked.

python -m support.fuzz_native FOLDER SECONDS SEED

FOLDER has the module. Every array is allocated to the byte, so that the address sanitizer sees an
access next to it.
"""

from __future__ import annotations

import ctypes
import random
import sys
import time
from typing import Any

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

EXTREMES = [-(2**63), -(2**62), -(2**31), -1, 0, 1, 2, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]


class Arrays:
    """Arrays of int64 with exactly as many bytes as they need."""

    def __init__(self) -> None:
        self._addresses: list[int] = []

    def new(self, values: list[int], item_bytes: int = 8) -> int:
        item = ctypes.c_int64 if item_bytes == 8 else ctypes.c_int32
        address = libc.malloc(max(1, item_bytes * len(values)))
        (item * len(values)).from_address(address)[:] = values
        self._addresses.append(address)
        return address

    def free(self) -> None:
        for address in self._addresses:
            libc.free(address)


def some(likely: int) -> int:
    """A likely number, or an extreme one."""
    return random.choice([random.randrange(likely), random.randrange(likely), *EXTREMES])


def column(count: int, likely: int) -> list[int]:
    """Likely numbers, in half of the cases with extreme ones between them."""
    if random.random() < 0.5:
        return [random.randrange(likely) for _ in range(count)]
    return [some(likely) for _ in range(count)]


def evaluate(native: Any, arrays: Arrays) -> None:
    groups = random.randint(1, 6)
    counts = [random.randint(1, random.choice([8, 40, 300, 70_000])) for _ in range(groups)]
    sizes = [random.randint(1, 70) for _ in range(groups)]
    batches = [-(-count // size) for count, size in zip(counts, sizes, strict=True)]
    starts = [sum(counts[:k]) for k in range(groups)]
    offsets = [sum(batches[:k]) for k in range(groups)]
    larger, group_of = column(groups, 3), column(groups, groups)
    tables = [counts, starts, sizes, larger, offsets, group_of]
    if random.random() < 0.7:
        wrong = random.randrange(6)
        tables[wrong] = [some(max(1, *tables[wrong]) if random.random() < 0.5 else 50)
                         for _ in range(groups)]  # fmt: skip
    addresses = [arrays.new(table) for table in tables]
    for optional in (3, 5):
        if random.random() < 0.5:
            addresses[optional] = 0
    num_slots = sum(batches) if random.random() < 0.8 else some(1000)
    count, capacity = random.randint(0, 200), random.randint(0, 3000)
    flags = [random.randrange(2) for _ in range(3)]
    width = random.choice([0, 0, random.randint(1, 100), some(100)])
    states = [random.getrandbits(32) for _ in range(4)]
    job = arrays.new([groups, num_slots, *addresses, *flags, width, *states])
    slots = arrays.new(column(count, 2 * sum(batches))) if random.random() < 0.5 else 0
    rows, out = arrays.new([0] * (4 * count)), arrays.new([0] * capacity)
    if random.random() < 0.1:
        out = 0
    where = slots, some(1000), some(5)
    native.evaluate(job, abs(some(9)) % 2**63, *where, count, rows, out, capacity)


def ranges(native: Any, arrays: Arrays) -> None:
    count, capacity = random.randint(0, 150), random.randint(0, 3000)
    size = [random.randint(0, 40) for _ in range(count)]
    if random.random() < 0.5:
        capacity = sum(size)
    elif random.random() < 0.5:
        size = column(count, 40)
    n = [random.randint(1, random.choice([32, 200, 2**31 - 1])) for _ in range(count)]
    if random.random() < 0.3:
        n = column(count, 100)
    columns = [column(count, 50), size, n, *(column(count, 2**32) for _ in range(3))]
    addresses = [arrays.new(values) for values in columns]
    if random.random() < 0.3:
        addresses[4] = addresses[5] = 0
    native.ranges(*addresses, count, arrays.new([0] * capacity), capacity)


def permute(native: Any, arrays: Arrays) -> None:
    count = random.randint(0, 200)
    n = random.choice([some(100), random.randint(1, 2**62 - 1), random.randint(1, 2**33)])
    x = [random.randrange(max(n, 1)) for _ in range(count)]
    if count and random.random() < 0.5:
        x[random.randrange(count)] = some(100)
    key = random.getrandbits(32), random.getrandbits(32)
    native.permute(arrays.new(x), arrays.new([0] * count), count, n, *key)


def keys(native: Any, arrays: Arrays) -> None:
    count = random.randint(0, 200)
    passes = arrays.new(column(count, 50)) if random.random() < 0.5 else 0
    state = random.getrandbits(32), random.getrandbits(32)
    groups = arrays.new(column(count, 50))
    k0, k1 = (arrays.new([0] * count) for _ in range(2))
    native.keys(*state, passes, some(50), groups, count, k0, k1)


def look_up(native: Any, arrays: Arrays) -> None:
    size, count = random.randint(1, 50), random.randint(0, 200)
    item_bytes = random.choice([4, 8])
    order = arrays.new(list(range(size)), item_bytes)
    positions = arrays.new(column(count, size))
    native.look_up(order, item_bytes, size, positions, positions, count)


def place(native: Any, arrays: Arrays) -> None:
    count, groups, size = random.randint(0, 200), random.randint(1, 9), random.randint(1, 300)
    order_bytes = random.choice([4, 8])
    order = arrays.new([0] * size, order_bytes)
    tables = [arrays.new(column(groups, size)) for _ in range(2)]
    group_bytes = random.choice([4, 8])
    numbers = [number % 2**31 if group_bytes == 4 else number for number in column(count, groups)]
    group = arrays.new(numbers, group_bytes)
    arguments = group, group_bytes, count, some(9), *tables, groups, order, order_bytes, size
    if native.place(*arguments) < count:
        raise ValueError


def verify(native: Any, arrays: Arrays) -> None:
    item_bytes = random.choice([4, 8])
    # More items than a block, now and then.
    size = random.choice([random.randint(1, 50), random.randint(1, 50), random.randint(1, 40_000)])
    each = 65536 // item_bytes
    blocks = -(-size // each)
    order = arrays.new(list(range(size)), item_bytes)
    sums = arrays.new([0] * blocks)
    native.sums(order, item_bytes, size, sums)
    is_verified = arrays.new([0] * -(-blocks // 4), 4)
    positions = column(random.randint(0, 200), size)
    arguments = order, item_bytes, size, abs(some(2 * size)) % 2**63, sums, is_verified
    _, wrong = native.verify(*arguments, arrays.new(positions), len(positions))
    if wrong:
        raise ValueError


def main(folder: str, seconds: str, seed: str) -> None:
    sys.path.insert(0, folder)
    import native

    random.seed(int(seed))
    calls = dict.fromkeys((evaluate, ranges, permute, keys, look_up, place, verify), (0, 0))
    forms = native.forms()
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        native.use(random.choice(forms))
        function = random.choice(list(calls))
        arrays = Arrays()
        done, refused = calls[function]
        try:
            function(native, arrays)
            done += 1
        except ValueError:
            refused += 1
        arrays.free()
        calls[function] = done, refused
    for function, (done, refused) in calls.items():
        print(function.__name__, done, refused)


if __name__ == "__main__":
    main(*sys.argv[1:])
