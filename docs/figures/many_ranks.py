"""Memory and time of one rank of 1,024, for 1e12 samples: ``python -m docs.figures.many_ranks``.

Nothing is trained and no other rank is started: a rank's batches are a function of its number, so
one process can act as any rank. Memory is what NumPy and Python report to tracemalloc; times are
the best of `ROUNDS` rounds, on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable

from benchmarks import markdown
from gpusampler import PatchBatchSampler, PatchGroups

RANKS, RESUMED_RANKS = 1024, 768
COUNTS = [10**9 + 2 * patch - 999 for patch in range(1000)]  # 1e12 samples
BATCH_SIZE = 64
STEPS = (10**9 // RANKS, 15 * 10**9 // RANKS)
"""Steps after which a run is resumed: at the slots just below 1e9 and 1.5e10."""
SHOWN = (0, 1, 511, 1023)
ROUNDS = 20


def sampler_of(rank: int, ranks: int = RANKS) -> PatchBatchSampler:
    """Make the sampler of a rank, as a run would."""
    groups = PatchGroups.from_counts(COUNTS)
    return PatchBatchSampler(groups, BATCH_SIZE, seed=42, num_replicas=ranks, rank=rank)


def kilobytes(rank: int) -> float:
    """Return the peak memory of making a sampler and drawing its first batch."""
    tracemalloc.start()
    kept = iter(sampler_of(rank))
    next(kept)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 1000


def best_ms(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Return the milliseconds of a call, the best of `ROUNDS` rounds."""
    rounds = []
    for _ in range(ROUNDS):
        before()
        start = time.perf_counter()
        call()
        rounds.append(time.perf_counter() - start)
    return min(rounds) * 1e3


def line(rank: int) -> str:
    """Measure a rank and return its row of the table."""
    sampler = sampler_of(rank)
    last = (len(sampler) - 1) * RANKS + rank
    again = "" if last < sampler.plan.num_batches else " (repeated)"
    cells = [
        f"{rank:,}",
        f"{len(sampler):,}",
        f"{rank:,}, {rank + RANKS:,}, ... {last % sampler.plan.num_batches:,}{again}",
        f"{kilobytes(rank):.0f}",
    ]
    for step in STEPS:
        fresh = sampler_of(rank)
        state = fresh.state_dict(step=step)

        def load(fresh: PatchBatchSampler = fresh, state: dict[str, object] = state) -> None:
            fresh.load_state_dict(state)

        def first(fresh: PatchBatchSampler = fresh) -> None:
            next(iter(fresh))

        cells += [f"{best_ms(load):.3f}", f"{best_ms(first, before=load):.2f}"]
    return markdown.row(cells)


def main() -> None:
    """Print the tables of the how-to page."""
    sampler = sampler_of(0)
    batches = sampler.plan.num_batches
    next(iter(sampler))  # keep the imports of a process's first call out of the times
    print(
        f"{sum(COUNTS):,} samples, {len(COUNTS):,} patches, batches of {BATCH_SIZE}: "
        f"{batches:,} batches per epoch, {RANKS:,} ranks\n"
    )
    states = [sampler_of(0).state_dict(step=step) for step in STEPS]
    names = ["rank", "steps", "slots", "memory, kB"]
    for state in states:
        names += [f"load at slot {state['slot']:,}, ms", "first batch, ms"]
    print(markdown.head(names))
    for rank in SHOWN:
        print(line(rank), flush=True)
    print(f"\nsize of the state as JSON: {max(len(json.dumps(state)) for state in states)} bytes")
    for state in states:
        resumed = sampler_of(0, RESUMED_RANKS)
        resumed.load_state_dict(state)
        steps = len(iter(resumed))  # type: ignore[arg-type]
        left = batches - state["slot"]
        print(
            f"resumed at slot {state['slot']:,} on {RESUMED_RANKS} ranks: {left:,} batches left, "
            f"{steps:,} steps, {steps * RESUMED_RANKS - left} batches repeated"
        )


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m docs.figures.many_ranks", description=__doc__.splitlines()[0]
    ).parse_args()
    main()
