"""Classes of cost inside a patch: batches of samples that cost nearly the same.

Where samples of one patch differ in cost (lengths, say), packing them one by one into batches of
equal cost would be no pure function of (seed, epoch, slot) at O(1): where a batch begins would
depend on all that come before it, and how many there are would change from epoch to epoch. So each
patch is cut into parts by cost, once; a part has one batch size, that of its largest cost, and is
from there on what a patch is: permuted by itself, cut into batches of its size. No batch costs more
than its size times that largest cost, which is within the budget, padded or not.

**Where parts begin.** Each sample would be allowed batches of some size if all cost what it does:
the largest within the budget, as `CostBudget` rounds it. Samples whose sizes agree in their four
leading bits (all sizes up to 16, eight in every octave from there on) stay together: below 16 they
lose nothing by it. Of all ways to cut the row of these classes, from the cheapest to the costliest,
into parts, that with the fewest batches is taken, where a part of a single batch counts as two, as
it would have the same members in every epoch; among equals, the one whose costliest part is the
longest (and so on, down to the cheapest), which has few parts. Under ``partial="drop"`` samples
that fill no batch count as well: three times the batches that they would fill. Sizes and exact
comparisons decide: every machine cuts alike. Samples over the budget are a part of their own.

**What it costs.** A batch's members are of one part. A patch has at most eight parts for each
octave of sizes, in practice about the square root of its batches. Measured with a mean batch of 8
samples (``python -m benchmarks.parts``): the share of the budget that batches use, parts of a
patch, and the share of samples in parts of one batch.

=====================  ==========  ==================  ==================  ==================
patches                one size    1/8 octave, merged  as many parts as    this rule
                                   upwards             save a batch
=====================  ==========  ==================  ==================  ==================
10 of 500, lognormal   0.12  1  0  0.80  19.3  0.06    0.83  10.9  0.02    0.83  10.7  0.00
10 of 500, utterances  0.63  1  0  0.86  11.1  0.08    0.89   7.1  0.06    0.88   6.3  0.00
100 of 100, lognormal  0.19  1  0  0.67  10.2  0.30    0.74   5.8  0.17    0.72   5.0  0.00
=====================  ==========  ==================  ==================  ==================

Three leading bits use up to 0.04 less of the budget, five up to 0.03 more in more parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_budget import LARGEST, CostBudget
from gpusampler.batching.costs import MOST, on_host
from gpusampler.batching.steps import CLASS_BITS, class_of
from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.core.text import shown
from gpusampler.groups.counting_sort import INT32_SAMPLES
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.groups.subsets import by_group, places_of

CHUNK = 1 << 18
"""Samples (or pairs of classes) that are worked on at once."""

PATCHES = 1 << 14
"""Patches that are worked on at once, at most: there are counters for each of their classes."""

LEAST_BATCHES = 2
"""A part of fewer batches counts as one of so many."""

LEFT_OUT = 3.0
"""What a batch's worth of samples that "drop" leaves out counts, in batches.

Measured with 100 patches of 100 lognormal lengths and a mean batch of 8, 4 % are left out with 3,
6 % with 2, 12 % with 1 and 16 % if only batches count; batches use 0.74 to 0.77 of the budget.
"""


KINDS = 32 << CLASS_BITS
"""Room for the classes of a patch: eight for each of 31 octaves of sizes, and one over budget."""


class Parts(NamedTuple):
    """Patches cut into classes of cost.

    Attributes
    ----------
    groups : PatchGroups
        One group a part, with its number 0 .. P-1 for an id: parts of a patch side by side, the
        cheapest first, patches ascending; source, device and form as in the patches' groups, but
        that an order which belongs on a GPU lies on the host, for who needs it there to send.
    parents : int64 array, shape (P,)
        The patch of each part, as a place among the sorted patch ids.
    costs : float64 array, shape (P,)
        The largest cost of a sample in each part.
    sizes : int64 array, shape (P,)
        Batch size of each part; 0 where its samples are over the budget, and skipped.
    """

    groups: PatchGroups
    parents: Int64
    costs: NDArray[np.float64]
    sizes: Int64


class _Classes(NamedTuple):
    """Samples of a patch that stay together: one row each, the cheapest of a patch first."""

    patches: Int64
    counts: Int64
    costs: NDArray[np.float64]


def parts_of(groups: PatchGroups, budget: CostBudget, partial: str) -> Parts:
    """Cut patches into classes of cost.

    Parameters
    ----------
    groups : PatchGroups
    budget : CostBudget
        With ``sample_costs``, one number for each sample of the dataset. Those of samples that
        ``groups`` do not hold are not looked at. Integers above 2**53 are rounded up.
    partial : {"keep", "drop", "pad"}

    Raises
    ------
    TypeError
        If costs are no numbers.
    ValueError
        If there are not as many as samples, one is not in (0, 2**512), or a sample is over the
        budget and is not to be skipped, or all are.
    """
    costs = _checked_costs(budget.sample_costs, groups.source_size)
    order = None if groups.order is None else arrays.to_numpy(groups.order)
    classes, row = _classes_of(groups, order, costs, budget)
    sizes = budget.sizes_for(classes.costs)
    if bool((sizes == 0).any()):
        _check_over_budget(groups, order, classes, sizes == 0, row, budget)
    last = _last_of_parts(classes, sizes, groups.num_patches, budget, partial)
    part: NDArray[Any] = (np.cumsum(last) - last).astype(row.dtype)[row]
    samples = places_of(groups.starts, groups.counts) if order is None else order
    found = by_group(samples, part)
    refined: Any = found.order
    if refined is not None:
        narrow = np.int32 if groups.source_size < INT32_SAMPLES else np.int64
        refined = refined.astype(narrow, copy=False)
        if groups.device.on_host:
            refined = arrays.to_device(refined, groups.device)
    sizes, counts = sizes[last], found.counts
    return Parts(
        PatchGroups(
            found.groups,
            counts,
            found.starts,
            refined,
            source_size=groups.source_size,
            device=groups.device,
        ),
        classes.patches[last],
        classes.costs[last],
        budget.sizes_of_use(sizes, counts, partial),
    )


def _checked_costs(values: Any, size: int) -> NDArray[Any]:
    """Return costs of samples as a NumPy array of numbers; which numbers is asked by block."""
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError("sample_costs must have a value for every sample, got a masked array")
    library = arrays.library_of(values)
    if library is None:
        try:
            found = np.asarray(values)
        except ValueError as error:
            raise ValueError(f"sample_costs must be one number a sample: {error}") from error
    elif not arrays.is_numbers(values):
        raise TypeError(f"sample_costs must be numbers, one a sample, got {shown(values)}")
    else:
        found = on_host(values)
    if found.dtype.kind not in "iuf":
        raise TypeError(f"sample_costs must be numbers, one a sample, got {shown(values)}")
    if found.shape != (size,):
        raise ValueError(
            f"sample_costs must be one number for each of the dataset's samples, shape ({size},), "
            f"got shape {found.shape}"
        )
    return found


def _rounded_up(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return numbers as float64, none smaller than it was, lest a batch be over the budget."""
    if values.dtype.kind == "f":
        with np.errstate(over="ignore", under="ignore"):
            found = values.astype(np.float64)
        return np.nextafter(found, np.inf, out=found, where=found < values)
    found = values.astype(np.float64)
    if values.dtype.itemsize == 8 and bool((large := values > 1 << 53).any()):
        # With the lowest 11 bits cleared 53 are left, which float64 holds; so is the next such.
        cut = values[large] >> 11 << 11
        found[large] = cut.astype(np.float64) + 2048.0 * (cut < values[large])
    return found


def _classes_of(
    groups: PatchGroups, order: NDArray[Any] | None, costs: NDArray[Any], budget: CostBudget
) -> tuple[_Classes, NDArray[Any]]:
    """Return the classes of all patches, and the class of each sample in the groups' order."""
    row = np.empty(groups.num_samples, np.int32 if groups.num_samples < INT32_SAMPLES else np.int64)
    found: list[tuple[Int64, Int64, NDArray[np.float64]]] = []
    rows = 0
    offsets = groups.offsets
    for first, last, start, stop in _blocks(offsets):
        bounds = np.clip(offsets[first : last + 1], start, stop)
        counts = np.diff(bounds)
        if order is None:
            begin = groups.starts[first:last] + bounds[:-1] - offsets[first:last]
            samples: NDArray[Any] = places_of(begin, counts)
        else:
            samples = order[start:stop]
        cost = _rounded_up(costs[samples])
        _check_each(cost, costs, samples)
        kind = _kinds(budget.sizes_for(cost))
        lowest = int(kind.min())
        width = int(kind.max()) - lowest + 1
        key = np.repeat(np.arange(last - first) * width - lowest, counts) + kind
        met = np.bincount(key)
        there = np.flatnonzero(met)
        number = np.zeros(met.size, row.dtype)
        number[there] = np.arange(there.size)
        here = number[key]
        largest = np.zeros(there.size)
        np.maximum.at(largest, here, cost)
        row[start:stop] = here + rows
        rows += there.size
        patch, kind_met = np.divmod(there, width)
        found.append(((first + patch) * KINDS + lowest + kind_met, met[there], largest))
    keys, counts, largest = map(np.concatenate, zip(*found, strict=True))
    if bool((keys[1:] <= keys[:-1]).any()):
        # A patch was worked on in several blocks.
        keys, number = np.unique(keys, return_inverse=True)
        in_blocks, of_blocks = counts, largest
        counts, largest = np.zeros(keys.size, np.int64), np.zeros(keys.size)
        np.add.at(counts, number, in_blocks)
        np.maximum.at(largest, number, of_blocks)
        row = number.astype(row.dtype)[row]
    return _Classes(keys // KINDS, counts, largest), row


def _blocks(offsets: Int64) -> Iterator[tuple[int, int, int, int]]:
    """Yield whole patches, or a part of a large one: the first, the last, and from where to where.

    Parameters
    ----------
    offsets : int64 array, shape (G + 1,)
        Samples before each patch.
    """
    first = 0
    while first + 1 < offsets.size:
        start = int(offsets[first])
        last = int(np.searchsorted(offsets, start + CHUNK, side="right")) - 1
        last = min(max(last, first + 1), first + PATCHES)
        for begin in range(start, int(offsets[last]), CHUNK):
            yield first, last, begin, min(begin + CHUNK, int(offsets[last]))
        first = last


def _kinds(sizes: Int64) -> Int64:
    """Return which class samples of some batch sizes are in: the cheapest first, 0 sizes last."""
    of_largest = int(class_of(np.array([float(LARGEST)]))[0])
    of_smallest = int(class_of(np.array([1.0]))[0])
    kind = of_largest - class_of(sizes.astype(np.float64))
    return np.minimum(kind, of_largest - of_smallest + 1)


def _check_each(cost: NDArray[np.float64], costs: NDArray[Any], samples: NDArray[Any]) -> None:
    """Raise ValueError unless all costs of some samples are in (0, 2**512)."""
    wrong = ~((cost > 0) & (cost < MOST))
    if bool(wrong.any()):
        sample = int(samples[wrong].min())
        raise ValueError(
            f"sample_costs must be > 0 and < 2**512, got {costs[sample]} for sample {sample}"
        )


def _check_over_budget(
    groups: PatchGroups,
    order: NDArray[Any] | None,
    classes: _Classes,
    over: NDArray[np.bool_],
    row: NDArray[Any],
    budget: CostBudget,
) -> None:
    """Raise ValueError as classes are over the budget, unless others are not and these skipped."""
    if budget.over_budget != "error" and not bool(over.all()):
        return
    samples = places_of(groups.starts, groups.counts) if order is None else order
    costs = _rounded_up(_checked_costs(budget.sample_costs, groups.source_size)[samples])
    if budget.over_budget != "error":
        raise ValueError(
            "max_cost must be enough for at least one sample, got none: "
            f"{budget.refusal(float(costs.min()))}"
        )
    at = np.flatnonzero(over[row])
    first = int(at[samples[at].argmin()])
    label = groups.labels[classes.patches[row[first]]]
    raise ValueError(
        f"max_cost must be enough for every sample, got {at.size} of {groups.num_samples} over the "
        f"budget, sample {samples[first]} of patch {label} first: "
        f"{budget.refusal(float(costs[first]))}; over_budget='skip' leaves them out"
    )


def _last_of_parts(
    classes: _Classes, sizes: Int64, num_patches: int, budget: CostBudget, partial: str
) -> NDArray[np.bool_]:
    """Return which classes are the costliest of a part: boolean, shape (R,)."""
    first = np.searchsorted(classes.patches, np.arange(num_patches))
    within = np.add.reduceat(sizes > 0, first, dtype=np.int64)
    # Those over the budget, of which a patch has one class, stay by themselves.
    last = sizes == 0
    last[(first + within - 1)[within == 1]] = True
    # The widest first, so that those side by side have about as many classes.
    several = np.flatnonzero(within > 1)
    several = several[np.argsort(-within[several], kind="stable")]
    while several.size:
        side_by_side = max(1, CHUNK // int(within[several[0]]))
        some, several = several[:side_by_side], several[side_by_side:]
        last[_ends(first[some], within[some], classes.counts, sizes, budget, partial)] = True
    return np.asarray(last)


def _ends(
    first: Int64, numbers: Int64, counts: Int64, sizes: Int64, budget: CostBudget, partial: str
) -> Int64:
    """Return the classes that end the parts of some patches, by dynamic programming.

    ``first`` and ``numbers``: of each patch's classes, which ``counts`` and ``sizes`` tell of.
    """
    widest = int(numbers.max())
    place = np.arange(widest)
    there = place < numbers[:, None]
    at = first[:, None] + np.where(there, place, 0)
    # Beyond a patch's classes are others of one sample each; nobody asks for what comes of them.
    size = np.where(there, sizes[at], 1)
    before = np.zeros((first.size, widest + 1), np.int64)
    np.cumsum(np.where(there, counts[at], 1), axis=1, out=before[:, 1:])
    least = np.zeros(before.shape)
    begin = np.zeros(before.shape, np.int64)
    for end in range(1, widest + 1):
        held = before[:, end, None] - before[:, :end]
        value = least[:, :end] + _worth(held, size[:, end - 1, None], budget, partial)
        # Of equals, the first: the longest part.
        begin[:, end] = value.argmin(axis=1)
        least[:, end] = np.take_along_axis(value, begin[:, end, None], axis=1)[:, 0]
    # Back from the last part to the first.
    ends, patch, stop = [], np.arange(first.size), numbers
    while patch.size:
        ends.append(first[patch] + stop - 1)
        stop = begin[patch, stop]
        patch, stop = patch[stop > 0], stop[stop > 0]
    return np.concatenate(ends)


def _worth(held: Int64, size: Int64, budget: CostBudget, partial: str) -> NDArray[np.float64]:
    """Return what parts of some samples and batch sizes count."""
    if partial != "drop":
        # Quotients of numbers below 2**31 are never rounded to an integer that they are not.
        return np.asarray(np.maximum(np.ceil(held / size), LEAST_BATCHES))
    used = budget.sizes_of_use(size, held, partial)
    whole, left = np.divmod(held, used)
    return np.asarray(np.maximum(whole, LEAST_BATCHES) + LEFT_OUT * (left / used))
