"""What an epoch covers: samples seen once, repeated and missed, per patch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_bins import reduce_by_patch
from gpusampler.core.arrays import Int64
from gpusampler.core.log import warn
from gpusampler.groups.census import label_of
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.mixture_coverage import (
    num_positions,
    repeated_and_missed_of_mixture,
    repeated_and_missed_of_visits,
)

_COUNT_NAMES = ("counts", "seen_once", "repeated", "missed", "batches")


@dataclass(frozen=True, eq=False)
class Coverage:
    """How often an epoch returns the samples of each patch, over all ranks.

    Another epoch misses other samples if they are shuffled. Under ``shuffle_within_batches=False``,
    ``partial="drop"`` and ``min_partial`` leave out the same samples in every epoch.

    Attributes
    ----------
    patch_ids : int64 array, or array of names if patches have names, shape (G,)
        Patches, ascending.
    counts : int64 array, shape (G,)
        Number of samples of each patch.
    seen_once, repeated, missed : int64 arrays, shape (G,)
        Number of samples returned once, more than once, or never; the sum is ``counts``.
    batches : int64 array, shape (G,)
        Number of batches of each patch that are returned, repeated ones included.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([1, 1, 1, 2, 2], 2, seed=0, partial="drop")
    >>> coverage = sampler.coverage()
    >>> coverage.missed.tolist(), coverage.exact
    ([1, 0], False)
    """

    patch_ids: NDArray[Any]
    counts: Int64
    seen_once: Int64
    repeated: Int64
    missed: Int64
    batches: Int64

    @property
    def exact(self) -> bool:
        """Whether every sample is returned exactly once."""
        return bool((self.seen_once == self.counts).all())

    def totals(self) -> dict[str, int]:
        """Return the sums over all patches, as plain integers."""
        return {name: int(getattr(self, name).sum()) for name in _COUNT_NAMES}

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yield one mapping per patch."""
        for group, patch_id in enumerate(self.patch_ids.tolist()):
            row = {name: int(getattr(self, name)[group]) for name in _COUNT_NAMES}
            yield {"patch_id": patch_id, **row}

    def __len__(self) -> int:
        """Return the number of patches."""
        return int(self.patch_ids.size)

    def __eq__(self, other: object) -> bool:
        """Return whether all patches and counts are equal."""
        if not isinstance(other, Coverage):
            return NotImplemented
        return all(np.array_equal(value, vars(other)[name]) for name, value in vars(self).items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return the totals."""
        listed = ", ".join(f"{name}={value}" for name, value in self.totals().items())
        return f"Coverage({len(self)} patches, {listed})"


class OmittedSamples(NamedTuple):
    """Number of samples of each patch in no batch of any epoch, by reason: int64, shape (G,) each.

    ``over_budget``: their batches cost more than ``max_cost``; ``dropped``: their whole patch does
    not fill a batch under ``partial="drop"``, or only batches below ``min_partial``;
    ``without_step``: the batches of their patch do not fill a step. Without shuffling, samples of
    other patches are omitted, too. ``rest_of_batches`` and ``rest_of_steps``: they are left over
    when their patch is cut into full batches, or its batches into steps; ``rest_of_ranks``: their
    batches are left over by the last step of all ranks. If a patch is divided into cost bins, this
    applies to each bin.
    """

    over_budget: Int64
    dropped: Int64
    without_step: Int64
    rest_of_batches: Int64
    rest_of_steps: Int64
    rest_of_ranks: Int64


def omitted_samples(plan: EpochPlan, num_slots: int) -> OmittedSamples:
    """Return how many samples a plan omits if ranks process its first ``num_slots`` slots."""
    tables, units = plan.tables, plan.units
    counts, batches, own_batches = tables.counts, tables.batches, tables.own_batches
    has_batches = batches > 0
    # (Weights of 0 leave out patches on purpose. Passes over the others go on in later epochs.)
    if tables.slot_shares is not None or tables.visited is not None:
        batches, num_slots = own_batches, plan.num_batches
    rest_of_batches, rest_of_steps, rest_of_ranks = (np.zeros_like(counts) for _ in range(3))
    if not plan.shuffle_within_batches:
        in_batches, in_steps = (
            np.minimum(num_positions(plan, number), counts)
            for number in (own_batches, np.minimum(batches, own_batches))
        )
        rest_of_batches = np.where(has_batches, counts - in_batches, 0)
        rest_of_steps = np.where(has_batches, in_batches - in_steps, 0)
    if not plan.shuffle_patches and num_slots < plan.num_batches:
        rest = plan.evaluator.locate(0, np.arange(num_slots, plan.num_batches, dtype=np.int64))
        if plan.shuffle_within_batches:
            # Samples change places within their patch, so only whole patches are omitted.
            num_left = np.bincount(rest.group, minlength=counts.size)
            rest_of_ranks = np.where(has_batches & (num_left == batches), counts, 0)
        else:
            np.add.at(rest_of_ranks, rest.group, rest.length)
    by_unit = (
        np.where(units.sizes == 0, counts, 0),
        np.where((own_batches == 0) & (units.sizes > 0), counts, 0),
        np.where((batches == 0) & (own_batches > 0), counts, 0),
        rest_of_batches,
        rest_of_steps,
        rest_of_ranks,
    )
    return OmittedSamples(
        *(reduce_by_patch(samples, units.patch_of_bin, np.add) for samples in by_unit)
    )


def warn_of_omitted_samples(plan: EpochPlan, num_slots: int) -> None:
    """Warn of the samples that a plan omits, once per reason; arguments of `omitted_samples`."""
    omitted = omitted_samples(plan, num_slots)
    skipped = omitted.over_budget
    if skipped.any():
        warn(
            f"over_budget='skip' leaves out {int(skipped.sum())} samples in "
            f"{int((skipped > 0).sum())} of {plan.groups.num_patches} patches: even their smallest "
            "allowed batch costs more than max_cost. Raise max_cost to include them."
        )
    batch = "a batch" if plan.batch_size is None else f"batch_size={plan.batch_size}"
    dropping = "partial='drop'", f"fewer samples than {batch}", "partial='keep', 'pad' or 'even'"
    if plan.partial != "drop":
        least = f"min_partial={plan.min_partial}"
        dropping = least, "only smaller batches", "a smaller min_partial"
    too_short = f"fewer batches than step_width={plan.step_width}"
    for samples, setting, cause, advice in (
        (omitted.dropped, *dropping),
        (omitted.without_step, "uneven='drop' under steps='same_patch'", too_short, "uneven='pad'"),
    ):
        if samples.any():
            patches = f"{int((samples > 0).sum())} of {samples.size} patches"
            if plan.tables.patch_of_bin is not None:
                # Further cost bins of the same patch may remain.
                patches = f"whole cost bins of {patches}"
            warn(
                f"{setting} leaves out {patches} ({int(samples.sum())} samples): each has {cause}. "
                f"Use {advice} to include them."
            )
    uneven, within = ("uneven='drop'", "uneven='pad'"), "shuffle_within_batches"
    for samples, (setting, advice), cause, shuffle in (
        (omitted.rest_of_batches, dropping[::2], "they do not fill a batch", within),
        (omitted.rest_of_steps, uneven, "their batches do not fill a step", within),
        (omitted.rest_of_ranks, uneven, "too few batches for all ranks remain", "shuffle_patches"),
    ):
        if samples.any():
            warn(
                f"{setting} leaves out the same {int(samples.sum())} samples of "
                f"{int((samples > 0).sum())} of {samples.size} patches in every epoch, because "
                f"{shuffle}=False: {cause}. Use {shuffle}=True to leave out others each time, or "
                f"{advice} to include them."
            )


def warn_of_copies(plan: EpochPlan) -> None:
    """Warn if ``partial="pad"`` makes more than half of a batch copies of samples in it."""
    tables = plan.tables
    is_copied = (2 * tables.counts < tables.sizes) & (tables.batches > 0)
    if plan.partial != "pad" or not is_copied.any():
        return
    group = int(np.argmax(np.where(is_copied, tables.sizes / tables.counts, 0)))
    units = "patches" if tables.patch_of_bin is None else "cost bins"
    warn(
        f"partial='pad' makes batches of {int(is_copied.sum())} of {is_copied.size} {units} more "
        f"than half copies, such as those of patch {patch_label(plan, group)!r}: "
        f"{int(tables.counts[group])} of {int(tables.sizes[group])} samples differ. Use "
        "partial='keep' or 'even', or smaller batch sizes for them."
    )


def patch_label(plan: EpochPlan, group: int) -> Any:
    """Return the name or id of the patch of a group, which may be one of its cost bins."""
    patch = plan.tables.patches_of(np.array([group]))[0]
    return label_of(plan.groups.patch_ids[patch], plan.groups.names)


def coverage_of(plan: EpochPlan, epoch: int, slots_handed_out: int) -> Coverage:
    """Return what the first ``slots_handed_out`` slots of an epoch cover, over all ranks.

    Slots from M on start again at slot 0. Counts are computed in closed form; only skipped and
    repeated batches are looked up. With weights, samples are counted one by one where an epoch
    returns parts of several passes over a patch.
    """
    tables, groups, total = plan.tables, plan.groups, plan.num_batches
    if tables.visited is not None:
        repeated, missed, batches = repeated_and_missed_of_visits(plan, epoch, slots_handed_out)
    else:
        first_changed, end_changed = sorted((slots_handed_out, total))
        changed_slots = np.arange(first_changed, end_changed, dtype=np.int64) % total
        changed = plan.evaluator.locate(epoch, changed_slots)
        change = 1 if slots_handed_out > total else -1
        batches = tables.batches.copy()
        np.add.at(batches, changed.group, change)
        if tables.slot_shares is not None:
            repeated, missed = repeated_and_missed_of_mixture(plan, epoch, changed, change)
        else:
            repeated, missed = _repeated_and_missed(plan)
            for group in np.unique(changed.group).tolist():
                j, times = np.unique(changed.j[changed.group == group], return_counts=True)
                changes = dict(zip(j.tolist(), (change * times).tolist(), strict=True))
                segments = _patch_segments(plan, group, changes)
                num_covered = sum(size for size, times in segments if times > 0)
                repeated[group] = sum(size for size, times in segments if times > 1)
                missed[group] = int(tables.counts[group]) - num_covered
    repeated, missed, batches = (
        reduce_by_patch(values, tables.patch_of_bin, np.add)
        for values in (repeated, missed, batches)
    )
    return Coverage(
        patch_ids=groups.labels,
        counts=groups.counts,
        seen_once=groups.counts - repeated - missed,
        repeated=repeated,
        missed=missed,
        batches=batches,
    )


def _repeated_and_missed(plan: EpochPlan) -> tuple[Int64, Int64]:
    """Return how many samples of each patch a whole epoch repeats, and how many it misses."""
    tables = plan.tables
    counts, own_batches = tables.counts, tables.own_batches
    # Every batch of a patch is returned ``rounds`` times, the first ``extra`` once more.
    rounds, extra = np.divmod(tables.batches, np.maximum(own_batches, 1))
    covered, num_extra = num_positions(plan, own_batches), num_positions(plan, extra)
    # Some samples may be in no batch; under "pad", the last batch is filled up.
    num_dropped, num_padded = np.maximum(counts - covered, 0), np.maximum(covered - counts, 0)
    missed = np.where(rounds == 0, counts - num_extra, num_dropped)
    # Padding and extra batches both repeat samples from the start of the patch.
    repeated = np.maximum(np.minimum(num_padded, counts), num_extra)
    repeated[rounds == 0] = 0
    return np.where(rounds > 1, counts - num_dropped, repeated), missed


def _patch_segments(plan: EpochPlan, group: int, changes: dict[int, int]) -> list[tuple[int, int]]:
    """Return (samples, times) of segments of a patch whose samples are returned equally often.

    ``changes`` maps batches to how many times more (or fewer) they are returned than planned.
    Samples that are in no batch are in no segment.
    """
    tables = plan.tables
    count, own_batches = int(tables.counts[group]), int(tables.own_batches[group])
    rounds, extra = divmod(int(tables.batches[group]), own_batches)

    def times_of(j: int) -> int:
        return rounds + (j < extra) + changes.get(j, 0)

    # Batches from which on the number of times may differ, and their positions.
    edges = {0, extra, own_batches - 1, own_batches, *changes, *(j + 1 for j in changes)}
    batches = np.array(sorted(edges))
    positions = tables.first_position_and_size(np, np.full_like(batches, group), batches)[0]
    turns, num_padded = 0, 0
    if plan.partial == "pad":
        # The last batch starts again at the first position, perhaps several times.
        turns, num_padded = divmod(int(positions[-1]) - count, count)
    times_of_last = times_of(own_batches - 1)
    ends = np.minimum(positions, count).tolist()
    segments = []
    for j, first, end in zip(batches.tolist(), ends, ends[1:], strict=False):
        times = times_of(j) + turns * times_of_last
        num_filling = min(max(num_padded - first, 0), end - first)
        segments.append((num_filling, times + times_of_last))
        segments.append((end - first - num_filling, times))
    return segments
