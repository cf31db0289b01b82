"""The small tables of a plan, on the host and on a device, and what evaluation hands around."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.cost_bins import first_bins
from gpusampler.batching.mixture import apportion
from gpusampler.batching.short_batches import count_batches, returned_sizes
from gpusampler.batching.steps import CostBuckets, StepLayout, search_offsets
from gpusampler.core import arrays, devices
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST, Device
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.permutation.reference import Grid, grids_of


class PatchOrder(NamedTuple):
    """An epoch's order of the patches, where the batches of a patch come in a row.

    Attributes
    ----------
    groups, offsets : int64 arrays, shape (G,)
        The patches in order (or their cost bins, those of a patch in a row), and the slots before
        each.
    """

    groups: Any
    offsets: Any


@dataclass(frozen=True)
class PatchTables:
    """What evaluation looks up by group; int64 arrays of shape (G,) on one device.

    Attributes
    ----------
    counts, starts : arrays
        As in `PatchGroups`.
    sizes : array
        Batch size of each patch, 1 at least: also of patches that are left out.
    batches : array
        Slots of each patch in an epoch: its batches, and those that come again or are left out so
        that steps are of one patch, or those that weights give it.
    batch_offsets : array, shape (G + 1,)
        Running total of ``batches``.
    batches_per_pass : array, or None
        Batches that a patch has, where its slots are more or fewer.
    slot_shares : NumPy array (on any device), or None
        Slots that weights give each patch, before they are made to fill steps; where there are
        any, passes over a patch go on from epoch to epoch.
    patch_of_bin : array, or None
        The patch that each group is of, where patches are cut into cost bins.
    first_bin : array, shape (patches + 1,), or None
        The first bin of each patch there, and at last how many there are.
    grid : Grid of arrays
        Sides of each patch's permutation.
    order : array, shape (N,), or None
    num_batches, max_batch_size, smallest_patch, largest_patch : int
        M, B, and the smallest and largest patch.
    is_uniform : bool
        Whether every batch is handed out at B.
    layout : StepLayout
        How the M slots are cut into steps.
    buckets : CostBuckets, or None
        The batches by cost, where steps are balanced.
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

    @classmethod
    def build(
        cls,
        groups: PatchGroups,
        sizes: Int64,
        partial: str,
        patch_of_bin: Int64 | None = None,
    ) -> PatchTables:
        """Return the host tables of groups, in steps of one slot; ``order`` is left to the plan.

        Parameters
        ----------
        groups : PatchGroups
        sizes : int64 array, shape (G,)
            Batch size of each group; 0: it is left out.
        partial : {"keep", "drop", "pad"}
        patch_of_bin : int64 array, shape (G,), optional
            As in the attributes.

        Raises
        ------
        ValueError
            If no batch is left: every patch is smaller than the batch size under "drop".
        """
        counts = groups.counts
        is_left_out = sizes == 0
        if bool(is_left_out.any()):
            sizes = np.maximum(sizes, 1)
        batches = count_batches(counts, sizes, partial)
        batches[is_left_out] = 0
        offsets = _running_total(batches)
        total = int(offsets[-1])
        if total == 0:
            # The one that lacks fewest samples.
            groups_with_size = np.flatnonzero(~is_left_out)
            nearest = groups_with_size[(sizes - counts)[groups_with_size].argmin()]
            units = "patches" if patch_of_bin is None else "classes of cost of patches"
            is_one_size = bool((sizes[groups_with_size] == sizes[nearest]).all())
            raise ValueError(
                f"batch_size must be at most the largest patch under partial='drop', got "
                f"{int(sizes[nearest])}: all {groups_with_size.size} {units} are smaller (the "
                f"{'largest' if is_one_size else 'nearest'} has {int(counts[nearest])} samples), "
                "so no batch is left"
            )
        first_bin = None
        if patch_of_bin is not None:
            first_bin = np.append(first_bins(patch_of_bin), patch_of_bin.size)
        batches.flags.writeable = False
        lengths = returned_sizes(sizes, counts, partial)
        max_lengths = lengths[batches > 0]
        is_uniform = bool((max_lengths == max_lengths[0]).all())
        if partial == "keep":
            is_uniform = is_uniform and bool((counts % lengths == 0).all())
        return cls(
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
            max_batch_size=int(max_lengths.max()),
            # Patches that are left out are never met.
            smallest_patch=int(counts[batches > 0].min()),
            largest_patch=int(counts[batches > 0].max()),
            is_uniform=is_uniform,
            layout=StepLayout.of(total, 1),
            buckets=None,
        )

    def with_slot_shares(self, slot_shares: Int64) -> PatchTables:
        """Return the tables for passes that go on from epoch to epoch, in steps of one slot.

        Parameters
        ----------
        slot_shares : int64 array, shape (G,)
            Slots of each group in an epoch; 0 where it has no batch, else at least 1.
        """
        slot_shares.flags.writeable = False
        tables = replace(self, batches_per_pass=self.batches, slot_shares=slot_shares)
        return tables._with_slots(slot_shares, 1)

    def with_buckets(self, partial: str, costs: NDArray[np.float64]) -> PatchTables:
        """Return the tables with batches sorted by cost, for balanced steps.

        Parameters
        ----------
        partial : {"keep", "drop", "pad"}
        costs : float64 array, shape (G,)
            Of a sample of each group.
        """
        sizes = self.sizes
        if self.slot_shares is not None:
            # Which slot has a patch's short batch changes from epoch to epoch: all count as whole.
            sizes = returned_sizes(sizes, self.counts, partial)
            partial = "drop"
        buckets = CostBuckets.build(self.counts, sizes, self.batches, partial, costs)
        return replace(self, buckets=buckets)

    def _with_slots(self, batches: Int64, width: int) -> PatchTables:
        """Return the tables with other slots by patch, in steps of a width."""
        offsets = _running_total(batches)
        total = int(offsets[-1])
        batches.flags.writeable = False
        layout = StepLayout.of(total, width)
        return replace(
            self, batches=batches, batch_offsets=offsets, num_batches=total, layout=layout
        )

    def with_step_width(self, width: int) -> PatchTables:
        """Return the tables for steps of another width; which batches share one is not touched."""
        return replace(self, layout=StepLayout.of(self.num_batches, width))

    def with_same_patch_steps(self, width: int, uneven: str) -> PatchTables:
        """Return the tables for steps that are of one patch each.

        Parameters
        ----------
        width : int
            Slots of a step.
        uneven : {"pad", "drop"}
            What becomes of a patch's batches that fill no step: its first ones come again, or they
            are left out. Where weights say how many slots a patch has, whole steps are shared out
            by them, as many as hold the epoch's batches, or as they fill.

        Raises
        ------
        ValueError
            If no step is left, or weights leave a patch without any.
        """
        own_batches = self.own_batches
        if self.slot_shares is not None:
            steps = self._steps_by_share(self.slot_shares, width, uneven)
            return self._with_slots(steps * width, width)
        steps = own_batches // width if uneven == "drop" else -(-own_batches // width)
        if not bool(steps.any()):
            raise ValueError(
                "step_width must be at most the batches of the largest patch under "
                f"steps='same_patch', uneven='drop', got {width} for {int(own_batches.max())} "
                "batches"
            )
        return replace(self, batches_per_pass=own_batches)._with_slots(steps * width, width)

    @staticmethod
    def _steps_by_share(slot_shares: Int64, width: int, uneven: str) -> Int64:
        """Return the steps of each patch, at least one for each that takes part."""
        slots, num_taking_part = int(slot_shares.sum()), int((slot_shares > 0).sum())
        steps = slots // width if uneven == "drop" else max(-(-slots // width), num_taking_part)
        if steps < num_taking_part:
            raise ValueError(
                "epoch_batches must be enough for a step of each patch under steps='same_patch', "
                f"uneven='drop', at least {num_taking_part} steps of {width} batches, got {slots}"
            )
        return apportion(slot_shares, steps, (slot_shares > 0).astype(np.int64))

    def members(self) -> list[Any]:
        """Return the arrays."""
        tables = [getattr(self, name) for name in _ARRAYS]
        buckets = [] if self.buckets is None else self.buckets.members()
        return [table for table in tables if table is not None] + [*self.grid, *buckets]

    @property
    def num_patches(self) -> int:
        """Number of patches, each cut into cost bins or not."""
        of_patches = self.counts if self.first_bin is None else self.first_bin[1:]
        return int(of_patches.shape[0])

    @property
    def own_batches(self) -> Any:
        """Batches that each patch is cut into, however many slots it has."""
        return self.batches if self.batches_per_pass is None else self.batches_per_pass

    def patch_order(self, xp: Any, patches: Any, group_numbers: Any) -> PatchOrder:
        """Return an order of the patches, with the slots before each.

        Parameters
        ----------
        xp : module
            Array namespace.
        patches : int64 array, shape (patches,)
        group_numbers : int64 array, shape (G,)
            0 .. G-1.
        """
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
        """Bytes of the arrays here; one number in place of many takes none."""
        return sum(int(m.nbytes) for m in self.members() if m.size == 0 or any(m.strides))

    @property
    def upload_nbytes(self) -> int:
        """Bytes of the arrays once they are sent to a device, but for the order."""
        return sum(int(member.nbytes) for member in self.members())

    def on(self, device: Device, order: Any) -> PatchTables:
        """Return the same tables on a device, with the order (uploaded if it is elsewhere)."""

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
                **converted,
            )


_ARRAYS = ["counts", "starts", "sizes", "batches", "batch_offsets"]
_ARRAYS += ["batches_per_pass", "patch_of_bin", "first_bin", "order"]


def _running_total(numbers: Int64) -> Int64:
    """Return how many there are before each, and at last in all."""
    total = np.zeros(numbers.size + 1, np.int64)
    np.cumsum(numbers, out=total[1:])
    return total
