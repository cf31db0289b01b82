"""Adapters for ``neuralop.Trainer``; importing this module imports neuralop and torch.

neuralop's trainer expects batches with "x" and "y", never calls ``set_epoch``, and resumes only at
the start of an epoch, with an epoch that it has already trained.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from timeit import default_timer
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gpusampler.core import files
from gpusampler.core.validation import check_int
from gpusampler.sampler.batch_sampler import PatchBatchSampler, sampler_of_loader

# On import, neuralop calls warnings.filterwarnings("once").
with warnings.catch_warnings():
    from neuralop import Trainer
    from neuralop.data.transforms.data_processors import DataProcessor

if TYPE_CHECKING:
    from gpusampler.sampler.passes import RankShard

STATE_FILE = "patch_trainer.pt"
"""File that `PatchTrainer` writes into ``save_dir`` and resumes from."""

_BATCH_KEYS = ("core_in", "ghost_in", "core_out", "core_coords", "ghost_coords")
_EMPTY_TOTALS = {"loss": 0.0, "lasso": 0.0, "samples": 0, "batches": 0}


class _GinoInputs(dict[str, Any]):
    """Keyword arguments of a GINO; ``inputs["y"]`` is the truth, which ``**inputs`` leaves out.

    The trainer reads the batch size from "y", and passes the same dictionary to the model, which
    warns about arguments that it does not have.
    """

    def __init__(self, truth: torch.Tensor, **inputs: torch.Tensor) -> None:
        super().__init__(inputs)
        self._truth = truth

    def __missing__(self, key: str) -> torch.Tensor:
        if key == "y":
            return self._truth
        raise KeyError(key)


class PatchProcessor(DataProcessor):  # type: ignore[misc]
    """Data processor that turns batches of patches into the arguments of a GINO.

    Use it with batches of `gpusampler.GWPatchDataset` that `gpusampler.groundwater.collate_fn`
    has made. The GINO has ``in_channels = Tin * C``, ``out_channels = Tout * Ct`` and
    ``gno_coord_dim=3``. It forecasts the core points from the core and the ghost points. Losses
    compare ``y_pred`` and ``y``, both of shape [B, Nc, Tout * Ct], in the units of the samples.

    Parameters
    ----------
    latent_queries : Tensor, shape (1, n1, n2, n3, 3)
        The latent grid of the GINO, in the units of the samples' points; floating. `Normalize`
        scales the points of each patch to [0, 1].

    Attributes
    ----------
    device : str or torch.device
        Device of the arguments.

    Raises
    ------
    TypeError
        If ``latent_queries`` is not a floating tensor.
    ValueError
        If ``latent_queries`` has another shape.

    Examples
    --------
    >>> import torch
    >>> from gpusampler.demo.embedded import small_data
    >>> from gpusampler.groundwater import GWPatchDataset, collate_fn
    >>> dataset = GWPatchDataset(small_data(), 6, 1)
    >>> processor = PatchProcessor(torch.rand(1, 4, 4, 4, 3))
    >>> inputs = processor.preprocess(collate_fn([dataset[0], dataset[1]]))
    >>> inputs["x"].shape[0], inputs["x"].shape[2], inputs["y"].shape[2]
    (2, 18, 3)
    """

    def __init__(self, latent_queries: torch.Tensor) -> None:
        super().__init__()
        if not isinstance(latent_queries, torch.Tensor) or not latent_queries.is_floating_point():
            got = getattr(latent_queries, "dtype", type(latent_queries).__name__)
            raise TypeError(f"latent_queries must be a floating tensor, got {got}")
        shape = tuple(latent_queries.shape)
        if len(shape) != 5 or shape[0] != 1 or shape[-1] != 3:
            raise ValueError(f"latent_queries must have shape (1, n1, n2, n3, 3), got {shape}")
        self._latent_queries = latent_queries
        self.device: Any = latent_queries.device
        # `DataProcessor.train` reads it.
        self.model: torch.nn.Module | None = None

    def to(self, device: Any) -> PatchProcessor:
        """Move the latent grid and all following batches to a device, and return the processor."""
        self.device = device
        self._latent_queries = self._latent_queries.to(device)
        return self

    def preprocess(self, batch: Mapping[str, Any], batched: bool = True) -> dict[str, Any]:
        """Return the arguments of the GINO's forward pass for a batch.

        Parameters
        ----------
        batch : mapping
            From `gpusampler.groundwater.collate_fn`; not modified.
        batched : bool
            Ignored; in the signature of neuralop's processors.

        Returns
        -------
        dict
            ``input_geom`` [1, Nc + Ng, 3], ``latent_queries``, ``output_queries`` [1, Nc, 3] and
            ``x`` [B, Nc + Ng, Tin * C], on `device`. Indexing also accepts "y", the truth
            [B, Nc, Tout * Ct].

        Raises
        ------
        ValueError
            If the batch lacks a key, or does not have exactly one copy of the points.
        """
        missing = [name for name in _BATCH_KEYS if name not in batch]
        if missing:
            raise ValueError(
                f"batch must have the keys of gpusampler.groundwater.collate_fn, but lacks "
                f"{missing}: pass DataLoader(GWPatchDataset(...), collate_fn=collate_fn)"
            )
        copies = batch["core_coords"].shape[0]
        if copies != 1:
            raise ValueError(
                f"batch must have one copy of the points, got {copies} copies: pass "
                "DataLoader(..., collate_fn=gpusampler.groundwater.collate_fn)"
            )
        tensors = {name: batch[name].to(self.device) for name in _BATCH_KEYS}
        return _GinoInputs(
            truth=_as_channels(tensors["core_out"]),
            input_geom=torch.cat([tensors["core_coords"], tensors["ghost_coords"]], dim=1),
            latent_queries=self._latent_queries,
            output_queries=tensors["core_coords"],
            x=_as_channels(torch.cat([tensors["core_in"], tensors["ghost_in"]], dim=2)),
        )

    def postprocess(
        self, output: torch.Tensor, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the output unchanged, and a dictionary of the truth alone, for the losses."""
        return output, {"y": inputs["y"]}

    def forward(self, **batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Run the model passed to ``wrap`` on a batch; return its output and the truth."""
        if self.model is None:
            raise RuntimeError("wrap(model) must be called before the processor is called")
        inputs = self.preprocess(batch)
        return self.postprocess(self.model(**inputs), inputs)


def _as_channels(series: torch.Tensor) -> torch.Tensor:
    """Reshape [B, T, N, C] to [B, N, T * C]."""
    return series.permute(0, 2, 1, 3).flatten(2)


class PatchTrainer(Trainer):  # type: ignore[misc]
    """A ``neuralop.Trainer`` that resumes at exactly the next batch, also within an epoch.

    It calls ``set_epoch`` before every pass and saves the position of the training loader's
    `PatchBatchSampler` with the model, the optimizer, the learning-rate scheduler, the regularizer
    and the sums of the epoch's losses. The position counts the batches that were trained on, not
    those that workers have prefetched. Parameters and metrics of a resumed run equal those of a run
    that was never stopped. On several ranks, each rank trains on its share of every epoch, the
    metrics of training are those of all ranks, and a run resumes on any number of ranks.

    Parameters are those of ``neuralop.Trainer``. The training loader is ``DataLoader(dataset,
    batch_sampler=PatchBatchSampler(...))`` or a `gpusampler.PatchTensorLoader`.

    Notes
    -----
    The states of random number generators are not saved: dropout draws different numbers after a
    resume. The state of a data processor is not saved either, as in neuralop.

    Examples
    --------
    >>> import torch
    >>> PatchTrainer(model=torch.nn.Linear(2, 1), n_epochs=4).n_epochs
    4
    """

    model: Any
    _sampler: PatchBatchSampler
    _shard: RankShard
    _totals: dict[str, Any]
    _metrics: dict[str, Any]

    def train(
        self,
        train_loader: Any,
        test_loaders: Mapping[str, Any],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        *,
        save_every_batches: int | None = None,
        save_every: int | None = None,
        save_best: str | None = None,
        save_dir: str | os.PathLike[str] = "./ckpt",
        **settings: Any,
    ) -> dict[str, Any]:
        """Train the model, as ``neuralop.Trainer.train`` does.

        Parameters
        ----------
        train_loader, test_loaders, optimizer, scheduler, **settings
            As for ``neuralop.Trainer.train``. ``resume_from_dir`` is a folder that a
            `PatchTrainer` has saved to.
        save_every_batches : int, optional
            Save the training state after every so many batches of an epoch on this rank, and after
            its last batch, to the file `STATE_FILE` in ``save_dir``. The file is replaced
            atomically.
        save_every : int, optional
            Save the training state, and neuralop's own files, after epochs 0, k, 2k, ...
        save_best : str, optional
            Instead of ``save_every``: save after the epochs whose metric of this name is the
            lowest, over resumed runs too. Without ``save_every_batches``, a run resumes from the
            best epoch.
        save_dir : path
            Folder of the saved state, created if missing.

        Returns
        -------
        dict
            Metrics of the last epoch.

        Raises
        ------
        TypeError
            If ``batch_sampler`` of the training loader is not a `PatchBatchSampler`, or
            ``save_every`` or ``save_best`` is given for a model without neuralop's
            ``save_checkpoint``.
        ValueError
            If ``save_every_batches`` is less than 1; or if the saved state belongs to a sampler
            with other ids, settings or seed, or has already finished ``n_epochs``.
        FileNotFoundError
            If ``resume_from_dir`` has no saved state.
        """
        self._sampler = sampler_of_loader(train_loader, "PatchTrainer")
        if save_every_batches is not None:
            check_int(save_every_batches, "save_every_batches", low=1)
        saves_with_neuralop = save_every is not None or save_best is not None
        if saves_with_neuralop and not hasattr(self._module, "save_checkpoint"):
            raise TypeError(
                "save_every and save_best need a model that derives from neuralop's BaseModel, got "
                f"{type(self._module).__name__}: pass save_every_batches instead"
            )
        self._save_every_batches = save_every_batches
        self._save_dir = Path(save_dir)
        self._totals = _EMPTY_TOTALS
        self._best_metric = math.inf
        metrics: dict[str, Any] = super().train(
            train_loader,
            test_loaders,
            optimizer,
            scheduler,
            save_every=save_every,
            save_best=save_best,
            save_dir=self._save_dir,
            **settings,
        )
        return metrics

    def train_one_epoch(
        self, epoch: int, train_loader: Any, training_loss: Any
    ) -> tuple[float, float, float | None, float]:
        """Train on the epoch's remaining batches, and step the scheduler.

        The metrics are those of the whole epoch on all ranks: the mean loss of a batch, of a
        sample, the regularizer's mean of a sample, and the seconds that this pass took.
        """
        sampler = self._sampler = sampler_of_loader(train_loader, "PatchTrainer")
        sampler.set_epoch(epoch)
        self._shard = sampler._tracker.pending_shard()
        self._steps_done, self._is_epoch_over = 0, False
        num_done = len(sampler) - self._shard.steps
        # The saved sums are of all ranks, so one rank carries them on.
        self._totals = dict(self._totals if sampler.rank == 0 else _EMPTY_TOTALS)
        self.n_samples = self._totals["samples"]
        self.on_epoch_start(epoch)
        self.model.train()
        if self.data_processor is not None:
            self.data_processor.train()
        start = default_timer()
        # There is none if the run was saved after the last batch, before the end of the epoch.
        for step, batch in enumerate(train_loader, start=1):
            loss = self.train_one_batch(num_done + step - 1, batch, training_loss)
            loss.backward()
            self.optimizer.step()
            self._totals["loss"] += loss.item()
            if self.regularizer:
                self._totals["lasso"] += float(self.regularizer.loss)
            self._totals["samples"] = self.n_samples
            self._totals["batches"] += 1
            self._steps_done = step
            if self._save_every_batches is not None and (
                (num_done + step) % self._save_every_batches == 0 or step == self._shard.steps
            ):
                self._save(self._save_dir)
        totals = self._sum_over_ranks()
        self._totals, self._is_epoch_over = _EMPTY_TOTALS, True
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(totals["loss"])
        else:
            self.scheduler.step()
        seconds = default_timer() - start
        batch_loss = totals["loss"] / totals["batches"]
        sample_loss = totals["loss"] / totals["samples"]
        lasso_loss = totals["lasso"] / totals["samples"] if self.regularizer else None
        if self.verbose and epoch % self.eval_interval == 0:
            self.log_training(
                epoch=epoch,
                time=seconds,
                avg_loss=sample_loss,
                train_err=batch_loss,
                avg_lasso_loss=lasso_loss,
                lr=self.optimizer.param_groups[-1]["lr"],
            )
        return batch_loss, sample_loss, lasso_loss, seconds

    def evaluate_all(self, *args: Any, **settings: Any) -> dict[str, Any]:
        """Evaluate on all test loaders, as ``neuralop.Trainer.evaluate_all`` does."""
        self._metrics = super().evaluate_all(*args, **settings)
        return self._metrics

    def checkpoint(self, save_dir: str | os.PathLike[str]) -> None:
        """Save the state after an epoch, and neuralop's own files, from the first rank."""
        if self.save_best is not None:
            metric = float(self._metrics[self.save_best])
            # neuralop forgets the best metric when a run resumes.
            if not metric < self._best_metric:
                return
            self._best_metric = metric
        super().checkpoint(save_dir)
        self._save(Path(save_dir))

    def resume_state_from_dir(self, save_dir: str | os.PathLike[str]) -> None:
        """Load the state that a `PatchTrainer` has saved to a folder."""
        path = Path(save_dir, STATE_FILE)
        if not path.exists():
            raise FileNotFoundError(
                f"resume_from_dir must have {STATE_FILE}, which PatchTrainer saves, got {save_dir}"
            )
        with files.open_regular(path) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        if state["epoch"] >= self.n_epochs:
            raise ValueError(
                f"n_epochs must be > {state['epoch']}, the number of epochs that {path} has "
                f"finished, got {self.n_epochs}"
            )
        # First: it rejects a state of other ids or settings.
        self._sampler.load_state_dict(state["sampler"])
        # The optimizer loads its state to the device of the parameters.
        self.model = self.model.to(self.device)
        self._module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        self.start_epoch = state["epoch"]
        self._totals, self._best_metric = state["totals"], state["best_metric"]
        if self.verbose:
            print(f"Trainer resuming from epoch {self.start_epoch}")  # noqa: T201

    @property
    def _module(self) -> Any:
        """The model without its DDP wrapper."""
        is_wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.module if is_wrapped else self.model

    @property
    def _is_shared(self) -> bool:
        """Whether ranks that can communicate share an epoch."""
        return self._sampler.num_replicas > 1 and dist.is_available() and dist.is_initialized()

    def _sum_over_ranks(self) -> dict[str, Any]:
        """Return the sums of this epoch so far, over all ranks."""
        if not self._is_shared:
            return dict(self._totals)
        sums = torch.tensor(list(self._totals.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        loss, lasso, samples, batches = sums.tolist()
        return {"loss": loss, "lasso": lasso, "samples": int(samples), "batches": int(batches)}

    def _save(self, folder: Path) -> None:
        """Save the state after the batches that were trained on, from the first rank."""
        # Ranks that evaluate differently do not all save after an epoch, whose sums are 0.
        totals = self._totals if self._is_epoch_over else self._sum_over_ranks()
        if dist.is_available() and dist.is_initialized() and dist.get_rank():
            return
        model = self._module.state_dict()
        # The arguments of the model's constructor, with functions, which no safe loader accepts.
        model.pop("_metadata", None)
        state = {
            "epoch": self.epoch + self._is_epoch_over,
            "sampler": self._sampler._tracker.state_after(self._shard, self._steps_done),
            "totals": totals,
            "best_metric": self._best_metric,
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{STATE_FILE}.saving"
        # A file that a killed run has left is written again, and a planted one is an error.
        with files.open_own(temporary, create=True) as file:
            file.truncate()
            torch.save(state, file)
            files.sync_file(file)
        files.replace(temporary, folder / STATE_FILE)
