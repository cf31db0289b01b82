"""Runs of `PatchTrainer` that write down every batch: their parts, and as a script those of ranks.

    python neuralop_script.py FOLDER SAVE_EVERY WORKERS KILL_AFTER

trains one process into a folder, from the state in it if there is one, and kills itself after some
batches of the whole run, if KILL_AFTER is not 0. With the folder alone, torchrun runs it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from neuralop.losses import LpLoss
from neuralop.models import GINO
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gpusampler import GWPatchDataset, PatchBatchSampler
from gpusampler.demo.embedded import small_data
from gpusampler.demo.gino import fast_segment_csr
from gpusampler.groundwater import Normalize, collate_fn
from gpusampler.neuralop import STATE_FILE, PatchProcessor, PatchTrainer

EPOCHS = 4
TIN, TOUT = 6, 1


class Rows(GWPatchDataset):
    """Patches that also tell which row each sample is."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(small_data(), TIN, TOUT, stride=7, split=split)

    def __getitems__(self, indices):
        rows = torch.as_tensor(indices).tolist()
        samples = super().__getitems__(indices)
        return [{**sample, "row": row} for sample, row in zip(samples, rows, strict=True)]


def dataset_of(split: str = "train") -> Rows:
    dataset = Rows(split)
    dataset.transform = Normalize.from_dataset(Rows())
    return dataset


def sampler_of(dataset: Any = None, **settings) -> PatchBatchSampler:
    source = Rows() if dataset is None else dataset
    return PatchBatchSampler(source, 4, **{"seed": 5, **settings})


def loader_of(dataset: Rows, workers: int = 0, kind: type = DataLoader, **settings) -> DataLoader:
    if workers:
        settings |= {"multiprocessing_context": "fork"}
    sampler = sampler_of(dataset)
    return kind(
        dataset, batch_sampler=sampler, collate_fn=collate_fn, num_workers=workers, **settings
    )


def gino(**settings) -> GINO:
    torch.manual_seed(0)
    channels = TIN * 3
    return GINO(
        in_channels=channels,
        out_channels=TOUT * 3,
        fno_in_channels=channels,
        in_gno_radius=0.4,
        out_gno_radius=0.4,
        fno_n_modes=(2, 2, 2),
        fno_hidden_channels=4,
        fno_n_layers=1,
        gno_embed_channels=4,
        in_gno_channel_mlp_hidden_layers=[8],
        out_gno_channel_mlp_hidden_layers=[8],
        gno_use_open3d=False,
        gno_use_torch_scatter=False,
        **settings,
    )


def grid() -> torch.Tensor:
    axis = torch.linspace(0, 1, 4)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)[None]


class Stopped(Exception):
    """Stands for the end of a process, where no process is ended."""


class Recorder(PatchTrainer):
    """Writes down the batches and losses; may stop before a batch of the run."""

    def __init__(self, stop_before: int | None = None, **settings) -> None:
        self.steps: list[list[Any]] = []
        self.learning_rates: list[float] = []
        self.evaluated: list[dict[str, float]] = []
        self.stop_before = stop_before
        super().__init__(
            **{
                "model": gino(),
                "n_epochs": EPOCHS,
                "data_processor": PatchProcessor(grid()),
                **settings,
            }
        )

    def train_one_batch(self, idx, sample, training_loss):
        if len(self.steps) == self.stop_before:
            self.stop()
        rows = sample["row"]
        loss = super().train_one_batch(idx, sample, training_loss)
        self.steps.append([self.epoch, idx, rows, loss.item()])
        return loss

    def stop(self) -> None:
        raise Stopped

    def on_epoch_start(self, epoch):
        self.learning_rates.append(self.optimizer.param_groups[0]["lr"])
        return super().on_epoch_start(epoch)

    def evaluate_all(self, *args, **settings):
        metrics = super().evaluate_all(*args, **settings)
        self.evaluated.append({name: float(value) for name, value in metrics.items()})
        return metrics


class Killed(Recorder):
    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    """Lower the rate where the sum of the epoch's losses does not fall enough."""
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)


def fit(trainer: Recorder, loader: Any, schedule: Any = plateau, **settings) -> dict[str, Any]:
    """Train, and evaluate on the held-out steps; return the metrics of the last epoch."""
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=3e-3)
    val = dataset_of("val")
    sampler = PatchBatchSampler.for_evaluation(val, 4)
    val_loader = DataLoader(val, batch_sampler=sampler, collate_fn=collate_fn)
    with fast_segment_csr():
        return trainer.train(
            loader,
            {"val": val_loader},
            optimizer,
            schedule(optimizer),
            training_loss=LpLoss(d=2),
            **settings,
        )


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if value is None else float(value)
        for name, value in metrics.items()
        if name != "epoch_train_time"
    }


def parameters(trainer: PatchTrainer) -> list[list[float]]:
    return [
        torch.view_as_real(p).tolist() if p.is_complex() else p.tolist()
        for p in trainer._module.parameters()
    ]


def run_alone(folder: Path, save_every: int, workers: int, kill_after: int) -> None:
    """Train from the saved state, if there is one, and leave the parameters."""
    trainer = Killed(stop_before=kill_after or None)
    metrics = fit(
        trainer,
        loader_of(dataset_of(), workers),
        save_every_batches=save_every,
        save_dir=folder,
        resume_from_dir=folder if (folder / STATE_FILE).exists() else None,
    )
    dump(folder / "done.json", trainer, metrics)


def dump(path: Path, trainer: Recorder, metrics: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "steps": trainer.steps,
        "parameters": parameters(trainer),
        "metrics": without_times(metrics),
        "rates": trainer.learning_rates,
    }
    path.write_text(json.dumps(results))


def run_ranks(folder: Path) -> None:
    """Train on all ranks whole, stopped in mid-epoch, and from there."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def train(name: str, **settings) -> None:
        trainer = Recorder(
            model=DistributedDataParallel(gino()),
            n_epochs=2,
            stop_before=settings.pop("stop_before", None),
        )
        settings = {"save_dir": folder / name, **settings}
        try:
            metrics = fit(trainer, loader_of(dataset_of()), **settings)
        except Stopped:
            metrics = {}
        dump(folder / name / f"{rank}.json", trainer, metrics)
        dist.barrier()

    train("whole")
    train("stopped", save_every_batches=4, stop_before=15)
    train("resumed", resume_from_dir=folder / "stopped")
    (folder / f"{rank}.json").write_text("{}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *numbers = sys.argv[1:]
    run_alone(Path(folder), *map(int, numbers)) if numbers else run_ranks(Path(folder))
