"""Load mutated states into samplers, in a process with a memory limit.

python -m support.fuzz_states STATES SEED

A state is refused with a ValueError or TypeError that changes nothing, or the sampler goes on at
the epoch and slot that it names, with the batches that a plan has there. Prints what
`support.fuzz_files` prints.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from gpusampler import CostBudget, PatchBatchSampler, Temperature
from support.fuzz_files import NUMBERS, TEXTS, Tally, limit_memory

IDS = np.arange(300) // 70
SAMPLERS: list[dict[str, Any]] = [
    {},
    {"seed": None},
    {"num_replicas": 3, "rank": 1},
    {"partial": "pad", "interleave": False},
    {"steps": "balanced", "num_replicas": 2, "rank": 0, "step_width": 4},
    {"weights": Temperature(2), "epoch_batches": 40},
    {"batch_size": CostBudget(40, cost={patch: patch + 1 for patch in range(5)})},
    {"source": np.array(["a", "b", "c"])[IDS % 3]},
]
VALUES = [*NUMBERS, *TEXTS, None, True, False, 0.5, 1e300, float("nan"), float("inf"), [], {}, [1],
          {"slot": 3}, (1, 2), b"\0", np.int64(7), np.uint64(2**64 - 1), np.float32(2)]  # fmt: skip


def make(settings: dict[str, Any]) -> PatchBatchSampler:
    return PatchBatchSampler(**{"source": IDS, "batch_size": 8, "seed": 3, **settings})


def some_value(rng: random.Random) -> Any:
    # A copy, which later mutations may change.
    return copy.deepcopy(rng.choice(VALUES))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a state, and each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(items):
        yield value, key
        if isinstance(part, (dict, list)):
            yield from places(part)


def mutate(state: dict[str, Any], others: list[dict[str, Any]], rng: random.Random) -> Any:
    """Change one to three parts of a state."""
    changed: Any = copy.deepcopy(state)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(list(places(changed)) or [(changed, None)])
        kind = rng.randrange(7)
        if key is None or kind == 0:
            return copy.deepcopy(rng.choice([*VALUES, list(state), list(state.items())]))
        if kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, dict):
            container[rng.choice([*TEXTS, 7, None, (1,)])] = some_value(rng)
        elif kind == 3 and isinstance(container[key], int):
            container[key] += rng.choice([-1, 1, 2, 1 << 32])
        elif kind == 4:
            deep: Any = []
            for _ in range(rng.choice([3, 3000])):
                deep = [deep]
            container[key] = deep
            return changed
        elif kind == 5:
            other, name = rng.choice(list(places(rng.choice(others))))
            container[key] = copy.deepcopy(other[name])
        else:
            container[key] = some_value(rng)
    return changed


def snapshot(sampler: PatchBatchSampler) -> tuple[Any, ...]:
    return sampler.seed, sampler.epoch, sampler.state_dict(), repr(sampler)


def check_position(sampler: PatchBatchSampler, state: Any) -> None:
    """Raise AssertionError unless the sampler goes on where a state says."""
    position = sampler.state_dict()
    if (position["epoch"], position["slot"]) != (state["epoch"], state["slot"]):
        raise AssertionError(f"the sampler is at {position}")
    # The plan of the rest of the epoch has the state's step width.
    shard = sampler._tracker.pending_shard()
    plan, epoch = shard.plan, shard.epoch
    slots = range(shard.slot + shard.rank, plan.num_batches, shard.num_replicas)
    for slot, indices in zip(slots, islice(sampler, 2), strict=False):
        size = int(plan.evaluate(epoch, [slot]).lengths[0])
        if list(indices)[:size] != plan.evaluate(epoch, [slot]).indices[0, :size].tolist():
            raise AssertionError(f"slot {slot} of epoch {epoch} has other samples")


def main(count: int, seed: int) -> None:
    rng = random.Random(seed)
    warnings.simplefilter("error")
    tally = Tally()
    samplers = [make(settings) for settings in SAMPLERS]
    states = []
    for sampler in samplers:
        sampler.set_epoch(2)
        next(iter(sampler))
        states.append(json.loads(json.dumps(sampler.state_dict())))
    limit_memory()
    for number in range(count):
        if number % 100 == 0:
            print(number, file=sys.stderr, flush=True)
        which = rng.randrange(len(samplers))
        sampler = samplers[which]
        mutated = mutate(states[which], states, rng)
        before = snapshot(sampler)
        with tally.file(number, ("state", "checkpoint", "Saved", "saved")):
            try:
                sampler.load_state_dict(mutated)
            except (TypeError, ValueError):
                if snapshot(sampler) != before:
                    raise AssertionError("a refused state changed the sampler") from None
                raise
            check_position(sampler, mutated)
        if snapshot(sampler) != before:
            samplers[which] = make(SAMPLERS[which])
            samplers[which].load_state_dict(states[which])
    print(tally.report())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
