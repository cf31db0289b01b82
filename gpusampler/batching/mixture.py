"""Mixture weights: the number of slots of each patch in an epoch.

A slot holds one batch; a pass returns each of a patch's batches once. A patch with as many slots as
batches has one pass per epoch. With more slots, the patch starts its next pass in the same epoch,
with a new permutation; with fewer, the next epoch continues where this one stopped. Slot j of the
patch in an epoch is its batch number ``t = epoch * slots + j`` since epoch 0. If a pass has
``own_batches`` batches, ``divmod(t, own_batches)`` gives the pass and the batch in that pass.
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
from gpusampler.permutation.reference import key_of, permute_all

WEIGHT_SUM = 1 << 52
"""Approximate sum of integer weights; float64 and int64 represent such sums exactly."""

EPOCH_BATCHES_LIMIT = 1 << 60
"""Exclusive limit on the number of batches in an epoch."""


@dataclass(frozen=True)
class Temperature:
    """Mixture weights between proportional and equal, for the argument ``weights``.

    A patch's share of the batches is proportional to b ** (1 / t), where b is the number of batches
    that its samples fill. ``t=1`` gives the same shares as no weights, ``t > 1`` raises the share
    of small patches, and infinity gives all patches equal shares. (As in mixtures of languages and
    tasks: Arivazhagan et al. 2019, arXiv 1907.05019.)

    Parameters
    ----------
    t : float
        Temperature, > 0; ``float("inf")`` is allowed.

    Raises
    ------
    TypeError, ValueError
        If ``t`` is not a number > 0.

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
        """Return float64 weights from numbers of batches, shape (G,); 0 for patches without any."""
        if self.t == 1:
            return own.astype(np.float64)
        # Relative to the largest: powers cannot overflow; underflow to 0 still gets one slot.
        power = np.power(own / max(int(own.max()), 1), 1.0 / float(self.t))
        # Rounded to 32 bits, because processors differ in the last bits of a power.
        mantissa, exponent = np.frexp(power)
        return np.where(own > 0, np.ldexp(np.rint(mantissa * 2.0**32), exponent - 32), 0.0)


def check_epoch_batches(value: Any) -> int | None:
    """Return ``epoch_batches`` as an int or None, or raise."""
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
    """Return the number of slots of each patch or cost bin per epoch, int64, shape (P,).

    Each patch or bin with ``own_batches > 0`` gets at least one slot; see `apportion`. The slots of
    a patch are divided among its bins in proportion to ``own_batches``, the number of batches that
    each bin is cut into, shape (P,). By default, the weight of a patch is its sum of
    ``own_batches``, and ``epoch_batches`` is the sum over all patches.
    """
    patch_batches = reduce_by_patch(own_batches, patch_of_bin, np.add)
    patch_weights = _check_weights(weights, groups, patch_batches)
    min_slots = (own_batches > 0).astype(np.int64)
    if weights is not None and not isinstance(weights, Temperature):
        # (A temperature can make a weight so small that it underflows.)
        is_on = patch_weights > 0
        min_slots *= is_on if patch_of_bin is None else is_on[patch_of_bin]
    num_taking_part = int(min_slots.sum())
    if num_taking_part == 0:
        raise ValueError("weights must be > 0 for at least one patch with a batch, got 0 for all")
    total = int(own_batches.sum()) if epoch_batches is None else epoch_batches
    if total < num_taking_part:
        units = "patches" if patch_of_bin is None else "cost bins"
        raise ValueError(
            f"epoch_batches must be at least {num_taking_part}, the number of {units} with a "
            f"batch{' and a weight > 0' if weights is not None else ''}, got {total}: fewer need "
            "interleave=True and steps='free', without weights and costliest_first"
        )
    patch_min_slots = reduce_by_patch(min_slots, patch_of_bin, np.add)
    shares = apportion(integer_weights(patch_weights), total, patch_min_slots)
    if patch_of_bin is None:
        return shares
    return apportion_each(own_batches, shares, first_bins(patch_of_bin), min_slots)


def _check_weights(weights: Any, groups: PatchGroups, own_batches: Int64) -> NDArray[np.float64]:
    """Return the weights of patches, 0 for patches without a batch."""
    if weights is None:
        return own_batches.astype(np.float64)
    if isinstance(weights, Temperature):
        return weights.weights(own_batches)
    if callable(weights) and not hasattr(weights, "keys"):
        raise TypeError(
            "weights must be a mapping from patch ids, numbers by ascending patch id, or a "
            f"Temperature, got {short_repr(weights)}"
        )
    numbers = positive_by_patch(weights, groups, "weights", allow_zero=True, extra_keys=False)
    return np.where(own_batches > 0, numbers, 0.0)


def pass_and_batch(epoch: Any, j: Any, slots: Any, own_batches: Any) -> tuple[Any, Any]:
    """Return ``divmod(epoch * slots + j, own_batches)``: the pass over a patch and the batch in it.

    ``epoch * slots`` can exceed 64 bits. The products in this function cannot, except those in the
    number of the pass, which wraps modulo 2**64 in every library; permutation keys use all 64 bits
    of that number. ``epoch`` is an int or a 0-d int64 array in 0 .. 2**63 - 1; ``own_batches`` are
    1 .. 2**31 - 1.
    """
    epoch_quotient, epoch_remainder = epoch // own_batches, epoch % own_batches
    slot_quotient, slot_remainder = slots // own_batches, slots % own_batches
    product = epoch_remainder * slot_remainder
    batch = product % own_batches + j
    passes = epoch * slot_quotient + epoch_quotient * slot_remainder
    return passes + product // own_batches + batch // own_batches, batch % own_batches


def visits(
    xp: Any,
    visited: Any,
    own_batches: Any,
    num_slots: int,
    epoch: Any,
    slots: Any,
    state: Any,
) -> tuple[Any, Any, Any]:
    """Return the group that each slot visits, the pass over it, and the batch in the pass.

    A round visits each of ``visited`` once, in an order permuted with a key from ``state``, or in
    the given order if that is None. An epoch has ``num_slots`` visits, fewer than a round.
    ``own_batches``, shape (G,), is the number of batches that each group is cut into.
    """
    num_groups = int(visited.shape[0])
    rounds, place = pass_and_batch(epoch, slots, num_slots, num_groups)
    if state is not None:
        place = permute_all(xp, place, num_groups, key_of(state, rounds, 0))
    group = visited[place]
    own = own_batches[group]
    return group, rounds // own, rounds % own


def integer_weights(weights: NDArray[np.float64]) -> Int64:
    """Return weights as integers in the same ratio, with a sum of at most about 2**52.

    Integers with a smaller sum are unchanged. Other weights are multiplied by a power of two, which
    is exact, and rounded. ``math.fsum`` makes the sum equal on all machines.
    """
    total = math.fsum(weights.tolist())
    if total <= WEIGHT_SUM and bool((weights == np.floor(weights)).all()):
        return weights.astype(np.int64)
    exponent = math.frexp(total)[1]
    return np.rint(np.ldexp(weights, 52 - exponent)).astype(np.int64)


def apportion(weights: Int64, total: int, minimum: Int64) -> Int64:
    """Divide ``total`` in proportion to weights by the largest-remainder (Hamilton) method.

    Elements with minimum 0 get nothing; others get at least their minimum. Elements that get more
    than their minimum divide the rest, each within 1 of its exact share. Ties go to the lower
    index. ``weights``, shape (G,), are >= 0 with a sum below 2**62; ``total`` is below 2**60 and at
    least the sum of ``minimum``.
    """
    return apportion_each(weights, np.array([total]), np.zeros(1, np.int64), minimum)


def apportion_each(weights: Int64, totals: Int64, first: Int64, minimum: Int64) -> Int64:
    """Divide S totals as `apportion` does, each among consecutive elements.

    ``first``, shape (S,), is the index of the first element for each total.
    """
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
    # The leftover of each total goes to the largest remainders.
    leftover = remaining - np.add.reduceat(np.where(is_free, shares, 0), first)
    by_remainder = np.lexsort((-remainder, owner))
    free, owner = free[by_remainder], owner[by_remainder]
    first_of_total = np.searchsorted(owner, np.arange(first.size))
    shares[free] += np.arange(free.size) - first_of_total[owner] < leftover[owner]
    return shares


def _divmod_product(weights: Int64, totals: Int64, divisors: Int64) -> tuple[Int64, Int64]:
    """Return ``divmod(weights * totals, divisors)`` for products beyond 64 bits.

    float64 gives a quotient with relative error 2**-50; the exact correction is computed modulo
    2**64. Python ints are used if a divisor is above 2**53, which is possible if ``weights`` are
    numbers of slots (when whole steps are divided among patches).
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
