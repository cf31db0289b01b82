"""What the host pays for a batch: ``python -m benchmarks.host [--picture PATH] [--rounds N]``.

An epoch of each output, by NumPy and in C, against torch's ungrouped batch sampler; what handing
out a batch costs beyond a plain list iterator; and which part of the way a batch's time goes to.
All in one process and in turn, processor time of one thread, the best of several rounds.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from benchmarks import markdown
from benchmarks.forms import FORMS, evaluated_by
from gpusampler import PatchBatchSampler
from gpusampler.permutation import _native
from gpusampler.sampler import batches as batches_module
from gpusampler.sampler import iterator

SAMPLES = 2_000_000
PATCHES = 1000
SIZES = (8, 64)
OUTPUTS = ("list", "numpy", "tensor")
ROUNDS = 9
EVALUATED = "located, permuted, looked up"
UNGROUPED = "BatchSampler(RandomSampler(range(N)), {size}, False)"


class Best:
    """The least processor time of each thing that is measured."""

    def __init__(self) -> None:
        self.seconds: dict[Any, float] = {}

    def time(self, what: Any, call: Callable[[], Any]) -> None:
        start = time.thread_time()
        call()
        took = time.thread_time() - start
        self.seconds[what] = min(took, self.seconds.get(what, took))


def drain(batches: Iterable[Any]) -> None:
    deque(batches, maxlen=0)


def epochs(ids: np.ndarray, rounds: int) -> dict[Any, float]:
    """Return seconds of an epoch: of (form, output, size), ("ungrouped", size), ("plain", size)."""
    from torch.utils.data import BatchSampler, RandomSampler

    samplers = {
        (output, size): PatchBatchSampler(ids, size, seed=0, output=output)
        for output in OUTPUTS
        for size in SIZES
    }
    best = Best()
    for _ in range(rounds):
        for size in SIZES:
            ungrouped = BatchSampler(RandomSampler(range(len(ids))), size, False)
            best.time(("ungrouped", size), lambda drawn=ungrouped: drain(drawn))
            held = list(samplers["list", size])
            best.time(("plain", size), lambda held=held: drain(iter(held)))
            del held
        for name in FORMS:
            with evaluated_by(name):
                for key, sampler in samplers.items():
                    best.time((name, *key), lambda drawn=sampler: drain(drawn))
    return best.seconds


def stages(ids: np.ndarray, size: int, rounds: int) -> dict[Any, float]:
    """Return seconds a batch of (form, stage), measured on whole blocks of batches."""
    sampler = PatchBatchSampler(ids, size, seed=0)
    plan, host = sampler.plan, sampler.plan.evaluator.host
    count = host.block_samples // size
    slots = range(count, 2 * count)

    def evaluate() -> Any:
        if host.evaluates_slots:
            return host.slot_range(3, slots, count * size)
        return host.ragged(3, host.locate(3, np.arange(slots.start, slots.stop)))

    block = evaluate()
    lists = list(map(list, np.zeros((count, size), np.int64).tolist()))
    best = Best()
    for _ in range(20 * rounds):
        for name in FORMS:
            with evaluated_by(name):
                best.time((name, EVALUATED), evaluate)
                for what, output in (("cut into lists", "list"), ("cut into arrays", "numpy")):
                    cut: Any = batches_module._SPLITTERS[output]
                    best.time((name, what), lambda cut=cut: drain(cut(plan, block)))
                handed = iterator.EpochIterator(
                    sampler._tracker, lambda share: _Once(lists), epoch=3
                )
                best.time((name, "handed out"), lambda handed=handed: drain(handed))
    return {key: took / count for key, took in best.seconds.items()}


class _Once:
    """A reader of batches that are there already."""

    def __init__(self, batches: list[Any]) -> None:
        self._left: list[Any] | None = batches

    def read(self) -> list[Any] | None:
        batches, self._left = self._left, None
        return batches


def print_epochs(took: dict[Any, float], batches: dict[int, int]) -> None:
    """Print the table of epochs."""
    names = "an epoch as", "by", "seconds", "against ungrouped", "µs a batch"
    print(markdown.head([*names, "above a list iterator"]))
    for size in SIZES:
        ungrouped, plain = took["ungrouped", size], took["plain", size]
        rows = [("lists", "torch, ungrouped", ungrouped)]
        rows += [
            (f"{output}s" if output != "numpy" else "NumPy arrays", name, took[name, output, size])
            for name in FORMS
            for output in OUTPUTS
        ]
        for output, name, seconds in rows:
            each = seconds / batches[size] * 1e6
            above = (seconds - plain) / batches[size] * 1e6
            times = f"{seconds:.3f}", f"{seconds / ungrouped:.3f}", f"{each:.2f}", f"{above:.2f}"
            print(markdown.row([f"{output} of {size}", name, *times]))


def draw(found: dict[int, dict[Any, float]], path: Path) -> None:
    """Draw where a batch's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = {EVALUATED: "#c44e52", "cut into lists": "#dd9a3c", "handed out": "#2a7f62"}
    figure, panels = plt.subplots(1, len(found), figsize=(8.5, 2.8), layout="constrained")
    for axes, (size, times) in zip(panels, found.items(), strict=True):
        for row, name in enumerate(FORMS):
            left = 0.0
            for part, colour in parts.items():
                width = times[name, part] * 1e6
                axes.barh(row, width, left=left, color=colour, label=part if row == 0 else None)
                left += width
            axes.text(left, row, f" {left:.2f}", va="center")
        axes.set(
            title=f"a list of {size}", xlabel="µs a batch", xlim=(0, axes.get_xlim()[1] * 1.15)
        )
        axes.set_yticks(range(len(FORMS)), FORMS)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and draw if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--picture", type=Path, help="draw where a batch's time goes (PNG or SVG)")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    asked = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"torch {torch.__version__}, {_native.describe()}"
    )
    print(f"{asked.samples:,} samples in {PATCHES:,} patches, shuffled; ungrouped is")
    print(f"{UNGROUPED.format(size='size')}; processor time, best of {asked.rounds}\n")
    ids = np.random.default_rng(2026).integers(0, PATCHES, asked.samples)
    batches = {size: len(PatchBatchSampler(ids, size, seed=0)) for size in SIZES}
    print_epochs(epochs(ids, asked.rounds), batches)
    found = {size: stages(ids, size, asked.rounds) for size in SIZES}
    heads = [f"{size}, {name}" for size in SIZES for name in FORMS]
    print(f"\nµs a batch\n\n{markdown.head(['part', *heads])}")
    for part in dict.fromkeys(part for _, part in found[SIZES[0]]):
        took = [found[size][name, part] * 1e6 for size in SIZES for name in FORMS]
        print(markdown.row([part, *(f"{one:.3f}" for one in took)]))
    if asked.picture:
        draw(found, asked.picture)


if __name__ == "__main__":
    main()
