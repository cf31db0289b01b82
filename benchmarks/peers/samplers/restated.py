"""What anyone would use or write first, and designs that no package carries, restated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler, Sampler

from benchmarks.peers.peer import Peer, Work, as_array, as_list


class GroupedAsDetection(BatchSampler):
    """What torchvision's reference training for detection does with aspect ratios.

    Samples come in the order of another sampler, and wait by group until they fill a batch. An
    epoch has ``len(sampler) // batch_size`` batches, however many groups there are: those that are
    lacking at the end are made of the groups with the most samples waiting, filled up with samples
    of the group that the epoch has seen already. What waits in the other groups is left out.
    """

    def __init__(self, sampler: Sampler[int], group_ids: list[int], batch_size: int) -> None:
        self.sampler, self.group_ids, self.batch_size = sampler, group_ids, batch_size

    def __iter__(self) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = defaultdict(list)
        seen: dict[int, list[int]] = defaultdict(list)
        lacking = len(self)
        for sample in self.sampler:
            group = self.group_ids[sample]
            batch = waiting[group]
            batch.append(sample)
            seen[group].append(sample)
            if len(batch) == self.batch_size:
                yield batch
                lacking -= 1
                del waiting[group]
        for group in sorted(waiting, key=lambda one: len(waiting[one]), reverse=True)[:lacking]:
            batch = waiting[group]
            again = seen[group]
            short = self.batch_size - len(batch)
            # A group smaller than what is short comes round more than once.
            batch += (again * -(-short // len(again)))[:short]
            yield batch

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size  # type: ignore[arg-type]


class FixedMembers:
    """The sampler of the document that this project grew from.

    Groups are built with one mask a patch and cut into batches once. An epoch shuffles each batch
    inside, and the order of the batches: the members of a batch are the same for ever. It seeds
    generators of its own, where that document seeds the global ones.
    """

    def __init__(self, ids: np.ndarray, batch_size: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.batches: list[np.ndarray] = []
        for patch in np.unique(ids):
            samples = np.where(ids == patch)[0]
            # Copies: a view would keep the patch's array, too.
            self.batches += [
                samples[begin : begin + batch_size].copy()
                for begin in range(0, samples.size, batch_size)
            ]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            self.rng.shuffle(batch)
        for place in self.rng.permutation(len(self.batches)):
            yield self.batches[place].tolist()

    def __len__(self) -> int:
        return len(self.batches)


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


class SortedAndCut:
    """Each patch sorted by length and cut greedily: the same batches every epoch, in one order."""

    def __init__(self, lengths: np.ndarray, patch_of: np.ndarray, budget: int) -> None:
        self.batches: list[list[int]] = []
        for patch in np.unique(patch_of):
            of_patch = np.flatnonzero(patch_of == patch)
            of_patch = of_patch[np.argsort(-lengths[of_patch], kind="stable")]
            of_patch = of_patch[lengths[of_patch] <= budget]
            while of_patch.size:
                # The first is the longest of the batch.
                size = budget // int(lengths[of_patch[0]])
                self.batches.append(of_patch[:size].tolist())
                of_patch = of_patch[size:]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _grouped(work: Work, seed: int) -> GroupedAsDetection:
    drawn = RandomSampler(range(work.patch_of.size), generator=torch.Generator().manual_seed(seed))
    return GroupedAsDetection(drawn, work.given, work.batch_size)


def _fixed_members(work: Work, seed: int) -> FixedMembers:
    return FixedMembers(work.given, work.batch_size, seed)


RESTATED: tuple[Peer, ...] = (
    Peer(
        "torchvision GroupedBatchSampler",
        as_list,
        _grouped,
        note="its reference training, restated",
    ),
    Peer(
        "fixed batches, one mask per patch",
        as_array,
        _fixed_members,
        note="the first design of this project, restated",
    ),
)


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
    note="does not group: the baseline",
)
SORTED = Peer(
    "torch permute + stable sort",
    as_array,
    _permute_and_sort,
    note="20 lines, written for this page",
)
PLAIN: tuple[Peer, ...] = (UNGROUPED, SORTED)
