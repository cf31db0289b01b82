"""PatchBatchSampler: what a DataLoader holds. Arguments, ranks, epochs and state; no arithmetic."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from gpusampler import arrays, sources
from gpusampler.coverage import Coverage, coverage_of
from gpusampler.iteration import Batch, EpochIterator, Share
from gpusampler.permutation import VERSION
from gpusampler.plan import EPOCHS, EpochPlan, Partial
from gpusampler.validation import checked_bool, checked_choice, checked_int, checked_seed

STATE_VERSION = 1
UNEVENS = ("pad", "drop")
OUTPUTS = ("list", "numpy", "tensor")


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
    plan : EpochPlan
    num_replicas, rank : int
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
        self._seed_given = seed is not None
        self.num_replicas, self.rank = _checked_ranks(num_replicas, rank)
        if seed is None:
            seed = 0 if self.num_replicas > 1 else secrets.randbits(64)
        seed = checked_seed(seed)
        self.uneven = checked_choice(uneven, "uneven", UNEVENS)
        self.output = checked_choice(output, "output", OUTPUTS)
        if output == "tensor":
            arrays.parse_device("cpu")
        auto = isinstance(device, str) and device == "auto"
        where = None if auto else arrays.parse_device(device)
        groups, placed = sources.resolve(source, progress=checked_bool(progress, "progress"))
        if where is None:
            where = groups.device if placed else arrays.default_device()
        self.plan = EpochPlan(
            groups,
            batch_size,
            seed,
            shuffle_within_batches=shuffle_within_batches,
            shuffle_patches=shuffle_patches,
            interleave=interleave,
            partial=partial,
            device=where,
        )
        self._warn_of_small_patches()
        if self.share_from(0).steps == 0:
            raise ValueError(
                "num_replicas must be at most the number of batches under uneven='drop', got "
                f"{self.num_replicas} for {self.plan.num_batches} batches"
            )
        self.sampler = EpochSetter(self)
        # The next iterator binds (epoch, slot). A loaded state stays known until then, so that
        # set_epoch can tell its own epoch from another.
        self._epoch = 0
        self._slot = 0
        self._loaded: tuple[int, int] | None = None
        self._active: EpochIterator[Any] | None = None
        self._epoch_is_set = False
        self._passes = 0

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
        return self._epoch

    def __len__(self) -> int:
        """Return the number of batches of a full epoch on this rank; equal on every rank."""
        return self.share_from(0).steps

    def __iter__(self) -> Iterator[Any]:
        """Return an iterator over this rank's batches of the next epoch.

        It binds the epoch when its first batch is drawn, and has ``len``, ``state_dict`` and
        ``load_state_dict``.
        """
        return EpochIterator(self, self.output)

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
        if epoch is not None:
            epoch = checked_int(epoch, "epoch", least=0, below=EPOCHS)
        return EpochIterator(self, "batch", epoch)

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
        epoch = checked_int(epoch, "epoch", least=0, below=EPOCHS)
        self._epoch_is_set = True
        loaded, self._active = self._loaded, None
        if loaded is not None and loaded[0] == epoch:
            self._epoch, self._slot = loaded
            return
        if loaded is not None and self._slot > 0:
            warnings.warn(
                f"set_epoch({epoch}) drops the loaded position: epoch {loaded[0]}, "
                f"slot {loaded[1]}",
                stacklevel=2,
            )
        self._loaded = None
        self._epoch, self._slot = epoch, 0

    def reshuffle(self) -> None:
        """Skip an epoch: the next iterator hands out the one after the next.

        Every epoch is shuffled anew by itself; this is for loops that want another order now.
        """
        self._loaded = self._active = None
        self._epoch, self._slot = self._epoch + 1, 0

    def get_epoch_count(self) -> int:
        """Return `epoch`: how many epochs have been begun or skipped."""
        return self._epoch

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
        epoch = checked_int(self._epoch if epoch is None else epoch, "epoch", least=0, below=EPOCHS)
        return coverage_of(self.plan, epoch, len(self) * self.num_replicas)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Return where the sampler is, as a fresh dictionary of plain values.

        Parameters
        ----------
        step : int, optional
            Take the position after that many batches of the pass that was begun last, instead of
            after those that were drawn: a loader that prefetches draws ahead of training.

        Returns
        -------
        dict
            JSON-safe, under 1 KB: format version, epoch, global slot, seed, and a fingerprint of
            ids and settings. It fits samplers of any rank and any number of ranks.

        Raises
        ------
        TypeError, ValueError
            If ``step`` is no integer or negative.
        """
        if step is not None:
            step = checked_int(step, "step", least=0)
        if self._active is not None:
            return self._active.state_dict(step)
        epoch, slot = self._loaded or (self._epoch, self._slot)
        if step is not None:
            slot = self.share_from(slot).slot_after(step, self.plan.num_batches)
        return self.state_at(self.plan, epoch, slot)

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
        epoch, slot = self._checked_state(state_dict)
        self._active = None
        self._loaded = epoch, slot
        finished = slot == self.plan.num_batches
        self._epoch, self._slot = (epoch + 1, 0) if finished else (epoch, slot)

    def state_at(self, plan: EpochPlan, epoch: int, slot: int) -> dict[str, Any]:
        """Return the state at a global slot of a plan's epoch (the number of slots: finished)."""
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "slot": slot,
            "seed": plan.seed,
            "fingerprint": self._fingerprint(),
        }

    @property
    def pending_slot(self) -> int:
        """The global slot at which the next iterator starts; 0 unless a state was loaded."""
        return self._slot

    def share_from(self, slot: int) -> Share:
        """Return this rank's share of an epoch from a global slot on."""
        return Share.of(slot, self.plan.num_batches, self.num_replicas, self.rank, self.uneven)

    def bind_next(self, iterator: EpochIterator[Any]) -> None:
        """Give an iterator the next epoch, from the pending slot on."""
        if self.num_replicas > 1 and self._passes == 1 and not self._epoch_is_set:
            warnings.warn(
                f"a second pass on {self.num_replicas} ranks without set_epoch: call "
                "sampler.set_epoch(epoch) before each pass, or a rank that has drawn one batch "
                "more often runs an epoch ahead of the others",
                stacklevel=4,
            )
        self._passes += 1
        iterator.bind(self._epoch, self._slot)
        self._begun(iterator, self._epoch)

    def bind_loaded(self, iterator: EpochIterator[Any], state_dict: Mapping[str, Any]) -> None:
        """Give an iterator the epoch and position of a state."""
        epoch, slot = self._checked_state(state_dict)
        iterator.bind(epoch, slot)
        self._begun(iterator, epoch)

    def _begun(self, iterator: EpochIterator[Any], epoch: int) -> None:
        self._epoch, self._slot = epoch + 1, 0
        self._loaded, self._active = None, iterator

    def _fingerprint(self) -> dict[str, Any]:
        groups = self.plan.groups
        return {
            "ids": groups.fingerprint,
            "num_samples": groups.num_samples,
            "num_patches": groups.num_patches,
            "permutation": VERSION,
            **self.plan.settings,
        }

    def _checked_state(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Return (epoch, slot) of a state that fits this sampler, and take over its seed."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state).__name__}")
        missing = {"version", "epoch", "slot", "seed", "fingerprint"} - set(state)
        if missing:
            raise TypeError(f"state_dict must come from state_dict(): it lacks {sorted(missing)}")
        if state["version"] != STATE_VERSION:
            raise ValueError(
                f"state_dict must have format version {STATE_VERSION}, got {state['version']!r}"
            )
        theirs, ours = state["fingerprint"], self._fingerprint()
        if not isinstance(theirs, Mapping):
            raise TypeError(
                f"state_dict fingerprint must be a mapping, got {type(theirs).__name__}"
            )
        differing = [
            f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
            for name in {**ours, **theirs}
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise ValueError(
                f"state_dict must be of the same ids and settings, but {'; '.join(differing)}"
            )
        seed = checked_seed(state["seed"])
        if seed != self.seed and self._seed_given:
            raise ValueError(
                f"state_dict must be of seed {self.seed}, which was given here, got seed {seed}"
            )
        epoch = checked_int(state["epoch"], "state_dict epoch", least=0, below=EPOCHS)
        slot = checked_int(
            state["slot"], "state_dict slot", least=0, below=self.plan.num_batches + 1
        )
        if seed != self.seed:
            self.plan = self.plan.with_seed(seed)
        return epoch, slot

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

    def __getstate__(self) -> dict[str, Any]:
        """Travel without the iterator in progress: a copy begins at the next epoch."""
        state = self.__dict__.copy()
        state["_active"] = None
        return state

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

    def __init__(self, sampler: PatchBatchSampler) -> None:
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Call `PatchBatchSampler.set_epoch`."""
        self._sampler.set_epoch(epoch)


def _checked_ranks(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    world, own = arrays.process_group()
    if (num_replicas is None) != (rank is None) and world == 1:
        missing = "rank" if rank is None else "num_replicas"
        raise ValueError(
            f"num_replicas and rank must be given together where torch.distributed is not "
            f"initialised, got no {missing}"
        )
    num_replicas = checked_int(
        world if num_replicas is None else num_replicas, "num_replicas", least=1, below=1 << 31
    )
    rank = checked_int(own if rank is None else rank, "rank", least=0)
    if rank >= num_replicas:
        raise ValueError(f"rank must be in 0 .. num_replicas - 1 = {num_replicas - 1}, got {rank}")
    return num_replicas, rank
