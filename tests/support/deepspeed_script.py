"""Training by DeepSpeed under Accelerate, on a CPU; `test_deepspeed.py` runs it twice.

The first run stops in the middle of an epoch and saves; the second one finds that and goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch.utils.data import DataLoader, TensorDataset

from gpusampler import PatchBatchSampler

IDS = torch.arange(203) % 9
EPOCHS, STOP = 2, (1, 5)
"""The first run stops after the fifth step of the second epoch."""


class Drawn:
    """The sampler's position after the batches that were trained on."""

    def __init__(self, sampler: PatchBatchSampler) -> None:
        self.sampler, self.step = sampler, 0

    def state_dict(self) -> dict:
        return self.sampler.state_dict(step=self.step)

    def load_state_dict(self, state: dict) -> None:
        self.sampler.load_state_dict(state)


def accelerator_of(micro_batch: object) -> Accelerator:
    config = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    # Where there is no GPU, Accelerate counts one process unless it is told the backend.
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


def train(out: Path) -> dict:
    checkpoint = out / "checkpoint"
    resumed = checkpoint.exists()
    accelerator = accelerator_of(8)
    sampler = PatchBatchSampler(IDS, 8, seed=42)
    rows = torch.arange(IDS.numel())
    x = rows[:, None].sin().float()
    loader = DataLoader(TensorDataset(x, x.square(), rows), batch_sampler=sampler, num_workers=1)
    model = torch.nn.Linear(1, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    drawn = Drawn(sampler)
    accelerator.register_for_checkpointing(drawn)
    if resumed:
        accelerator.load_state(str(checkpoint))
    steps: list[tuple[int, list[int]]] = []
    result = {
        "kind": str(accelerator.distributed_type),
        "processes": accelerator.num_processes,
        "steps": steps,
    }
    for epoch in range(sampler.epoch, EPOCHS):
        sampler.set_epoch(epoch)
        for drawn.step, (x, y, batch) in enumerate(loader, start=1):
            optimizer.zero_grad()
            accelerator.backward((model(x) - y).square().mean())
            optimizer.step()
            steps.append((epoch, batch.tolist()))
            if (epoch, drawn.step) == STOP and not resumed:
                accelerator.save_state(str(checkpoint))
                return result
    result["refused"] = refused_micro_batch(accelerator, model, loader)
    return result


def refused_micro_batch(accelerator: Accelerator, model: object, loader: DataLoader) -> str:
    """What a loader with a batch sampler meets whose size DeepSpeed is to find out."""
    accelerator.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = "auto"
    try:
        accelerator.prepare(model, loader)
    except ValueError as error:
        return str(error)
    return "it was not refused"


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    result = train(out)
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
