"""Cost bins divide the samples of a patch by cost: all samples of a batch cost nearly the same.

Packing samples one by one into batches of equal cost would not be a function of (seed, epoch, slot)
in O(1): the start of a batch would depend on all batches before it, and the number of batches on
the epoch. Instead each patch is divided into bins by cost, once. A bin has one batch size, that of
its largest cost, and is then treated like a patch: it has its own permutation and its own batches.
A batch costs at most its size times the largest cost in its bin. This product is within the budget,
even if the samples of the batch are padded to the longest one.

**Bin boundaries.** The size of a sample is the largest batch size within the budget if all samples
of the batch cost as much as this one, as rounded by `CostBudget`. Samples whose sizes have the same
four leading bits form a size class: one class for each size below 16, then eight classes per
octave. Dynamic programming divides the size classes of a patch, by ascending cost, into the bins
with the fewest batches. A bin with a single batch counts as two batches, because the batch would
have the same members in every epoch. Among divisions with equally few batches, the one whose most
expensive bin has the most classes is chosen, then the one whose next bin does, and so on, which
keeps the number of bins small. Under ``partial="drop"``, samples that do not fill a batch count
three times: half a batch of them counts as 1.5 batches. All comparisons are exact, so every machine
finds the same bins. Samples of a patch that are over the budget form a separate bin.

**Cost of the method.** All samples of a batch are from one bin. A patch has at most eight bins per
octave of sizes, in practice about the square root of its number of batches. Each cell of the table
has three numbers, measured with a mean batch of 8 samples (``python -m docs.figures.cost_bins``):
the fraction of the budget that batches use, the number of bins per patch, and the fraction of
samples in bins with one batch. The methods are: one bin per patch; size classes, each merged with
the next more expensive one unless it fills a batch of that one; this rule without the penalty of
bins with a single batch; and this rule. "10 of 500" means 10 patches of 500 samples.

=====================  ==========  ==================  ==================  ==================
patches                one size    1/8 octave, merged  as many bins as     this rule
                                   upwards             save a batch
=====================  ==========  ==================  ==================  ==================
10 of 500, lognormal   0.12  1  0  0.80  19.3  0.06    0.83  10.9  0.02    0.83  10.7  0.00
10 of 500, utterances  0.63  1  0  0.86  11.1  0.08    0.89   7.1  0.06    0.88   6.3  0.00
100 of 100, lognormal  0.19  1  0  0.67  10.2  0.30    0.74   5.8  0.17    0.72   5.0  0.00
=====================  ==========  ==================  ==================  ==================

Three leading bits use up to 0.04 less of the budget; five use up to 0.03 more, with more bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_budget import MAX_BATCH_SIZE, CostBudget
from gpusampler.batching.costs import COST_LIMIT, check_numbers
from gpusampler.batching.steps import MANTISSA_BITS, leading_bits
from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.groups.counting_sort import INT32_SAMPLES
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.groups.subsets import expand_runs, sort_by_group

CHUNK = 1 << 18
"""Number of samples, or of pairs of size classes, processed at once."""

PATCHES_PER_BLOCK = 1 << 14
"""Maximum number of patches processed at once; bounds the memory for counts of size classes."""

MIN_COUNTED_BATCHES = 2
"""Penalty, in batches, of a bin with fewer batches than this."""

DROP_PENALTY = 3.0
"""Penalty of dropped samples, in batches per batch of dropped samples.

Measured with 100 patches of 100 lognormal lengths and a mean batch of 8: 4 % of samples are dropped
with a penalty of 3, 6 % with 2, 12 % with 1 and 16 % with 0; batches use 0.74 to 0.77 of the
budget.
"""

MAX_SIZE_CLASSES = 32 << MANTISSA_BITS
"""Exclusive limit on class numbers: eight for each of 31 octaves, and one for over the budget."""


class CostBins(NamedTuple):
    """Cost bins of patches.

    Attributes
    ----------
    groups : PatchGroups
        One group per bin, with ids 0 .. P-1, sorted by patch, then by cost. Its ``order`` is on the
        host even if that of the patches is on a GPU.
    patch_of_bin : int64 array, shape (P,)
        Index of the patch of each bin in the sorted patch ids.
    costs : float64 array, shape (P,)
        Largest cost of a sample in each bin.
    sizes : int64 array, shape (P,)
        Batch size of each bin, 0 if its samples are over the budget and skipped.
    """

    groups: PatchGroups
    patch_of_bin: Int64
    costs: NDArray[np.float64]
    sizes: Int64


class _SizeClasses(NamedTuple):
    """Size classes, sorted by patch, then by cost; arrays have shape (R,).

    ``counts`` is the number of samples in each class, ``costs`` the largest cost of one of them.
    """

    patches: Int64
    counts: Int64
    costs: NDArray[np.float64]


def first_bins(patch_of_bin: Int64) -> Int64:
    """Return the index of the first bin of each patch, shape (G,)."""
    return np.flatnonzero(np.diff(patch_of_bin, prepend=-1))


def reduce_by_patch(values: NDArray[Any], patch_of_bin: Int64 | None, ufunc: np.ufunc) -> Any:
    """Reduce values of bins, shape (P,), to patches, shape (G,); no-op without ``patch_of_bin``."""
    return values if patch_of_bin is None else ufunc.reduceat(values, first_bins(patch_of_bin))


def cut_into_bins(groups: PatchGroups, budget: CostBudget, partial: str) -> CostBins:
    """Divide patches into bins by the ``sample_costs`` of a budget, or raise for invalid costs.

    Costs of samples outside ``groups`` are ignored; integers above 2**53 are rounded up.
    """
    costs = check_numbers(budget.sample_costs, groups.source_size, "sample_costs", "sample")
    order = groups._host_order
    classes, class_of_sample = _sort_into_size_classes(groups, order, costs, budget)
    sizes = budget.sizes_for(classes.costs)
    samples = expand_runs(groups.starts, groups.counts) if order is None else order
    is_over = sizes == 0
    if bool(is_over.all() if budget.over_budget == "skip" else is_over.any()):
        costs = _round_up(costs[samples])
        _raise_over_budget(groups, samples, costs, is_over[class_of_sample], budget)
    ends = _bin_ends(classes, sizes, groups.num_patches, budget, partial)
    bin_of_class: NDArray[Any] = (np.cumsum(ends) - ends).astype(class_of_sample.dtype)
    bin_of_sample = bin_of_class[class_of_sample]
    sorted_groups = sort_by_group(samples, bin_of_sample)
    bin_order: Any = sorted_groups.order
    if bin_order is not None:
        dtype = np.int32 if groups.source_size < INT32_SAMPLES else np.int64
        bin_order = bin_order.astype(dtype, copy=False)
        if groups.device.on_host:
            bin_order = arrays.to_device(bin_order, groups.device)
    sizes, counts = sizes[ends], sorted_groups.counts
    return CostBins(
        PatchGroups(
            sorted_groups.groups,
            counts,
            sorted_groups.starts,
            bin_order,
            source_size=groups.source_size,
            device=groups.device,
        ),
        classes.patches[ends],
        classes.costs[ends],
        budget.sizes_of_use(sizes, counts, partial),
    )


def _round_up(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return values as float64, rounded up so that no batch exceeds the budget."""
    if values.dtype.kind == "f":
        with np.errstate(over="ignore", under="ignore"):
            rounded = values.astype(np.float64)
        return np.nextafter(rounded, np.inf, out=rounded, where=rounded < values)
    rounded = values.astype(np.float64)
    if values.dtype.itemsize == 8 and bool((is_large := values > 1 << 53).any()):
        # Clearing the lowest 11 of 64 bits leaves 53, which float64 represents exactly.
        truncated = values[is_large] >> 11 << 11
        rounded[is_large] = truncated.astype(np.float64) + 2048.0 * (truncated < values[is_large])
    return rounded


def _sort_into_size_classes(
    groups: PatchGroups, order: NDArray[Any] | None, costs: NDArray[Any], budget: CostBudget
) -> tuple[_SizeClasses, NDArray[Any]]:
    """Return the size classes of all patches, and the class of each sample in the groups' order."""
    dtype = np.int32 if groups.num_samples < INT32_SAMPLES else np.int64
    class_of_sample = np.empty(groups.num_samples, dtype)
    blocks: list[tuple[Int64, Int64, NDArray[np.float64]]] = []
    num_classes = 0
    offsets = groups.offsets
    for first, last, start, stop in _blocks(offsets):
        bounds = np.clip(offsets[first : last + 1], start, stop)
        counts = np.diff(bounds)
        if order is None:
            starts = groups.starts[first:last] + bounds[:-1] - offsets[first:last]
            samples: NDArray[Any] = expand_runs(starts, counts)
        else:
            samples = order[start:stop]
        cost = _round_up(costs[samples])
        _check_cost_range(cost, costs, samples)
        size_class = _size_class_of(budget.sizes_for(cost))
        first_class = int(size_class.min())
        span = int(size_class.max()) - first_class + 1
        key = np.repeat(np.arange(last - first) * span - first_class, counts) + size_class
        class_counts = np.bincount(key)
        nonempty = np.flatnonzero(class_counts)
        index_of_key = np.zeros(class_counts.size, class_of_sample.dtype)
        index_of_key[nonempty] = np.arange(nonempty.size)
        block_class = index_of_key[key]
        max_costs = np.zeros(nonempty.size)
        np.maximum.at(max_costs, block_class, cost)
        class_of_sample[start:stop] = block_class + num_classes
        num_classes += nonempty.size
        patch, offset = np.divmod(nonempty, span)
        keys = (first + patch) * MAX_SIZE_CLASSES + first_class + offset
        blocks.append((keys, class_counts[nonempty], max_costs))
    keys, counts, max_costs = map(np.concatenate, zip(*blocks, strict=True))
    if bool((keys[1:] <= keys[:-1]).any()):
        # Merge the classes of a patch that spans several blocks.
        keys, index_of_key = np.unique(keys, return_inverse=True)
        block_counts, block_max_costs = counts, max_costs
        counts, max_costs = np.zeros(keys.size, np.int64), np.zeros(keys.size)
        np.add.at(counts, index_of_key, block_counts)
        np.maximum.at(max_costs, index_of_key, block_max_costs)
        class_of_sample = index_of_key.astype(class_of_sample.dtype)[class_of_sample]
    return _SizeClasses(keys // MAX_SIZE_CLASSES, counts, max_costs), class_of_sample


def _blocks(offsets: Int64) -> Iterator[tuple[int, int, int, int]]:
    """Yield blocks of samples as (first patch, end of patches, start, stop).

    The block is ``order[start:stop]``; ends are exclusive. A patch of more than `CHUNK` samples
    spans several blocks.
    """
    first = 0
    while first + 1 < offsets.size:
        start = int(offsets[first])
        last = int(np.searchsorted(offsets, start + CHUNK, side="right")) - 1
        last = min(max(last, first + 1), first + PATCHES_PER_BLOCK)
        for block_start in range(start, int(offsets[last]), CHUNK):
            yield first, last, block_start, min(block_start + CHUNK, int(offsets[last]))
        first = last


def _size_class_of(sizes: Int64) -> Int64:
    """Return the class of each batch size: 0 for the largest sizes, the last class for size 0."""
    largest_bits = int(leading_bits(np.array([float(MAX_BATCH_SIZE)]))[0])
    smallest_bits = int(leading_bits(np.array([1.0]))[0])
    size_class = largest_bits - leading_bits(sizes.astype(np.float64))
    return np.minimum(size_class, largest_bits - smallest_bits + 1)


def _check_cost_range(
    cost: NDArray[np.float64], costs: NDArray[Any], samples: NDArray[Any]
) -> None:
    """Raise ValueError unless all costs are in (0, 2**512)."""
    out_of_range = ~((cost > 0) & (cost < COST_LIMIT))
    if bool(out_of_range.any()):
        sample = int(samples[out_of_range].min())
        raise ValueError(
            f"sample_costs must be > 0 and < 2**512, got {costs[sample]} for sample {sample}"
        )


def _raise_over_budget(
    groups: PatchGroups,
    samples: NDArray[Any],
    costs: NDArray[np.float64],
    is_over: NDArray[np.bool_],
    budget: CostBudget,
) -> NoReturn:
    """Raise ValueError for samples over the budget; arrays are in the groups' order."""
    if budget.over_budget != "error":
        cost = float(costs.min())
        raise ValueError(
            f"max_cost={budget.max_cost} is too small for all {groups.num_samples} samples: the "
            f"cheapest costs {cost}{budget.refusal(cost)} max_cost."
        )
    positions = np.flatnonzero(is_over)
    first = int(positions[samples[positions].argmin()])
    label = groups.labels[np.searchsorted(groups.offsets, first, side="right") - 1]
    cost = float(costs[first])
    raise ValueError(
        f"max_cost={budget.max_cost} is too small for {positions.size} of {groups.num_samples} "
        f"samples: sample {samples[first]} of patch {label} costs {cost}{budget.refusal(cost)} "
        "max_cost or pass over_budget='skip'."
    )


def _bin_ends(
    classes: _SizeClasses, sizes: Int64, num_patches: int, budget: CostBudget, partial: str
) -> NDArray[np.bool_]:
    """Return whether each size class is the most expensive of its bin: boolean, shape (R,)."""
    first = np.searchsorted(classes.patches, np.arange(num_patches))
    num_within = np.add.reduceat(sizes > 0, first, dtype=np.int64)
    # The class over the budget (at most one per patch) is a bin by itself.
    ends = sizes == 0
    ends[(first + num_within - 1)[num_within == 1]] = True
    # Sorted by number of classes, so that patches of one chunk need little padding.
    patches = np.flatnonzero(num_within > 1)
    patches = patches[np.argsort(-num_within[patches], kind="stable")]
    while patches.size:
        patches_per_chunk = max(1, CHUNK // int(num_within[patches[0]]))
        chunk, patches = patches[:patches_per_chunk], patches[patches_per_chunk:]
        chunk_classes = first[chunk], num_within[chunk]
        ends[_optimal_bin_ends(*chunk_classes, classes.counts, sizes, budget, partial)] = True
    return np.asarray(ends)


def _optimal_bin_ends(
    first: Int64, num_classes: Int64, counts: Int64, sizes: Int64, budget: CostBudget, partial: str
) -> Int64:
    """Return the index of the last size class of each bin, found by dynamic programming.

    Patch i has size classes ``first[i] .. first[i] + num_classes[i] - 1``. ``counts`` and ``sizes``
    are the number of samples and the batch size of each size class of all patches.
    """
    max_classes = int(num_classes.max())
    columns = np.arange(max_classes)
    is_class = columns < num_classes[:, None]
    rows = first[:, None] + np.where(is_class, columns, 0)
    # Padding classes have one sample of size 1; results for them are not used.
    size = np.where(is_class, sizes[rows], 1)
    samples_before = np.zeros((first.size, max_classes + 1), np.int64)
    np.cumsum(np.where(is_class, counts[rows], 1), axis=1, out=samples_before[:, 1:])
    min_penalty = np.zeros(samples_before.shape)
    best_start = np.zeros(samples_before.shape, np.int64)
    for end in range(1, max_classes + 1):
        num_samples = samples_before[:, end, None] - samples_before[:, :end]
        penalty = _bin_penalty(num_samples, size[:, end - 1, None], budget, partial)
        penalty = min_penalty[:, :end] + penalty
        # argmin takes the first of equals: the longest bin.
        best_start[:, end] = penalty.argmin(axis=1)
        min_penalty[:, end] = np.take_along_axis(penalty, best_start[:, end, None], axis=1)[:, 0]
    # Backtrack from the last bin to the first.
    ends, patch, stop = [], np.arange(first.size), num_classes
    while patch.size:
        ends.append(first[patch] + stop - 1)
        stop = best_start[patch, stop]
        patch, stop = patch[stop > 0], stop[stop > 0]
    return np.concatenate(ends)


def _bin_penalty(
    num_samples: Int64, size: Int64, budget: CostBudget, partial: str
) -> NDArray[np.float64]:
    """Return the penalty of bins of ``num_samples`` and batch size ``size``, in batches."""
    if partial != "drop":
        # float64 division of integers below 2**31 never rounds a fraction to an integer.
        return np.asarray(np.maximum(np.ceil(num_samples / size), MIN_COUNTED_BATCHES))
    useful_size = budget.sizes_of_use(size, num_samples, partial)
    num_batches, num_left = np.divmod(num_samples, useful_size)
    penalty = np.maximum(num_batches, MIN_COUNTED_BATCHES) + DROP_PENALTY * (num_left / useful_size)
    return np.asarray(penalty)
