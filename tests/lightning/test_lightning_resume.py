"""Lightning's checkpoints: a run that goes on from one equals a run that was never stopped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from support.strategies import epoch_of, through_json

pytest.importorskip("lightning")

import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import DataLoader

import lightning
from gpusampler import PatchBatchSampler
from gpusampler.lightning import ResumeSampler
from support.lightning_script import (
    EPOCHS,
    NOISE,
    STEPS,
    Data,
    Recorder,
    Recording,
    Scheduled,
    Validated,
    checkpointer,
    checkpoints_of,
    loader_of,
    sampler_of,
    trainer_of,
)

pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in NOISE]
with_workers = pytest.mark.slow("a second for the workers of each run")
every_workers = pytest.mark.parametrize("workers", [0, pytest.param(2, marks=with_workers)])


def kind_of(name: str) -> type:
    if name == "plain":
        return DataLoader
    return pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader


def fitted(
    folder: Path,
    checkpoint: Path | None = None,
    *callbacks,
    model: type = Recorder,
    workers: int = 0,
    kind: str = "plain",
    keep: tuple = (("every_n_train_steps", 1),),
    resume: bool = True,
    hooks: bool = False,
    explode_at: int | None = None,
    **settings,
) -> Recorder:
    """The module after a run with a sampler, a loader and a trainer of its own."""
    module = model(explode_at)
    callbacks = (*callbacks, checkpointer(folder, **dict(keep)), *[ResumeSampler()] * resume)
    trainer = trainer_of(folder, *callbacks, num_sanity_val_steps=0, **settings)
    if hooks:
        trainer.fit(module, datamodule=Data(workers), ckpt_path=checkpoint)
        return module
    loaders = [loader_of(sampler_of(), workers, kind_of(kind))]
    if model is Validated:
        loaders.append(loader_of(sampler_of(seed=2), workers))
    trainer.fit(module, *loaders, ckpt_path=checkpoint)
    return module


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs that were not stopped, each made once: (module, checkpoints by steps before them)."""

    @cache
    def made(**settings):
        folder = tmp_path_factory.mktemp("whole")
        recorder = fitted(folder, **settings)
        batches = settings.get("limit_train_batches", STEPS)
        accumulate = settings.get("accumulate_grad_batches", 1)
        checkpoints = {}
        for step, path in checkpoints_of(folder).items():
            epochs, steps = divmod(step, -(-batches // accumulate))
            checkpoints[epochs * batches + min(steps * accumulate, batches)] = path
        return recorder, checkpoints

    return made


def assert_goes_on(resumed: Recorder, uninterrupted: Recorder, steps_done: int) -> None:
    """The same batches by the same numbers, the same losses; epochs and validation between them."""
    assert resumed.trained == uninterrupted.trained[steps_done:]
    entries = resumed.log_of_run
    assert entries == uninterrupted.log_of_run[len(uninterrupted.log_of_run) - len(entries) :]


# The middle, the last but one and the end of an epoch, and of one that begins after it.
@pytest.mark.parametrize("done", [2, 6, 12, 13, 15, 25])
@pytest.mark.parametrize(
    "accumulate", [1, pytest.param(2, marks=pytest.mark.slow("12 more runs of Lightning"))]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_equals_never_having_stopped(tmp_path, uninterrupted, workers, accumulate, done):
    settings = {"workers": workers, "accumulate_grad_batches": accumulate}
    reference, checkpoints = uninterrupted(**settings)
    assert len(reference.trained) == EPOCHS * STEPS
    assert_goes_on(fitted(tmp_path, checkpoints[done], **settings), reference, done)


WAYS = {
    "after the first batch": ({}, [1, 14]),
    "with torchdata": ({"kind": "stateful"}, [6, 13]),
    "at the end of epochs": ({"keep": (("every_n_epochs", 1),), "max_epochs": 3}, [13, 26]),
    "before validation": ({"model": Validated}, [6, 13]),
    "after validation": (
        {
            "model": Validated,
            "val_check_interval": 5,
            "keep": (("every_n_epochs", 1), ("save_on_train_epoch_end", False)),
        },
        [5, 10],
    ),
    "after validation at the end": (
        {
            "model": Validated,
            "keep": (("every_n_epochs", 1), ("save_on_train_epoch_end", False)),
        },
        [13],
    ),
    "in epochs that are cut short": ({"limit_train_batches": 5}, [3, 5, 8]),
    "with new loaders": ({"reload_dataloaders_every_n_epochs": 1}, [6, 13, 20]),
    "with new loaders at the end of epochs": (
        {"reload_dataloaders_every_n_epochs": 1, "keep": (("every_n_epochs", 1),)},
        [13],
    ),
    "with new samplers": (
        {"reload_dataloaders_every_n_epochs": 1, "hooks": True, "model": Validated},
        [6, 13],
    ),
    "before max_steps": ({"max_steps": 20}, [6, 13, 18]),
    "before max_steps at the end of epochs": (
        {"max_steps": 20, "keep": (("every_n_epochs", 1),)},
        [13],
    ),
    "where the schedule asks for the steps": ({"model": Scheduled}, [6, 13]),
    "where the schedule asks, with torchdata": ({"model": Scheduled, "kind": "stateful"}, [6, 13]),
}


@every_workers
@pytest.mark.parametrize("way", WAYS)
def test_going_on_whatever_saved_and_whatever_is_set(tmp_path, uninterrupted, way, workers):
    settings, stops = WAYS[way]
    settings = {"workers": workers, **settings}
    reference, checkpoints = uninterrupted(**settings)
    for done in stops:
        resumed = fitted(tmp_path / str(done), checkpoints[done], **settings)
        assert_goes_on(resumed, reference, done)


@every_workers
@pytest.mark.parametrize("stops", [[3, 5, 12], [5, 13, 20], [12, 13, 14], [13, 26, 27, 30]])
def test_going_on_again_and_again(tmp_path, uninterrupted, workers, stops):
    settings = {"workers": workers, "max_epochs": 3}
    reference, _ = uninterrupted(**settings)
    trained, checkpoint = [], None
    for number, stop in enumerate([*stops, -1]):
        folder = tmp_path / str(number)
        run = fitted(folder, checkpoint, max_steps=stop, **settings)
        trained += run.trained
        checkpoint = checkpoints_of(folder).get(stop)
    assert trained == reference.trained


@pytest.mark.filterwarnings("ignore:`?.fit.ckpt_path=")
@every_workers
@pytest.mark.parametrize("at", [5, 13, 14])
def test_going_on_after_an_error(tmp_path, uninterrupted, workers, at):
    reference, _ = uninterrupted(workers=workers)
    crashed = tmp_path / "crashed.ckpt"
    model = Recorder(explode_at=at)
    trainer = trainer_of(
        tmp_path,
        OnExceptionCheckpoint(tmp_path, "crashed"),
        ResumeSampler(),
        enable_checkpointing=True,
    )
    with pytest.raises(RuntimeError, match="exploded"):
        trainer.fit(model, loader_of(sampler_of(), workers))
    assert_goes_on(fitted(tmp_path, crashed, workers=workers), reference, at)


class AtTheStart(lightning.Callback):
    """Saves a checkpoint whenever an epoch begins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        trainer.save_checkpoint(self.folder / f"start-{trainer.current_epoch}.ckpt")


@every_workers
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"limit_train_batches": 5}, {"model": Validated}])
def test_going_on_from_the_start_of_an_epoch(tmp_path, uninterrupted, settings, first, workers):
    settings = {"workers": workers, **settings}
    reference, _ = uninterrupted(**settings)
    saving = AtTheStart(tmp_path)
    # It may save before the callback has noted the epoch, or after.
    order = (saving, ResumeSampler()) if first else (ResumeSampler(), saving)
    fitted(tmp_path / "whole", None, *order, resume=False, **settings)
    for epoch in range(EPOCHS):
        steps_done = epoch * settings.get("limit_train_batches", STEPS)
        checkpoint = tmp_path / f"start-{epoch}.ckpt"
        assert_goes_on(fitted(tmp_path / str(epoch), checkpoint, **settings), reference, steps_done)


def test_a_new_run_of_the_same_trainer_does_not_go_on(tmp_path, uninterrupted):
    _, checkpoints = uninterrupted(model=Validated, workers=0)
    trainer = trainer_of(tmp_path, ResumeSampler(), num_sanity_val_steps=0)
    model, sampler = Validated(), sampler_of()
    trainer.validate(model, loader_of(sampler), ckpt_path=checkpoints[6], verbose=False)
    trainer.fit(model, loader_of(sampler), loader_of(sampler_of()))
    assert [step[:3] for step in model.trained] == [
        [e, i, rows] for e in range(EPOCHS) for i, rows in enumerate(epoch_of(sampler, e))
    ]


def test_what_is_saved_is_the_samplers_state(uninterrupted):
    _, checkpoints = uninterrupted(workers=2, accumulate_grad_batches=1)
    for steps_done, path in checkpoints.items():
        saved = torch.load(path, weights_only=True)["callbacks"]["ResumeSampler"]["sampler"]
        sampler = sampler_of()
        sampler.set_epoch((steps_done - 1) // STEPS)
        assert through_json(saved) == saved == sampler.state_dict(step=(steps_done - 1) % STEPS + 1)


def test_other_ids_are_refused(tmp_path, uninterrupted):
    _, checkpoints = uninterrupted(workers=0, accumulate_grad_batches=1)
    other = PatchBatchSampler(np.arange(90) % 4, 8, seed=1)
    trainer = trainer_of(tmp_path, ResumeSampler())
    with pytest.raises(ValueError, match="Cannot load state: hash of ids is"):
        trainer.fit(Recorder(), loader_of(other), ckpt_path=checkpoints[6])


@pytest.mark.parametrize(
    ("loaders", "got"),
    [
        (lambda: DataLoader(range(8), batch_size=2), "DataLoader with batch_sampler BatchSampler"),
        (lambda: [loader_of(sampler_of()), loader_of(sampler_of())], "list"),
    ],
)
def test_other_loaders_are_refused(tmp_path, loaders, got):
    trainer = trainer_of(tmp_path, ResumeSampler())
    with pytest.raises(TypeError, match=rf"ResumeSampler needs one training loader, .* got {got}$"):
        trainer.fit(Recorder(), loaders())


@pytest.mark.slow("five more runs, with workers")
def test_the_package_by_its_other_name_goes_on_too(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Other(Recording, other.LightningModule):
        pass

    def trained(folder, checkpoint=None):
        module = Other()
        keep = other.callbacks.ModelCheckpoint(
            folder, "{step}", save_top_k=-1, every_n_train_steps=1
        )
        trainer = other.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[keep, ResumeSampler()],
        )
        trainer.fit(module, loader_of(sampler_of(), 2), ckpt_path=checkpoint)
        return module.trained

    uninterrupted = trained(tmp_path / "whole")
    for steps_done, checkpoint in checkpoints_of(tmp_path / "whole").items():
        if steps_done in (1, 6, 13, 14):
            assert trained(tmp_path / str(steps_done), checkpoint) == uninterrupted[steps_done:]


# What Lightning does by itself, so that the page can say what the callback is for. Where one of
# these fails, Lightning has learnt it.

by_itself = pytest.mark.skipif(
    not lightning.__version__.startswith("2.6."), reason="what Lightning 2.6 does by itself"
)


def rows_of(trained) -> list[list[int]]:
    return [rows for _, _, rows, _ in trained]


@by_itself
def test_lightning_begins_the_epoch_again_in_the_middle(tmp_path, uninterrupted):
    _, checkpoints = uninterrupted(workers=0, accumulate_grad_batches=1)
    with pytest.warns(UserWarning, match="your dataloader is not resumable"):
        resumed = fitted(tmp_path, checkpoints[6], resume=False)
    expected = epoch_of(sampler_of(), 0)[: STEPS - 6] + epoch_of(sampler_of(), 1)
    assert rows_of(resumed.trained) == expected


@by_itself
def test_lightning_hands_out_epoch_0_again_at_the_end_of_epochs_with_workers(
    tmp_path, uninterrupted
):
    keep = (("every_n_epochs", 1),)
    _, checkpoints = uninterrupted(workers=2, keep=keep, max_epochs=3)
    resumed = fitted(tmp_path, checkpoints[STEPS], workers=2, keep=keep, max_epochs=3, resume=False)
    expected = [epoch_of(sampler_of(), epoch) for epoch in (0, 2)]
    assert rows_of(resumed.trained) == expected[0] + expected[1]


@by_itself
def test_lightning_loses_an_epoch_with_torchdata_at_the_last_batch(tmp_path, uninterrupted):
    settings = {"workers": 0, "kind": "stateful"}
    _, checkpoints = uninterrupted(**settings)
    assert fitted(tmp_path, checkpoints[STEPS], resume=False, **settings).trained == []


@by_itself
def test_lightning_forgets_torchdatas_place_where_the_schedule_asks(tmp_path, uninterrupted):
    settings = {"workers": 0, "kind": "stateful", "model": Scheduled}
    _, checkpoints = uninterrupted(**settings)
    resumed = fitted(tmp_path, checkpoints[6], resume=False, **settings)
    expected = epoch_of(sampler_of(), 0)[: STEPS - 6] + epoch_of(sampler_of(), 1)
    assert rows_of(resumed.trained) == expected
