"""Check that the ranks of torch's default process group make the same batches.

Each rank takes its share of the same epoch, so ranks with different ids, settings or seeds miss
samples, repeat others, or hang in a collective. Ranks compare their samplers through the group's
key-value store. A rank never waits for another one, which may make no sampler at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Set
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from gpusampler.core import devices
from gpusampler.core.log import is_own_frame, logger, warn
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.sampler.distributed import world_and_rank
from gpusampler.sampler.fingerprint import SAMPLES, differences, fingerprint_of

KEY_PREFIX = "gpusampler/ranks"


class GroupReferences:
    """The references of one process group: samplers of the ranks that were first to use them.

    A store may outlive its group: a group that is destroyed and initialised again, and ranks that
    torchrun restarts, can find the keys of an earlier group. So all keys of a group contain a
    nonce. A rank that has already used the store's nonce, in an earlier group, replaces it.
    """

    def __init__(self, store: Any, num_replicas: int, rank: int) -> None:
        prefix = f"{KEY_PREFIX}/{num_replicas}"
        # Unlike `get`, `compare_set` does not wait for a key that is absent.
        last_used = store.compare_set(f"{prefix}/nonce of {rank}", "", "").decode()
        nonce = store.compare_set(f"{prefix}/nonce", last_used, os.urandom(8).hex()).decode()
        store.set(f"{prefix}/nonce of {rank}", nonce)
        self._store = store
        self._prefix = f"{prefix}/{nonce}"
        self.num_used: Counter[str] = Counter()
        """Number of samplers of each line of code that this rank has used."""

    def propose(self, line: str, number: int, sampler: str) -> str:
        """Return the reference of a number; it becomes ``sampler`` if there is none."""
        reference: bytes = self._store.compare_set(self._key(line, number), "", sampler)
        return reference.decode()

    def find(self, line: str, values: Mapping[str, Any]) -> int | None:
        """Return the number of the reference that has these values, None if there is none."""
        number = 1
        while self._store.check([self._key(line, number)]):
            reference = json.loads(self._store.get(self._key(line, number)))
            if not differences(reference["values"], values, ("", "")):
                return number
            number += 1
        return None

    def _key(self, line: str, number: int) -> str:
        return f"{self._prefix}/{line}/{number}"


_lock = threading.Lock()
_references: WeakKeyDictionary[Any, GroupReferences | None] = WeakKeyDictionary()
"""By process group; None if its store cannot be used."""


class RankCheck:
    """Compares a sampler with those of the other ranks once, when its first pass begins.

    Samplers correspond if the same line of code made them and if they are used in the same order.
    Copies of an unchecked sampler are checked, too, but not in another process.
    """

    def __init__(self, num_replicas: int, rank: int) -> None:
        self._num_replicas = num_replicas
        self._rank = rank
        self._line, self._callers = _calling_code()
        self._is_done = False

    def check(self, plan: EpochPlan, uneven: str) -> None:
        """Raise RuntimeError if a rank that came earlier has a different sampler.

        Warns
        -----
        UserWarning
            If the sampler differs only because some ranks make more samplers than others.
        """
        if self._is_done or world_and_rank() != (self._num_replicas, self._rank):
            return
        # A worker of a DataLoader is a copy of a rank.
        if devices.is_in_worker():
            return
        message, is_error = "", False
        with _lock:
            references = None if self._is_done else _join_group(self._num_replicas, self._rank)
            if references is not None:
                try:
                    message, is_error = self._compare(references, _values_of(plan, uneven))
                except RuntimeError as error:
                    _give_up(error)
            # An error is raised again by the next pass.
            self._is_done = not is_error
        if is_error:
            raise RuntimeError(message)
        if message:
            warn(message)

    def _compare(self, references: GroupReferences, values: dict[str, Any]) -> tuple[str, bool]:
        """Return a message, empty if the ranks agree, and whether it is an error."""
        number = references.num_used[self._line] + 1
        own = {"rank": self._rank, "callers": self._callers, "values": values}
        reference = json.loads(references.propose(self._line, number, json.dumps(own)))
        places = f"on rank {reference['rank']}", f"on rank {self._rank}"
        differing = differences(reference["values"], values, places)
        found = number if not differing else references.find(self._line, values)
        if found is not None:
            references.num_used[self._line] = found
            if found == number:
                return "", False
            return (
                f"some ranks use more samplers than others: sampler {number} of rank {self._rank} "
                f"made at {self._line} equals sampler {found} of another rank. The ranks share "
                "each epoch, so one rank alone does not see all samples. Pass num_replicas=1, "
                "rank=0 to a sampler that only one rank uses"
            ), False
        listed = f"at {self._line}, {'; '.join(differing.values())}"
        if reference["callers"] != self._callers:
            # Not an error: the function that made both may have made them for different purposes.
            return (
                f"ranks may disagree: {listed}. The calls that led there differ between the "
                "ranks, so these may be samplers of different purposes; then pass num_replicas=1, "
                f"rank=0 to a sampler that only one rank uses. Otherwise, {_advice(set(differing))}"
            ), False
        return (
            f"ranks disagree: {listed}. The ranks share each epoch, so samples would be missed and "
            f"repeated, or a collective would hang: {_advice(set(differing))}. If the ranks are "
            "meant to differ, pass num_replicas and rank, or check_ranks=False"
        ), True


def _join_group(num_replicas: int, rank: int) -> GroupReferences | None:
    """Return the references of the default group, None if its store cannot be used."""
    distributed: Any = devices.loaded_module("torch.distributed")
    group = distributed.group.WORLD
    if group not in _references:
        store = distributed.distributed_c10d._get_default_store()
        try:
            # An MPI group has no store, and some stores lack compare_set.
            if store is None:
                raise RuntimeError("the group has no store")
            _references[group] = GroupReferences(store, num_replicas, rank)
        except RuntimeError as error:
            _give_up(error)
    return _references[group]


def _give_up(error: RuntimeError) -> None:
    """Check no sampler of the default group from now on: a check must not end a training run."""
    distributed: Any = devices.loaded_module("torch.distributed")
    _references[distributed.group.WORLD] = None
    logger.debug("the ranks' samplers are not compared: %s", error)


def _values_of(plan: EpochPlan, uneven: str) -> dict[str, Any]:
    """Return what must be equal on all ranks, as JSON-safe values by name."""
    values = {**fingerprint_of(plan), "uneven": uneven, "step_width": plan.step_width}
    # Without shuffling, the seed has no effect.
    shuffles = plan.shuffle_within_batches or plan.shuffle_patches
    return {**values, "seed": plan.seed} if shuffles else values


def _advice(differing: Set[str]) -> str:
    """Return what to do so that ranks agree, given the names of the values that differ."""
    advice = []
    if differing & (SAMPLES - {"permutation"}):
        advice.append(
            "give every rank the same ids in the same order (sort lists of files, and check that "
            "no rank lacks files)"
        )
    if "permutation" in differing:
        advice.append("install the same release of gpusampler for every rank")
    if "seed" in differing:
        advice.append("pass the same seed on every rank, or none, and load the same state")
    settings = sorted(differing - SAMPLES - {"seed"})
    if settings:
        advice.append(f"pass the same {', '.join(settings)} on every rank")
    return "; ".join(advice)


def _calling_code() -> tuple[str, str]:
    """Return the line that called the package, and a hash of the lines that led there."""
    frame: FrameType | None = sys._getframe(1)
    lines = []
    while frame is not None:
        if not is_own_frame(frame):
            code = frame.f_code
            lines.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} ({code.co_name})")
        frame = frame.f_back
    return lines[0], hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _disown_group() -> None:
    """In a forked child: renew the lock, and leave the parent's group alone.

    The child's copy of the store shares a connection with the parent.
    """
    global _lock
    _lock = threading.Lock()
    if world_and_rank() is not None:
        distributed: Any = devices.loaded_module("torch.distributed")
        _references[distributed.group.WORLD] = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_group)
