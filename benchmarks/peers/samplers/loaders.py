"""Loaders of tensors in memory, of other packages: shuffled, without patches."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.peers.peer import Peer, Work, as_array, importer


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
