"""Checks of index files: the fields of the header, and the tables, fit one another.

They take the time of reading the tables. Functions raise ValueError with a reason only; the caller
adds the name of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gpusampler.core.arrays import Int64
from gpusampler.core.text import short_repr
from gpusampler.groups.census import MAX_PATCH_SAMPLES
from gpusampler.groups.counting_sort import INT32_SAMPLES

REBUILD = "Delete it and rebuild it with PatchGroups.from_ids(path=...) or save."
_MAX_SAMPLES = 1 << 62
# Lowest value and exclusive limit of each integer of the header.
_INTEGERS = {
    "version": (1, 3),
    "num_patches": (1, _MAX_SAMPLES),
    "num_samples": (1, _MAX_SAMPLES),
    "source_size": (1, _MAX_SAMPLES),
    "order_bytes": (0, _MAX_SAMPLES),
    "tables_bytes": (0, _MAX_SAMPLES),
    "tables_crc": (0, 1 << 32),
    "fingerprint": (0, 1 << 64),
}
_FIELDS = {"order", "named", "signature", *_INTEGERS}
_SIGNATURE_FIELDS = {"size", "dtype", "modified", "blocks", "hashes", "names"}
_ORDER_DTYPES = (None, "<i4", "<i8")
_MAX_BLOCKS = 1 << 12


def check_head(head: dict[str, Any], block_ids: int) -> None:
    """Raise ValueError unless the header has all fields, of the right types, that fit together.

    ``block_ids`` is the number of ids in a block of the signature.
    """
    _check_fields(head, _FIELDS, "the header")
    for name, (low, high) in _INTEGERS.items():
        _check_int(head[name], name, low, high)
    _require(type(head["named"]) is bool, "named must be true or false", head["named"])
    patches, samples, source_size = (
        head[name] for name in ("num_patches", "num_samples", "source_size")
    )
    _require(patches <= samples, f"num_patches must be at most num_samples ({samples})", patches)
    _require(
        samples <= source_size, f"num_samples must be at most source_size ({source_size})", samples
    )
    order = head["order"]
    _require(
        order is None or (type(order) is str and order in _ORDER_DTYPES),
        f"order must be one of {_ORDER_DTYPES}",
        order,
    )
    width = 0 if order is None else np.dtype(order).itemsize
    _require(
        head["order_bytes"] == width * samples,
        f"order_bytes must be {width} for each of {samples} samples",
        head["order_bytes"],
    )
    _require(
        order != "<i4" or source_size <= INT32_SAMPLES,
        "source_size must be at most 2**31 for an order of '<i4'",
        source_size,
    )
    if head["signature"] is not None:
        _check_signature(head, block_ids)


def _check_signature(head: dict[str, Any], block_ids: int) -> None:
    signature = head["signature"]
    _check_fields(signature, _SIGNATURE_FIELDS, "signature")
    size, blocks, hashes = (signature[name] for name in ("size", "blocks", "hashes"))
    _check_int(size, "signature's size", 1, _MAX_SAMPLES)
    _require(
        size == head["source_size"] == head["num_samples"],
        "signature's size, num_samples and source_size must be equal",
        (size, head["num_samples"], head["source_size"]),
    )
    _require(type(signature["dtype"]) is str, "signature's dtype must be text", signature["dtype"])
    if signature["modified"] is not None:
        _check_int(signature["modified"], "signature's modified", -(1 << 63) + 1, 1 << 63)
    _check_int(blocks, "signature's blocks", 2, _MAX_BLOCKS)
    num_hashes = 1 if size <= blocks * block_ids else blocks
    _require(
        type(hashes) is list
        and len(hashes) == num_hashes
        and all(type(text) is str for text in hashes),
        f"signature's hashes must be {num_hashes} texts",
        hashes,
    )
    if signature["names"] is not None:
        _check_int(signature["names"], "signature's names", 0, 1 << 64)
    _require(
        (signature["names"] is not None) == head["named"],
        f"signature's names must be present if and only if named ({head['named']})",
        signature["names"],
    )


def check_tables(
    head: dict[str, Any],
    patch_ids: Int64,
    counts: Int64,
    starts: Int64,
    names: Sequence[Any] | None,
) -> None:
    """Raise ValueError unless the tables fit one another and the header, which is checked."""
    samples, source_size = head["num_samples"], head["source_size"]
    _require(
        bool((patch_ids[1:] > patch_ids[:-1]).all()),
        "patch_ids must ascend",
        patch_ids[:9].tolist(),
    )
    smallest, largest = int(counts.min()), int(counts.max())
    _require(
        smallest >= 1 and largest < MAX_PATCH_SAMPLES,
        "counts must be in 1 .. 2**31 - 1",
        smallest if smallest < 1 else largest,
    )
    # No overflow: a patch takes 24 bytes of the file.
    total = int(counts.sum())
    _require(total == samples, f"counts must add up to num_samples ({samples})", total)
    if head["order"] is not None:
        wrong = np.flatnonzero(starts != np.cumsum(counts) - counts)
        _require(
            wrong.size == 0,
            "starts must be the sums of the counts before them",
            starts[wrong[:1]].tolist(),
        )
    else:
        first, last = int(starts.min()), int(starts.max())
        is_inside = first >= 0 and last < source_size
        # Sums do not overflow. Sorted starts and ends show whether runs are disjoint.
        ends = np.sort(starts + counts) if is_inside else starts
        _require(
            is_inside and int(ends[-1]) <= source_size,
            f"runs must be in 0 .. {source_size - 1}",
            (first, last),
        )
        next_starts = np.sort(starts)[1:]
        overlaps = next_starts[next_starts < ends[:-1]]
        _require(overlaps.size == 0, "runs must not overlap", overlaps[:1].tolist())
    if names is not None:
        _check_names(names)
        first, last = int(patch_ids[0]), int(patch_ids[-1])
        _require(
            first >= 0 and last < len(names),
            f"patch_ids must be in 0 .. {len(names) - 1}, as indices of the names",
            first if first < 0 else last,
        )


def _check_names(names: Sequence[Any]) -> None:
    for name in names:
        is_key = type(name) is str or (
            type(name) is tuple and all(type(part) in (str, int, float, bool) for part in name)
        )
        _require(is_key, "names must be strings, or tuples of strings and numbers", name)
    try:
        ascend = all(first < second for first, second in pairwise(names))
    except TypeError:
        ascend = False
    _require(ascend, "names must be of one type and ascend", names[:9])


def _check_fields(value: Any, fields: set[str], name: str) -> None:
    _require(type(value) is dict, f"{name} must be a JSON object", value)
    _require(value.keys() == fields, f"{name} must have the fields {sorted(fields)}", list(value))


def _check_int(value: Any, name: str, low: int, high: int) -> None:
    # JSON's true and false are integers in Python.
    _require(
        type(value) is int and low <= value < high, f"{name} must be in {low} .. {high - 1}", value
    )


def _require(condition: bool, rule: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{rule}, got {short_repr(value)}")
