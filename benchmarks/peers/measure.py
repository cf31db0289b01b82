"""All that is measured of one peer on one case, in the process that calls it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers.cases import Case
from benchmarks.peers.correctness import Epoch, compared, counted
from benchmarks.peers.memory import peak_of
from benchmarks.peers.peer import Peer

ROUNDS = 5
ENOUGH = 1.0
"""Seconds of the processor: after so many, no more rounds than one are timed."""
LARGE = 5_000_000
"""From so many samples on a second epoch is not compared with the first, to save the time."""
WARMING = Case(500, 5, 8)


def measured(
    peer: Peer, case: Case, say: Callable[[dict[str, Any]], None], rounds: int = ROUNDS
) -> None:
    """Measure, and ``say`` each finding as it comes: of what takes too long the first are kept.

    Times are those of the processor, in seconds, best of some rounds. Memory is taken in the first
    of them, before anything else has grown.
    """
    _warm(peer)
    # What the ids become for this peer is neither timed nor in its memory.
    work = peer.prepare(case.ids(), case.batch_size)
    say({})
    took: dict[str, list[float]] = {"construct": [], "epoch": [], "first": [], "second": []}

    def construct() -> Any:
        start = time.process_time()
        sampler = peer.make(work, 0)
        took["construct"].append(time.process_time() - start)
        say({"construct_s": min(took["construct"])})
        return sampler

    def first_epoch(sampler: Any) -> None:
        begin(sampler, 0)
        start = time.process_time()
        deque(sampler, maxlen=0)
        took["epoch"].append(time.process_time() - start)
        say({"epoch_s": min(took["epoch"])})

    def construct_and_drain() -> Any:
        sampler = construct()
        first_epoch(sampler)
        return sampler

    def second_epoch(sampler: Any) -> None:
        """Time its first batch on the way."""
        begin(sampler, 1)
        start = time.process_time()
        batches = iter(sampler)
        next(batches, None)
        took["first"].append(time.process_time() - start)
        deque(batches, maxlen=0)
        took["second"].append(time.process_time() - start)
        say({"first_s": min(took["first"]), "second_epoch_s": min(took["second"])})

    sampler, peak = peak_of(construct_and_drain)
    say({"peak_mb": peak / 1e6, "len": length(sampler)})
    second_epoch(sampler)
    spent = sum(map(sum, took.values()))
    while len(took["epoch"]) < rounds and spent < ENOUGH:
        second_epoch(construct_and_drain())
        spent = sum(map(sum, took.values()))
    say({"rounds": len(took["epoch"])})
    _judge(sampler, case, work.patch_of, say)


def begin(sampler: Any, epoch: int) -> None:
    """Set the epoch, as documentations ask for where there is such a call."""
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def _judge(
    sampler: Any, case: Case, patch_of: np.ndarray, say: Callable[[dict[str, Any]], None]
) -> None:
    """Look at what an epoch holds, and at what the next one does otherwise."""
    begin(sampler, 0)
    first = Epoch(sampler)
    found: dict[str, Any] = counted(first, patch_of)
    if case.samples < LARGE:
        begin(sampler, 1)
        found |= compared(first, Epoch(sampler), patch_of)
    say(found)


def _warm(peer: Peer) -> None:
    """Run once on a few samples: imports and other work done once are not the sampler's cost."""
    work = peer.prepare(WARMING.ids(), WARMING.batch_size)
    sampler = peer.make(work, 0)
    for epoch in range(2):
        begin(sampler, epoch)
        deque(sampler, maxlen=0)


def length(sampler: Any) -> int | str:
    """Return the length, or the name of the error that ``len`` raises."""
    try:
        return len(sampler)
    except (TypeError, ValueError) as error:
        return type(error).__name__
