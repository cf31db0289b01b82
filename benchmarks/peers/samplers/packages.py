"""Samplers of packages, each called as its own documentation says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, ConcatDataset, RandomSampler

from benchmarks.peers.peer import Peer, Work, as_array, as_counts, as_list, importer


def _clustered(work: Work, seed: int) -> Any:
    from clustered_batch_sampler import ClusteredBatchSampler

    # Of the dataset only len() is used where keys are given.
    return ClusteredBatchSampler(
        range(work.patch_of.size), key=work.given, batch_size=work.batch_size, seed=seed
    )


def _bucket_batches(work: Work, seed: int, drop_last: bool = False) -> Any:
    from bucketsampler import BucketBatchSampler

    return BucketBatchSampler(work.given, work.batch_size, drop_last=drop_last, seed=seed)


def _bucket_batches_by_default(work: Work, seed: int) -> Any:
    return _bucket_batches(work, seed, drop_last=True)


def _proportional(work: Work, seed: int) -> Any:
    from sentence_transformers.base.sampler import DefaultBatchSampler, ProportionalBatchSampler

    # As the trainer makes it of a dictionary of datasets.
    generator = torch.Generator().manual_seed(seed)
    shared: dict[str, Any] = {"generator": generator, "seed": seed}
    batch_samplers = [
        DefaultBatchSampler(
            RandomSampler(dataset, generator=generator),
            batch_size=work.batch_size,
            drop_last=False,
            **shared,
        )
        for dataset in work.given
    ]
    return ProportionalBatchSampler(
        dataset=ConcatDataset(work.given), batch_samplers=batch_samplers, **shared
    )


def _as_datasets(ids: np.ndarray, batch_size: int) -> Work:
    work = as_counts(ids, batch_size)
    return work._replace(given=[range(count) for count in work.given.tolist()])


def _buckets(work: Work, seed: int, base: Any, **shared: Any) -> Any:
    from bionemo.size_aware_batching.sampler import BucketBatchSampler

    return BucketBatchSampler(
        torch.from_numpy(work.given),
        torch.arange(int(work.given.max()) + 2),
        base,
        base_batch_sampler_shared_kwargs=shared,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
    )


def _buckets_of_batches(work: Work, seed: int) -> Any:
    return _buckets(work, seed, BatchSampler, batch_size=work.batch_size, drop_last=False)


def _one(sample: int) -> int:
    return 1


def _buckets_of_sizes(work: Work, seed: int) -> Any:
    from bionemo.size_aware_batching.sampler import SizeAwareBatchSampler

    return _buckets(work, seed, SizeAwareBatchSampler, sizeof=_one, max_total_size=work.batch_size)


_BIONEMO: dict[str, Any] = {
    "package": "bionemo-size-aware-batching",
    "load": importer("bionemo.size_aware_batching.sampler"),
}
_BUCKETS: dict[str, Any] = {
    "package": "bucketsampler",
    "load": importer("bucketsampler.torch"),
}
PACKAGES: tuple[Peer, ...] = (
    Peer(
        "clustered-batch-sampler",
        as_list,
        _clustered,
        "clustered-batch-sampler",
        importer("clustered_batch_sampler"),
        note="ClusteredBatchSampler(key=ids)",
    ),
    Peer(
        "bucketsampler, drop_last=False",
        as_array,
        _bucket_batches,
        **_BUCKETS,
        note="BucketBatchSampler",
    ),
    Peer(
        "bucketsampler, default",
        as_array,
        _bucket_batches_by_default,
        **_BUCKETS,
        note="BucketBatchSampler, drop_last=True",
        drawn=False,
    ),
    Peer(
        "sentence-transformers Proportional",
        _as_datasets,
        _proportional,
        "sentence-transformers",
        importer("sentence_transformers.base.sampler"),
        given="one dataset per patch",
        note="ProportionalBatchSampler, as its trainer creates it",
    ),
    Peer(
        "bionemo BucketBatchSampler(BatchSampler)",
        as_array,
        _buckets_of_batches,
        **_BIONEMO,
        note="patch ids as sizes",
    ),
    Peer(
        "bionemo BucketBatchSampler(SizeAware)",
        as_array,
        _buckets_of_sizes,
        **_BIONEMO,
        note="SizeAwareBatchSampler, every sample of size 1",
        drawn=False,
    ),
)
