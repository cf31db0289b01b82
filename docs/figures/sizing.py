"""Fill of a budget by batches of groundwater patches: ``python -m docs.figures.sizing``.

Compares a fixed batch size with the budget of the same peak, on the patches of both presets. These
are counts, equal on every machine. ``--picture`` draws them, and the samplers of other projects
from FILE, which ``python -m benchmarks.sizing --out DIR`` writes. Needs the ``demo`` extra and
gstools.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import markdown
from gpusampler import CostBudget, PatchBatchSampler, PatchGroups

# The simulation is not installed.
sys.path.append(str(Path(__file__).parents[1] / "examples"))

FIXED = (1, 2, 4, 8, 16, 32, 64)
"""Fixed batch sizes; the budget of each is the cost of its batch of the largest patch."""
SHOWN = 8
"""The demo's own batch size."""
STEPS = (365, 3_650)
"""Time steps in addition to the preset's: daily values of one year and of ten years."""
COLUMNS = {
    "preset, cost, series": "{name}",
    "points": "{points[0]} to {points[1]:,}",
    "samples per patch": "{samples:,}",
    "batches, fixed size": "{batches_fixed:,}",
    "batches, budget": "{batches:,}",
    "fill, fixed size": "{fill_fixed:.2f}",
    "fill, budget": "{fill:.2f}",
    "gain": "{gain:.2f}",
    "possible": "{possible:.2f}",
    "gain / possible": "{ratio:.2f}",
}


def patch_points(preset: str) -> dict[str, list[int]]:
    """Return the number of points of a preset's patches, without and with ghost points.

    The aquifer is generated and divided as in the simulation, without MODFLOW.
    """
    from groundwater_simulation.aquifer import build_aquifer
    from groundwater_simulation.patches import cut_aquifer
    from groundwater_simulation.settings import preset_settings
    from groundwater_simulation.simulate import DEFAULT_SEED

    settings = preset_settings(preset)
    aquifer = build_aquifer(settings, DEFAULT_SEED)
    patches = cut_aquifer(aquifer, settings, DEFAULT_SEED)
    core = [settings.n_layers * int(patch.core.sum()) for patch in patches]
    ghost = [settings.n_layers * int(patch.ghost.sum()) for patch in patches]
    return {"core": core, "core and ghost": [a + b for a, b in zip(core, ghost, strict=True)]}


def samples_of(steps: int) -> int:
    """Return the number of training windows that the demo makes of a series."""
    from gpusampler.demo.loading import INPUTS, OUTPUTS, STRIDE
    from gpusampler.groundwater.windows import Windows

    return Windows(steps, INPUTS, OUTPUTS, stride=STRIDE).count


def batch_costs(counts: np.ndarray, costs: np.ndarray, batch_size: Any) -> np.ndarray:
    """Return the cost of each batch of an epoch."""
    groups = PatchGroups.from_counts(counts)
    sampler = PatchBatchSampler(groups, batch_size, seed=0, num_replicas=1, rank=0, progress=False)
    at = sampler.plan.evaluator.locate(0, np.arange(sampler.plan.num_batches))
    found: np.ndarray = costs[at.group] * at.size
    return found


def used(costs: np.ndarray, samples: int, fixed: int) -> dict[str, Any]:
    """Compare a fixed size with the budget of the same peak."""
    counts = np.full(costs.size, samples)
    budget = float(fixed * costs.max())
    plain = batch_costs(counts, costs, fixed)
    sized = batch_costs(counts, costs, CostBudget(budget, cost=costs))
    if max(plain.max(), sized.max()) > budget:
        raise AssertionError(f"a batch is over the budget of {budget}")
    fills = [float(found.mean() / budget) for found in (plain, sized)]
    possible = float(costs.max() / costs.mean())
    gain = fills[1] / fills[0]
    return {
        "fixed": fixed,
        "budget": budget,
        "batches_fixed": int(plain.size),
        "batches": int(sized.size),
        "fill_fixed": fills[0],
        "fill": fills[1],
        "gain": gain,
        "possible": possible,
        "ratio": gain / possible,
    }


def memory() -> dict[str, Any]:
    """Measure the fill of the budget on both presets, for all sizes and lengths of the series."""
    from groundwater_simulation.settings import preset_settings

    found: dict[str, Any] = {}
    for preset in ("small", "medium"):
        own = preset_settings(preset).n_steps
        for what, points in patch_points(preset).items():
            costs = np.array(points, np.float64)
            for steps in (own, *STEPS):
                samples = samples_of(steps)
                found[f"{preset}, {what}, {steps} steps"] = {
                    "points": sorted(points),
                    "samples": samples,
                    "by_size": [used(costs, samples, fixed) for fixed in FIXED],
                }
    return found


def shown(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results for the batch size that the table and the picture show."""
    return next(one for one in case["by_size"] if one["fixed"] == SHOWN)


def print_memory(found: Mapping[str, Any]) -> None:
    """Print the tables."""
    print(f"fill of a budget of {SHOWN} samples of the largest patch\n")
    rows = []
    for name, case in found.items():
        points = case["points"][0], case["points"][-1]
        rows.append({"name": name, **case, **shown(case), "points": points})
    print(markdown.records(COLUMNS, rows))
    print("\nfill of the budget / fraction of the possible gain, by fixed size\n")
    fills = [
        [name, *(f"{one['fill']:.2f} / {one['ratio']:.2f}" for one in case["by_size"])]
        for name, case in found.items()
    ]
    print(markdown.table(["preset, cost, series", *FIXED], fills))


def draw(memory: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    """Draw the fill of the budget: fixed size and budget, and the samplers of other projects."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    cases = [(name, case) for name, case in memory.items() if ", core," in name]
    for row, (_, case) in enumerate(cases):
        one = shown(case)
        for shift, key, colour in ((-0.2, "fill_fixed", "#c44e52"), (0.2, "fill", "#2a7f62")):
            left.barh(row + shift, one[key], 0.38, color=colour)
            left.text(one[key] + 0.01, row + shift, f"{one[key]:.2f}", va="center", fontsize=8)
    names = [
        f"{name.split(', ')[0]}, {case['points'][0]} to {case['points'][-1]:,} points,\n"
        f"{case['samples']:,} samples per patch"
        for name, case in cases
    ]
    left.set_yticks(range(len(cases)), names, fontsize=8)
    left.barh(0, 0, color="#c44e52", label=f"fixed size {SHOWN}")
    left.barh(0, 0, color="#2a7f62", label="CostBudget with the same peak")
    left.set(xlim=(0, 1.02), xlabel="mean fill of the budget", title="Groundwater patches")
    # Both bars are long at the bottom and short at the top, so the legend is below.
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.12))

    workload = found["peers"]["workloads"][1]
    there = [peer for peer in workload["peers"] if "missing" not in peer]
    for row, peer in enumerate(there):
        right.barh(row, peer["fill_padded"], 0.7, color="#d8d8d8")
        right.barh(row, peer["fill"], 0.7, color="#2a7f62" if row == 0 else "#4c72b0")
        text = f"{peer['fill']:.2f}, padded {peer['fill_padded']:.2f}, "
        text += f"{peer['mixed'] / peer['batches']:.0%} mixed" if peer["mixed"] else "not mixed"
        right.text(max(peer["fill_padded"], 1) + 0.05, row, text, va="center", fontsize=7)
    right.axvline(1, color="black", linewidth=0.8)
    right.set_yticks(range(len(there)), [peer["name"] for peer in there], fontsize=7)
    right.set_xticks([0, 1, 2, 3])
    right.set(
        xlabel="mean fill of the budget (grey: with padding)",
        title=f"{workload['samples']:,} lengths in {workload['patches']} patches",
        xlim=(0, 6),
    )
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and draw if asked to."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.sizing", description=__doc__)
    parser.add_argument(
        "--picture", type=Path, nargs=2, metavar=("FILE", "PICTURE"), help="JSON, and PNG or SVG"
    )
    asked = parser.parse_args(arguments)
    found = memory()
    print_memory(found)
    if asked.picture:
        figures, path = asked.picture
        draw(found, json.loads(figures.read_text()), path)


if __name__ == "__main__":
    main()
