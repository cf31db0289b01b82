"""What a framework that holds the sampler would do wrong in silence, told by who asks.

No framework is imported; one that is not there asks for nothing.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

ACCELERATE = "accelerate.data_loader"

FORWARDING_MODULES = ("gpusampler.", "torch.utils.data.", "torchdata.", ACCELERATE)
"""Modules between a loader of Accelerate and the sampler that it was made with."""


def check_sharding(num_replicas: int, output: str) -> None:
    """Raise if Accelerate is about to shard what it cannot.

    `PatchBatchSampler` calls it when it is asked for an iterator or for its length; only the one
    who asks knows what becomes of the batches. Nothing is looked at unless something could go
    wrong and Accelerate has been imported.

    Parameters
    ----------
    num_replicas : int
        How many ranks share an epoch of the sampler.
    output : str
        What its batches are.

    Raises
    ------
    RuntimeError
        If a loader that Accelerate shards over several processes asks, and ``num_replicas > 1``
        or, of a shard by batches, ``output`` is not "list".

    Examples
    --------
    >>> check_sharding(num_replicas=2, output="list")
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
            # What runs inside a shard's iteration is what it shards, be it wrapped by others;
            # inside a dispatcher's run the dataset and the collation too, which may have samplers
            # of their own.
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
        # It asks whether a batch is true; the ranks that are told an array's answer raise, at the
        # end of an epoch, while the others wait for them.
        raise RuntimeError(
            f"output must be 'list' in a loader that Accelerate shards over {processes} processes, "
            f"got {output!r}: it cannot share out batches that are arrays. Leave the loader out of "
            "accelerator.prepare() to have them"
        )
