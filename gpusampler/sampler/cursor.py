"""BatchCursor: the batches of a plan inside a compiled loop or a CUDA graph.

It imports torch, so only `PatchBatchSampler.cursor` imports this module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpusampler.batching.cost_budget import CostBudget
from gpusampler.batching.steps import UNEVENS
from gpusampler.core.devices import Device
from gpusampler.core.log import warn
from gpusampler.core.text import short_repr
from gpusampler.core.validation import check_choice, check_int
from gpusampler.plan.coverage import patch_label
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.plan.evaluators.kernels.fused import Advance
from gpusampler.sampler.fingerprint import check_fingerprint, fingerprint_of
from gpusampler.sampler.state import (
    check_epoch,
    check_num_batches,
    remaining_steps,
    with_saved_seed,
)

HARMLESS_EXCESS = 1.1
"""Multiple of a budget that rows may cost without a warning.

`calibrate` leaves a tenth of the memory free by default, so such rows still fit.
"""


class CursorBatch(NamedTuple):
    """One batch of a `BatchCursor`, entirely on the device.

    Attributes
    ----------
    indices : int64 tensor, shape (B,)
        Sample indices; those beyond ``valid`` repeat samples of the same patch.
    valid : int64 tensor, 0-d
        Number of leading samples that count; 0 for a repeated batch if repeats do not count.
    group : int64 tensor, shape (1,)
        Index of the batch's patch among the sorted patch ids. ``geometries[group]`` is its
        geometry, shape (1, ...), also in a CUDA graph; a 0-d index would be read on the host.
    """

    indices: Tensor
    valid: Tensor
    group: Tensor


class BatchCursor(torch.nn.Module):
    """Module that returns the next batch at every call; its position is in tensors on the device.

    `forward` never synchronizes with the host, returns constant shapes and updates its buffers in
    place. It therefore works in a function compiled with fullgraph=True, without recompilation, and
    in a CUDA graph, where each replay returns the next batch. After the last batch of an epoch, the
    next call returns the first batch of the next epoch.

    Every row is as wide as the largest batch. With a `CostBudget` or sizes by patch, rows of other
    patches then exceed the budget or their size; only ``valid`` stays within. Iterate over
    ``sampler.batches()`` instead, or bound the sizes with ``max_batch_size``.

    Parameters
    ----------
    plan : EpochPlan
        A plan on a torch device. With ``interleave=False``, every call recomputes the order of all
        patches, which costs as much as a batch with one sample per patch.
    epoch, slot : int
        Start position: an epoch, and a global slot in it, 0 .. M (M is the end of the epoch).
    num_replicas, rank : int
        Number of ranks that share an epoch, and this rank. A step takes ``num_replicas`` slots.
    uneven : {"pad", "drop"}
        If fewer than ``num_replicas`` slots remain: repeat the epoch's first batches, or drop the
        remaining ones.
    seed_given : bool
        True: reject a saved state with a different seed. False: adopt its seed.
    repeats_count : bool
        Whether batches repeated under "pad" count (in ``valid``).

    Attributes
    ----------
    epoch, slot : int64 tensors, 0-d
        Position of the next call; buffers that ``state_dict`` saves.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or an epoch has no batch for every rank.

    Warns
    -----
    UserWarning
        If a row costs more than 1.1 times the budget, or has more than 1.1 times as many samples as
        the batch size of its patch.

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0, partial="pad")
    >>> cursor = sampler.cursor()
    >>> cursor().indices.shape, cursor.position()
    (torch.Size([2]), (0, 1))
    """

    epoch: Tensor
    slot: Tensor

    def __init__(
        self,
        plan: EpochPlan,
        *,
        epoch: int = 0,
        slot: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        uneven: str = "pad",
        seed_given: bool = True,
        repeats_count: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(plan, EpochPlan):
            raise TypeError(f"plan must be an EpochPlan, got {type(plan).__name__}")
        if not plan.device.is_torch:
            raise ValueError(
                f"plan must be on a torch device, got {str(plan.device)!r}; pass plan.on('cpu')"
            )
        self.num_replicas = check_int(num_replicas, "num_replicas", low=1, high=1 << 31)
        self.rank = check_int(rank, "rank", low=0, high=self.num_replicas)
        self._uneven = check_choice(uneven, "uneven", UNEVENS)
        self._seed_given = seed_given
        self._repeats_count = repeats_count
        drops_uneven = self._uneven == "drop"
        self._advance = Advance(self.num_replicas, self.rank, drops_uneven, repeats_count)
        self._plan = plan
        check_num_batches(plan.num_batches, self.num_replicas, self._uneven)
        _warn_of_wide_rows(plan)
        for name in ("epoch", "slot"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=plan.device.name))
        self.seek(epoch, slot)
        plan.evaluator.prepare_batch()

    @property
    def plan(self) -> EpochPlan:
        """The plan, on the device of the buffers."""
        return self._plan

    @property
    def steps_per_epoch(self) -> int:
        """Number of calls per epoch on this rank; equal on every rank."""
        return self._remaining_steps(0)

    def forward(self) -> CursorBatch:
        """Return this rank's next batch and advance the position."""
        block = self._plan.evaluator.next_batch(self.epoch, self.slot, self._advance)
        if block is not None:
            return CursorBatch(block.indices, block.lengths, block.groups.reshape(1))
        total, drop = self._plan.num_batches, self._uneven == "drop"
        # Few operations: each is a separate kernel unless a compiler fuses them.
        rank_slot = self.slot if self.num_replicas == 1 else self.slot + self.rank
        batch_slot = rank_slot % total if self.num_replicas > 1 and not drop else rank_slot
        block = self._plan.evaluator.batch(self.epoch, batch_slot)
        valid = block.lengths if self._repeats_count else block.lengths * (rank_slot < total)
        next_slot = self.slot + self.num_replicas
        # Under "drop" a step must have a slot for every rank.
        is_epoch_done = next_slot > (total - self.num_replicas if drop else total - 1)
        # Between these two lines, where an interrupt may end the call, the position is in range.
        self.epoch.add_(is_epoch_done)
        self.slot.copy_(next_slot.masked_fill(is_epoch_done, 0))
        return CursorBatch(block.indices, valid, block.groups.reshape(1))

    def seek(self, epoch: int, slot: int = 0) -> None:
        """Set the position in place: a captured CUDA graph continues from there.

        Parameters
        ----------
        epoch, slot : int
            As for the constructor.

        Raises
        ------
        TypeError, ValueError
            If one is not an integer or out of range.
        """
        epoch = check_epoch(epoch)
        slot = check_int(slot, "slot", low=0, high=self._plan.num_batches + 1)
        if self._remaining_steps(slot) == 0:
            epoch, slot = check_epoch(epoch + 1), 0
        self.epoch.fill_(epoch)
        self.slot.fill_(slot)

    def position(self) -> tuple[int, int]:
        """Return (epoch, slot) of the next call as integers; synchronizes the device."""
        return int(self.epoch), int(self.slot)

    def _remaining_steps(self, slot: int) -> int:
        return remaining_steps(slot, self._plan.num_batches, self.num_replicas, self._uneven)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchCursor:
        """Move the plan to the device of the buffers."""
        super()._apply(fn, recurse)
        for name in ("epoch", "slot"):
            # Casting the module to another dtype casts these integers, too.
            setattr(self, name, getattr(self, name).to(torch.int64))
        self._move_plan_to_buffers()
        return self

    def _move_plan_to_buffers(self) -> None:
        self._plan = self._plan.on(Device("torch", str(self.epoch.device)))
        self._plan.evaluator.prepare_batch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the plan's device tables, which pickling leaves out."""
        super().__setstate__(state)
        self._move_plan_to_buffers()

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchCursor:
        """Copy the position; share the plan, which is immutable and may be large."""
        memo[id(self._plan)] = self._plan
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        return copied

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a saved position, from any number of ranks; a rejected one changes nothing."""
        old_position, old_plan = self.position(), self._plan
        num_errors = len(missing_keys), len(error_msgs)
        lists = missing_keys, unexpected_keys, error_msgs
        try:
            for name in ("epoch", "slot"):
                _check_integer_tensor(state_dict.get(prefix + name), name)
            # torch copies the buffers first; set_extra_state and seek check them afterwards.
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
            self._move_plan_to_buffers()
            self.seek(*self.position())
        except (TypeError, ValueError):
            self._plan = old_plan
            self.seek(*old_position)
            raise
        # torch reports missing or misshapen buffers later and has already copied the remaining
        # ones. Undo that, also under strict=False: a partial position is wrong.
        if (len(missing_keys), len(error_msgs)) != num_errors:
            self._plan = old_plan
            self.seek(*old_position)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the seed, and the fingerprint of ids and settings, for checks on loading."""
        return {"seed": self._plan.seed, "fingerprint": self._fingerprint()}

    def _fingerprint(self) -> dict[str, Any]:
        # The step width is constant in compiled code, so a loaded state must have the same.
        return {**fingerprint_of(self._plan), "step_width": self._plan.step_width}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check that a saved position has the same ids and settings, and adopt its seed.

        Raises
        ------
        TypeError
            If ``state`` is not from a cursor.
        ValueError
            If ids or settings differ, or the seed differs from an explicit one.
        """
        if not isinstance(state, Mapping) or not {"seed", "fingerprint"} <= set(state):
            raise TypeError(
                f"state_dict must come from BatchCursor.state_dict(), got {short_repr(state)}"
            )
        check_fingerprint(state["fingerprint"], self._fingerprint())
        self._plan = with_saved_seed(self._plan, state["seed"], self._seed_given)

    def extra_repr(self) -> str:
        """Return the plan and the ranks."""
        ranks = f", rank {self.rank} of {self.num_replicas}" if self.num_replicas > 1 else ""
        return f"{self._plan!r}, device={str(self._plan.device)!r}{ranks}"


def _warn_of_wide_rows(plan: EpochPlan) -> None:
    """Warn if rows, which are as wide as the largest batch, exceed the budget or batch sizes."""
    if plan.batch_size is not None:
        return
    units, width = plan.units, plan.max_batch_size
    groups = np.flatnonzero(plan.tables.batches)
    sizes = units.sizes[groups]
    excess = width / sizes
    if units.costs is not None and units.max_cost is not None:
        excess = width * units.costs[groups] / units.max_cost
    worst = int(np.argmax(excess))
    if excess[worst] <= HARMLESS_EXCESS:
        return
    rule, advice = "the batch size of", f"batch_size={sizes.min()} for all patches"
    if units.costs is not None and units.max_cost is not None:
        fitting = CostBudget(units.max_cost).sizes_for(units.costs[groups[worst : worst + 1]])[0]
        rule = f"what max_cost={units.max_cost:g} allows for"
        advice = f"max_batch_size={fitting} to CostBudget"
    warn(
        f"every row of a cursor has {width} samples, the size of the largest batch: "
        f"{excess[worst]:.3g} times {rule} patch {patch_label(plan, int(groups[worst]))!r}, of "
        f"whose rows at most {sizes[worst]} samples count. For batches of their own sizes, use "
        f"`for batch in sampler.batches()`; for narrower rows, pass {advice}."
    )


def _check_integer_tensor(value: Any, name: str) -> None:
    """Raise TypeError if a saved position is not an integer tensor: torch would truncate it."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
