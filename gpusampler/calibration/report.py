"""What a calibration has found: a table, and a picture of line and residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpusampler.core.text import human

Record = Mapping[str, Any]

TIDY = (
    "malloc held on to what was freed, which made the budget smaller: MALLOC_MMAP_THRESHOLD_="
    "1048576 in the environment gives most of it back"
)


def table(record: Record) -> str:
    """Return a calibration as a page of text.

    Parameters
    ----------
    record : mapping
        ``CostBudget.calibration``.
    """
    limit, share = record["memory_limit"], record["share"]
    line = f"{human(int(record['fixed']))}"
    if record["per_patch"]:
        line += f" + {record['per_patch']:.4g} B * cost"
    each = f"{record['per_cost']:.4g} B * cost"
    if record["per_sample"]:
        each = f"({human(int(record['per_sample']))} + {each})"
    rows = [(*_row(point), "" if point["fitted"] else "no") for point in record["points"]]
    rows += [(*_row(point), "tried") for point in record["verified"]]
    header = ("patch", "cost", "batch size", "peak", "line", "off", "fitted")
    lines = [
        f"calibration on {record['device']}: bytes above the {human(record['held'])} that are held",
        *_columns(header, rows),
        "",
        f"  line: {line} + {each} * batch size; off by {record['worst_residual']:.1%} at worst",
        f"  memory: {share:.0%} of {human(limit)} is {human(int(share * limit))}",
        f"  a dozen batches in a row held {_walks(record)} at most",
        *([f"  {TIDY}"] if record["device"] == "cpu" and len(record["walks"]) > 1 else []),
        "",
        *_columns(
            ("patch", "cost", "batch size", "samples"),
            [
                (str(r["patch_id"]), f"{r['cost']:g}", f"{r['batch_size']:,}", f"{r['samples']:,}")
                for r in record["sizes"]
            ],
        ),
    ]
    return "\n".join(lines)


def _walks(record: Record) -> str:
    found = ["out of memory" if most is None else human(most) for most in record["walks"]]
    return ", with a smaller budget ".join(found)


def _row(point: Record) -> tuple[str, ...]:
    peak, line = point["peak"], point["predicted"]
    return (
        str(point["patch_id"]),
        f"{point['cost']:g}",
        f"{point['batch_size']:,}",
        "out of memory" if peak is None else human(peak),
        human(int(line)),
        "" if peak is None else f"{line / peak - 1:+.1%}",
    )


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    return [
        ("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        for line in lines
    ]


def draw(record: Record, path: Path) -> None:
    """Draw measured peaks, the line through them, and by how much it is off, into a PNG.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes: Any = figure.subplots(1, 2)
    mib = float(1 << 20)
    measured = [point for point in record["points"] if point["peak"] is not None]
    tried = [point for point in record["verified"] if point["peak"] is not None]
    patches = list(dict.fromkeys(point["patch_id"] for point in measured))
    colours = ("tab:blue", "tab:orange", "tab:green")
    for patch, colour in zip(patches, colours, strict=False):
        own = [point for point in measured if point["patch_id"] == patch]
        told = f"patch {patch}, cost {own[0]['cost']:g}"
        used = [point for point in own if point["fitted"]]
        unused = [point for point in own if not point["fitted"]]
        for points, filled in ((used, colour), (unused, "none")):
            across = [point["predicted"] / mib for point in points]
            peaks = [point["peak"] / mib for point in points]
            off = [100 * (point["predicted"] / point["peak"] - 1) for point in points]
            style = {"facecolors": filled, "edgecolors": colour, "s": 28, "zorder": 3}
            axes[0].scatter(across, peaks, label=told if filled != "none" else None, **style)
            if filled != "none":
                axes[1].scatter(peaks, off, **style)
    if tried:
        style = {"marker": "*", "color": "tab:red", "s": 90, "zorder": 4}
        across = [point["predicted"] / mib for point in tried]
        peaks = [point["peak"] / mib for point in tried]
        off = [100 * (point["predicted"] / point["peak"] - 1) for point in tried]
        axes[0].scatter(across, peaks, label="the dearest batch, tried", **style)
        axes[1].scatter(peaks, off, **style)
    room = (record["share"] * record["memory_limit"] - record["held"]) / mib
    every = [point["predicted"] / mib for point in [*measured, *tried]]
    ends = np.geomspace(min(every), max(*every, room), 2)
    axes[0].plot(ends, ends, color="0.4", linewidth=1)
    axes[0].axhline(
        room, color="tab:red", linestyle="--", linewidth=1, label="what a batch may take"
    )
    axes[0].set(
        xscale="log",
        yscale="log",
        xlabel="MiB by the line",
        ylabel="MiB measured above what is held",
    )
    axes[0].set_title("Peaks and the line (open: too small to be fitted)", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].axhspan(-15, 15, color="0.92", zorder=0)
    axes[1].axhline(0, color="0.4", linewidth=1)
    axes[1].set(xscale="log", xlabel="MiB measured", ylabel="line / measured - 1 (%)")
    axes[1].set_title(f"Residuals, {record['worst_residual']:.1%} at worst", fontsize=10)
    filled = f"{record['share']:.0%} of {human(record['memory_limit'])}"
    figure.suptitle(f"calibrate on {record['device']}: {filled}", fontsize=11)
    figure.savefig(path, dpi=110, format="png")
