"""Ours beside what users would otherwise run: a report without limits.

What must not get slower is held by `benchmarks.gate`, against baselines that are chosen for that.

``python -m benchmarks.ratios`` prints what an epoch of ours takes against two of torch, from 100
samples on: lists of 64 against ``BatchSampler(RandomSampler(range(N)), 64, False)``, which groups
nothing, and against a permutation and a stable sort by patch in plain torch, which groups as ours
does; from a million samples on, NumPy arrays of 64, too. Ids are random; it is one process with one
thread, and garbage is collected as always.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import markdown
from benchmarks.forms import FORMS, evaluated_by, names
from benchmarks.peers.cases import Case
from benchmarks.peers.ours import PLAIN, UNGROUPED
from benchmarks.peers.peer import Work
from gpusampler import PatchBatchSampler

ROUNDS = 5

SIDE_SECONDS = 0.2
"""What each side of a pair takes, about: short epochs are repeated."""
PAIRS = 9
LONG = 2.0
FEW_PAIRS = 3
"""Pairs where the two sides take longer than `LONG` seconds."""

PATCHES = {10**2: 5, 10**3: 10, 10**4: 100, 10**5: 100, 10**6: 1000, 10**7: 1000, 10**8: 1000}
"""Patches by number of samples; the last one is only measured if asked for: it takes minutes."""
ARRAYS_FROM = 10**6
HEAD = ("samples", "patches", "output", "baseline", "ours, ms", "baseline, ms", "ratio")


@dataclass(frozen=True)
class Ratio:
    """One line of the table: seconds of ours and of the baseline."""

    what: str
    baseline: str
    ours_s: float
    baseline_s: float

    @property
    def ratio(self) -> float:
        return self.ours_s / self.baseline_s

    def __str__(self) -> str:
        return (
            f"{self.what:<46} {self.ours_s * 1e3:>10.3f} ms  {self.ratio:>8.4f} of "
            f"{self.baseline_s * 1e3:>10.3f} ms  {self.baseline}"
        )


def seconds(call: Callable[[], Any]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(
    benchmark: Any,
    what: str,
    ours: Callable[[], Any],
    baseline_name: str,
    baseline: Callable[[], Any],
    scale: float = 1.0,
) -> Ratio | None:
    """Measure both in turn and return their ratio; None where benchmarks are disabled.

    A round of pytest-benchmark times ours; its set-up has just timed the baseline. On a machine
    that other work shares, one of the rounds is undisturbed: the best of each counts.

    Parameters
    ----------
    benchmark : pytest-benchmark's fixture
    scale : float
        The baseline's time is multiplied by this: a part of it was measured.
    """
    base: list[float] = []

    def before() -> None:
        base.append(seconds(baseline))

    benchmark.extra_info["baseline"] = baseline_name
    ours()
    benchmark.pedantic(ours, setup=before, rounds=ROUNDS, iterations=1)
    if benchmark.disabled:
        return None
    best = float(benchmark.stats.stats.min)
    result = Ratio(what, baseline_name, best, min(base) * scale)
    benchmark.extra_info["ratio"] = result.ratio
    return result


class Paired(NamedTuple):
    """Seconds of ours and of the baseline, and their ratio: medians over pairs, and extremes."""

    ours_s: float
    baseline_s: float
    ratio: float
    lowest: float
    highest: float


def in_pairs(ours: Iterable[Any], baseline: Iterable[Any]) -> Paired:
    """Draw all batches of both in turn: what slows the machine for a while slows both of a pair."""
    sides = ours, baseline
    for batches in sides:
        deque(batches, maxlen=0)
    repeats = [max(1, round(SIDE_SECONDS / epoch_seconds(batches, 1))) for batches in sides]
    pairs: list[tuple[float, ...]] = []
    while len(pairs) < (PAIRS if not pairs or sum(pairs[0]) < LONG else FEW_PAIRS):
        pairs.append(tuple(map(epoch_seconds, sides, repeats)))
    ratios = [one / other for one, other in pairs]
    medians = map(statistics.median, (*zip(*pairs, strict=True), ratios))
    return Paired(*medians, min(ratios), max(ratios))


def epoch_seconds(batches: Iterable[Any], repeats: int) -> float:
    """Return the processor time of an epoch, the mean of some: what others take does not count."""
    start = time.process_time()
    for _ in range(repeats):
        deque(batches, maxlen=0)
    return (time.process_time() - start) / repeats


def epochs(case: Case) -> Iterator[dict[str, Any]]:
    """Measure an epoch of ours: a row for each output and baseline, as it comes."""
    ids = case.ids()
    outputs = {"list": PLAIN}
    if case.samples >= ARRAYS_FROM:
        outputs["numpy"] = (UNGROUPED,)
    for output, baselines in outputs.items():
        ours = PatchBatchSampler(ids, case.batch_size, seed=0, output=output)
        for peer in baselines:
            theirs = peer.make(Work(ids, ids, case.batch_size), 0)
            found = in_pairs(ours, theirs)._asdict()
            yield case._asdict() | {"output": output, "baseline": peer.name} | found


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each row as it comes; write all of them if asked to."""
    from benchmarks.__main__ import machine

    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description=__doc__)
    parser.add_argument(
        "--samples", type=float, nargs="+", choices=PATCHES, default=[*PATCHES][:-1], metavar="N"
    )
    parser.add_argument("--form", choices=names(), default=FORMS[-1], help="what evaluates ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with evaluated_by(asked.form):
        on = machine()
        print(", ".join(f"{name} {value}" for name, value in on.items()))
        print(f"\n{markdown.head((*HEAD, 'lowest', 'highest'))}")
        for samples in map(int, asked.samples):
            for row in epochs(Case(samples, PATCHES[samples], 64)):
                found.append(row)
                took = f"{row['ours_s'] * 1e3:.4g}", f"{row['baseline_s'] * 1e3:.4g}"
                ratios = (f"{row[name]:.3f}" for name in ("ratio", "lowest", "highest"))
                what = f"{samples:,}", f"{row['patches']:,}", row["output"], row["baseline"]
                print(markdown.row((*what, *took, *ratios)), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": on, "rows": found}, indent=1) + "\n")
    if asked.picture:
        draw(found, asked.picture)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios against the number of samples, a line for each output and baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    outputs = {"list": "lists", "numpy": "NumPy arrays"}
    for output, baseline in dict.fromkeys((row["output"], row["baseline"]) for row in rows):
        line = [row for row in rows if (row["output"], row["baseline"]) == (output, baseline)]
        axes.plot(
            [row["samples"] for row in line],
            [row["ratio"] for row in line],
            marker="o",
            label=f"{outputs[output]}, against {baseline}",
        )
    axes.axhline(1, color="0.7", linewidth=1)
    axes.set(xscale="log", xlabel="samples", ylabel="time of an epoch / baseline", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
