"""Report of a calibration: a table, and a plot of measured peaks, fitted line and residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpusampler.core.files import save_png
from gpusampler.core.text import format_bytes, format_table

Record = Mapping[str, Any]

MALLOC_NOTE = (
    "malloc kept freed memory, which made the budget smaller: set "
    "MALLOC_MMAP_THRESHOLD_=1048576 in the environment to avoid most of that"
)


def format_record(record: Record) -> str:
    """Return the record of a calibration as text."""
    limit, share = record["memory_limit"], record["share"]
    per_batch = format_bytes(int(record["fixed"]))
    if record["per_patch"]:
        per_batch += f" + {record['per_patch']:.4g} B * cost"
    per_sample = f"{record['per_cost']:.4g} B * cost"
    if record["per_sample"]:
        per_sample = f"({format_bytes(int(record['per_sample']))} + {per_sample})"
    rows = [(*_row(point), "" if point["fitted"] else "no") for point in record["points"]]
    rows += [(*_row(point), "tried") for point in record["verified"]]
    peaks = ["out of memory" if peak is None else format_bytes(peak) for peak in record["walks"]]
    lines = [
        f"calibration on {record['device']}: bytes above the {format_bytes(record['held'])} that "
        "are held",
        format_table(
            rows,
            ">",
            header=("patch", "cost", "batch size", "peak", "line", "off", "fitted"),
            indent=2,
        ),
        "",
        f"  line: {per_batch} + {per_sample} * batch size; off by {record['worst_residual']:.1%} "
        "at worst",
        f"  memory: {share:.0%} of {format_bytes(limit)} is {format_bytes(int(share * limit))}",
        f"  a dozen batches in a row held {', with a smaller budget '.join(peaks)} at most",
        *([f"  {MALLOC_NOTE}"] if record["device"] == "cpu" and len(peaks) > 1 else []),
        "",
        format_table(
            [
                (str(r["patch_id"]), f"{r['cost']:g}", f"{r['batch_size']:,}", f"{r['samples']:,}")
                for r in record["sizes"]
            ],
            ">",
            header=("patch", "cost", "batch size", "samples"),
            indent=2,
        ),
    ]
    return "\n".join(lines)


def _row(point: Record) -> tuple[str, ...]:
    peak, predicted = point["peak"], point["predicted"]
    return (
        str(point["patch_id"]),
        f"{point['cost']:g}",
        f"{point['batch_size']:,}",
        "out of memory" if peak is None else format_bytes(peak),
        format_bytes(int(predicted)),
        "" if peak is None else f"{predicted / peak - 1:+.1%}",
    )


def draw_fit(record: Record, path: Path) -> None:
    """Draw measured peaks, the fitted line and its residuals into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    mib = float(1 << 20)
    measured = [point for point in record["points"] if point["peak"] is not None]
    verified = [point for point in record["verified"] if point["peak"] is not None]

    def scatter(points: Sequence[Record], label: str | None, **style: Any) -> None:
        predicted = [point["predicted"] / mib for point in points]
        peaks = [point["peak"] / mib for point in points]
        axes[0].scatter(predicted, peaks, label=label, **style)
        if label is not None:
            residuals = [100 * (point["predicted"] / point["peak"] - 1) for point in points]
            axes[1].scatter(peaks, residuals, **style)

    patches = list(dict.fromkeys(point["patch_id"] for point in measured))
    colours = ("tab:blue", "tab:orange", "tab:green")
    for patch, colour in zip(patches, colours, strict=False):
        points = [point for point in measured if point["patch_id"] == patch]
        style = {"edgecolors": colour, "s": 28, "zorder": 3}
        fitted = [point for point in points if point["fitted"]]
        label = f"patch {patch}, cost {points[0]['cost']:g}"
        scatter(fitted, label, facecolors=colour, **style)
        unfitted = [point for point in points if not point["fitted"]]
        scatter(unfitted, None, facecolors="none", **style)
    if verified:
        scatter(verified, "most expensive batch", marker="*", color="tab:red", s=90, zorder=4)
    usable = (record["share"] * record["memory_limit"] - record["held"]) / mib
    predicted = [point["predicted"] / mib for point in [*measured, *verified]]
    ends = np.geomspace(min(predicted), max(*predicted, usable), 2)
    axes[0].plot(ends, ends, color="0.4", linewidth=1)
    axes[0].axhline(usable, color="tab:red", linestyle="--", linewidth=1, label="limit of a batch")
    axes[0].set(
        xscale="log",
        yscale="log",
        xlabel="MiB by the line",
        ylabel="MiB measured above the memory in use",
    )
    axes[0].set_title("Peaks and the line (open: too small to be fitted)", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].axhspan(-15, 15, color="0.92", zorder=0)
    axes[1].axhline(0, color="0.4", linewidth=1)
    axes[1].set(xscale="log", xlabel="MiB measured", ylabel="line / measured - 1 (%)")
    axes[1].set_title(f"Residuals, {record['worst_residual']:.1%} at worst", fontsize=10)
    limit = f"{record['share']:.0%} of {format_bytes(record['memory_limit'])}"
    figure.suptitle(f"calibrate on {record['device']}: {limit}", fontsize=11)
    save_png(figure, path)
