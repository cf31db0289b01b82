"""The rank of this process, the number of ranks, and a seed that all ranks share."""

from __future__ import annotations

import os
import warnings
from typing import Any

from gpusampler.core import devices
from gpusampler.core.validation import check_int

SEED_KEY = "gpusampler/seed"


def draw_local_seed() -> int:
    """Return 64 random bits of the operating system; no random generator changes its state."""
    return int.from_bytes(os.urandom(8), "little")


def world_and_rank() -> tuple[int, int] | None:
    """Return (number of ranks, this rank) of torch's process group, None if there is none."""
    distributed = devices.loaded_module("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return None


def resolve_ranks(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Return (num_replicas, rank): the arguments, else the process group's, else (1, 0)."""
    group = world_and_rank()
    if (num_replicas is None) != (rank is None) and group is None:
        missing = "rank" if rank is None else "num_replicas"
        raise ValueError(
            "num_replicas and rank must be given together unless torch.distributed is "
            f"initialised, got no {missing}"
        )
    world_size, world_rank = group or (1, 0)
    num_replicas = check_int(
        world_size if num_replicas is None else num_replicas, "num_replicas", low=1, high=1 << 31
    )
    rank = check_int(world_rank if rank is None else rank, "rank", low=0)
    if rank >= num_replicas:
        raise ValueError(f"rank must be in 0 .. num_replicas - 1 = {num_replicas - 1}, got {rank}")
    return num_replicas, rank


def draw_seed(num_replicas: int) -> int:
    """Draw a seed, the same for all ranks; ValueError if several ranks have no process group."""
    world = world_and_rank()
    if world is not None and world[0] > 1:
        return _agree_on_seed()
    # torchrun and the launchers of Lightning and Accelerate set it.
    launcher_size = os.environ.get("WORLD_SIZE", "1")
    if num_replicas > 1 or launcher_size != "1":
        ranks = (
            f"num_replicas={num_replicas}" if num_replicas > 1 else f"WORLD_SIZE={launcher_size}"
        )
        raise ValueError(
            "seed must be given for several ranks unless torch.distributed is initialised, "
            f"got None with {ranks}: pass the same seed on every rank, such as "
            "PatchBatchSampler(..., seed=0)"
        )
    return draw_local_seed()


def _agree_on_seed() -> int:
    """Return the process group's seed; the first rank that calls this function draws the seed.

    The ranks agree through the group's key-value store: a collective would hang if only some ranks
    make a sampler. All samplers of a group share one seed, so ranks may make them in any order.
    """
    distributed: Any = devices.loaded_module("torch.distributed")
    store = distributed.distributed_c10d._get_default_store()
    try:
        return int(store.compare_set(SEED_KEY, "", str(draw_local_seed())))
    except (AttributeError, RuntimeError) as error:
        # An MPI group has no store, and some stores lack compare_set.
        raise ValueError(
            "seed must be given where the process group's store cannot share a drawn seed, "
            f"got None ({error}): pass the same seed on every rank, such as "
            "PatchBatchSampler(..., seed=0)"
        ) from error


class ProcessGroupWarning:
    """Warns if a sampler was created before the process group, so that it is not sharded."""

    def __init__(self, defaulted: bool) -> None:
        self._is_active = defaulted and world_and_rank() is None

    def check(self, stacklevel: int) -> None:
        """Warn once, at the start of a pass, if there is a group of several ranks now."""
        if not self._is_active:
            return
        world = world_and_rank()
        # Accelerate shards a loader that yields the whole epoch on every rank.
        if world is None or world[0] == 1 or devices.loaded_module("accelerate") is not None:
            return
        self._is_active = False
        warnings.warn(
            f"this sampler was created before torch.distributed was initialised, so each of the "
            f"{world[0]} ranks yields the whole epoch: create it after init_process_group (in "
            "Lightning, in train_dataloader), or pass num_replicas and rank",
            stacklevel=stacklevel + 1,
        )


def check_step_width(step_width: int | None, num_replicas: int, *, is_free: bool) -> int:
    """Return the number of slots per step; the plan checks whether its steps allow it."""
    if step_width is None:
        return 1 if is_free else num_replicas
    step_width = check_int(step_width, "step_width", low=1, high=1 << 31)
    if not is_free and step_width % num_replicas:
        raise ValueError(
            f"step_width must be a multiple of num_replicas={num_replicas}, so that all ranks "
            f"start a step together, got {step_width}"
        )
    return step_width
