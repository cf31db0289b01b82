"""Where a run stands: the next epoch, a rank's share of it, and the state that is saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpusampler.core.arrays import Int64
from gpusampler.core.log import warn
from gpusampler.core.memory import GrowthWatch
from gpusampler.core.text import shown
from gpusampler.core.tracing import Recorder
from gpusampler.core.validation import checked_int, checked_seed
from gpusampler.permutation.reference import VERSION
from gpusampler.plan.epoch_plan import EPOCHS, EpochPlan
from gpusampler.sampler.distributed import ProcessGroupWarning

STATE_VERSION = 1
STATE_KEYS = frozenset({"version", "epoch", "slot", "seed", "step_width", "fingerprint"})


def steps_from(slot: int, num_batches: int, num_replicas: int, uneven: str) -> int:
    """Return how many batches a rank has from a global slot on; equal on all ranks."""
    left = max(num_batches - slot, 0)
    return -(-left // num_replicas) if uneven == "pad" else left // num_replicas


def check_ranks(num_batches: int, num_replicas: int, uneven: str) -> None:
    """Raise ValueError if an epoch has no batch for every rank."""
    if steps_from(0, num_batches, num_replicas, uneven) == 0:
        raise ValueError(
            "num_replicas must be at most the number of batches under uneven='drop', got "
            f"{num_replicas} for {num_batches} batches"
        )


def with_saved_seed(plan: EpochPlan, seed: Any, seed_given: bool) -> EpochPlan:
    """Return a plan under a saved seed; raise ValueError if another was given explicitly."""
    seed = checked_seed(seed, "state_dict seed")
    if seed == plan.seed:
        return plan
    if seed_given:
        raise ValueError(
            f"state_dict must be of seed {plan.seed}, which was given here, got seed {seed}"
        )
    return plan.with_seed(seed)


def with_saved_width(plan: EpochPlan, step_width: Any) -> EpochPlan:
    """Return a plan in steps of a saved width, in which the epoch that was saved goes on."""
    width = checked_int(step_width, "state_dict step_width", least=1, below=1 << 31)
    if plan.steps == "free" and width != 1:
        raise ValueError(f"state_dict step_width must be 1 under steps='free', got {width}")
    return plan.with_step_width(width)


class Place(NamedTuple):
    """Where a pass begins: a plan's epoch, and a global slot in it."""

    plan: EpochPlan
    epoch: int
    slot: int


class RankShard(NamedTuple):
    """A rank's part of a plan's epoch, from a global slot on.

    ``repeats_count``: whether batches that come again, so that all ranks have equally many, count.
    ``recorder``: told what the batches take.
    """

    plan: EpochPlan
    epoch: int
    slot: int
    steps: int
    num_replicas: int
    rank: int
    repeats_count: bool
    recorder: Recorder

    def slots(self, start: int, stop: int) -> Int64:
        """Return the global slots of some steps; those beyond the epoch's last come again."""
        step = np.arange(start, stop, dtype=np.int64)
        return self.slot + step * self.num_replicas + self.rank

    def slot_after(self, steps: int) -> int:
        """Return the global slot after some steps; the number of slots once it is done."""
        total = self.plan.num_batches
        return total if steps >= self.steps else min(self.slot + steps * self.num_replicas, total)


class Pass(Protocol):
    """A pass over an epoch that has begun: an iterator, seen from here."""

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the state after ``step`` batches of the pass, or those drawn."""


class EpochTracker:
    """Epochs, ranks and state of a sampler.

    The next pass binds a place. Its slot is 0 unless a state was loaded; the loaded place is
    remembered until a pass binds it, so that `set_epoch` can tell its epoch from another. It has a
    plan of its own: an epoch that was begun in steps of some width goes on in them to its end.

    Parameters
    ----------
    plan : EpochPlan
        Replaced when a state with another (drawn) seed is loaded.
    num_replicas, rank : int
    uneven : {"pad", "drop"}
    seed_given : bool
        Whether the seed was explicit, so that a state of another is refused.
    late_group : ProcessGroupWarning, optional
        Asked when a pass begins.
    repeats_count : bool
        As in `RankShard`.
    recorder : Recorder, optional
        As in `RankShard`; default: a new one.
    """

    def __init__(
        self,
        plan: EpochPlan,
        num_replicas: int,
        rank: int,
        uneven: str,
        seed_given: bool,
        late_group: ProcessGroupWarning | None = None,
        repeats_count: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        self.plan = plan
        self.num_replicas = num_replicas
        self.rank = rank
        self.uneven = uneven
        self.seed_given = seed_given
        self.repeats_count = repeats_count
        self.recorder = Recorder() if recorder is None else recorder
        self._late_group = late_group
        self._growth = GrowthWatch()
        self._place = Place(plan, 0, 0)
        self._loaded: Place | None = None
        self._begun: Pass | None = None
        self._passes = 0
        self._epoch_chosen = False
        self._warned = False
        # Taken now, not at the first state_dict: it may need a pass over all samples.
        self._fingerprint = fingerprint_of(plan)

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return self._place.epoch

    @property
    def steps_per_epoch(self) -> int:
        """Batches of a full epoch on this rank; equal on all ranks."""
        return self.share_of(0).steps

    def share_of(self, epoch: int) -> RankShard:
        """Return this rank's share of a whole epoch."""
        return self._share(Place(self.plan, epoch, 0))

    def pending(self) -> RankShard:
        """Return the share that the next pass will bind."""
        return self._share(self._place)

    def _share(self, place: Place) -> RankShard:
        steps = steps_from(place.slot, place.plan.num_batches, self.num_replicas, self.uneven)
        return RankShard(
            *place, steps, self.num_replicas, self.rank, self.repeats_count, self.recorder
        )

    def bind(self, begun: Pass) -> RankShard:
        """Give the next epoch, from the pending slot on, to a pass that begins."""
        if self._late_group is not None:
            self._late_group.check(stacklevel=4)
        self._growth.look()
        shuffled = self.plan.shuffle_within_batches or self.plan.shuffle_patches
        unset = self._passes > 0 and not self._epoch_chosen
        if self.num_replicas > 1 and shuffled and unset and not self._warned:
            self._warned = True
            warnings.warn(
                f"a second pass on {self.num_replicas} ranks without set_epoch: call "
                "sampler.set_epoch(epoch) before each pass, or a rank that has drawn one batch "
                "more often runs an epoch ahead of the others",
                stacklevel=4,
            )
        return self._bound(begun, self.pending())

    def bind_state(self, begun: Pass, state: Mapping[str, Any]) -> RankShard:
        """Give the epoch and the position of a state to a pass that goes on there."""
        share = self._bound(begun, self._share(self._checked(state)))
        # A finished epoch is no pass; the one after it needs no more choosing than after a load.
        self._epoch_chosen = share.steps == 0
        return share

    def _bound(self, begun: Pass, share: RankShard) -> RankShard:
        self._place = Place(self.plan, share.epoch + 1, 0)
        self._loaded, self._begun = None, begun
        self._passes += 1
        self._epoch_chosen = False
        return share

    def set_epoch(self, epoch: int, stacklevel: int) -> None:
        """Choose the epoch of the next pass."""
        epoch = checked_int(epoch, "epoch", least=0, below=EPOCHS)
        self._epoch_chosen, self._begun = True, None
        loaded = self._loaded
        if loaded is not None and loaded.epoch == epoch:
            self._place = loaded
            return
        if loaded is not None and loaded.slot and self._share(loaded).steps:
            warnings.warn(
                f"set_epoch({epoch}) drops the loaded position: epoch {loaded.epoch}, "
                f"slot {loaded.slot}",
                stacklevel=stacklevel + 1,
            )
        self._loaded = None
        self._place = Place(self.plan, epoch, 0)

    def skip(self) -> None:
        """Leave the next epoch out."""
        self._loaded = self._begun = None
        self._place = Place(self.plan, self.epoch + 1, 0)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return where the pass that began last is, or what the next one will bind."""
        if self._begun is not None:
            return self._begun.state_dict(step)
        return self.pending_state(step)

    def pending_state(self, step: int | None = None) -> dict[str, Any]:
        """Return the state of the next pass, after ``step`` of its batches."""
        if step is None and self._loaded is not None:
            return self.state_after(self._share(self._loaded), 0)
        return self.state_after(self.pending(), 0 if step is None else step)

    def state_after(self, share: RankShard, steps: int) -> dict[str, Any]:
        """Return the state after some steps of a share: a fresh dictionary of plain values."""
        steps = checked_int(steps, "step", least=0)
        if steps > share.steps:
            raise ValueError(
                f"step must be <= {share.steps}, the batches of this pass, got {steps}"
            )
        # No step of a share is a share that has not begun, even if there are none to do.
        slot = share.slot_after(steps) if steps else share.slot
        return {
            "version": STATE_VERSION,
            "epoch": share.epoch,
            "slot": slot if share.steps else share.plan.num_batches,
            "seed": share.plan.seed,
            "step_width": share.plan.step_width,
            "fingerprint": dict(self._fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on from a state; a finished one leads to the next epoch."""
        place = self._checked(state)
        self._begun = None
        self._loaded = place
        finished = self._share(place).steps == 0
        self._place = Place(self.plan, place.epoch + 1, 0) if finished else place
        self._epoch_chosen = True

    def _checked(self, state: Mapping[str, Any]) -> Place:
        """Return the place of a state that fits, and take over its seed."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
        missing = sorted(STATE_KEYS - set(state))
        if missing:
            raise TypeError(f"state_dict must come from state_dict(): it lacks {missing}")
        version = checked_int(state["version"], "state_dict version", least=1)
        if version != STATE_VERSION:
            raise ValueError(
                f"state_dict must have format version {STATE_VERSION}, got {shown(version)}"
            )
        check_fingerprint(state["fingerprint"], self._fingerprint)
        plan = with_saved_seed(self.plan, state["seed"], self.seed_given)
        begun = with_saved_width(plan, state["step_width"])
        epoch = checked_int(state["epoch"], "state_dict epoch", least=0, below=EPOCHS)
        slot = checked_int(state["slot"], "state_dict slot", least=0, below=begun.num_batches + 1)
        self.plan = plan
        place = Place(begun, epoch, slot)
        self._warn_of_mixed_steps(place)
        return place

    def _warn_of_mixed_steps(self, place: Place) -> None:
        """Warn if the ranks cut across the steps of one patch that an epoch was begun in."""
        plan, ranks = place.plan, self.num_replicas
        if plan.steps != "same_patch" or not self._share(place).steps:
            return
        if plan.step_width % ranks or place.slot % ranks:
            warn(
                f"epoch {place.epoch} was begun in steps of {plan.step_width} batches of one "
                f"patch, which {ranks} ranks cut across from slot {place.slot} on: what they work "
                "on at one time may be of two patches until that epoch is over"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Travel without the pass that has begun: a copy begins at the next epoch."""
        return {**self.__dict__, "_begun": None}


def fingerprint_of(plan: EpochPlan) -> dict[str, Any]:
    """Return what decides a plan's batches besides the seed, one JSON-safe value a name."""
    return {
        "ids": plan.groups.fingerprint,
        "num_samples": plan.groups.num_samples,
        "num_patches": plan.groups.num_patches,
        "permutation": VERSION,
        **plan.settings,
    }


def check_fingerprint(theirs: Any, ours: Mapping[str, Any]) -> None:
    """Raise, naming what differs, if a saved fingerprint is of other ids or settings."""
    if not isinstance(theirs, Mapping):
        raise TypeError(f"state_dict fingerprint must be a mapping, got {type(theirs).__name__}")

    def said(by: Mapping[str, Any], name: str) -> str:
        return shown(by[name]) if name in by else "absent"

    def differs(name: str) -> bool:
        if name not in theirs or name not in ours:
            return True
        # By type as well: 1 is neither True nor 1.0, and what has another type is not compared.
        return type(theirs[name]) is not type(ours[name]) or bool(theirs[name] != ours[name])

    differing = [
        f"{name} is {said(theirs, name)} there and {said(ours, name)} here"
        for name in {**ours, **theirs}
        if differs(name)
    ]
    if differing:
        raise ValueError(
            f"state_dict must be of the same ids and settings, but {'; '.join(differing)}"
        )
