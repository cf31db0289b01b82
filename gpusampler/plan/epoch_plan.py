"""The plan of an epoch: a batch is a pure function of (seed, epoch, slot).

An epoch has M slots. Slot s is sent by one keyed permutation to a batch, a search in the running
total of batches per patch says which batch of which patch that is, and another keyed permutation,
the patch's own, says which samples stand at the batch's positions. Any slots can be asked for, in
any order; nothing of the size of the dataset is made. Where batches are handed out in steps (see
`gpusampler.batching.steps`), it is steps that the first permutation sends about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.batch_units import Cut, by_parent
from gpusampler.batching.cost_budget import CostBudget
from gpusampler.batching.costs import checked_costs
from gpusampler.batching.mixture import Temperature, pass_and_batch, slots_by_patch
from gpusampler.batching.steps import STEPS, StepsKind
from gpusampler.batching.tables import PatchOrder, PatchTables
from gpusampler.core import arrays, devices, log, memory, torch_compile
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST, Device
from gpusampler.core.text import human
from gpusampler.core.validation import (
    as_array,
    checked_bool,
    checked_choice,
    checked_int,
    checked_seed,
)
from gpusampler.groups.fingerprint import of_numbers
from gpusampler.groups.patch_groups import PatchGroups
from gpusampler.permutation import numpy_impl
from gpusampler.permutation.numba import jit
from gpusampler.permutation.ranges import permute_runs
from gpusampler.permutation.reference import Grid, Streams, grid_of, key_of, permute
from gpusampler.plan.evaluators.base import BatchBlock, BatchLocations, RaggedBlock, Shuffles
from gpusampler.plan.evaluators.select import Evaluator

Partial = Literal["keep", "drop", "pad"]
PARTIALS = ("keep", "drop", "pad")
Uneven = Literal["pad", "drop"]
UNEVENS = ("pad", "drop")
EPOCHS = 1 << 63
T = TypeVar("T")

INSTEAD = (
    "keep ids of a patch side by side (no order is needed then), or write device='numpy': the "
    "batches are the same"
)
FEWER_BYTES = "sort the dataset by patch, so that no order is needed"
"""What to do where tables are large."""


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
        self.seed = checked_seed(seed)
        self._streams = Streams.of(self.seed)
        self.shuffle_within_batches = checked_bool(shuffle_within_batches, "shuffle_within_batches")
        self.shuffle_patches = checked_bool(shuffle_patches, "shuffle_patches")
        self.interleave = checked_bool(interleave, "interleave")
        self.partial = checked_choice(partial, "partial", PARTIALS)
        self.steps = checked_choice(steps, "steps", STEPS)
        self.uneven = checked_choice(uneven, "uneven", UNEVENS)
        if steps == "balanced" and not interleave:
            raise ValueError(
                "interleave must be True under steps='balanced', got False: batches of equal cost "
                "are of several patches"
            )
        costs = checked_costs(patch_costs, groups, self.steps)
        self._cut = Cut.of(groups, batch_size, self.partial)
        self.batch_size = self._cut.one_size
        if device is None:
            self.device = groups.device
        else:
            self.device = device if isinstance(device, Device) else devices.parse_device(device)
        self._tables = self._tables_for(weights, epoch_batches, costs)
        self._sizes_fingerprint = self._cut.fingerprint if self.batch_size is None else 0
        self._take_steps(step_width)
        self.max_batch_size = self._tables.max_batch_size
        self._on_device: Evaluator | None = None
        self._host_order: Any = None
        self._labels: Any = None
        self._patch_orders: dict[int, PatchOrder] = {}
        # Devices whose memory has run out; plans that are alike share what they have found out.
        self._full: set[Device] = set()

    def _tables_for(
        self, weights: Any, epoch_batches: int | None, costs: NDArray[np.float64] | None
    ) -> PatchTables:
        """Return the host tables, in steps of one slot."""
        cut = self._cut
        tables = PatchTables.build(cut.groups, cut.sizes, self.partial, cut.parents)
        if weights is not None or epoch_batches is not None:
            tables = tables.mixed(
                slots_by_patch(weights, epoch_batches, self.groups, tables.batches, cut.parents)
            )
        if self.steps != "balanced":
            return tables
        if costs is None:
            costs = np.ones(tables.counts.shape) if cut.costs is None else cut.costs
        elif cut.parents is not None:
            costs = costs[cut.parents]
        return tables.balanced(self.partial, costs)

    @property
    def works_on_host(self) -> bool:
        """Whether NumPy does the work here."""
        # A DataLoader's worker must not touch a GPU: NumPy makes the same batches there.
        return self.device.on_host or self.device in self._full or devices.in_worker()

    @property
    def needs_upload(self) -> bool:
        """Whether `upload_tables` has something to do."""
        return self._on_device is None and not self.works_on_host

    @property
    def table_bytes(self) -> dict[str, int]:
        """What the plan takes on each device once it is in use: known before it is allocated."""
        order = self._cut.groups._order_unchecked
        host = str(HOST)
        sizes = {host: self._tables.nbytes}
        if order is not None:
            there = arrays.device_of(order)
            name = host if there.on_host else str(there)
            sizes[name] = sizes.get(name, 0) + int(order.nbytes)
        if self.works_on_host and order is not None and not arrays.device_of(order).on_host:
            sizes[host] += int(order.nbytes)
        if not self.works_on_host or self._on_device is not None:
            name = str(self.device)
            sizes[name] = sizes.get(name, 0) + self._bytes_to_send()
        return sizes

    def _bytes_to_send(self) -> int:
        order = self._cut.groups._order_unchecked
        travels = order is not None and arrays.device_of(order) != self.device
        return self._tables.nbytes_sent + (int(order.nbytes) if travels else 0)

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
        shares = self._tables.shares
        if shares is not None:
            settings["epoch_batches"] = int(shares.sum())
            settings["weights"] = of_numbers(shares)
        if self._tables.classes is not None:
            settings["patch_costs"] = self._tables.classes.fingerprint
        return settings

    @property
    def tables(self) -> PatchTables:
        """What evaluation looks up, on the host."""
        return self._tables

    @property
    def sizes_by_patch(self) -> Int64:
        """Batch size of each patch: int64, shape (G,), on the host.

        The largest where a patch is cut into classes of cost; 0 where it is over the budget.
        """
        return np.asarray(self._by_patch(self._cut.sizes, np.maximum))

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
        own = self._tables.own
        return self.batches_by_patch if own is None else np.asarray(self._by_patch(own, np.add))

    @property
    def over_budget_by_patch(self) -> Int64:
        """Samples of each patch that are over the budget, and skipped: int64, shape (G,)."""
        return self._counted(self._cut.sizes == 0)

    @property
    def dropped_by_patch(self) -> Int64:
        """Samples of each patch, or class of cost of it, that has no batch at all: int64, (G,).

        As "drop" leaves out what fills none; not those that are over the budget.
        """
        tables = self._tables
        own = tables.batches if tables.own is None else tables.own
        return self._counted(np.asarray((own == 0) & (self._cut.sizes > 0)))

    @property
    def without_steps_by_patch(self) -> Int64:
        """Samples of each patch, or class of cost of it, whose batches fill no step: int64."""
        tables = self._tables
        own = tables.batches if tables.own is None else tables.own
        return self._counted(np.asarray((tables.batches == 0) & (own > 0)))

    def _counted(self, which: NDArray[np.bool_]) -> Int64:
        """Return the samples of each patch that are in certain groups."""
        return np.asarray(self._by_patch(np.where(which, self._tables.counts, 0), np.add))

    @property
    def costs_by_patch(self) -> NDArray[np.float64] | None:
        """Cost of a sample of each patch, of a `CostBudget`: float64, shape (G,); None without.

        The largest where a patch is cut into classes of cost.
        """
        costs = self._cut.costs
        return None if costs is None else self._by_patch(costs, np.maximum)

    @property
    def costs_are_of_samples(self) -> bool:
        """Whether those are the largest of samples that differ: of ``sample_costs``."""
        return self._cut.by_sample

    def _by_patch(self, values: Any, gather: np.ufunc) -> Any:
        """Gather what is known of classes of cost by patch; they lie side by side."""
        return by_parent(values, self._cut.parents, gather)

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

    def _take_steps(self, step_width: Any) -> None:
        """Cut epochs into steps of a width."""
        width = checked_int(step_width, "step_width", least=1, below=1 << 31)
        if self.steps == "free" and width != 1:
            raise ValueError(
                "step_width must be left out under steps='free', where a step is a single batch, "
                f"got {width}; steps='balanced' and 'same_patch' have a use for it"
            )
        if self.steps == "same_patch":
            self._tables = self._tables.in_steps_of_one_patch(width, self.uneven)
        else:
            self._tables = self._tables.in_steps(width)
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
        plan._take_steps(step_width)
        plan._on_device = None
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
        plan.seed = checked_seed(seed)
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
        plan._on_device = None
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
        epoch = checked_int(epoch, "epoch", least=0, below=EPOCHS)
        checked_choice(dtype, "dtype", ("int64", "int32"))
        if dtype == "int32" and self.groups.source_size > 1 << 31:
            raise ValueError(
                "dtype must be 'int64' for more than 2**31 samples, got 'int32' for "
                f"{self.groups.source_size}"
            )
        if self.works_on_host:
            block = self._evaluate_on_host(epoch, self._checked_slots(slots))
            block = block._replace(indices=block.indices.astype(dtype, copy=False))
            where = HOST if devices.in_worker() and not self.device.on_host else self.device
            return BatchBlock(*(arrays.to_device(part, where) for part in block))
        # Checked before anything is sent: what is wrong with them is no matter of memory.
        there = self._slots_checked(slots)

        def block_there(evaluator: Evaluator) -> tuple[Any, Any, Any]:
            sent = self._slots_there(there)
            order = self._order_of_patches(epoch)
            return evaluator.block(self._streams, epoch, sent, order, dtype)

        found = self._try_there(block_there)
        # The second time, the host does it.
        return self.evaluate(epoch, slots, dtype) if found is None else BatchBlock(*found)

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
        """Return `batch` with its length and its group, 0-d int64 tensors each."""
        evaluator = self._on_device
        if evaluator is None or not evaluator.prepared:
            evaluator = self.prepare_batch()
        # Kinds only, which are known without the device, and while a graph is traced.
        torch_compile.check_counter(epoch, "epoch", self.device)
        torch_compile.check_counter(slot, "slot", self.device)
        return BatchBlock(*evaluator.batch(self._streams, epoch, slot))

    def prepare_batch(self) -> Evaluator:
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
            samples = self._try_there(lambda there: there.ragged(self._streams, epoch, at))
        if samples is None:
            samples, starts = self._samples(epoch, at, at.size)
        else:
            starts = np.cumsum(at.size) - at.size
        return RaggedBlock(samples, starts, at.size, at.length, self._patches_at(at))

    def locate(self, epoch: int, slots: Int64) -> BatchLocations:
        """Return which batch of which patch slots lead to: NumPy, on the small host tables."""
        tables = self._tables
        if not self.interleave:
            groups, before = self._patches_of(epoch)
            place = np.searchsorted(before, slots, side="right") - 1
            group, j = groups[place], slots - before[place]
        else:
            places = self._shuffled(epoch, slots) if self.shuffle_patches else slots
            if tables.classes is None:
                group = np.searchsorted(tables.batch_offsets, places, side="right") - 1
                j = places - tables.batch_offsets[group]
            else:
                group, j = tables.classes.batch_at(np, places)
        passes = None
        if tables.shares is not None and tables.own is not None:
            passes, j = pass_and_batch(epoch, j, tables.batches[group], tables.own[group])
        elif tables.own is not None:
            j = j % tables.own[group]
        size = tables.sizes[group]
        length = np.minimum(size, tables.counts[group] - j * size)
        handed_out = size if self.partial == "pad" else length
        return BatchLocations(slots, group, j, length, handed_out, passes)

    def _patches_at(self, at: BatchLocations) -> Int64:
        """Return the patches that located batches are of."""
        parents = self._tables.parents
        return at.group if parents is None else np.asarray(parents[at.group])

    def _shuffled(self, epoch: int, slots: Int64) -> Int64:
        """Return the places in the natural order of batches that slots lead to."""
        layout, classes = self._tables.layout, self._tables.classes
        places = slots
        if layout.has_an_order:
            key = key_of(self._streams.batches, epoch, 0)
            places = layout.places(
                np, slots, key, lambda steps: _permute_on_host(steps, layout.full, key)
            )
        if classes is None or slots.size == 0:
            return places
        which = classes.class_at(np, places)
        before, n = classes.offsets[which], classes.counts[which]
        key_of_class = key_of(self._streams.classes, epoch, which)
        grid = Grid(*(side[which] for side in classes.grid))
        within = places - before
        if classes.largest >= 1 << 31:
            xp, bounds = arrays.namespace(HOST), (classes.smallest, classes.largest)
            return np.asarray(before + permute(xp, within, n, key_of_class, grid, *bounds))
        one = np.ones_like(within)
        image, at = permute_runs(within, one, n, key_of_class, grid, before, None)
        return image[at]

    def _order_of_patches(self, epoch: int) -> PatchOrder | None:
        return None if self.interleave else self._patches_of(epoch)

    def _patches_of(self, epoch: int) -> PatchOrder:
        """Patches in an epoch's order, and the slots before each; the last two are kept."""
        found = self._patch_orders.get(epoch)
        if found is None:
            tables = self._tables
            patches = np.arange(tables.num_patches, dtype=np.int64)
            if self.shuffle_patches:
                key = key_of(self._streams.patches, epoch, 0)
                patches = numpy_impl.permute_one(patches, patches.size, key, grid_of(patches.size))
            numbers = np.arange(tables.counts.size, dtype=np.int64)
            found = tables.ordered(arrays.namespace(HOST), patches, numbers)
            # Replaced, not changed: another thread may be reading.
            self._patch_orders = {**dict([*self._patch_orders.items()][-1:]), epoch: found}
        return found

    def _evaluate_on_host(self, epoch: int, slots: Int64) -> BatchBlock:
        at = self.locate(epoch, slots)
        width = self.max_batch_size
        samples, starts = self._samples(epoch, at, np.full(slots.size, width, np.int64))
        block = samples.reshape(slots.size, width)
        if bool((starts[1:] < starts[:-1]).any()):
            block = block[starts // width]
        return BatchBlock(block, at.length, self._patches_at(at))

    def _samples(self, epoch: int, at: BatchLocations, sizes: Int64) -> tuple[Int64, Int64]:
        """Samples of batches on the host, ``sizes`` of each, and where each batch starts."""
        tables = self._tables
        key = None
        if self.shuffle_within_batches:
            pass_ = epoch if at.passes is None else at.passes
            key = key_of(self._streams.samples, pass_, at.group)
        return permute_runs(
            at.j * tables.sizes[at.group],
            sizes,
            tables.counts[at.group],
            key,
            Grid(*(side[at.group] for side in tables.grid)),
            tables.starts[at.group],
            self._order_on_host(),
        )

    def places_of_runs(
        self, groups: Int64, passes: Int64, first: Int64, lengths: Int64, base: Int64
    ) -> tuple[Int64, Int64]:
        """Return where runs of positions in passes over groups lead to, from ``base`` on.

        Parameters
        ----------
        groups, passes, first, lengths, base : int64 arrays, shape (K,)
            Group, pass, first position and positions of each run, and where its group's samples
            begin.

        Returns
        -------
        places : int64 array, shape (T,)
        starts : int64 array, shape (K,)
            Where each run starts in ``places``.
        """
        tables = self._tables
        key = None
        if self.shuffle_within_batches:
            key = key_of(self._streams.samples, passes, groups)
        grid = Grid(*(side[groups] for side in tables.grid))
        return permute_runs(first, lengths, tables.counts[groups], key, grid, base, None)

    def _order_on_host(self) -> Any:
        # Asked for every time: a file that it is mapped from is looked at first.
        order = self._cut.groups.order
        if order is None or arrays.library_of(order) == "numpy":
            return order
        if self._host_order is None:
            if devices.in_worker() and not arrays.device_of(order).on_host:
                raise RuntimeError(
                    "ids must be on the host, or the loader's multiprocessing_context 'spawn', "
                    "where a worker of a DataLoader evaluates the plan, got an order on "
                    f"{arrays.device_of(order)}, which a forked worker cannot read"
                )
            if not arrays.device_of(order).on_host:
                what = "the order of the samples, which the host works with"
                memory.check_room(int(order.nbytes), HOST, what, FEWER_BYTES)
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
        order = self._order_of_patches(epoch)
        return BatchBlock(*self._evaluator().block_by_reference(self._streams, epoch, slots, order))

    def _evaluator(self) -> Evaluator:
        """Return the evaluation on the plan's device; its tables are made at first use."""
        if self._on_device is None:
            shuffles = Shuffles(
                samples=self.shuffle_within_batches,
                batches=self.shuffle_patches,
                interleave=self.interleave,
                pad=self.partial == "pad",
            )
            what = f"the tables of {self.groups.num_samples} samples"
            memory.check_room(self._bytes_to_send(), self.device, what, INSTEAD)
            order = self._cut.groups.order
            self._on_device = Evaluator(self._tables, self.device, order, shuffles)
        return self._on_device

    def upload_tables(self) -> Evaluator | None:
        """Put the tables on the device, if they are not there; None where they do not fit."""
        return self._try_there(lambda evaluator: evaluator)

    def _try_there(self, run: Callable[[Evaluator], T]) -> T | None:
        """Return what the device makes; None if it is full, and the host goes on."""
        try:
            return run(self._evaluator())
        except Exception as error:
            if not devices.is_out_of_memory(error):
                raise
            self.fall_back_to_host(error)
            return None

    def fall_back_to_host(self, error: Exception) -> None:
        """Leave a device whose memory has run out, with one warning; the batches stay the same."""
        if self.device in self._full:
            return
        self._full.add(self.device)
        # What was begun may still read them.
        devices.synchronize(self.device)
        # A graph that was captured or compiled goes on to read them wherever they were.
        if self._on_device is not None and not self._on_device.prepared:
            self._on_device = None
        free = memory.free_bytes(self.device)
        left = "" if free is None else f", {human(free)} are free"
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        text = (
            f"the memory of {self.device} has run out (the plan's tables take "
            f"{human(self._bytes_to_send())} there{left}): batches are evaluated on the "
            f"host from now on, the same ones, more slowly; {INSTEAD} ({said})"
        )
        log.logger.info("%s", text)
        log.warn(text)

    def _slots_checked(self, slots: Any) -> Any:
        """Return slots as they are to be sent: checked for their values if they are on the host."""
        if arrays.library_of(slots) is None or arrays.device_of(slots).on_host:
            return self._checked_slots(slots)
        self._check_kind(slots)
        return slots

    def _slots_there(self, slots: Any) -> Any:
        """Return checked slots as int64 on the plan's device."""
        if arrays.library_of(slots) == "numpy":
            return arrays.upload(slots, self.device)
        slots = arrays.to_device(slots, self.device)
        xp = arrays.namespace(self.device)
        # Kernels read them side by side.
        return arrays.contiguous(xp.astype(slots, xp.int64, copy=False))

    def _checked_slots(self, slots: Any) -> Int64:
        slots = arrays.to_numpy(as_array(slots, "slots"))
        if slots.size == 0 and slots.ndim == 1:
            return np.zeros(0, np.int64)
        self._check_kind(slots)
        for extreme in (int(slots.min()), int(slots.max())):
            if not 0 <= extreme < self.num_batches:
                raise ValueError(f"slots must be in 0 .. {self.num_batches - 1}, got {extreme}")
        return np.asarray(slots, np.int64)

    @staticmethod
    def _check_kind(slots: Any) -> None:
        if slots.ndim != 1:
            raise ValueError(f"slots must be 1-D, got shape {tuple(slots.shape)}")
        if not arrays.is_integer(slots):
            raise TypeError(f"slots must be integers, got dtype {arrays.dtype_name(slots)}")

    def __getstate__(self) -> dict[str, Any]:
        """Travel without live device memory; it is rebuilt at first use."""
        state = self.__dict__.copy()
        state.update(_on_device=None, _host_order=None, _labels=None, _patch_orders={}, _full=set())
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
    if n <= numpy_impl.WIDEST:
        return numpy_impl.permute_one(x, n, key, grid)
    return np.asarray(permute(arrays.namespace(HOST), x, n, key, grid, n, n))
