"""The plan of an epoch: a batch is a pure function of (seed, epoch, slot).

An epoch has M slots. A keyed permutation maps a slot to a batch. A search in the running total of
batches per patch finds the patch of that batch. A second keyed permutation, one per patch, finds
the samples at the batch's positions. Slots can be evaluated in any order, and nothing as large as
the dataset is created. With steps (see `gpusampler.batching.steps`), the first permutation shuffles
steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.batch_units import BatchUnits
from gpusampler.batching.cost_bins import reduce_by_patch
from gpusampler.batching.cost_budget import CostBudget
from gpusampler.batching.costs import check_batch_costs
from gpusampler.batching.mixture import Temperature, check_epoch_batches, slots_by_patch
from gpusampler.batching.short_batches import PARTIALS, Partial, check_min_partial
from gpusampler.batching.steps import STEPS, UNEVENS, StepsKind, Uneven
from gpusampler.batching.tables import PatchTables
from gpusampler.core import devices
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import Device
from gpusampler.core.validation import check_bool, check_choice, check_int, check_seed
from gpusampler.groups.fingerprint import combine, of_numbers
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.permutation.reference import Streams
from gpusampler.plan.evaluators.base import BatchBlock, EvaluatorSettings
from gpusampler.plan.evaluators.select import PlanEvaluator

EPOCH_LIMIT = 1 << 63


class EpochPlan:
    """Every batch of every epoch, as a function of epoch and slot (the batch's position in it).

    Parameters
    ----------
    groups : PatchGroups
        Samples, grouped by patch.
    batch_size : int, mapping or CostBudget
        Number of samples per batch, >= 1: one for all patches, or a mapping from patch ids.
        A `CostBudget` limits the cost of a batch instead.
    seed : int
        0 .. 2**64 - 1.
    shuffle_within_batches : bool
        Permute each patch's samples every epoch before they are cut into batches, so that
        membership changes (not only the order in a batch). If False, samples that fill no batch
        (under ``partial``, ``min_partial`` or ``uneven``) are the same in every epoch.
    shuffle_patches : bool
        Permute the order of the batches each epoch.
    interleave : bool
        Mix the batches of different patches. If False, the batches of a patch are consecutive, and
        `shuffle_patches` permutes the patches.
    partial : {"keep", "drop", "pad", "even"}
        What to do with a short last batch of a patch: return it short, leave it out, or fill it up
        with samples of the same patch. "even" divides the patch evenly into as many batches as
        "keep": their sizes differ by at most one.
    min_partial : int
        Under "keep" and "even", leave out batches with fewer samples than this.
    steps : {"free", "balanced", "same_patch"}
        What the batches of ``step_width`` consecutive slots have in common: nothing, nearly the
        same cost, or the same patch.
    step_width : int
        Number of slots per step, >= 1; must be 1 under "free", unless ``costliest_first``.
    uneven : {"pad", "drop"}
        Under "same_patch", what to do if a patch's batches do not fill its last step: repeat the
        patch's first batches, or leave out that step. No effect otherwise.
    patch_costs : array (G,), mapping or callable, optional
        Under "balanced" or with ``costliest_first``, the cost of a sample of each patch, in any
        unit: positive numbers by ascending patch id, a mapping from patch ids, or a function of the
        patch id. Default: the costs of a `CostBudget`, else 1.
    costliest_first : bool
        Swap the most expensive full batches into the first ``step_width`` slots of every epoch.
    weights : mapping, array (G,) or Temperature, optional
        Each patch's share of an epoch's batches: numbers >= 0 as a mapping from patch ids, or by
        ascending patch id. Shares are met to within one batch. A patch has at least one batch, or
        none if its weight is 0. A patch with more batches than its samples fill starts its next
        pass in the same epoch, under a different permutation. A patch with fewer continues its pass
        in the next epoch. Each pass contains every sample of its batches once. Default: as many
        batches as the samples fill.
    epoch_batches : int, optional
        Number of batches per epoch (all ranks together), below 2**60. With weights, at least one
        per patch. Without, it may be less than the number G of patches (or cost bins): then each
        has one batch in G consecutive slots, which span several epochs. Default: as many as the
        samples of all patches fill.
    device : str, torch.device or Device, optional
        Device of `evaluate` and its results. Default: the device of ``groups``. If the device runs
        out of memory, the host evaluates instead; the results are identical.

    Attributes
    ----------
    batch_size : int or None
        Number of samples per batch; None if it differs by patch.
    num_batches : int
        M, the number of batches per epoch, over all ranks.
    max_batch_size : int
        B, the number of samples in the largest batch, with the filling of "pad".

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or no batch is left.

    Warns
    -----
    UserWarning
        At first use, if the tables take more than half of a device's free memory; once, if the
        device runs out of memory.

    Examples
    --------
    >>> groups = PatchGroups.from_counts([5, 3])
    >>> plan = EpochPlan(groups, 2, seed=0, partial="drop")
    >>> plan.num_batches
    3
    >>> block = plan.evaluate(epoch=4, slots=[2, 0])
    >>> block.indices.shape
    (2, 2)
    """

    def __init__(
        self,
        groups: PatchGroups,
        batch_size: int | Mapping[Any, int] | CostBudget,
        seed: int,
        *,
        shuffle_within_batches: bool = True,
        shuffle_patches: bool = True,
        interleave: bool = True,
        partial: Partial = "keep",
        min_partial: int = 1,
        steps: StepsKind = "free",
        step_width: int = 1,
        uneven: Uneven = "pad",
        patch_costs: Any = None,
        costliest_first: bool = False,
        weights: Mapping[Any, float] | Temperature | Any = None,
        epoch_batches: int | None = None,
        device: Any = None,
    ) -> None:
        if not isinstance(groups, PatchGroups):
            raise TypeError(f"groups must be PatchGroups, got {type(groups).__name__}")
        self.groups = groups
        self.seed = check_seed(seed)
        self.shuffle_within_batches = check_bool(shuffle_within_batches, "shuffle_within_batches")
        self.shuffle_patches = check_bool(shuffle_patches, "shuffle_patches")
        self.interleave = check_bool(interleave, "interleave")
        self.partial = check_choice(partial, "partial", PARTIALS)
        self.min_partial = check_min_partial(min_partial, self.partial)
        self.steps = check_choice(steps, "steps", STEPS)
        self.uneven = check_choice(uneven, "uneven", UNEVENS)
        self.costliest_first = check_bool(costliest_first, "costliest_first")
        if steps == "same_patch" and costliest_first:
            raise ValueError(
                "costliest_first must be False under steps='same_patch', got True: it would move "
                "single batches out of their steps"
            )
        if costliest_first and not interleave:
            raise ValueError(
                "costliest_first must be False if interleave=False, got True: it would move single "
                "batches away from those of their patch"
            )
        if steps == "balanced" and not interleave:
            raise ValueError(
                "interleave must be True under steps='balanced', got False: balanced steps mix "
                "batches of several patches"
            )
        costs = check_batch_costs(patch_costs, groups, self.steps, self.costliest_first)
        self.units = BatchUnits.of(groups, batch_size, self.partial)
        self.batch_size = self.units.common_size
        self._costs = self._costs_of_units(costs)
        if device is None:
            self.device = groups.device
        else:
            self.device = device if isinstance(device, Device) else devices.parse_device(device)
        self._tables = self._build_tables(weights, epoch_batches)
        self._sizes_fingerprint = self.units.fingerprint if self.batch_size is None else 0
        self._set_step_width(step_width)
        self.max_batch_size = self._tables.max_batch_size
        self._labels: Any = None
        settings = EvaluatorSettings(
            shuffle_samples=self.shuffle_within_batches,
            shuffle_batches=self.shuffle_patches,
            interleave=self.interleave,
            pad=self.partial == "pad",
        )
        self.evaluator = PlanEvaluator(
            self._tables, self.units.groups, self.device, settings, Streams.of(self.seed)
        )

    def _costs_of_units(self, costs: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """Return the cost of a sample of each patch or cost bin; None if no setting uses it."""
        units = self.units
        if self.steps != "balanced" and not self.costliest_first:
            return None
        if costs is None:
            return np.ones(units.sizes.shape) if units.costs is None else units.costs
        return costs if units.patch_of_bin is None else costs[units.patch_of_bin]

    def _build_tables(self, weights: Any, epoch_batches: int | None) -> PatchTables:
        """Return the host tables, with steps of one slot."""
        units = self.units
        tables = PatchTables.build(
            units.groups, units.sizes, self.partial, self.min_partial, units.patch_of_bin
        )
        own_batches, num_slots = tables.batches, check_epoch_batches(epoch_batches)
        is_free = self.interleave and self.steps == "free" and not self.costliest_first
        can_visit = is_free and weights is None
        if num_slots is not None and can_visit and num_slots < np.count_nonzero(own_batches):
            tables = tables.with_visits(num_slots)
        elif weights is not None or num_slots is not None:
            tables = tables.with_slot_shares(
                slots_by_patch(weights, num_slots, self.groups, own_batches, units.patch_of_bin)
            )
        if self.steps != "balanced":
            return tables
        assert self._costs is not None
        return tables.with_buckets(self._costs, pad=self.partial == "pad")

    @property
    def table_bytes(self) -> dict[str, int]:
        """Number of bytes that the plan takes on each device once in use, computed beforehand."""
        return self.evaluator.table_bytes

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the batches, besides the ids and the seed; JSON-safe."""
        settings: dict[str, Any] = {
            "batch_size": "by patch" if self.batch_size is None else self.batch_size,
            "shuffle_within_batches": self.shuffle_within_batches,
            "shuffle_patches": self.shuffle_patches,
            "interleave": self.interleave,
            "partial": self.partial,
            "steps": self.steps,
        }
        if self.min_partial != 1:
            settings["min_partial"] = self.min_partial
        if self.batch_size is None:
            settings["batch_sizes"] = self._sizes_fingerprint
        if self.steps == "same_patch":
            settings["uneven"] = self.uneven
        slot_shares = self._tables.slot_shares
        if slot_shares is not None:
            settings["epoch_batches"] = int(slot_shares.sum())
            settings["weights"] = of_numbers(slot_shares)
        elif self._tables.visited is not None:
            settings["epoch_batches"] = self.num_batches
        if self._tables.buckets is not None:
            settings["patch_costs"] = self._tables.buckets.fingerprint
        if self._tables.costliest is not None:
            settings["costliest_first"] = True
            hashes = settings.get("patch_costs", 0), self._tables.costliest.fingerprint
            settings["patch_costs"] = combine(*hashes)
        return settings

    @property
    def tables(self) -> PatchTables:
        """Lookup tables of the evaluation, on the host."""
        return self._tables

    @property
    def sizes_by_patch(self) -> Int64:
        """Batch size of each patch: int64, shape (G,), on the host.

        A patch that is split into cost bins has the largest of their sizes; a patch over the
        budget has size 0.
        """
        return np.asarray(self._by_patch(self.units.sizes, np.maximum))

    @property
    def batches_by_patch(self) -> Int64:
        """Number of batches of each patch per epoch: int64, shape (G,), on the host.

        Under ``steps="same_patch"``, repeated batches are included and dropped ones are not. With
        weights, these are the patches' shares. If an epoch has fewer batches than patches, the
        numbers differ between epochs, and these are those of `own_batches_by_patch`.
        """
        return np.asarray(self._by_patch(self._tables.batches, np.add))

    @property
    def own_batches_by_patch(self) -> Int64:
        """Number of batches that each patch is split into: int64, shape (G,), on the host."""
        return np.asarray(self._by_patch(self._tables.own_batches, np.add))

    @property
    def costs_by_patch(self) -> NDArray[np.float64] | None:
        """Cost of a sample of each patch: float64, shape (G,); None without a `CostBudget`.

        A patch that is split into cost bins has the largest of their costs.
        """
        costs = self.units.costs
        return None if costs is None else self._by_patch(costs, np.maximum)

    def _by_patch(self, values: Any, ufunc: np.ufunc) -> Any:
        """Reduce values of cost bins to values of patches."""
        return reduce_by_patch(values, self.units.patch_of_bin, ufunc)

    @property
    def labels(self) -> Any:
        """Names or ids of the patches, shape (G,): the groups' labels, computed once."""
        if self._labels is None:
            self._labels = self.groups.labels
        return self._labels

    @property
    def step_width(self) -> int:
        """Number of slots per step; 1 under ``steps="free"``, unless ``costliest_first``."""
        return self._step_width

    def _set_step_width(self, step_width: Any) -> None:
        """Divide epochs into steps of this width, and update `num_batches`."""
        width = check_int(step_width, "step_width", low=1, high=1 << 31)
        if self.steps == "free" and width != 1 and not self.costliest_first:
            raise ValueError(
                f"step_width must be 1 under steps='free', got {width}: use steps='balanced' or "
                "'same_patch' for wider steps, or costliest_first=True"
            )
        self._step_width = width
        if self.steps == "same_patch":
            self._tables = self._tables.with_same_patch_steps(width, self.uneven)
        elif self.steps == "balanced":
            self._tables = self._tables.with_step_width(width)
        if self.costliest_first:
            assert self._costs is not None
            self._tables = self._tables.with_costliest_first(
                width, self._costs, pad=self.partial == "pad"
            )
        self.num_batches = self._tables.num_batches

    def with_step_width(self, step_width: int) -> EpochPlan:
        """Return the same plan with a different step width.

        Raises
        ------
        TypeError, ValueError
            If ``step_width`` is not an integer or out of range, or no step is left.
        """
        if step_width == self.step_width:
            return self
        plan = self._alike()
        plan._set_step_width(step_width)
        plan.evaluator = self.evaluator.with_changes(tables=plan._tables)
        return plan

    def with_seed(self, seed: int) -> EpochPlan:
        """Return the same plan with a different seed; the tables are shared.

        Raises
        ------
        TypeError, ValueError
            If ``seed`` is not an integer in 0 .. 2**64 - 1.
        """
        plan = self._alike()
        plan.seed = check_seed(seed)
        plan.evaluator = self.evaluator.with_changes(streams=Streams.of(plan.seed))
        return plan

    def on(self, device: Any) -> EpochPlan:
        """Return the same plan, with identical batches, on a different device.

        Parameters
        ----------
        device : str, torch.device or Device

        Raises
        ------
        ValueError
            If the name is unknown.
        RuntimeError
            If the device is not available.
        """
        device = device if isinstance(device, Device) else devices.parse_device(device)
        if device == self.device:
            return self
        plan = self._alike()
        plan.device = device
        plan.evaluator = self.evaluator.with_changes(device=device)
        return plan

    def _alike(self) -> EpochPlan:
        """Return a plan with the same members; `copy.copy` would drop what pickling drops."""
        plan = EpochPlan.__new__(EpochPlan)
        plan.__dict__.update(self.__dict__)
        return plan

    def evaluate(self, epoch: int, slots: Any, dtype: str = "int64") -> BatchBlock:
        """Return the batches at slots of an epoch.

        Rows are as wide as the largest batch, also if a budget or sizes by patch make the others
        smaller: ``lengths`` says how many samples of a row count.

        Parameters
        ----------
        epoch : int
            0 .. 2**63 - 1.
        slots : integer array or sequence, shape (K,)
            Slots in 0 .. M-1, in any order; they may repeat. An array on the plan's GPU stays
            there, and its values are not checked.
        dtype : {"int64", "int32"}
            dtype of the indices. int32 halves their memory and the bytes written, for datasets of
            up to 2**31 samples.

        Returns
        -------
        BatchBlock
            On the plan's device.

        Raises
        ------
        TypeError
            If ``epoch`` or ``slots`` are not integers.
        ValueError
            If ``epoch`` or a slot is out of range, ``slots`` is not 1-D, or ``dtype`` cannot hold
            the sample indices.
        """
        epoch = check_int(epoch, "epoch", low=0, high=EPOCH_LIMIT)
        check_choice(dtype, "dtype", ("int64", "int32"))
        if dtype == "int32" and self.groups.source_size > 1 << 31:
            raise ValueError(
                "dtype must be 'int64' for more than 2**31 samples, got 'int32' for "
                f"{self.groups.source_size}"
            )
        return self.evaluator.block(epoch, slots, dtype)

    def batch(self, epoch: Any, slot: Any) -> Any:
        """Return one batch; torch.compile and CUDA graphs can capture this function.

        Values are neither checked nor read on the host, and the shape is always the same. Compile
        with fullgraph=True: one graph serves a whole run, for all values of ``epoch`` and ``slot``.
        The graph leaves out operations that no patch of this plan needs. `BatchCursor` calls
        this with advancing epoch and slot.

        Parameters
        ----------
        epoch, slot : 0-d int64 tensors
            On the plan's torch device: 0 .. 2**63 - 1, and 0 .. M-1 (M is the number of batches
            per epoch).

        Returns
        -------
        int64 tensor, shape (B,)
            Samples; B is the largest batch size. Past the batch's length, samples of the same patch
            are repeated.

        Raises
        ------
        TypeError
            If ``epoch`` or ``slot`` is not a 0-d int64 tensor.
        ValueError
            If ``epoch`` or ``slot`` is not on the plan's device.
        RuntimeError
            If the plan is not on a torch device, or its first use is in compiled code: a graph
            cannot contain the upload of the plan's tables.
        """
        return self.evaluator.batch(epoch, slot).indices

    def __getstate__(self) -> dict[str, Any]:
        """Drop cached labels; they are computed again at first use."""
        return {**self.__dict__, "_labels": None}

    def __repr__(self) -> str:
        """Return sizes and settings."""
        listed = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"EpochPlan({self.num_batches} batches, seed={self.seed}, {listed})"
