"""Two ranks that compare their samplers, one after the other; each writes what it saw to a file."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from gpusampler import PatchBatchSampler
from support.strategies import through_json

PATCHES = np.random.default_rng(5).integers(0, 7, 50)  # 50 files of 4 samples, each of a patch
IDS = PATCHES.repeat(4)
LOST = np.delete(PATCHES, np.arange(3, 50, 5)[:9]).repeat(4)
OTHER_ORDER = PATCHES[np.random.default_rng(0).permutation(50)].repeat(4)


def make(ids=IDS, batch_size=8, seed: int | None = 1) -> PatchBatchSampler:
    return PatchBatchSampler(ids, batch_size, seed=seed)


def in_turn(first: int, run: Any) -> Any:
    """Run something on one rank, then on the other."""
    if dist.get_rank() != first:
        dist.barrier()
    result = run()
    if dist.get_rank() == first:
        dist.barrier()
    dist.barrier()
    return result


def word(run: Any) -> str:
    """Return the error or the warning of a run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return str(run())
        except (RuntimeError, ValueError, UserWarning) as error:
            return f"{type(error).__name__}: {error}"


def quiet(*samplers: PatchBatchSampler) -> str:
    for sampler in samplers:
        for epoch in range(2):
            sampler.set_epoch(epoch)
            list(sampler)
    return "no word"


def different(rank: int, store: Any) -> dict[str, Any]:
    cases: dict[str, dict[str, Any]] = {
        "order": {"ids": OTHER_ORDER if rank else IDS},
        "lost": {"ids": LOST if rank else IDS},
        "batch_size": {"batch_size": 8 - rank},
        "seed": {"seed": rank},
    }
    results = {}
    for name, settings in cases.items():
        for first in range(2):
            sampler = make(**settings)
            run = in_turn(first, lambda: word(lambda: f"{len(list(sampler))} steps"))  # noqa: B023
            results[f"{name}, rank {first} first"] = run
            restart(store)
    return results


def restart(store: Any) -> None:
    """Destroy the group and initialise it again on the same store."""
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    # Without the addresses of the old group's ranks, which gloo would try.
    for key in store.list_keys():
        if key.endswith(f"/{rank}") and "gpusampler" not in key:
            store.delete_key(key)
    store.add("restarted", 1)
    while store.add("restarted", 0) % 2:
        time.sleep(0.001)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)


def equal(rank: int, store: Any) -> dict[str, Any]:
    results: dict[str, Any] = {}

    def check(name: str, run: Any) -> None:
        for first in range(2):
            results[f"equal: {name}, rank {first} first"] = in_turn(first, lambda: word(run))

    check("two samplers", lambda: quiet(make(), PatchBatchSampler.for_evaluation(IDS[:90], 4)))
    check("one only on rank 0", one_on_rank_0)
    check("drawn seed", lambda: quiet(make(seed=None)))
    check(
        "of one rank",
        lambda: quiet(PatchBatchSampler(LOST if rank else IDS, 8, num_replicas=1, rank=0)),
    )
    check("resumed", resumed)
    if find_spec("accelerate") is not None:
        check("sharded by Accelerate", sharded_by_accelerate)
    for settings in ({"batch_size": 5}, {"ids": LOST}):
        restart(store)
        check(f"restarted with {sorted(settings)}", lambda: quiet(make(**settings)))  # noqa: B023
    return results


def one_on_rank_0() -> str:
    samplers = [make()]
    if dist.get_rank() == 0:
        samplers.insert(0, PatchBatchSampler(IDS[:60], 4, seed=3))
    return quiet(*samplers)


def resumed() -> str:
    state = through_json(make(seed=None).state_dict(step=3))
    sampler = make(seed=None)
    sampler.load_state_dict(state)
    list(sampler)
    # From four ranks.
    four = [PatchBatchSampler(IDS, 8, seed=1, num_replicas=4, rank=r) for r in range(4)]
    sampler = make()
    sampler.load_state_dict(four[3].state_dict(step=2))
    list(sampler)
    return "no word"


def sharded_by_accelerate() -> str:
    from accelerate import Accelerator

    sampler = PatchBatchSampler(IDS, 8, seed=1, num_replicas=1, rank=0)
    loader = Accelerator(cpu=True).prepare(DataLoader(IDS, batch_sampler=sampler))
    list(loader)
    return quiet(make())


def one_more_on_rank_0(store: Any) -> dict[str, str]:
    """Let one function make all samplers, so that they are of one line."""

    def both(barriers: int) -> str:
        if dist.get_rank() == 0:
            quiet(make(IDS[:60], 4))
            for _ in range(barriers):
                dist.barrier()
        return quiet(make())

    restart(store)
    results = {"one more on rank 0, then rank 1": in_turn(0, lambda: word(lambda: both(0)))}
    restart(store)
    if dist.get_rank() == 1:
        dist.barrier()
    results["one more on rank 0, rank 1 between"] = word(lambda: both(2))
    if dist.get_rank() == 1:
        dist.barrier()
    return results


class Streamed(IterableDataset):
    """Draws from a sampler inside a worker."""

    def __init__(self) -> None:
        # Different on each rank: a check would raise.
        self.sampler = make(seed=dist.get_rank())

    def __iter__(self):
        for batch in self.sampler:
            yield len(batch) * 0 + 7
        # A sampler of the worker's own.
        if dist.is_initialized():
            for _ in make(seed=dist.get_rank()):
                yield 7
        else:
            yield from [7] * len(self.sampler)


def workers() -> dict[str, Any]:
    return {
        f"worker by {start}": [
            int(row)
            for row in DataLoader(
                Streamed(), batch_size=None, num_workers=1, multiprocessing_context=start
            )
        ]
        for start in ("fork", "spawn")
    }


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    results = {**different(rank, store), **equal(rank, store), **workers()}
    results.update(one_more_on_rank_0(store))
    (out / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
