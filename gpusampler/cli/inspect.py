"""What a batch size does to a set of patch ids: numbers, a table, a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.arrays import Int64
from gpusampler.plan.epoch_plan import Partial
from gpusampler.sampler.batch_sampler import PatchBatchSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LISTED = 24
_BARS = 60


@dataclass(frozen=True)
class Outcome:
    """What one way with short batches does to an epoch.

    Attributes
    ----------
    partial : {"keep", "drop", "pad"}
        What happens to a patch's last, short batch.
    batches : int
        Batches in an epoch.
    missed, repeated : int
        Samples that an epoch leaves out, and samples that it hands out more than once.
    """

    partial: str
    batches: int
    missed: int
    repeated: int


@dataclass(frozen=True)
class Inspection:
    """Patch sizes and what a batch size makes of them.

    Attributes
    ----------
    source : str
        What was inspected, for the heading.
    batch_size : int
        Samples in a full batch.
    patch_ids : ndarray of int64, or of str, shape (G,)
        The patches, ascending.
    counts : ndarray of int64, shape (G,)
        Their samples.
    contiguous : bool
        Whether each patch's samples follow one another; no order is kept then.
    nbytes : int
        Bytes that the sampler keeps.
    outcomes : tuple of Outcome
        For each value of `partial`.
    """

    source: str
    batch_size: int
    patch_ids: NDArray[Any]
    counts: Int64
    contiguous: bool
    nbytes: int
    outcomes: tuple[Outcome, ...]

    @property
    def num_samples(self) -> int:
        """Samples of all patches."""
        return int(self.counts.sum())

    @property
    def full_batches(self) -> int:
        """Full batches in an epoch."""
        return int((self.counts // self.batch_size).sum())

    @property
    def short_batches(self) -> Int64:
        """Samples in each short batch when those are kept, at most one a patch."""
        rest = self.counts % self.batch_size
        return rest[rest > 0]

    def text(self) -> str:
        """Return the inspection as a page of text.

        Returns
        -------
        str
            Several lines, without a newline at the end.
        """
        counts = self.counts
        each = self.nbytes / self.num_samples
        lines = [
            f"{self.source}: {self.num_samples:,} samples in {len(counts):,} patches",
            f"memory kept by the sampler: {self.nbytes:,} bytes ({each:.3g} a sample; samples "
            + ("stand patch by patch, no order kept)" if self.contiguous else "are in any order)"),
            "",
            *_size_lines(self.patch_ids, counts),
            "",
            f"batches of {self.batch_size:,}:",
            *_table(
                ("partial", "batches", "samples missed", "samples repeated"),
                [(found.partial, *_with_share(found, self.num_samples)) for found in self.outcomes],
            ),
        ]
        return "\n".join(lines)


def inspect_source(source: Any, batch_size: int, name: str) -> Inspection:
    """Inspect patch ids or a dataset that has them.

    Parameters
    ----------
    source : dataset or integer array
        Whatever `PatchBatchSampler` takes.
    batch_size : int
        Samples in a full batch.
    name : str
        What to call the source.

    Returns
    -------
    Inspection
        Sizes, coverage and memory.

    Raises
    ------
    TypeError, ValueError
        If the source or the batch size is invalid.

    Examples
    --------
    >>> found = inspect_source([7, 7, 7, 2, 2], 2, "example")
    >>> [(row.partial, row.batches, row.missed, row.repeated) for row in found.outcomes]
    [('keep', 3, 0, 0), ('drop', 2, 1, 0), ('pad', 3, 0, 1)]
    """
    keep = PatchBatchSampler(source, batch_size, seed=0, partial="keep")
    groups = keep.plan.groups
    outcomes = []
    for partial in get_args(Partial):
        if partial == "drop" and int(groups.counts.max()) < batch_size:
            outcomes.append(Outcome(partial, 0, groups.num_samples, 0))
            continue
        with warnings.catch_warnings():
            # Patches left out whole under "drop" are what the table counts.
            warnings.simplefilter("ignore", UserWarning)
            sampler = PatchBatchSampler(groups, batch_size, seed=0, partial=partial)
        totals = sampler.coverage(0).totals()
        outcomes.append(Outcome(partial, totals["batches"], totals["missed"], totals["repeated"]))
    return Inspection(
        source=name,
        batch_size=int(batch_size),
        patch_ids=groups.labels,
        counts=groups.counts,
        contiguous=groups.is_contiguous,
        nbytes=groups.nbytes,
        outcomes=tuple(outcomes),
    )


def draw(found: Inspection, path: Path) -> None:
    """Draw patch sizes and batch fill into a PNG.

    Parameters
    ----------
    found : Inspection
        What to draw.
    path : pathlib.Path
        The file; replaced if it exists.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    _draw_sizes(axes[0], found)
    _draw_fill(axes[1], found)
    figure.suptitle(
        f"{found.source}: {found.num_samples:,} samples in {len(found.counts):,} patches",
        fontsize=11,
    )
    figure.savefig(path, dpi=110, format="png")


def _with_share(found: Outcome, samples: int) -> tuple[str, str, str]:
    parts = (f"{n:,} ({100 * n / samples:.1f} %)" for n in (found.missed, found.repeated))
    missed, repeated = parts
    return f"{found.batches:,}", missed, repeated


def _size_lines(patch_ids: NDArray[Any], counts: Int64) -> list[str]:
    if len(counts) <= _LISTED:
        rows = [
            (str(p), f"{n:,}") for p, n in zip(patch_ids.tolist(), counts.tolist(), strict=True)
        ]
        return _table(("patch", "samples"), rows)
    order = np.argsort(counts, kind="stable")
    marks = np.percentile(counts, [25, 50, 75]).tolist()
    smallest, largest = int(order[0]), int(order[-1])
    return _table(
        ("patch sizes", "samples"),
        [
            (f"smallest (patch {patch_ids[smallest]})", f"{int(counts[smallest]):,}"),
            ("a quarter below", f"{marks[0]:,.0f}"),
            ("half below", f"{marks[1]:,.0f}"),
            ("three quarters below", f"{marks[2]:,.0f}"),
            (f"largest (patch {patch_ids[largest]})", f"{int(counts[largest]):,}"),
        ],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, ["-" * width for width in widths], *rows)
    ]
    return [f"  {line}" for line in lines]


def _draw_sizes(axes: Axes, found: Inspection) -> None:
    counts = found.counts
    if len(counts) <= _BARS:
        places = np.arange(len(counts))
        axes.bar(places, counts, color="tab:blue", width=0.8)
        axes.set_ylim(top=1.05 * max(int(counts.max()), found.batch_size))
        every = max(1, len(counts) // 15)
        labels = [str(patch) for patch in found.patch_ids.tolist()][::every]
        crowded = sum(map(len, labels)) > 45
        axes.set_xticks(places[::every], labels, rotation=90 if crowded else 0)
        axes.axhline(found.batch_size, color="tab:red", linestyle="--", linewidth=1)
        axes.set_xlabel("patch")
        axes.set_ylabel("samples")
    else:
        low, high = int(counts.min()), int(counts.max())
        wide = high > 50 * low
        edges = np.geomspace(low, high + 1, 41) if wide else np.linspace(low - 0.5, high + 0.5, 41)
        axes.hist(counts, bins=edges.tolist(), color="tab:blue")
        if wide:
            axes.set_xscale("log")
        axes.axvline(found.batch_size, color="tab:red", linestyle="--", linewidth=1)
        axes.set_xlabel("samples in a patch")
        axes.set_ylabel("patches")
    axes.set_title(f"Patch sizes (dashed: one batch of {found.batch_size:,})", fontsize=10)


def _draw_fill(axes: Axes, found: Inspection) -> None:
    from matplotlib.ticker import MaxNLocator

    size, short, full = found.batch_size, found.short_batches, found.full_batches
    step = max(1, -(-size // _BARS))
    first = min(0.5, size - 0.5 - step)  # a batch of one is never short: one empty bin then
    bars, edges = np.histogram(short, bins=np.arange(first, size - 0.5 + step, step))
    axes.bar(edges[:-1], bars, width=step * 0.9, align="edge", color="tab:orange", label="short")
    # Full batches stand apart from the last bin of short ones, which ends at the same place.
    axes.bar(edges[-1], full, width=step * 0.9, align="edge", color="tab:green", label="full")
    seen = np.append(bars, full)
    if seen.max() > 30 * seen[seen > 0].min():
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    fill = 100 * found.num_samples / ((full + len(short)) * size)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("samples in a batch")
    axes.set_ylabel("batches")
    axes.set_title(f"Batches, short ones kept: {fill:.1f} % full", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
