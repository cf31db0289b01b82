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
        self._saved: dict[str, Any] | None = None
        self._sampler: PatchBatchSampler | None = None
        self._share: RankShard | None = None
        self._batches: Any = None
        self._resuming = False

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state after the batches that were trained on."""
        if self._sampler is None or self._share is None:
            return {} if self._saved is None else {"sampler": self._saved}
        steps = 0
        if self._batches is not None:
            # Lightning counts from the epoch's start, and a pass from where it went on.
            steps = self._batches.processed - (len(self._sampler) - self._share.steps)
        return {"sampler": self._sampler._progress.state_after(self._share, steps)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a saved state until there is a sampler to load it."""
        self._saved = state_dict["sampler"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier run has left."""
        self._saved = self._sampler = self._share = self._batches = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the saved state."""
        sampler = _sampler_of(trainer)
        epoch = _epoch(trainer)
        saved, self._saved = self._saved, None
        # Workers have drawn from the sampler's own next epoch by now, whichever Lightning is in.
        self._resuming = saved is not None or epoch > 0 or sampler.epoch > 1
        # What Lightning has left is over, even if `limit_train_batches` cut it short.
        over = saved is not None and saved["epoch"] < epoch
        if saved is not None:
            sampler.load_state_dict({**saved, "slot": 0} if over else saved)
        sampler.set_epoch(epoch)
        share = self._begin(trainer)
        if saved is not None and trainer.fit_loop.restarting:
            # Lightning takes a plain loader for one that would begin the epoch again.
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")
            _count(trainer, len(sampler) - share.steps if share.steps and not over else None)
            if over:
                _leave_epoch(trainer)
        if self._resuming:
            _draw_anew(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the epoch begins."""
        self._begin(trainer)
        if self._resuming:
            # The loader may have been loaded again since.
            _draw_anew(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note that Lightning's count of batches is this epoch's by now."""
        self._resuming = False
        self._batches = trainer.fit_loop.epoch_loop.batch_progress.current

    def _begin(self, trainer: Trainer) -> RankShard:
        self._sampler = _sampler_of(trainer)
        self._share = self._sampler._progress.pending()
        self._batches = None
        return self._share


def _sampler_of(trainer: Trainer) -> PatchBatchSampler:
    loader: Any = trainer.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, PatchBatchSampler):
        found = type(loader).__name__
        if sampler is not None:
            found += f" with batch_sampler {type(sampler).__name__}"
        raise TypeError(
            "ResumeSampler needs one training loader, DataLoader(dataset, "
            f"batch_sampler=PatchBatchSampler(...)), got {found}"
        )
    return sampler


def _epoch(trainer: Trainer) -> int:
    """Return the epoch that Lightning hands to ``set_epoch``."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return int(epochs.processed)


def _draw_anew(trainer: Trainer) -> None:
    """Let the loader's workers forget what they drew before ``set_epoch``."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    iter(fetcher)
    # Lightning may do the same after this, and is to find the same epoch.
    _sampler_of(trainer).set_epoch(_epoch(trainer))


def _count(trainer: Trainer, done: int | None) -> None:
    """Let Lightning count ``done`` batches of the epoch, None for all: it ends epochs by that.

    It changes nothing where there are as many ranks as before, but at the start of an epoch.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    batches = progress.current
    ahead = (trainer.num_training_batches if done is None else done) - batches.processed
    if done == 0:
        # A checkpoint from the start of an epoch has this of the one before, and Lightning would
        # leave a whole epoch out.
        progress.is_last_batch = False
    for name in ("ready", "started", "processed", "completed"):
        setattr(batches, name, getattr(batches, name) + ahead)


def _leave_epoch(trainer: Trainer) -> None:
    """Let Lightning begin the next epoch where it restarts at the end of one.

    By itself it does so by halves: it takes a later checkpoint within that next epoch for one at
    its start, or, under ``max_steps``, leaves it after one batch.
    """
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    if epochs.completed < epochs.processed:
        loop.epoch_progress.increment_completed()
    if epochs.ready == epochs.processed:
        loop.reset_restart_stage()
    if loop.epoch_loop.restarted_on_last:
        loop.epoch_loop.restarting = False
