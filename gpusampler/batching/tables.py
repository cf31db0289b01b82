"""The small tables of a plan, on the host and on a device, and what evaluation hands around."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.mixture import apportion
from gpusampler.batching.steps import CostClasses, StepLayout, last_at_most
from gpusampler.core import arrays, devices
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST, Device
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.permutation.reference import Grid, grids_of


class PatchOrder(NamedTuple):
    """An epoch's order of the patches, where the batches of a patch come in a row.

    Attributes
    ----------
    groups, before : int64 arrays, shape (G,)
        The patches in order (or their classes of cost, those of a patch in a row), and the slots
        before each.
    """

    groups: Any
    before: Any


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
    own : array, or None
        Batches that a patch has, where its slots are more or fewer.
    shares : NumPy array (on any device), or None
        Slots that weights give each patch, before they are made to fill steps; where there are
        any, passes over a patch go on from epoch to epoch.
    parents : array, or None
        The patch that each group here is of, where patches are cut into classes of cost.
    first_parts : array, shape (patches + 1,), or None
        The first class of each patch there, and at last how many there are.
    grid : Grid of arrays
        Sides of each patch's permutation.
    order : array, shape (N,), or None
    num_batches, max_batch_size, smallest, largest : int
        M, B, and the smallest and largest patch.
    uniform : bool
        Whether every batch is handed out at B.
    layout : StepLayout
        How the M slots are cut into steps.
    classes : CostClasses, or None
        The batches by cost, where steps are balanced.
    """

    counts: Any
    starts: Any
    sizes: Any
    batches: Any
    batch_offsets: Any
    own: Any
    shares: Int64 | None
    parents: Any
    first_parts: Any
    grid: Grid
    order: Any
    num_batches: int
    max_batch_size: int
    smallest: int
    largest: int
    uniform: bool
    layout: StepLayout
    classes: CostClasses | None

    @classmethod
    def build(
        cls,
        groups: PatchGroups,
        sizes: Int64,
        partial: str,
        parents: Int64 | None = None,
    ) -> PatchTables:
        """Return the host tables of groups, in steps of one slot; ``order`` is left to the plan.

        Parameters
        ----------
        groups : PatchGroups
        sizes : int64 array, shape (G,)
            Batch size of each group; 0: it is left out.
        partial : {"keep", "drop", "pad"}
        parents : int64 array, shape (G,), optional
            As in the attributes.

        Raises
        ------
        ValueError
            If no batch is left: every patch is smaller than the batch size under "drop".
        """
        counts = groups.counts
        left_out = sizes == 0
        if bool(left_out.any()):
            sizes = np.maximum(sizes, 1)
        batches = counts // sizes if partial == "drop" else -(-counts // sizes)
        batches[left_out] = 0
        offsets = _running_total(batches)
        total = int(offsets[-1])
        if total == 0:
            # The one that lacks fewest samples.
            there = np.flatnonzero(~left_out)
            nearest = there[(sizes - counts)[there].argmin()]
            what = "patches" if parents is None else "classes of cost of patches"
            which = "largest" if bool((sizes[there] == sizes[nearest]).all()) else "nearest"
            raise ValueError(
                f"batch_size must be at most the largest patch under partial='drop', got "
                f"{int(sizes[nearest])}: all {there.size} {what} are smaller (the {which} has "
                f"{int(counts[nearest])} samples), so no batch is left"
            )
        batches.flags.writeable = False
        filled = sizes if partial == "pad" else np.minimum(sizes, counts)
        whole = filled[batches > 0]
        uniform = bool((whole == whole[0]).all())
        if partial == "keep":
            uniform = uniform and bool((counts % filled == 0).all())
        return cls(
            counts=counts,
            starts=groups.starts,
            sizes=sizes,
            batches=batches,
            batch_offsets=offsets,
            own=None,
            shares=None,
            parents=parents,
            first_parts=None if parents is None else _first_of_each(parents),
            grid=grids_of(arrays.namespace(HOST), counts),
            order=None,
            num_batches=total,
            max_batch_size=int(whole.max()),
            # Patches that are left out are never met.
            smallest=int(counts[batches > 0].min()),
            largest=int(counts[batches > 0].max()),
            uniform=uniform,
            layout=StepLayout.of(total, 1),
            classes=None,
        )

    def mixed(self, shares: Int64) -> PatchTables:
        """Return the tables for passes that go on from epoch to epoch, in steps of one slot.

        Parameters
        ----------
        shares : int64 array, shape (G,)
            Slots of each group in an epoch; 0 where it has no batch, else at least 1.
        """
        shares.flags.writeable = False
        return replace(self, own=self.batches, shares=shares)._with_slots(shares, 1)

    def balanced(self, partial: str, costs: NDArray[np.float64]) -> PatchTables:
        """Return the tables with batches sorted by cost, for balanced steps.

        Parameters
        ----------
        partial : {"keep", "drop", "pad"}
        costs : float64 array, shape (G,)
            Of a sample of each group.
        """
        sizes = self.sizes
        if self.shares is not None:
            # Which slot has a patch's short batch changes from epoch to epoch: all count as whole.
            sizes = sizes if partial == "pad" else np.minimum(sizes, self.counts)
            partial = "drop"
        classes = CostClasses.build(self.counts, sizes, self.batches, partial, costs)
        return replace(self, classes=classes)

    def _with_slots(self, batches: Int64, width: int) -> PatchTables:
        """Return the tables with other slots by patch, in steps of a width."""
        offsets = _running_total(batches)
        total = int(offsets[-1])
        batches.flags.writeable = False
        layout = StepLayout.of(total, width)
        return replace(
            self, batches=batches, batch_offsets=offsets, num_batches=total, layout=layout
        )

    def in_steps(self, width: int) -> PatchTables:
        """Return the tables for steps of another width; which batches share one is not touched."""
        return replace(self, layout=StepLayout.of(self.num_batches, width))

    def in_steps_of_one_patch(self, width: int, uneven: str) -> PatchTables:
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
        own = self.batches if self.own is None else self.own
        if self.shares is not None:
            return self._with_slots(self._steps_by_share(self.shares, width, uneven) * width, width)
        steps = own // width if uneven == "drop" else -(-own // width)
        if not bool(steps.any()):
            raise ValueError(
                "step_width must be at most the batches of the largest patch under "
                f"steps='same_patch', uneven='drop', got {width} for {int(own.max())} batches"
            )
        return replace(self, own=own)._with_slots(steps * width, width)

    @staticmethod
    def _steps_by_share(shares: Int64, width: int, uneven: str) -> Int64:
        """Return the steps of each patch, at least one for each that takes part."""
        slots, needed = int(shares.sum()), int((shares > 0).sum())
        steps = slots // width if uneven == "drop" else max(-(-slots // width), needed)
        if steps < needed:
            raise ValueError(
                "epoch_batches must be enough for a step of each patch under steps='same_patch', "
                f"uneven='drop', at least {needed} steps of {width} batches, got {slots}"
            )
        return apportion(shares, steps, (shares > 0).astype(np.int64))

    def members(self) -> list[Any]:
        """Return the arrays."""
        tables = (self.counts, self.starts, self.sizes, self.batches, self.batch_offsets)
        asked = (self.own, self.parents, self.first_parts, self.order)
        maybe = [table for table in asked if table is not None]
        classes = [] if self.classes is None else self.classes.members()
        return [*tables, *self.grid, *maybe, *classes]

    @property
    def num_patches(self) -> int:
        """Number of patches, each cut into classes of cost or not."""
        of_patches = self.counts if self.first_parts is None else self.first_parts[1:]
        return int(of_patches.shape[0])

    def ordered(self, xp: Any, patches: Any, numbers: Any) -> PatchOrder:
        """Return an order of the patches, with the slots before each.

        Parameters
        ----------
        xp : module
            Array namespace.
        patches : int64 array, shape (patches,)
        numbers : int64 array, shape (G,)
            0 .. G-1.
        """
        groups = patches
        if self.first_parts is not None:
            first = self.first_parts[patches]
            parts = self.first_parts[patches + 1] - first
            before = xp.cumulative_sum(parts) - parts
            place = last_at_most(xp, before, numbers)
            groups = first[place] + numbers - before[place]
        batches = self.batches[groups]
        return PatchOrder(groups, xp.cumulative_sum(batches) - batches)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays here; one number in place of many takes none."""
        return sum(int(m.nbytes) for m in self.members() if m.size == 0 or any(m.strides))

    @property
    def nbytes_sent(self) -> int:
        """Bytes of the arrays once they are sent to a device, but for the order."""
        return sum(int(member.nbytes) for member in self.members())

    def on(self, device: Device, order: Any) -> PatchTables:
        """Return the same tables on a device, with the order (uploaded if it is elsewhere)."""

        def there(table: Any) -> Any:
            if arrays.device_of(table).on_host:
                return arrays.upload(arrays.to_numpy(table), device)
            return arrays.to_device(table, device)

        with devices.on(device):
            return replace(
                self,
                counts=there(self.counts),
                starts=there(self.starts),
                sizes=there(self.sizes),
                batches=there(self.batches),
                batch_offsets=there(self.batch_offsets),
                own=None if self.own is None else there(self.own),
                parents=None if self.parents is None else there(self.parents),
                first_parts=None if self.first_parts is None else there(self.first_parts),
                grid=Grid(*(there(side) for side in self.grid)),
                order=None if order is None else there(order),
                classes=None if self.classes is None else self.classes.on(there),
            )


def _running_total(numbers: Int64) -> Int64:
    """Return how many there are before each, and at last in all."""
    total = np.zeros(numbers.size + 1, np.int64)
    np.cumsum(numbers, out=total[1:])
    return total


def _first_of_each(parents: Int64) -> Int64:
    """Return the first class of each patch, and how many classes there are; none is without."""
    return np.append(np.flatnonzero(np.diff(parents, prepend=-1)), parents.size)
