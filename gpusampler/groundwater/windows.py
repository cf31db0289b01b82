"""Which steps of a series belong to which sample: the split in time and the sliding windows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.validation import check_choice, check_int, check_real

SPLITS = ("train", "val", "all")


@dataclass(frozen=True)
class Windows:
    """Sliding windows over one part of a series of `steps` time steps.

    Training has the steps ``[0, cut)`` with ``cut = floor((1 - val_ratio) * steps)``,
    validation ``[cut + gap, steps)``, "all" every step. A window lies inside its part from
    its first input step to its last output step, so none crosses the cut. The gap is taken
    from the validation part: training is the same whatever the gap.

    Parameters
    ----------
    steps : int
        Number of time steps T of the series.
    inputs, outputs : int
        Steps that go into a sample and the steps right after them that come out.
    split : {"train", "val", "all"}
        The part of the series.
    val_ratio : float
        Share of the series after the cut, in [0, 1).
    gap : int
        Steps left out after the cut.
    stride : int or None
        Steps from one window's start to the next one's. None: `outputs`.

    Attributes
    ----------
    count : int
        Windows in the part; 0 when it is shorter than one window.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong type or out of range.

    Examples
    --------
    >>> train = Windows(60, 6, 1)
    >>> train.count, train.first, train.last
    (42, 0, 48)
    >>> Windows(60, 6, 1, split="val", gap=2).starts().tolist()
    [50, 51, 52, 53]
    """

    steps: int
    inputs: int
    outputs: int
    split: str = "train"
    val_ratio: float = 0.2
    gap: int = 0
    stride: int | None = None

    def __post_init__(self) -> None:
        check_int(self.steps, "steps", low=0)
        check_int(self.inputs, "input_window_size", low=1)
        check_int(self.outputs, "output_window_size", low=1)
        check_real(self.val_ratio, "val_ratio", "be in [0, 1)", lambda x: 0 <= x < 1)
        check_int(self.gap, "gap", low=0)
        if self.stride is not None:
            check_int(self.stride, "stride", low=1)
        check_choice(self.split, "split", SPLITS)

    @property
    def cut(self) -> int:
        """First step after the training part."""
        # 0.9 of 10 steps leaves 0.9999999999999998 of one: rounding must not eat a step.
        return math.floor((1.0 - self.val_ratio) * self.steps + 1e-9)

    @property
    def first(self) -> int:
        """First step of the part."""
        return min(self.cut + self.gap, self.steps) if self.split == "val" else 0

    @property
    def last(self) -> int:
        """One past the last step of the part."""
        return self.cut if self.split == "train" else self.steps

    @property
    def length(self) -> int:
        """Steps in a window, inputs and outputs."""
        return self.inputs + self.outputs

    @property
    def step(self) -> int:
        """Steps from one window to the next."""
        return self.outputs if self.stride is None else self.stride

    @property
    def count(self) -> int:
        """Windows in the part."""
        return max((self.last - self.first - self.length) // self.step + 1, 0)

    def starts(self) -> NDArray[np.int64]:
        """Return the first input step of every window.

        Examples
        --------
        >>> Windows(10, 2, 2, split="all").starts().tolist()
        [0, 2, 4, 6]
        """
        return self.first + self.step * np.arange(self.count, dtype=np.int64)
