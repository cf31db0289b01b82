"""Compare a cost budget with a fixed batch size: ``python -m benchmarks.sizing``.

Two parts: training the demo with and without a budget (``training``), and samplers of other
projects that fill a budget, on the same lengths (``peers``). Needs the ``demo`` extra. The
``bench`` extra installs the other samplers; the tables name those that are missing. Times are CPU
times on one thread, which other work on the machine disturbs less than wall times.
``python -m docs.figures.sizing`` counts the fill of a budget by batches of groundwater patches.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import markdown
from benchmarks.machine import line, machine, write
from benchmarks.peers import budgets
from benchmarks.peers.memory import peak_of
from benchmarks.peers.running import apart
from benchmarks.peers.samplers import budgeted
from gpusampler import CostBudget, PatchBatchSampler

TRAINED = (1, 2, 4, 8)
EPOCHS = 5
SAMPLES = 20_000
"""Lengths that the peers are run on."""
M_MMAP_THRESHOLD = -3
CHILD_SECONDS = 600.0


def in_child(call: Callable[[], float]) -> float:
    """Call in a forked process, with memory of its own; return the result."""
    found = apart(lambda say: say({"returned": call()}), limit=CHILD_SECONDS)
    if "returned" not in found:
        raise RuntimeError(f"the child must send its result, got {found}")
    return float(found["returned"])


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
    """Return the peak of training on batches, in MB above the memory before it.

    Run it in a new process: memory that was freed before would hide some of the peak.
    """
    # Each tensor's memory goes back as it is freed: what is kept in pieces for batches of another
    # shape would count for these.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    run = Run(data)
    run.epoch(batches)  # allocates the optimizer's state and buffers of libraries
    return peak_of(lambda: run.epoch(batches))[1] / 1e6


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
        # Memory first: once this process has trained, its children begin with its freed memory.
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
    workloads = [make(SAMPLES) for make in budgets.WORKLOADS]
    growing = [SAMPLES * times for times in (1, 4, 16)]
    return {
        "workloads": [
            {
                "name": workload.name,
                "samples": int(workload.lengths.size),
                "patches": int(np.unique(workload.patch_of).size),
                "budget": workload.budget,
                "mean": float(workload.lengths.mean()),
                "longest": int(workload.lengths.max()),
                "peers": [budgets.measured(peer, workload) for peer in budgeted.PEERS],
            }
            for workload in workloads
        ],
        "pyg_seconds_by_samples": budgets.growth(growing),
    }


TRAINING = {
    "size": "{fixed}",
    "batches": "{batches}",
    "steps per epoch": "{steps}",
    "samples / s": "{samples_a_second:.0f}",
    "relative to fixed": "{against_fixed:.2f}",
    "peak, MB": "{peak_mb:.0f}",
    "probe loss": "{probe_loss:.2f}",
}
FILL = {
    "sampler": "{name}",
    "bounds": "{bounds}",
    "batches": "{batches:,}",
    "sum / budget": "{fill:.3f}",
    "padded / budget": "{fill_padded:.3f}",
    "padding": "{padding:.1%}",
    "over: sum / padded": "{over_budget:,} / {over_budget_padded:,}",
    "mixed": "{mixed:,}",
    "lost / repeated": "{lost} / {repeated}",
    "over the budget alone, yielded": "{too_long_in_batches} of {too_long}",
}
TIMES = {
    "sampler": "{name}",
    "construct, ms": "{construct_ms:.1f}",
    "epoch, ms": "{epoch_ms:.1f}",
    "len()": "{len}",
    "batches, batches of the second epoch": "{batches}, {second_epoch_batches}",
    "second epoch differs": "{second_epoch_differs}",
    "resumes with": "{resume}",
    "resume, ms": "{resume_ms:.1f}",
}


def print_training(found: Mapping[str, Any]) -> None:
    fixed = {row["fixed"]: row for row in found["rows"] if row["batches"] == "fixed"}
    rows = [
        {**row, "against_fixed": row["samples_a_second"] / fixed[row["fixed"]]["samples_a_second"]}
        for row in found["rows"]
    ]
    print(f"\nGINO of the demo, {found['samples']} samples, {found['epochs']} epochs, best epoch\n")
    print(markdown.records(TRAINING, rows), end="\n\n")


def print_peers(found: Mapping[str, Any]) -> None:
    for workload in found["workloads"]:
        print(
            f"\n{workload['name']}: {workload['samples']:,} samples, mean {workload['mean']:.0f}, "
            f"longest {workload['longest']:,}, budget {workload['budget']:,}\n"
        )
        rows = workload["peers"]
        print(markdown.records(FILL, rows), end="\n\n")
        there = [
            {
                **row,
                "construct_ms": row["construct_seconds"] * 1e3,
                "epoch_ms": row["epoch_seconds"] * 1e3,
                "resume_ms": row.get("resume_seconds", float("nan")) * 1e3,
            }
            for row in rows
            if "missing" not in row
        ]
        print(markdown.records(TIMES, there), end="\n\n")
    print(f"PyG, seconds by samples: {json.dumps(found['pyg_seconds_by_samples'])}")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables; write them if asked to."""
    parts: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], None]]] = {
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
    found: dict[str, Any] = {"machine": machine("neuraloperator")}
    print(line(found["machine"]))
    for name in chosen:
        measure, show = parts[name]
        found[name] = measure()
        show(found[name])
    if asked.out:
        write(found, asked.out, "sizing")


if __name__ == "__main__":
    main()
