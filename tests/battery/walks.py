"""Keys that a run really uses: consecutive seeds, epochs and groups, and neighbours of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpusampler.permutation.reference import PURPOSE_BATCHES, PURPOSE_SAMPLES

SIDE = 64
"""Groups in an epoch and epochs under a seed of the `cube` walk."""


class Keys(NamedTuple):
    """K keys by what they are derived from; each field an int or an int64 array of shape (K,)."""

    seed: Any
    purpose: int
    epoch: Any
    group: Any

    @property
    def count(self) -> int:
        return int(np.broadcast(self.seed, self.epoch, self.group).size)


Walk = Callable[[np.ndarray], Keys]


def along_seed(i: np.ndarray) -> Keys:
    return Keys(i, PURPOSE_SAMPLES, 0, 0)


def along_epoch(i: np.ndarray) -> Keys:
    return Keys(0, PURPOSE_SAMPLES, i, 0)


def along_group(i: np.ndarray) -> Keys:
    return Keys(0, PURPOSE_SAMPLES, 0, i)


def cube(i: np.ndarray) -> Keys:
    """All three at once, every one consecutive from 0."""
    return Keys(i // SIDE**2, PURPOSE_SAMPLES, i // SIDE % SIDE, i % SIDE)


WALKS = {"seed": along_seed, "epoch": along_epoch, "group": along_group}


def batches(walk: Walk, count: int, size: int) -> Iterator[Keys]:
    """Keys 0 .. count-1 of a walk, ``size`` at a time."""
    for start in range(0, count, size):
        yield walk(np.arange(start, min(start + size, count), dtype=np.int64))


def _even_cube(i: np.ndarray) -> Keys:
    """Return even coordinates only, so that no neighbour is a key of another pair: pairs stay
    independent of one another.
    """
    seed, purpose, epoch, group = cube(i)
    return Keys(2 * seed, purpose, 2 * epoch, 2 * group)


def _for_batches(keys: Keys) -> Keys:
    """Keys of batch orders carry no group; what the cube calls group becomes more epochs."""
    return Keys(keys.seed, PURPOSE_BATCHES, keys.epoch * SIDE + keys.group, 0)


def _moved(seed: int = 0, epoch: int = 0, group: int = 0) -> Callable[[Keys], Keys]:
    def move(keys: Keys) -> Keys:
        return Keys(keys.seed + seed, keys.purpose, keys.epoch + epoch, keys.group + group)

    return move


def _same(keys: Keys) -> Keys:
    return keys


def _purpose(purpose: int) -> Callable[[Keys], Keys]:
    def change(keys: Keys) -> Keys:
        return keys._replace(purpose=purpose)

    return change


def _swapped(keys: Keys) -> Keys:
    return keys._replace(epoch=keys.group, group=keys.epoch)


# What stands against what: two functions of an even key.
NEIGHBOURS: dict[str, tuple[Callable[[Keys], Keys], Callable[[Keys], Keys]]] = {
    "e | e+1": (_same, _moved(epoch=1)),
    "g | g+1": (_same, _moved(group=1)),
    "s | s+1": (_same, _moved(seed=1)),
    "s,e+1 | s+1,e": (_moved(epoch=1), _moved(seed=1)),
    "e,g+1 | e+1,g": (_moved(group=1), _moved(epoch=1)),
    "e,g+1 | g+1,e": (_moved(group=1), lambda keys: _swapped(_moved(group=1)(keys))),
    "s | s+2^32": (_same, _moved(seed=1 << 32)),
    "e | e+2^32": (_same, _moved(epoch=1 << 32)),
    "purpose 3 | 1": (_same, _purpose(1)),
    "purpose 1 | 2": (_purpose(1), _purpose(2)),
    "batches e | e+1": (_for_batches, lambda keys: _for_batches(_moved(group=1)(keys))),
    "batches s | s+1": (_for_batches, lambda keys: _for_batches(_moved(seed=1)(keys))),
    "batches s,e+1 | s+1,e": (
        lambda keys: _for_batches(_moved(group=1)(keys)),
        lambda keys: _for_batches(_moved(seed=1)(keys)),
    ),
}


def neighbours(name: str, count: int, size: int) -> Iterator[tuple[Keys, Keys]]:
    """Yield ``count`` pairs of neighbouring keys, ``size`` at a time; no key is in two pairs."""
    left, right = NEIGHBOURS[name]
    for keys in batches(_even_cube, count, size):
        yield left(keys), right(keys)
