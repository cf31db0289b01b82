"""Show how a batch size divides patches into batches, as numbers, a table and a picture."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from gpusampler.batching.short_batches import Partial
from gpusampler.core.arrays import Int64
from gpusampler.core.files import save_png
from gpusampler.core.text import format_table
from gpusampler.sampler.batch_sampler import PatchBatchSampler

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_LISTED = 24
_MAX_BARS = 60


@dataclass(frozen=True)
class Outcome:
    """Number of batches, and of missed and repeated samples, in an epoch for one ``partial``."""

    partial: str
    batches: int
    missed: int
    repeated: int


@dataclass(frozen=True)
class Inspection:
    """Patch sizes, and how full the batches of one batch size are.

    ``source`` is the name in the heading. ``patch_ids`` and ``counts`` have shape (G,), ids
    ascending. ``nbytes`` is the memory of the sampler's groups, without an order if ``contiguous``.
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
        """Number of samples in all patches."""
        return int(self.counts.sum())

    @property
    def full_batches(self) -> int:
        """Number of full batches in an epoch."""
        return int((self.counts // self.batch_size).sum())

    @property
    def short_batches(self) -> Int64:
        """Size of each short batch under ``partial="keep"``, at most one per patch."""
        remainders = self.counts % self.batch_size
        return remainders[remainders > 0]

    def text(self) -> str:
        """Return the inspection as text."""
        counts = self.counts
        each = self.nbytes / self.num_samples
        lines = [
            f"{self.source}: {self.num_samples:,} samples in {len(counts):,} patches",
            f"memory used by the sampler: {self.nbytes:,} bytes ({each:.3g} per sample; samples "
            + ("sorted by patch, no order stored)" if self.contiguous else "in any order)"),
            "",
            _size_table(self.patch_ids, counts),
            "",
            f"batches of {self.batch_size:,}:",
            format_table(
                [_outcome_row(outcome, self.num_samples) for outcome in self.outcomes],
                "<>>>",
                header=("partial", "batches", "samples missed", "samples repeated"),
                rule=True,
                indent=2,
            ),
        ]
        return "\n".join(lines)


def inspect_source(source: Any, batch_size: int, name: str) -> Inspection:
    """Inspect patch ids, or a dataset with patch ids."""
    sampler = PatchBatchSampler(source, batch_size, seed=0, partial="keep")
    groups = sampler.plan.groups
    outcomes = []
    for partial in get_args(Partial):
        if partial == "drop" and int(groups.counts.max()) < batch_size:
            outcomes.append(Outcome(partial, 0, groups.num_samples, 0))
            continue
        totals = make_sampler(groups, batch_size, partial).coverage(0).totals()
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


def make_sampler(
    source: Any, batch_size: int, partial: Partial, seed: int = 0
) -> PatchBatchSampler:
    """Return a sampler, without warnings of missed or repeated samples, which the table counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return PatchBatchSampler(source, batch_size, seed=seed, partial=partial)


def draw(inspection: Inspection, path: Path) -> None:
    """Draw patch sizes and how full the batches are, to a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    _draw_sizes(axes[0], inspection)
    _draw_fill(axes[1], inspection)
    figure.suptitle(
        f"{inspection.source}: {inspection.num_samples:,} samples "
        f"in {len(inspection.counts):,} patches",
        fontsize=11,
    )
    save_png(figure, path)


def _outcome_row(outcome: Outcome, samples: int) -> list[str]:
    shares = (f"{n:,} ({100 * n / samples:.1f} %)" for n in (outcome.missed, outcome.repeated))
    return [outcome.partial, f"{outcome.batches:,}", *shares]


def _size_table(patch_ids: NDArray[Any], counts: Int64) -> str:
    if len(counts) <= _MAX_LISTED:
        header = ("patch", "samples")
        pairs = zip(patch_ids.tolist(), counts.tolist(), strict=True)
        rows = [(str(patch), f"{count:,}") for patch, count in pairs]
    else:
        header = ("patch sizes", "samples")
        quarter, half, three_quarters = np.percentile(counts, [25, 50, 75]).tolist()
        order = np.argsort(counts, kind="stable")
        smallest, largest = int(order[0]), int(order[-1])
        rows = [
            (f"smallest (patch {patch_ids[smallest]})", f"{int(counts[smallest]):,}"),
            ("a quarter below", f"{quarter:,.0f}"),
            ("half below", f"{half:,.0f}"),
            ("three quarters below", f"{three_quarters:,.0f}"),
            (f"largest (patch {patch_ids[largest]})", f"{int(counts[largest]):,}"),
        ]
    return format_table(rows, "<>", header=header, rule=True, indent=2)


def _draw_sizes(axes: Axes, inspection: Inspection) -> None:
    counts = inspection.counts
    if len(counts) <= _MAX_BARS:
        positions = np.arange(len(counts))
        axes.bar(positions, counts, color="tab:blue", width=0.8)
        axes.set_ylim(top=1.05 * max(int(counts.max()), inspection.batch_size))
        every = max(1, len(counts) // 15)
        labels = [str(patch) for patch in inspection.patch_ids.tolist()][::every]
        crowded = sum(map(len, labels)) > 45
        axes.set_xticks(positions[::every], labels, rotation=90 if crowded else 0)
        axes.axhline(inspection.batch_size, color="tab:red", linestyle="--", linewidth=1)
        axes.set_xlabel("patch")
        axes.set_ylabel("samples")
    else:
        low, high = int(counts.min()), int(counts.max())
        is_wide = high > 50 * low
        edges = (
            np.geomspace(low, high + 1, 41) if is_wide else np.linspace(low - 0.5, high + 0.5, 41)
        )
        axes.hist(counts, bins=edges.tolist(), color="tab:blue")
        if is_wide:
            axes.set_xscale("log")
        axes.axvline(inspection.batch_size, color="tab:red", linestyle="--", linewidth=1)
        axes.set_xlabel("samples in a patch")
        axes.set_ylabel("patches")
    axes.set_title(f"Patch sizes (dashed: one batch of {inspection.batch_size:,})", fontsize=10)


def _draw_fill(axes: Axes, inspection: Inspection) -> None:
    from matplotlib.ticker import MaxNLocator

    size, short, full = inspection.batch_size, inspection.short_batches, inspection.full_batches
    step = max(1, -(-size // _MAX_BARS))
    first = min(0.5, size - 0.5 - step)  # at batch size 1 no batch is short: one empty bin
    short_counts, edges = np.histogram(short, bins=np.arange(first, size - 0.5 + step, step))
    axes.bar(
        edges[:-1], short_counts, width=step * 0.9, align="edge", color="tab:orange", label="short"
    )
    # Full batches get a bar of their own, right after the last bin of short batches.
    axes.bar(edges[-1], full, width=step * 0.9, align="edge", color="tab:green", label="full")
    batch_counts = np.append(short_counts, full)
    if batch_counts.max() > 30 * batch_counts[batch_counts > 0].min():
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    fill = 100 * inspection.num_samples / ((full + len(short)) * size)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("samples in a batch")
    axes.set_ylabel("batches")
    axes.set_title(f"Batches, short ones kept: {fill:.1f} % full", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
