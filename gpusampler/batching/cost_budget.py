"""CostBudget: the most that a batch may cost, and the batch sizes that it allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.costs import MOST, checked_numbers
from gpusampler.core import arrays
from gpusampler.core.arrays import Int64
from gpusampler.core.text import shown
from gpusampler.core.validation import checked_bool, checked_choice, checked_int

OverBudget = Literal["error", "skip"]
OVER_BUDGET = ("error", "skip")
LARGEST = (1 << 31) - 1


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
        _check_max_cost(self.max_cost)
        if self.cost is not None and self.sample_costs is not None:
            raise ValueError(
                "sample_costs must be left out where cost is given: a sample costs what those of "
                "its patch do, or what it says itself"
            )
        least = checked_int(self.min_batch_size, "min_batch_size", least=1, below=LARGEST + 1)
        if self.max_batch_size is not None:
            most = checked_int(self.max_batch_size, "max_batch_size", least=1, below=LARGEST + 1)
            if most < least:
                raise ValueError(f"max_batch_size must be >= min_batch_size={least}, got {most}")
        checked_int(self.multiple_of, "multiple_of", least=1, below=LARGEST + 1)
        checked_bool(self.power_of_two, "power_of_two")
        if self.power_of_two and self.multiple_of & (self.multiple_of - 1):
            raise ValueError(
                "multiple_of must be a power of two where power_of_two=True, got "
                f"{self.multiple_of}"
            )
        checked_choice(self.over_budget, "over_budget", OVER_BUDGET)
        if self.calibration is not None and not isinstance(self.calibration, Mapping):
            raise TypeError(f"calibration must be a mapping, got {shown(self.calibration)}")
        if not self._rounded_down(np.array([self._most]))[0] >= self.min_batch_size:
            raise ValueError(
                "max_batch_size must be at least the smallest size that the others allow, got "
                f"none between {self._bounds}"
            )

    def __eq__(self, other: object) -> bool:
        """Return whether the other allows the same; what was calibrated is not compared."""
        if not isinstance(other, CostBudget):
            return NotImplemented
        names = [name for name in self.__dataclass_fields__ if name != "calibration"]
        return all(_alike(getattr(self, name), getattr(other, name)) for name in names)

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
        most = float(self.max_cost)
        # A quotient is rounded, so the product decides: the floor may be one off either way.
        with np.errstate(over="ignore"):
            ratio = np.floor(np.minimum(most / costs, float(LARGEST)))
        ratio += (ratio + 1) * costs <= most
        ratio -= ratio * costs > most
        found = np.minimum(ratio, float(LARGEST)).astype(np.int64)
        if self.max_batch_size is not None:
            found = np.minimum(found, self.max_batch_size)
        found = self._rounded_down(found)
        return np.where(found < self.min_batch_size, 0, found)

    def sizes_of_use(self, sizes: Int64, counts: Int64, partial: str) -> Int64:
        """Return sizes no larger than patches of ``counts`` samples have a use for.

        Under "drop" a size beyond the samples would leave the whole patch out; otherwise it is
        only a wider table, or more to fill up.
        """
        if partial == "drop":
            down = self._rounded_down(np.minimum(sizes, counts))
            return np.where(down < self.min_batch_size, sizes, down)
        up = self._rounded_up(np.maximum(counts, self.min_batch_size))
        return np.minimum(sizes, up)

    def _rounded_down(self, sizes: Int64) -> Int64:
        if self.power_of_two:
            sizes = np.where(sizes > 0, 1 << (_bit_length(sizes) - 1), 0)
        return sizes - sizes % self.multiple_of

    def _rounded_up(self, sizes: Int64) -> Int64:
        sizes = -(-sizes // self.multiple_of) * self.multiple_of
        return 1 << _bit_length(sizes - 1) if self.power_of_two else sizes

    def refusal(self, cost: float) -> str:
        """Return why a sample of some cost is over the budget."""
        fits = int(CostBudget(self.max_cost).sizes_for(np.array([cost]))[0])
        # The cost with all its digits: the last one may be what is too much.
        return (
            f"max_cost={self.max_cost} allows up to {fits} samples of cost {cost} in a batch, and "
            f"none of these sizes is right by {self._bounds}"
        )

    @property
    def _most(self) -> int:
        return LARGEST if self.max_batch_size is None else int(self.max_batch_size)

    @property
    def _bounds(self) -> str:
        wanted = [f"min_batch_size={self.min_batch_size}"]
        if self.multiple_of > 1:
            wanted.append(f"multiple_of={self.multiple_of}")
        if self.power_of_two:
            wanted.append("power_of_two=True")
        if self.max_batch_size is not None:
            wanted.append(f"max_batch_size={self.max_batch_size}")
        return ", ".join(wanted)

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
            plain["cost"] = _listed(cost)
            plain["cost_by"] = "place"
        if self.sample_costs is not None:
            plain["sample_costs"] = _listed(self.sample_costs)
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
            raise TypeError(f"saved must come from CostBudget.to_dict, got {shown(saved)}")
        given = dict(saved)
        by = given.pop("cost_by", None)
        if by is not None and by not in ("patch id", "place"):
            raise ValueError(f"cost_by must be 'patch id' or 'place', got {shown(by)}")
        if by is not None and given.get("cost") is None:
            raise ValueError(f"cost must be there where cost_by={by!r} is, got none")
        if by == "patch id":
            given["cost"] = _by_patch_id(given["cost"])
        unknown = sorted(set(given) - set(cls.__dataclass_fields__))
        if unknown:
            raise TypeError(f"saved must come from CostBudget.to_dict, got unknown {unknown}")
        return cls(**given)


def check_over_budget(
    budget: CostBudget, sizes: Int64, costs: NDArray[np.float64], labels: NDArray[Any]
) -> None:
    """Raise ValueError if patches are over the budget, unless they are to be skipped.

    ``sizes``, ``costs`` and ``labels``: shape (G,), of each patch, or of each class of one.
    """
    over = np.flatnonzero(sizes == 0)
    if over.size == 0:
        return
    first = int(over[0])
    if budget.over_budget == "error":
        raise ValueError(
            f"max_cost must be enough for every patch, got {over.size} of {sizes.size} over the "
            f"budget, patch {labels[first]} first: {budget.refusal(float(costs[first]))}; "
            "over_budget='skip' leaves them out"
        )
    if over.size == sizes.size:
        raise ValueError(
            f"max_cost must be enough for at least one patch, got none: "
            f"{budget.refusal(float(costs.min()))}"
        )


def _check_max_cost(value: Any) -> None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise TypeError(f"max_cost must be a number, got {shown(value)}")
    # NumPy would make its narrower types of the bound, which they cannot hold; an int may be more
    # than a float holds.
    number = value if isinstance(value, int) else float(value)
    if not 0 < number < MOST:
        raise ValueError(f"max_cost must be > 0 and < 2**512, got {shown(value)}")


def _bit_length(values: Int64) -> Int64:
    """Return the bits of numbers from 0 to 2**31: exact, as float64 holds them."""
    return np.asarray(np.frexp(values.astype(np.float64))[1], np.int64)


def _by_patch_id(pairs: Any) -> dict[Any, Any]:
    try:
        return dict(pairs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"cost must be pairs of patch id and cost where cost_by='patch id', got {shown(pairs)}"
        ) from error


def _plain(value: Any) -> Any:
    # A number of any array library.
    return value.item() if hasattr(value, "item") else value


def _alike(ours: Any, theirs: Any) -> bool:
    """Return whether two arguments of a budget are equal: numbers, mappings, functions, arrays."""
    kinds = (Mapping, str, int, float, np.generic, type(None))
    if isinstance(ours, kinds) or isinstance(theirs, kinds) or callable(ours) or callable(theirs):
        return bool(ours is theirs or ours == theirs)
    ours, theirs = (
        np.asarray(arrays.to_numpy(values) if arrays.library_of(values) else values)
        for values in (ours, theirs)
    )
    return bool(np.array_equal(ours, theirs))


def _listed(values: Any) -> list[Any]:
    count = len(values)
    found: list[Any] = checked_numbers(values, count, "cost", "sample").tolist()
    return found
