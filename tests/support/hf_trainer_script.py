"""A Trainer that takes its batches from our sampler, for test_hf_trainer.py.

``python hf_trainer_script.py OUT`` under torchrun writes what each process saw to OUT/<rank>.json.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from gpusampler import PatchBatchSampler

IDS = np.repeat([3, 1, 2, 9], [9, 14, 7, 5])
SEED, EPOCHS = 4, 3


class Rows(Dataset):
    patch_ids = IDS

    def __len__(self):
        return IDS.size

    def __getitem__(self, i):
        return {"x": torch.tensor([1.0, i / IDS.size]), "labels": torch.tensor(float(i))}


class Tiny(nn.Module):
    """It remembers what it was trained on, and drops out, so that random states count."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)
        self.dropout = nn.Dropout(0.3)
        self.seen: list[list[int]] = []

    def forward(self, x, labels):
        y = self.linear(self.dropout(x)).squeeze(-1)
        if self.training:
            self.seen.append(labels.int().tolist())
        return {"loss": (y - labels / IDS.size).square().mean(), "logits": y}


class TellEpoch(TrainerCallback):
    """Tells the sampler which epoch begins, in a resumed run too."""

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))


class PatchTrainer(Trainer):
    """Every batch comes from one patch of the dataset."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The process group is there by now, so the ranks are known.
        size, seed = self.args.per_device_train_batch_size, self.args.seed
        self.train_sampler = PatchBatchSampler(self.train_dataset, size, seed=seed)
        self.add_callback(TellEpoch(self.train_sampler))

    def patch_loader(self, dataset, sampler):
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # or each pass draws a seed from torch's own
        )

    def get_train_dataloader(self):
        return self.patch_loader(self.train_dataset, self.train_sampler)

    def eval_sampler(self, dataset, **ranks):
        # Batches of one size can be gathered from several processes.
        partial = "keep" if self.args.world_size == 1 else "pad"
        size = self.args.per_device_eval_batch_size
        return PatchBatchSampler(
            dataset,
            size,
            shuffle_within_batches=False,
            shuffle_patches=False,
            seed=0,
            partial=partial,
            **ranks,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.patch_loader(dataset, self.eval_sampler(dataset))

    get_test_dataloader = get_eval_dataloader


class RecordingTrainer(PatchTrainer):
    """It remembers its losses."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


class SaveSampler(TrainerCallback):
    """Saves the sampler's position in every checkpoint."""

    def __init__(self, sampler):
        self.sampler, self.step = sampler, 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.step = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.step += 1

    on_step_end = on_substep_end

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        state = self.sampler.state_dict(step=self.step)
        (folder / "sampler.json").write_text(json.dumps(state))


class Untold(RecordingTrainer):
    """The same without the callback."""

    def add_callback(self, callback):
        if not isinstance(callback, TellEpoch):
            super().add_callback(callback)


class PreparedTrainer(RecordingTrainer):
    """Sharded by Accelerate, batches of one size; the callback may be left out."""

    partial = "pad"

    def __init__(self, *args, told=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_sampler = PatchBatchSampler(
            self.train_dataset, 4, seed=SEED, partial=self.partial, num_replicas=1, rank=0
        )
        self.pop_callback(TellEpoch)
        if told:
            self.add_callback(TellEpoch(self.train_sampler))

    def patch_loader(self, dataset, sampler):
        return self.accelerator.prepare(super().patch_loader(dataset, sampler))

    def eval_sampler(self, dataset, **ranks):
        # In an order whose last batch is full.
        return PatchBatchSampler(
            dataset, 4, seed=SEED, partial=self.partial, num_replicas=1, rank=0
        )


def trainer_of(out, kind=RecordingTrainer, batch_size=4, model=None, more=None, **settings):
    """A trainer that saves every step."""
    settings = {
        "seed": SEED,
        "num_train_epochs": EPOCHS,
        "save_strategy": "steps",
        "save_steps": 1,
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "learning_rate": 0.05,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        **settings,
    }
    return kind(
        model or Tiny(),
        TrainingArguments(str(out), **settings),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        **(more or {}),
    )


def weights_of(trainer) -> list[float]:
    return [x for p in trainer.model.parameters() for x in p.detach().flatten().tolist()]


def record_of(trainer) -> dict:
    return {
        "seen": trainer.model.seen,
        "losses": trainer.losses,
        "weights": weights_of(trainer),
        "steps": trainer.state.global_step,
    }


def rank_by_rank(out: Path, positions) -> dict:
    """Straight and resumed runs of the kinds that several processes may be of."""
    results = {}
    kinds = {
        "told": (RecordingTrainer, {}),
        "prepared": (PreparedTrainer, {"told": True}),
        "prepared, not told": (PreparedTrainer, {"told": False}),
    }
    for name, (kind, more) in kinds.items():
        trainer = trainer_of(out / name, kind, more=more)
        trainer.train()
        results[name] = {"straight": record_of(trainer), "resumed": {}}
        for position in positions:
            resumed = trainer_of(out / f"{name} again", kind, more=more, save_strategy="no")
            resumed.train(resume_from_checkpoint=str(out / name / f"checkpoint-{position}"))
            results[name]["resumed"][position] = record_of(resumed)
        predicted = trainer.predict(Rows())
        results[name]["predicted"] = predicted.predictions.tolist()
        results[name]["labels"] = predicted.label_ids.astype(int).tolist()
    return results


if __name__ == "__main__":
    # Where each process waits, should one of them wait for ever.
    faulthandler.dump_traceback_later(240, exit=True)
    torch.set_num_threads(1)
    OUT = Path(sys.argv[1])
    FOUND = rank_by_rank(OUT, [1, 6, 9, 17])
    (OUT / f"{dist.get_rank()}.json").write_text(json.dumps(FOUND))
    dist.barrier()
    dist.destroy_process_group()
