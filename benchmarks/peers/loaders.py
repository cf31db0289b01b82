"""Loaders of tensors in memory beside `PatchTensorLoader`: ``python -m benchmarks.peers.loaders``.

An epoch over a tensor of float32, shuffled, in batches of 64 rows. The loaders of other packages
know no patches; ours hands out batches of one patch each. Ratios are ours / theirs, medians of
adjacent pairs in one process with one thread. GPUSAMPLER_NATIVE=0 before the command has NumPy
evaluate ours.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks import markdown
from benchmarks.peers.cases import Case
from benchmarks.peers.peer import Peer, Work, as_array, importer, missing, version
from benchmarks.ratios import in_pairs
from gpusampler import PatchBatchSampler, PatchTensorLoader

CASE = Case(10**5, 100, 64)
WIDTHS = (8, 256)
"""Numbers in a row."""


def _light(work: Work, seed: int, **options: Any) -> Any:
    from light_dataloader import TensorDataLoader

    return TensorDataLoader(work.given, work.batch_size, shuffle=True, seed=seed, **options)


def _tensorloader(work: Work, seed: int) -> Any:
    from tensorloader import TensorLoader

    # It takes no seed.
    return TensorLoader(work.given, batch_size=work.batch_size, shuffle=True)


_LIGHT: dict[str, Any] = {
    "package": "light-dataloader",
    "load": importer("light_dataloader"),
    "pure": False,
}
LOADERS: tuple[Peer, ...] = (
    Peer("light-dataloader", as_array, _light, **_LIGHT),
    Peer(
        "light-dataloader, memory_efficient=True",
        as_array,
        partial(_light, memory_efficient=True),
        **_LIGHT,
    ),
    Peer(
        "tensorloader",
        as_array,
        _tensorloader,
        "tensorloader",
        importer("tensorloader"),
        pure=False,
    ),
)


def ratio(peer: Peer, case: Case, width: int) -> float:
    """Return what an epoch of ours takes, in epochs of a peer's."""
    tensor = torch.rand(case.samples, width, generator=torch.Generator().manual_seed(0))
    ids = case.ids()
    ours = PatchTensorLoader(PatchBatchSampler(ids, case.batch_size, seed=0), x=tensor)
    return in_pairs(ours, peer.make(Work(tensor, ids, case.batch_size), 0)).ratio


def main() -> None:
    """Print the table."""
    # Here: it imports all peers.
    from benchmarks.__main__ import machine

    torch.set_num_threads(1)
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{CASE}; ours / theirs by numbers in a row\n")
    print(markdown.head(("loader", "version", *WIDTHS)))
    for peer in LOADERS:
        why = missing(peer)
        ratios = [why or f"{ratio(peer, CASE, width):.2f}" for width in WIDTHS]
        print(markdown.row((peer.name, version(peer), *ratios)), flush=True)


if __name__ == "__main__":
    main()
