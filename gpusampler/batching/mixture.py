"""Mixing: what share of an epoch's batches a patch has.

A patch with as many slots as it has batches is gone through once an epoch. One with more starts
another pass, under a fresh permutation; one with fewer goes on in the next epoch where it stopped
in this one. Both follow from one line: the j-th slot of the patch in an epoch is its batch number
``t = epoch * slots + j`` since the beginning, and ``divmod(t, own batches)`` is the pass and the
batch in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.costs import costs_by_patch
from gpusampler.core.arrays import Int64
from gpusampler.core.text import shown
from gpusampler.core.validation import checked_int
from gpusampler.groups.patch_groups import PatchGroups

EXACT = 1 << 52
"""Weights are integers that add up to about this much: a sum that float64 and int64 hold."""

MOST_BATCHES = 1 << 60
"""Batches of an epoch are fewer."""


@dataclass(frozen=True)
class Temperature:
    """Weights between the patches' own sizes and equal shares, for ``weights``.

    A patch's share of an epoch's batches goes with its own batches to the power of 1 / t: 1 is the
    plain epoch, more brings small patches up, infinity gives all patches equally many. (The
    temperature of mixtures of languages and tasks: Arivazhagan et al. 2019, arXiv 1907.05019.)

    Parameters
    ----------
    t : float
        > 0; ``float("inf")`` is allowed.

    Raises
    ------
    TypeError, ValueError
        If it is no such number.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([1] * 90 + [2] * 10, 1, seed=0, weights=Temperature(2))
    >>> sampler.coverage().batches.tolist()
    [75, 25]
    """

    t: float

    def __post_init__(self) -> None:
        """Check the number."""
        if isinstance(self.t, (bool, np.bool_)) or not isinstance(
            self.t, (int, float, np.integer, np.floating)
        ):
            raise TypeError(f"t must be a number, got {shown(self.t)}")
        if not self.t > 0:
            raise ValueError(f"t must be > 0, got {self.t}")

    def weights(self, own: Int64) -> NDArray[np.float64]:
        """Return the weights of patches that have ``own`` batches each, shape (G,); 0 for none."""
        if self.t == 1:
            return own.astype(np.float64)
        # Relative to the largest: no power overflows, and what underflows is 0 and gets one slot.
        power = np.power(own / max(int(own.max()), 1), 1.0 / float(self.t))
        # Processors differ in the last bits of a power; shares hardly ever depend on others.
        mantissa, exponent = np.frexp(power)
        return np.where(own > 0, np.ldexp(np.rint(mantissa * 2.0**32), exponent - 32), 0.0)


def checked_epoch_batches(value: Any) -> int | None:
    """Return the batches of an epoch as an int, None if they are left out, or raise."""
    if value is None:
        return None
    return checked_int(value, "epoch_batches", least=1, below=MOST_BATCHES)


def slots_by_patch(
    weights: Any,
    epoch_batches: int | None,
    groups: PatchGroups,
    own: Int64,
    parents: Int64 | None = None,
) -> Int64:
    """Return the slots of each patch in an epoch.

    Parameters
    ----------
    weights : array (G,), mapping, Temperature, or None
        A patch's share of the batches; None: its own batches.
    epoch_batches : int, optional
        Slots of an epoch; default: all patches' own batches.
    groups : PatchGroups
    own : int64 array, shape (P,)
        Batches that each patch, or each class of cost of one, is cut into; those without any take
        no part.
    parents : int64 array, shape (P,), optional
        The patch of each class, ascending; a patch's slots are shared out by its classes' batches.

    Returns
    -------
    int64 array, shape (P,)
        At least 1 for each patch that has a batch; see `apportion`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or there are fewer slots than patches.
    """
    parts = (own > 0).astype(np.int64)
    taking_part = int(parts.sum())
    given = checked_epoch_batches(epoch_batches)
    total = int(own.sum()) if given is None else given
    if total < taking_part:
        what = "patches" if parents is None else "classes of cost that patches are cut into, those"
        raise ValueError(
            f"epoch_batches must be at least the number of {what} that have a batch, "
            f"{taking_part}, got {total}"
        )
    of_patches, least, first = own, parts, np.arange(own.size)
    if parents is not None:
        first = np.flatnonzero(np.diff(parents, prepend=-1))
        of_patches, least = np.add.reduceat(own, first), np.add.reduceat(parts, first)
    shares = apportion(as_integers(_weights(weights, groups, of_patches)), total, least)
    return shares if parents is None else apportion_each(own, shares, first, parts)


def _weights(weights: Any, groups: PatchGroups, own: Int64) -> NDArray[np.float64]:
    """Return the weights of patches, 0 where they have no batch."""
    if weights is None:
        return own.astype(np.float64)
    if isinstance(weights, Temperature):
        return weights.weights(own)
    if callable(weights) and not hasattr(weights, "keys"):
        raise TypeError(
            "weights must be a mapping from patch ids, numbers by ascending patch id, or a "
            f"Temperature, got {shown(weights)}"
        )
    return np.where(own > 0, costs_by_patch(weights, groups, "weights"), 0.0)


def pass_and_batch(epoch: Any, j: Any, slots: Any, own: Any) -> tuple[Any, Any]:
    """Return ``divmod(epoch * slots + j, own)``: the pass over a patch, and the batch in it.

    The product is beyond 64 bits; what is multiplied here is not, but for the pass itself, which is
    taken modulo 2**64, as int64 arrays of every library wrap around. Keys read the 64 bits.

    Parameters
    ----------
    epoch : int, or 0-d int64 array
        0 .. 2**63 - 1.
    j, slots, own : int64 arrays of one shape
        The slot among the patch's ``slots`` of an epoch, and its own batches, 1 .. 2**31 - 1.
    """
    turns, left = epoch // own, epoch % own
    times, rest = slots // own, slots % own
    begun = left * rest
    place = begun % own + j
    return epoch * times + turns * rest + begun // own + place // own, place % own


def as_integers(weights: NDArray[np.float64]) -> Int64:
    """Return weights as integers in the same ratio, whose sum is at most about 2**52.

    Integral ones of a small sum stay as they are; others are multiplied by a power of two, which
    is exact, and rounded. The sum that decides is rounded once, so that all machines agree.
    """
    total = math.fsum(weights.tolist())
    if total <= EXACT and bool((weights == np.floor(weights)).all()):
        return weights.astype(np.int64)
    exponent = math.frexp(total)[1]
    return np.rint(np.ldexp(weights, 52 - exponent)).astype(np.int64)


def apportion(weights: Int64, total: int, least: Int64) -> Int64:
    """Share out a total in proportion to weights: at least so much each, within 1 of the share.

    Who would get less than its least gets that, and the others share the rest: whole parts first,
    what is left over one each by the largest remainders (Hamilton's method), the lower place at a
    tie.

    Parameters
    ----------
    weights : int64 array, shape (G,)
        0 or more, of a sum below 2**62.
    total : int
        At least the sum of ``least``, below 2**60.
    least : int64 array, shape (G,)
        0: gets nothing.

    Returns
    -------
    int64 array, shape (G,)
        They add up to ``total``.
    """
    return apportion_each(weights, np.array([total]), np.zeros(1, np.int64), least)


def apportion_each(weights: Int64, totals: Int64, first: Int64, least: Int64) -> Int64:
    """`apportion` several totals, each among neighbours: those from ``first`` on, shape (S,)."""
    shares = np.where(least > 0, least, 0)
    among = np.repeat(np.arange(first.size), np.diff(first, append=weights.size))
    free = least > 0
    while True:
        rest = totals - np.add.reduceat(np.where(free, 0, shares), first)
        divisor = np.add.reduceat(np.where(free, weights, 0), first)
        place = np.flatnonzero(free)
        owner = among[place]
        whole, left = _divided(weights[place], rest[owner], divisor[owner])
        few = whole < least[place]
        if not few.any():
            break
        free[place[few]] = False
    shares[place] = whole
    # The rest of each total goes to its largest remainders.
    over = rest - np.add.reduceat(np.where(free, shares, 0), first)
    by_rest = np.lexsort((-left, owner))
    place, owner = place[by_rest], owner[by_rest]
    met = np.searchsorted(owner, np.arange(first.size))
    shares[place] += np.arange(place.size) - met[owner] < over[owner]
    return shares


def _divided(weights: Int64, totals: Int64, divisors: Int64) -> tuple[Int64, Int64]:
    """Return ``divmod(weights * totals, divisors)``, whose products are beyond 64 bits.

    The quotient is guessed in float64, good to 2**-50, and what it lacks is worked out modulo
    2**64: it is far smaller, so that it comes out exactly. (Slots that are shared out again, as
    steps, may add up to more than float64 holds.)
    """
    divisors = np.maximum(divisors, 1)
    if bool((divisors > 2 * EXACT).any()):
        listed = zip(weights.tolist(), totals.tolist(), divisors.tolist(), strict=True)
        pairs = [divmod(weight * total, divisor) for weight, total, divisor in listed]
        found = np.array(pairs, np.int64).reshape(-1, 2)
        return found[:, 0], found[:, 1]
    guess = np.floor(weights.astype(np.float64) * (totals / divisors)).astype(np.int64)
    left = weights * totals - guess * divisors
    more = left // divisors
    return guess + more, left - more * divisors
