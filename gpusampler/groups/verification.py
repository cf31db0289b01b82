"""Whether ids, and a saved index of them, are what they were: signatures and full checks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.arrays import Int64
from gpusampler.core.progress_bar import Bar
from gpusampler.groups import fingerprint
from gpusampler.groups.fingerprint import IdSum, of_names
from gpusampler.sources.base import PatchIds


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


LENGTH = 1 << 8
"""Ids in a block that is compared."""
BLOCKS = 64
BLOCKS_WHERE_DEAR = 4
"""Blocks, where a few ids from the middle cost as much as many."""


def signature_of(ids: PatchIds, blocks: int | None = None) -> dict[str, Any]:
    """Return the length, type and time of ids, and hashes of some blocks of them; JSON-safe.

    Parameters
    ----------
    ids : PatchIds
    blocks : int, optional
        Blocks that are read, spread evenly from the first ids to the last; all ids, if they are
        few. Default: as many as are cheap.

    Raises
    ------
    TypeError, ValueError, OSError
        If the ids cannot be read.
    """
    if blocks is None:
        # From a device each block is a copy that is waited for.
        cheap = ids.seekable and ids.device.on_host
        blocks = BLOCKS if cheap else BLOCKS_WHERE_DEAR
    if ids.size <= blocks * LENGTH:
        spans = [(0, ids.size)]
    else:
        last = ids.size - LENGTH
        starts = [last * block // (blocks - 1) for block in range(blocks)]
        spans = [(start, start + LENGTH) for start in starts]
    return {
        "size": ids.size,
        "dtype": ids.dtype,
        "modified": ids.modified,
        "blocks": blocks,
        "hashes": [_hash(ids.read(*span)) for span in spans],
        "names": None if ids.names is None else of_names(ids.names),
    }


def difference(saved: dict[str, Any], ids: PatchIds, *, whole: bool) -> str | None:
    """Return in what ids differ from those of a signature, None if in nothing.

    Parameters
    ----------
    saved : dict
        From `signature_of`.
    ids : PatchIds
    whole : bool
        Whether all ids are compared otherwise, so that it does not matter when their file changed.
    """
    if saved["size"] != ids.size:
        return f"{saved['size']} samples, got {ids.size}"
    if saved["dtype"] != ids.dtype:
        return f"type {saved['dtype']}, got {ids.dtype}"
    now = signature_of(ids, saved["blocks"])
    if saved["names"] != now["names"]:
        return "patches of other names"
    for number, (before, after) in enumerate(zip(saved["hashes"], now["hashes"], strict=True)):
        if before != after:
            return f"other values (block {number} of the {len(now['hashes'])} that are compared)"
    times = saved["modified"], now["modified"]
    if None not in times and times[0] != times[1] and not whole:
        return (
            f"a file last changed at {_time(times[0])}, got {_time(times[1])} "
            "(PatchGroups.load(..., verify=True) compares all ids instead)"
        )
    return None


def _hash(ids: Any) -> str:
    return _digest(np.ascontiguousarray(ids, dtype="<i8").tobytes())


def _digest(data: bytes) -> str:
    # Imported where it is needed, as few programs do: it takes milliseconds.
    import hashlib

    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _time(nanoseconds: int) -> str:
    return str(np.datetime64(nanoseconds, "ns"))
