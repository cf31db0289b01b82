"""Detect changes of ids and index files: signatures of sampled blocks, and full checks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.arrays import Int64
from gpusampler.core.progress_bar import ProgressBar
from gpusampler.groups import fingerprint
from gpusampler.sources.base import PatchIds

BLOCK_IDS = 1 << 8
"""Number of ids in a compared block."""
NUM_BLOCKS = 64
NUM_SLOW_BLOCKS = 4
"""Number of compared blocks if reading a small block is as slow as reading a large one."""


def fingerprint_ids(
    ids: PatchIds, sample_mask: NDArray[np.bool_] | None = None, *, progress: bool
) -> int:
    """Read all ids and return the fingerprint of those in ``sample_mask``, shape (N,)."""
    id_sum, total = fingerprint.IdSum(), 0
    with ProgressBar(ids.size, "comparing ids", "samples", progress) as bar:
        for first, block in ids.blocks():
            block = block.astype(np.int64, copy=False)
            if sample_mask is None:
                id_sum.add(first, block)
            else:
                rows = np.flatnonzero(sample_mask[first : first + block.size])
                total += fingerprint.of_samples(block, rows, first + rows) if rows.size else 0
            bar.update(block.size)
    return id_sum.value(ids.size) if sample_mask is None else total & fingerprint.WRAP


def fault_of_order(
    patch_ids: Int64,
    counts: Int64,
    starts: Int64,
    order: NDArray[Any] | None,
    source_size: int,
    expected: int,
    *,
    progress: bool,
) -> str | None:
    """Read a host order, and return what is wrong with it, or None if it is right.

    It is right if its samples are distinct and in 0 .. source_size - 1, if those of a patch ascend,
    and if its fingerprint is the expected one.
    """
    wrong_fingerprint = "wrong fingerprint of the order"
    if order is None:
        current = fingerprint.of_runs(patch_ids, starts, counts)
        return None if current == expected else wrong_fingerprint
    sums = fingerprint.SampleSum(patch_ids)
    last_sample, last_group = -1, -1
    with ProgressBar(order.size, "checking the index", "samples", progress) as bar:
        for group, samples in fingerprint.blocks_of_order(counts, order):
            if int(samples.min()) < 0 or int(samples.max()) >= source_size:
                return f"samples of the order must be in 0 .. {source_size - 1}"
            # Samples ascend within a patch, also across block boundaries.
            starts_patch = np.diff(group, prepend=last_group) != 0
            if not (starts_patch | (np.diff(samples, prepend=last_sample) > 0)).all():
                return "the samples of a patch do not ascend in the order"
            sums.add(group, samples)
            last_sample, last_group = int(samples[-1]), int(group[-1])
            bar.update(samples.size)
    if sums.value != expected:
        return wrong_fingerprint
    if order.size == source_size:
        are_distinct = sums.weight == fingerprint.total_weight(source_size)
    else:
        ascending = np.sort(order)
        are_distinct = bool((ascending[1:] > ascending[:-1]).all())
    return None if are_distinct else "a sample is twice in the order"


def signature_of(ids: PatchIds, num_blocks: int | None = None) -> dict[str, Any]:
    """Return size, dtype, modification time and hashes of evenly spaced blocks, JSON-safe."""
    if num_blocks is None:
        # Each block from a device is a synchronizing copy.
        is_cheap = ids.seekable and ids.device.on_host
        num_blocks = NUM_BLOCKS if is_cheap else NUM_SLOW_BLOCKS
    if ids.size <= num_blocks * BLOCK_IDS:
        spans = [(0, ids.size)]
    else:
        last_start = ids.size - BLOCK_IDS
        starts = [last_start * i // (num_blocks - 1) for i in range(num_blocks)]
        spans = [(start, start + BLOCK_IDS) for start in starts]
    return {
        "size": ids.size,
        "dtype": ids.dtype,
        "modified": ids.modified,
        "blocks": num_blocks,
        "hashes": [_hash(ids.read(*span)) for span in spans],
        "names": None if ids.names is None else fingerprint.of_names(ids.names),
    }


def difference(saved: dict[str, Any], ids: PatchIds, *, all_compared: bool) -> str | None:
    """Return how ids differ from a saved signature, or None if they match.

    With ``all_compared``, ignore the modification time, because the caller compares all ids.
    """
    if saved["size"] != ids.size:
        return f"the index has {saved['size']} samples, the ids {ids.size}"
    if saved["dtype"] != ids.dtype:
        return f"the index has dtype {saved['dtype']}, the ids {ids.dtype}"
    current = signature_of(ids, saved["blocks"])
    if saved["names"] != current["names"]:
        return "the patch names differ"
    hashes = list(zip(saved["hashes"], current["hashes"], strict=True))
    for block, (saved_hash, current_hash) in enumerate(hashes):
        if saved_hash != current_hash:
            return f"values differ in block {block} of {len(hashes)} compared blocks"
    times = saved["modified"], current["modified"]
    if None not in times and times[0] != times[1] and not all_compared:
        return (
            f"the file's modification time is {_time(times[1])}, but was {_time(times[0])} when "
            "the index was built; PatchGroups.load(..., verify=True) compares all ids instead"
        )
    return None


def _hash(ids: Any) -> str:
    # Lazy import: takes milliseconds, and few programs need it.
    import hashlib

    data = np.ascontiguousarray(ids, dtype="<i8").tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _time(nanoseconds: int) -> str:
    return str(np.datetime64(nanoseconds, "ns"))
