"""transformers' Trainer, run for real: one process, and two that share epochs out."""

from __future__ import annotations

import inspect
import json
from itertools import chain

import numpy as np
import pytest

from support.paths import ROOT, SUPPORT
from support.processes import run_ranks
from support.strategies import epoch_of

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from gpusampler import PatchBatchSampler
from support.hf_trainer_script import (
    EPOCHS,
    IDS,
    SEED,
    PatchTrainer,
    PreparedTrainer,
    Rows,
    SaveSampler,
    TellEpoch,
    Tiny,
    Untold,
    record_of,
    trainer_of,
)

SCRIPT = SUPPORT / "hf_trainer_script.py"
PAGE = ROOT / "docs" / "how-to" / "accelerate.md"


def whole(epoch=0, batch_size=4, partial="keep", seed=SEED, **settings) -> list[list[int]]:
    """An epoch's batches, over all processes."""
    sampler = PatchBatchSampler(
        IDS, batch_size, seed=seed, partial=partial, num_replicas=1, rank=0, **settings
    )
    return epoch_of(sampler, epoch)


def epochs_of(batch_size=4) -> list[list[int]]:
    return list(chain.from_iterable(whole(epoch, batch_size) for epoch in range(EPOCHS)))


on_two_processes = pytest.mark.slow("two processes that import transformers, and train ten times")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="each step"),
        pytest.param(2, id="two accumulated", marks=pytest.mark.slow("a dozen more trainings")),
    ],
)
def straight(request, tmp_path_factory):
    """A run that never stopped, with a checkpoint of every step: how often, where, what."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = trainer_of(folder, gradient_accumulation_steps=request.param)
    trainer.train()
    return request.param, folder, trainer


def test_epochs_are_the_samplers(straight):
    _, _, trainer = straight
    assert trainer.model.seen == epochs_of()
    assert len(whole()) == 11  # which two do not divide


def test_steps_and_epochs_are_counted_by_the_samplers_length(straight):
    every, _, trainer = straight
    steps = -(-len(trainer.train_sampler) // every)
    assert trainer.state.max_steps == EPOCHS * steps
    assert trainer.state.global_step == EPOCHS * steps
    assert trainer.state.num_train_epochs == EPOCHS
    assert trainer.state.epoch == EPOCHS


@pytest.mark.parametrize("place", ["first", "middle", "last but one", "end", "next", "last"])
def test_a_resumed_run_equals_one_that_never_stopped(straight, place, tmp_path):
    every, folder, trainer = straight
    steps = -(-11 // every)
    position = {
        "first": 1,
        "middle": steps + 3,
        "last but one": 2 * steps - 1,
        "end": 2 * steps,
        "next": 2 * steps + 1,
        "last": 3 * steps - 1,
    }[place]
    resumed = trainer_of(tmp_path, gradient_accumulation_steps=every, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{position}"))
    epoch, step = divmod(position, steps)
    done = epoch * 11 + step * every
    expected = record_of(trainer)
    assert record_of(resumed) == {
        **expected,
        "seen": expected["seen"][done:],
        "losses": expected["losses"][done:],
    }


def test_a_run_ends_after_max_steps(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=15, num_train_epochs=1, save_strategy="no")
    trainer.train()
    assert trainer.model.seen == epochs_of()[:15]


@pytest.mark.slow("more trainings")
def test_workers_ahead_change_nothing(straight, tmp_path):
    every, folder, trainer = straight
    resumed = trainer_of(
        tmp_path,
        gradient_accumulation_steps=every,
        save_strategy="no",
        dataloader_num_workers=1,
    )
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert resumed.model.seen == epochs_of()[3 * every :]
    assert resumed.losses == trainer.losses[3 * every :]


def test_training_again_begins_with_epoch_0(tmp_path):
    trainer = trainer_of(tmp_path, num_train_epochs=1, save_strategy="no")
    trainer.train()
    trainer.train()
    assert trainer.model.seen == whole(0) * 2


@pytest.mark.slow("more trainings")
def test_a_run_that_is_not_told_its_epoch_repeats_the_first(straight, tmp_path):
    every, folder, _ = straight
    steps = -(-11 // every)
    at_the_end = trainer_of(tmp_path, Untold, gradient_accumulation_steps=every, save_strategy="no")
    at_the_end.train(resume_from_checkpoint=str(folder / f"checkpoint-{2 * steps}"))
    assert at_the_end.model.seen == whole(0)
    # In the middle Trainer tells it what it skips batches of.
    middle = trainer_of(tmp_path, Untold, gradient_accumulation_steps=every, save_strategy="no")
    middle.train(resume_from_checkpoint=str(folder / f"checkpoint-{2 * steps + 1}"))
    assert middle.model.seen == whole(2)[every:]


def saving(folder, **settings):
    """A trainer that does not skip batches: the sampler's state is in the checkpoints."""
    trainer = trainer_of(folder, ignore_data_skip=True, **settings)
    trainer.pop_callback(TellEpoch)
    trainer.add_callback(SaveSampler(trainer.train_sampler))
    return trainer


def resumed_by_state(folder, position, out, **settings):
    trainer = saving(out, **settings)
    checkpoint = folder / f"checkpoint-{position}"
    trainer.train_sampler.load_state_dict(json.loads((checkpoint / "sampler.json").read_text()))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


# 11 batches of 4 at most, 8 of 5; a worker draws ahead, so that what is saved must be counted.
@pytest.mark.parametrize(
    ("batch_size", "every", "steps", "workers"),
    [
        pytest.param(4, 1, 11, 0, marks=pytest.mark.slow("eight more trainings")),
        pytest.param(5, 2, 4, 0, marks=pytest.mark.slow("eight more trainings")),
        pytest.param(5, 2, 4, 1, marks=pytest.mark.slow("eight more trainings, with workers")),
    ],
)
def test_a_run_resumes_by_the_samplers_state(batch_size, every, steps, workers, tmp_path):
    settings = {
        "batch_size": batch_size,
        "gradient_accumulation_steps": every,
        "dataloader_num_workers": workers,
    }
    trainer = saving(tmp_path / "straight", **settings)
    trainer.train()
    assert trainer.model.seen == epochs_of(batch_size)
    expected = record_of(trainer)
    assert expected["steps"] == EPOCHS * steps
    for position in (1, steps + 2, 2 * steps - 1, 2 * steps, 2 * steps + 1, 3 * steps - 1):
        again = tmp_path / f"from {position}"
        resumed = resumed_by_state(tmp_path / "straight", position, again, **settings)
        assert record_of(resumed) == {
            **expected,
            "seen": expected["seen"][position * every :],
            "losses": expected["losses"][position * every :],
        }
    # And from a checkpoint of a run that was resumed itself, in the middle of the same epoch.
    twice = resumed_by_state(again.parent / "from 1", 3, tmp_path / "twice", **settings)
    assert twice.model.seen == expected["seen"][3 * every :]
    assert twice.losses == expected["losses"][3 * every :]


@pytest.mark.slow("more trainings")
def test_not_skipping_loses_a_step_where_the_accumulation_does_not_divide_the_epoch(tmp_path):
    trainer = saving(tmp_path / "straight", gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.state.global_step == EPOCHS * 6
    resumed = resumed_by_state(
        tmp_path / "straight", 7, tmp_path / "again", gradient_accumulation_steps=2
    )
    # The batches are right, but nobody counts the short step at the end of that epoch.
    assert resumed.model.seen == epochs_of()[13:]
    assert resumed.state.global_step == EPOCHS * 6 - 1


@pytest.mark.slow("more trainings")
def test_not_skipping_must_not_be_told_the_epoch(tmp_path):
    saving(tmp_path / "straight").train()
    state = json.loads((tmp_path / "straight" / "checkpoint-14" / "sampler.json").read_text())
    trainer = trainer_of(tmp_path / "again", ignore_data_skip=True, save_strategy="no")
    trainer.train_sampler.load_state_dict(state)
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-14"))
    # Trainer counts the rest of epoch 1 from its beginning, and is in epoch 1 when it is over.
    assert trainer.model.seen == whole(1)[3:] + whole(1)


def losses_by_batch(trainer, batches) -> list[float]:
    trainer.model.eval()
    rows = Rows()
    with torch.no_grad():
        return [
            trainer.model(**trainer.data_collator([rows[i] for i in batch]))["loss"].item()
            for batch in batches
        ]


def test_evaluation_runs_through_the_sampler(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="no")
    predicted = trainer.predict(Rows())
    order = list(chain.from_iterable(trainer.eval_sampler(Rows(), num_replicas=1, rank=0)))
    assert sorted(order) == list(range(IDS.size))
    assert predicted.label_ids.astype(int).tolist() == order
    with torch.no_grad():
        x = torch.stack([Rows()[i]["x"] for i in order])
        expected = trainer.model.linear(x).squeeze(-1)
    np.testing.assert_allclose(predicted.predictions, expected.numpy(), rtol=1e-6)
    # A short batch weighs as much as a full one in Trainer's loss, whoever made the batches.
    batches = whole(seed=0, shuffle_within_batches=False, shuffle_patches=False)
    losses = losses_by_batch(trainer, batches)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def counting(trainer) -> list[int]:
    """How many predictions each evaluation gets."""
    counts: list[int] = []

    def count(predicted):
        counts.append(len(predicted.predictions))
        return {}

    trainer.compute_metrics = count
    return counts


def test_evaluation_between_epochs_is_whole(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="no", eval_strategy="epoch")
    counts = counting(trainer)
    trainer.train()
    assert counts == [IDS.size] * EPOCHS
    assert trainer.model.seen == epochs_of()


def test_metrics_by_batch_never_hear_of_the_last_one(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="no", batch_eval_metrics=True)
    last = []

    def count(predicted, compute_result):
        last.append(compute_result)
        return {}

    trainer.compute_metrics = count
    trainer.evaluate()
    assert last == [False] * len(whole())


def test_a_prepared_loader_of_equal_batches_loses_predictions(tmp_path):
    class Half(PreparedTrainer):
        """Only the training loader is prepared."""

        def get_eval_dataloader(self, eval_dataset=None):
            return PatchTrainer.patch_loader(self, Rows(), PatchBatchSampler(IDS, 4, seed=0))

    trainer = trainer_of(tmp_path, PreparedTrainer, save_strategy="no")
    labels = trainer.predict(Rows()).label_ids
    padded = len(list(chain.from_iterable(whole(partial="pad"))))
    assert len(labels) == padded - 4 + IDS.size % 4
    assert set(labels.astype(int).tolist()) != set(range(IDS.size))
    trainer = trainer_of(tmp_path, Half, save_strategy="no", eval_strategy="epoch")
    counts = counting(trainer)
    trainer.train()
    assert len(counts) == EPOCHS
    assert max(counts) < IDS.size


def test_a_batch_sampler_is_no_train_sampler(tmp_path):
    class Hooked(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return PatchBatchSampler(IDS, 4, seed=SEED)

    trainer = trainer_of(tmp_path, Hooked, save_strategy="no")
    with pytest.raises(TypeError, match="unsupported operand type"):
        trainer.train()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What two processes saw."""
    return run_ranks(SCRIPT, 2, tmp_path_factory.mktemp("ranks"))


def share(epoch, rank, partial="keep") -> list[list[int]]:
    batches = whole(epoch, partial=partial)
    return [*batches, *batches[: len(batches) % 2]][rank::2]


@pytest.mark.parametrize("kind", ["told", "prepared"])
@on_two_processes
def test_two_processes_share_epochs_out_and_resume(ranks, kind):
    partial = "keep" if kind == "told" else "pad"
    for rank, results in enumerate(ranks):
        expected = results[kind]["straight"]
        batches = [share(epoch, rank, partial) for epoch in range(EPOCHS)]
        assert expected["seen"] == list(chain.from_iterable(batches))
        assert expected["steps"] == EPOCHS * 6
        assert expected["weights"] == ranks[0][kind]["straight"]["weights"]
        assert list(results[kind]["resumed"]) == ["1", "6", "9", "17"]
        for position, resumed in results[kind]["resumed"].items():
            assert resumed == {
                **expected,
                "seen": expected["seen"][int(position) :],
                "losses": expected["losses"][int(position) :],
            }


@on_two_processes
def test_a_prepared_loader_of_two_processes_must_be_told_the_epoch_it_resumes_in(ranks):
    for rank, results in enumerate(ranks):
        results = results["prepared, not told"]
        assert results["resumed"]["6"]["seen"] == results["straight"]["seen"][6:]
        # The skipped and the rest are of epoch 0; the next one is right again.
        wrong = [*share(0, rank, "pad")[3:], *share(2, rank, "pad")]
        assert results["resumed"]["9"]["seen"] == wrong
        assert wrong != results["straight"]["seen"][9:]


@on_two_processes
def test_predictions_of_two_processes_come_in_the_order_of_the_epoch(ranks):
    order = list(
        chain.from_iterable(
            whole(seed=0, partial="pad", shuffle_within_batches=False, shuffle_patches=False)
        )
    )
    table = {}
    for results in ranks:
        results = results["told"]
        assert results["labels"][: len(order)] == order
        assert results["labels"][len(order) :] == order[:4]
        rows = dict(zip(order, results["predicted"], strict=False))
        assert sorted(rows) == list(range(IDS.size))
        table = table or rows
        assert rows == table
    model = Tiny()
    with torch.no_grad():
        weights = torch.tensor(ranks[0]["told"]["straight"]["weights"])
        model.linear.weight.copy_(weights[:2].reshape(1, 2))
        model.linear.bias.copy_(weights[2:])
        expected = model.linear(torch.stack([Rows()[i]["x"] for i in range(IDS.size)])).squeeze(-1)
    np.testing.assert_allclose([table[row] for row in range(IDS.size)], expected, rtol=1e-5)


@on_two_processes
def test_two_processes_lose_predictions_of_a_prepared_loader(ranks):
    for results in ranks:
        assert set(results["prepared"]["labels"]) != set(range(IDS.size))


def test_the_loaders_are_torchs_own(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="no")
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert type(loader) is DataLoader
        assert type(loader.batch_sampler) is PatchBatchSampler


@pytest.mark.parametrize("piece", [TellEpoch, PatchTrainer, SaveSampler])
def test_the_page_shows_what_is_run_here(piece):
    assert inspect.getsource(piece) in PAGE.read_text()
