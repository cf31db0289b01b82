"""Going on in the middle of an epoch in Lightning, which importing this module imports.

Lightning restores its count of batches, but it tells no loader where to go on: a plain
``DataLoader`` hands out the epoch's first batches once more.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from gpusampler.sampler.batch_sampler import PatchBatchSampler

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer

    from gpusampler.sampler.state import RankShard
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:
        from pytorch_lightning import Callback


class ResumeSampler(Callback):
    """Callback with which ``Trainer.fit(..., ckpt_path=...)`` goes on at the very next batch.

    It saves the place of the training loader's `PatchBatchSampler` in every checkpoint, by the
    batches that were trained on (workers draw ahead of those), and goes on from there: in the
    middle of an epoch or at its end, with any number of workers and on any number of ranks.

    Give it to the trainer: ``Trainer(callbacks=[ResumeSampler()], use_distributed_sampler=False)``.

    Notes
    -----
    There must be one training loader, and its ``batch_sampler`` a `PatchBatchSampler`; ``fit``
    raises TypeError where it is not. On another number of ranks Lightning's count of the epoch's
    batches becomes what these ranks would have counted, so that it ends the epoch where it ends.
    Gradients that were accumulated when a checkpoint was taken are in no checkpoint of Lightning.

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
            # Lightning counts from the epoch's start, and a pass from where it went on.
            steps = self._batch_counts.processed - (len(self._sampler) - self._shard.steps)
        return {"sampler": self._sampler._tracker.state_after(self._shard, steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until there is a sampler to load it."""
        self._saved_state = state_dict["sampler"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier run has left."""
        self._saved_state = self._sampler = self._shard = self._batch_counts = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the saved state."""
        sampler = _sampler_of(trainer)
        epoch = _current_epoch(trainer)
        saved_state, self._saved_state = self._saved_state, None
        # Workers have drawn from the sampler's own next epoch by now, whichever Lightning is in.
        self._is_resuming = saved_state is not None or epoch > 0 or sampler.epoch > 1
        # What Lightning has left is over, even if `limit_train_batches` cut it short.
        is_epoch_over = saved_state is not None and saved_state["epoch"] < epoch
        if saved_state is not None:
            sampler.load_state_dict({**saved_state, "slot": 0} if is_epoch_over else saved_state)
        sampler.set_epoch(epoch)
        shard = self._bind_epoch(trainer)
        if saved_state is not None and trainer.fit_loop.restarting:
            # Lightning takes a plain loader for one that would begin the epoch again.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
            is_within_epoch = shard.steps > 0 and not is_epoch_over
            _set_batch_counts(trainer, len(sampler) - shard.steps if is_within_epoch else None)
            if is_epoch_over:
                _finish_epoch(trainer)
        if self._is_resuming:
            _restart_fetcher(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the epoch begins."""
        self._bind_epoch(trainer)
        if self._is_resuming:
            # The loader may have been loaded again since.
            _restart_fetcher(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that Lightning's count of batches is this epoch's by now."""
        self._is_resuming = False
        self._batch_counts = trainer.fit_loop.epoch_loop.batch_progress.current

    def _bind_epoch(self, trainer: Trainer) -> RankShard:
        self._sampler = _sampler_of(trainer)
        self._shard = self._sampler._tracker.pending_shard()
        self._batch_counts = None
        return self._shard


def _sampler_of(trainer: Trainer) -> PatchBatchSampler:
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, PatchBatchSampler):
        loader_type = type(loader).__name__
        if sampler is not None:
            loader_type += f" with batch_sampler {type(sampler).__name__}"
        raise TypeError(
            "ResumeSampler needs one training loader, DataLoader(dataset, "
            f"batch_sampler=PatchBatchSampler(...)), got {loader_type}"
        )
    return sampler


def _current_epoch(trainer: Trainer) -> int:
    """Return the epoch that Lightning hands to ``set_epoch``."""
    epoch_counts: Any = trainer.fit_loop.epoch_progress.current
    return int(epoch_counts.processed)


def _restart_fetcher(trainer: Trainer) -> None:
    """Let the loader's workers forget what they drew before ``set_epoch``."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    iter(fetcher)
    # Lightning may do the same after this, and is to find the same epoch.
    _sampler_of(trainer).set_epoch(_current_epoch(trainer))


def _set_batch_counts(trainer: Trainer, num_done: int | None) -> None:
    """Let Lightning count ``num_done`` batches of the epoch, None for all: it ends epochs by that.

    It changes nothing where there are as many ranks as before, but at the start of an epoch.
    """
    batch_progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    counts = batch_progress.current
    target = trainer.num_training_batches if num_done is None else num_done
    difference = target - counts.processed
    if num_done == 0:
        # A checkpoint from the start of an epoch has this of the one before, and Lightning would
        # leave a whole epoch out.
        batch_progress.is_last_batch = False
    for name in ("ready", "started", "processed", "completed"):
        setattr(counts, name, getattr(counts, name) + difference)


def _finish_epoch(trainer: Trainer) -> None:
    """Let Lightning begin the next epoch where it restarts at the end of one.

    By itself it does so by halves: it takes a later checkpoint within that next epoch for one at
    its start, or, under ``max_steps``, leaves it after one batch.
    """
    loop = trainer.fit_loop
    epoch_counts: Any = loop.epoch_progress.current
    if epoch_counts.completed < epoch_counts.processed:
        loop.epoch_progress.increment_completed()
    if epoch_counts.ready == epoch_counts.processed:
        loop.reset_restart_stage()
    if loop.epoch_loop.restarted_on_last:
        loop.epoch_loop.restarting = False
