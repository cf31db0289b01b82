"""PatchBatchSampler: its arguments, ranks, epochs and state; `EpochPlan` makes the batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
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
from gpusampler.core.tracing import GROUP, Recorder
from gpusampler.core.validation import (
    check_bool,
    check_choice,
    check_seed,
    explain_keywords,
)
from gpusampler.groups.from_source import groups_of
from gpusampler.plan.coverage import (
    Coverage,
    coverage_of,
    warn_of_copies,
    warn_of_omitted_samples,
)
from gpusampler.plan.epoch_plan import EpochPlan
from gpusampler.sampler.accelerate_guard import check_sharding
from gpusampler.sampler.batches import Batch, BatchReader, valid_counts
from gpusampler.sampler.distributed import (
    ProcessGroupWarning,
    check_step_width,
    draw_seed,
    resolve_ranks,
)
from gpusampler.sampler.iterator import EpochIterator, Reader
from gpusampler.sampler.passes import RankShard
from gpusampler.sampler.profile import ProfiledSampler
from gpusampler.sampler.rank_check import RankCheck
from gpusampler.sampler.state import (
    EpochSetter,
    EpochTracker,
    check_epoch,
    check_num_batches,
)
from gpusampler.sources.datasets import dataset_patch_costs

if TYPE_CHECKING:
    from gpusampler.sampler.cursor import BatchCursor

OUTPUTS = ("list", "numpy", "tensor")
TORCH_KEYWORDS = {
    "drop_last": "partial='drop' drops the short batches of patches, uneven='drop' the batches "
    "that do not divide among the ranks",
    "shuffle": "shuffle_patches permutes batches, shuffle_within_batches the samples of a patch",
    "world_size": "pass num_replicas",
    "replacement": "a pass over a patch has no repeats; weights repeat whole passes",
    "num_samples": "pass epoch_batches, a number of batches",
    "generator": "pass seed, an integer",
}
"""Arguments of torch's samplers, and what to use instead."""
EVALUATION_KEYWORDS = {
    "drop_last": "every sample counts once; partial='pad' makes batches of one size",
    "shuffle": "it is unshuffled; PatchBatchSampler shuffles",
    "generator": "it is unshuffled, without a seed",
    "world_size": "pass num_replicas",
}
T = TypeVar("T")


class PatchBatchSampler(ProfiledSampler):
    """Batch sampler that takes all samples of a batch from one patch.

    Create it once and pass it to ``DataLoader(dataset, batch_sampler=sampler)``: every pass over
    the loader is the next epoch. A batch is a pure function of (seed, epoch, slot). Loaders read
    side by side need a sampler each, with the same seed.

    Parameters
    ----------
    source : dataset, array, sequence, path, column or table, or PatchGroups
        Patch id of each sample, as `read_patch_ids` accepts it: integers or names in a NumPy, torch
        or CuPy array on any device, a list, a file (.npy, Parquet, Zarr, HDF5) or a column. Or a
        map-style dataset with ``get_all_patch_ids()``, else ``patch_ids``, else
        ``dataset[i]["patch_id"]`` (read by several threads above 1,000 samples). ``Subset`` and
        ``ConcatDataset`` of such datasets work without reading a sample. Or the path of an index
        file (see `PatchGroups.load`).
    batch_size : int, mapping or CostBudget
        Number of samples per batch, >= 1: an int, or a mapping (or pandas Series) from patch ids to
        ints. A `CostBudget` limits the cost per batch instead, if patches differ in the cost of a
        sample.
    shuffle_within_batches : bool
        Permute each patch's samples every epoch before batches are cut, so that members change. If
        False, ``partial="drop"``, ``min_partial`` and, under ``steps="same_patch"``,
        ``uneven="drop"`` leave out the same samples in every epoch.
    shuffle_patches : bool
        Permute the order of the batches each epoch. If False, ``uneven="drop"`` leaves out the same
        batches in every epoch.
    seed : int, optional
        0 .. 2**64 - 1. None draws a seed, which the state saves. The ranks of a process group share
        the drawn seed (through the group's store, without a collective).
    interleave : bool
        False: yield all batches of a patch in a row, the patches in shuffled order.
    partial : {"keep", "drop", "pad", "even"}
        If the last batch of a patch is short: keep it short, drop it, or fill it up with samples of
        the same patch. "even" divides a patch evenly into as many batches as "keep": sizes differ
        by at most one, so 33 samples in batches of 32 are 17 and 16.
    min_partial : int
        For "keep" and "even": leave out batches with fewer samples than this. `coverage` counts the
        samples. With 2, no batch has a single sample, which batch normalisation rejects.
    num_replicas, rank : int, optional
        Number of ranks, and this rank. Default: torch.distributed's, if it is initialised, else 1
        and 0.
    uneven : {"pad", "drop"}
        If the number of batches is not a multiple of ``num_replicas``: repeat the epoch's first
        batches, or drop its last ones. Every rank has the same number of batches either way. Under
        ``steps="same_patch"``, this applies to the batches of each patch that do not fill a step.
    steps : {"free", "balanced", "same_patch"}
        What the batches that all ranks process at the same time have in common: nothing, nearly the
        same cost (so that no rank waits long for another one), or the patch.
    step_width : int, optional
        Number of batches per step, a multiple of ``num_replicas`` (the default); 1 under "free",
        unless ``costliest_first``. On one rank, ``steps="same_patch", step_width=k`` yields k
        micro-batches of a patch in a row.
    patch_costs : array (G,), mapping or callable, optional
        Cost of a sample of each patch for ``steps="balanced"`` and ``costliest_first``, in any
        unit: positive numbers by ascending patch id, a mapping from patch ids, or a function of the
        patch id. Default: the costs of the budget, else the dataset's ``patch_costs()``, else 1
        each. The cost of a batch is the sum over its samples.
    costliest_first : bool
        Begin every epoch with the ``step_width`` most expensive full batches, so that a run that
        exceeds the memory fails at once; other batches stay in random order. If fewer batches are
        full, fewer are moved. Not with ``interleave=False`` or ``steps="same_patch"``.
    weights : mapping, array (G,) or Temperature, optional
        Relative share of each patch in an epoch's batches: numbers >= 0 as a mapping from patch
        ids (or a pandas Series), or by ascending patch id. Shares are met to within one batch; each
        patch has at least one, or none if its weight is 0. A patch with more batches than its
        samples fill starts its next pass in the same epoch, under a new permutation. A patch with
        fewer continues its pass in the next epoch. Each pass contains every sample of its batches
        once. Default: as many batches as the samples fill.
    epoch_batches : int, optional
        Number of batches per epoch (all ranks together), below 2**60. Default: as many as the
        samples of all patches fill. With weights, at least one per patch. Without, it may be less
        than the number G of patches (or cost bins): then each has one batch in G consecutive slots,
        which span several epochs.
    device : str or torch.device
        Device of the tables and of the evaluation: "numpy", "cpu", "cuda:0", "cupy", ... "auto":
        the device of the ids (the host for an index file); for a dataset or a file of ids, CUDA if
        torch is imported and can use a GPU, else NumPy. All devices return identical batches. Ids
        in memory are also grouped there, if they fit and (under "auto") CUDA is initialised.
    output : {"list", "numpy", "tensor"}
        Type of the batches that iteration yields: lists of int, or int64 arrays of NumPy or torch
        on the host, for datasets with ``__getitems__``.
    progress : bool
        Show progress bars if reading and grouping the ids takes more than a second.
    check_ranks : bool
        Check at the first pass that the ranks of torch's process group have the same ids, settings
        and seed. A rank compares its sampler with the one that another rank made at the same line
        of code, through the group's store, and never waits for another rank. Only if both
        ``num_replicas`` and ``rank`` are taken from the process group.

    Attributes
    ----------
    sampler : object
        Has ``set_epoch``, for frameworks that call ``batch_sampler.sampler.set_epoch``.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a value is out of range, the source is empty, no batch is left, a mapping lacks a patch,
        ``batch_size`` or ``weights`` have a key that is no patch of the dataset (nor of the whole
        that it is a part of), or several ranks cannot agree on a seed.
    RuntimeError
        If ``device`` does not exist, or ``output="tensor"`` without torch installed.

    Warns
    -----
    UserWarning
        If ``partial="drop"``, ``min_partial``, or ``uneven="drop"`` under ``steps="same_patch"``,
        leaves out whole patches. If one of them, or ``uneven="drop"`` on several ranks, leaves out
        the same samples in every epoch, because nothing shuffles them. If ``partial="pad"`` makes
        more than half of a batch copies. At the first batch, if the sampler was created before the
        process group was initialised, so that it is not sharded.

    Examples
    --------
    >>> sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)
    >>> len(sampler)
    3
    >>> sorted(len(batch) for batch in sampler)
    [1, 2, 2]
    """

    @explain_keywords(TORCH_KEYWORDS)
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
        min_partial: int = 1,
        num_replicas: int | None = None,
        rank: int | None = None,
        uneven: Uneven = "pad",
        steps: StepsKind = "free",
        step_width: int | None = None,
        patch_costs: Any = None,
        costliest_first: bool = False,
        weights: Mapping[Any, float] | Temperature | Any = None,
        epoch_batches: int | None = None,
        device: Any = "auto",
        output: Literal["list", "numpy", "tensor"] = "list",
        progress: bool = True,
        check_ranks: bool = True,
    ) -> None:
        # Check cheap arguments before reading a source, which may take minutes.
        check_batch_size(batch_size)
        check_epoch_batches(epoch_batches)
        group_warning = ProcessGroupWarning(defaulted=num_replicas is None)
        is_of_group = num_replicas is None and rank is None
        num_replicas, rank = resolve_ranks(num_replicas, rank)
        is_checked = check_bool(check_ranks, "check_ranks") and is_of_group and num_replicas > 1
        seed_given = seed is not None
        seed = draw_seed(num_replicas) if seed is None else check_seed(seed)
        check_choice(uneven, "uneven", UNEVENS)
        check_choice(steps, "steps", STEPS)
        is_free = steps == "free" and not check_bool(costliest_first, "costliest_first")
        step_width = check_step_width(step_width, num_replicas, is_free=is_free)
        self.output = check_choice(output, "output", OUTPUTS)
        if output == "tensor" and not devices.has_torch():
            raise RuntimeError(
                "output='tensor' requested, but torch is not installed. Run `pip install torch`."
            )
        is_auto = isinstance(device, str) and device == "auto"
        plan_device = None if is_auto else devices.parse_device(device)
        check_bool(progress, "progress")
        recorder = Recorder()
        groups, plan_device = groups_of(source, plan_device, recorder, progress=progress)
        if isinstance(batch_size, CostBudget):
            if batch_size.cost is None and batch_size.sample_costs is None:
                batch_size = replace(batch_size, cost=dataset_patch_costs(source))
        elif patch_costs is None and (steps == "balanced" or costliest_first):
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
                min_partial=min_partial,
                steps=steps,
                step_width=step_width,
                uneven=uneven,
                patch_costs=patch_costs,
                costliest_first=costliest_first,
                weights=weights,
                epoch_batches=epoch_batches,
                device=plan_device,
            )
            self._tracker = EpochTracker(
                plan,
                num_replicas,
                rank,
                uneven,
                seed_given,
                group_warning,
                recorder=recorder,
                rank_check=RankCheck(num_replicas, rank) if is_checked else None,
            )
        check_num_batches(plan.num_batches, num_replicas, uneven)
        warn_of_omitted_samples(plan, self._tracker.steps_per_epoch * num_replicas)
        if shuffle_patches or shuffle_within_batches:
            # (Unshuffled samplers are for evaluation, where ``valid`` does not count copies.)
            warn_of_copies(plan)
        self._has_default_device = is_auto and plan_device.is_torch_cuda
        self.sampler = EpochSetter(self._tracker)

    @classmethod
    @explain_keywords(EVALUATION_KEYWORDS)
    def for_evaluation(
        cls,
        source: Any,
        batch_size: int | Mapping[Any, int] | CostBudget,
        *,
        partial: Literal["keep", "pad", "even"] = "keep",
        num_replicas: int | None = None,
        rank: int | None = None,
        device: Any = "auto",
        output: Literal["list", "numpy", "tensor"] = "list",
        progress: bool = True,
        check_ranks: bool = True,
    ) -> PatchBatchSampler:
        """Return a sampler for validation and tests: unshuffled, every sample counts exactly once.

        All ranks have equally many batches, as collectives require. If a batch must be repeated for
        that, ``valid`` (of `batches`, `valid_counts`, `PatchTensorLoader` and `cursor`) is 0 for
        the repeat. A sum over valid samples, reduced over all ranks, equals that of one rank.

        Parameters
        ----------
        source, batch_size, num_replicas, rank, device, output, progress, check_ranks
            As for the constructor.
        partial : {"keep", "pad", "even"}
            If the last batch of a patch is short: keep it short, fill it up with samples that are
            not valid, or divide the patch evenly.

        Returns
        -------
        PatchBatchSampler
            With ``seed=0``, ``uneven="pad"`` and no shuffling: every epoch is the same.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As for the constructor.

        Examples
        --------
        >>> ranks = [
        ...     PatchBatchSampler.for_evaluation([4, 4, 4, 9], 2, num_replicas=2, rank=r)
        ...     for r in range(2)
        ... ]
        >>> [[(batch.indices.tolist(), batch.valid) for batch in rank.batches()] for rank in ranks]
        [[([0, 1], 2), ([3], 1)], [([2], 1), ([0, 1], 0)]]
        """
        check_choice(partial, "partial", ("keep", "pad", "even"))
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
            check_ranks=check_ranks,
        )
        sampler._tracker.repeats_count = False
        return sampler

    @property
    def plan(self) -> EpochPlan:
        """The plan of every epoch; replaced when a state with a different drawn seed is loaded."""
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
        """Samples per batch; None if batches differ in size (``partial="keep"`` or "even").

        Frameworks that re-shard batch samplers rely on an integer being exact.
        """
        return self.plan.batch_size if self.plan.partial in ("drop", "pad") else None

    @property
    def epoch(self) -> int:
        """The epoch of the next iterator."""
        return self._tracker.epoch

    def __len__(self) -> int:
        """Return the number of batches of a full epoch on this rank; equal on every rank."""
        check_sharding(self.num_replicas, self.output)
        return self._tracker.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over this rank's batches of the next epoch.

        The epoch is chosen when the first batch is drawn. The iterator has ``len``, ``state_dict``
        and ``load_state_dict``.

        Raises
        ------
        RuntimeError
            If a loader of Accelerate would shard this rank's batches again, or cannot shard them
            because they are arrays. At the first batch, if another rank has different ids, settings
            or seed (see ``check_ranks``); the other kinds of passes raise it, too.
        """
        check_sharding(self.num_replicas, self.output)
        return EpochIterator(self._tracker, functools.partial(self._make_reader, self.output))

    def batches(self, epoch: int | None = None) -> Iterator[Batch]:
        """Iterate over this rank's batches with their indices on the device.

        Parameters
        ----------
        epoch : int, optional
            Default: the next one, as for ``iter``. An explicit epoch starts at its first batch and
            does not change the sampler's epoch.

        Returns
        -------
        iterator of Batch
            ``Batch(patch_id, indices, valid)``: int, int64 array on the device, int.

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is not an integer in 0 .. 2**63 - 1.
        """
        return self._iterate(functools.partial(self._make_reader, "batch"), epoch)

    def valid_counts(self, epoch: int | None = None) -> NDArray[np.int64]:
        """Return the number of samples that count in each of this rank's batches of an epoch.

        These are the values of ``Batch.valid``, for loops over a DataLoader: ``zip(loader,
        sampler.valid_counts(epoch))``. All samples count except the filling of ``partial="pad"``
        and, with `for_evaluation`, repeated batches.

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
            If ``epoch`` is not an integer in 0 .. 2**63 - 1.
        """
        epoch = check_epoch(self.epoch if epoch is None else epoch)
        return valid_counts(self._tracker.shard_of(epoch))

    def _iterate(
        self, make_reader: Callable[[RankShard], Reader[T]], epoch: int | None = None
    ) -> EpochIterator[T]:
        if epoch is not None:
            epoch = check_epoch(epoch)
        return EpochIterator(self._tracker, make_reader, epoch)

    def _make_reader(self, output: str, shard: RankShard) -> BatchReader[Any]:
        device = shard.plan.device
        if self._has_default_device and devices.usable_default(device) != device:
            shard = shard._replace(plan=shard.plan.on(devices.HOST))
            self._tracker.plan = self.plan.on(devices.HOST)
        return BatchReader(shard, output)

    def cursor(self) -> BatchCursor:
        """Return a torch module that yields this rank's batches inside compiled loops.

        It begins at the position of the next iterator, on the sampler's device (torch's CPU for
        NumPy, torch's CUDA for CuPy). From then on it is independent: the sampler's epoch and state
        do not follow it, and its own ``state_dict`` saves its position. Its step width never
        changes: if the sampler has loaded a state with a different ``step_width``, the cursor uses
        the loaded width, in later epochs as well.

        Its rows are as wide as the largest batch, so a budget or sizes by patch bound only the
        samples that count.

        Returns
        -------
        gpusampler.sampler.cursor.BatchCursor

        Raises
        ------
        RuntimeError
            If torch is not installed, or another rank has different ids, settings or seed (see
            ``check_ranks``).

        Warns
        -----
        UserWarning
            If rows exceed the budget or the batch size of their patch by more than a tenth.
        """
        if not devices.has_torch():
            raise RuntimeError("cursor() needs torch, which is not installed: pip install torch")
        from gpusampler.sampler.cursor import BatchCursor

        self._tracker.check_ranks()
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
        """Set the epoch of the next iterator.

        After `load_state_dict`, setting the loaded epoch keeps the loaded position; setting a
        different epoch drops it.

        Raises
        ------
        TypeError, ValueError
            If ``epoch`` is not an integer in 0 .. 2**63 - 1.

        Warns
        -----
        UserWarning
            If a loaded position in the middle of a different epoch is dropped.
        """
        self._tracker.set_epoch(epoch, stacklevel=2)

    def reshuffle(self) -> None:
        """Skip an epoch: the next iterator starts the epoch after the one it would have started.

        A shuffled sampler has a different order in every epoch anyway; call this only to get a new
        order immediately.
        """
        self._tracker.skip_epoch()

    def get_epoch_count(self) -> int:
        """Return `epoch`: the number of epochs that were begun or skipped."""
        return self.epoch

    def coverage(self, epoch: int | None = None) -> Coverage:
        """Count samples seen once, repeated and missed in a whole epoch, per patch, over all ranks.

        Steps have the sampler's own ``step_width``, whatever the ``step_width`` of a loaded state.

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
            If ``epoch`` is not an integer in 0 .. 2**63 - 1.
        """
        epoch = check_epoch(self.epoch if epoch is None else epoch)
        return coverage_of(self.plan, epoch, self._tracker.steps_per_epoch * self.num_replicas)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return the sampler's position as a new dictionary of plain values.

        Parameters
        ----------
        step : int, optional
            Save the position after this many batches of the pass that is running (else of the
            latest), instead of after the batches that were drawn: a loader that prefetches draws
            ahead of training. A pass that resumed in the middle of an epoch counts its own batches,
            from 0.

        Returns
        -------
        dict
            JSON-safe, under 1 KB: format version, epoch, global slot, seed, step width, and a
            fingerprint of ids and settings. It can be loaded on any rank of any number of ranks.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is not an integer, negative, or more than the batches drawn in the pass (or
            than the batches of the next pass, if none has begun).
        RuntimeError
            If several passes are running and ``step`` does not tell them apart.
        """
        return self._tracker.state_dict(step)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Resume from a saved state: the next iterator yields the batches after it.

        After the state of a finished epoch, the next iterator starts the next epoch.

        Parameters
        ----------
        state_dict : mapping
            From `state_dict` of a sampler with the same ids and settings, on any number of ranks
            and any device. It is not modified.

        Raises
        ------
        TypeError
            If ``state_dict`` is not such a mapping.
        ValueError
            If its format version, ids, settings or (explicit) seed differ from this sampler's; the
            error names the differences.

        Warns
        -----
        UserWarning
            If, under ``steps="same_patch"``, the remaining steps of the epoch may mix patches,
            because the epoch began on a different number of ranks.
        """
        self._tracker.load_state_dict(state_dict)

    def __repr__(self) -> str:
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


def sampler_of_loader(loader: Any, owner: str) -> PatchBatchSampler:
    """Return the sampler of a training loader; raise TypeError, for ``owner``, if it has none."""
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(sampler, PatchBatchSampler):
        loader_type = type(loader).__name__
        if sampler is not None:
            loader_type += f" with batch_sampler {type(sampler).__name__}"
        raise TypeError(
            f"{owner} needs one training loader, DataLoader(dataset, "
            f"batch_sampler=PatchBatchSampler(...)), got {loader_type}"
        )
    return sampler
