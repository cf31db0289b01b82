"""Small models learn from real batches: no padding, no mask, one series a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from docs.figures.real_data import load, sizes_of
from gpusampler import Batch, PatchBatchSampler, PatchGroups, PatchTensorLoader


class Ragged:
    """Rows that lie end to end; a batch of one size is a gather."""

    def __init__(self, offsets: np.ndarray):
        self.sizes = np.diff(offsets)
        self.starts = torch.from_numpy(offsets[:-1])

    def rows(self, batch: Batch) -> torch.Tensor:
        return self.starts[batch.indices][:, None] + torch.arange(batch.patch_id)


def train(
    model: nn.Module | list[torch.Tensor],
    loss_of: Callable[[Batch], torch.Tensor],
    sampler: PatchBatchSampler,
    epochs: int,
    rate: float,
) -> None:
    """Train with Adam, slower and slower."""
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    optimizer = torch.optim.Adam(parameters, rate)
    total = epochs * len(sampler)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, total_iters=total)
    for _ in range(epochs):
        for batch in sampler.batches():
            optimizer.zero_grad()
            loss_of(batch).backward()
            optimizer.step()
            schedule.step()


def mean_of(value: Callable[[Batch], Any], groups: PatchGroups) -> float:
    """Return the mean over samples of a batch's sum, each sample once."""
    with torch.no_grad():
        batches = PatchBatchSampler.for_evaluation(groups, 64).batches()
        return sum(float(value(batch)) for batch in batches) / groups.num_samples


class TestUtterances:
    """Who speaks, of nine: a GRU reads utterances of one length, to their end."""

    def test_a_gru_learns_without_padding(self):
        data = load("vowels")
        ragged = Ragged(data["offsets"])
        frames, speaker = torch.from_numpy(data["frames"]), torch.from_numpy(data["speaker"]) - 1
        groups = PatchGroups.from_ids(ragged.sizes)
        known, unknown = groups.select(~data["test"]), groups.select(data["test"])
        torch.manual_seed(0)
        gru, out = nn.GRU(12, 24, batch_first=True), nn.Linear(24, 9)
        model = nn.ModuleList([gru, out])

        def answer(batch: Batch) -> torch.Tensor:
            x = frames[ragged.rows(batch)]
            assert x.shape == (batch.valid, batch.patch_id, 12)
            return out(gru(x)[1][0])

        def target(batch: Batch) -> torch.Tensor:
            return speaker[batch.indices].long()

        def loss(batch: Batch) -> torch.Tensor:
            return functional.cross_entropy(answer(batch), target(batch))

        def right(batch: Batch) -> torch.Tensor:
            return (answer(batch).argmax(1) == target(batch)).sum()

        def total_loss(batch: Batch) -> torch.Tensor:
            return loss(batch) * batch.valid

        before = mean_of(total_loss, unknown)
        assert before == pytest.approx(np.log(9), abs=0.2)
        train(model, loss, PatchBatchSampler(known, 16, seed=0), epochs=4, rate=0.03)
        assert mean_of(total_loss, unknown) < before / 2.5
        assert mean_of(right, unknown) > 0.7

    def test_torchs_own_collate_stacks_utterances_of_one_length(self):
        data = load("vowels")
        lengths = sizes_of("vowels")
        utterances = torch.from_numpy(data["frames"]).split(lengths.tolist())
        samples = list(zip(utterances, range(640), strict=True))
        sampler = PatchBatchSampler(lengths, 16, seed=0)
        loaded = list(DataLoader(samples, batch_sampler=sampler))
        for x, members in loaded:
            assert x.shape == (len(members), lengths[members[0]], 12)
            assert torch.equal(x[-1], utterances[members[-1]])
        assert sorted(torch.cat([members for _, members in loaded]).tolist()) == list(range(640))


class TestMolecules:
    """Atomization energies from elements and distances, on dense pairs without a mask."""

    def test_a_message_net_learns_without_a_mask(self):
        data = load("molecules")
        ragged = Ragged(data["offsets"])
        numbers = torch.from_numpy(data["numbers"]).long()
        positions = torch.from_numpy(data["positions"])
        energy = torch.from_numpy(data["atomization"]).float()
        known, unknown = PatchGroups.from_ids(ragged.sizes).split([0.8, 0.2], by="sample", seed=0)
        torch.manual_seed(0)
        width = 24
        element = nn.Embedding(18, width)
        message = nn.Sequential(nn.Linear(2 * width + 8, width), nn.SiLU(), nn.Linear(width, width))
        out = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1))
        centres = torch.linspace(0.5, 4, 8)

        def answer(batch: Batch) -> torch.Tensor:
            rows = ragged.rows(batch)
            h, x = element(numbers[rows]), positions[rows]
            far = torch.linalg.vector_norm(x[:, :, None] - x[:, None], dim=-1, keepdim=True)
            shape = (*far.shape[:3], width)
            near = torch.exp(-4 * (far - centres) ** 2)
            pairs = [h[:, :, None].expand(shape), h[:, None].expand(shape), near]
            sent = (message(torch.cat(pairs, -1)) * torch.exp(-((far / 2) ** 2))).sum(2)
            return 100 * out(torch.cat([h, sent], -1)).sum((1, 2))

        def error(batch: Batch) -> torch.Tensor:
            return (answer(batch) - energy[batch.indices]).abs().sum()

        def loss(batch: Batch) -> torch.Tensor:
            return error(batch) / batch.valid

        of_known = np.concatenate([known.samples_of(size) for size in known.patch_ids.tolist()])
        mean = energy[of_known].mean()
        constant = mean_of(lambda batch: (energy[batch.indices] - mean).abs().sum(), unknown)
        assert constant == pytest.approx(296, abs=1)
        model = nn.ModuleList([element, message, out])
        train(model, loss, PatchBatchSampler(known, 8, seed=0), epochs=12, rate=5e-3)
        assert mean_of(error, unknown) < constant / 4


@pytest.fixture(scope="module")
def storms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The storm of each observation, its wind and its pressure, near 0 and 1."""
    data = load("storms")
    return data["storm"], (data["wind"] - 50) / 25, (data["pressure"] - 990) / 20


class TestStorms:
    """Pressure from wind, with what is each storm's own: a mixed model, one storm a batch."""

    @staticmethod
    def loss(theta, rows, left, squared_left, of_sum, log=torch.log, exp=torch.exp):
        """Minus the log likelihood of a storm, over its rows, from sums over them."""
        within, between = exp(2 * theta[2]), exp(2 * theta[3])
        spread = within + rows * between
        fit = (squared_left - between / spread * of_sum**2) / within
        return 0.5 * (fit + (rows - 1) * 2 * theta[2] + log(spread)) / rows

    def best(self, storms) -> tuple[np.ndarray, float]:
        """Minimise the mean over storms in one piece."""
        optimize = pytest.importorskip("scipy.optimize")
        storm, wind, pressure = storms
        rows = np.bincount(storm)

        def mean(theta):
            left = pressure - theta[0] - theta[1] * wind
            sums = np.bincount(storm, left**2), np.bincount(storm, left)
            return self.loss(theta, rows, left, *sums, log=np.log, exp=np.exp).mean()

        found = optimize.minimize(mean, np.zeros(4))
        return found.x, found.fun

    def test_steps_of_one_storm_find_what_all_storms_together_say(self, storms):
        storm, wind, pressure = storms
        x, y = torch.from_numpy(wind).float(), torch.from_numpy(pressure).float()
        longest = int(np.bincount(storm).max())
        theta = torch.zeros(4, requires_grad=True)

        def loss(batch: Batch) -> torch.Tensor:
            left = y[batch.indices] - theta[0] - theta[1] * x[batch.indices]
            return self.loss(theta, batch.valid, left, left @ left, left.sum())

        def mean() -> float:
            with torch.no_grad():
                batches = PatchBatchSampler.for_evaluation(storm, longest).batches()
                return float(np.mean([float(loss(batch)) for batch in batches]))

        expected, least = self.best(storms)
        before = mean()
        train([theta], loss, PatchBatchSampler(storm, longest, seed=0), epochs=2, rate=0.04)
        # Nine tenths of the way from nothing to the best there is.
        assert mean() < least + (before - least) / 10
        assert theta.detach().numpy() == pytest.approx(expected, abs=0.12)

    def test_a_tensor_loader_hands_out_whole_storms(self, storms):
        storm, wind, pressure = storms
        counts = np.bincount(storm)
        sampler = PatchBatchSampler(storm, int(counts.max()), seed=0)
        x, y = torch.from_numpy(wind), torch.from_numpy(pressure)
        for batch in PatchTensorLoader(sampler, x=x, y=y):
            own = storm == batch["patch_id"]
            assert batch["valid"] == counts[batch["patch_id"]]
            assert sorted(batch["x"].tolist()) == sorted(wind[own].tolist())
            assert batch["y"].sum().item() == pytest.approx(pressure[own].sum())
