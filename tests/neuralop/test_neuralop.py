"""neuralop's trainer on batches of patches: whole runs, and those stopped and resumed."""

from __future__ import annotations

import json
import signal
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchTensorLoader
from support.paths import SUPPORT
from support.processes import run_python, run_ranks
from support.strategies import epoch_of

pytest.importorskip("neuralop")

import torch
from neuralop import Trainer
from neuralop import __version__ as neuralop_version
from neuralop.models import GINO
from torch.utils.data import DataLoader

from gpusampler.groundwater import collate_fn
from gpusampler.neuralop import STATE_FILE, PatchProcessor
from support.neuralop_script import (
    EPOCHS,
    Recorder,
    Rows,
    Stopped,
    dataset_of,
    fit,
    gino,
    grid,
    loader_of,
    parameters,
    sampler_of,
    without_times,
)

SCRIPT = SUPPORT / "neuralop_script.py"
STEPS = 18
with_workers = pytest.mark.slow("a second for the workers of each run")
every_workers = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=with_workers)])


def expected_steps(epochs=range(EPOCHS)) -> list[list]:
    """Epoch, number in the epoch, and rows of every batch, as the sampler has them."""
    sampler = sampler_of()
    return [[e, i, rows] for e in epochs for i, rows in enumerate(epoch_of(sampler, e))]


def without_losses(steps: list[list]) -> list[list]:
    return [step[:3] for step in steps]


@pytest.fixture(scope="module")
def whole() -> tuple[Recorder, dict]:
    """A run that nothing stops, and its metrics."""
    trainer = Recorder()
    return trainer, fit(trainer, loader_of(dataset_of()))


def stopped(folder: Path, stop_before: int, loader=None, **settings) -> None:
    """Leave what a run has saved that stops before a batch."""
    loader = loader_of(dataset_of()) if loader is None else loader
    with pytest.raises(Stopped):
        fit(Recorder(stop_before), loader, save_dir=folder, **settings)


def resume(folder: Path, loader=None, **settings) -> tuple[Recorder, dict]:
    trainer = Recorder(**settings.pop("trainer", {}))
    loader = loader_of(dataset_of()) if loader is None else loader
    return trainer, fit(trainer, loader, resume_from_dir=folder, save_dir=folder, **settings)


def assert_resumed(resumed: tuple[Recorder, dict], whole: tuple[Recorder, dict], at: int) -> None:
    """From a batch on, a run is the one that nothing stopped, to the bit."""
    (trainer, metrics), (reference, reference_metrics) = resumed, whole
    assert trainer.steps == reference.steps[at:]
    assert trainer.evaluated == reference.evaluated[EPOCHS - len(trainer.evaluated) :]
    rates = len(trainer.learning_rates)
    assert trainer.learning_rates == reference.learning_rates[EPOCHS - rates :]
    assert without_times(metrics) == without_times(reference_metrics)
    assert parameters(trainer) == parameters(reference)


# Whole runs.


@every_workers
def test_every_epoch_is_the_samplers_own(whole, workers):
    trainer, metrics = whole
    if workers:
        trainer = Recorder()
        metrics = fit(trainer, loader_of(dataset_of(), workers, persistent_workers=True))
    assert without_losses(trainer.steps) == expected_steps()
    for epoch in range(EPOCHS):
        rows = [row for e, _, rows, _ in trainer.steps if e == epoch for row in rows]
        assert Counter(rows) == Counter(range(len(Rows())))
    losses = [loss for epoch, *_, loss in trainer.steps if epoch == EPOCHS - 1]
    assert metrics["train_err"] == sum(losses) / STEPS
    assert metrics["avg_loss"] == sum(losses) / len(Rows())


def test_the_rate_falls_in_these_runs(whole):
    # Else a resumed run would not show that the schedule and the sums of losses are restored.
    assert whole[0].learning_rates[-1] < whole[0].learning_rates[0]


def test_metrics_are_those_of_neuralops_trainer(whole):
    trainer = Trainer(model=gino(), n_epochs=EPOCHS, data_processor=PatchProcessor(grid()))
    # By itself it counts epochs right, where nothing is resumed.
    metrics = fit(trainer, loader_of(dataset_of()))
    assert without_times(metrics) == without_times(whole[1])
    assert [p.tolist() for p in trainer.model.parameters() if not p.is_complex()] == [
        p.tolist() for p in whole[0].model.parameters() if not p.is_complex()
    ]


# Stopped and resumed.


@every_workers
@pytest.mark.parametrize(
    ("stop_before", "save_every_batches", "resumed_at"),
    [
        (7, 3, 6),  # without the losses before, the rate would fall an epoch early
        (25, 4, 22),  # in mid-epoch, three batches after the last save
        pytest.param(23, 1, 23, marks=pytest.mark.slow("another place in mid-epoch")),
        (36, 5, 36),  # after the last batch of an epoch, which is evaluated once more
        (37, 100, 36),
        pytest.param(70, 17, 54, marks=pytest.mark.slow("another end of an epoch")),
    ],
)
def test_a_stopped_run_resumes_at_the_next_batch(
    tmp_path, whole, stop_before, save_every_batches, resumed_at, workers
):
    saving = {"save_every_batches": save_every_batches}
    stopped(tmp_path, stop_before, loader_of(dataset_of(), workers), **saving)
    resumed = resume(tmp_path, loader_of(dataset_of(), workers))
    assert_resumed(resumed, whole, resumed_at)


def test_a_resumed_run_resumes(tmp_path, whole):
    stopped(tmp_path, 25, save_every_batches=4)
    with pytest.raises(Stopped):
        resume(tmp_path, trainer={"stop_before": 8}, save_every_batches=3)
    assert_resumed(resume(tmp_path), whole, 30)


def test_after_an_epoch_the_next_one_comes(tmp_path, whole):
    stopped(tmp_path, 45, save_every=1)
    resumed = resume(tmp_path)
    assert_resumed(resumed, whole, 36)
    assert len(resumed[0].evaluated) == 2


def test_neuralop_can_load_what_is_saved_after_an_epoch(tmp_path, whole):
    trainer = Recorder()
    fit(trainer, loader_of(dataset_of()), save_every=3, save_dir=tmp_path)
    model = GINO.from_checkpoint(tmp_path, "model")
    assert [p.tolist() for p in model.parameters() if not p.is_complex()] == [
        p.tolist() for p in trainer.model.parameters() if not p.is_complex()
    ]


def test_a_finished_run(tmp_path, whole):
    fit(Recorder(), loader_of(dataset_of()), save_every_batches=100, save_dir=tmp_path)
    # The last epoch is evaluated once more.
    assert_resumed(resume(tmp_path), whole, STEPS * EPOCHS)
    fit(Recorder(), loader_of(dataset_of()), save_every=1, save_dir=tmp_path)
    with pytest.raises(ValueError, match=r"n_epochs must be > 4, .* has finished, got 4$"):
        resume(tmp_path)


@pytest.mark.slow("trains several times")
@pytest.mark.filterwarnings("ignore:.*set_vital")
def test_other_schedules_and_loaders(tmp_path):
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def schedule(optimizer):
        # Its state has a Counter.
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])

    def loader():
        return loader_of(dataset_of(), kind=stateful)

    reference = Recorder()
    metrics = fit(reference, loader(), schedule)
    assert len(set(reference.learning_rates)) == 3
    stopped(tmp_path, 25, loader(), schedule=schedule, save_every_batches=4)
    assert_resumed(resume(tmp_path, loader(), schedule=schedule), (reference, metrics), 22)


class Counting(torch.nn.Module):
    """A regularizer whose loss depends on how many batches there were before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.tensor(0.0))

    def reset(self) -> None:
        self.batches += 1

    @property
    def loss(self) -> torch.Tensor:
        return self.batches / 1000


@pytest.mark.slow("trains several times")
def test_a_regularizer_is_resumed(tmp_path):
    reference = Recorder()
    metrics = fit(reference, loader_of(dataset_of()), regularizer=Counting())
    counts = np.arange(3 * STEPS, 4 * STEPS) + 1
    assert metrics["avg_lasso_loss"] == pytest.approx(counts.sum() / 1000 / len(Rows()))
    stopped(tmp_path, 25, regularizer=Counting(), save_every_batches=4)
    assert_resumed(resume(tmp_path, regularizer=Counting()), (reference, metrics), 22)


class Scored(Recorder):
    """Evaluates to given numbers, one an epoch."""

    scores = (5.0, 2.0, 4.0, 3.0)

    def evaluate_all(self, *args, **settings):
        super().evaluate_all(*args, **settings)
        self._metrics = {"val_l2": self.scores[self.epoch]}
        return self._metrics


@pytest.mark.slow("trains several times")
def test_the_best_model_stays_the_best_over_a_resume(tmp_path):
    saving = {"save_best": "val_l2", "save_every_batches": 4, "save_dir": tmp_path}
    with pytest.raises(Stopped):
        fit(Scored(45), loader_of(dataset_of()), **saving)
    best = (tmp_path / "best_model_state_dict.pt").read_bytes()
    # Epochs 2 and 3 are better than nothing, and worse than epoch 1.
    trainer = Scored()
    fit(trainer, loader_of(dataset_of()), resume_from_dir=tmp_path, **saving)
    assert len(trainer.evaluated) == 2
    assert (tmp_path / "best_model_state_dict.pt").read_bytes() == best
    trainer = Scored()
    trainer.scores = (5.0, 2.0, 4.0, 1.0)
    fit(trainer, loader_of(dataset_of()), resume_from_dir=tmp_path, **saving)
    assert (tmp_path / "best_model_state_dict.pt").read_bytes() != best


def test_a_save_that_fails_leaves_the_last_one(tmp_path, whole, monkeypatch):
    save, saved = torch.save, []

    def failing(state, file):
        if len(saved) == 2:
            file.write(b"half of a file")
            raise OSError("disk is full")
        saved.append(save(state, file))

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="disk is full"):
        fit(Recorder(), loader_of(dataset_of()), save_every_batches=5, save_dir=tmp_path)
    monkeypatch.undo()
    assert_resumed(resume(tmp_path), whole, 10)


def test_a_planted_link_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_text("not yours")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "patch_trainer.pt.saving").symlink_to(tmp_path / "victim")
    with pytest.raises(PermissionError, match="a working file is a symbolic link"):
        fit(Recorder(), loader_of(dataset_of()), save_every_batches=5, save_dir=folder)
    assert (tmp_path / "victim").read_text() == "not yours"


@pytest.mark.slow("three processes that import neuralop")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_process(tmp_path, whole, workers):
    def run(kill_after: int):
        return run_python(SCRIPT, tmp_path, 5, workers, kill_after, check=False, timeout=300)

    assert run(30).returncode == -signal.SIGKILL
    # It resumes at batch 28, and is killed before batch 40.
    assert run(12).returncode == -signal.SIGKILL
    last = run(0)
    assert last.returncode == 0, last.stderr
    results = json.loads((tmp_path / "done.json").read_text())
    reference, metrics = whole
    assert results["steps"] == reference.steps[36:]
    assert results["parameters"] == parameters(reference)
    assert results["metrics"] == without_times(metrics)


@pytest.mark.slow("two processes that import neuralop")
def test_two_ranks_share_every_epoch(tmp_path):
    run_ranks(SCRIPT, 2, tmp_path)

    def left(name: str) -> list[dict]:
        return [json.loads((tmp_path / name / f"{rank}.json").read_text()) for rank in range(2)]

    ranks = left("whole")
    for epoch in range(2):
        steps = [[s for s in rank["steps"] if s[0] == epoch] for rank in ranks]
        drawn = [rows for step in zip(*steps, strict=True) for _, _, rows, _ in step]
        assert drawn == epoch_of(sampler_of(), epoch)
        losses = [loss for step in zip(*steps, strict=True) for *_, loss in step]
    for rank in ranks:
        # Metrics and learning rates are those of both ranks.
        assert rank["metrics"]["train_err"] == pytest.approx(sum(losses) / STEPS, rel=1e-12)
        assert rank["metrics"]["avg_loss"] == pytest.approx(sum(losses) / len(Rows()), rel=1e-12)
        assert rank["parameters"] == ranks[0]["parameters"]
    for rank, resumed in zip(ranks, left("resumed"), strict=True):
        # Stopped before step 15 of each rank, in epoch 1, saved after 9 + 4.
        assert resumed["steps"] == rank["steps"][13:]
        assert resumed["parameters"] == rank["parameters"]
        assert resumed["rates"] == rank["rates"][1:]
        for name in ("train_err", "avg_loss", "val_l2"):
            assert resumed["metrics"][name] == pytest.approx(rank["metrics"][name], rel=1e-12)
    # On one rank, which trains on all batches after the first 8 of epoch 1.
    trainer, metrics = resume(tmp_path / "stopped", trainer={"n_epochs": 2})
    assert without_losses(trainer.steps) == expected_steps([1])[8:]
    before = [step[3] for rank in ranks for step in rank["steps"][9:13]]
    after = [loss for *_, loss in trainer.steps]
    assert metrics["train_err"] == pytest.approx(sum(before + after) / STEPS, rel=1e-12)


# Other data and models.


def test_tensors_in_memory(tmp_path):
    ids = np.arange(90) % 4
    x = torch.linspace(-1, 1, 180).reshape(90, 2)
    y = x.sum(dim=1, keepdim=True)

    def trained(stop_before=None, **settings):
        torch.manual_seed(0)
        trainer = Linear(stop_before)
        optimizer = torch.optim.Adam(trainer.model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        loader = PatchTensorLoader(PatchBatchSampler(ids, 8, seed=1), x=x, y=y)
        settings |= {"training_loss": squares, "save_dir": tmp_path}
        trainer.train(loader, {}, optimizer, schedule, **settings)
        return trainer

    class Linear(Recorder):
        def __init__(self, stop_before):
            super().__init__(stop_before, model=Model(), data_processor=None)

        def train_one_batch(self, idx, sample, training_loss):
            return super().train_one_batch(
                idx, {**sample, "row": sample["x"].tolist()}, training_loss
            )

    def squares(output, y, **others):
        return (output - y).square().sum()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 1)

        def forward(self, x, y):
            return self.net(x)

    reference = trained()
    with pytest.raises(Stopped):
        trained(stop_before=17, save_every_batches=3)
    resumed = trained(resume_from_dir=tmp_path)
    assert resumed.steps == reference.steps[15:]
    assert parameters(resumed) == parameters(reference)


def test_the_arguments_of_a_gino_are_those_of_its_patch():
    dataset = dataset_of()
    batch = collate_fn([dataset[0], dataset[1]])
    before = dict(batch)
    inputs = PatchProcessor(grid()).preprocess(batch)
    assert batch == before
    assert list(inputs) == ["input_geom", "latent_queries", "output_queries", "x"]
    points = torch.cat([batch["core_coords"], batch["ghost_coords"]], dim=1)
    assert torch.equal(inputs["input_geom"], points)
    assert torch.equal(inputs["output_queries"], batch["core_coords"])
    core = batch["core_coords"].shape[1]
    # [B, N, Tin * C]: the channels of a point are its steps, and their columns.
    for step in range(6):
        columns = slice(3 * step, 3 * step + 3)
        assert torch.equal(inputs["x"][:, :core, columns], batch["core_in"][:, step])
        assert torch.equal(inputs["x"][:, core:, columns], batch["ghost_in"][:, step])
    assert torch.equal(inputs["y"], batch["core_out"][:, 0])
    with pytest.raises(KeyError, match="z"):
        inputs["z"]


def test_a_wrapped_model():
    batch = collate_fn([dataset_of()[0]])
    processor = PatchProcessor(grid())
    with pytest.raises(RuntimeError, match=r"wrap\(model\) must be called"):
        processor(**batch)
    model = gino()
    output, truth = processor.wrap(model)(**batch)
    assert torch.equal(output, model(**processor.preprocess(batch)))
    assert truth["y"].shape == output.shape


# What is refused.


@pytest.mark.parametrize(
    ("loader", "got"),
    [
        (lambda: DataLoader(Rows(), batch_size=2), "DataLoader with batch_sampler BatchSampler"),
        (lambda: [loader_of(dataset_of())], "list"),
    ],
)
def test_other_loaders_are_refused(loader, got):
    with pytest.raises(TypeError, match=rf"^PatchTrainer needs one .* got {got}$"):
        fit(Recorder(), loader())


@pytest.mark.parametrize(
    ("latent_queries", "error", "message"),
    [
        ([1.0], TypeError, "latent_queries must be a floating tensor, got list"),
        (torch.zeros(1, 2, 2, 2, 3, dtype=int), TypeError, "floating tensor, got torch.int64"),
        (torch.zeros(2, 2, 2, 3), ValueError, r"\(1, n1, n2, n3, 3\), got \(2, 2, 2, 3\)"),
        (torch.zeros(2, 2, 2, 2, 3), ValueError, r"n3, 3\), got \(2, 2, 2, 2, 3\)"),
        (torch.zeros(1, 2, 2, 2, 2), ValueError, r"n3, 3\), got \(1, 2, 2, 2, 2\)"),
    ],
)
def test_other_grids_are_refused(latent_queries, error, message):
    with pytest.raises(error, match=message):
        PatchProcessor(latent_queries)


def test_other_batches_are_refused():
    batch = collate_fn([dataset_of()[0], dataset_of()[1]])
    processor = PatchProcessor(grid())
    with pytest.raises(ValueError, match=r"lacks \['core_in', 'core_out'\]: pass DataLoader"):
        processor.preprocess({k: v for k, v in batch.items() if k not in ("core_in", "core_out")})
    default = torch.utils.data.default_collate([dataset_of()[0], dataset_of()[1]])
    with pytest.raises(ValueError, match="one copy of the points, got 2 copies: pass"):
        processor.preprocess(default)


def test_arguments_are_checked_before_training(tmp_path):
    loader = loader_of(dataset_of())
    for value, error in ((0, ValueError), (2.5, TypeError)):
        with pytest.raises(error, match="save_every_batches must be"):
            fit(Recorder(), loader, save_every_batches=value)
    for saving in ({"save_every": 1}, {"save_best": "val_l2"}):
        with pytest.raises(
            TypeError, match=r"need a model .* got Sequential: pass save_every_batch"
        ):
            fit(Recorder(model=torch.nn.Sequential(gino())), loader, **saving)
    with pytest.raises(FileNotFoundError, match=rf"resume_from_dir must have {STATE_FILE}, "):
        fit(Recorder(), loader, resume_from_dir=tmp_path)


def test_a_state_of_other_ids_is_refused(tmp_path):
    stopped(tmp_path, 5, save_every_batches=4)
    trainer = Recorder()
    before = parameters(trainer)
    dataset = dataset_of()
    loader = DataLoader(
        dataset, batch_sampler=PatchBatchSampler(dataset, 5, seed=5), collate_fn=collate_fn
    )
    with pytest.raises(ValueError, match="Cannot load state: batch_size"):
        fit(trainer, loader, resume_from_dir=tmp_path)
    assert parameters(trainer) == before


@pytest.mark.slow("imports neuralop in a process of its own")
def test_importing_leaves_warning_filters_alone():
    code = (
        "import warnings\n"
        "import gpusampler.neuralop\n"
        "assert all(action != 'once' for action, *_ in warnings.filters), warnings.filters"
    )
    run_python("-c", code)


# What neuralop does by itself, so that the page can say what is mended. Where one of these fails,
# neuralop has mended it.

by_itself = pytest.mark.skipif(neuralop_version != "2.0.0", reason="what neuralop 2.0.0 does")


@by_itself
def test_neuralop_wants_x_and_y():
    trainer = Trainer(model=gino(), n_epochs=1)
    with pytest.raises(KeyError, match=r"^'y'$"):
        fit(trainer, loader_of(dataset_of()))


class Plain(Recorder):
    """Neuralop's own trainer, that writes down what `Recorder` does."""

    train = Trainer.train
    train_one_epoch = Trainer.train_one_epoch
    checkpoint = Trainer.checkpoint
    resume_state_from_dir = Trainer.resume_state_from_dir


@pytest.mark.slow("trains several times")
@by_itself
def test_neuralop_repeats_the_saved_epoch_with_the_batches_of_epoch_0(tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        fit(Plain(45), loader_of(dataset_of()), save_every=1, save_dir=tmp_path)
    with pytest.raises(Exception, match="Weights only load failed"):
        fit(Plain(), loader_of(dataset_of()), resume_from_dir=tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trainer = Plain()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Environment variable TORCH_FORCE")
        fit(trainer, loader_of(dataset_of()), resume_from_dir=tmp_path)
    expected = [
        [epoch, i, rows]
        for epoch in (1, 2, 3)
        for i, rows in enumerate(epoch_of(sampler_of(), epoch - 1))
    ]
    assert without_losses(trainer.steps) == expected


@by_itself
def test_neuralop_divides_a_short_pass_by_the_full_length():
    loader = loader_of(dataset_of())
    sampler = loader.batch_sampler
    iterator = iter(sampler)
    for _ in range(8):
        next(iterator)
    loader.batch_sampler.load_state_dict(iterator.state_dict())
    trainer = Plain(n_epochs=1)
    metrics = fit(trainer, loader)
    losses = [loss for *_, loss in trainer.steps]
    assert len(losses) == STEPS - 8
    assert metrics["train_err"] == sum(losses) / STEPS
