"""Ours, and the samplers that anyone would write or use first."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import BatchSampler, RandomSampler

from benchmarks.forms import MODULE
from benchmarks.peers.peer import Peer, Work, as_array, as_counts
from benchmarks.peers.restated.designs import PermuteAndSort
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


def _ungrouped(work: Work, seed: int) -> BatchSampler:
    drawn = RandomSampler(range(work.patch_of.size), generator=torch.Generator().manual_seed(seed))
    return BatchSampler(drawn, work.batch_size, drop_last=False)


def _permute_and_sort(work: Work, seed: int) -> PermuteAndSort:
    return PermuteAndSort(work.given, work.batch_size, seed)


UNGROUPED = Peer(
    "torch BatchSampler(RandomSampler)",
    as_array,
    _ungrouped,
    pure=False,
    note="groups nothing: the baseline",
)
OURS: tuple[Peer, ...] = (
    Peer("gpusampler", as_array, _ours, note=f"by {_native.describe()}"),
    Peer("gpusampler, by NumPy", as_array, _by_numpy, note="GPUSAMPLER_NATIVE=0"),
    Peer('gpusampler, output="numpy"', as_array, _as_numpy, note="batches are NumPy arrays"),
    Peer("gpusampler, from counts", as_counts, _from_counts, given="counts"),
)
SORTED = Peer("torch permute + stable sort", as_array, _permute_and_sort, note="ours, 20 lines")
PLAIN: tuple[Peer, ...] = (UNGROUPED, SORTED)
LISTED: Any = OURS[0]
"""What ratios are against, beside torch's ungrouped sampler."""
