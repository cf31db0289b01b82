"""An epoch of ours against two of torch, from 100 samples on: ``python -m benchmarks.curve``.

Lists of 64 against ``BatchSampler(RandomSampler(range(N)), 64, False)``, which groups nothing, and
against a permutation and a stable sort by patch in plain torch, which groups as ours does; from a
million samples on, NumPy arrays of 64, too. Random patch ids; one process, one thread, garbage
collection as it is. ``--form`` chooses what evaluates ours.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import markdown
from benchmarks.__main__ import machine
from benchmarks.forms import evaluated_by, names
from benchmarks.gate_cases import drain
from benchmarks.peers.cases import Case
from benchmarks.peers.ours import PLAIN
from benchmarks.peers.peer import Work
from benchmarks.ratios import in_pairs
from gpusampler import PatchBatchSampler
from gpusampler.permutation import _native

PATCHES = {10**2: 5, 10**3: 10, 10**4: 100, 10**5: 100, 10**6: 1000, 10**7: 1000, 10**8: 1000}
"""Patches by number of samples; the last one takes some minutes and 6 GB."""

BATCH_SIZE = 64
ARRAYS_FROM = 10**6


def rows(samples: int) -> Iterator[dict[str, Any]]:
    """Measure what there is for one number of samples: a row for each output and baseline."""
    case = Case(samples, PATCHES[samples], BATCH_SIZE)
    ids = case.ids()
    work = Work(ids, ids, BATCH_SIZE)
    for output in ("list", "numpy"):
        sampler = PatchBatchSampler(ids, BATCH_SIZE, seed=0, output=output)
        for peer in PLAIN[: 2 if output == "list" else samples >= ARRAYS_FROM]:
            baseline = peer.make(work, 0)
            found = in_pairs(lambda: drain(sampler), lambda: drain(baseline))
            yield {**case._asdict(), "output": output, "baseline": peer.name, **found._asdict()}


def main(arguments: list[str] | None = None) -> None:
    """Print a line for each row as it comes; write all of them if asked to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curve", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--form", choices=names(), default=names()[-1], help="what evaluates ours")
