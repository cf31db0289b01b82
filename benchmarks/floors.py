"""What batches cost at the least, and what ours cost: ``python -m benchmarks.floors``.

Whatever draws batches, the indices must be gathered from the samples sorted by patch into memory,
and be handed out: as a view of an array, or as a list of Python integers. Each of that is timed on
indices that were drawn beforehand, so a floor holds no arithmetic of a shuffle and no bookkeeping.
Ours is timed in turn with it, over the same batches, evaluated in C where the package was compiled;
GPUSAMPLER_NATIVE=0 before the command has NumPy evaluate it.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.markdown import table as markdown_table
from gpusampler import PatchBatchSampler
from gpusampler.core.text import format_table
from gpusampler.permutation import _native

SAMPLES = 2_000_000
PATCHES = 1000
BATCH_SIZES = (8, 64, 1024)
ROUNDS = 5
CHUNK = 1 << 15
"""Indices treated at once: as many as a second-level cache holds, which is what we do, too."""


def drain(batches: Iterable[Any]) -> None:
    deque(batches, maxlen=0)


class Floors:
    """The least work on a sampler's first epoch, a part at a time."""

    def __init__(self, ids: np.ndarray, batch_size: int) -> None:
        self.batch_size = batch_size
        self.order = np.argsort(ids, kind="stable").astype(np.int32)
        sampler = PatchBatchSampler(ids, batch_size, seed=0, output="numpy")
        batches = list(sampler)
        self.samples = np.concatenate(batches)
        place = np.empty(ids.size, np.int64)
        place[self.order] = np.arange(ids.size)
        self.places = place[self.samples]
        self.lists = [batch.tolist() for batch in batches]
        self.scratch = np.empty(CHUNK, np.int64)

    def _chunks(self) -> Iterable[slice]:
        return (slice(i, i + CHUNK) for i in range(0, self.samples.size, CHUNK))

    def write(self) -> None:
        """Write the indices once, into memory that is used again."""
        for rows in self._chunks():
            part = self.samples[rows]
            np.copyto(self.scratch[: part.size], part)

    def gather(self) -> None:
        """Look the samples up in the order by patch, and write them as int64."""
        for rows in self._chunks():
            np.take(self.order, self.places[rows]).astype(np.int64)

    def next(self) -> None:
        """Hand out lists that are there already."""
        drain(iter(self.lists))

    def views(self) -> None:
        """Cut the indices into one view for each batch, and hand them out."""
        for table in self._tables():
            drain(iter(list(table)))

    def tolist(self) -> None:
        """Make the integers, in one list for each batch, and hand them out."""
        for table in self._tables():
            drain(iter(table.tolist()))

    def _tables(self) -> Iterable[np.ndarray]:
        """Chunks of the indices as rows of one length, which are cut and made in one call.

        Batches that are short make it a little more, so this is a floor of theirs, too.
        """
        rows = CHUNK // self.batch_size
        whole = self.samples[: self.samples.size // self.batch_size * self.batch_size]
        table = whole.reshape(-1, self.batch_size)
        return (table[first : first + rows] for first in range(0, len(table), rows))


class Found(NamedTuple):
    """What one batch size takes: nanoseconds an index, but for ``next``, which is of a batch."""

    batch_size: int
    write: float
    gather: float
    views: float
    tolist: float
    next: float
    numpy: float
    lists: float
    ungrouped: float | None

    @property
    def numpy_floor(self) -> float:
        return self.gather + self.views

    @property
    def lists_floor(self) -> float:
        return self.gather + self.tolist


def best(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time each in turn, and return the best of several rounds: seconds of the processor.

    None of them waits for anything, and a busy machine disturbs these less than the clock's.
    """
    found = {name: float("inf") for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], time.process_time() - start)
    return found


def ungrouped(samples: int, batch_size: int) -> Callable[[], None] | None:
    """Torch's own batches, which group nothing, for comparison; None without torch."""
    try:
        from torch.utils.data import BatchSampler, RandomSampler
    except ImportError:
        return None
    sampler = BatchSampler(RandomSampler(range(samples)), batch_size, False)
    return lambda: drain(sampler)


def measured(samples: int, patches: int, batch_size: int, rounds: int) -> Found:
    """Measure one batch size."""
    ids = np.random.default_rng(0).integers(0, patches, samples)
    floors = Floors(ids, batch_size)
    ours = {
        output: PatchBatchSampler(ids, batch_size, seed=0, output=output)
        for output in ("numpy", "list")
    }
    calls: dict[str, Callable[[], Any]] = {
        "write": floors.write,
        "gather": floors.gather,
        "views": floors.views,
        "tolist": floors.tolist,
        "next": floors.next,
        "numpy": lambda: drain(ours["numpy"]),
        "lists": lambda: drain(ours["list"]),
    }
    torchs = ungrouped(samples, batch_size)
    if torchs is not None:
        calls["ungrouped"] = torchs
    took = {name: value / samples * 1e9 for name, value in best(calls, rounds).items()}
    took["next"] *= samples / len(floors.lists)
    return Found(batch_size, **{"ungrouped": None, **took})


def machine() -> str:
    """What the figures are of."""
    numpy = f"numpy {np.__version__}"
    python = f"Python {platform.python_version()}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {python}, {numpy}"


def short(nanoseconds: float) -> str:
    return f"{nanoseconds:.3g}" if nanoseconds < 100 else f"{nanoseconds:.0f}"


def rows_of(found: list[Found]) -> list[list[str]]:
    """Return the table, its head first: a column for each batch size."""

    def row(what: str, values: list[float | None], ratio: bool = False) -> list[str]:
        texts = ["" if v is None else f"{v:.2f}" if ratio else short(v) for v in values]
        return [what, *texts]

    return [
        ["nanoseconds an index, batches of", *(str(one.batch_size) for one in found)],
        row("write int64", [one.write for one in found]),
        row("gather from the order by patch, and write", [one.gather for one in found]),
        row("floor of NumPy batches: gather, a view a batch", [one.numpy_floor for one in found]),
        row("ours", [one.numpy for one in found]),
        row("ours / floor", [one.numpy / one.numpy_floor for one in found], ratio=True),
        row("floor of lists: gather, lists of int", [one.lists_floor for one in found]),
        row("ours", [one.lists for one in found]),
        row("ours / floor", [one.lists / one.lists_floor for one in found], ratio=True),
        row("torch's BatchSampler(RandomSampler), ungrouped", [one.ungrouped for one in found]),
        row("next() of a list iterator, a batch", [one.next for one in found]),
    ]


def text_of(rows: list[list[str]], markdown: bool) -> str:
    """Return the table, aligned or in Markdown."""
    return markdown_table(rows[0], rows[1:]) if markdown else format_table(rows, "<")


def draw(found: list[Found], path: Path) -> None:
    """Draw what the floors are made of, and ours on top of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    colours = {"gather": "#2a7f62", "handing out": "#d9a441", "what ours adds": "#c44e52"}
    labels = []
    for one in found:
        for form, handing_out, ours in (
            ("NumPy", one.views, one.numpy),
            ("lists", one.tolist, one.lists),
        ):
            floor = one.gather + handing_out
            left = 0.0
            for part, colour in zip(
                (one.gather, handing_out, max(ours - floor, 0)), colours.values(), strict=True
            ):
                axes.barh(len(labels), part, 0.7, left=left, color=colour)
                left += part
            axes.text(left, len(labels), f" {ours / floor:.1f} floors", va="center", fontsize=8)
            labels.append(f"{form}, batches of {one.batch_size}")
        if one.ungrouped is not None:
            axes.plot([one.ungrouped], [len(labels) - 1], "|", color="black", ms=16, mew=2)
    for name, colour in colours.items():
        axes.barh(0, 0, color=colour, label=name)
    if any(one.ungrouped is not None for one in found):
        axes.plot([], [], "|", color="black", ms=10, mew=2, label="torch's lists, ungrouped")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="nanoseconds an index", xlim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floors", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--patches", type=int, default=PATCHES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--markdown", action="store_true", help="for a page")
    parser.add_argument("--picture", type=Path, help="draw the table there (PNG or SVG)")
    asked = parser.parse_args(arguments)
    print(f"{machine()}; {asked.samples} samples, {asked.patches} patches")
    rounds = f"processor time, best of {asked.rounds} rounds in turn"
    print(f"ours by {_native.describe()}; {rounds}\n")
    found = [
        measured(asked.samples, asked.patches, batch_size, asked.rounds)
        for batch_size in BATCH_SIZES
    ]
    print(text_of(rows_of(found), asked.markdown))
    if asked.picture:
        draw(found, asked.picture)


if __name__ == "__main__":
    main()
