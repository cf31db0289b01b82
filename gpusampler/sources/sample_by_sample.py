"""Patch ids read sample by sample from a dataset, by a thread pool if it is large."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from gpusampler.core import arrays
from gpusampler.core.progress_bar import ProgressBar
from gpusampler.sources.base import PatchIds
from gpusampler.sources.checks import check_key, check_no_plain_enum, is_key
from gpusampler.sources.in_memory import ArrayIds
from gpusampler.sources.strings import CategoricalIds

THREAD_POOL_ABOVE = 1000
"""Number of samples above which a thread pool reads a dataset, with a progress bar."""


def sample_by_sample_ids(dataset: Any, size: int, progress: bool, advice: str = "") -> PatchIds:
    """Return ``dataset[i]["patch_id"]`` for every i; each sample is read once.

    ``advice`` ends the error for a sample without a ``"patch_id"``.
    """
    ids = np.empty(size, np.int64)
    labels: dict[Any, int] = {}
    label_lock = threading.Lock()
    has_names = False
    first_read = threading.Event()
    stopped = threading.Event()

    def read_id(i: int) -> int:
        """Return the id or label index of a sample; sample 0 decides between integers and names."""
        nonlocal has_names
        value = _value_of_sample(dataset, i, advice)
        name = _name_or_none(value, i)
        if i == 0:
            has_names = name is not None
            first_read.set()
        first_read.wait()
        if not has_names:
            return _check_id(value, i)
        if name is None:
            raise TypeError(f"patch_id must be a name, as in sample 0, got {value!r} in sample {i}")
        code = labels.get(name)
        if code is None:
            with label_lock:
                code = labels.setdefault(name, len(labels))
        return code

    def read(samples: range) -> int:
        for i in samples:
            if stopped.is_set():
                break
            ids[i] = read_id(i)
        return len(samples)

    def result() -> PatchIds:
        return CategoricalIds(ids, list(labels)) if has_names else ArrayIds(ids)

    if size <= THREAD_POOL_ABOVE:
        read(range(size))
        return result()
    workers = min(32, (os.cpu_count() or 1) + 4)
    step = max(1, min(256, size // (workers * 8)))
    chunks = [range(first, min(first + step, size)) for first in range(0, size, step)]
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gpusampler-ids")
    try:
        with ProgressBar(size, "patch ids", "samples", progress) as bar:
            for count in _bounded_map(pool, read, chunks, 2 * workers):
                bar.update(count)
    finally:
        # After an exception or Ctrl-C, stop reading and end all threads.
        stopped.set()
        # Release threads that still wait for sample 0 if reading it failed.
        first_read.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return result()


def _bounded_map(
    pool: ThreadPoolExecutor, function: Any, chunks: Sequence[range], max_pending: int
) -> Iterable[int]:
    """Yield results in order of completion, with at most ``max_pending`` submitted chunks."""
    pending: set[Future[int]] = set()
    for chunk in chunks:
        pending.add(pool.submit(function, chunk))
        if len(pending) >= max_pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    while pending:
        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in finished)


def id_of_sample(dataset: Any, i: int, advice: str, *, batched: bool) -> Any:
    """Return the ``"patch_id"`` of a sample, an int, a str or another key.

    If ``batched``, the sample is read by ``dataset.__getitems__``, as a DataLoader does.
    """
    value = _value_of_sample(dataset, i, advice, batched=batched)
    name = _name_or_none(value, i)
    return _check_id(value, i) if name is None else name


def _value_of_sample(dataset: Any, i: int, advice: str, *, batched: bool = False) -> Any:
    try:
        sample = dataset.__getitems__([i])[0] if batched else dataset[i]
    except Exception as error:
        raise RuntimeError(f"Cannot read patch ids: sample {i} raised {error!r}") from error
    try:
        return sample["patch_id"]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise TypeError(
            "source must have get_all_patch_ids(), patch_ids or samples with a 'patch_id', "
            f"got a {type(sample).__name__} without one as sample {i} of {type(dataset).__name__}"
            f"{advice}"
        ) from error


def _name_or_none(value: Any, i: int) -> Any:
    """Return a str, a one-element string array as a str, or another key; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "UT" and value.size == 1:
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    check_no_plain_enum(value, "patch_id")
    return check_key(value, i) if is_key(value) and not isinstance(value, bytes) else None


def _check_id(value: Any, i: int) -> int:
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"patch_id must fit in int64, got {value} in sample {i}")
    array = np.asarray(arrays.to_numpy(value) if arrays.library_of(value) else value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"patch_id must be an int, got {value!r} in sample {i}")
    if int(array.item()) >= 1 << 63:
        raise ValueError(f"patch_id must fit in int64, got {value!r} in sample {i}")
    return int(array.item())
