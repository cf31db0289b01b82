"""Detect and reject misuse by Accelerate (double sharding, array batches), without importing it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

ACCELERATE = "accelerate.data_loader"

FORWARDING_MODULES = ("gpusampler.", "torch.utils.data.", "torchdata.", ACCELERATE)
"""Modules whose calls pass from a loader of Accelerate to its sampler."""


def check_sharding(num_replicas: int, output: str) -> None:
    """Raise RuntimeError if a caller is a loader of Accelerate that cannot shard the batches.

    A loader that Accelerate shards over several processes needs ``num_replicas=1`` and, if it
    shards by batches, ``output="list"``. Only the call stack shows which loader asks.
    """
    accelerate = sys.modules.get(ACCELERATE)
    if accelerate is None or (num_replicas == 1 and output == "list"):
        return
    shard_class: Any = getattr(accelerate, "BatchSamplerShard", ())
    dispatcher_class: Any = getattr(accelerate, "DataLoaderDispatcher", ())
    frame: FrameType | None = sys._getframe(1)
    is_direct_call = True
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == ACCELERATE:
            loader = frame.f_locals.get("self")
            # A shard only calls what it shards, possibly through wrappers. A dispatcher also calls
            # the dataset and the collation, which may have samplers of their own.
            if isinstance(loader, shard_class):
                _check_shard(int(loader.num_processes), num_replicas, output)
            elif is_direct_call and isinstance(loader, dispatcher_class):
                _check_shard(int(loader.state.num_processes), num_replicas, "list")
        is_direct_call = is_direct_call and module.startswith(FORWARDING_MODULES)
        frame = frame.f_back


def _check_shard(processes: int, num_replicas: int, output: str) -> None:
    if processes == 1:
        return
    if num_replicas > 1:
        raise RuntimeError(
            f"num_replicas must be 1 in a loader that Accelerate shards over {processes} "
            f"processes, got {num_replicas}: batches would be sharded twice and most of every "
            "epoch lost. Write PatchBatchSampler(..., num_replicas=1, rank=0), or leave the loader "
            "out of accelerator.prepare()"
        )
    if output != "list":
        # Accelerate evaluates `if batch:` at the end of an epoch. An array raises there on some
        # ranks, while the remaining ranks wait for them.
        raise RuntimeError(
            f"output must be 'list' in a loader that Accelerate shards over {processes} processes, "
            f"got {output!r}: Accelerate cannot shard batches that are arrays. Write "
            "output='list', or leave the loader out of accelerator.prepare()"
        )
