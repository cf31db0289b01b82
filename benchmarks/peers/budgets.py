"""Samplers of other projects that fill a budget, and ours, on the same lengths."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.peers.measure import begin, length
from benchmarks.peers.peer import missing, version
from benchmarks.peers.samplers.budgeted import PYG, Peer, Workload, graphs
from benchmarks.timing import drain

ROUNDS = 5
PATCHES = 50


def one_patch(samples: int = 20_000, budget: int = 8_000, seed: int = 0) -> Workload:
    """Lognormal lengths around 200, all in one patch: a matter of packing alone."""
    rng = np.random.default_rng([1, seed])
    lengths = np.clip(np.rint(rng.lognormal(np.log(200), 0.6, samples)), 1, budget)
    name = "one patch"
    return Workload(name, lengths.astype(np.int64), np.zeros(samples, np.int64), budget)


def in_patches(
    samples: int = 20_000, budget: int = 8_000, patches: int = PATCHES, seed: int = 0
) -> Workload:
    """Lengths that differ from patch to patch, and less inside each."""
    rng = np.random.default_rng([2, seed])
    middles = rng.normal(np.log(200), 0.5, patches)
    patch_of = rng.integers(0, patches, samples)
    lengths = np.clip(np.rint(rng.lognormal(middles[patch_of], 0.3)), 1, budget)
    return Workload(f"{patches} patches", lengths.astype(np.int64), patch_of, budget)


def some_too_long(samples: int = 20_000, budget: int = 8_000, seed: int = 0) -> Workload:
    """One patch, with one sample in a thousand that is alone beyond the budget."""
    found = one_patch(samples, budget, seed)
    lengths = found.lengths.copy()
    rng = np.random.default_rng([3, seed])
    lengths[rng.choice(samples, max(samples // 1000, 1), replace=False)] = budget + 1
    return found._replace(name="some too long", lengths=lengths)


WORKLOADS = (one_patch, in_patches, some_too_long)


def measured(peer: Peer, workload: Workload, rounds: int = ROUNDS) -> dict[str, Any]:
    """Run two epochs of a peer and a resume, and say what came out."""
    found: dict[str, Any] = {"name": peer.name, "package": peer.package, "bounds": peer.bounds}
    found["version"] = version(peer)
    if why := missing(peer):
        return {**found, "missing": why}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        given = peer.prepare(workload)
        making, draining = [], []
        epochs: list[Any] = []
        for _ in range(rounds):
            start = time.process_time()
            sampler = peer.make(workload, given, 0)
            making.append(time.process_time() - start)
            start = time.process_time()
            batches = drawn(sampler, 0)
            draining.append(time.process_time() - start)
            if not epochs:
                epochs = [_listed(peer, batches), _listed(peer, drawn(sampler, 1))]
        found |= {"construct_seconds": min(making), "epoch_seconds": min(draining)}
        found |= filled(workload, epochs[0])
        found["len"] = length(peer.make(workload, given, 0))
        found["second_epoch_differs"] = epochs[0] != epochs[1]
        found["second_epoch_batches"] = len(epochs[1])
        found |= resumed(peer, workload, given, epochs[0], rounds)
    found["warnings"] = sorted({str(one.message).split(". ")[0] for one in warned})
    return found


def drawn(sampler: Any, epoch: int) -> list[Any]:
    """Return the batches of an epoch."""
    begin(sampler, epoch)
    # Not list(sampler), which asks for a length, and PyG's raises then.
    return [batch for batch in sampler]  # noqa: C416


def _listed(peer: Peer, batches: list[Any]) -> list[list[int]]:
    return [[int(place) for place in peer.indices(batch)] for batch in batches]


def filled(workload: Workload, batches: list[list[int]]) -> dict[str, Any]:
    """Count what batches hold, and what they hold of the budget."""
    lengths, patch_of, budget = workload.lengths, workload.patch_of, workload.budget
    with_any = [batch for batch in batches if batch]
    sums = np.array([lengths[batch].sum() for batch in with_any])
    padded = np.array([len(batch) * lengths[batch].max() for batch in with_any])
    seen = np.bincount(np.concatenate([np.array(batch) for batch in with_any]), minlength=0)
    seen = np.pad(seen, (0, lengths.size - seen.size))
    fits = lengths <= budget
    return {
        "batches": len(batches),
        "empty_batches": len(batches) - len(with_any),
        "fill": float(sums.sum() / (len(with_any) * budget)),
        "fill_padded": float(padded.sum() / (len(with_any) * budget)),
        "padding": float(1 - sums.sum() / padded.sum()),
        "over_budget": int((sums > budget).sum()),
        "over_budget_padded": int((padded > budget).sum()),
        "most": int(sums.max()),
        "most_padded": int(padded.max()),
        "lost": int((seen[fits] == 0).sum()),
        "repeated": int(np.maximum(seen - 1, 0).sum()),
        "too_long": int((~fits).sum()),
        "too_long_in_batches": int((seen[~fits] > 0).sum()),
        "mixed": sum(bool((patch_of[batch] != patch_of[batch[0]]).any()) for batch in with_any),
    }


def resumed(
    peer: Peer, workload: Workload, given: Any, whole: list[list[int]], rounds: int = ROUNDS
) -> dict[str, Any]:
    """Stop in the middle of an epoch, and go on in a new sampler from what the old one saved."""
    sampler = peer.make(workload, given, 0)
    if not hasattr(sampler, "state_dict"):
        return {"resume": "no state_dict"}
    middle = len(whole) // 2
    begin(sampler, 0)
    batches = iter(sampler)
    for _ in range(middle):
        next(batches)
    state = sampler.state_dict()
    took = []
    for _ in range(rounds):
        fresh = peer.make(workload, given, 0)
        # lhotse's load_state_dict empties its argument.
        saved = copy.deepcopy(state)
        start = time.process_time()
        fresh.load_state_dict(saved)
        goes_on = iter(fresh)
        rest = [next(goes_on)]
        took.append(time.process_time() - start)
    # With next() alone: lhotse's samplers are their own iterators and begin anew at iter().
    while (batch := next(goes_on, None)) is not None:
        rest.append(batch)
    same = _listed(peer, rest) == whole[middle:]
    found = "the same batches" if same else "different batches"
    return {"resume": found, "resume_seconds": min(took)}


def growth(sizes: Iterable[int]) -> dict[str, float]:
    """Return the seconds of an epoch of PyG's sampler by number of samples."""
    if missing(PYG):
        return {}
    from torch_geometric.loader import DynamicBatchSampler

    took = {}
    for size in sizes:
        workload = one_patch(size)
        sampler = DynamicBatchSampler(
            graphs(workload), max_num=workload.budget, mode="node", shuffle=True
        )
        start = time.process_time()
        drain(sampler)
        took[str(size)] = time.process_time() - start
    return took
