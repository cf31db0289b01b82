"""How well `calibrate` predicts the memory of a step: ``python -m benchmarks.calibration``.

Each case is calibrated on the CPU; then batches of patches and sizes that calibration has not seen
are measured in the same way and compared with the prediction. Last, an epoch is trained with the
budget in a process with the default malloc, and its high-water mark is compared with the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks import markdown
from benchmarks.machine import line, machine, write
from benchmarks.peers.running import apart
from gpusampler import Batch, CostBudget, PatchBatchSampler, calibrate
from gpusampler.calibration.cost_model import Fit
from gpusampler.calibration.forked_child import high_water_mark
from gpusampler.calibration.memory_meter import HostMeter
from gpusampler.core.text import format_bytes

HELD_OUT = 24
MOST_BATCHES = 300
FREE = 400 << 20
"""Bytes above what the process holds that a case may take."""
MIN_PEAK = 4 << 20
"""Peaks below this are not compared: what they are measured with is 0.2 MiB."""
SHARE = 0.9


@dataclass
class Case:
    """A model, its step and its patches."""

    name: str
    step: Callable[[Batch], object]
    sampler: PatchBatchSampler
    state: tuple[Any, ...]
    costs: dict[int, float]
    context: Callable[[], Any]


def points_of(patches: int) -> dict[int, int]:
    """Points of patches, as different as the groundwater presets' are."""
    rng = np.random.default_rng(5)
    counts = np.exp(rng.uniform(np.log(44), np.log(1353), patches))
    return {patch: int(points) for patch, points in enumerate(counts)}


class Attention(torch.nn.Module):
    """One block of self-attention over a patch's points: its memory grows with their square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = torch.nn.Linear(6, width)
        self.block = torch.nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.1, batch_first=True
        )
        self.out = torch.nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.block(self.into(x)))
        return out


def mlp() -> torch.nn.Module:
    nn = torch.nn
    first = nn.Linear(6, 64), nn.GELU(), nn.Dropout(0.1)
    return nn.Sequential(*first, nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))


def on_points(name: str, model: torch.nn.Module, power: int = 1) -> Case:
    """Return a case of a model on clouds of points, made up as they are read."""
    points = points_of(30)
    optimizer = torch.optim.Adam(model.parameters())

    def step(batch: Batch) -> None:
        x = torch.rand(len(batch.indices), points[int(batch.patch_id)], 6)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    ids = np.repeat(list(points), 2000)
    costs = {patch: float(count) ** power for patch, count in points.items()}
    return Case(
        name, step, PatchBatchSampler(ids, 8, seed=0), (model, optimizer), costs, nullcontext
    )


def gino() -> Case:
    """Return the demo's GINO on the groundwater patches that come with the package."""
    from gpusampler.demo.gino import PatchGino, fast_segment_csr
    from gpusampler.demo.loading import load
    from gpusampler.demo.train import batch_loss
    from gpusampler.groundwater import collate_fn

    data = load()
    model = PatchGino(data)
    optimizer = torch.optim.Adam(model.net.parameters())

    def step(batch: Batch) -> None:
        data_batch = collate_fn([data.train[place] for place in batch.indices.tolist()])
        optimizer.zero_grad()
        batch_loss(model, data_batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return Case(
        "GINO, cost = points",
        step,
        PatchBatchSampler(data.train, 8, seed=0),
        (model.net, optimizer),
        {patch: float(cost) for patch, cost in data.train.patch_costs().items()},
        fast_segment_csr,
    )


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield on_points("MLP, Adam, cost = points", mlp())
    yield on_points("attention, Adam, cost = points squared", Attention(32), power=2)
    yield gino()


def held_out(case: Case, budget: CostBudget, limit: int) -> list[dict[str, Any]]:
    """Measure batches that calibration has not seen, and compare the predictions."""
    record = budget.calibration
    assert record is not None
    fit = Fit(*(record[name] for name in Fit._fields))
    probed_patches = {point["patch_id"] for point in (*record["points"], *record["verified"])}
    unprobed_patches = [patch for patch in case.costs if patch not in probed_patches]
    meter = HostMeter(case.step, case.sampler.plan, limit)
    labels = case.sampler.plan.groups.labels.tolist()
    usable = SHARE * limit - record["held"]
    rng = np.random.default_rng(1)
    comparisons = []
    while len(comparisons) < HELD_OUT:
        patch = int(rng.choice(unprobed_patches))
        cost = case.costs[patch]
        max_size = (usable - float(fit.bytes_per_batch(cost))) / float(fit.bytes_per_sample(cost))
        size = int(np.exp(rng.uniform(0, np.log(max_size))))
        predicted = float(fit.predict(cost, size))
        if predicted < MIN_PEAK:
            continue
        probe = meter.measure(labels.index(patch), size)
        assert probe is not None, "out of memory within the share"
        comparisons.append(
            {"patch_id": patch, "cost": cost, "batch_size": size, "predicted": predicted}
            | {"measured": probe.peak, "off": predicted / probe.peak - 1}
        )
    return comparisons


def epoch_peak(case: Case, budget: CostBudget) -> dict[str, Any]:
    """Train an epoch with the budget in a copy of this process; return its peak memory."""
    sampler = PatchBatchSampler(case.sampler.plan.groups, budget, seed=0, device="numpy")

    def train(say: Callable[[dict[str, Any]], None]) -> None:
        high_water_mark(reset=True)
        batches = 0
        for batch in islice(sampler.batches(), MOST_BATCHES):
            case.step(batch)
            batches += 1
        say({"epoch_batches": batches, "epoch_peak": high_water_mark()})

    return apart(train, limit=600.0)


def run(case: Case, picture: Path | None) -> dict[str, Any]:
    """Calibrate a case, and compare its predictions."""
    in_use = high_water_mark(reset=True)
    assert in_use, "the system must report the peak of resident memory"
    limit = in_use + FREE
    with case.context():
        start = time.perf_counter()
        budget = calibrate(
            case.step,
            case.sampler,
            state=case.state,
            cost=case.costs,
            memory_limit=limit,
            share=SHARE,
            picture=picture,
        )
        seconds = time.perf_counter() - start
        loaded = CostBudget.from_dict(json.loads(json.dumps(budget.to_dict())))
        assert loaded == budget
        comparisons = held_out(case, budget, limit)
        epoch = epoch_peak(case, budget)
    record = budget.calibration
    assert record is not None
    return {
        "case": case.name,
        "seconds": seconds,
        "calibration": record,
        "held_out": comparisons,
        "limit": limit,
        **epoch,
    }


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return a case's line of the table."""
    errors = np.abs([item["off"] for item in result["held_out"]])
    peaks = [item["measured"] for item in result["held_out"]]
    extremes = min(peaks), max(peaks)
    record = result["calibration"]
    return {
        "case": result["case"],
        "fit": record["fit"],
        "probes": f"{len(record['points'])}, {result['seconds']:.1f} s",
        "worst residual": f"{record['worst_residual']:.1%}",
        "held-out batches": f"{len(errors)}, {' to '.join(map(format_bytes, extremes))}",
        "median error": f"{np.median(errors):.1%}",
        "worst error": f"{errors.max():.1%}",
        "peak of an epoch, of the limit": f"{result['epoch_peak'] / result['limit']:.1%}",
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the figures, as JSON")
    parser.add_argument("--picture", type=Path, help="draw the last case's calibration there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = machine()
    settings = [f"{k}={v}" for k, v in os.environ.items() if k.startswith("MALLOC_")]
    found["malloc"] = ", ".join(settings) or "default"
    print(line(found))
    results = []
    for case in cases():
        print(f"\n{case.name}")
        is_last = case.name.startswith("GINO")
        results.append(run(case, options.picture if is_last else None))
    print(f"\nlimit: memory in use + {format_bytes(FREE)}, share {SHARE:.0%}\n")
    rows = [row_of(result) for result in results]
    print(markdown.table(list(rows[0]), [row.values() for row in rows]))
    if options.out:
        name = "calibration-mapped" if settings else "calibration"
        write({"machine": found, "cases": results}, options.out, name)


if __name__ == "__main__":
    main()
