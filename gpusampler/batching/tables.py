"""Tables of a plan, one element per patch or cost bin, on the host or on a device."""

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

    @classmethod
    def build(
        cls,
        groups: PatchGroups,
        sizes: Int64,
        partial: str,
        patch_of_bin: Int64 | None = None,
    ) -> PatchTables:
        """Return tables on the host, with one slot per step and without ``order``, which `on` adds.

        ``sizes`` are batch sizes, shape (G,); groups with size 0 get no batch. Raise ValueError if
        partial="drop" leaves no batch.
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
            # The group that lacks the fewest samples.
            groups_with_size = np.flatnonzero(~is_left_out)
            nearest = groups_with_size[(sizes - counts)[groups_with_size].argmin()]
            unit = "patch" if patch_of_bin is None else "cost bin"
            is_one_size = bool((sizes[groups_with_size] == sizes[nearest]).all())
            raise ValueError(
                f"partial='drop' leaves no batches: batch_size={int(sizes[nearest])}, but the "
                f"{f'largest {unit}' if is_one_size else f'{unit} closest to a full batch'} has "
                f"{int(counts[nearest])} samples. Reduce batch_size or use partial='keep' or 'pad'."
            )
        first_bin = None
        if patch_of_bin is not None:
            first_bin = np.append(first_bins(patch_of_bin), patch_of_bin.size)
        batches.flags.writeable = False
        lengths = returned_sizes(sizes, counts, pad=partial == "pad")
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
            # Groups without a batch are never evaluated.
            smallest_patch=int(counts[batches > 0].min()),
            largest_patch=int(counts[batches > 0].max()),
            is_uniform=is_uniform,
            layout=StepLayout.of(total, 1),
            buckets=None,
        )

    def with_slot_shares(self, slot_shares: Int64) -> PatchTables:
        """Return the tables with the number of slots that weights assign to each group.

        ``slot_shares``, shape (G,), is >= 1 for groups with a batch and 0 for others.
        """
        slot_shares.flags.writeable = False
        tables = replace(self, batches_per_pass=self.batches, slot_shares=slot_shares)
        return tables._with_slots(slot_shares, 1)

    def with_buckets(self, partial: str, costs: NDArray[np.float64]) -> PatchTables:
        """Return the tables with batches sorted by cost; ``costs`` is per sample of each group."""
        sizes = self.sizes
        if self.slot_shares is not None:
            # The slot of the short batch changes with the epoch, so all batches count as whole.
            sizes = returned_sizes(sizes, self.counts, pad=partial == "pad")
            partial = "drop"
        buckets = CostBuckets.build(self.counts, sizes, self.batches, partial, costs)
        return replace(self, buckets=buckets)

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
        buckets = [] if self.buckets is None else self.buckets.members()
        return [table for table in tables if table is not None] + [*self.grid, *buckets]

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
                **converted,
            )


_ARRAYS = ["counts", "starts", "sizes", "batches", "batch_offsets"]
_ARRAYS += ["batches_per_pass", "patch_of_bin", "first_bin", "order", "larger"]


def _running_total(numbers: Int64) -> Int64:
    """Return the exclusive running total, then the sum: shape (G + 1,)."""
    total = np.zeros(numbers.size + 1, np.int64)
    np.cumsum(numbers, out=total[1:])
    return total
