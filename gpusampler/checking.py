"""Reading all ids, or all of an index, to see whether they are what they were."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler import fingerprint
from gpusampler.arrays import Int64
from gpusampler.fingerprint import IdSum
from gpusampler.ids import PatchIds
from gpusampler.telemetry import Bar


def mark_of(ids: PatchIds, held: NDArray[np.bool_] | None = None, *, progress: bool) -> int:
    """Return the fingerprint of ids, all of which are read.

    Parameters
    ----------
    ids : PatchIds
    held : boolean array, shape (N,), optional
        The samples that count. Default: all.
    progress : bool
    """
    found, total = IdSum(), 0
    with Bar(ids.size, "comparing ids", "samples", progress) as shown:
        for first, block in ids.blocks():
            block = block.astype(np.int64, copy=False)
            if held is None:
                found.add(first, block)
            else:
                at = np.flatnonzero(held[first : first + block.size])
                total += fingerprint.of_samples(block, at, first + at) if at.size else 0
            shown.update(block.size)
    return found.value(ids.size) if held is None else total & ((1 << 64) - 1)


def mark_of_order(
    patch_ids: Int64, counts: Int64, order: NDArray[Any], *, progress: bool
) -> int | None:
    """Return the fingerprint of an order, all of which is read; None if it is not in order.

    Parameters
    ----------
    patch_ids, counts : int64 arrays, shape (G,)
    order : integer array, shape (N,)
    progress : bool
    """
    ends = np.cumsum(counts)
    total, last, last_group = 0, -1, -1
    with Bar(order.size, "checking the index", "samples", progress) as shown:
        for first in range(0, order.size, fingerprint.BLOCK):
            part = order[first : first + fingerprint.BLOCK]
            group = np.searchsorted(ends, np.arange(first, first + part.size), side="right")
            # Within a patch samples ascend, from the last one of the block before on.
            begins = np.diff(group, prepend=last_group) != 0
            if not (begins | (np.diff(part, prepend=last) > 0)).all():
                return None
            total += fingerprint.of_samples(patch_ids, group, part)
            last, last_group = int(part[-1]), int(group[-1])
            shown.update(part.size)
    return total & ((1 << 64) - 1)
