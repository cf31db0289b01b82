"""PatchBatchSampler: what a DataLoader holds. Arguments, ranks, epochs and state; no arithmetic."""

from __future__ import annotations

import functools
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from gpusampler import arrays, sources
from gpusampler.coverage import Coverage, coverage_of
from gpusampler.iteration import Batch, BatchReader, EpochIterator, Reader
from gpusampler.plan import EPOCHS, EpochPlan, Partial
from gpusampler.state import UNEVENS, Progress, Share, check_ranks
from gpusampler.validation import checked_bool, checked_choice, checked_int, checked_seed

if TYPE_CHECKING:
    from gpusampler.cursor import BatchCursor

OUTPUTS = ("list", "numpy", "tensor")

T = TypeVar("T")


class PatchBatchSampler:
    """Batch sampler whose batches each come from one patch.

    Give it to ``DataLoader(dataset, batch_sampler=sampler)`` and make it once: every pass over the
    loader is another epoch. A batch is a pure function of (seed, epoch, slot); see `EpochPlan`.

    Parameters
    ----------
    source : dataset, integer array, sequence of int, or PatchGroups
        Patch id of each sample, or a map-style dataset that has them: ``get_all_patch_ids()``,
        else ``patch_ids``, else ``dataset[i]["patch_id"]`` (read on a pool of threads above 1,000
        samples). ``Subset`` and ``ConcatDataset`` of such datasets work without reading a sample.
        Ids may be any int64 values, in a NumPy, torch or CuPy array on any device.
    batch_size : int
        Samples in a batch, at least 1.
    shuffle_within_batches : bool
        Permute inside every patch each epoch: batches get other members every epoch.
    shuffle_patches : bool
        Permute the order of the batches each epoch.
    seed : int, optional
        0 .. 2**64 - 1. None draws one, kept in the state; it is 0 where the world has more than
        one rank, since all ranks need the same.
    interleave : bool
        False: all batches of a patch in a row, the patches in shuffled order.
    partial : {"keep", "drop", "pad"}
        A patch's last batch, when it is short: handed out short, left out, or filled up with
        samples of the same patch.
    num_replicas, rank : int, optional
        Default: torch.distributed's, if it is initialised, else 1 and 0.
    uneven : {"pad", "drop"}
        When the number of batches is no multiple of ``num_replicas``: the epoch's first batches
        come again, or its last are left out. Every rank has equally many either way.
    device : str or torch.device
        Where the tables live and batches are evaluated: "numpy", "cpu", "cuda:0", "cupy", ...
        "auto": where the ids already are; for a dataset, CUDA if torch is imported and sees a GPU,
        else NumPy. The batches are the same on all.
    output : {"list", "numpy", "tensor"}
        What iteration hands out: lists of int, or host int64 arrays of NumPy or torch, for
        datasets with ``__getitems__``.
    progress : bool
        Show a bar while a dataset is read sample by sample.

    Attributes
    ----------
    sampler : object
        With ``set_epoch``, for the frameworks that look for it there.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a value is out of range, the source is empty, or no batch is left.
    RuntimeError
        If ``device`` is not there.

    Warns
    -----
    UserWarning
        If ``partial="drop"`` leaves out whole patches.

    Examples
    --------
    >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
    >>> len(sampler)
    3
    >>> sorted(len(batch) for batch in sampler)
    [1, 2, 2]
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        shuffle_within_batches: bool = True,
        shuffle_patches: bool = True,
        seed: int | None = None,
        *,
        interleave: bool = True,
        partial: Partial = "keep",
        num_replicas: int | None = None,
        rank: int | None = None,
        uneven: Literal["pad", "drop"] = "pad",
        device: Any = "auto",
        output: Literal["list", "numpy", "tensor"] = "list",
        progress: bool = True,
    ) -> None:
        # Cheap arguments are checked before a source is read, which may take minutes.
        batch_size = checked_int(batch_size, "batch_size", least=1, below=1 << 31)
        num_replicas, rank = _checked_ranks(num_replicas, rank)
        seed_given = seed is not None
        seed = _default_seed(num_replicas) if seed is None else checked_seed(seed)
        checked_choice(uneven, "uneven", UNEVENS)
        self.output = checked_choice(output, "output", OUTPUTS)
        if output == "tensor" and not arrays.has_torch():
            raise RuntimeError(
                "output must be 'list' or 'numpy' where torch is not installed, got 'tensor'; "
                "install gpusampler[torch]"
            )
        auto = isinstance(device, str) and device == "auto"
        where = None if auto else arrays.parse_device(device)
        groups, placed = sources.resolve(source, progress=checked_bool(progress, "progress"))
        if where is None:
            where = groups.device if placed else arrays.default_device()
        plan = EpochPlan(
            groups,
            batch_size,
            seed,
            shuffle_within_batches=shuffle_within_batches,
            shuffle_patches=shuffle_patches,
            interleave=interleave,
            partial=partial,
            device=where,
        )
        self._progress = Progress(plan, num_replicas, rank, uneven, seed_given)
        self._warn_of_small_patches()
        check_ranks(plan.num_batches, num_replicas, uneven)
        self.sampler = EpochSetter(self._progress)

    @property
    def plan(self) -> EpochPlan:
        """The plan of every epoch; another one after a state with another drawn seed is loaded."""
        return self._progress.plan

    @property
    def num_replicas(self) -> int:
        """Number of ranks that share an epoch."""
        return self._progress.num_replicas

    @property
    def rank(self) -> int:
        """Number of this rank, 0 .. num_replicas - 1."""
        return self._progress.rank

    @property
    def seed(self) -> int:
        """The seed in use, given or drawn."""
        return self.plan.seed

    @property
    def batch_size(self) -> int | None:
        """Samples in every batch; None where batches differ (``partial="keep"``).

        Frameworks that re-shard batch samplers take an integer as a promise.
        """
        return None if self.plan.partial == "keep" else self.plan.batch_size

    @property
    def epoch(self) -> int:
        """The epoch that the next iterator hands out."""
        return self._progress.epoch

    def __len__(self) -> int:
        """Return the number of batches of a full epoch on this rank; equal on every rank."""
        return self._progress.steps_from(0)

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over this rank's batches of the next epoch.

        It binds the epoch when its first batch is drawn, and has ``len``, ``state_dict`` and
        ``load_state_dict``.
        """
        return self._iterate(functools.partial(BatchReader, output=self.output))

    def batches(self, epoch: int | None = None) -> Iterator[Batch]:
        """Iterate over this rank's batches with their indices on the device.

        Parameters
        ----------
        epoch : int, optional
            Default: the next one, as ``iter`` would take. A given epoch is handed out from its
            start and leaves the sampler's own epoch alone.

        Returns
        -------
        iterator of Batch
            ``Batch(patch_id, indices, valid)``: int, int64 array on the device, int.

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is no integer in 0 .. 2**63 - 1.
        """
        return self._iterate(functools.partial(BatchReader, output="batch"), epoch)

    def _iterate(
        self, begin: Callable[[Share], Reader[T]], epoch: int | None = None
    ) -> EpochIterator[T]:
        """Return an iterator over what a reader makes of this rank's share of an epoch.

        What `iter`, `batches` and `PatchTensorLoader` are made of; arguments as for
        `EpochIterator`.

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is no integer in 0 .. 2**63 - 1.
        """
        if epoch is not None:
            epoch = checked_int(epoch, "epoch", least=0, below=EPOCHS)
        return EpochIterator(self._progress, begin, epoch)

    def cursor(self) -> BatchCursor:
        """Return a torch module that hands out this rank's batches inside compiled loops.

        It begins where the next iterator would, on the sampler's device (torch's CPU for NumPy,
        torch's CUDA for CuPy), and goes its own way from there: the sampler's epoch and state do
        not follow it. Its own ``state_dict`` holds its place.

        Returns
        -------
        gpusampler.cursor.BatchCursor
        """
        from gpusampler.cursor import BatchCursor

        share = self._progress.pending()
        return BatchCursor(
            share.plan.on(arrays.on_torch(share.plan.device)),
            epoch=share.epoch,
            slot=share.slot,
            num_replicas=self.num_replicas,
            rank=self.rank,
            uneven=self._progress.uneven,
            seed_given=self._progress.seed_given,
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iterator hands out.

        After `load_state_dict`, the loaded epoch keeps the loaded position; any other drops it.

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is no integer in 0 .. 2**63 - 1.

        Warns
        -----
        UserWarning
            If a loaded position in the middle of another epoch is dropped.
        """
        self._progress.set_epoch(epoch, stacklevel=2)

    def reshuffle(self) -> None:
        """Skip an epoch: the next iterator hands out the one after the next.

        Every epoch is shuffled anew by itself; this is for loops that want another order now.
        """
        self._progress.skip()

    def get_epoch_count(self) -> int:
        """Return `epoch`: how many epochs have been begun or skipped."""
        return self.epoch

    def coverage(self, epoch: int | None = None) -> Coverage:
        """Count samples seen once, repeated and missed by patch, over all ranks.

        Parameters
        ----------
        epoch : int, optional
            Default: `epoch`.

        Returns
        -------
        Coverage

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is no integer in 0 .. 2**63 - 1.
        """
        epoch = checked_int(self.epoch if epoch is None else epoch, "epoch", least=0, below=EPOCHS)
        return coverage_of(self.plan, epoch, len(self) * self.num_replicas)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return where the sampler is, as a fresh dictionary of plain values.

        Parameters
        ----------
        step : int, optional
            Take the position after that many batches of the pass that was begun last, instead of
            after those that were drawn: a loader that prefetches draws ahead of training. A pass
            that resumed in the middle of an epoch counts its own batches, from 0.

        Returns
        -------
        dict
            JSON-safe, under 1 KB: format version, epoch, global slot, seed, and a fingerprint of
            ids and settings. It fits samplers of any rank and any number of ranks.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is no integer, negative, or more than the pass has batches.
        """
        return self._progress.state_dict(step)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a state was taken: the next iterator hands out the batches after it.

        The state of a finished epoch leads to the next one.

        Parameters
        ----------
        state_dict : mapping
            From `state_dict` of a sampler with the same ids and settings, on any number of ranks
            and any device. It is not changed.

        Raises
        ------
        TypeError
            If it is no such mapping.
        ValueError
            If its format version, ids, settings or (explicit) seed differ from this sampler's; the
            error names what differs.
        """
        self._progress.load_state_dict(state_dict)

    def _warn_of_small_patches(self) -> None:
        left_out = np.flatnonzero(self.plan.batches_by_patch == 0)
        if left_out.size:
            samples = int(self.plan.groups.counts[left_out].sum())
            warnings.warn(
                f"partial='drop' leaves out {left_out.size} of {self.plan.groups.num_patches} "
                f"patches ({samples} samples): they are smaller than "
                f"batch_size={self.plan.batch_size}",
                stacklevel=3,
            )

    def __repr__(self) -> str:
        """Return sizes, epoch and settings."""
        groups = self.plan.groups
        ranks = f", rank {self.rank} of {self.num_replicas}" if self.num_replicas > 1 else ""
        return (
            f"PatchBatchSampler({groups.num_samples} samples, {groups.num_patches} patches, "
            f"{len(self)} batches of {self.plan.batch_size}, epoch={self.epoch}, "
            f"seed={self.seed}, partial={self.plan.partial!r}, "
            f"device={str(self.plan.device)!r}{ranks})"
        )


class EpochSetter:
    """Passes ``set_epoch`` on to a sampler, for frameworks that look for it on ``.sampler``."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def set_epoch(self, epoch: int) -> None:
        """Do what `PatchBatchSampler.set_epoch` does."""
        self._progress.set_epoch(epoch, stacklevel=2)


def _default_seed(num_replicas: int) -> int:
    """Draw a seed, or return 0 where other ranks of the world need the same one."""
    world = arrays.process_group()
    if num_replicas > 1 or (world is not None and world[0] > 1):
        return 0
    return secrets.randbits(64)


def _checked_ranks(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    world = arrays.process_group()
    if (num_replicas is None) != (rank is None) and world is None:
        missing = "rank" if rank is None else "num_replicas"
        raise ValueError(
            "num_replicas and rank must be given together where torch.distributed is not "
            f"initialised, got no {missing}"
        )
    size, own = world or (1, 0)
    num_replicas = checked_int(
        size if num_replicas is None else num_replicas, "num_replicas", least=1, below=1 << 31
    )
    rank = checked_int(own if rank is None else rank, "rank", least=0)
    if rank >= num_replicas:
        raise ValueError(f"rank must be in 0 .. num_replicas - 1 = {num_replicas - 1}, got {rank}")
    return num_replicas, rank
