"""What batches cost at the least, and what ours cost: ``python -m benchmarks.floors``.

Whatever draws batches, the indices must be gathered from the samples sorted by patch into memory,
and be handed out: as a view of an array, or as a list of Python integers. Each of that is timed on
indices that were drawn beforehand, so a floor holds no arithmetic of a shuffle and no bookkeeping.
Ours is timed in turn with it, over the same batches.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ratios import seconds
from gpusampler import PatchBatchSampler

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

    def copy(self) -> None:
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


class Line(NamedTuple):
    """A row of the table: nanoseconds an index, or a batch where it says so."""

    batch_size: int
    what: str
    floor: float
    ours: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None else self.ours / self.floor


def best(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time each in turn, and return the best of several rounds: seconds."""
    found = {name: float("inf") for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name] = min(found[name], seconds(call))
    return found


def ungrouped(samples: int, batch_size: int) -> Callable[[], None] | None:
    """Torch's own batches, which group nothing, for comparison; None without torch."""
    try:
        from torch.utils.data import BatchSampler, RandomSampler
    except ImportError:
        return None
    sampler = BatchSampler(RandomSampler(range(samples)), batch_size, False)
    return lambda: drain(sampler)


def measured(samples: int, patches: int, batch_size: int, rounds: int) -> list[Line]:
    """Measure one batch size."""
    ids = np.random.default_rng(0).integers(0, patches, samples)
    floors = Floors(ids, batch_size)
    ours = {
        output: PatchBatchSampler(ids, batch_size, seed=0, output=output)
        for output in ("numpy", "list")
    }
    calls: dict[str, Callable[[], Any]] = {
        "copy": floors.copy,
        "gather": floors.gather,
        "next": floors.next,
        "views": floors.views,
        "tolist": floors.tolist,
        **{f"ours {output}": lambda s=sampler: drain(s) for output, sampler in ours.items()},
    }
    torchs = ungrouped(samples, batch_size)
    if torchs is not None:
        calls["ungrouped"] = torchs
    took = best(calls, rounds)
    index = {name: value / samples * 1e9 for name, value in took.items()}
    batch = took["next"] / len(floors.lists) * 1e9
    lines = [
        Line(batch_size, "write int64", index["copy"]),
        Line(batch_size, "gather from the order by patch, write int64", index["gather"]),
        Line(batch_size, "gather + a view a batch", index["gather"] + index["views"],
             index["ours numpy"]),
        Line(batch_size, "gather + lists of int", index["gather"] + index["tolist"],
             index["ours list"]),
        Line(batch_size, "next() of a list iterator, ns a batch", batch),
    ]  # fmt: skip
    if torchs is not None:
        name = "for comparison: torch's ungrouped BatchSampler(RandomSampler)"
        lines.append(Line(batch_size, name, index["ungrouped"]))
    return lines


def machine() -> str:
    """What the figures are of."""
    numpy = f"numpy {np.__version__}"
    python = f"Python {platform.python_version()}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {python}, {numpy}"


def short(nanoseconds: float) -> str:
    return f"{nanoseconds:.3g}" if nanoseconds < 100 else f"{nanoseconds:.0f}"


def text_of(lines: list[Line], markdown: bool) -> str:
    """Return the table, aligned or in Markdown."""
    head = ("batch", "what", "floor", "ours", "ours / floor")
    rows = [
        (
            str(line.batch_size),
            line.what,
            short(line.floor),
            "" if line.ours is None else short(line.ours),
            "" if line.ratio is None else f"{line.ratio:.2f}",
        )
        for line in lines
    ]
    if markdown:
        out = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
        return "\n".join([out[0], "|" + "---|" * len(head), *out[1:]])
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floors", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--patches", type=int, default=PATCHES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--markdown", action="store_true", help="for a page")
    asked = parser.parse_args(arguments)
    print(f"{machine()}; {asked.samples} samples, {asked.patches} patches")
    print(f"nanoseconds an index, best of {asked.rounds} rounds in turn\n")
    lines = [
        line
        for batch_size in BATCH_SIZES
        for line in measured(asked.samples, asked.patches, batch_size, asked.rounds)
    ]
    print(text_of(lines, asked.markdown))


if __name__ == "__main__":
    main()
