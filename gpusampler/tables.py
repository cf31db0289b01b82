"""The small tables of a plan, on the host and on a device, and what evaluation hands around."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpusampler import arrays
from gpusampler.arrays import HOST, Device, Int64
from gpusampler.grouping import PatchGroups
from gpusampler.permutation import Grid, grids_of
from gpusampler.steps import CostClasses, StepLayout


class Shuffles(NamedTuple):
    """What a plan permutes, and how its batches are filled.

    ``samples`` inside every patch; ``batches`` of an epoch (or its steps), or its patches where
    the batches of a patch come in a row, which is what ``interleave`` being false means; ``pad``: a
    short batch is filled up to its patch's size.
    """

    samples: bool
    batches: bool
    interleave: bool
    pad: bool


class PatchOrder(NamedTuple):
    """An epoch's order of the patches, where the batches of a patch come in a row.

    Attributes
    ----------
    patches, before : int64 arrays, shape (G,)
        The patches in order, and the slots before each.
    """

    patches: Any
    before: Any


class Located(NamedTuple):
    """Where slots lead: int64 NumPy arrays of shape (K,).

    ``slot`` leads to batch ``j`` of patch ``group``, of which ``length`` samples count and ``size``
    are handed out.
    """

    slot: Int64
    group: Int64
    j: Int64
    length: Int64
    size: Int64

    def rows(self, rows: slice) -> Located:
        """Return some of the rows."""
        return Located(*(part[rows] for part in self))


@dataclass(frozen=True)
class PatchTables:
    """What evaluation looks up by group; int64 arrays of shape (G,) on one device.

    Attributes
    ----------
    counts, starts : arrays
        As in `PatchGroups`.
    sizes : array
        Batch size of each patch.
    batches : array
        Slots of each patch in an epoch: its batches, and those that come again or are left out so
        that steps are of one patch.
    batch_offsets : array, shape (G + 1,)
        Running total of ``batches``.
    own : array, or None
        Batches that a patch has, where its slots are more or fewer.
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
        batch_size: int,
        partial: str,
        costs: NDArray[np.float64] | None = None,
    ) -> PatchTables:
        """Return the host tables of groups, in steps of one slot; ``order`` is left to the plan.

        Parameters
        ----------
        groups : PatchGroups
        batch_size : int
        partial : {"keep", "drop", "pad"}
        costs : float64 array, shape (G,), optional
            Of a sample of each patch, where steps are to be balanced.

        Raises
        ------
        ValueError
            If no batch is left: every patch is smaller than the batch size under "drop".
        """
        counts = groups.counts
        # A broadcast scalar: no memory, and the form that sizes by patch will have.
        sizes = np.broadcast_to(np.int64(batch_size), counts.shape)
        batches = counts // sizes if partial == "drop" else -(-counts // sizes)
        offsets = _running_total(batches)
        total = int(offsets[-1])
        if total == 0:
            raise ValueError(
                f"batch_size must be at most the largest patch under partial='drop', got "
                f"{batch_size}: all {counts.size} patches are smaller (the largest has "
                f"{int(counts.max())} samples), so no batch is left"
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
            grid=grids_of(arrays.namespace(HOST), counts),
            order=None,
            num_batches=total,
            max_batch_size=int(filled.max()),
            # Patches that "drop" leaves out are never met.
            smallest=int(counts[batches > 0].min()),
            largest=int(counts.max()),
            uniform=uniform,
            layout=StepLayout.of(total, 1),
            classes=(
                None if costs is None else CostClasses.build(counts, sizes, batches, partial, costs)
            ),
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
            are left out.

        Raises
        ------
        ValueError
            If no step is left.
        """
        own = self.batches if self.own is None else self.own
        steps = own // width if uneven == "drop" else -(-own // width)
        batches = steps * width
        offsets = _running_total(batches)
        total = int(offsets[-1])
        if total == 0:
            raise ValueError(
                "step_width must be at most the batches of the largest patch under "
                f"steps='same_patch', uneven='drop', got {width} for {int(own.max())} batches"
            )
        batches.flags.writeable = False
        layout = StepLayout.of(total, width)
        return replace(
            self, own=own, batches=batches, batch_offsets=offsets, num_batches=total, layout=layout
        )

    def members(self) -> list[Any]:
        """Return the arrays."""
        tables = (self.counts, self.starts, self.sizes, self.batches, self.batch_offsets)
        maybe = [table for table in (self.own, self.order) if table is not None]
        classes = [] if self.classes is None else self.classes.members()
        return [*tables, *self.grid, *maybe, *classes]

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

        with arrays.on(device):
            return replace(
                self,
                counts=there(self.counts),
                starts=there(self.starts),
                sizes=there(self.sizes),
                batches=there(self.batches),
                batch_offsets=there(self.batch_offsets),
                own=None if self.own is None else there(self.own),
                grid=Grid(*(there(side) for side in self.grid)),
                order=None if order is None else there(order),
                classes=None if self.classes is None else self.classes.on(there),
            )


def _running_total(numbers: Int64) -> Int64:
    """Return how many there are before each, and at last in all."""
    total = np.zeros(numbers.size + 1, np.int64)
    np.cumsum(numbers, out=total[1:])
    return total
