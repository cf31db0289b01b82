"""Two designs that no package carries, restated from their descriptions."""

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


def _grouped(work: Work, seed: int) -> GroupedAsDetection:
    drawn = RandomSampler(range(work.patch_of.size), generator=torch.Generator().manual_seed(seed))
    return GroupedAsDetection(drawn, work.given, work.batch_size)


def _fixed_members(work: Work, seed: int) -> FixedMembers:
    return FixedMembers(work.given, work.batch_size, seed)


RESTATED: tuple[Peer, ...] = (
    Peer("torchvision's GroupedBatchSampler", as_list, _grouped, note="restated"),
    Peer(
        "one mask a patch, fixed batches",
        as_array,
        _fixed_members,
        note="the design this project grew from, restated",
    ),
)
