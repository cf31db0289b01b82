"""BatchCursor: a plan's batches one after the other inside a compiled loop or a CUDA graph.

Imports torch, so it is imported by `PatchBatchSampler.cursor` only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpusampler.batching.steps import UNEVENS
from gpusampler.core.devices import Device
from gpusampler.core.validation import check_choice, check_int
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.sampler.state import (
    check_epoch,
    check_fingerprint,
    check_num_batches,
    fingerprint_of,
    remaining_steps,
    with_saved_seed,
)


class CursorBatch(NamedTuple):
    """One batch of a `BatchCursor`, all of it on the device.

    Attributes
    ----------
    indices : int64 tensor, shape (B,)
        Samples; those beyond ``valid`` repeat samples of the same patch.
    valid : int64 tensor, 0-d
        How many of them count; 0 where repeats do not and this batch is one.
    group : int64 tensor, shape (1,)
        The batch's patch, as a place among the sorted patch ids. ``geometries[group]`` is its
        geometry, shape (1, ...), in a graph as well; a 0-d index would be read on the host.
    """

    indices: Tensor
    valid: Tensor
    group: Tensor


class BatchCursor(torch.nn.Module):
    """Hands out a batch a call, without the host: its place is a tensor that is counted up.

    `forward` reads nothing back, has one shape for ever and changes its buffers in place, so it
    may stand in a function that is compiled with fullgraph=True, once for a whole run, or in a CUDA
    graph, each replay of which is the next batch. At the end of an epoch it runs on into the next.

    Parameters
    ----------
    plan : EpochPlan
        On a torch device. With ``interleave=False`` every call works out the order of all patches
        anew, which costs as much as a batch of as many samples as there are patches.
    epoch, slot : int
        Where to begin: an epoch, and a global slot in it, 0 .. M (M is the end of the epoch).
    num_replicas, rank : int
        Ranks that share an epoch, and which one this is; a step takes ``num_replicas`` slots.
    uneven : {"pad", "drop"}
        When slots are left that are fewer than ``num_replicas``: the epoch's first come again, or
        they are left out.
    seed_given : bool
        Whether a saved state of another seed is refused, rather than taken over.
    repeats_count : bool
        Whether batches that come again under "pad" count (in ``valid``).

    Attributes
    ----------
    epoch, slot : int64 tensors, 0-d
        Buffers, saved by ``state_dict``: where the next call begins.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or no step is left.

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
        if plan.device.library != "torch":
            raise ValueError(
                f"plan must be on a torch device, got {str(plan.device)!r}; plan.on('cpu') is the "
                "same plan there"
            )
        self.num_replicas = check_int(num_replicas, "num_replicas", low=1, high=1 << 31)
        self.rank = check_int(rank, "rank", low=0, high=self.num_replicas)
        self._uneven = check_choice(uneven, "uneven", UNEVENS)
        self._seed_given = seed_given
        self._repeats_count = repeats_count
        self._plan = plan
        check_num_batches(plan.num_batches, self.num_replicas, self._uneven)
        for name in ("epoch", "slot"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=plan.device.name))
        self.seek(epoch, slot)
        plan.prepare_batch()

    @property
    def plan(self) -> EpochPlan:
        """The plan, on the device of the buffers."""
        return self._plan

    @property
    def steps_per_epoch(self) -> int:
        """Calls that make up an epoch on this rank; equal on every rank."""
        return self._remaining_steps(0)

    def forward(self) -> CursorBatch:
        """Return this rank's next batch, and go on."""
        total, drop = self._plan.num_batches, self._uneven == "drop"
        # Few operations: each is a kernel of its own where nothing fuses them.
        rank_slot = self.slot if self.num_replicas == 1 else self.slot + self.rank
        batch_slot = rank_slot % total if self.num_replicas > 1 and not drop else rank_slot
        block = self._plan.batch_of_tensors(self.epoch, batch_slot)
        valid = block.lengths if self._repeats_count else block.lengths * (rank_slot < total)
        self.slot.add_(self.num_replicas)
        # Under "drop" a step must have a slot for every rank.
        is_epoch_done = self.slot > (total - self.num_replicas if drop else total - 1)
        self.epoch.add_(is_epoch_done)
        self.slot.masked_fill_(is_epoch_done, 0)
        return CursorBatch(block.indices, valid, block.groups.reshape(1))

    def seek(self, epoch: int, slot: int = 0) -> None:
        """Go to a place, in place: a graph that was captured goes on from there.

        Parameters
        ----------
        epoch, slot : int
            As for the constructor.

        Raises
        ------
        TypeError, ValueError
            If one is no integer or out of range.
        """
        epoch = check_epoch(epoch)
        slot = check_int(slot, "slot", low=0, high=self._plan.num_batches + 1)
        if self._remaining_steps(slot) == 0:
            epoch, slot = check_epoch(epoch + 1), 0
        self.epoch.fill_(epoch)
        self.slot.fill_(slot)

    def position(self) -> tuple[int, int]:
        """Return (epoch, slot) of the next call as integers; waits for the device."""
        return int(self.epoch), int(self.slot)

    def _remaining_steps(self, slot: int) -> int:
        return remaining_steps(slot, self._plan.num_batches, self.num_replicas, self._uneven)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BatchCursor:
        """Move with the module: the plan is evaluated where the buffers are."""
        super()._apply(fn, recurse)
        for name in ("epoch", "slot"):
            # A module that is cast to another type casts its integers, too.
            setattr(self, name, getattr(self, name).to(torch.int64))
        self._move_plan_to_buffers()
        return self

    def _move_plan_to_buffers(self) -> None:
        self._plan = self._plan.on(Device("torch", str(self.epoch.device)))
        self._plan.prepare_batch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive ready to be compiled: a plan travels without what it has on its device."""
        super().__setstate__(state)
        self._move_plan_to_buffers()

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchCursor:
        """Copy the place; the plan, which never changes and may be large, is shared."""
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
        """Take over a saved place, of any number of ranks; one that is refused changes nothing."""
        old_position, old_plan = self.position(), self._plan
        num_errors = len(missing_keys), len(error_msgs)
        lists = missing_keys, unexpected_keys, error_msgs
        try:
            for name in ("epoch", "slot"):
                _check_integer_tensor(state_dict.get(prefix + name), name)
            # Copies what is in the state as it stands, and has it checked only then.
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
            self._move_plan_to_buffers()
            self.seek(*self.position())
        except (TypeError, ValueError):
            self._plan = old_plan
            self.seek(*old_position)
            raise
        # What is missing or misshapen torch tells of later, when the rest has been copied: half a
        # place, or one that cannot be checked, is none, also where strict=False lets it be.
        if (len(missing_keys), len(error_msgs)) != num_errors:
            self._plan = old_plan
            self.seek(*old_position)

    def get_extra_state(self) -> dict[str, Any]:
        """Return what a saved place must fit: the seed, ids and settings."""
        return {"seed": self._plan.seed, "fingerprint": self._fingerprint()}

    def _fingerprint(self) -> dict[str, Any]:
        # A cursor runs on in steps of one width: what is compiled knows no other.
        return {**fingerprint_of(self._plan), "step_width": self._plan.step_width}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check that a saved place is of the same ids and settings, and take over its seed.

        Raises
        ------
        TypeError
            If it is no saved place of a cursor.
        ValueError
            If it does not fit, or the seed was given and is another.
        """
        if not isinstance(state, Mapping) or not {"seed", "fingerprint"} <= set(state):
            raise TypeError(f"state_dict must come from a BatchCursor, got extra state {state!r}")
        check_fingerprint(state["fingerprint"], self._fingerprint())
        self._plan = with_saved_seed(self._plan, state["seed"], self._seed_given)

    def extra_repr(self) -> str:
        """Return the plan and the ranks."""
        ranks = f", rank {self.rank} of {self.num_replicas}" if self.num_replicas > 1 else ""
        return f"{self._plan!r}, device={str(self._plan.device)!r}{ranks}"


def _check_integer_tensor(value: Any, name: str) -> None:
    """Raise TypeError if a saved place is a tensor of no integers: torch would cut them off."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must be an integer tensor, got {value.dtype}")
