"""PatchBatchSampler: what a DataLoader holds. Arguments, ranks, epochs and state; no arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.batch_sizes import check_batch_size
from gpusampler.batching.cost_budget import CostBudget
from gpusampler.batching.mixture import Temperature, check_epoch_batches
from gpusampler.batching.short_batches import Partial
from gpusampler.batching.steps import STEPS, UNEVENS, StepsKind, Uneven
from gpusampler.core import devices
from gpusampler.core.arrays import Int64
from gpusampler.core.log import warn
from gpusampler.core.tracing import GROUP, Recorder
from gpusampler.core.validation import check_bool, check_choice, check_int, check_seed
from gpusampler.groups.from_source import groups_of
from gpusampler.plan.coverage import Coverage, coverage_of
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.sampler import profile as profile_module
from gpusampler.sampler.accelerate_guard import check_sharding
from gpusampler.sampler.batches import Batch, BatchReader, valid_counts
from gpusampler.sampler.distributed import ProcessGroupWarning, draw_seed, resolve_ranks
from gpusampler.sampler.iterator import EpochIterator, Reader
from gpusampler.sampler.profile import Profile
from gpusampler.sampler.state import (
    EpochTracker,
    RankShard,
    check_epoch,
    check_num_batches,
)
from gpusampler.sources.datasets import dataset_patch_costs

if TYPE_CHECKING:
    from gpusampler.sampler.cursor import BatchCursor

OUTPUTS = ("list", "numpy", "tensor")

T = TypeVar("T")


class PatchBatchSampler:
    """Batch sampler whose batches each come from one patch.

    Give it to ``DataLoader(dataset, batch_sampler=sampler)`` and make it once: every pass over the
    loader is another epoch. A batch is a pure function of (seed, epoch, slot); see `EpochPlan`.

    Parameters
    ----------
    source : dataset, array, sequence, path, column or table, or PatchGroups
        Patch id of each sample, in anything that `read_patch_ids` takes: integers or names in an
        array of NumPy, torch or CuPy on any device, in a list, in a file (.npy, Parquet, Zarr,
        HDF5), in a column; or a map-style dataset that has them: ``get_all_patch_ids()``, else
        ``patch_ids``, else ``dataset[i]["patch_id"]`` (read on a pool of threads above 1,000
        samples). ``Subset`` and ``ConcatDataset`` of such datasets work without reading a sample.
        Or the path of an index file (see `PatchGroups.load`).
    batch_size : int, mapping or CostBudget
        Samples in a batch, at least 1: one number, or one for each patch id; or the most that a
        batch may cost, where patches differ in what a sample takes.
    shuffle_within_batches : bool
        Permute inside every patch each epoch: batches get other members every epoch.
    shuffle_patches : bool
        Permute the order of the batches each epoch.
    seed : int, optional
        0 .. 2**64 - 1. None draws one, kept in the state; in a process group, one for all ranks
        (by the group's store, without a collective).
    interleave : bool
        False: all batches of a patch in a row, the patches in shuffled order.
    partial : {"keep", "drop", "pad"}
        A patch's last batch, when it is short: handed out short, left out, or filled up with
        samples of the same patch.
    num_replicas, rank : int, optional
        Default: torch.distributed's, if it is initialised, else 1 and 0.
    uneven : {"pad", "drop"}
        When the number of batches is no multiple of ``num_replicas``: the epoch's first batches
        come again, or its last are left out. Every rank has equally many either way. Under
        ``steps="same_patch"`` the same is done with the batches of each patch that fill no step.
    steps : {"free", "balanced", "same_patch"}
        What the batches that all ranks work on at one time have in common: nothing; nearly the
        same cost, so that no rank waits for the slowest; the patch.
    step_width : int, optional
        Batches of a step, a multiple of ``num_replicas``, which is the default. On one rank,
        ``steps="same_patch", step_width=k`` gives k micro-batches of a patch in a row.
    patch_costs : array (G,), mapping or callable, optional
        Cost of a sample of each patch for ``steps="balanced"``, in any unit: positive numbers by
        ascending patch id, a mapping from patch ids, or a function of the patch id. Default: the
        costs of the budget, or the dataset's ``patch_costs()``, if it has that, else 1 each. A
        batch costs as much as its samples together.
    weights : mapping, array (G,) or Temperature, optional
        What share of an epoch's batches a patch has, within one batch, but at least one: positive
        numbers by patch id, or by ascending patch id. Above its own batches a patch is gone through
        again, under another permutation; below, the next epoch goes on where this one stops, so
        that every sample comes round once a pass. Default: its own batches.
    epoch_batches : int, optional
        Batches of an epoch (all ranks together), at least one a patch, below 2**60. Default: all
        patches' own batches.
    device : str or torch.device
        Where the tables live and batches are evaluated: "numpy", "cpu", "cuda:0", "cupy", ...
        "auto": where the ids already are (of an index file: the host); for a dataset or a file of
        ids, CUDA if torch is imported and sees a GPU, else NumPy. The batches are the same on all.
    output : {"list", "numpy", "tensor"}
        What iteration hands out: lists of int, or host int64 arrays of NumPy or torch, for
        datasets with ``__getitems__``.
    progress : bool
        Show bars while ids are read and grouped, if that takes more than a second.

    Attributes
    ----------
    sampler : object
        With ``set_epoch``, for the frameworks that look for it there.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a value is out of range, the source is empty, no batch is left, or there are several
        ranks that cannot agree on a seed.
    RuntimeError
        If ``device`` is not there.

    Warns
    -----
    UserWarning
        If ``partial="drop"``, or ``uneven="drop"`` under ``steps="same_patch"``, leaves out whole
        patches. At the first batch, if the sampler was made before the process group was
        initialised, so that it is not sharded.

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
        batch_size: int | Mapping[Any, int] | CostBudget,
        shuffle_within_batches: bool = True,
        shuffle_patches: bool = True,
        seed: int | None = None,
        *,
        interleave: bool = True,
        partial: Partial = "keep",
        num_replicas: int | None = None,
        rank: int | None = None,
        uneven: Uneven = "pad",
        steps: StepsKind = "free",
        step_width: int | None = None,
        patch_costs: Any = None,
        weights: Mapping[Any, float] | Temperature | Any = None,
        epoch_batches: int | None = None,
        device: Any = "auto",
        output: Literal["list", "numpy", "tensor"] = "list",
        progress: bool = True,
    ) -> None:
        # Cheap arguments are checked before a source is read, which may take minutes.
        check_batch_size(batch_size)
        check_epoch_batches(epoch_batches)
        group_warning = ProcessGroupWarning(defaulted=num_replicas is None)
        num_replicas, rank = resolve_ranks(num_replicas, rank)
        seed_given = seed is not None
        seed = draw_seed(num_replicas) if seed is None else check_seed(seed)
        check_choice(uneven, "uneven", UNEVENS)
        check_choice(steps, "steps", STEPS)
        step_width = _check_step_width(step_width, steps, num_replicas)
        self.output = check_choice(output, "output", OUTPUTS)
        if output == "tensor" and not devices.has_torch():
            raise RuntimeError(
                "output must be 'list' or 'numpy' where torch is not installed, got 'tensor'; "
                "install gpusampler[torch]"
            )
        is_auto = isinstance(device, str) and device == "auto"
        plan_device = None if is_auto else devices.parse_device(device)
        check_bool(progress, "progress")
        recorder = Recorder()
        groups, has_device = groups_of(source, recorder, progress=progress)
        if plan_device is None:
            plan_device = groups.device if has_device else devices.default_device()
        if isinstance(batch_size, CostBudget):
            if batch_size.cost is None and batch_size.sample_costs is None:
                batch_size = replace(batch_size, cost=dataset_patch_costs(source))
        elif patch_costs is None and steps == "balanced":
            patch_costs = dataset_patch_costs(source)
        with recorder.range(GROUP):
            plan = EpochPlan(
                groups,
                batch_size,
                seed,
                shuffle_within_batches=shuffle_within_batches,
                shuffle_patches=shuffle_patches,
                interleave=interleave,
                partial=partial,
                steps=steps,
                step_width=step_width,
                uneven=uneven,
                patch_costs=patch_costs,
                weights=weights,
                epoch_batches=epoch_batches,
                device=plan_device,
            )
            self._tracker = EpochTracker(
                plan, num_replicas, rank, uneven, seed_given, group_warning, recorder=recorder
            )
        self._warn_of_omitted_patches()
        check_num_batches(plan.num_batches, num_replicas, uneven)
        self.sampler = EpochSetter(self._tracker)

    @classmethod
    def for_evaluation(
        cls,
        source: Any,
        batch_size: int | Mapping[Any, int] | CostBudget,
        *,
        partial: Literal["keep", "pad"] = "keep",
        num_replicas: int | None = None,
        rank: int | None = None,
        device: Any = "auto",
        output: Literal["list", "numpy", "tensor"] = "list",
        progress: bool = True,
    ) -> PatchBatchSampler:
        """Return a sampler for validation and tests: unshuffled, every sample counts exactly once.

        All ranks have equally many batches, as collectives ask for; where that takes a batch twice,
        ``valid`` (of `batches`, `valid_counts`, `PatchTensorLoader` and `cursor`) is 0 the second
        time. A sum over the samples that are valid, reduced over ranks, is that of one rank.

        Parameters
        ----------
        source, batch_size, num_replicas, rank, device, output, progress
            As for the constructor.
        partial : {"keep", "pad"}
            A patch's last batch, when it is short: handed out short, or filled up with samples
            that are not valid.

        Returns
        -------
        PatchBatchSampler
            With ``seed=0``, ``uneven="pad"`` and no shuffling: every epoch is the same.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As by the constructor.

        Examples
        --------
        >>> ranks = [
        ...     PatchBatchSampler.for_evaluation([4, 4, 4, 9], 2, num_replicas=2, rank=r)
        ...     for r in range(2)
        ... ]
        >>> [[(batch.indices.tolist(), batch.valid) for batch in rank.batches()] for rank in ranks]
        [[([0, 1], 2), ([3], 1)], [([2], 1), ([0, 1], 0)]]
        """
        check_choice(partial, "partial", ("keep", "pad"))
        sampler = cls(
            source,
            batch_size,
            shuffle_within_batches=False,
            shuffle_patches=False,
            seed=0,
            partial=partial,
            num_replicas=num_replicas,
            rank=rank,
            device=device,
            output=output,
            progress=progress,
        )
        sampler._tracker.repeats_count = False
        return sampler

    @property
    def plan(self) -> EpochPlan:
        """The plan of every epoch; another one after a state with another drawn seed is loaded."""
        return self._tracker.plan

    @property
    def num_replicas(self) -> int:
        """Number of ranks that share an epoch."""
        return self._tracker.num_replicas

    @property
    def rank(self) -> int:
        """Number of this rank, 0 .. num_replicas - 1."""
        return self._tracker.rank

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
        return self._tracker.epoch

    def __len__(self) -> int:
        """Return the number of batches of a full epoch on this rank; equal on every rank."""
        check_sharding(self.num_replicas, self.output)
        return self._tracker.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over this rank's batches of the next epoch.

        It binds the epoch when its first batch is drawn, and has ``len``, ``state_dict`` and
        ``load_state_dict``.

        Raises
        ------
        RuntimeError
            If a loader of Accelerate asks that would shard this rank's share again, or could not
            shard batches that are arrays.
        """
        check_sharding(self.num_replicas, self.output)
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

    def valid_counts(self, epoch: int | None = None) -> NDArray[np.int64]:
        """Return how many samples count in each of this rank's batches of an epoch.

        What ``Batch.valid`` says, for loops over a DataLoader: ``zip(loader,
        sampler.valid_counts(epoch))``. All that a batch holds, but for what ``partial="pad"`` fills
        it up with and, of a sampler `for_evaluation`, batches that come again.

        Parameters
        ----------
        epoch : int, optional
            Default: `epoch`.

        Returns
        -------
        int64 array, shape (len(sampler),)
            On the host.

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is no integer in 0 .. 2**63 - 1.
        """
        return valid_counts(self._tracker.shard_of(self._check_epoch(epoch)))

    def _iterate(
        self, make_reader: Callable[[RankShard], Reader[T]], epoch: int | None = None
    ) -> EpochIterator[T]:
        """Return an iterator over what a reader makes of this rank's shard of an epoch.

        What `iter`, `batches` and `PatchTensorLoader` are made of; arguments as for
        `EpochIterator`.

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is no integer in 0 .. 2**63 - 1.
        """
        if epoch is not None:
            epoch = check_epoch(epoch)
        return EpochIterator(self._tracker, make_reader, epoch)

    def cursor(self) -> BatchCursor:
        """Return a torch module that hands out this rank's batches inside compiled loops.

        It begins where the next iterator would, on the sampler's device (torch's CPU for NumPy,
        torch's CUDA for CuPy), and goes its own way from there: the sampler's epoch and state do
        not follow it. Its own ``state_dict`` holds its place. It runs on in steps of one width:
        after a state of another ``step_width`` was loaded, in that one, for later epochs as well.

        Returns
        -------
        gpusampler.sampler.cursor.BatchCursor

        Raises
        ------
        RuntimeError
            If torch is not installed.
        """
        if not devices.has_torch():
            raise RuntimeError(
                "cursor must have torch, which is not installed; install gpusampler[torch]"
            )
        from gpusampler.sampler.cursor import BatchCursor

        shard = self._tracker.pending_shard()
        return BatchCursor(
            shard.plan.on(devices.as_torch_device(shard.plan.device)),
            epoch=shard.epoch,
            slot=shard.slot,
            num_replicas=self.num_replicas,
            rank=self.rank,
            uneven=self._tracker.uneven,
            seed_given=self._tracker.seed_given,
            repeats_count=self._tracker.repeats_count,
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
        self._tracker.set_epoch(epoch, stacklevel=2)

    def reshuffle(self) -> None:
        """Skip an epoch: the next iterator hands out the one after the next.

        Every epoch is shuffled anew by itself; this is for loops that want another order now.
        """
        self._tracker.skip_epoch()

    def get_epoch_count(self) -> int:
        """Return `epoch`: how many epochs have been begun or skipped."""
        return self.epoch

    def coverage(self, epoch: int | None = None) -> Coverage:
        """Count samples seen once, repeated and missed by patch, over all ranks.

        Of a whole epoch in steps of the sampler's own ``step_width``.

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
        num_slots = self._tracker.steps_per_epoch * self.num_replicas
        return coverage_of(self.plan, self._check_epoch(epoch), num_slots)

    def _check_epoch(self, epoch: int | None) -> int:
        return check_epoch(self.epoch if epoch is None else epoch)

    def stats(self) -> Profile:
        """Return where the sampler's own time has gone since it was made.

        Always counted, as it costs next to nothing: ranges stand around blocks of many batches.

        Returns
        -------
        Profile
            ``wall_seconds`` is what the sampler has taken, of which rows have their shares.

        Examples
        --------
        >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
        >>> batches = list(sampler)
        >>> stats = sampler.stats()
        >>> stats.batches, stats.table_bytes["numpy"] > 0
        (3, True)
        """
        return self._add_table_bytes(
            profile_module.profile_since_creation(self._tracker.recorder, self.plan.device)
        )

    @contextmanager
    def profile(self) -> Iterator[Profile]:
        """Find out where the time of a block goes, the sampler's and the loop's.

        Of all that draws from this sampler: its iterators, a DataLoader's in this process, and
        those of a `PatchTensorLoader`, in one thread: of several that draw at a time, shares add up
        to more than the whole. Batches are handed out one at a time meanwhile, each seen,
        and on a GPU every range waits for the device, so that time shows where it is spent: the
        block is slower than the same loop without it.

        Yields
        ------
        Profile
            Filled when the block ends; `str` makes a table of it.

        Raises
        ------
        RuntimeError
            If another profile of the sampler has not ended.

        Examples
        --------
        >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
        >>> with sampler.profile() as p:
        ...     batches = list(sampler)
        >>> p.batches, p.rows[-1].name
        (3, 'your_loop')
        """
        profile = Profile()
        try:
            with profile_module.profile_block(self._tracker.recorder, self.plan.device, profile):
                yield profile
        finally:
            self._add_table_bytes(profile)

    def _add_table_bytes(self, profile: Profile) -> Profile:
        profile.table_bytes = self.plan.table_bytes
        return profile

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
        return self._tracker.state_dict(step)

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

        Warns
        -----
        UserWarning
            If, under ``steps="same_patch"``, the rest of the epoch cannot be of one patch a step,
            because it was begun on other ranks.
        """
        self._tracker.load_state_dict(state_dict)

    def _warn_of_omitted_patches(self) -> None:
        plan = self.plan
        skipped = plan.over_budget_by_patch
        if skipped.any():
            warn(
                f"over_budget='skip' leaves out {int(skipped.sum())} samples, of "
                f"{int((skipped > 0).sum())} of {plan.groups.num_patches} patches: a batch of them "
                "would cost more than max_cost"
            )
        unit = "a batch" if plan.batch_size is None else f"batch_size={plan.batch_size}"
        self._warn_of_omitted(plan.dropped_by_patch, "partial='drop'", unit)
        unit = f"step_width={plan.step_width} batches"
        setting = "uneven='drop' under steps='same_patch'"
        self._warn_of_omitted(plan.without_steps_by_patch, setting, unit)

    def _warn_of_omitted(self, samples: Int64, setting: str, unit: str) -> None:
        if samples.any():
            patches = f"{int((samples > 0).sum())} of {samples.size} patches"
            if self.plan.tables.patch_of_bin is not None:
                # Others of a patch's classes may be there.
                patches = f"whole classes of cost of {patches}"
            warn(
                f"{setting} leaves out {patches} ({int(samples.sum())} samples): they are smaller "
                f"than {unit}"
            )

    def __repr__(self) -> str:
        """Return sizes, epoch and settings."""
        plan, groups = self.plan, self.plan.groups
        size = f"up to {plan.max_batch_size}" if plan.batch_size is None else plan.batch_size
        options = f", rank {self.rank} of {self.num_replicas}" if self.num_replicas > 1 else ""
        if plan.tables.slot_shares is not None:
            options += ", mixed by weights"
        if plan.steps != "free":
            options += f", steps={plan.steps!r} of {plan.step_width}"
        return (
            f"PatchBatchSampler({groups.num_samples} samples, {groups.num_patches} patches, "
            f"{self._tracker.steps_per_epoch} batches of {size}, epoch={self.epoch}, "
            f"seed={self.seed}, partial={plan.partial!r}, device={str(plan.device)!r}{options})"
        )


class EpochSetter:
    """Passes ``set_epoch`` on to a sampler, for frameworks that look for it on ``.sampler``."""

    def __init__(self, tracker: EpochTracker) -> None:
        self._tracker = tracker

    def set_epoch(self, epoch: int) -> None:
        """Do what `PatchBatchSampler.set_epoch` does."""
        self._tracker.set_epoch(epoch, stacklevel=2)


def _check_step_width(step_width: int | None, steps: str, num_replicas: int) -> int:
    """Return the slots of a step; the plan refuses what does not go with ``steps``."""
    if step_width is None:
        return 1 if steps == "free" else num_replicas
    step_width = check_int(step_width, "step_width", low=1, high=1 << 31)
    if steps != "free" and step_width % num_replicas:
        raise ValueError(
            f"step_width must be a multiple of num_replicas={num_replicas}, so that ranks begin "
            f"steps together, got {step_width}"
        )
    return step_width
