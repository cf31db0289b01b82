"""Patch ids asked sample by sample, on a pool of threads where there are many."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from gpusampler.core import arrays
from gpusampler.core.progress_bar import Bar
from gpusampler.sources.base import PatchIds
from gpusampler.sources.in_memory import ArrayIds
from gpusampler.sources.strings import CodedIds

THREADED_ABOVE = 1000
"""Samples above which a dataset is read by a pool of threads, with a progress bar."""


def ask_samples(dataset: Any, size: int, progress: bool) -> PatchIds:
    """Return ``dataset[i]["patch_id"]`` for every i, each asked for once.

    Raises
    ------
    TypeError, ValueError
        If a sample has no patch id, or one that does not fit, or some are names and some integers.
    RuntimeError
        If a sample cannot be read; the text names it.
    """
    ids = np.empty(size, np.int64)
    labels: dict[str, int] = {}
    adding = threading.Lock()
    named = False
    first_known = threading.Event()
    stopped = threading.Event()

    def kept(i: int) -> int:
        """Return what stands for the id of a sample in ``ids``; sample 0 says of which kind."""
        nonlocal named
        value = _value_of_sample(dataset, i)
        name = _name_in(value)
        if i == 0:
            named = name is not None
            first_known.set()
        first_known.wait()
        if not named:
            return _checked_id(value, i)
        if name is None:
            raise TypeError(f"patch_id must be a str, as in sample 0, got {value!r} in sample {i}")
        code = labels.get(name)
        if code is None:
            with adding:
                code = labels.setdefault(name, len(labels))
        return code

    def read(part: range) -> int:
        for i in part:
            if stopped.is_set():
                break
            ids[i] = kept(i)
        return len(part)

    def found() -> PatchIds:
        return CodedIds(ids, list(labels)) if named else ArrayIds(ids)

    if size <= THREADED_ABOVE:
        read(range(size))
        return found()
    workers = min(32, (os.cpu_count() or 1) + 4)
    step = max(1, min(256, size // (workers * 8)))
    parts = [range(first, min(first + step, size)) for first in range(0, size, step)]
    pool = ThreadPoolExecutor(workers, thread_name_prefix="gpusampler-ids")
    try:
        with Bar(size, "patch ids", "samples", progress) as shown:
            for done in _in_flight(pool, read, parts, 2 * workers):
                shown.update(done)
    finally:
        # After an exception or Ctrl-C no further sample is begun, and no thread stays behind.
        stopped.set()
        # Where sample 0 could not be read, none may wait for it for ever.
        first_known.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return found()


def _in_flight(
    pool: ThreadPoolExecutor, call: Any, parts: Sequence[range], most: int
) -> Iterable[int]:
    """Yield each part's result as it comes, with a bounded number of parts submitted."""
    waiting: set[Future[int]] = set()
    for part in parts:
        waiting.add(pool.submit(call, part))
        if len(waiting) >= most:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from (future.result() for future in done)


def _value_of_sample(dataset: Any, i: int) -> Any:
    try:
        sample = dataset[i]
    except Exception as error:
        raise RuntimeError(f"source must give every sample: sample {i} raised {error!r}") from error
    try:
        return sample["patch_id"]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise TypeError(
            "source must have get_all_patch_ids(), patch_ids or samples with a 'patch_id', "
            f"got a {type(sample).__name__} without one as sample {i} of {type(dataset).__name__}"
        ) from error


def _name_in(value: Any) -> str | None:
    """Return a str, or the one in an array of one element, as a str; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "UT" and value.size == 1:
        value = value.item()
    return str(value) if isinstance(value, str) else None


def _checked_id(value: Any, i: int) -> int:
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"patch_id must fit in int64, got {value} in sample {i}")
    array = np.asarray(arrays.to_numpy(value) if arrays.library_of(value) else value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise TypeError(f"patch_id must be an int, got {value!r} in sample {i}")
    if int(array.item()) >= 1 << 63:
        raise ValueError(f"patch_id must fit in int64, got {value!r} in sample {i}")
    return int(array.item())
