"""Ours, and the samplers that anyone would write or use first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler

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


def _ungrouped(work: Work, seed: int) -> BatchSampler:
    drawn = RandomSampler(range(work.patch_of.size), generator=torch.Generator().manual_seed(seed))
    return BatchSampler(drawn, work.batch_size, drop_last=False)


class PermuteAndSort:
    """Permute all samples, sort them stably by patch, cut, and permute the batches.

    What one writes first when torch is at hand, written well: the cuts are worked out once, and
    an epoch is one permutation, one sort of the narrowest type and one list.
    """

    def __init__(self, ids: np.ndarray, batch_size: int, seed: int) -> None:
        _, group_of, counts = np.unique(ids, return_inverse=True, return_counts=True)
        narrow = torch.int16 if counts.size < 2**15 else torch.int32
        self.ids = torch.from_numpy(group_of).to(narrow)
        batches = -(-counts // batch_size)
        first = np.repeat(np.cumsum(counts) - counts, batches)
        within = np.arange(batches.sum()) - np.repeat(np.cumsum(batches) - batches, batches)
        begins = first + within * batch_size
        self.begins = begins.tolist()
        self.ends = np.append(begins[1:], ids.size).tolist()
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        permuted = torch.randperm(self.ids.numel(), generator=self.generator)
        # torch.argsort is another order of arguments for the same sort.
        by_patch = torch.sort(self.ids[permuted], stable=True).indices
        samples = permuted[by_patch].tolist()
        for batch in torch.randperm(len(self.begins), generator=self.generator).tolist():
            yield samples[self.begins[batch] : self.ends[batch]]

    def __len__(self) -> int:
        return len(self.begins)


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
