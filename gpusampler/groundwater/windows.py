"""Split of a series in time, and the sliding windows of each split."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.validation import check_choice, check_int, check_real

SPLITS = ("train", "val", "all")


@dataclass(frozen=True)
class Windows:
    """Sliding windows over one split of a series of `steps` time steps.

    "train" has the steps ``[0, cut)`` with ``cut = floor((1 - val_ratio) * steps)``, "val" has
    ``[cut + gap, steps)``, and "all" has every step. All input and output steps of a window
    lie in its split. The gap shortens only the validation split.

    Parameters
    ----------
    steps : int
        Number of time steps T of the series.
    inputs, outputs : int
        Number of input steps of a window, and of the output steps right after them.
    split : {"train", "val", "all"}
        The split.
    val_ratio : float
        Fraction of the series after the cut, in [0, 1).
    gap : int
        Number of steps skipped after the cut.
    stride : int or None
        Number of steps between the starts of consecutive windows. None: `outputs`.

    Attributes
    ----------
    count : int
        Number of windows; 0 if the split is shorter than one window.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or is out of range.

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
        """First step after the training split."""
        # (1 - 0.9) * 10 is 0.9999999999999998: rounding must not lose a step.
        return math.floor((1.0 - self.val_ratio) * self.steps + 1e-9)

    @property
    def first(self) -> int:
        """First step of the split."""
        return min(self.cut + self.gap, self.steps) if self.split == "val" else 0

    @property
    def last(self) -> int:
        """One past the last step of the split."""
        return self.cut if self.split == "train" else self.steps

    @property
    def length(self) -> int:
        """Number of steps in a window, inputs and outputs."""
        return self.inputs + self.outputs

    @property
    def step(self) -> int:
        """Number of steps between the starts of consecutive windows."""
        return self.outputs if self.stride is None else self.stride

    @property
    def count(self) -> int:
        """Number of windows in the split."""
        return max((self.last - self.first - self.length) // self.step + 1, 0)

    def starts(self) -> NDArray[np.int64]:
        """Return the first input step of every window.

        Examples
        --------
        >>> Windows(10, 2, 2, split="all").starts().tolist()
        [0, 2, 4, 6]
        """
        return self.first + self.step * np.arange(self.count, dtype=np.int64)
