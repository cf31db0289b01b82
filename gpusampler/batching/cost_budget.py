"""CostBudget: maximum cost of a batch, and the batch sizes within it."""

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
from gpusampler.core.validation import (
    check_bool,
    check_choice,
    check_int,
    check_real,
    is_mapping,
)

OverBudget = Literal["error", "skip"]
OVER_BUDGET = ("error", "skip")
MAX_BATCH_SIZE = (1 << 31) - 1
_ADVICE = "pass the unchanged result of CostBudget.to_dict"


@dataclass(frozen=True, eq=False)
class CostBudget:
    """Maximum cost of a batch; each patch gets the largest batch size within it.

    Pass a budget as ``batch_size``. The cost of a batch is its number of samples times the cost per
    sample: for example, memory that is proportional to the number of points in a patch's mesh.
    `to_dict` returns a budget as JSON-serializable values. A sampler rejects a saved state if the
    batch sizes differ.

    Parameters
    ----------
    max_cost : float
        Maximum cost of a batch, > 0, in the unit of the costs.
    cost : array (G,), mapping or callable, optional
        Cost per sample of each patch: positive numbers by ascending patch id, a mapping from
        patch ids, or a function of the patch id. Default: the dataset's ``patch_costs()``.
    sample_costs : array (N,), optional
        Cost of each sample of the dataset (for example, its length), instead of ``cost``. Each
        patch is divided into cost bins, whose samples cost nearly the same, and all samples of a
        batch are from one bin. A batch costs at most its size times the largest cost in its bin.
        This product is within the budget, even if samples are padded to the longest in the batch.
    min_batch_size, max_batch_size : int, optional
        Bounds of the batch size, >= 1. Default: 1, and no upper bound.
    multiple_of : int
        Batch sizes are multiples of this; those of ``partial="even"`` are divided further.
    power_of_two : bool
        Batch sizes are powers of two, which limits the number of shapes for compiled loops.
    over_budget : {"error", "skip"}
        For a patch (or sample) whose smallest batch exceeds the budget: "error" raises ValueError,
        "skip" leaves it out, and `PatchBatchSampler.coverage` counts its samples as missed.
    calibration : mapping, optional
        Measurements of `calibrate`, for information only.

    Raises
    ------
    TypeError, ValueError
        If an argument is not as described. Costs are only checked when a sampler is created.

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
        """Check everything that does not depend on patches."""
        check_real(self.max_cost, "max_cost", "be > 0 and < 2**512", lambda x: 0 < x < COST_LIMIT)
        if self.cost is not None and self.sample_costs is not None:
            raise ValueError(
                "sample_costs must be None if cost is given: pass costs per patch or per sample, "
                "not both"
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
                f"multiple_of must be a power of two if power_of_two=True, got {self.multiple_of}"
            )
        check_choice(self.over_budget, "over_budget", OVER_BUDGET)
        if self.calibration is not None and not isinstance(self.calibration, Mapping):
            raise TypeError(f"calibration must be a mapping, got {short_repr(self.calibration)}")
        if not self._rounded_down(np.array([self._largest_size]))[0] >= self.min_batch_size:
            raise ValueError(
                f"no batch size satisfies all of {self._bounds}: raise max_batch_size, or lower "
                "min_batch_size or multiple_of"
            )

    def __eq__(self, other: object) -> bool:
        """Return whether all arguments except ``calibration`` are equal."""
        if not isinstance(other, CostBudget):
            return NotImplemented
        names = [name for name in self.__dataclass_fields__ if name != "calibration"]
        return all(_is_equal(getattr(self, name), getattr(other, name)) for name in names)

    # Costs may be arrays and mappings, which are not hashable.
    __hash__ = None  # type: ignore[assignment]

    def sizes_for(self, costs: NDArray[np.float64]) -> Int64:
        """Return the largest batch size within the budget for each patch, 0 if there is none.

        Parameters
        ----------
        costs : float64 array, shape (G,)
            Cost per sample of each patch, > 0.

        Returns
        -------
        int64 array, shape (G,)
            The largest ``size`` below 2**31 with ``size * cost <= max_cost`` in float64
            arithmetic, within the bounds and rounding of the budget.
        """
        max_cost = float(self.max_cost)
        # The rounded quotient may be off by one either way; the product decides.
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
        """Return ``sizes``, reduced for patches of ``counts`` samples that cannot fill a batch.

        Under "drop", a size larger than the patch would drop the whole patch; under "keep" and
        "pad", it would only make blocks of batches wider or add padding.
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
        """Return the part of an error message between the cost and the last word, max_cost.

        This part names the other bounds if they, not max_cost, rule out a sample of this cost.
        """
        max_size = int(CostBudget(self.max_cost).sizes_for(np.array([cost]))[0])
        if max_size == 0:
            return ". Raise"
        return (
            f": max_cost allows a batch of at most {max_size}, but no such size satisfies "
            f"{self._bounds}. Relax a bound, or raise"
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
        return " and ".join(bounds)

    def to_dict(self) -> dict[str, Any]:
        """Return the budget as a dict of JSON-serializable values.

        Raises
        ------
        TypeError
            If ``cost`` is a function or a non-numeric array. (A budget from `calibrate` has a
            mapping, which can be saved.)
        """
        cost = self.cost
        if callable(cost) and not is_mapping(cost):
            raise TypeError(
                "cost must be a mapping or an array to be saved, got a function; use "
                "{patch_id: cost(patch_id) for patch_id in patch_ids}"
            )
        plain: dict[str, Any] = {
            name: _plain(getattr(self, name))
            for name in ("min_batch_size", "max_batch_size", "multiple_of", "power_of_two")
        }
        if is_mapping(cost):
            plain["cost"] = [[_plain_key(key), _plain(cost[key])] for key in list(cost.keys())]
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
        """Return the budget saved by `to_dict`.

        Parameters
        ----------
        saved : mapping

        Raises
        ------
        TypeError, ValueError
            If ``saved`` is not a mapping from `to_dict`, or a value is invalid.
        """
        if not isinstance(saved, Mapping) or "max_cost" not in saved:
            raise TypeError(f"saved must come from CostBudget.to_dict, got {short_repr(saved)}")
        arguments = dict(saved)
        cost_by = arguments.pop("cost_by", None)
        if cost_by is not None and cost_by not in ("patch id", "place"):
            raise ValueError(
                f"saved['cost_by'] must be 'patch id' or 'place', got {short_repr(cost_by)}: "
                f"{_ADVICE}"
            )
        if cost_by is not None and arguments.get("cost") is None:
            raise ValueError(
                f"saved['cost'] must be given if saved['cost_by']={cost_by!r}, got None: {_ADVICE}"
            )
        if cost_by == "patch id":
            arguments["cost"] = _by_patch_id(arguments["cost"])
        unknown = sorted(set(arguments) - set(cls.__dataclass_fields__))
        if unknown:
            raise TypeError(f"saved must come from CostBudget.to_dict, got unknown keys {unknown}")
        return cls(**arguments)


def check_size(value: Any, name: str) -> int:
    """Return a batch size as an int, or raise TypeError or ValueError."""
    return check_int(value, name, low=1, high=MAX_BATCH_SIZE + 1)


def check_over_budget(
    budget: CostBudget, sizes: Int64, costs: NDArray[np.float64], labels: NDArray[Any]
) -> None:
    """Raise ValueError if any patch is over the budget; with over_budget="skip", if all are.

    ``sizes``, ``costs`` (of one sample of each patch) and ``labels`` have shape (G,).
    """
    patches = np.flatnonzero(sizes == 0)
    if patches.size == 0:
        return
    first = int(patches[0])
    if budget.over_budget == "error":
        cost = float(costs[first])
        raise ValueError(
            f"max_cost={budget.max_cost} is too small for {patches.size} of {sizes.size} patches: "
            f"a sample of patch {labels[first]} costs {cost}{budget.refusal(cost)} max_cost or "
            "pass over_budget='skip'."
        )
    if patches.size == sizes.size:
        cost = float(costs.min())
        raise ValueError(
            f"max_cost={budget.max_cost} is too small for all {sizes.size} patches: a sample of "
            f"the cheapest patch costs {cost}{budget.refusal(cost)} max_cost."
        )


def _bit_length(values: Int64) -> Int64:
    """Return the bit length of integers from 0 to 2**31, which float64 represents exactly."""
    return np.asarray(np.frexp(values.astype(np.float64))[1], np.int64)


def _by_patch_id(pairs: Any) -> dict[Any, Any]:
    try:
        # JSON has no tuples.
        return {tuple(key) if isinstance(key, list) else key: cost for key, cost in pairs}
    except (TypeError, ValueError) as error:
        raise ValueError(
            "saved['cost'] must be pairs of patch id and cost if saved['cost_by']='patch id', got "
            f"{short_repr(pairs)}: {_ADVICE}"
        ) from error


def _plain(value: Any) -> Any:
    # Scalars of any array library.
    return value.item() if hasattr(value, "item") else value


def _plain_key(key: Any) -> Any:
    """Return a patch id as JSON can hold it; raise TypeError for keys that JSON cannot hold."""
    if isinstance(key, tuple):
        return [_plain_key(part) for part in key]
    key = _plain(key)
    if not isinstance(key, (str, int, float)):
        raise TypeError(
            "cost must have integers, strings or tuples of them as keys to be saved, got "
            f"{short_repr(key)}"
        )
    return key


def _is_equal(a: Any, b: Any) -> bool:
    """Return whether two values (numbers, mappings, functions or arrays) are equal."""
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
