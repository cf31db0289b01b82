"""The plan of an epoch: a batch is a pure function of (seed, epoch, slot).

An epoch has M slots. Slot s is sent by one keyed permutation to a batch, a search in the running
total of batches per patch says which batch of which patch that is, and another keyed permutation,
the patch's own, says which samples stand at the batch's positions. Any slots can be asked for, in
any order; nothing of the size of the dataset is made. Where batches are handed out in steps (see
`gpusampler.batching.steps`), it is steps that the first permutation sends about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.batch_units import BatchUnits
from gpusampler.batching.cost_bins import reduce_by_patch
from gpusampler.batching.cost_budget import CostBudget
from gpusampler.batching.costs import check_step_costs
from gpusampler.batching.mixture import Temperature, pass_and_batch, slots_by_patch
from gpusampler.batching.short_batches import PARTIALS, Partial, returned_sizes
from gpusampler.batching.steps import STEPS, UNEVENS, StepsKind, Uneven
from gpusampler.batching.tables import PatchOrder, PatchTables
from gpusampler.core import arrays, devices, memory, torch_compile
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST, Device
from gpusampler.core.validation import as_array, check_bool, check_choice, check_int, check_seed
from gpusampler.groups.fingerprint import of_numbers
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.permutation import numpy_impl
from gpusampler.permutation.numba import jit
from gpusampler.permutation.position_ranges import permute_ranges
from gpusampler.permutation.reference import Grid, Streams, grid_of, key_of, permute
from gpusampler.plan.evaluators.base import (
    BatchBlock,
    BatchLocations,
    EvaluatorSettings,
    RaggedBlock,
)
from gpusampler.plan.evaluators.memory_fallback import DEVICE_HINT, SORT_HINT, FullDevices
from gpusampler.plan.evaluators.select import DeviceEvaluator

EPOCH_LIMIT = 1 << 63
T = TypeVar("T")


class EpochPlan:
    """Every batch of every epoch, as a function.

    Parameters
    ----------
    groups : PatchGroups
    batch_size : int, mapping or CostBudget
        Samples in a batch, at least 1: of every patch, or a number for each patch id; or the most
        that a batch may cost.
    seed : int
        0 .. 2**64 - 1.
    shuffle_within_batches : bool
        Permute the samples inside every patch each epoch, so that batches have other members.
    shuffle_patches : bool
        Permute the order of the batches each epoch.
    interleave : bool
        Whether batches of different patches follow one another; if not, all batches of a patch
        come in a row, and `shuffle_patches` permutes the patches.
    partial : {"keep", "drop", "pad"}
        A patch's last batch, when it is short: handed out short, left out, or filled up with
        samples of the same patch.
    steps : {"free", "balanced", "same_patch"}
        What the batches of ``step_width`` slots in a row have in common: nothing; that they cost
        nearly the same; that they are of one patch.
    step_width : int
        Slots of a step, at least 1; 1 under "free".
    uneven : {"pad", "drop"}
        Under "same_patch", what becomes of a patch's batches that fill no step: its first ones
        come again, or they are left out. Of no effect otherwise.
    patch_costs : array (G,), mapping or callable, optional
        Under "balanced", what a sample of each patch costs, in any unit: positive numbers by
        ascending patch id, a mapping from patch ids, or a function of the patch id. Default: the
        costs of a `CostBudget`, else 1.
    weights : mapping, array (G,) or Temperature, optional
        What share of an epoch's batches a patch has, within one batch, but at least one: positive
        numbers by patch id, or by ascending patch id. Above its own batches a patch is gone through
        again, under another permutation; below, the next epoch goes on where this one stops, so
        that every sample comes round once a pass. Default: its own batches.
    epoch_batches : int, optional
        Batches of an epoch (all ranks together), at least one a patch, below 2**60. Default: all
        patches' own batches.
    device : str, torch.device or Device, optional
        Where `evaluate` works and its results lie. Default: where the groups' order lies. Where
        its memory runs out, the host works on, with the same results.

    Attributes
    ----------
    batch_size : int, or None
        Samples in a batch; None where patches have sizes of their own.
    num_batches : int
        M, batches in an epoch, over all ranks.
    max_batch_size : int
        B, the largest batch that any patch can fill (its size under "pad").

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described, or no batch is left.

    Warns
    -----
    UserWarning
        At first use, if the tables take more than half of a device's free memory; once, if it runs
        out.

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
        steps: StepsKind = "free",
        step_width: int = 1,
        uneven: Uneven = "pad",
        patch_costs: Any = None,
        weights: Mapping[Any, float] | Temperature | Any = None,
        epoch_batches: int | None = None,
        device: Any = None,
    ) -> None:
        if not isinstance(groups, PatchGroups):
            raise TypeError(f"groups must be PatchGroups, got {type(groups).__name__}")
        self.groups = groups
        self.seed = check_seed(seed)
        self._streams = Streams.of(self.seed)
        self.shuffle_within_batches = check_bool(shuffle_within_batches, "shuffle_within_batches")
        self.shuffle_patches = check_bool(shuffle_patches, "shuffle_patches")
        self.interleave = check_bool(interleave, "interleave")
        self.partial = check_choice(partial, "partial", PARTIALS)
        self.steps = check_choice(steps, "steps", STEPS)
        self.uneven = check_choice(uneven, "uneven", UNEVENS)
        if steps == "balanced" and not interleave:
            raise ValueError(
                "interleave must be True under steps='balanced', got False: batches of equal cost "
                "are of several patches"
            )
        costs = check_step_costs(patch_costs, groups, self.steps)
        self._units = BatchUnits.of(groups, batch_size, self.partial)
        self.batch_size = self._units.common_size
        if device is None:
            self.device = groups.device
        else:
            self.device = device if isinstance(device, Device) else devices.parse_device(device)
        self._tables = self._build_tables(weights, epoch_batches, costs)
        self._sizes_fingerprint = self._units.fingerprint if self.batch_size is None else 0
        self._set_step_width(step_width)
        self.max_batch_size = self._tables.max_batch_size
        self._device_evaluator: DeviceEvaluator | None = None
        self._host_order: Any = None
        self._labels: Any = None
        self._patch_orders: dict[int, PatchOrder] = {}
        # Devices whose memory has run out; plans that are alike share what they have found out.
        self._full_devices = FullDevices()

    def _build_tables(
        self, weights: Any, epoch_batches: int | None, costs: NDArray[np.float64] | None
    ) -> PatchTables:
        """Return the host tables, in steps of one slot."""
        units = self._units
        tables = PatchTables.build(units.groups, units.sizes, self.partial, units.patch_of_bin)
        if weights is not None or epoch_batches is not None:
            own_batches = tables.batches
            tables = tables.with_slot_shares(
                slots_by_patch(weights, epoch_batches, self.groups, own_batches, units.patch_of_bin)
            )
        if self.steps != "balanced":
            return tables
        if costs is None:
            costs = np.ones(tables.counts.shape) if units.costs is None else units.costs
        elif units.patch_of_bin is not None:
            costs = costs[units.patch_of_bin]
        return tables.with_buckets(self.partial, costs)

    @property
    def works_on_host(self) -> bool:
        """Whether NumPy does the work here."""
        # A DataLoader's worker must not touch a GPU: NumPy makes the same batches there.
        return self.device.on_host or self.device in self._full_devices or devices.is_in_worker()

    @property
    def needs_upload(self) -> bool:
        """Whether `upload_tables` has something to do."""
        return self._device_evaluator is None and not self.works_on_host

    @property
    def table_bytes(self) -> dict[str, int]:
        """What the plan takes on each device once it is in use: known before it is allocated."""
        order = self._units.groups._unchecked_order
        host = str(HOST)
        sizes = {host: self._tables.nbytes}
        if order is not None:
            device = arrays.device_of(order)
            name = host if device.on_host else str(device)
            sizes[name] = sizes.get(name, 0) + int(order.nbytes)
            if self.works_on_host and not device.on_host:
                sizes[host] += int(order.nbytes)
        if not self.works_on_host or self._device_evaluator is not None:
            name = str(self.device)
            sizes[name] = sizes.get(name, 0) + self._upload_nbytes()
        return sizes

    def _upload_nbytes(self) -> int:
        order = self._units.groups._unchecked_order
        needs_upload = order is not None and arrays.device_of(order) != self.device
        return self._tables.upload_nbytes + (int(order.nbytes) if needs_upload else 0)

    @property
    def block_lanes(self) -> int:
        """Indices that are best evaluated at once: enough to spread the cost of a call.

        On the host they still lie in cache when they are made into lists. On a device a kernel
        needs no room but for its result; array operations need a few dozen arrays of it.
        """
        evaluator = None if self.works_on_host else self.upload_tables()
        if evaluator is None:
            # A call of the compiled form is dearer beside its work.
            return 1 << 15 if jit.compiled_form(0) is None else 1 << 16
        return 1 << 18 if evaluator.has_kernel else 1 << 16

    @property
    def settings(self) -> dict[str, Any]:
        """What changes the batches, besides the ids and the seed; JSON-safe."""
        settings: dict[str, Any] = {
            "batch_size": "by patch" if self.batch_size is None else self.batch_size,
            "shuffle_within_batches": self.shuffle_within_batches,
            "shuffle_patches": self.shuffle_patches,
            "interleave": self.interleave,
            "partial": self.partial,
            "steps": self.steps,
        }
        if self.batch_size is None:
            settings["batch_sizes"] = self._sizes_fingerprint
        if self.steps == "same_patch":
            settings["uneven"] = self.uneven
        slot_shares = self._tables.slot_shares
        if slot_shares is not None:
            settings["epoch_batches"] = int(slot_shares.sum())
            settings["weights"] = of_numbers(slot_shares)
        if self._tables.buckets is not None:
            settings["patch_costs"] = self._tables.buckets.fingerprint
        return settings

    @property
    def tables(self) -> PatchTables:
        """What evaluation looks up, on the host."""
        return self._tables

    @property
    def sizes_by_patch(self) -> Int64:
        """Batch size of each patch: int64, shape (G,), on the host.

        The largest where a patch is cut into cost bins; 0 where it is over the budget.
        """
        return np.asarray(self._by_patch(self._units.sizes, np.maximum))

    @property
    def batches_by_patch(self) -> Int64:
        """Batches of each patch in an epoch: int64, shape (G,), on the host.

        Under ``steps="same_patch"`` with those that come again, without those that are left out;
        with weights, as many as they give it.
        """
        return np.asarray(self._by_patch(self._tables.batches, np.add))

    @property
    def own_batches_by_patch(self) -> Int64:
        """Batches that each patch is cut into: int64, shape (G,), on the host."""
        return np.asarray(self._by_patch(self._tables.own_batches, np.add))

    @property
    def over_budget_by_patch(self) -> Int64:
        """Samples of each patch that are over the budget, and skipped: int64, shape (G,)."""
        return self._samples_by_patch(self._units.sizes == 0)

    @property
    def dropped_by_patch(self) -> Int64:
        """Samples of each patch, or cost bin of it, that has no batch at all: int64, (G,).

        As "drop" leaves out what fills none; not those that are over the budget.
        """
        return self._samples_by_patch((self._tables.own_batches == 0) & (self._units.sizes > 0))

    @property
    def without_steps_by_patch(self) -> Int64:
        """Samples of each patch, or cost bin of it, whose batches fill no step: int64."""
        tables = self._tables
        return self._samples_by_patch((tables.batches == 0) & (tables.own_batches > 0))

    def _samples_by_patch(self, mask: NDArray[np.bool_]) -> Int64:
        """Return the samples of each patch that are in certain groups."""
        return np.asarray(self._by_patch(np.where(mask, self._tables.counts, 0), np.add))

    @property
    def costs_by_patch(self) -> NDArray[np.float64] | None:
        """Cost of a sample of each patch, of a `CostBudget`: float64, shape (G,); None without.

        The largest where a patch is cut into cost bins.
        """
        costs = self._units.costs
        return None if costs is None else self._by_patch(costs, np.maximum)

    @property
    def costs_are_of_samples(self) -> bool:
        """Whether those are the largest of samples that differ: of ``sample_costs``."""
        return self._units.has_sample_costs

    def _by_patch(self, values: Any, ufunc: np.ufunc) -> Any:
        """Reduce numbers of cost bins to numbers of patches."""
        return reduce_by_patch(values, self._units.patch_of_bin, ufunc)

    @property
    def labels(self) -> Any:
        """What the user calls the patches, shape (G,): the groups' labels, made once."""
        if self._labels is None:
            self._labels = self.groups.labels
        return self._labels

    @property
    def step_width(self) -> int:
        """Slots of a step; 1 under ``steps="free"``."""
        return self._tables.layout.width

    def _set_step_width(self, step_width: Any) -> None:
        """Cut epochs into steps of a width."""
        width = check_int(step_width, "step_width", low=1, high=1 << 31)
        if self.steps == "free" and width != 1:
            raise ValueError(
                "step_width must be left out under steps='free', where a step is a single batch, "
                f"got {width}; steps='balanced' and 'same_patch' have a use for it"
            )
        if self.steps == "same_patch":
            self._tables = self._tables.with_same_patch_steps(width, self.uneven)
        else:
            self._tables = self._tables.with_step_width(width)
        self.num_batches = self._tables.num_batches

    def with_step_width(self, step_width: int) -> EpochPlan:
        """Return the same plan in steps of another width.

        Raises
        ------
        TypeError, ValueError
            If ``step_width`` is no integer or out of range, or no step is left.
        """
        if step_width == self.step_width:
            return self
        plan = self._alike()
        plan._set_step_width(step_width)
        plan._device_evaluator = None
        plan._patch_orders = {}
        return plan

    def with_seed(self, seed: int) -> EpochPlan:
        """Return the same plan under another seed; the tables are shared.

        Raises
        ------
        TypeError, ValueError
            If ``seed`` is no integer in 0 .. 2**64 - 1.
        """
        plan = self._alike()
        plan.seed = check_seed(seed)
        plan._streams = Streams.of(plan.seed)
        plan._patch_orders = {}
        return plan

    def on(self, device: Any) -> EpochPlan:
        """Return the same plan, with the same batches, evaluated on another device.

        Parameters
        ----------
        device : str, torch.device or Device

        Raises
        ------
        ValueError
            If the name is not known.
        RuntimeError
            If the device is not there.
        """
        device = device if isinstance(device, Device) else devices.parse_device(device)
        if device == self.device:
            return self
        plan = self._alike()
        plan.device = device
        plan._device_evaluator = None
        return plan

    def _alike(self) -> EpochPlan:
        """Return a plan with the same members; `copy.copy` would leave out what cannot travel."""
        plan = EpochPlan.__new__(EpochPlan)
        plan.__dict__.update(self.__dict__)
        return plan

    def evaluate(self, epoch: int, slots: Any, dtype: str = "int64") -> BatchBlock:
        """Return the batches at some slots of an epoch.

        Parameters
        ----------
        epoch : int
            0 .. 2**63 - 1.
        slots : integer array or sequence, shape (K,)
            Slots in 0 .. M-1, in any order, repeated or not. On a GPU, an array on the plan's
            device stays there and is not inspected.
        dtype : {"int64", "int32"}
            Of the indices; int32 halves the memory and what is written, for datasets of up to
            2**31 samples.

        Returns
        -------
        BatchBlock
            On the plan's device.

        Raises
        ------
        TypeError
            If ``epoch`` or ``slots`` are no integers.
        ValueError
            If one is out of range, ``slots`` is not 1-D, or ``dtype`` cannot hold the samples.
        """
        epoch = check_int(epoch, "epoch", low=0, high=EPOCH_LIMIT)
        check_choice(dtype, "dtype", ("int64", "int32"))
        if dtype == "int32" and self.groups.source_size > 1 << 31:
            raise ValueError(
                "dtype must be 'int64' for more than 2**31 samples, got 'int32' for "
                f"{self.groups.source_size}"
            )
        if self.works_on_host:
            block = self._evaluate_on_host(epoch, self._check_host_slots(slots))
            block = block._replace(indices=block.indices.astype(dtype, copy=False))
            device = HOST if devices.is_in_worker() and not self.device.on_host else self.device
            return BatchBlock(*(arrays.to_device(array, device) for array in block))
        # Checked before anything is sent: what is wrong with them is no matter of memory.
        checked_slots = self._check_slots(slots)

        def evaluate_on_device(evaluator: DeviceEvaluator) -> BatchBlock:
            device_slots, order = self._slots_on_device(checked_slots), self._patch_order(epoch)
            return BatchBlock(*evaluator.block(self._streams, epoch, device_slots, order, dtype))

        device_block = self._try_on_device(evaluate_on_device)
        # The second time, the host does it.
        return self.evaluate(epoch, slots, dtype) if device_block is None else device_block

    def batch(self, epoch: Any, slot: Any) -> Any:
        """Return one batch, as a function that torch.compile and CUDA graphs can take in.

        Nothing is checked or inspected on the host, and the shape is always the same. Compile
        with fullgraph=True: one graph serves a whole run, whatever ``epoch`` and ``slot`` hold.
        What no patch of this plan needs is left out of it. `BatchCursor` drives it.

        Parameters
        ----------
        epoch, slot : int64 tensors, 0-d
            On the plan's device, a torch one: 0 .. 2**63 - 1 and 0 .. M-1.

        Returns
        -------
        int64 tensor, shape (B,)
            Samples; those beyond the batch's length repeat samples of the same patch.

        Raises
        ------
        TypeError
            If ``epoch`` or ``slot`` is no 0-d int64 tensor.
        ValueError
            If one is on another device.
        RuntimeError
            If the plan is first used while it is compiled: its tables go to the device by
            copies that are no part of a graph.
        """
        return self.batch_of_tensors(epoch, slot).indices

    def batch_of_tensors(self, epoch: Any, slot: Any) -> BatchBlock:
        """Return `batch` with its length and its group, 0-d int64 tensors each.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As by `batch` and `prepare_batch`.
        """
        evaluator = self._device_evaluator
        if evaluator is None or not evaluator.is_prepared:
            evaluator = self.prepare_batch()
        # Kinds only, which are known without the device, and while a graph is traced.
        torch_compile.check_counter(epoch, "epoch", self.device)
        torch_compile.check_counter(slot, "slot", self.device)
        return BatchBlock(*evaluator.batch(self._streams, epoch, slot))

    def prepare_batch(self) -> DeviceEvaluator:
        """Put on the device what `batch` needs; its first call does, unless it is compiled.

        Raises
        ------
        RuntimeError
            If the device is none of torch's, or the caller is being compiled.
        """
        if self.device.library != "torch":
            raise RuntimeError(
                f"device must be one of torch for plan.batch, got {str(self.device)!r}; "
                "plan.on('cpu') is the same plan on torch"
            )
        if torch_compile.is_compiling():
            raise RuntimeError(
                "plan.batch must be called once before it is compiled, or sampler.cursor() made: "
                "its tables go to the device by copies that are no part of a graph"
            )
        evaluator = self._evaluator()
        # Without fullgraph=True, torch traces by itself each function that a graph breaks off in.
        torch_compile.untraced(evaluator.prepare)()
        return evaluator

    def evaluate_ragged(self, epoch: int, slots: Int64) -> RaggedBlock:
        """Return the batches at some slots as iteration hands them out, without a check.

        Parameters
        ----------
        epoch : int
        slots : int64 array, shape (K,)
            Slots in 0 .. M-1.
        """
        return self.batches_at(epoch, self.locate(epoch, slots))

    def batches_at(self, epoch: int, at: BatchLocations) -> RaggedBlock:
        """Return the batches that `locate` found (the second half of `evaluate_ragged`)."""
        samples = None
        if not self.works_on_host:
            samples = self._try_on_device(lambda device: device.ragged(self._streams, epoch, at))
        if samples is None:
            samples, starts = self._samples_on_host(epoch, at, at.size)
        else:
            starts = np.cumsum(at.size) - at.size
        return RaggedBlock(samples, starts, at.size, at.length, self._patches_of_batches(at))

    def locate(self, epoch: int, slots: Int64) -> BatchLocations:
        """Return which batch of which patch slots lead to: NumPy, on the small host tables."""
        tables = self._tables
        patch_order = self._patch_order(epoch)
        if patch_order is not None:
            groups, offsets = patch_order
            index = np.searchsorted(offsets, slots, side="right") - 1
            group, j = groups[index], slots - offsets[index]
        else:
            batch_index = self._batch_indices(epoch, slots) if self.shuffle_patches else slots
            if tables.buckets is None:
                group = np.searchsorted(tables.batch_offsets, batch_index, side="right") - 1
                j = batch_index - tables.batch_offsets[group]
            else:
                group, j = tables.buckets.locate(np, batch_index)
        passes = None
        if tables.batches_per_pass is not None:
            own_batches = tables.batches_per_pass[group]
            if tables.slot_shares is None:
                j = j % own_batches
            else:
                passes, j = pass_and_batch(epoch, j, tables.batches[group], own_batches)
        size = tables.sizes[group]
        length = np.minimum(size, tables.counts[group] - j * size)
        size = returned_sizes(size, length, self.partial)
        return BatchLocations(slots, group, j, length, size, passes)

    def _patches_of_batches(self, locations: BatchLocations) -> Int64:
        """Return the patches that located batches are of."""
        group, patch_of_bin = locations.group, self._tables.patch_of_bin
        return group if patch_of_bin is None else np.asarray(patch_of_bin[group])

    def _batch_indices(self, epoch: int, slots: Int64) -> Int64:
        """Return the indices, in the natural order of batches, that slots lead to."""
        layout, buckets = self._tables.layout, self._tables.buckets
        index = slots
        if layout.has_step_order:
            key = key_of(self._streams.batches, epoch, 0)
            index = layout.batch_indices(
                np, slots, key, lambda steps: _permute_on_host(steps, layout.full, key)
            )
        if buckets is None or slots.size == 0:
            return index
        bucket = buckets.bucket_of(np, index)
        offset, n = buckets.offsets[bucket], buckets.counts[bucket]
        key = key_of(self._streams.buckets, epoch, bucket)
        grid = Grid(*(side[bucket] for side in buckets.grid))
        within = index - offset
        if buckets.largest >= 1 << 31:
            xp, bounds = arrays.namespace(HOST), (buckets.smallest, buckets.largest)
            return np.asarray(offset + permute(xp, within, n, key, grid, *bounds))
        ones = np.ones_like(within)
        image, starts = permute_ranges(within, ones, n, key, grid, offset, None)
        return image[starts]

    def _patch_order(self, epoch: int) -> PatchOrder | None:
        """Return an epoch's order of the patches, None if interleaved; the last two are cached."""
        if self.interleave:
            return None
        patch_order = self._patch_orders.get(epoch)
        if patch_order is None:
            tables = self._tables
            patches = np.arange(tables.num_patches, dtype=np.int64)
            if self.shuffle_patches:
                key = key_of(self._streams.patches, epoch, 0)
                patches = numpy_impl.permute_one(patches, patches.size, key, grid_of(patches.size))
            group_numbers = np.arange(tables.counts.size, dtype=np.int64)
            patch_order = tables.patch_order(arrays.namespace(HOST), patches, group_numbers)
            # Replaced, not changed: another thread may be reading.
            self._patch_orders = {**dict([*self._patch_orders.items()][-1:]), epoch: patch_order}
        return patch_order

    def _evaluate_on_host(self, epoch: int, slots: Int64) -> BatchBlock:
        locations = self.locate(epoch, slots)
        width = self.max_batch_size
        sizes = np.full(slots.size, width, np.int64)
        samples, starts = self._samples_on_host(epoch, locations, sizes)
        block = samples.reshape(slots.size, width)
        if bool((starts[1:] < starts[:-1]).any()):
            block = block[starts // width]
        return BatchBlock(block, locations.length, self._patches_of_batches(locations))

    def _samples_on_host(
        self, epoch: int, locations: BatchLocations, sizes: Int64
    ) -> tuple[Int64, Int64]:
        """Samples of batches on the host, ``sizes`` of each, and where each batch starts."""
        group, tables = locations.group, self._tables
        passes = epoch if locations.passes is None else locations.passes
        first, base = locations.j * tables.sizes[group], tables.starts[group]
        return self.permute_positions(group, passes, first, sizes, base, self._order_on_host())

    def permute_positions(
        self, group: Int64, passes: Any, first: Int64, length: Int64, base: Int64, order: Any = None
    ) -> tuple[Int64, Int64]:
        """Return what ranges of positions in passes over groups are permuted to, from ``base`` on.

        Parameters
        ----------
        group, passes, first, length, base : int64 arrays, shape (K,)
            Group, pass, first position and positions of each range, and where its group's samples
            begin. ``passes`` may be one int.
        order : integer array, shape (N,), optional
            Looked up at the results.

        Returns
        -------
        permuted : int64 array, shape (T,)
        starts : int64 array, shape (K,)
            Where each range starts in ``permuted``.
        """
        key = None
        if self.shuffle_within_batches:
            key = key_of(self._streams.samples, passes, group)
        grid = Grid(*(side[group] for side in self._tables.grid))
        return permute_ranges(first, length, self._tables.counts[group], key, grid, base, order)

    def _order_on_host(self) -> Any:
        # Asked for every time: a file that it is mapped from is looked at first.
        order = self._units.groups.order
        if order is None or arrays.library_of(order) == "numpy":
            return order
        if self._host_order is None:
            if devices.is_in_worker() and not arrays.device_of(order).on_host:
                raise RuntimeError(
                    "ids must be on the host, or the loader's multiprocessing_context 'spawn', "
                    "where a worker of a DataLoader evaluates the plan, got an order on "
                    f"{arrays.device_of(order)}, which a forked worker cannot read"
                )
            if not arrays.device_of(order).on_host:
                purpose = "the order of the samples, which the host works with"
                memory.check_free_memory(int(order.nbytes), HOST, purpose, SORT_HINT)
            self._host_order = arrays.to_numpy(order)
        return self._host_order

    def evaluate_reference(self, epoch: int, slots: Any) -> BatchBlock:
        """Return `evaluate` in plain array operations on the plan's device, without a check.

        The form that every faster one must equal. Nothing is inspected on the host.

        Parameters
        ----------
        epoch : int
        slots : int64 array on the plan's device, shape (K,)
        """
        order = self._patch_order(epoch)
        return BatchBlock(*self._evaluator().block_by_arrays(self._streams, epoch, slots, order))

    def _evaluator(self) -> DeviceEvaluator:
        """Return the evaluation on the plan's device; its tables are made at first use."""
        if self._device_evaluator is None:
            settings = EvaluatorSettings(
                shuffle_samples=self.shuffle_within_batches,
                shuffle_batches=self.shuffle_patches,
                interleave=self.interleave,
                pad=self.partial == "pad",
            )
            purpose = f"the tables of {self.groups.num_samples} samples"
            memory.check_free_memory(self._upload_nbytes(), self.device, purpose, DEVICE_HINT)
            order = self._units.groups.order
            self._device_evaluator = DeviceEvaluator(self._tables, self.device, order, settings)
        return self._device_evaluator

    def upload_tables(self) -> DeviceEvaluator | None:
        """Put the tables on the device, if they are not there; None where they do not fit."""
        return self._try_on_device(lambda evaluator: evaluator)

    def _try_on_device(self, call: Callable[[DeviceEvaluator], T]) -> T | None:
        """Return what the device makes; None if it is full, and the host goes on."""
        try:
            return call(self._evaluator())
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            self.fall_back_to_host(error)
            return None

    def fall_back_to_host(self, error: Exception) -> None:
        """Leave a device whose memory has run out, with one warning; the batches stay the same."""
        if self.device in self._full_devices:
            return
        self._full_devices.add(self.device, self._upload_nbytes(), error)
        # A graph that was captured or compiled goes on to read the tables where they were.
        if self._device_evaluator is not None and not self._device_evaluator.is_prepared:
            self._device_evaluator = None

    def _check_slots(self, slots: Any) -> Any:
        """Return slots as they are to be sent: checked for their values if they are on the host."""
        if arrays.library_of(slots) is None or arrays.device_of(slots).on_host:
            return self._check_host_slots(slots)
        self._check_slots_type(slots)
        return slots

    def _slots_on_device(self, slots: Any) -> Any:
        """Return checked slots as int64 on the plan's device."""
        if arrays.library_of(slots) == "numpy":
            return arrays.upload(slots, self.device)
        slots = arrays.to_device(slots, self.device)
        xp = arrays.namespace(self.device)
        # Kernels read them side by side.
        return arrays.as_contiguous(xp.astype(slots, xp.int64, copy=False))

    def _check_host_slots(self, slots: Any) -> Int64:
        slots = arrays.to_numpy(as_array(slots, "slots"))
        if slots.size == 0 and slots.ndim == 1:
            return np.zeros(0, np.int64)
        self._check_slots_type(slots)
        for extreme in (int(slots.min()), int(slots.max())):
            if not 0 <= extreme < self.num_batches:
                raise ValueError(f"slots must be in 0 .. {self.num_batches - 1}, got {extreme}")
        return np.asarray(slots, np.int64)

    @staticmethod
    def _check_slots_type(slots: Any) -> None:
        if slots.ndim != 1:
            raise ValueError(f"slots must be 1-D, got shape {tuple(slots.shape)}")
        if not arrays.is_integer(slots):
            raise TypeError(f"slots must be integers, got dtype {arrays.dtype_name(slots)}")

    def __getstate__(self) -> dict[str, Any]:
        """Travel without live device memory; it is rebuilt at first use."""
        state = self.__dict__.copy()
        state.update(_device_evaluator=None, _host_order=None, _labels=None)
        state.update(_patch_orders={}, _full_devices=FullDevices())
        return state

    def __repr__(self) -> str:
        """Return sizes and settings."""
        listed = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"EpochPlan({self.num_batches} batches, seed={self.seed}, {listed})"


def _permute_on_host(x: Int64, n: int, key: tuple[int, int]) -> Int64:
    """Return the images of ``x`` under one permutation of 0 .. n-1."""
    if n == 1:
        return x
    grid = grid_of(n)
    if n <= numpy_impl.MAX_N:
        return numpy_impl.permute_one(x, n, key, grid)
    return np.asarray(permute(arrays.namespace(HOST), x, n, key, grid, n, n))
