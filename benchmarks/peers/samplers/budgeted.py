"""Samplers that fill a budget, each called as its own documentation says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.peers.peer import importer
from benchmarks.peers.samplers.restated import SortedAndCut
from gpusampler import CostBudget, PatchBatchSampler

WIDTH, LEAST = 50, 200
"""Of bionemo's buckets: the widest, in points, and the fewest samples if that allows them."""


class Workload(NamedTuple):
    """Samples with their lengths and patches, and the most that a batch may hold."""

    name: str
    lengths: np.ndarray
    patch_of: np.ndarray
    budget: int


class Peer(NamedTuple):
    """A sampler: what makes it from a workload, its prepared input and a seed."""

    name: str
    package: str | None
    bounds: str
    make: Callable[[Workload, Any, int], Any]
    prepare: Callable[[Workload], Any] = lambda workload: workload.lengths.tolist()
    load: Callable[[], Any] | None = None
    indices: Callable[[Any], list[int]] = list


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def _size_aware(workload: Workload, lengths: list[int], seed: int) -> Any:
    from bionemo.size_aware_batching.sampler import SizeAwareBatchSampler
    from torch.utils.data import RandomSampler

    drawn = RandomSampler(lengths, generator=_generator(seed))
    return SizeAwareBatchSampler(drawn, lengths.__getitem__, workload.budget)


def _buckets(workload: Workload, lengths: list[int], seed: int, of: str) -> Any:
    """Return bionemo's buckets of sums, of sizes, or of patches as if their ids were sizes."""
    import torch
    from bionemo.size_aware_batching.sampler import BucketBatchSampler, SizeAwareBatchSampler
    from bionemo.size_aware_batching.utils import create_buckets

    sizes = torch.from_numpy(workload.patch_of if of == "patches" else workload.lengths)
    if of == "patches":
        boundaries = torch.arange(int(workload.patch_of.max()) + 2)
    else:
        boundaries = create_buckets(sizes, WIDTH, LEAST).bucket_boundaries
    shared: dict[str, Any] = {"sizeof": lengths.__getitem__, "max_total_size": workload.budget}
    base: Any = SizeAwareBatchSampler
    given: dict[str, Any] = {}
    if of == "sizes":
        base, shared = torch.utils.data.BatchSampler, {"drop_last": False}
        # The largest size in a bucket is one below where the next begins.
        most = [max(workload.budget // (int(end) - 1), 1) for end in boundaries[1:]]
        given = {"base_batch_sampler_individual_kwargs": {"batch_size": most}}
    return BucketBatchSampler(
        sizes,
        boundaries,
        base,
        base_batch_sampler_shared_kwargs=shared,
        shuffle=True,
        generator=_generator(seed),
        **given,
    )


def _cuts(workload: Workload) -> Any:
    from lhotse import CutSet, MonoCut

    # Only what describes them: no recording is read, or needed, to sample.
    return CutSet.from_cuts(
        MonoCut(id=str(place), start=0.0, duration=float(length), channel=0, supervisions=[])
        for place, length in enumerate(workload.lengths.tolist())
    )


def _places(cuts: Any) -> list[int]:
    return [int(cut.id) for cut in cuts]


def _cut_sampler(workload: Workload, cuts: Any, seed: int, name: str, **given: Any) -> Any:
    from lhotse.dataset import sampling

    most = float(workload.budget)
    return getattr(sampling, name)(cuts, max_duration=most, shuffle=True, seed=seed, **given)


def graphs(workload: Workload) -> list[Any]:
    from torch_geometric.data import Data

    return [Data(num_nodes=length) for length in workload.lengths.tolist()]


class _Seeded:
    """PyG's sampler draws from torch's own generator: seeded before the first epoch only."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed

    def __iter__(self) -> Any:
        import torch

        if self.seed >= 0:
            torch.manual_seed(self.seed)
            self.seed = -1
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


def _dynamic_batches(workload: Workload, graphs: list[Any], seed: int, skip: bool = False) -> Any:
    from torch_geometric.loader import DynamicBatchSampler

    sampler = DynamicBatchSampler(
        graphs, max_num=workload.budget, mode="node", shuffle=True, skip_too_big=skip
    )
    return _Seeded(sampler, seed)


def _ours(workload: Workload, _: Any, seed: int) -> Any:
    return PatchBatchSampler(
        workload.patch_of,
        CostBudget(workload.budget, sample_costs=workload.lengths, over_budget="skip"),
        seed=seed,
        progress=False,
    )


def _bionemo(name: str, bounds: str, make: Callable[..., Any]) -> Peer:
    load = importer("bionemo.size_aware_batching.sampler")
    return Peer(f"bionemo {name}", "bionemo-size-aware-batching", bounds, make, load=load)


def _lhotse(what: str, name: str, **given: Any) -> Peer:
    make = partial(_cut_sampler, name=name, **given)
    load = importer("lhotse.dataset.sampling")
    return Peer(f"lhotse {what}", "lhotse", "padded", make, _cuts, load, _places)


def _pyg(name: str, **given: Any) -> Peer:
    make = partial(_dynamic_batches, **given)
    return Peer(
        f"PyG {name}", "torch_geometric", "sum", make, graphs, importer("torch_geometric.loader")
    )


PYG = _pyg("DynamicBatchSampler")
_BUCKETS = "BucketBatchSampler"
PEERS = (
    Peer("gpusampler, CostBudget(sample_costs=)", None, "padded", _ours),
    _bionemo("SizeAwareBatchSampler", "sum", _size_aware),
    _bionemo(f"{_BUCKETS} of SizeAwareBatchSampler", "sum", partial(_buckets, of="sums")),
    _bionemo(f"{_BUCKETS} of BatchSampler", "padded", partial(_buckets, of="sizes")),
    _bionemo(f"{_BUCKETS}, patch ids as sizes", "sum", partial(_buckets, of="patches")),
    _lhotse("DynamicBucketingSampler", "DynamicBucketingSampler", num_buckets=10),
    _lhotse("DynamicBucketingSampler(num_buckets=30)", "DynamicBucketingSampler", num_buckets=30),
    _lhotse("SimpleCutSampler", "SimpleCutSampler"),
    PYG,
    _pyg("DynamicBatchSampler(skip_too_big=True)", skip=True),
    Peer(
        "sorted in each patch, cut greedily (20 lines)",
        None,
        "padded",
        lambda workload, _, seed: SortedAndCut(*workload[1:]),
    ),
)
