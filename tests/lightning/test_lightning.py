"""Lightning's Trainer: what it hands a model from our sampler, on one process and on two ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from support.paths import ROOT
from support.processes import environment
from support.strategies import epoch_of, quiet, times_seen

pytest.importorskip("lightning")

import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.tuner import Tuner

from gpusampler.lightning import ResumeSampler
from support import lightning_script
from support.lightning_script import (
    EPOCHS,
    FROM_ONE_RANK,
    IDS,
    NOISE,
    STEPS,
    Data,
    Recorder,
    Scheduled,
    Validated,
    checkpointer,
    checkpoints_of,
    loader_of,
    sampler_of,
    trainer_of,
)

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE]
on_two_ranks = pytest.mark.slow("two processes that import Lightning, and train a dozen times")
with_workers = pytest.mark.slow("a second for the workers of each run")
every_workers = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=with_workers)])


def steps_of(sampler, epochs=range(EPOCHS)) -> list[list]:
    """Epoch, batch_idx and rows of every step that one rank should train."""
    return [[e, i, rows] for e in epochs for i, rows in enumerate(epoch_of(sampler, e))]


def steps_in(model) -> list[list]:
    return [step[:3] for step in model.trained]


# One process.


@pytest.mark.parametrize("reload", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_is_the_samplers_own(tmp_path, workers, reload):
    model, sampler = Recorder(), sampler_of()
    trainer = trainer_of(
        tmp_path,
        max_epochs=3,
        reload_dataloaders_every_n_epochs=reload,
        use_distributed_sampler=True,  # the default; it does nothing on one device
    )
    trainer.fit(model, loader_of(sampler, workers))
    assert steps_in(model) == steps_of(sampler, range(3))
    for epoch in range(3):
        epoch_rows = [rows for e, _, rows, _ in model.trained if e == epoch]
        assert len(epoch_rows) == len(sampler) == STEPS
        assert sorted(chain.from_iterable(epoch_rows)) == list(range(IDS.size))


@pytest.mark.parametrize("partial", ["drop", "pad"])
def test_an_epoch_covers_what_the_sampler_says(tmp_path, partial):
    model, sampler = Recorder(), quiet(IDS, 8, seed=1, partial=partial)
    trainer_of(tmp_path, max_epochs=1).fit(model, loader_of(sampler))
    times = times_seen([rows for _, _, rows, _ in model.trained], IDS.size)
    coverage = sampler.coverage(0).totals()
    assert (times == 1).sum() == coverage["seen_once"]
    assert (times > 1).sum() == coverage["repeated"]
    assert (times == 0).sum() == coverage["missed"]
    assert coverage["seen_once"] < IDS.size


def test_set_epoch_reaches_the_sampler(tmp_path):
    model, sampler = Recorder(), sampler_of()
    for _ in range(5):
        list(sampler)
    trainer_of(tmp_path).fit(model, loader_of(sampler))
    assert steps_in(model) == steps_of(sampler)


@every_workers
def test_validation_has_the_epoch_of_training(tmp_path, workers):
    model, sampler, other = Validated(), sampler_of(), sampler_of(seed=2)
    trainer = trainer_of(tmp_path, num_sanity_val_steps=2)
    trainer.fit(model, loader_of(sampler, workers), loader_of(other, workers))
    assert steps_in(model) == steps_of(sampler)
    sanity = [["sanity", rows] for rows in epoch_of(other, 0)[:2]]
    assert model.validated == sanity + [[e, rows] for e, _, rows in steps_of(other)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("ranks", "steps"), [(1, STEPS), (2, 7)])
def test_lightning_knows_the_number_of_steps(tmp_path, ranks, steps, accumulate):
    model, sampler = Scheduled(), sampler_of(num_replicas=ranks, rank=0)
    trainer = trainer_of(tmp_path, accumulate_grad_batches=accumulate)
    trainer.fit(model, loader_of(sampler))
    assert len(sampler) == trainer.num_training_batches == steps
    assert model.steps == trainer.global_step == EPOCHS * -(-steps // accumulate)


def test_overfit_batches_takes_the_first_batches_of_every_epoch(tmp_path):
    # Not the same ones again and again, unless nothing is shuffled.
    model, sampler = Recorder(), sampler_of()
    trainer_of(tmp_path, overfit_batches=2).fit(model, loader_of(sampler))
    assert steps_in(model) == [step for step in steps_of(sampler) if step[1] < 2]
    model, sampler = Recorder(), sampler_of(shuffle_within_batches=False, shuffle_patches=False)
    trainer_of(tmp_path, overfit_batches=2).fit(model, loader_of(sampler))
    assert [rows for _, _, rows in steps_in(model)] == epoch_of(sampler, 0)[:2] * 2


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_validate_and_test_take_the_epoch_that_training_has_reached(tmp_path):
    model, sampler, other = Validated(), sampler_of(), sampler_of(seed=2)
    trainer = trainer_of(tmp_path)
    trainer.fit(model, loader_of(sampler))
    for evaluate, epoch in ((trainer.test, EPOCHS), (trainer_of(tmp_path).validate, 0)):
        model.log_of_run.clear()
        evaluate(model, loader_of(other), verbose=False)
        assert [rows for _, rows in model.validated] == epoch_of(other, epoch)


class Writer(BasePredictionWriter):
    def __init__(self):
        super().__init__("batch_and_epoch")
        self.by_batch = []

    def write_on_batch_end(self, trainer, model, prediction, indices, *batch):
        self.by_batch.append((indices, prediction))

    def write_on_epoch_end(self, trainer, model, predictions, indices):
        self.by_epoch = (indices, predictions)


@every_workers
def test_predictions_come_batch_by_batch_with_their_rows(tmp_path, workers):
    writer, sampler = Writer(), sampler_of()
    with pytest.warns(UserWarning, match="custom batch sampler `PatchBatchSampler` for prediction"):
        predicted = trainer_of(tmp_path, writer).predict(Recorder(), loader_of(sampler, workers))
    assert predicted == epoch_of(sampler, 0)
    assert writer.by_batch == [(rows, rows) for rows in predicted]
    assert writer.by_epoch == ([predicted], predicted)


class Sized(Data):
    batch_size = 2

    def train_dataloader(self):
        return loader_of(sampler_of(batch_size=self.batch_size), self.workers)


@pytest.mark.filterwarnings("ignore:.*validation_step")
@every_workers
@pytest.mark.slow("tries three sizes, with a checkpoint each")
def test_the_batch_size_finder_finds_and_the_run_begins_at_its_start(tmp_path, workers):
    class NoValidation(Sized):
        val_dataloader = Data.__base__.val_dataloader

    model, data = Recorder(), NoValidation(workers)
    trainer = trainer_of(tmp_path, ResumeSampler())
    batch_size = Tuner(trainer).scale_batch_size(
        model, datamodule=data, max_trials=3, steps_per_trial=2
    )
    assert batch_size == data.batch_size > 2
    assert {len(rows) for _, _, rows, _ in model.trained} >= {2, 4}
    model.log_of_run.clear()
    trainer.fit(model, datamodule=data)
    assert steps_in(model) == steps_of(sampler_of(batch_size=batch_size))


@every_workers
def test_a_sampler_of_another_run_begins_anew(tmp_path, workers):
    # Workers draw before Lightning says which epoch it is in.
    model, sampler = Recorder(), sampler_of()
    loader = loader_of(sampler, workers)
    trainer_of(tmp_path).fit(Recorder(), loader)
    trainer_of(tmp_path, ResumeSampler()).fit(model, loader)
    assert steps_in(model) == steps_of(sampler)


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_draw_ahead_of_a_rank_within_its_share(tmp_path, rank):
    model, sampler = Recorder(), sampler_of(num_replicas=2, rank=rank)
    trainer_of(tmp_path, max_epochs=3).fit(model, loader_of(sampler, 2))
    shares = [shared(epoch_of(sampler, epoch)) for epoch in range(3)]
    assert [rows for *_, rows in steps_in(model)] == [
        step[rank] for epoch in shares for step in epoch
    ]


def test_fabric_hands_out_every_epoch_but_counts_from_0():
    fabric = Fabric(accelerator="cpu", devices=1)
    sampler, resumed = sampler_of(), sampler_of()
    loader = fabric.setup_dataloaders(loader_of(sampler))
    for epoch in range(2):
        assert [rows.tolist() for _, rows, _ in loader] == epoch_of(sampler, epoch)
    first_rows = [rows.tolist() for (_, rows, _), _ in zip(loader, range(4), strict=False)]
    state = sampler.state_dict(step=4)

    resumed.load_state_dict(state)
    with pytest.warns(
        UserWarning, match=r"set_epoch\(0\) drops the loaded position: epoch 2, slot 4"
    ):
        resumed_rows = [
            rows.tolist() for _, rows, _ in fabric.setup_dataloaders(loader_of(resumed))
        ]
    assert resumed_rows == epoch_of(sampler, 0)

    resumed.load_state_dict(state)
    batches = map(fabric.to_device, loader_of(resumed))
    assert first_rows + [rows.tolist() for _, rows, _ in batches] == epoch_of(sampler, 2)


@pytest.mark.filterwarnings("ignore")
def test_the_page_trains_goes_on_and_predicts(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "how-to" / "lightning.md").read_text()
    fit, predict, _ = re.findall(r"^```py\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    fit = fit.replace("x, patch = batch\n", "x, patch = batch; steps.append(batch_idx)\n")
    global_step = 0
    for epochs in (3, 4):
        names = {"__name__": "page", "steps": []}
        exec(fit.replace("max_epochs=3", f"max_epochs={epochs}"), names)
        assert len(names["steps"]) == epochs * 28 - global_step
        global_step = torch.load("checkpoints/last.ckpt", weights_only=True)["global_step"]
        assert global_step
    exec(predict, names)


# Two ranks, in processes of their own.


def run(*arguments) -> None:
    """Run the script; whatever it started ends with it, and says where it hung if it did."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", lightning_script.__file__, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=environment(PYTHONFAULTHANDLER="1"),
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        output, _ = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    trainer = trainer_of(folder, checkpointer(folder), ResumeSampler(), num_sanity_val_steps=0)
    trainer.fit(Validated(), datamodule=Data())
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, one_rank):
    folder = tmp_path_factory.mktemp("two")
    run(folder, one_rank)
    return folder


def left_by(folder: Path) -> list:
    """What each of two ranks has left of a job."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def shared(batches: list[list[int]], start: int = 0, ranks: int = 2) -> list[list[list[int]]]:
    """The batches of an epoch from a slot on, by step and rank; the last step is filled up."""
    steps = -(-(len(batches) - start) // ranks)
    slots = start + np.arange(steps * ranks).reshape(steps, ranks)
    return [[batches[slot % len(batches)] for slot in step] for step in slots]


def together(logs: list[list[list]]) -> list[tuple]:
    """What ranks wrote down side by side: (kind, epoch, the rows of each)."""
    entries_by_step = []
    for entries in zip(*logs, strict=True):
        ((kind, epoch),) = {tuple(entry[:2]) for entry in entries}
        if kind != "epoch":
            entries_by_step.append(
                (kind, epoch, [entry[3 if kind == "train" else 2] for entry in entries])
            )
    return entries_by_step


def expected_from(start: int, ranks: int) -> list[tuple]:
    """What `together` is when training goes on at a slot of epoch 0, to the end of epoch 1."""
    sampler = sampler_of(num_replicas=1, rank=0)
    entries = []
    for epoch, slot in ((0, start), (1, 0)):
        trained = shared(epoch_of(sampler, epoch), slot, ranks)
        # An epoch that had ended before is not validated again.
        validated = shared(epoch_of(sampler, epoch), 0, ranks) if trained else []
        entries += [("train", epoch, step) for step in trained]
        entries += [("validate", epoch, step) for step in validated]
    return entries


@on_two_ranks
def test_two_ranks_share_every_epoch(two_ranks):
    logs = left_by(two_ranks / "whole")
    assert together(logs) == expected_from(0, 2)
    for epoch in range(EPOCHS):
        rows = [e[3] for log in logs for e in log if e[:2] == ["train", epoch]]
        assert times_seen(rows, IDS.size).min() == 1


@on_two_ranks
def test_two_ranks_resume_as_if_never_stopped(two_ranks):
    for uninterrupted, resumed in zip(
        left_by(two_ranks / "whole"), left_by(two_ranks / "middle"), strict=True
    ):
        # The first entry says that epoch 0 begins. Losses are compared too.
        assert resumed == uninterrupted[1 + 3 :]


@pytest.mark.parametrize("steps", FROM_ONE_RANK)
@on_two_ranks
def test_two_ranks_go_on_after_one(two_ranks, steps):
    assert together(left_by(two_ranks / f"after {steps} of one")) == expected_from(steps, 2)


@every_workers
@pytest.mark.parametrize("steps", [1, 3, 6, 7])
@on_two_ranks
def test_one_rank_goes_on_after_two(tmp_path, two_ranks, steps, workers):
    model = Validated()
    checkpoint = checkpoints_of(two_ranks / "whole")[steps]
    trainer = trainer_of(tmp_path, ResumeSampler(), num_sanity_val_steps=0)
    trainer.fit(model, datamodule=Data(workers), ckpt_path=checkpoint)
    assert together([model.log_of_run]) == expected_from(min(2 * steps, STEPS), 1)


@on_two_ranks
def test_a_sampler_made_before_the_ranks_gives_each_of_them_everything(two_ranks):
    for log in left_by(two_ranks / "alone"):
        assert [entry[1:4] for entry in log if entry[0] == "train"] == steps_of(sampler_of())


@pytest.mark.parametrize("what", ["fit", "validate"])
@on_two_ranks
def test_lightnings_own_sampler_is_refused_on_ranks(two_ranks, what):
    for said in left_by(two_ranks / f"{what} refused"):
        assert "can't inject a (distributed) sampler into your batch sampler" in said
        assert "set `Trainer(use_distributed_sampler=False)`" in said


@on_two_ranks
def test_ranks_share_predictions(two_ranks):
    # Lightning refuses nothing here, and puts no sampler of its own in.
    by_rank = left_by(two_ranks / "predicted")
    assert [list(step) for step in zip(*by_rank, strict=True)] == shared(epoch_of(sampler_of(), 0))
    assert left_by(two_ranks / "predicted alone") == [epoch_of(sampler_of(), 0)] * 2


@on_two_ranks
def test_ranks_that_are_forked_share_every_epoch(tmp_path):
    run(tmp_path)
    expected = [entry for entry in expected_from(0, 2) if entry[0] == "train"]
    assert together(left_by(tmp_path)) == expected
