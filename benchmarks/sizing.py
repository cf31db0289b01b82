"""What a budget of cost gains over a fixed size: ``python -m benchmarks.sizing``.

Three parts: the share of a memory budget that batches of groundwater patches use (``memory``), the
demo's training with and without a budget (``training``), and samplers of other projects that fill
a budget, on the same lengths as ours (``peers``). Needs the ``demo`` extra and gstools; a peer that
is not installed (``bench`` extra) is named as missing. Times are those of the processor, on one
thread: other work on the machine disturbs them less.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import markdown, peers_sizing
from gpusampler import CostBudget, PatchBatchSampler, PatchGroups

# The simulation is not installed.
sys.path.append(str(Path(__file__).parents[1] / "docs" / "examples"))

FIXED = (1, 2, 4, 8, 16, 32, 64)
"""Fixed batch sizes; the budget of each is what its batch of the largest patch costs."""
SHOWN = 8
"""The demo's own batch size."""
STEPS = (365, 3_650)
"""Time steps beside those of the preset: daily values of one year, and of ten."""
TRAINED = (1, 2, 4, 8)
EPOCHS = 5
SAMPLES = 20_000
"""Lengths that the peers are run on."""
WANTED = 0.85
M_MMAP_THRESHOLD = -3


def patch_points(preset: str) -> dict[str, list[int]]:
    """Return the points of a preset's patches: of their cores, and with their ghosts.

    The map is drawn and cut as the simulation does it, which does not need MODFLOW.
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
    """Return the training windows of a series, as the demo cuts it."""
    from gpusampler.demo.loading import INPUTS, OUTPUTS, STRIDE
    from gpusampler.groundwater.windows import Windows

    return Windows(steps, INPUTS, OUTPUTS, stride=STRIDE).count


def batch_costs(counts: np.ndarray, costs: np.ndarray, batch_size: Any) -> np.ndarray:
    """Return what each batch of an epoch costs."""
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
    """Measure the use of the budget on both presets, for all sizes and lengths of the series."""
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


def _status(line: str) -> float:
    """Return a line of /proc/self/status in MB."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{line}:"):
            return int(text.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status must have a line {line}")


def in_child(call: Callable[[], Any]) -> Any:
    """Run in a forked process, whose memory nobody has used before; return what it returns."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        theirs.send(call())

    child = context.Process(target=run)
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise RuntimeError("the child must send its result, it died") from error
    finally:
        child.join()


class Run:
    """A GINO of the demo in training, from the same first weights as every other."""

    def __init__(self, data: Any) -> None:
        import torch

        from gpusampler.demo.gino import PatchGino
        from gpusampler.demo.train import LEARNING_RATE

        self.data = data
        self.model = PatchGino(data, seed=0)
        self.optimizer = torch.optim.Adam(self.model.net.parameters(), lr=LEARNING_RATE)

    def epoch(self, batches: Any) -> None:
        """Train on all batches once."""
        from gpusampler.demo.loading import as_torch, loader
        from gpusampler.demo.train import batch_loss

        for batch in loader(as_torch(self.data.train), batches):
            self.optimizer.zero_grad()
            batch_loss(self.model, batch).backward()
            self.optimizer.step()


def peak(data: Any, batches: list[list[int]]) -> float:
    """Return the MB that training on batches takes at most, above what was held before.

    For a process of its own: what others have freed would hide some of it.
    """
    # Each tensor's memory goes back as it is freed: what is kept in pieces for batches of another
    # shape would count for these.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    run = Run(data)
    run.epoch(batches)  # what is made once: the optimizer's state, buffers of libraries
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run.epoch(batches)
    return _status("VmHWM") - before


def training(sizes: tuple[int, ...] = TRAINED, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train the demo's GINO with fixed sizes and with budgets of the same peak, taking turns."""
    from gpusampler.demo.gino import fast_segment_csr
    from gpusampler.demo.loading import load
    from gpusampler.demo.train import measure_probe, one_thread

    with one_thread(), fast_segment_csr():
        data = load()
        points = data.train.patch_costs()
        ways: dict[str, dict[str, Any]] = {}
        for size in sizes:
            budget = CostBudget(size * max(points.values()), cost=points)
            ways[f"fixed {size}"] = {"fixed": size, "batch_size": size}
            ways[f"budget {size}"] = {"fixed": size, "batch_size": budget}
        # Memory first: once this process has trained, its children begin with what it freed.
        for way in ways.values():
            sampler = PatchBatchSampler(data.train, way["batch_size"], seed=0, device="numpy")
            way |= {"sampler": sampler, "steps": len(sampler)}
            way["peak_mb"] = in_child(lambda own=sampler: peak(data, list(own)))
            way["seconds"] = []
        runs = {name: Run(data) for name in ways}
        for epoch in range(epochs):
            for name, way in ways.items():
                way["sampler"].set_epoch(epoch)
                start = time.process_time()
                runs[name].epoch(way["sampler"])
                way["seconds"].append(time.process_time() - start)
        rows = [
            {
                "batches": name.split()[0],
                "fixed": way["fixed"],
                "steps": way["steps"],
                "samples_a_second": len(data.train) / min(way["seconds"]),
                "peak_mb": way["peak_mb"],
                "probe_loss": measure_probe(runs[name].model, data, 8).loss,
            }
            for name, way in ways.items()
        ]
    return {
        "samples": len(data.train),
        "epochs": epochs,
        "points": list(points.values()),
        "rows": rows,
    }


def peers() -> dict[str, Any]:
    """Run all samplers on the same lengths."""
    workloads = [make(SAMPLES) for make in peers_sizing.WORKLOADS]
    growing = [SAMPLES * times for times in (1, 4, 16)]
    return {
        "versions": {name: peers_sizing.version(name) for name in peers_sizing.PACKAGES},
        "workloads": [
            {
                "name": workload.name,
                "samples": int(workload.lengths.size),
                "patches": int(np.unique(workload.patch_of).size),
                "budget": workload.budget,
                "mean": float(workload.lengths.mean()),
                "longest": int(workload.lengths.max()),
                "peers": peers_sizing.compare(workload, peers_sizing.ROUNDS),
            }
            for workload in workloads
        ],
        "pyg_seconds_by_samples": peers_sizing.growth(growing),
        "pyg_seconds_unshuffled": peers_sizing.growth(growing, shuffle=False),
        "pyg_too_long_at_the_end": peers_sizing.too_long_at_the_end(),
    }


def _table(names: str, rows: list[list[str]]) -> None:
    print(markdown.table(names.split(" | "), rows), end="\n\n", flush=True)


def print_memory(found: Mapping[str, Any]) -> None:
    print(f"\nuse of the budget: {SHOWN} samples of the largest patch\n")
    rows = []
    for name, case in found.items():
        one = next(one for one in case["by_size"] if one["fixed"] == SHOWN)
        points = case["points"]
        rows.append(
            [
                name,
                f"{points[0]} to {points[-1]:,}",
                f"{case['samples']:,}",
                f"{one['batches_fixed']:,}",
                f"{one['batches']:,}",
                f"{one['fill_fixed']:.2f}",
                f"{one['fill']:.2f}",
                f"{one['gain']:.2f}",
                f"{one['possible']:.2f}",
                f"{one['ratio']:.2f}",
            ]
        )
    _table(
        "patches, cost, series | points | samples a patch | batches, fixed | batches, budget | "
        "fill, fixed | fill, budget | gain | possible | gain / possible",
        rows,
    )
    print("fill of the budget / gain over possible gain, by the fixed size that sets it\n")
    rows = [
        [name, *(f"{one['fill']:.2f} / {one['ratio']:.2f}" for one in case["by_size"])]
        for name, case in found.items()
    ]
    _table(f"patches, cost, series | {' | '.join(map(str, FIXED))}", rows)


def print_training(found: Mapping[str, Any]) -> None:
    print(f"\nGINO of the demo, {found['samples']} samples, best of {found['epochs']} epochs\n")
    rows = []
    for row in found["rows"]:
        plain = next(
            one
            for one in found["rows"]
            if one["batches"] == "fixed" and one["fixed"] == row["fixed"]
        )
        rows.append(
            [
                str(row["fixed"]),
                "fixed size" if row is plain else "budget",
                str(row["steps"]),
                f"{row['samples_a_second']:.0f}",
                f"{row['samples_a_second'] / plain['samples_a_second']:.2f}",
                f"{row['peak_mb']:.0f}",
                f"{row['probe_loss']:.2f}",
            ]
        )
    _table(
        "size | batches | steps an epoch | samples / s | against fixed | peak, MB | "
        f"probe loss after {found['epochs']} epochs",
        rows,
    )


def print_peers(found: Mapping[str, Any]) -> None:
    for workload in found["workloads"]:
        print(
            f"\n{workload['name']}: {workload['samples']:,} samples, mean {workload['mean']:.0f}, "
            f"longest {workload['longest']:,}, budget {workload['budget']:,}\n"
        )
        rows, more = [], []
        for peer in workload["peers"]:
            if "missing" in peer:
                rows.append([peer["name"], peer["missing"], *["-"] * 8])
                continue
            rows.append(
                [
                    peer["name"],
                    peer["bounds"],
                    f"{peer['batches']:,}",
                    f"{peer['fill']:.3f}",
                    f"{peer['fill_padded']:.3f}",
                    f"{peer['padding']:.1%}",
                    f"{peer['over_budget']:,} / {peer['over_budget_padded']:,}",
                    f"{peer['mixed']:,}",
                    f"{peer['lost']} / {peer['repeated']}",
                    f"{peer['too_long_in_batches']} of {peer['too_long']}",
                ]
            )
            right = peer["len"] == peer["batches"] == peer["second_epoch_batches"]
            resume = peer["resume"]
            if "resume_seconds" in peer:
                resume += f", {peer['resume_seconds'] * 1e3:.1f} ms"
            more.append(
                [
                    peer["name"],
                    f"{peer['construct_seconds'] * 1e3:.1f}",
                    f"{peer['epoch_seconds'] * 1e3:.1f}",
                    "right" if right else str(peer["len"]),
                    f"{peer['second_epoch_batches'] - peer['batches']:+d}",
                    "other batches" if peer["second_epoch_differs"] else "the same batches",
                    resume,
                ]
            )
        _table(
            "sampler | bounds | batches | sum / budget | padded / budget | padding | "
            "over: sum / padded | mixed | lost / repeated | too long, handed out",
            rows,
        )
        if workload is found["workloads"][1]:
            _table(
                "sampler | construct, ms | an epoch, ms | len() | batches of the second epoch | "
                "second epoch | stopped in the middle, goes on with",
                more,
            )
    for name in ("pyg_seconds_by_samples", "pyg_seconds_unshuffled", "pyg_too_long_at_the_end"):
        print(f"{name}: {json.dumps(found[name])}")


def _machine() -> dict[str, str]:
    found = {
        "processor": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    for name in ("torch", "neuraloperator"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; write them if asked to."""
    parts: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], None]]] = {
        "memory": (memory, print_memory),
        "training": (training, print_training),
        "peers": (peers, print_peers),
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizing", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of the parts only: {', '.join(parts)}")
    parser.add_argument("--out", type=Path, help="folder for the figures, as JSON")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.parts) - set(parts):
        parser.error(f"parts must be among {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    chosen = asked.parts or list(parts)
    found: dict[str, Any] = {"machine": _machine()}
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    for name in chosen:
        measure, show = parts[name]
        found[name] = measure()
        show(found[name])
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        path = asked.out / f"sizing-{found['machine']['date']}.json"
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
