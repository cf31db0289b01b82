"""Mixing: what share of an epoch's batches a patch has.

A patch with as many slots as it has batches is gone through once an epoch. One with more starts
another pass, under a fresh permutation; one with fewer goes on in the next epoch where it stopped
in this one. Both follow from one line: the j-th slot of the patch in an epoch is its batch number
``t = epoch * slots + j`` since the beginning, and ``divmod(t, own_batches)`` is the pass and the
batch in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_bins import first_bins, reduce_by_patch
from gpusampler.batching.costs import positive_by_patch
from gpusampler.core.arrays import Int64
from gpusampler.core.text import short_repr
from gpusampler.core.validation import check_int, check_real
from gpusampler.groups.patch_groups import PatchGroups

WEIGHT_SUM = 1 << 52
"""Weights are integers that add up to about this much: a sum that float64 and int64 hold."""

EPOCH_BATCHES_LIMIT = 1 << 60
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
        check_real(self.t, "t", "be > 0", lambda x: x > 0)

    def weights(self, own: Int64) -> NDArray[np.float64]:
        """Return the weights of patches that have ``own`` batches each, shape (G,); 0 for none."""
        if self.t == 1:
            return own.astype(np.float64)
        # Relative to the largest: no power overflows, and what underflows is 0 and gets one slot.
        power = np.power(own / max(int(own.max()), 1), 1.0 / float(self.t))
        # Processors differ in the last bits of a power; shares hardly ever depend on others.
        mantissa, exponent = np.frexp(power)
        return np.where(own > 0, np.ldexp(np.rint(mantissa * 2.0**32), exponent - 32), 0.0)


def check_epoch_batches(value: Any) -> int | None:
    """Return the batches of an epoch as an int, None if they are left out, or raise."""
    if value is None:
        return None
    return check_int(value, "epoch_batches", low=1, high=EPOCH_BATCHES_LIMIT)


def slots_by_patch(
    weights: Any,
    epoch_batches: int | None,
    groups: PatchGroups,
    own_batches: Int64,
    patch_of_bin: Int64 | None = None,
) -> Int64:
    """Return the slots of each patch in an epoch.

    Parameters
    ----------
    weights : array (G,), mapping, Temperature, or None
        A patch's share of the batches; None: its own batches.
    epoch_batches : int, optional
        Slots of an epoch; default: all patches' own batches.
    groups : PatchGroups
    own_batches : int64 array, shape (P,)
        Batches that each patch, or each cost bin of one, is cut into; those without any take no
        part.
    patch_of_bin : int64 array, shape (P,), optional
        The patch of each bin, ascending; a patch's slots are shared out by its bins' batches.

    Returns
    -------
    int64 array, shape (P,)
        At least 1 for each patch that has a batch; see `apportion`.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or there are fewer slots than patches.
    """
    min_slots = (own_batches > 0).astype(np.int64)
    num_taking_part = int(min_slots.sum())
    total = check_epoch_batches(epoch_batches)
    total = int(own_batches.sum()) if total is None else total
    if total < num_taking_part:
        units = "patches"
        if patch_of_bin is not None:
            units = "classes of cost that patches are cut into, those"
        raise ValueError(
            f"epoch_batches must be at least the number of {units} that have a batch, "
            f"{num_taking_part}, got {total}"
        )
    patch_batches, patch_min_slots = (
        reduce_by_patch(values, patch_of_bin, np.add) for values in (own_batches, min_slots)
    )
    patch_weights = integer_weights(_check_weights(weights, groups, patch_batches))
    shares = apportion(patch_weights, total, patch_min_slots)
    if patch_of_bin is None:
        return shares
    return apportion_each(own_batches, shares, first_bins(patch_of_bin), min_slots)


def _check_weights(weights: Any, groups: PatchGroups, own_batches: Int64) -> NDArray[np.float64]:
    """Return the weights of patches, 0 where they have no batch."""
    if weights is None:
        return own_batches.astype(np.float64)
    if isinstance(weights, Temperature):
        return weights.weights(own_batches)
    if callable(weights) and not hasattr(weights, "keys"):
        raise TypeError(
            "weights must be a mapping from patch ids, numbers by ascending patch id, or a "
            f"Temperature, got {short_repr(weights)}"
        )
    return np.where(own_batches > 0, positive_by_patch(weights, groups, "weights"), 0.0)


def pass_and_batch(epoch: Any, j: Any, slots: Any, own_batches: Any) -> tuple[Any, Any]:
    """Return ``divmod(epoch * slots + j, own_batches)``: the pass over a patch and the batch in it.

    The product is beyond 64 bits; what is multiplied here is not, but for the pass itself, which is
    taken modulo 2**64, as int64 arrays of every library wrap around. Keys read the 64 bits.

    Parameters
    ----------
    epoch : int, or 0-d int64 array
        0 .. 2**63 - 1.
    j, slots, own_batches : int64 arrays of one shape
        The slot among the patch's ``slots`` of an epoch, and its own batches, 1 .. 2**31 - 1.
    """
    epoch_quotient, epoch_remainder = epoch // own_batches, epoch % own_batches
    slot_quotient, slot_remainder = slots // own_batches, slots % own_batches
    product = epoch_remainder * slot_remainder
    batch = product % own_batches + j
    passes = epoch * slot_quotient + epoch_quotient * slot_remainder
    return passes + product // own_batches + batch // own_batches, batch % own_batches


def integer_weights(weights: NDArray[np.float64]) -> Int64:
    """Return weights as integers in the same ratio, whose sum is at most about 2**52.

    Integral ones of a small sum stay as they are; others are multiplied by a power of two, which
    is exact, and rounded. The sum that decides is rounded once, so that all machines agree.
    """
    total = math.fsum(weights.tolist())
    if total <= WEIGHT_SUM and bool((weights == np.floor(weights)).all()):
        return weights.astype(np.int64)
    exponent = math.frexp(total)[1]
    return np.rint(np.ldexp(weights, 52 - exponent)).astype(np.int64)


def apportion(weights: Int64, total: int, minimum: Int64) -> Int64:
    """Share out a total in proportion to weights: at least so much each, within 1 of the share.

    Who would get less than its minimum gets that, and the others share the rest: whole parts first,
    what is left over one each by the largest remainders (Hamilton's method), the lower place at a
    tie.

    Parameters
    ----------
    weights : int64 array, shape (G,)
        0 or more, of a sum below 2**62.
    total : int
        At least the sum of ``minimum``, below 2**60.
    minimum : int64 array, shape (G,)
        0: gets nothing.

    Returns
    -------
    int64 array, shape (G,)
        They add up to ``total``.
    """
    return apportion_each(weights, np.array([total]), np.zeros(1, np.int64), minimum)


def apportion_each(weights: Int64, totals: Int64, first: Int64, minimum: Int64) -> Int64:
    """`apportion` several totals, each among neighbours: those from ``first`` on, shape (S,)."""
    shares = np.where(minimum > 0, minimum, 0)
    owners = np.repeat(np.arange(first.size), np.diff(first, append=weights.size))
    is_free = minimum > 0
    while True:
        remaining = totals - np.add.reduceat(np.where(is_free, 0, shares), first)
        weight_sums = np.add.reduceat(np.where(is_free, weights, 0), first)
        free = np.flatnonzero(is_free)
        owner = owners[free]
        quotient, remainder = _divmod_product(weights[free], remaining[owner], weight_sums[owner])
        below_minimum = quotient < minimum[free]
        if not below_minimum.any():
            break
        is_free[free[below_minimum]] = False
    shares[free] = quotient
    # The rest of each total goes to its largest remainders.
    leftover = remaining - np.add.reduceat(np.where(is_free, shares, 0), first)
    by_remainder = np.lexsort((-remainder, owner))
    free, owner = free[by_remainder], owner[by_remainder]
    first_of_total = np.searchsorted(owner, np.arange(first.size))
    shares[free] += np.arange(free.size) - first_of_total[owner] < leftover[owner]
    return shares


def _divmod_product(weights: Int64, totals: Int64, divisors: Int64) -> tuple[Int64, Int64]:
    """Return ``divmod(weights * totals, divisors)``, whose products are beyond 64 bits.

    The quotient is guessed in float64, good to 2**-50, and what it lacks is worked out modulo
    2**64: it is far smaller, so that it comes out exactly. (Slots that are shared out again, as
    steps, may add up to more than float64 holds.)
    """
    divisors = np.maximum(divisors, 1)
    if bool((divisors > 2 * WEIGHT_SUM).any()):
        rows = zip(weights.tolist(), totals.tolist(), divisors.tolist(), strict=True)
        pairs = [divmod(weight * total, divisor) for weight, total, divisor in rows]
        results = np.array(pairs, np.int64).reshape(-1, 2)
        return results[:, 0], results[:, 1]
    guess = np.floor(weights.astype(np.float64) * (totals / divisors)).astype(np.int64)
    remainder = weights * totals - guess * divisors
    correction = remainder // divisors
    return guess + correction, remainder - correction * divisors
