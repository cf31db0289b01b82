"""Time against the number of samples, with a fit: ``python -m docs.figures.scale FILE PICTURE``.

``python -m benchmarks.scale --out DIR`` writes FILE.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the results of `linearity` and `against_argsort` of `benchmarks.scale`."""
    from matplotlib.figure import Figure

    times = {int(size): took for size, took in found["linearity"]["seconds"].items()}
    size, took = np.array(list(times)), np.array(list(times.values()))
    exponent = found["linearity"]["exponent"]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    line = np.exp(np.mean(np.log(took)) + exponent * (np.log(size) - np.mean(np.log(size))))
    axes.loglog(size, line, color="0.7", label=f"fit: N$^{{{exponent:.2f}}}$")
    axes.loglog(size, took, "o", label="ids in a file, index in a file (int16, 500 patches)")
    if "argsort" in found:
        other = found["argsort"]
        axes.loglog(
            other["samples"], other["seconds"], "s", label="ids and order in memory (int64)"
        )
        axes.loglog(
            other["samples"],
            other["argsort_seconds"],
            "x",
            label="np.argsort(kind='stable') (int64)",
        )
    axes.set_xlabel("samples")
    axes.set_ylabel("seconds")
    axes.legend(fontsize=8)
    axes.grid(which="both", alpha=0.2)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Draw the results in a file."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.scale", description=__doc__)
    parser.add_argument("file", type=Path, help="figures, as JSON")
    parser.add_argument("picture", type=Path, help="PNG or SVG")
    asked = parser.parse_args(arguments)
    draw(json.loads(asked.file.read_text()), asked.picture)


if __name__ == "__main__":
    main()
