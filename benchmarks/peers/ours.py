"""The configurations of gpusampler that are compared."""

from __future__ import annotations

from typing import Any

from benchmarks.forms import MODULE
from benchmarks.peers.peer import Peer, Work, as_array, as_counts
from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.permutation import _native


def _ours(work: Work, seed: int, output: str = "list", native: Any = MODULE) -> PatchBatchSampler:
    # For good: each case has a process of its own.
    _native.module = native
    return PatchBatchSampler(work.given, work.batch_size, seed=seed, output=output)


def _as_numpy(work: Work, seed: int) -> PatchBatchSampler:
    return _ours(work, seed, output="numpy")


def _by_numpy(work: Work, seed: int) -> PatchBatchSampler:
    return _ours(work, seed, native=None)


def _from_counts(work: Work, seed: int) -> PatchBatchSampler:
    return _ours(work._replace(given=PatchGroups.from_counts(work.given)), seed)


OURS: tuple[Peer, ...] = (
    Peer("gpusampler", as_array, _ours, note="batches are lists (default)"),
    Peer("gpusampler, NumPy backend", as_array, _by_numpy, note="GPUSAMPLER_NATIVE=0"),
    Peer('gpusampler, output="numpy"', as_array, _as_numpy, note="batches are NumPy arrays"),
    Peer(
        "gpusampler, from counts",
        as_counts,
        _from_counts,
        given="counts",
        note="PatchGroups.from_counts",
    ),
)
LISTED: Any = OURS[0]
"""The baseline of the second ratio; the first is torch's ungrouped sampler."""
