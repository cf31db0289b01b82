"""The most expensive batches first, so that a run that exceeds the memory fails at once.

The k most expensive full batches of an epoch change places with the batches in its first k slots;
other batches stay in their slots. Every batch is full, except the short last batch of a patch.

Let ``p(i)`` be the batch that the permutation puts into slot i, and ``c(i)`` the batch to be moved
there. Their swap puts ``p(i)`` into the slot that held ``c(i)``. If ``p(i)`` is itself a ``c(j)``,
the swap for slot j replaces it by ``p(j)``, and so on. Doubling follows all these chains to their
ends in log2(k) steps, so no loop depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.mixture import pass_and_batch
from gpusampler.batching.steps import search_offsets
from gpusampler.core.arrays import Int64
from gpusampler.groups.fingerprint import of_numbers
from gpusampler.groups.subsets import expand_runs


@dataclass(frozen=True)
class CostliestFirst:
    """The k batches for the first slots of an epoch: int64 arrays, shape (k,), on one device.

    Attributes
    ----------
    slots : array
        0 .. k-1.
    batches : array
        Indices of the batches in the natural order, ascending. If ``nth`` is given, they are the
        indices of their patches' first batches instead.
    slot_of_batch, batch_of_slot : arrays
        Slot of each element of ``batches``, and the inverse.
    nth, patch_slots, own_batches : arrays, or None
        With weights, the slot of a short batch changes from epoch to epoch. Then element i is full
        batch ``nth[i]`` of a patch with ``patch_slots[i]`` slots per epoch, where every
        ``own_batches[i]``-th batch is short; 1 if none is.
    fingerprint : int
        64-bit hash of the order of all groups by cost.
    """

    slots: Any
    batches: Any
    slot_of_batch: Any
    batch_of_slot: Any
    nth: Any
    patch_slots: Any
    own_batches: Any
    fingerprint: int

    @classmethod
    def build(
        cls,
        count: int,
        costs: NDArray[np.float64],
        num_full: Int64,
        first_batch: Int64,
        patch_slots: Int64,
        short_every: Int64 | None,
    ) -> CostliestFirst:
        """Choose at most ``count`` batches; the arrays have one element per group (or run of one).

        ``costs`` are the costs of a full batch, ``num_full`` how many batches are full in every
        epoch, and ``first_batch`` the indices of the first batches in the natural order.
        ``short_every`` is ``own_batches`` above, or None if no short batch changes its slot.
        """
        by_cost = np.argsort(-costs, kind="stable")
        fingerprint = of_numbers(by_cost)
        by_cost = by_cost[num_full[by_cost] > 0]
        chosen = np.minimum(num_full[by_cost], count)
        num_groups = int(np.searchsorted(np.cumsum(chosen), count)) + 1
        by_cost, chosen = by_cost[:num_groups], chosen[:num_groups]
        group = np.repeat(by_cost, chosen)[:count]
        nth = expand_runs(np.zeros_like(chosen), chosen)[:count]
        slot_of_batch = np.lexsort((nth, first_batch[group]))
        group, nth = group[slot_of_batch], nth[slot_of_batch]
        changes = short_every is not None
        return cls(
            slots=np.arange(group.size, dtype=np.int64),
            batches=first_batch[group] + (0 if changes else nth),
            slot_of_batch=slot_of_batch,
            batch_of_slot=np.argsort(slot_of_batch),
            nth=nth if changes else None,
            patch_slots=patch_slots[group] if changes else None,
            own_batches=None if short_every is None else short_every[group],
            fingerprint=fingerprint,
        )

    def batch_indices(
        self, xp: Any, epoch: Any, slots: Any, permute_slots: Callable[[Any], Any]
    ) -> Any:
        """Return the index of the batch at each slot, in the natural order of batches.

        ``permute_slots`` returns the indices without the swaps.
        """
        chosen = self._batches(xp, epoch)
        count = int(chosen.shape[0])
        # What replaces each chosen batch in the slot that it leaves: a batch, and whether that is
        # a chosen one, and which.
        substitute = permute_slots(self.slots)[self.slot_of_batch]
        link, is_chosen = _find(xp, chosen, substitute)
        for _ in range((count - 1).bit_length()):
            substitute = xp.where(is_chosen, substitute[link], substitute)
            is_chosen, link = is_chosen & is_chosen[link], link[link]
        index = permute_slots(slots)
        place, is_moved = _find(xp, chosen, index)
        index = xp.where(is_moved, substitute[place], index)
        first_slot = xp.where(slots < count, slots, 0)
        return xp.where(slots < count, chosen[self.batch_of_slot[first_slot]], index)

    def _batches(self, xp: Any, epoch: Any) -> Any:
        """Return the indices of the chosen batches in an epoch, ascending."""
        if self.nth is None:
            return self.batches
        nth, own_batches = self.nth, self.own_batches
        _, first = pass_and_batch(epoch, 0 * nth, self.patch_slots, own_batches)
        first_short = own_batches - 1 - first
        others = xp.where(own_batches > 1, own_batches - 1, 1)
        num_short = xp.where(nth < first_short, 0, 1 + (nth - first_short) // others)
        slot = nth + xp.where(own_batches > 1, num_short, 0)
        # The only slot of a patch is chosen even if its batch is short in this epoch.
        return self.batches + xp.minimum(slot, self.patch_slots - 1)

    def members(self) -> list[Any]:
        """Return all arrays."""
        return list(self._arrays().values())

    def map_arrays(self, convert: Callable[[Any], Any]) -> CostliestFirst:
        """Return a copy with ``convert`` applied to each array."""
        return replace(self, **{name: convert(array) for name, array in self._arrays().items()})

    def _arrays(self) -> dict[str, Any]:
        names = [field.name for field in fields(self) if field.name != "fingerprint"]
        members = {name: getattr(self, name) for name in names}
        return {name: member for name, member in members.items() if member is not None}


def _find(xp: Any, batches: Any, index: Any) -> tuple[Any, Any]:
    """Return where each index is in ascending ``batches``, and whether it is there."""
    place = search_offsets(xp, batches, index)
    return place, batches[place] == index
