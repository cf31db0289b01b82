"""Training over a DataLoader: stopped and resumed runs have the same losses, bit for bit."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.utils.data import Dataset

from support.dataloaders import IDS, LOADERS, loader_kinds, loader_of
from support.strategies import quiet

EPOCHS = 3


class Values(Dataset):
    """Rows of four numbers and one to learn."""

    def __init__(self):
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(IDS.size, 4, generator=random)
        self.y = torch.randn(IDS.size, generator=random)

    def __len__(self):
        return IDS.size

    def get_all_patch_ids(self):
        return IDS

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Training:
    """A model, what trains it, and a loader of the kind that most scripts have."""

    def __init__(self, workers: str, **settings):
        dataset = Values()
        self.sampler = quiet(dataset, 4, **settings)
        self.loader = loader_of(dataset, self.sampler, **LOADERS[workers])
        torch.manual_seed(1)
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=0.1, epochs=EPOCHS, steps_per_epoch=len(self.loader)
        )
        self.losses: list[float] = []
        self.in_pass = 0

    def steps(self):
        """Train to the end of the last epoch; pauses after every step."""
        while self.sampler.epoch < EPOCHS:
            # Ranks have to be told; where a position was loaded, its epoch keeps it.
            self.sampler.set_epoch(self.sampler.epoch)
            self.in_pass = 0
            for x, y in self.loader:
                self.optimizer.zero_grad()
                loss = (self.model(x)[:, 0] - y).square().mean()
                loss.backward()
                self.optimizer.step()
                self.schedule.step()
                self.losses.append(loss.item())
                self.in_pass += 1
                yield

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "sampler": self.sampler.state_dict(step=self.in_pass),
            },
            file,
        )
        return file

    def load(self, file: io.BytesIO) -> None:
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        for part in ("model", "optimizer", "schedule", "sampler"):
            getattr(self, part).load_state_dict(saved[part])


@pytest.mark.parametrize("workers", loader_kinds("none", "two", "persistent"))
@pytest.mark.parametrize("stops", [(1, 2), (9, 17), (20, 3), (33, 26)])
def test_losses_after_resuming_are_those_of_a_run_that_never_stopped(workers, stops):
    whole = Training("none", seed=5)
    for _ in whole.steps():
        pass
    assert len(whole.losses) == EPOCHS * 20
    assert len(set(whole.losses)) > 50
    training, losses = Training(workers, seed=5), []
    for stop in stops:
        running = training.steps()
        for _ in range(stop):
            next(running)
        file = training.save()
        losses += training.losses
        running.close()
        # A new process would have drawn another seed.
        training = Training(workers)
        training.load(file)
    for _ in training.steps():
        pass
    assert losses + training.losses == whole.losses
    assert training.schedule.last_epoch == training.schedule.total_steps
    for name, value in whole.model.state_dict().items():
        assert torch.equal(training.model.state_dict()[name], value)


@pytest.mark.parametrize("uneven", ["pad", "drop"])
@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
@pytest.mark.parametrize("num_replicas", [1, 3])
def test_a_schedule_of_len_of_the_loader_ends_with_the_last_step(num_replicas, partial, uneven):
    for rank in range(num_replicas):
        training = Training(
            "none", seed=5, partial=partial, num_replicas=num_replicas, rank=rank, uneven=uneven
        )
        done = sum(1 for _ in training.steps())
        assert done == training.schedule.last_epoch == training.schedule.total_steps
        with pytest.raises(ValueError, match="Tried to step"):
            training.schedule.step()
