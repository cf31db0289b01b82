"""A training of several processes that survives being killed; torchrun runs it.

    torchrun --standalone --nproc-per-node 4 tests/support/ddp_script.py --out run

Started again after whatever happened, on as many processes as there are now, it goes on from its
last checkpoint. `test_torchrun.py` runs and kills it. What only the test needs is marked so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from gpusampler import PatchBatchSampler

# 47 batches of 8: no multiple of 2, 3 or 4 ranks.
SIZES = (3, 40, 8, 61, 17, 90, 1, 29, 33, 55)
POINTS = 12


class Patches(Dataset):
    """Samples of ten patches; the samples of a patch share one geometry."""

    def __init__(self) -> None:
        make = torch.Generator().manual_seed(0)
        patches = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
        # Like samples of a shuffled table: a patch's rows lie anywhere.
        self.patch_ids = patches[torch.randperm(sum(SIZES), generator=make)]
        self.points = torch.rand(len(SIZES), POINTS, 3, generator=make)
        self.values = torch.randn(sum(SIZES), POINTS, generator=make)
        areas = self.points[self.patch_ids].sum(dim=2)
        self.targets = (self.values * areas).mean(dim=1)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {
            "row": row,
            "patch": self.patch_ids[row],
            "values": self.values[row],
            "target": self.targets[row],
        }


class OnPoints(nn.Module):
    """Weights from a geometry, applied to all samples of a batch: one geometry a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Sequential(nn.Linear(3, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, values: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return (values * self.weights(points)[:, 0]).mean(dim=1)


def save(
    path: Path, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, sampler: dict
) -> None:
    """Write a checkpoint aside and put it in its place, which holds a whole one at any moment."""
    tensors = {
        "model": model.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sampler": sampler,
    }
    aside = path.with_suffix(".aside")
    with aside.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    die_if_told("saving")
    os.replace(aside, path)


def train(args: argparse.Namespace) -> None:
    """Train to the end of the last epoch, from the checkpoint if there is one."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rank = dist.get_rank()
    dataset = Patches()
    # Ranks come from the process group; the seed must be the same on all.
    sampler = PatchBatchSampler(dataset, args.batch_size, seed=args.seed, uneven=args.uneven)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.num_workers)
    model = OnPoints()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sampler.load_state_dict(saved["sampler"])
    # Waits for all ranks, so none has begun to train, and to save, before all have loaded.
    model = DistributedDataParallel(model)
    log = Log(args.out / f"rank{rank}.jsonl")
    log.write(started=sampler.state_dict(), ranks=dist.get_world_size(), pid=os.getpid())
    for epoch in range(sampler.epoch, args.epochs):
        sampler.set_epoch(epoch)  # of the loaded epoch: keeps the loaded position
        for step, batch in enumerate(loader, start=1):  # steps of this pass, from where it began
            die_if_told("training")
            (patch,) = set(batch["patch"].tolist())  # one patch, so one geometry
            optimizer.zero_grad()
            forecast = model(batch["values"], dataset.points[patch])
            loss = (forecast - batch["target"]).square().mean()
            loss.backward()
            optimizer.step()
            log.write(epoch=epoch, step=step, rows=batch["row"].tolist(), loss=loss.item().hex())
            if step % args.save_every == 0:
                # For the test: no checkpoint is ahead of a log. Training needs no barrier here:
                # rank 0 ends a step when the gradients of every rank are in.
                dist.barrier()
                if rank == 0:
                    save(checkpoint, model, optimizer, sampler.state_dict(step=step))
        dist.barrier()
        if rank == 0:
            save(checkpoint, model, optimizer, sampler.state_dict(step=step))
    error = evaluate(model.module, dataset, args.batch_size)
    (args.out / f"error{rank}.json").write_text(json.dumps(error))
    parameters = torch.cat([part.detach().flatten() for part in model.parameters()])
    log.write(ended=hashlib.sha256(parameters.numpy().tobytes()).hexdigest())


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Patches, batch_size: int) -> float:
    """Return the mean squared error over all samples, each of which counts once on some rank."""
    sampler = PatchBatchSampler.for_evaluation(dataset, batch_size)
    sums = torch.zeros(2, dtype=torch.float64)
    loader = DataLoader(dataset, batch_sampler=sampler)
    for batch, valid in zip(loader, sampler.valid_counts(), strict=True):
        forecast = model(batch["values"], dataset.points[batch["patch"][0]])
        squares = (forecast - batch["target"])[:valid].square()
        sums += torch.tensor([squares.sum(dtype=torch.float64), squares.numel()])
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


class Log:
    """For the test: what a rank has done, on the disk before it goes on."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")

    def write(self, **line: Any) -> None:
        print(json.dumps(line), file=self.file, flush=True)
        os.fsync(self.file.fileno())


def die_if_told(where: str) -> None:
    """For the test: a real SIGKILL, where ``KILL=place:rank:time`` says, in a first life only."""
    time.sleep(float(os.environ.get("PAUSE", 0)))
    if "KILL" not in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT") != "0":
        return
    moment, rank, when = os.environ["KILL"].split(":")
    if int(rank) != dist.get_rank() or where != moment.removeprefix("machine-"):
        return
    TIMES[where] = TIMES.get(where, 0) + 1
    if TIMES[where] == int(when):
        if moment.startswith("machine-"):
            os.kill(os.getppid(), signal.SIGKILL)  # torchrun's agent, which would restart it
        os.kill(os.getpid(), signal.SIGKILL)


TIMES: dict[str, int] = {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="a folder that all ranks see")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--uneven", choices=["pad", "drop"], default="pad")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=5, help="steps")
    parser.add_argument("--timeout", type=int, default=1800, help="of a collective, seconds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
    train(args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
