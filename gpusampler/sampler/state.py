"""The epoch tracker and the saved state."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from gpusampler.core.log import warn
from gpusampler.core.memory import GrowthWatch
from gpusampler.core.text import short_repr
from gpusampler.core.tracing import Recorder
from gpusampler.core.validation import check_int, check_seed
from gpusampler.plan.epoch_plan import EPOCH_LIMIT, EpochPlan
from gpusampler.sampler.distributed import ProcessGroupWarning
from gpusampler.sampler.fingerprint import SAMPLES, check_fingerprint, fingerprint_of
from gpusampler.sampler.passes import EpochPass, RankShard, pass_to_save
from gpusampler.sampler.rank_check import RankCheck

STATE_VERSION = 1
STATE_KEYS = frozenset({"version", "epoch", "slot", "seed", "step_width", "fingerprint"})
BIND_LOCK = threading.Lock()
"""Held while a pass takes the next epoch, so that threads do not take the same one.

It is not a member of `EpochTracker`, because a lock cannot be pickled.
"""


def remaining_steps(slot: int, num_batches: int, num_replicas: int, uneven: str) -> int:
    """Return the number of batches of a rank from a global slot on; equal on all ranks."""
    num_slots = max(num_batches - slot, 0)
    return -(-num_slots // num_replicas) if uneven == "pad" else num_slots // num_replicas


def check_epoch(epoch: Any, name: str = "epoch") -> int:
    """Return an epoch; raise unless it is an integer in 0 .. 2**63 - 1."""
    return check_int(epoch, name, low=0, high=EPOCH_LIMIT)


def check_num_batches(num_batches: int, num_replicas: int, uneven: str) -> None:
    """Raise ValueError if an epoch has no batch for every rank."""
    if remaining_steps(0, num_batches, num_replicas, uneven) == 0:
        raise ValueError(
            "num_replicas must be at most the number of batches under uneven='drop', got "
            f"{num_replicas} for {num_batches} batches: use fewer ranks or uneven='pad'"
        )


def with_saved_seed(plan: EpochPlan, seed: Any, seed_given: bool) -> EpochPlan:
    """Return a plan with a saved seed; raise ValueError if an explicit seed differs."""
    seed = check_seed(seed, "state_dict seed")
    if seed == plan.seed:
        return plan
    if seed_given:
        raise ValueError(
            f"Saved state uses seed {seed}, this sampler seed {plan.seed}. Pass seed={seed}, or "
            "omit seed."
        )
    return plan.with_seed(seed)


def with_saved_step_width(plan: EpochPlan, step_width: Any) -> EpochPlan:
    """Return a plan with the saved step width, in which the saved epoch resumes."""
    width = check_int(step_width, "state_dict step_width", low=1, high=1 << 31)
    if plan.steps == "free" and width != 1 and not plan.costliest_first:
        raise ValueError(
            f"state_dict step_width must be 1 under steps='free', got {width}: load the unchanged "
            "result of state_dict()"
        )
    return plan.with_step_width(width)


class EpochPosition(NamedTuple):
    """Start of a pass: a plan, an epoch, and a global slot in it."""

    plan: EpochPlan
    epoch: int
    slot: int


class EpochTracker:
    """Epochs, ranks and state of a sampler.

    The tracker keeps the position (epoch and slot) of the next pass, which binds this position when
    its first batch is drawn. The slot is 0 unless a state was loaded. A loaded position is kept
    until a pass binds it, so that `set_epoch` can compare its argument with the loaded epoch. Every
    position has its own plan, because an epoch resumes with the step width that it began with.
    Loading a state replaces ``plan`` if the seeds differ. If ``seed_given``, the seed is explicit,
    and a state with a different seed is rejected.
    """

    def __init__(
        self,
        plan: EpochPlan,
        num_replicas: int,
        rank: int,
        uneven: str,
        seed_given: bool,
        group_warning: ProcessGroupWarning | None = None,
        repeats_count: bool = True,
        recorder: Recorder | None = None,
        rank_check: RankCheck | None = None,
    ) -> None:
        self.plan = plan
        self.num_replicas = num_replicas
        self.rank = rank
        self.uneven = uneven
        self.seed_given = seed_given
        self.repeats_count = repeats_count
        self.recorder = Recorder() if recorder is None else recorder
        self._group_warning = group_warning
        self._rank_check = rank_check
        self._growth = GrowthWatch()
        self._next_position = EpochPosition(plan, 0, 0)
        self._loaded_position: EpochPosition | None = None
        # Passes since the position was last set: the latest, and others with iterators.
        self._passes: list[EpochPass] = []
        self._num_passes = 0
        self._is_epoch_chosen = False
        self._has_warned = False
        # Computed now, not in the first state_dict: it may need a pass over all samples.
        self._fingerprint = fingerprint_of(plan)

    @property
    def epoch(self) -> int:
        """The epoch of the next pass."""
        return self._next_position.epoch

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of a full epoch on this rank; equal on all ranks."""
        return self.shard_of(0).steps

    def shard_of(self, epoch: int) -> RankShard:
        """Return this rank's shard of a whole epoch."""
        return self._shard_from(EpochPosition(self.plan, epoch, 0))

    def pending_shard(self) -> RankShard:
        """Return the shard that the next pass will bind."""
        return self._shard_from(self._next_position)

    def _shard_from(self, position: EpochPosition) -> RankShard:
        steps = remaining_steps(
            position.slot, position.plan.num_batches, self.num_replicas, self.uneven
        )
        return RankShard(
            *position, steps, self.num_replicas, self.rank, self.repeats_count, self.recorder
        )

    def check_ranks(self) -> None:
        """Raise RuntimeError if another rank makes different batches; call as a pass begins."""
        if self._rank_check is not None:
            self._rank_check.check(self.plan, self.uneven)

    def bind(self, iterator: Any) -> EpochPass:
        """Begin a pass of an iterator over the next epoch, from the pending slot on."""
        if self._group_warning is not None:
            self._group_warning.check(stacklevel=4)
        self._growth.check()
        shuffled = self.plan.shuffle_within_batches or self.plan.shuffle_patches
        is_epoch_unset = self._num_passes > 0 and not self._is_epoch_chosen
        if self.num_replicas > 1 and shuffled and is_epoch_unset and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a second pass on {self.num_replicas} ranks without set_epoch: call "
                "sampler.set_epoch(epoch) before each pass. Otherwise a rank that has started one "
                "more pass than the other ranks is an epoch ahead of them",
                stacklevel=4,
            )
        with BIND_LOCK:
            return self._start_pass(iterator, self.pending_shard())

    def bind_state(self, iterator: Any, state: Mapping[str, Any]) -> EpochPass:
        """Begin a pass of an iterator at the epoch and slot of a state."""
        resumed = self._start_pass(iterator, self._shard_from(self._parse_state(state)))
        # A finished epoch is not a pass, so the next epoch needs no set_epoch.
        self._is_epoch_chosen = resumed.shard.steps == 0
        return resumed

    def _start_pass(self, iterator: Any, shard: RankShard) -> EpochPass:
        check_epoch(shard.epoch)
        new = EpochPass(shard, iterator)
        others = [old for old in self._passes if old.iterator not in (None, iterator)]
        for old in others:
            old.note_next()
        following = EpochPosition(self.plan, shard.epoch + 1, 0)
        # No call from here on, so that Ctrl-C is noticed before or after all of it.
        self._num_passes += 1
        self._is_epoch_chosen = False
        self._loaded_position = None
        self._passes = [*others, new]
        self._next_position = following
        return new

    def pass_of(self, iterator: Any) -> EpochPass | None:
        """Return the pass of an iterator; None if it has begun none since the position was set."""
        return next((each for each in self._passes if each.iterator is iterator), None)

    def set_epoch(self, epoch: int, stacklevel: int) -> None:
        """Choose the epoch of the next pass."""
        epoch = check_epoch(epoch)
        self._is_epoch_chosen, self._passes = True, []
        loaded = self._loaded_position
        if loaded is not None and loaded.epoch == epoch:
            self._next_position = loaded
            return
        if loaded is not None and loaded.slot and self._shard_from(loaded).steps:
            warnings.warn(
                f"set_epoch({epoch}) drops the loaded position: epoch {loaded.epoch}, "
                f"slot {loaded.slot}; to resume there, call set_epoch({loaded.epoch}) instead",
                stacklevel=stacklevel + 1,
            )
        self._loaded_position = None
        self._next_position = EpochPosition(self.plan, epoch, 0)

    def skip_epoch(self) -> None:
        """Skip the next epoch."""
        self._loaded_position, self._passes = None, []
        self._next_position = EpochPosition(self.plan, self.epoch + 1, 0)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the state of the pass that is running, else of the latest, else of the next."""
        if not self._passes:
            return self.pending_state(step)
        return self.state_of(pass_to_save(self._passes, step), step)

    def state_of(self, epoch_pass: EpochPass, step: int | None) -> dict[str, Any]:
        """Return the state of a pass after ``step`` batches; default: after those drawn."""
        drawn = epoch_pass.num_drawn
        step = drawn if step is None else check_int(step, "step", low=0)
        if step > drawn:
            slot = epoch_pass.shard.slot
            raise ValueError(
                f"step must be <= {drawn}, the number of batches drawn in this pass over epoch "
                f"{epoch_pass.shard.epoch}, got {step}"
                + f". The pass resumed at slot {slot}: count its own batches, from 0"
                * (slot > 0)
            )
        return self.state_after(epoch_pass.shard, step)

    def pending_state(self, step: int | None = None) -> dict[str, Any]:
        """Return the state of the next pass, after ``step`` of its batches."""
        if step is None and self._loaded_position is not None:
            return self.state_after(self._shard_from(self._loaded_position), 0)
        return self.state_after(self.pending_shard(), 0 if step is None else step)

    def state_after(self, shard: RankShard, steps: int) -> dict[str, Any]:
        """Return the state after some steps of a shard: a new dictionary of plain values."""
        steps = check_int(steps, "step", low=0)
        if steps > shard.steps:
            raise ValueError(
                f"step must be <= {shard.steps}, the number of this rank's batches in this pass, "
                f"got {steps}"
            )
        # With zero steps done, the state is the shard's start, even if the shard is empty.
        slot = shard.slot_after(steps) if steps else shard.slot
        return {
            "version": STATE_VERSION,
            "epoch": shard.epoch,
            "slot": slot if shard.steps else shard.plan.num_batches,
            "seed": shard.plan.seed,
            "step_width": shard.plan.step_width,
            "fingerprint": dict(self._fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state in the next pass; a finished epoch leads to the next epoch."""
        position = self._parse_state(state)
        self._passes = []
        self._loaded_position = position
        is_finished = self._shard_from(position).steps == 0
        self._next_position = (
            EpochPosition(self.plan, position.epoch + 1, 0) if is_finished else position
        )
        self._is_epoch_chosen = True

    def _parse_state(self, state: Mapping[str, Any]) -> EpochPosition:
        """Check a state, adopt its seed and return its position."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
        missing = sorted(STATE_KEYS - set(state))
        if missing:
            raise TypeError(f"state_dict must come from state_dict(): it lacks {missing}")
        version = check_int(state["version"], "state_dict version", low=1)
        if version != STATE_VERSION:
            raise ValueError(
                f"state_dict must have format version {STATE_VERSION}, got {short_repr(version)}: "
                "load the state with the gpusampler release that saved it"
            )
        check_fingerprint(
            state["fingerprint"],
            self._fingerprint,
            lambda differing: self._skip_advice(state, differing),
        )
        plan = with_saved_seed(self.plan, state["seed"], self.seed_given)
        saved_plan = with_saved_step_width(plan, state["step_width"])
        epoch = check_epoch(state["epoch"], "state_dict epoch")
        slot = check_int(state["slot"], "state_dict slot", low=0, high=saved_plan.num_batches + 1)
        position = EpochPosition(saved_plan, epoch, slot)
        self._warn_of_mixed_steps(position)
        # Last: a warning that is an error changes nothing.
        self.plan = plan
        return position

    def _skip_advice(self, state: Mapping[str, Any], differing: Set[str]) -> str:
        """Return how to go on with this sampler's settings after the epoch of a state."""
        epoch, slot, seed = (state[name] for name in ("epoch", "slot", "seed"))
        if differing & SAMPLES or not all(type(number) is int for number in (epoch, slot, seed)):
            return ""
        pass_seed = f"pass seed={short_repr(seed)} and " * (seed != self.plan.seed)
        advice = f" To go on with this sampler's batches instead, {pass_seed}call set_epoch("
        if slot == 0:
            return f"{advice}{short_repr(epoch)})."
        return (
            f"{advice}{short_repr(epoch + 1)}): the batches of epoch {short_repr(epoch)} from slot "
            f"{short_repr(slot)} on are skipped."
        )

    def _warn_of_mixed_steps(self, position: EpochPosition) -> None:
        """Warn if ranks may process different patches in a step for the rest of the saved epoch."""
        plan, ranks = position.plan, self.num_replicas
        if plan.steps != "same_patch" or not self._shard_from(position).steps:
            return
        if plan.step_width % ranks or position.slot % ranks:
            warn(
                f"Until epoch {position.epoch} ends, {ranks} ranks may process different patches "
                f"in one step, because the epoch began with step_width={plan.step_width}. To avoid "
                "this, resume on the same number of ranks as before."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the passes: a copy begins at the next epoch."""
        return {**self.__dict__, "_passes": []}


class EpochSetter:
    """Forwards ``set_epoch`` to a sampler, for frameworks that call it on ``.sampler``."""

    def __init__(self, tracker: EpochTracker) -> None:
        self._tracker = tracker

    def set_epoch(self, epoch: int) -> None:
        """Call `PatchBatchSampler.set_epoch`."""
        self._tracker.set_epoch(epoch, stacklevel=2)
