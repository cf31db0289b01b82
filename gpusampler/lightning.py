"""Callback that resumes in the middle of an epoch in Lightning; importing it imports Lightning.

Lightning restores its own batch count but not the position of the loader, so a plain ``DataLoader``
repeats the first batches of the epoch.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from gpusampler.sampler.batch_sampler import PatchBatchSampler, sampler_of_loader

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from gpusampler.sampler.passes import RankShard
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback


class ResumeSampler(Callback):
    """Callback with which ``Trainer.fit(..., ckpt_path=...)`` resumes at exactly the next batch.

    It saves the position of the training loader's `PatchBatchSampler` in every checkpoint. The
    position counts the batches that were trained on, not those that workers have prefetched. The
    run resumes there, in the middle of an epoch or at its end, with any number of workers and on
    any number of ranks.

    Pass it to the trainer: ``Trainer(callbacks=[ResumeSampler()], use_distributed_sampler=False)``.

    Notes
    -----
    ``fit`` raises TypeError unless there is exactly one training loader and its ``batch_sampler``
    is a `PatchBatchSampler`. If the number of ranks changes, the callback adjusts Lightning's batch
    count to the new number, so that the epoch ends at the right batch. A checkpoint of Lightning
    does not contain accumulated gradients.

    Examples
    --------
    >>> ResumeSampler().state_dict()  # nothing to save before training
    {}
    """

    def __init__(self) -> None:
        self._saved_state: dict[str, Any] | None = None
        self._sampler: PatchBatchSampler | None = None
        self._shard: RankShard | None = None
        self._batch_counts: Any = None
        self._is_resuming = False

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state after the batches that were trained on."""
        if self._sampler is None or self._shard is None:
            return {} if self._saved_state is None else {"sampler": self._saved_state}
        steps = 0
        if self._batch_counts is not None:
            # Lightning counts from the epoch's start, a resumed pass from where it resumed.
            steps = self._batch_counts.processed - (len(self._sampler) - self._shard.steps)
        return {"sampler": self._sampler._tracker.state_after(self._shard, steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store a saved state until training starts and the sampler can load it."""
        self._saved_state = state_dict["sampler"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Discard the state of an earlier run."""
        self._saved_state = self._sampler = self._shard = self._batch_counts = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the saved state into the sampler."""
        sampler = _sampler_of(trainer)
        epoch = _current_epoch(trainer)
        saved_state, self._saved_state = self._saved_state, None
        # Workers have already drawn from the sampler's next epoch, whichever epoch Lightning is in.
        self._is_resuming = saved_state is not None or epoch > 0 or sampler.epoch > 1
        # Lightning has left that epoch, possibly early because of `limit_train_batches`.
        is_epoch_over = saved_state is not None and saved_state["epoch"] < epoch
        if saved_state is not None:
            sampler.load_state_dict({**saved_state, "slot": 0} if is_epoch_over else saved_state)
        sampler.set_epoch(epoch)
        shard = self._bind_epoch(trainer)
        if saved_state is not None and trainer.fit_loop.restarting:
            # Lightning assumes that a plain loader would restart the epoch.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
            is_within_epoch = shard.steps > 0 and not is_epoch_over
            _set_batch_counts(trainer, len(sampler) - shard.steps if is_within_epoch else None)
            if is_epoch_over:
                _finish_epoch(trainer)
        if self._is_resuming:
            _restart_fetcher(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the start of the epoch."""
        self._bind_epoch(trainer)
        if self._is_resuming:
            # Lightning may have reloaded the loader since `on_train_start`.
            _restart_fetcher(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start reading Lightning's batch count, which now belongs to the current epoch."""
        self._is_resuming = False
        self._batch_counts = trainer.fit_loop.epoch_loop.batch_progress.current

    def _bind_epoch(self, trainer: Trainer) -> RankShard:
        self._sampler = _sampler_of(trainer)
        self._shard = self._sampler._tracker.pending_shard()
        self._batch_counts = None
        return self._shard


def _sampler_of(trainer: Trainer) -> PatchBatchSampler:
    return sampler_of_loader(trainer.train_dataloader, "ResumeSampler")


def _current_epoch(trainer: Trainer) -> int:
    """Return the epoch that Lightning passes to ``set_epoch``."""
    epoch_counts: Any = trainer.fit_loop.epoch_progress.current
    return int(epoch_counts.processed)


def _restart_fetcher(trainer: Trainer) -> None:
    """Discard the batches that the loader's workers drew before ``set_epoch``."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    iter(fetcher)
    # Lightning may restart the fetcher again, which must draw the same epoch.
    _sampler_of(trainer).set_epoch(_current_epoch(trainer))


def _set_batch_counts(trainer: Trainer, num_done: int | None) -> None:
    """Set Lightning's count of finished batches (None: all), which decides when an epoch ends.

    If the number of ranks has not changed, this only matters at the start of an epoch.
    """
    batch_progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    counts = batch_progress.current
    target = trainer.num_training_batches if num_done is None else num_done
    difference = target - counts.processed
    if num_done == 0:
        # At the start of an epoch, the checkpoint still holds the previous epoch's flag, which
        # would make Lightning skip a whole epoch.
        batch_progress.is_last_batch = False
    for name in ("ready", "started", "processed", "completed"):
        setattr(counts, name, getattr(counts, name) + difference)


def _finish_epoch(trainer: Trainer) -> None:
    """Make Lightning begin the next epoch after a restart at the end of an epoch.

    Otherwise Lightning's counters are only half updated: Lightning then treats a checkpoint saved
    inside the next epoch as one from the start of that epoch, or, with ``max_steps``, ends that
    epoch after one batch.
    """
    loop = trainer.fit_loop
    epoch_counts: Any = loop.epoch_progress.current
    if epoch_counts.completed < epoch_counts.processed:
        loop.epoch_progress.increment_completed()
    if epoch_counts.ready == epoch_counts.processed:
        loop.reset_restart_stage()
    if loop.epoch_loop.restarted_on_last:
        loop.epoch_loop.restarting = False
