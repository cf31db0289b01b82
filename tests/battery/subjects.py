"""What the battery is run on: the real permutation, two oracles, and controls that must fail."""

from __future__ import annotations

import numpy as np

from gpusampler.permutation import numpy_impl
from gpusampler.permutation.reference import (
    COIN_ROUND,
    MIX_1,
    SPREAD,
    Grid,
    derive_key,
    grid_of,
    keyed_hash,
    rounds_for,
)

from .walks import Keys

Words = tuple[np.ndarray, np.ndarray]


class Subject:
    """The real permutation: `derive_key` and the fast form. Controls change one thing each."""

    name = "version 1"

    def words(self, keys: Keys) -> Words:
        """Key words, int64 arrays of shape (K,)."""
        k0, k1 = derive_key(keys.seed, keys.purpose, keys.epoch, keys.group)
        shape = (keys.count,)
        return np.broadcast_to(k0, shape), np.broadcast_to(k1, shape)

    def rounds(self, n: int) -> int:
        return rounds_for(n)

    def images(self, n: int, keys: Keys, x: np.ndarray) -> np.ndarray:
        """Images of positions ``x`` (P,) under each of K keys: int64, shape (K, P)."""
        k0, k1 = self.words(keys)
        out = np.empty((k0.size, x.size), np.int64)
        width = min(x.size, numpy_impl.TILE)
        step = numpy_impl.TILE // width
        for first in range(0, x.size, width):
            part = x[first : first + width]
            for start in range(0, k0.size, step):
                rows = slice(start, start + step)
                images = self.tile(n, (k0[rows], k1[rows]), part)
                out[rows, first : first + width] = images.reshape(-1, part.size)
        return out

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        """Images for as many keys as fit in one tile, flat; good until the next call."""
        count = words[0].size
        if n <= 32:
            full = np.full(count, x.size), np.full(count, n)
            return numpy_impl.permute_small(np.tile(x.astype(np.uint8), count), *full, words)

        def spread(values: np.ndarray, to: np.ndarray) -> None:
            to.reshape(-1, x.size)[...] = values[:, None]

        sides = Grid(*(np.array([side]) for side in grid_of(n)))
        positions = np.tile(x, count)
        return numpy_impl.permute_grid(positions, words, sides, self.rounds(n), spread)

    def whole(self, n: int, keys: Keys) -> np.ndarray:
        """Whole permutations, one a row: int64, shape (K, n)."""
        return self.images(n, keys, np.arange(n))


class FewRounds(Subject):
    """Control: the grid stops after ``count`` rounds."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.name = f"{count} rounds"

    def rounds(self, n: int) -> int:
        return self.count


class NoXorshift(Subject):
    """Control: a hash of two multiplications without the xorshift between them."""

    name = "no xorshift"

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        original = numpy_impl._hash_into
        numpy_impl._hash_into = self.hash_into
        try:
            return super().tile(n, words, x)
        finally:
            numpy_impl._hash_into = original

    @staticmethod
    def hash_into(out: np.ndarray, value: np.ndarray, key: np.ndarray, scratch: np.ndarray) -> None:
        np.multiply(value, np.uint32(SPREAD), out=out)
        np.bitwise_xor(out, key, out=out)
        np.multiply(out, np.uint32(MIX_1), out=out)


class SeedPlusEpoch(Subject):
    """Control: the key of grain, torch and MosaicML, under which (0, 1) equals (1, 0)."""

    name = "seed + epoch"

    def words(self, keys: Keys) -> Words:
        return super().words(keys._replace(seed=keys.seed + keys.epoch, epoch=0))


class EpochPlusGroup(Subject):
    """Control: epoch and group added."""

    name = "epoch + group"

    def words(self, keys: Keys) -> Words:
        return super().words(keys._replace(epoch=keys.epoch + keys.group, group=0))


class EpochXorGroup(Subject):
    """Control: epoch and group folded together, so that they can trade places."""

    name = "epoch xor group"

    def words(self, keys: Keys) -> Words:
        return super().words(keys._replace(epoch=keys.epoch ^ keys.group, group=0))


class Forgets(Subject):
    """Control: the key does not depend on one of the things it is made from."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.name = f"forgets {field}"

    def words(self, keys: Keys) -> Words:
        gone = np.zeros(keys.count, np.int64) if self.field != "purpose" else 0
        return super().words(keys._replace(**{self.field: gone}))


class LowWords(Subject):
    """Control: seed and epoch cut to 32 bits."""

    name = "32-bit seed and epoch"

    def words(self, keys: Keys) -> Words:
        mask = (1 << 32) - 1
        return super().words(keys._replace(seed=keys.seed & mask, epoch=keys.epoch & mask))


class Shift(Subject):
    """Control: x + k mod n, a keyed bijection that leaves every neighbour where it was."""

    name = "constant shift"

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        return ((x + (words[0] * n >> 32)[:, None]) % n).ravel()


class NoCoin(Subject):
    """Control: the grid without its parity coin; always even where both sides are odd."""

    name = "no parity coin"

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        image = super().tile(n, words, x).reshape(-1, x.size)
        coin = (keyed_hash(words, COIN_ROUND, 0) >> 31).astype(image.dtype)
        return np.where(image < 2, image ^ coin[:, None], image).ravel()


class Feistel(Subject):
    """Control: a balanced Feistel network on 2k bits, k >= 2, as in CCCL: it is always even.

    Every half round moves 2**k rows by exclusive-or, an even number of transpositions each.
    """

    name = "Feistel, 24 rounds"
    count = 24

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        half = (n.bit_length() - 1) // 2
        if n != 1 << 2 * half or half < 2:
            raise ValueError(f"n must be 4**k and at least 16, got {n}")
        key = (words[0][:, None], words[1][:, None])
        left, right = x >> half, x & ((1 << half) - 1)
        for r in range(self.count):
            left, right = right, left ^ keyed_hash(key, r, right) >> (32 - half)
        return (left << half | right).ravel()


class Sattolo(Subject):
    """Control for small n: Fisher-Yates that never leaves an element alone, cycles of n only."""

    name = "Sattolo"

    def step(self, words: Words, i: int) -> np.ndarray:
        return keyed_hash(words, i, i) * i >> 32

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        image = np.tile(x, (words[0].size, 1))
        for i in range(n - 1, 0, -1):
            j = self.step(words, i)[:, None]
            image = np.where(image == i, j, np.where(image == j, i, image))
        return image.ravel()


class OneCombination(Sattolo):
    """Control for small n: a round function that sees 32 of the key's 64 bits: F(7, i)."""

    name = "F(7, i)"

    def step(self, words: Words, i: int) -> np.ndarray:
        return keyed_hash(words, 7, i) * (i + 1) >> 32


class HashModulo(Subject):
    """Control for bijectivity: a hash of x reduced to 0 .. n-1 is no bijection."""

    name = "hash modulo n"

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        key = (words[0][:, None], words[1][:, None])
        return (keyed_hash(key, 0, x) * n >> 32).ravel()


class SortedHashes(Subject):
    """Oracle: positions sorted by a 64-bit hash of (key, position), splitmix64."""

    name = "sorted hashes"

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        state = words[0].astype(np.uint64) << np.uint64(32) | words[1].astype(np.uint64)
        steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = self.scramble(self.scramble(state)[:, None] + steps)
        return np.argsort(z, axis=1)[:, x].ravel()

    @staticmethod
    def scramble(z: np.ndarray) -> np.ndarray:
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)


class Permuted(Subject):
    """Oracle: ``numpy.random.Generator.permuted``; no key, every row is a fresh draw."""

    name = "Generator.permuted"

    def __init__(self) -> None:
        self.generator = np.random.default_rng(20261122)

    def tile(self, n: int, words: Words, x: np.ndarray) -> np.ndarray:
        rows = np.tile(np.arange(n), (words[0].size, 1))
        return self.generator.permuted(rows, axis=1)[:, x].ravel()
