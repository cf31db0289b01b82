"""Tables and pictures of the pages on speed: ``python -m docs.figures.speed FILE --out docs/img``.

``pytest benchmarks/speed --benchmark-enable --benchmark-json FILE`` writes FILE. Tables and
pictures of tests that are not in it are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import markdown

Rows = list[dict[str, Any]]
STAGES = {
    "evaluated": ("located, permuted, looked up", "#c44e52"),
    "cut into lists": ("cut into lists", "#dd9a3c"),
    "yielded": ("returned", "#2a7f62"),
}
YIELDED = {"numpy": "views", "list": "tolist"}
OUTPUTS = {"list": "lists", "numpy": "NumPy arrays", "tensor": "tensors"}


def rows_of(found: dict[str, Any], test: str) -> Rows:
    """Return a test's parameters, its extra information, and its best time in seconds."""
    return [
        {**(row["params"] or {}), **row["extra_info"], "best_s": row["stats"]["min"]}
        for row in found["benchmarks"]
        if row["name"].startswith(f"{test}[")
    ]


def floors(found: dict[str, Any]) -> dict[int, dict[str, float]]:
    """Return nanoseconds per index of each part and of ours, by size; of ``next``, per batch."""
    parts: dict[int, dict[str, float]] = {}
    for row in rows_of(found, "test_part"):
        count = row["batches" if row["part"] == "next" else "samples"]
        parts.setdefault(row["size"], {})[row["part"]] = row["best_s"] / count * 1e9
    for row in rows_of(found, "test_above_the_floor"):
        parts[row["size"]][row["output"]] = row["best_s"] / row["samples"] * 1e9
    for part in parts.values():
        for output, yielding in YIELDED.items():
            part[f"{output} floor"] = part["gather"] + part[yielding]
            part[f"{output} ratio"] = part[output] / part[f"{output} floor"]
    return parts


def floor_table(parts: dict[int, dict[str, float]]) -> str:
    """Return the table of the floors."""
    names = {
        "write": "write int64",
        "gather": "gather from the order by patch, and write",
        "numpy floor": "lower bound of NumPy batches: gather, one view per batch",
        "numpy": "ours",
        "numpy ratio": "ours / lower bound",
        "list floor": "lower bound of lists: gather, lists of int",
        "list": "ours",
        "list ratio": "ours / lower bound",
        "ungrouped": "torch's BatchSampler(RandomSampler), ungrouped",
        "next": "next() of a list iterator, per batch",
    }
    return markdown.table(
        ("nanoseconds per index, batches of", *parts),
        [(what, *(f"{part[name]:.3g}" for part in parts.values())) for name, what in names.items()],
    )


def draw_floors(parts: dict[int, dict[str, float]], path: Path) -> None:
    """Draw the parts of the lower bounds, and the time that ours adds to them."""
    figure, axes = subplots(figsize=(7.5, 3.8))
    colours = {"gathered": "#2a7f62", "returned": "#d9a441", "added by ours": "#c44e52"}
    labels: list[str] = []
    for size, part in parts.items():
        for output, yielding in YIELDED.items():
            floor, ours = part[f"{output} floor"], part[output]
            left = 0.0
            widths = part["gather"], part[yielding], max(ours - floor, 0)
            for width, colour in zip(widths, colours.values(), strict=True):
                axes.barh(len(labels), width, 0.7, left=left, color=colour)
                left += width
            ratio = f" {ours / floor:.1f} × lower bound"
            axes.text(left, len(labels), ratio, va="center", fontsize=8)
            labels.append(f"{OUTPUTS[output]}, batches of {size}")
        axes.plot([part["ungrouped"]], [len(labels) - 1], "|", color="black", ms=16, mew=2)
    for name, colour in colours.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.plot([], [], "|", color="black", ms=10, mew=2, label="lists of torch, ungrouped")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="nanoseconds per index", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def epoch_table(found: dict[str, Any]) -> str:
    """Return the table of epochs by output, with the time per batch above a list iterator."""
    parts = {(row["part"], row["size"]): row for row in rows_of(found, "test_part")}
    epochs = sorted(rows_of(found, "test_epoch"), key=lambda row: row["size"])
    lines = []
    for size in dict.fromkeys(row["size"] for row in epochs):
        plain, ungrouped = parts["next", size], parts["ungrouped", size]
        torchs = {**ungrouped, "output": "list", "form": "torch, ungrouped", "ratio": 1.0}
        for row in [torchs, *(row for row in epochs if row["size"] == size)]:
            each = row["best_s"] / plain["batches"] * 1e6
            above = each - plain["best_s"] / plain["batches"] * 1e6
            what = f"{OUTPUTS[row['output']]} of {size}"
            times = f"{row['best_s']:.3f}", f"{row['ratio']:.3f}", f"{each:.2f}", f"{above:.2f}"
            lines.append((what, row["form"], *times))
    head = "an epoch as", "by", "seconds", "against ungrouped", "µs per batch"
    return markdown.table((*head, "above a list iterator"), lines)


def stages(found: dict[str, Any]) -> dict[tuple[int, str], dict[str, float]]:
    """Return microseconds per batch of each stage, by size and form."""
    out: dict[tuple[int, str], dict[str, float]] = {}
    for row in sorted(rows_of(found, "test_stage"), key=lambda row: row["size"]):
        took = out.setdefault((row["size"], row["form"]), {})
        took[row["stage"]] = row["best_s"] / row["batches"] * 1e6
    return out


def stage_table(took: dict[tuple[int, str], dict[str, float]]) -> str:
    """Return the table of stages."""
    names = dict.fromkeys(name for times in took.values() for name in times)
    return markdown.table(
        ("part", *(f"{size}, {form}" for size, form in took)),
        [
            (STAGES.get(name, (name,))[0], *(f"{times[name]:.3f}" for times in took.values()))
            for name in names
        ],
    )


def draw_stages(took: dict[tuple[int, str], dict[str, float]], path: Path) -> None:
    """Draw where a batch's time goes."""
    sizes = list(dict.fromkeys(size for size, _ in took))
    figure, panels = subplots(1, len(sizes), figsize=(8.5, 2.8), squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        forms = [form for of, form in took if of == size]
        for row, form in enumerate(forms):
            left = 0.0
            for stage, (label, colour) in STAGES.items():
                width = took[size, form][stage]
                axes.barh(row, width, left=left, color=colour, label=None if row else label)
                left += width
            axes.text(left, row, f" {left:.2f}", va="center")
        right = axes.get_xlim()[1] * 1.15
        axes.set(title=f"lists of {size} samples", xlabel="µs per batch", xlim=(0, right))
        axes.set_yticks(range(len(forms)), forms)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def ratio_table(rows: Rows) -> str:
    """Return the table of epochs by samples."""
    head = "samples", "output", "baseline", "ours, ms", "baseline, ms", "ratio"
    return markdown.table(
        (*head, "lowest", "highest"),
        [
            (
                f"{row['samples']:,}",
                row["output"],
                row["baseline"],
                *(f"{1e3 * row[name]:.4g}" for name in ("ours_s", "baseline_s")),
                *(f"{row[name]:.3f}" for name in ("ratio", "lowest", "highest")),
            )
            for row in rows
        ],
    )


def draw_ratios(rows: Rows, path: Path) -> None:
    """Draw the ratios against the number of samples, a line for each output and baseline."""
    figure, axes = subplots(figsize=(7, 4))
    for output, baseline in dict.fromkeys((row["output"], row["baseline"]) for row in rows):
        line = [row for row in rows if (row["output"], row["baseline"]) == (output, baseline)]
        axes.plot(
            [row["samples"] for row in line],
            [row["ratio"] for row in line],
            marker="o",
            label=f"{OUTPUTS[output]}, against {baseline}",
        )
    axes.axhline(1, color="0.7", linewidth=1)
    axes.set(xscale="log", xlabel="samples", ylabel="time of an epoch / baseline", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)


def subplots(*args: Any, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*args, **options)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and draw the pictures with ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.speed", description=__doc__)
    parser.add_argument("file", type=Path, help="figures, as JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the pictures")
    asked = parser.parse_args(arguments)
    found = json.loads(asked.file.read_text())
    rows = rows_of(found, "test_epoch_by_samples")
    if rows:
        print(ratio_table(rows), end="\n\n")
    parts = floors(found)
    if parts:
        print(epoch_table(found), floor_table(parts), sep="\n\n", end="\n\n")
    took = stages(found)
    if took:
        print(stage_table(took))
    if asked.out:
        if rows:
            draw_ratios(rows, asked.out / "epochs.png")
        if parts:
            draw_floors(parts, asked.out / "floors.png")
        if took:
            draw_stages(took, asked.out / "host.png")


if __name__ == "__main__":
    main()
