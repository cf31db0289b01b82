"""MosaicML Streaming's generation of work with ``batching_method="per_stream"``.

No shard is written. `generate_work` and the methods of `StreamingDataset` that it calls are
Streaming's own. The values that its constructor reads from index files (streams, shards, samples)
are set here: a stream of one shard per patch, with the constructor's defaults but ``shuffle=True``.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.peers.peer import Peer, Work, as_counts


def _load() -> Any:
    """Import ``streaming.base`` alone.

    ``import streaming`` imports its parts for vision, too, and with them torchvision, whose build
    on PyPI does not load with a torch for CPUs.
    """
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'streaming'")
        bare = ModuleType("streaming")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = bare
        try:
            importlib.import_module("streaming.base.dataset")
        except BaseException:
            del sys.modules["streaming"]
            raise
    return importlib.import_module("streaming.base.dataset")


class PerStream:
    """The batches of one worker of one rank on one node."""

    def __init__(self, counts: np.ndarray, batch_size: int, seed: int) -> None:
        from streaming.base.dataset import StreamingDataset
        from streaming.base.stream import Stream
        from streaming.base.world import World

        # A warning for each stream that loses samples, in each epoch.
        logging.getLogger("streaming").setLevel(logging.ERROR)
        streams = [SimpleNamespace() for _ in range(counts.size)]
        self.world = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        self.dataset: Any = SimpleNamespace(
            streams=streams,
            num_streams=len(streams),
            shard_offset_per_stream=np.arange(counts.size),
            shards_per_stream=np.ones(counts.size, np.int64),
            samples_per_shard=counts,
            sample_offset_per_shard=np.cumsum(counts) - counts,
            sampling_method="balanced",
            sampling_granularity=1,
            partition_algo="relaxed",
            num_canonical_nodes=1,
            initial_physical_nodes=None,
            batch_size=batch_size,
            shuffle=True,
            shuffle_algo="py1e",
            shuffle_seed=seed,
            shuffle_block_size=None,
            epoch_seed_change=True,
        )
        size = Stream.apply_weights(streams, counts, None, seed)  # type: ignore[arg-type]
        self.length = -(-size // batch_size)
        StreamingDataset._set_shuffle_block_size(self.dataset, self.world)
        self.dataset.resample_streams = MethodType(StreamingDataset.resample_streams, self.dataset)
        self.epoch = -1

    def __iter__(self) -> Iterator[list[int]]:
        from streaming.base.batching import generate_work

        # As the dataset counts them itself.
        self.epoch += 1
        work = generate_work("per_stream", self.dataset, self.world, self.epoch, 0)
        for batch in work[0, 0, 0]:
            yield batch.tolist()

    def __len__(self) -> int:
        """Return what a DataLoader says of a dataset of this length."""
        return self.length


def _per_stream(work: Work, seed: int) -> PerStream:
    return PerStream(work.given, work.batch_size, seed)


MOSAIC = Peer(
    "MosaicML Streaming per_stream",
    as_counts,
    _per_stream,
    "mosaicml-streaming",
    _load,
    given="one stream per patch",
    note='generate_work("per_stream"), no shards written',
)
