"""Which rank this is, of how many, and how all of them come to the same seed."""

from __future__ import annotations

import os
import warnings
from typing import Any

from gpusampler.core import devices
from gpusampler.core.validation import check_int

SEED_KEY = "gpusampler/seed"


def draw_local_seed() -> int:
    """Return 64 bits of the system's randomness: no generator of anyone's is touched."""
    return int.from_bytes(os.urandom(8), "little")


def world_and_rank() -> tuple[int, int] | None:
    """Return (number of ranks, this rank) of torch's process group, None if there is none."""
    distributed = devices.loaded_module("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size(), distributed.get_rank()
    return None


def resolve_ranks(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Return the ranks that were given, else those of the process group, else one.

    Raises
    ------
    TypeError, ValueError
        If one is no integer or out of range, or only one is given and there is no group.
    """
    group = world_and_rank()
    if (num_replicas is None) != (rank is None) and group is None:
        missing = "rank" if rank is None else "num_replicas"
        raise ValueError(
            "num_replicas and rank must be given together where torch.distributed is not "
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
    """Draw a seed, one for all ranks of the world.

    Raises
    ------
    ValueError
        If there are several ranks, and no process group by which they could agree.
    """
    world = world_and_rank()
    if world is not None and world[0] > 1:
        return _agree_on_seed()
    # Set by torchrun, and by the launchers of Lightning and Accelerate.
    launcher_size = os.environ.get("WORLD_SIZE", "1")
    if num_replicas > 1 or launcher_size != "1":
        ranks = (
            f"num_replicas={num_replicas}" if num_replicas > 1 else f"WORLD_SIZE={launcher_size}"
        )
        raise ValueError(
            "seed must be given where there are several ranks and torch.distributed is not "
            f"initialised, got None with {ranks}: every rank needs the same one, such as "
            "PatchBatchSampler(..., seed=0)"
        )
    return draw_local_seed()


def _agree_on_seed() -> int:
    """Return the seed that whichever rank came first has drawn for the process group.

    By the group's key-value store, which every rank may ask whenever it likes: a collective would
    hang where only some of the ranks make a sampler. All samplers of a group share one seed, so
    that it does not matter which of them a rank makes first.
    """
    distributed: Any = devices.loaded_module("torch.distributed")
    store = distributed.distributed_c10d._get_default_store()
    try:
        return int(store.compare_set(SEED_KEY, "", str(draw_local_seed())))
    except (AttributeError, RuntimeError) as error:
        # A group of MPI has no store; others may have one that cannot compare.
        raise ValueError(
            "seed must be given where the process group's store cannot make ranks agree on one, "
            f"got None ({error}): write PatchBatchSampler(..., seed=0)"
        ) from error


class ProcessGroupWarning:
    """Warns of a sampler that was made before the process group, and so knows of no ranks."""

    def __init__(self, defaulted: bool) -> None:
        self._is_active = defaulted and world_and_rank() is None

    def check(self, stacklevel: int) -> None:
        """Warn once, when a pass begins, if there is a group of several ranks by now."""
        if not self._is_active:
            return
        world = world_and_rank()
        # Accelerate shards by itself what every rank hands out whole.
        if world is None or world[0] == 1 or devices.loaded_module("accelerate") is not None:
            return
        self._is_active = False
        warnings.warn(
            f"this sampler was made before torch.distributed was initialised, so each of the "
            f"{world[0]} ranks hands out the whole epoch: make it after init_process_group (in "
            "Lightning, in train_dataloader), or with num_replicas and rank",
            stacklevel=stacklevel + 1,
        )
