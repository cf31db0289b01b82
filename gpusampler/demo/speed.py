"""Compare the speed of grouped batches and of single samples, in one run."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from tqdm import tqdm

from gpusampler.demo.gino import PatchGino
from gpusampler.demo.loading import DemoData, as_torch, loader
from gpusampler.demo.report import Speed
from gpusampler.demo.stopwatch import Stopwatch
from gpusampler.demo.train import LEARNING_RATE, batch_loss, update
from gpusampler.sampler.batch_sampler import PatchBatchSampler

SAMPLES = 64
REPEATS = 3


def compare_speed(
    model: PatchGino,
    data: DemoData,
    *,
    batch_size: int = 8,
    seed: int = 0,
    repeats: int = REPEATS,
    progress: bool = True,
) -> Speed:
    """Time training on the first batches of an epoch, as batches and then one sample at a time.

    Together, the batches have at least 64 samples. Both variants read the same samples and run
    complete training steps on a copy of the model. They take turns, so that a slow phase of the
    machine affects both; the best time of each counts.
    """
    grouped: list[list[int]] = []
    for rows in PatchBatchSampler(data.train, batch_size, seed=seed):
        grouped.append(rows)
        if sum(map(len, grouped)) >= SAMPLES:
            break
    single = [[index] for batch in grouped for index in batch]
    trial = copy.deepcopy(model)
    _train_once(trial, data, grouped[:1])  # warm up both shapes
    _train_once(trial, data, single[:1])
    best = {"grouped": float("inf"), "single": float("inf")}
    with tqdm(
        total=2 * repeats, desc="speed", unit="turn", disable=None if progress else True
    ) as bar:
        for _ in range(repeats):
            for name, batches in (("grouped", grouped), ("single", single)):
                best[name] = min(best[name], _train_once(trial, data, batches))
                bar.update()
    return Speed(
        grouped=len(single) / best["grouped"],
        single=len(single) / best["single"],
        samples=len(single),
        repeats=repeats,
    )


def _train_once(model: PatchGino, data: DemoData, batches: Sequence[Sequence[int]]) -> float:
    import torch

    optimizer = torch.optim.Adam(model.net.parameters(), lr=LEARNING_RATE)
    watch = Stopwatch()
    with watch.phase("train"):
        for batch in loader(as_torch(data.train), batches):
            optimizer.zero_grad()
            batch_loss(model, batch).backward()  # type: ignore[no-untyped-call]
            update(model, optimizer)
    return watch.seconds["train"]
