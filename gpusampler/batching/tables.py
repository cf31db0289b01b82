"""Tables of a plan, one element per patch or cost bin, on the host or on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_bins import first_bins
from gpusampler.batching.costliest import CostliestFirst
from gpusampler.batching.mixture import apportion
from gpusampler.batching.short_batches import cut_into_batches, returned_sizes
from gpusampler.batching.steps import BatchRuns, CostBuckets, StepLayout, search_offsets
from gpusampler.core import arrays, devices
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST, Device
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.permutation.reference import Grid, grids_of


class PatchOrder(NamedTuple):
    """Order of the patches (or cost bins) of an epoch if each patch's batches are consecutive.

    ``groups`` lists them in this order; ``offsets`` is the first slot of each. Both are int64
    arrays of shape (G,).
    """

    groups: Any
    offsets: Any


@dataclass(frozen=True)
class PatchTables:
    """Lookup tables by group (patch or cost bin); int64 arrays of shape (G,) on one device.

    Attributes
    ----------
    counts, starts : arrays
        As in `PatchGroups`.
    sizes : array
        Batch size of each group; 1 for groups over the budget, which have no batch.
    batches : array
        Number of slots of each group in an epoch. With weights, the number that the weights assign.
        Otherwise the number of its batches, plus repeated or minus dropped ones under
        ``steps="same_patch"``.
    batch_offsets : array, shape (G + 1,)
        Running total of ``batches``.
    batches_per_pass : array, or None
        Number of batches in one pass over each group; None if it equals ``batches``.
    slot_shares : NumPy array (for tables on any device), or None
        Number of slots that weights assign to each group, before rounding to whole steps. If given,
        passes over a patch continue from epoch to epoch.
    patch_of_bin : array, or None
        Patch of each group, if groups are cost bins.
    first_bin : array, shape (patches + 1,), or None
        First bin of each patch, then the number of bins.
    grid : Grid of arrays
        Grid of each group's permutation.
    order : array, shape (N,), or None
        Sample indices sorted by group, as in `PatchGroups`; None in tables on the host.
    num_batches, max_batch_size, smallest_patch, largest_patch : int
        M (batches per epoch), B (largest batch size), and the number of samples in the smallest and
        in the largest group with a batch.
    is_uniform : bool
        Whether every batch is returned with B samples.
    layout : StepLayout
        Steps of the M slots.
    buckets : CostBuckets, or None
        Batches by cost, if steps are balanced.
    larger : array, or None
        Number of leading batches of each group with one sample more than ``sizes``; None if all
        are 0.
    visited : array, or None
        Groups with a batch, if an epoch has fewer slots than these groups: each group then has one
        slot in a round of visits that spans several epochs, and ``batches`` are its own batches.
    costliest : CostliestFirst, or None
        Batches for the first slots.
    """

    counts: Any
    starts: Any
    sizes: Any
    batches: Any
    batch_offsets: Any
    batches_per_pass: Any
    slot_shares: Int64 | None
    patch_of_bin: Any
    first_bin: Any
    grid: Grid
    order: Any
    num_batches: int
    max_batch_size: int
    smallest_patch: int
    largest_patch: int
    is_uniform: bool
    layout: StepLayout
    buckets: CostBuckets | None
    larger: Any = None
    visited: Any = None
    costliest: CostliestFirst | None = None

    @classmethod
    def build(
        cls,
        groups: PatchGroups,
        sizes: Int64,
        partial: str,
        min_partial: int,
        patch_of_bin: Int64 | None,
    ) -> PatchTables:
        """Return tables on the host, with one slot per step and without ``order``, which `on` adds.

        ``sizes`` are batch sizes, shape (G,); groups with size 0 get no batch. Raise ValueError if
        no batch is left.
        """
        counts = groups.counts
        is_left_out = sizes == 0
        if bool(is_left_out.any()):
            sizes = np.maximum(sizes, 1)
        requested_sizes = sizes
        batches, sizes, larger = cut_into_batches(counts, sizes, partial, min_partial)
        batches[is_left_out] = 0
        offsets = _running_total(batches)
        total = int(offsets[-1])
        if total == 0:
            if partial != "drop":
                raise ValueError(
                    f"min_partial={min_partial} leaves no batches, because all have fewer samples. "
                    "Reduce min_partial."
                )
            # The group that lacks the fewest samples.
            groups_with_size = np.flatnonzero(~is_left_out)
            nearest = groups_with_size[(requested_sizes - counts)[groups_with_size].argmin()]
            unit = "patch" if patch_of_bin is None else "cost bin"
            size = int(requested_sizes[nearest])
            is_one_size = bool((requested_sizes[groups_with_size] == size).all())
            raise ValueError(
                f"partial='drop' leaves no batches: batch_size={size}, but the "
                f"{f'largest {unit}' if is_one_size else f'{unit} closest to a full batch'} has "
                f"{int(counts[nearest])} samples. Reduce batch_size or use partial='keep', 'pad' "
                "or 'even'."
            )
        first_bin = None
        if patch_of_bin is not None:
            first_bin = np.append(first_bins(patch_of_bin), patch_of_bin.size)
        batches.flags.writeable = False
        has_batch = batches > 0
        tables = cls(
            counts=counts,
            starts=groups.starts,
            sizes=sizes,
            batches=batches,
            batch_offsets=offsets,
            batches_per_pass=None,
            slot_shares=None,
            patch_of_bin=patch_of_bin,
            first_bin=first_bin,
            grid=grids_of(arrays.namespace(HOST), counts),
            order=None,
            num_batches=total,
            max_batch_size=0,
            # Groups without a batch are never evaluated.
            smallest_patch=int(counts[has_batch].min()),
            largest_patch=int(counts[has_batch].max()),
            is_uniform=False,
            layout=StepLayout.of(total, 1),
            buckets=None,
            larger=larger,
        )
        runs = tables.runs(pad=partial == "pad")
        first_sizes = runs.first_size[has_batch]
        is_uniform = bool(
            (first_sizes == first_sizes[0]).all() and (runs.num_first == batches).all()
        )
        return replace(tables, max_batch_size=int(first_sizes.max()), is_uniform=is_uniform)

    def runs(self, *, pad: bool) -> BatchRuns:
        """Return the runs of equally large batches, regardless of slots; the tables on the host."""
        first_size, last_size = returned_sizes(self.sizes, self.counts, pad=pad), self.sizes
        num_first = self.own_batches
        if self.larger is not None:
            first_size = first_size + (self.larger > 0)
            num_first = np.where(self.larger > 0, self.larger, num_first)
        elif not pad:
            num_left = self.counts - (num_first - 1) * self.sizes
            last_size = np.minimum(self.sizes, num_left)
            num_first = num_first - ((last_size < first_size) & (num_first > 0))
        return BatchRuns(num_first, first_size, last_size)

    def with_slot_shares(self, slot_shares: Int64) -> PatchTables:
        """Return the tables with the number of slots that weights assign to each group.

        ``slot_shares``, shape (G,), is 0 for groups without a batch or of a patch with weight 0,
        and >= 1 for others.
        """
        slot_shares.flags.writeable = False
        tables = replace(self, batches_per_pass=self.batches, slot_shares=slot_shares)
        return tables._with_slots(slot_shares, 1)

    def with_buckets(self, costs: NDArray[np.float64], *, pad: bool) -> PatchTables:
        """Return the tables with batches sorted by cost; ``costs`` is per sample of each group."""
        runs = self.runs(pad=pad)
        if self.slot_shares is not None:
            # The slot of the short batch changes with the epoch, so all batches count as whole.
            runs = runs._replace(num_first=self.batches)
        return replace(self, buckets=CostBuckets.build(runs, self.batches, costs))

    def with_visits(self, num_slots: int) -> PatchTables:
        """Return the tables with epochs of fewer slots than groups; all groups get equally many."""
        return replace(
            self,
            batches_per_pass=self.batches,
            visited=np.flatnonzero(self.batches),
            num_batches=num_slots,
            layout=StepLayout.of(num_slots, 1),
        )

    def with_costliest_first(
        self, count: int, costs: NDArray[np.float64], *, pad: bool
    ) -> PatchTables:
        """Return the tables with the ``count`` most expensive full batches in the first slots.

        ``costs``, shape (G,), are those of one sample of each group.
        """
        runs, own_batches, slots = self.runs(pad=pad), self.own_batches, self.batches
        num_full, short_every = runs.num_first, None
        if self.slot_shares is not None:
            # Batches that differ by one sample count as equal.
            has_short = (num_full < own_batches) & (self.larger is None)
            num_short = -(-slots // np.maximum(own_batches, 1))
            num_full = np.maximum(slots - has_short * num_short, slots > 0)
            short_every = np.where(has_short, own_batches, 1) if bool(has_short.any()) else None
        first_batch, run_costs = self.batch_offsets[:-1], runs.first_size * costs
        if self.buckets is not None:
            first_batch = self.buckets.first_batches(slots.size, 0)
        if self.larger is not None and self.slot_shares is None:
            # The smaller batches are full, too: a second run of each group.
            next_batch = first_batch + num_full
            if self.buckets is not None:
                next_batch = self.buckets.first_batches(slots.size, 1)
            first_batch, run_costs, num_full, slots = (
                np.stack(pair, axis=1).ravel()
                for pair in (
                    (first_batch, next_batch),
                    (run_costs, runs.last_size * costs),
                    (num_full, own_batches - num_full),
                    (slots, slots),
                )
            )
        costliest = CostliestFirst.build(
            count, run_costs, num_full, first_batch, slots, short_every
        )
        return replace(self, costliest=costliest)

    def first_position_and_size(self, xp: Any, group: Any, j: Any) -> tuple[Any, Any]:
        """Return the first positions of batches ``j`` of groups, and the sizes of these batches."""
        size = self.sizes[group]
        if self.larger is None:
            return j * size, size
        larger = self.larger[group]
        return j * size + xp.minimum(j, larger), size + (j < larger)

    def patches_of(self, groups: Int64) -> Int64:
        """Return the patches of groups, which are patches or cost bins."""
        return groups if self.patch_of_bin is None else np.asarray(self.patch_of_bin[groups])

    def _with_slots(self, batches: Int64, width: int) -> PatchTables:
        """Return the tables with new numbers of slots by group, in steps of ``width`` slots."""
        offsets = _running_total(batches)
        total = int(offsets[-1])
        batches.flags.writeable = False
        layout = StepLayout.of(total, width)
        return replace(
            self, batches=batches, batch_offsets=offsets, num_batches=total, layout=layout
        )

    def with_step_width(self, width: int) -> PatchTables:
        """Return the tables with a new step width and unchanged slots."""
        return replace(self, layout=StepLayout.of(self.num_batches, width))

    def with_same_patch_steps(self, width: int, uneven: str) -> PatchTables:
        """Return the tables for steps of one patch each, or raise ValueError if none is left.

        ``uneven`` applies to the last step of a patch if its batches do not fill this step: "pad"
        repeats the patch's first batches, "drop" drops the step. With weights, whole steps are
        assigned to patches; "pad" rounds the total number of steps up, "drop" down.
        """
        own_batches = self.own_batches
        if self.slot_shares is not None:
            steps = self._steps_by_share(self.slot_shares, width, uneven)
            return self._with_slots(steps * width, width)
        steps = own_batches // width if uneven == "drop" else -(-own_batches // width)
        if not bool(steps.any()):
            raise ValueError(
                f"step_width must be at most {own_batches.max()}, got {width}: no patch has more "
                f"than {own_batches.max()} batches, and uneven='drop' would drop every step. Use "
                "uneven='pad'."
            )
        return replace(self, batches_per_pass=own_batches)._with_slots(steps * width, width)

    @staticmethod
    def _steps_by_share(slot_shares: Int64, width: int, uneven: str) -> Int64:
        """Return the number of steps of each patch, at least one for each patch with slots."""
        slots, num_taking_part = int(slot_shares.sum()), int((slot_shares > 0).sum())
        steps = slots // width if uneven == "drop" else max(-(-slots // width), num_taking_part)
        if steps < num_taking_part:
            raise ValueError(
                f"epoch_batches must be at least {num_taking_part * width}, got {slots}: with "
                f"steps='same_patch' and uneven='drop', each of {num_taking_part} patches needs a "
                f"step of {width} batches"
            )
        return apportion(slot_shares, steps, (slot_shares > 0).astype(np.int64))

    def members(self) -> list[Any]:
        """Return all arrays except those that are None."""
        tables = [getattr(self, name) for name in _ARRAYS]
        parts = [part.members() for part in (self.buckets, self.costliest) if part is not None]
        return [table for table in tables if table is not None] + sum(parts, [*self.grid])

    @property
    def num_patches(self) -> int:
        """Number of patches, whether groups are patches or cost bins."""
        of_patches = self.counts if self.first_bin is None else self.first_bin[1:]
        return int(of_patches.shape[0])

    @property
    def own_batches(self) -> Any:
        """Number of batches that each group is cut into, whatever its number of slots."""
        return self.batches if self.batches_per_pass is None else self.batches_per_pass

    def patch_order(self, xp: Any, patches: Any, group_numbers: Any) -> PatchOrder:
        """Return the groups in the order of ``patches``; ``group_numbers`` is arange(G)."""
        groups = patches
        if self.first_bin is not None:
            first = self.first_bin[patches]
            num_bins = self.first_bin[patches + 1] - first
            offsets = xp.cumulative_sum(num_bins) - num_bins
            index = search_offsets(xp, offsets, group_numbers)
            groups = first[index] + group_numbers - offsets[index]
        batches = self.batches[groups]
        return PatchOrder(groups, xp.cumulative_sum(batches) - batches)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the arrays; broadcast scalars count 0."""
        return sum(int(m.nbytes) for m in self.members() if m.size == 0 or any(m.strides))

    @property
    def upload_nbytes(self) -> int:
        """Number of bytes of the arrays after an upload, without ``order``."""
        return sum(int(member.nbytes) for member in self.members())

    def on(self, device: Device, order: Any) -> PatchTables:
        """Return the tables and the order on a device."""

        def convert(table: Any) -> Any:
            if arrays.device_of(table).on_host:
                return arrays.upload(arrays.to_numpy(table), device)
            return arrays.to_device(table, device)

        with devices.device_context(device):
            tables = replace(self, order=order)
            members = {name: getattr(tables, name) for name in _ARRAYS}
            converted = {name: convert(m) for name, m in members.items() if m is not None}
            return replace(
                tables,
                grid=Grid(*map(convert, self.grid)),
                buckets=None if self.buckets is None else self.buckets.map_arrays(convert),
                costliest=None if self.costliest is None else self.costliest.map_arrays(convert),
                **converted,
            )


_ARRAYS = ["counts", "starts", "sizes", "batches", "batch_offsets"]
_ARRAYS += ["batches_per_pass", "patch_of_bin", "first_bin", "order", "larger", "visited"]


def _running_total(numbers: Int64) -> Int64:
    """Return the exclusive running total, then the sum: shape (G + 1,)."""
    total = np.zeros(numbers.size + 1, np.int64)
    np.cumsum(numbers, out=total[1:])
    return total
