"""Tables of ``docs/how-to/sequences.md``: ``python -m docs.figures.real_data [--pictures DIR]``.

Utterances by length, molecules by size, and storms, each one series (`docs/data/PROVENANCE.md`).
Nothing is timed or trained: the figures are counts over the batches of `EPOCHS` epochs with seed 0,
the same on every machine. For random batches, all samples have one patch id.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from docs.figures.make_data import OUT
from gpusampler import CostBudget, PatchBatchSampler, Temperature

EPOCHS = 20
BATCH_SIZE = 16
WIDTH = 4
"""Lengths per bucket."""
MAX_FRAMES = 256
MAX_PAIRS = 784
"""Four molecules of the largest size, 14 atoms."""
ROWS = 8
"""Largest number of observations per batch."""
QUARTERS = 4


class Padding(NamedTuple):
    """Sizes of the samples in each batch, over all epochs."""

    name: str
    sizes: list[np.ndarray]
    """One array per batch: the size of each sample."""

    def share(self, power: int = 1) -> float:
        """Return the fraction of the padded tensors that is padding (of pairs: power 2)."""
        full = sum(batch.size * int(batch.max()) ** power for batch in self.sizes)
        return 1 - sum(int((batch**power).sum()) for batch in self.sizes) / full

    def largest(self, power: int = 1) -> int:
        """Return the size of the largest batch, padding included."""
        return max(batch.size * int(batch.max()) ** power for batch in self.sizes)

    def used(self, power: int = 1) -> float:
        """Return the mean size of a batch, padding included, divided by the largest."""
        padded = [batch.size * int(batch.max()) ** power for batch in self.sizes]
        return float(np.mean(padded)) / max(padded)

    @property
    def batches(self) -> int:
        """Batches per epoch."""
        return len(self.sizes) // EPOCHS

    @property
    def members(self) -> float:
        """Mean number of samples per batch."""
        return float(np.mean([batch.size for batch in self.sizes]))


class Shares(NamedTuple):
    """How the batches of an epoch divide among short and long storms."""

    name: str
    batches: int
    by_quarter: list[float]
    """Fraction of the batches from each quarter of the storms, the shortest storms first."""
    short: float
    """Batches per epoch with fewer than `ROWS` / 2 rows, of storms with at least that many."""


def load(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of ``docs/data/NAME.npz``."""
    with np.load(OUT / f"{name}.npz") as file:
        return dict(file)


def sizes_of(name: str) -> np.ndarray:
    """Return the length of each utterance, or the atoms of each molecule."""
    return np.diff(load(name)["offsets"])


def filled(name: str, sampler: PatchBatchSampler, sizes: np.ndarray) -> Padding:
    """Collect the sizes of the samples in each batch of a sampler."""
    epochs = (sampler.batches(epoch) for epoch in range(EPOCHS))
    return Padding(name, [sizes[batch.indices] for batches in epochs for batch in batches])


def buckets(lengths: np.ndarray) -> np.ndarray:
    """Return the bucket of each length: one edge per `WIDTH` lengths above the shortest."""
    edges = np.arange(lengths.min() + WIDTH, lengths.max(), WIDTH)
    return np.digitize(lengths, edges)


def by_length() -> list[Padding]:
    """Return the rows of the table of utterances."""
    lengths = sizes_of("vowels")
    one = np.zeros_like(lengths)
    by_frames = CostBudget(MAX_FRAMES, sample_costs=lengths)
    by_patch = CostBudget(MAX_FRAMES, cost=lambda length: length)
    makes = {
        f"random batches of {BATCH_SIZE}": PatchBatchSampler(one, BATCH_SIZE, seed=0),
        f"buckets of {WIDTH} lengths": PatchBatchSampler(buckets(lengths), BATCH_SIZE, seed=0),
        f"at most {MAX_FRAMES} frames": PatchBatchSampler(one, by_frames, seed=0),
        f"one length, batches of {BATCH_SIZE}": PatchBatchSampler(lengths, BATCH_SIZE, seed=0),
        f"one length, at most {MAX_FRAMES} frames": PatchBatchSampler(lengths, by_patch, seed=0),
    }
    return [filled(name, sampler, lengths) for name, sampler in makes.items()]


def by_atoms() -> list[Padding]:
    """Return the rows of the table of molecules."""
    atoms = sizes_of("molecules")
    budget = CostBudget(MAX_PAIRS, cost=lambda size: size**2)
    makes = {
        f"random batches of {BATCH_SIZE}": PatchBatchSampler(
            np.zeros_like(atoms), BATCH_SIZE, seed=0
        ),
        f"one size, batches of {BATCH_SIZE}": PatchBatchSampler(atoms, BATCH_SIZE, seed=0),
        f"one size, at most {MAX_PAIRS} pairs": PatchBatchSampler(atoms, budget, seed=0),
    }
    return [filled(name, sampler, atoms) for name, sampler in makes.items()]


def by_storm() -> list[Shares]:
    """Return the rows of the table of storms."""
    storm = load("storms")["storm"]
    counts = np.bincount(storm)
    longest = int(counts.max())
    even = functools.partial(PatchBatchSampler, storm, ROWS, seed=0, partial="even")
    makes = {
        f"batches of {ROWS}": PatchBatchSampler(storm, ROWS, seed=0),
        'partial="even"': even(),
        "even, Temperature(2)": even(weights=Temperature(2)),
        "even, Temperature(inf)": even(weights=Temperature(float("inf"))),
        "one batch per storm": PatchBatchSampler(storm, longest, seed=0),
    }
    return [shared(name, sampler, counts) for name, sampler in makes.items()]


def quarters(counts: np.ndarray) -> list[np.ndarray]:
    """Return the storms of each quarter, the shortest first."""
    return np.array_split(np.argsort(counts, kind="stable"), QUARTERS)


def shared(name: str, sampler: PatchBatchSampler, counts: np.ndarray) -> Shares:
    """Count the batches from each quarter of the storms, and the short ones."""
    batches = sampler.coverage(0).batches
    by_quarter = [float(batches[storms].sum() / batches.sum()) for storms in quarters(counts)]
    epochs = (sampler.batches(epoch) for epoch in range(EPOCHS))
    short = sum(
        batch.valid < ROWS / 2 <= counts[batch.patch_id] for batches in epochs for batch in batches
    )
    return Shares(name, len(sampler), by_quarter, short / EPOCHS)


def print_lengths(rows: list[Padding]) -> None:
    """Print the table of ``docs/how-to/sequences.md``."""
    lengths = sizes_of("vowels")
    print(f"{lengths.size} utterances of {lengths.min()} to {lengths.max()} frames\n")
    print(
        "| batching | batches per epoch | utterances per batch | padding | "
        "largest batch, frames | mean / largest batch |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.batches} | {row.members:.1f} | {row.share():.1%} | "
            f"{row.largest()} | {row.used():.2f} |"
        )


def print_atoms(rows: list[Padding]) -> None:
    """Print the table of ``docs/how-to/sequences.md``."""
    atoms = sizes_of("molecules")
    print(f"\n{atoms.size} species: molecules and single atoms\n")
    print(
        "| batching | batches per epoch | padding of atoms | padding of pairs | "
        "largest batch, pairs | mean / largest batch |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.name} | {row.batches} | {row.share():.1%} | {row.share(2):.1%} | "
            f"{row.largest(2)} | {row.used(2):.2f} |"
        )


def print_storms(rows: list[Shares]) -> None:
    """Print the table of ``docs/how-to/sequences.md``."""
    counts = np.bincount(load("storms")["storm"])
    print(f"\n{counts.size} storms of {counts.min()} to {counts.max()} observations")
    observations = [int(counts[storms].sum()) for storms in quarters(counts)]
    print(f"observations of each quarter, the shortest storms first: {observations}\n")
    print(
        "| batching | batches per epoch | shortest quarter | 2nd | 3rd | longest quarter | "
        "short batches |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        shares = " | ".join(f"{share:.0%}" for share in row.by_quarter)
        print(f"| {row.name} | {row.batches} | {shares} | {row.short:.0f} |")


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, and draw the pictures with ``--pictures``."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.real_data", description=__doc__)
    parser.add_argument("--pictures", type=Path, help="draw them in this folder")
    asked = parser.parse_args(arguments)
    lengths, atoms, storms = by_length(), by_atoms(), by_storm()
    print_lengths(lengths)
    print_atoms(atoms)
    print_storms(storms)
    if asked.pictures:
        from docs.figures import real_pictures

        real_pictures.draw_lengths(lengths, asked.pictures / "length-buckets.png")
        real_pictures.draw_atoms(atoms, asked.pictures / "same-size-molecules.png")
        real_pictures.draw_storms(storms, asked.pictures / "ragged-groups.png")


if __name__ == "__main__":
    main()
