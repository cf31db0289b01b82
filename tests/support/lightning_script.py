"""Lightning runs that write down every batch: their parts, and as a script those of two ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

import lightning as L
from gpusampler import PatchBatchSampler
from gpusampler.lightning import ResumeSampler

IDS = np.random.default_rng(0).permutation(np.repeat([5, -2, 9, 40], [30, 7, 50, 3]))
STEPS = 13
EPOCHS = 2

NOISE = [
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "The '.*_dataloader' does not have many workers",
    "GPU available but not used",
    "Checkpoint directory .* exists and is not empty",
    ".*set_vital",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    "The dirpath has changed from",
    "This process .* is multi-threaded, use of fork",
]
"""What Lightning, torch and Python warn of whatever the sampler is."""


def sampler_of(**settings) -> PatchBatchSampler:
    return PatchBatchSampler(IDS, settings.pop("batch_size", 8), **{"seed": 1, **settings})


class Rows(Dataset):
    """Two numbers to learn from, and which row of which patch they are."""

    def __len__(self) -> int:
        return IDS.size

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int, int]:
        return torch.tensor([row % 7, row % 11]) / 10, row, int(IDS[row])


def loader_of(sampler: Any, workers: int = 0, kind: type = DataLoader, **settings) -> DataLoader:
    if workers:
        settings.setdefault("multiprocessing_context", "fork")
    return kind(Rows(), batch_sampler=sampler, num_workers=workers, **settings)


class Recording:
    """What a module does that learns a line, and writes down what it was given."""

    def __init__(self, explode_at: int | None = None) -> None:
        super().__init__()
        self.line = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(self.line.weight, 0.5)
        torch.nn.init.constant_(self.line.bias, 0.1)
        self.explode_at = explode_at
        self.log_of_run: list[list[Any]] = []

    @property
    def trained(self) -> list[list[Any]]:
        """Epoch, batch_idx, rows and loss of every training step."""
        return [entry[1:] for entry in self.log_of_run if entry[0] == "train"]

    @property
    def validated(self) -> list[list[Any]]:
        """Epoch, or "sanity", and rows of every step of validation or test."""
        return [entry[1:] for entry in self.log_of_run if entry[0] == "validate"]

    def rows_of(self, batch) -> list[int]:
        _, rows, patch = batch
        assert len(set(patch.tolist())) == 1, "a mixed batch"
        assert patch.tolist() == IDS[rows.numpy()].tolist()
        return rows.tolist()

    def on_train_epoch_start(self) -> None:
        self.log_of_run.append(["epoch", self.current_epoch])

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.explode_at:
            raise RuntimeError("exploded")
        x = batch[0]
        loss = (self.line(x) - x.sum(1, keepdim=True)).square().mean()
        step = [self.current_epoch, batch_idx, self.rows_of(batch), loss.item()]
        self.log_of_run.append(["train", *step])
        return loss

    def predict_step(self, batch, batch_idx):
        return self.rows_of(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Recorder(Recording, L.LightningModule):
    pass


class Validated(Recorder):
    def validation_step(self, batch, batch_idx):
        epoch = "sanity" if self.trainer.sanity_checking else self.current_epoch
        self.log_of_run.append(["validate", epoch, self.rows_of(batch)])

    test_step = validation_step


class Scheduled(Recorder):
    """Asks for the number of steps, which makes the loaders before anything is restored."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Data(L.LightningDataModule):
    """Makes its samplers in hooks: by then there is a process group to read the ranks off."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers

    def train_dataloader(self):
        return loader_of(sampler_of(), self.workers)

    def val_dataloader(self):
        return loader_of(sampler_of())

    predict_dataloader = val_dataloader


class Dump(Callback):
    """Leaves what a rank's module wrote down in a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer, pl_module) -> None:
        dump(self.folder, trainer, pl_module.log_of_run)


def dump(folder: Path, trainer: L.Trainer, results: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(results))


def trainer_of(folder: Path, *callbacks: Any, **settings) -> L.Trainer:
    return L.Trainer(
        callbacks=list(callbacks),
        default_root_dir=folder,
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": EPOCHS,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks),
            "use_distributed_sampler": False,
            **settings,
        },
    )


def checkpointer(folder: Path, **when) -> ModelCheckpoint:
    """Keeps every checkpoint; one a step, unless something else is said."""
    when = when or {"every_n_train_steps": 1}
    return ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **when)


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """Checkpoints by the global step that they were taken after, in order."""
    checkpoints = {int(path.stem.split("step=")[1]): path for path in folder.glob("*step=*.ckpt")}
    return dict(sorted(checkpoints.items()))


FROM_ONE_RANK = (5, 8, 12, 13)


def run_two_ranks(folder: Path, one_rank: Path) -> None:
    """All jobs of two ranks, so that they are started once; each rank leaves a file a job."""
    alone = sampler_of()  # there is no process group yet
    two: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    refusing = {**two, "use_distributed_sampler": True}

    def fit(name: str, checkpoint: Path | None = None) -> None:
        kept = checkpointer(folder / name)
        trainer = trainer_of(folder, kept, ResumeSampler(), num_sanity_val_steps=0, **two)
        model = Validated()
        # No workers: a process that has threads of its process group had better not fork.
        trainer.fit(model, datamodule=Data(), ckpt_path=checkpoint)
        dump(folder / name, trainer, model.log_of_run)

    fit("whole")
    fit("middle", checkpoints_of(folder / "whole")[3])
    for steps in FROM_ONE_RANK:
        fit(f"after {steps} of one", checkpoints_of(one_rank)[steps])

    model = Recorder()
    trainer = trainer_of(folder, **two)
    trainer.fit(model, loader_of(alone))
    dump(folder / "alone", trainer, model.log_of_run)

    for name in ("fit", "validate"):
        trainer = trainer_of(folder, **refusing)
        try:
            getattr(trainer, name)(Validated(), datamodule=Data())
        except TypeError as error:
            dump(folder / f"{name} refused", trainer, str(error))

    for name, sampler in (("predicted", sampler_of()), ("predicted alone", alone)):
        trainer = trainer_of(folder, **refusing)
        dump(folder / name, trainer, trainer.predict(Recorder(), loader_of(sampler)))
    # The first rank does not wait for the other when it ends.
    torch.distributed.barrier()


def run_forked(folder: Path) -> None:
    """Two ranks forked from this process, as in a notebook."""
    trainer = trainer_of(folder, ResumeSampler(), Dump(folder), devices=2, strategy="ddp_fork")
    trainer.fit(Recorder(), datamodule=Data())


if __name__ == "__main__":
    folder, *one_rank = map(Path, sys.argv[1:])
    run_two_ranks(folder, *one_rank) if one_rank else run_forked(folder)
