"""ReadAhead: reads the rows of many batches from files, in a thread that is a window ahead."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpusampler.core.arrays import Int64
from gpusampler.core.tracing import Range
from gpusampler.core.transfer import Prefetcher
from gpusampler.plan.evaluators.base import RaggedBlock
from gpusampler.sampler.file_rows import FileRows

READ_AHEAD_BYTES = 1 << 27
"""Default of the most bytes of rows in memory: one window in use, one that is read meanwhile."""
INDEX_BYTES = 32
"""Bytes that a sample takes in a window beside its row."""

RowIndex = tuple[Any, Int64]
"""An array on the host, and the indices of the rows that are wanted of it."""


class Chunks(Protocol):
    """Source of consecutive batches, several at a time."""

    def read(self) -> RaggedBlock | None:
        """Return the next batches; None after the last."""


class Window(NamedTuple):
    """Chunks whose rows are read together.

    The result of ``rows`` is the distinct rows of each array, and for each sample of all chunks the
    index of its row.
    """

    chunks: list[RaggedBlock]
    rows: Future[tuple[dict[str, Any], Int64]]


def rows_within(max_bytes: int, files: Mapping[str, FileRows]) -> int:
    """Return how many samples have rows of ``max_bytes`` in all files, at least one."""
    return max(1, max_bytes // (INDEX_BYTES + sum(file.row_bytes for file in files.values())))


class ReadAhead:
    """Chunks with their rows of arrays in files.

    The rows of a window of many chunks are read at once, ascending, and one window is read while
    the window before is in use. The first window is one chunk, so that the first batch comes soon.
    The thread ends when all windows are read, or when this object is closed or freed.

    A window has at most ``max_rows`` samples, but at least one chunk. ``wait_range`` records the
    time that the caller waits for rows.
    """

    def __init__(
        self, files: Mapping[str, FileRows], chunks: Chunks, max_rows: int, wait_range: Range
    ) -> None:
        self._files = files
        self._chunks = chunks
        self._wait_range = wait_range
        self._max_rows = max_rows
        self._window_rows = 0
        self._next_chunk: RaggedBlock | None = None
        self._prefetcher: Prefetcher[Window] = Prefetcher()
        self._waiting: list[RaggedBlock] = []
        self._rows: dict[str, Any] = {}
        self._index = np.zeros(0, np.int64)
        self._pid = os.getpid()
        self._stop = Event()
        # One thread: HDF5 has a global lock. The interpreter joins it at exit.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gpusampler-rows")
        # As in `close`. A finalizer, unlike `__del__`, needs no attribute of a half-made object.
        weakref.finalize(self, self._stop.set)
        weakref.finalize(self, self._executor.shutdown, wait=False, cancel_futures=True)

    def read(self) -> tuple[RaggedBlock, dict[str, RowIndex]] | None:
        """Return the next chunk, and where the rows of each array are; None after the last.

        Errors of the thread are raised here.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(
                "an iterator that reads rows from files cannot continue in a forked process: make "
                "the loader and its iterator in the process that uses them"
            )
        if not self._waiting:
            # Not to be in memory beside two others.
            self._rows = {}
            window = self._prefetcher.get_next(self._start)
            if window is None:
                return None
            try:
                with self._wait_range:
                    self._rows, self._index = window.rows.result()
            except BaseException:
                # The traceback would keep this object, and so the thread.
                self.close()
                raise
            self._waiting = window.chunks[::-1]
        chunk = self._waiting.pop()
        size = chunk.samples.size
        index, self._index = self._index[:size], self._index[size:]
        return chunk, {name: (rows, index) for name, rows in self._rows.items()}

    def _start(self) -> Window | None:
        """Begin to read a window; None after the last."""
        chunks: list[RaggedBlock] = []
        num_rows = 0
        while chunk := self._next_chunk or self._chunks.read():
            self._next_chunk = chunk
            num_rows += chunk.samples.size
            if chunks and num_rows > self._window_rows:
                break
            chunks.append(chunk)
            self._next_chunk = None
        self._window_rows = self._max_rows
        if not chunks:
            self._executor.shutdown(wait=False)
            return None
        samples = np.concatenate([chunk.samples for chunk in chunks])
        return Window(chunks, self._executor.submit(_read_rows, self._files, samples, self._stop))

    def close(self) -> None:
        """End the thread, after the call to a library that it is in; do not wait for it."""
        self._stop.set()
        self._executor.shutdown(wait=False, cancel_futures=True)


def _read_rows(
    files: Mapping[str, FileRows], samples: Int64, stop: Event
) -> tuple[dict[str, Any], Int64]:
    """Read the rows of samples of all files. It must not refer to the reader, which is freed."""
    rows, index = np.unique(samples, return_inverse=True)
    return {name: file.read(rows, stop) for name, file in files.items()}, index
