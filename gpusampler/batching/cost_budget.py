"""CostBudget: the most that a batch may cost, and the batch sizes that it allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.costs import COST_LIMIT, check_numbers
from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.core.text import short_repr
from gpusampler.core.validation import check_bool, check_choice, check_int, check_real

OverBudget = Literal["error", "skip"]
OVER_BUDGET = ("error", "skip")
MAX_BATCH_SIZE = (1 << 31) - 1


@dataclass(frozen=True, eq=False)
class CostBudget:
    """The most that a batch may cost; each patch gets the largest batches within it.

    What a batch costs is its samples times the cost of each: of memory, say, where that goes with
    the points of a patch's mesh. Give it as ``batch_size``. It holds plain values and may be kept:
    `to_dict` makes JSON of it, and states of a sampler tell one set of sizes from another.

    Parameters
    ----------
    max_cost : float
        The most that a batch may cost, > 0, in the unit of the costs.
    cost : array (G,), mapping or callable, optional
        Cost of a sample of each patch: positive numbers by ascending patch id, a mapping from
        patch ids, or a function of the patch id. Default: the dataset's ``patch_costs()``.
    sample_costs : array (N,), optional
        In place of ``cost``, the cost of each sample of the dataset (its length, say). Each patch
        is cut into classes of samples that cost nearly the same, a batch is of one class of one
        patch, and costs at most its samples times the largest cost in its class, which is within
        the budget: also where samples are padded to the longest of a batch.
    min_batch_size, max_batch_size : int, optional
        Bounds of a batch's size, >= 1; none above by default.
    multiple_of : int
        Sizes are multiples of it.
    power_of_two : bool
        Sizes are powers of two: few shapes, for loops that are compiled.
    over_budget : {"error", "skip"}
        What becomes of a patch of which not even the smallest batch is within the budget: a
        ValueError, or it has no batch, which `PatchBatchSampler.coverage` counts as missed.
    calibration : mapping, optional
        What `calibrate` has measured; kept for the reader, of no effect.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. (Costs are checked where patches are known.)

    Examples
    --------
    >>> from gpusampler import PatchBatchSampler
    >>> budget = CostBudget(100, cost={7: 10, 8: 45})
    >>> sampler = PatchBatchSampler([7] * 20 + [8] * 4, budget, seed=0, shuffle_patches=False)
    >>> [len(batch) for batch in sampler]
    [10, 10, 2, 2]
    """

    max_cost: float
    cost: Any = None
    sample_costs: Any = field(default=None, kw_only=True, repr=False)
    min_batch_size: int = field(default=1, kw_only=True)
    max_batch_size: int | None = field(default=None, kw_only=True)
    multiple_of: int = field(default=1, kw_only=True)
    power_of_two: bool = field(default=False, kw_only=True)
    over_budget: OverBudget = field(default="error", kw_only=True)
    calibration: Mapping[str, Any] | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Check what does not depend on patches."""
        check_real(self.max_cost, "max_cost", "be > 0 and < 2**512", lambda x: 0 < x < COST_LIMIT)
        if self.cost is not None and self.sample_costs is not None:
            raise ValueError(
                "sample_costs must be left out where cost is given: a sample costs what those of "
                "its patch do, or what it says itself"
            )
        min_size = check_size(self.min_batch_size, "min_batch_size")
        if self.max_batch_size is not None:
            max_size = check_size(self.max_batch_size, "max_batch_size")
            if max_size < min_size:
                raise ValueError(
                    f"max_batch_size must be >= min_batch_size={min_size}, got {max_size}"
                )
        check_size(self.multiple_of, "multiple_of")
        check_bool(self.power_of_two, "power_of_two")
        if self.power_of_two and self.multiple_of & (self.multiple_of - 1):
            raise ValueError(
                "multiple_of must be a power of two where power_of_two=True, got "
                f"{self.multiple_of}"
            )
        check_choice(self.over_budget, "over_budget", OVER_BUDGET)
        if self.calibration is not None and not isinstance(self.calibration, Mapping):
            raise TypeError(f"calibration must be a mapping, got {short_repr(self.calibration)}")
        if not self._rounded_down(np.array([self._largest_size]))[0] >= self.min_batch_size:
            raise ValueError(
                "max_batch_size must be at least the smallest size that the others allow, got "
                f"none between {self._bounds}"
            )

    def __eq__(self, other: object) -> bool:
        """Return whether the other allows the same; what was calibrated is not compared."""
        if not isinstance(other, CostBudget):
            return NotImplemented
        names = [name for name in self.__dataclass_fields__ if name != "calibration"]
        return all(_is_equal(getattr(self, name), getattr(other, name)) for name in names)

    # Costs may be arrays and mappings, which have none either.
    __hash__ = None  # type: ignore[assignment]

    def sizes_for(self, costs: NDArray[np.float64]) -> Int64:
        """Return the largest batch sizes within the budget, 0 where not even the smallest is.

        Parameters
        ----------
        costs : float64 array, shape (G,)
            Of a sample of each patch, > 0.

        Returns
        -------
        int64 array, shape (G,)
            The largest ``size`` with ``size * cost <= max_cost`` in float64 arithmetic, and below
            2**31, rounded as the budget says.
        """
        max_cost = float(self.max_cost)
        # A quotient is rounded, so the product decides: the floor may be one off either way.
        with np.errstate(over="ignore"):
            ratio = np.floor(np.minimum(max_cost / costs, float(MAX_BATCH_SIZE)))
        ratio += (ratio + 1) * costs <= max_cost
        ratio -= ratio * costs > max_cost
        sizes = np.minimum(ratio, float(MAX_BATCH_SIZE)).astype(np.int64)
        if self.max_batch_size is not None:
            sizes = np.minimum(sizes, self.max_batch_size)
        sizes = self._rounded_down(sizes)
        return np.where(sizes < self.min_batch_size, 0, sizes)

    def sizes_of_use(self, sizes: Int64, counts: Int64, partial: str) -> Int64:
        """Return sizes no larger than patches of ``counts`` samples have a use for.

        Under "drop" a size beyond the samples would leave the whole patch out; otherwise it is
        only a wider table, or more to fill up.
        """
        if partial == "drop":
            rounded_down = self._rounded_down(np.minimum(sizes, counts))
            return np.where(rounded_down < self.min_batch_size, sizes, rounded_down)
        rounded_up = self._rounded_up(np.maximum(counts, self.min_batch_size))
        return np.minimum(sizes, rounded_up)

    def _rounded_down(self, sizes: Int64) -> Int64:
        if self.power_of_two:
            sizes = np.where(sizes > 0, 1 << (_bit_length(sizes) - 1), 0)
        return sizes - sizes % self.multiple_of

    def _rounded_up(self, sizes: Int64) -> Int64:
        sizes = -(-sizes // self.multiple_of) * self.multiple_of
        return 1 << _bit_length(sizes - 1) if self.power_of_two else sizes

    def refusal(self, cost: float) -> str:
        """Return why a sample of some cost is over the budget."""
        max_size = int(CostBudget(self.max_cost).sizes_for(np.array([cost]))[0])
        # The cost with all its digits: the last one may be what is too much.
        return (
            f"max_cost={self.max_cost} allows up to {max_size} samples of cost {cost} in a batch, "
            f"and none of these sizes is right by {self._bounds}"
        )

    @property
    def _largest_size(self) -> int:
        return MAX_BATCH_SIZE if self.max_batch_size is None else int(self.max_batch_size)

    @property
    def _bounds(self) -> str:
        bounds = [f"min_batch_size={self.min_batch_size}"]
        if self.multiple_of > 1:
            bounds.append(f"multiple_of={self.multiple_of}")
        if self.power_of_two:
            bounds.append("power_of_two=True")
        if self.max_batch_size is not None:
            bounds.append(f"max_batch_size={self.max_batch_size}")
        return ", ".join(bounds)

    def to_dict(self) -> dict[str, Any]:
        """Return the budget as plain values that JSON can hold.

        Raises
        ------
        TypeError
            If ``cost`` is a function, or an array, whose patches are not named, of anything but
            numbers: `calibrate` makes a mapping of it.
        """
        cost = self.cost
        if callable(cost) and not isinstance(cost, Mapping):
            raise TypeError(
                "cost must be a mapping or an array to be kept, got a function: write "
                "{patch_id: cost(patch_id) for patch_id in patch_ids}"
            )
        plain: dict[str, Any] = {
            name: _plain(getattr(self, name))
            for name in ("min_batch_size", "max_batch_size", "multiple_of", "power_of_two")
        }
        if isinstance(cost, Mapping) or hasattr(cost, "keys"):
            plain["cost"] = [[_plain(key), _plain(cost[key])] for key in list(cost.keys())]
            plain["cost_by"] = "patch id"
        elif cost is not None:
            plain["cost"] = _to_list(cost)
            plain["cost_by"] = "place"
        if self.sample_costs is not None:
            plain["sample_costs"] = _to_list(self.sample_costs)
        if self.calibration is not None:
            plain["calibration"] = dict(self.calibration)
        return {"max_cost": _plain(self.max_cost), **plain, "over_budget": self.over_budget}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> CostBudget:
        """Return the budget that `to_dict` made plain values of.

        Raises
        ------
        TypeError, ValueError
            If it is no such mapping, or its values are none of a budget.
        """
        if not isinstance(saved, Mapping) or "max_cost" not in saved:
            raise TypeError(f"saved must come from CostBudget.to_dict, got {short_repr(saved)}")
        arguments = dict(saved)
        cost_by = arguments.pop("cost_by", None)
        if cost_by is not None and cost_by not in ("patch id", "place"):
            raise ValueError(f"cost_by must be 'patch id' or 'place', got {short_repr(cost_by)}")
        if cost_by is not None and arguments.get("cost") is None:
            raise ValueError(f"cost must be there where cost_by={cost_by!r} is, got none")
        if cost_by == "patch id":
            arguments["cost"] = _by_patch_id(arguments["cost"])
        unknown = sorted(set(arguments) - set(cls.__dataclass_fields__))
        if unknown:
            raise TypeError(f"saved must come from CostBudget.to_dict, got unknown {unknown}")
        return cls(**arguments)


def check_size(value: Any, name: str) -> int:
    """Return a number of samples in a batch as an int, or raise TypeError or ValueError."""
    return check_int(value, name, low=1, high=MAX_BATCH_SIZE + 1)


def check_over_budget(
    budget: CostBudget, sizes: Int64, costs: NDArray[np.float64], labels: NDArray[Any]
) -> None:
    """Raise ValueError if patches are over the budget, unless they are to be skipped.

    ``sizes``, ``costs`` and ``labels``: shape (G,), of each patch.
    """
    patches = np.flatnonzero(sizes == 0)
    if patches.size == 0:
        return
    first = int(patches[0])
    if budget.over_budget == "error":
        raise ValueError(
            f"max_cost must be enough for every patch, got {patches.size} of {sizes.size} over "
            f"the budget, patch {labels[first]} first: {budget.refusal(float(costs[first]))}; "
            "over_budget='skip' leaves them out"
        )
    if patches.size == sizes.size:
        raise ValueError(
            f"max_cost must be enough for at least one patch, got none: "
            f"{budget.refusal(float(costs.min()))}"
        )


def _bit_length(values: Int64) -> Int64:
    """Return the bits of numbers from 0 to 2**31: exact, as float64 holds them."""
    return np.asarray(np.frexp(values.astype(np.float64))[1], np.int64)


def _by_patch_id(pairs: Any) -> dict[Any, Any]:
    try:
        return dict(pairs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "cost must be pairs of patch id and cost where cost_by='patch id', got "
            f"{short_repr(pairs)}"
        ) from error


def _plain(value: Any) -> Any:
    # A number of any array library.
    return value.item() if hasattr(value, "item") else value


def _is_equal(a: Any, b: Any) -> bool:
    """Return whether two arguments of a budget are equal: numbers, mappings, functions, arrays."""
    plain_types = (Mapping, str, int, float, np.generic, type(None))
    if any(isinstance(value, plain_types) or callable(value) for value in (a, b)):
        return bool(a is b or a == b)
    a, b = (
        np.asarray(arrays.to_numpy(values) if arrays.library_of(values) else values)
        for values in (a, b)
    )
    return bool(np.array_equal(a, b))


def _to_list(values: Any) -> list[Any]:
    numbers = check_numbers(values, len(values), "cost", "sample")
    return list(numbers.astype(np.float64).tolist())
