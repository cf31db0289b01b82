"""Group ids into an index file: one process at a time, resumable after a crash."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import mmap
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import files
from gpusampler.core.log import logger, warn
from gpusampler.groups import index_format
from gpusampler.groups.census import StateArrays
from gpusampler.groups.counting_sort import IdsChanged, group_on_host
from gpusampler.groups.index_format import (
    ORDER_OFFSET,
    IndexContents,
    explain_full_disk,
    reserve,
)
from gpusampler.groups.verification import difference, fingerprint_ids, signature_of
from gpusampler.groups.verified_order import block_sums
from gpusampler.sources.base import PatchIds

if TYPE_CHECKING:
    from filelock import BaseFileLock

CHECKPOINT_SECONDS = 5.0
"""Minimum seconds between checkpoints; about as much work is lost if the process is killed."""

CHECKPOINT_SHARE = 0.1
"""Maximum fraction of the time spent on checkpoints: slow disks get fewer of them."""

TOKEN_OFFSET, TOKEN_BYTES = len(index_format.MAGIC), 16
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def build(ids: PatchIds, path: Path, *, progress: bool) -> None:
    """Group ids into an index file, unless ``path`` is an index of these ids already.

    If several processes (the ranks of a node) call this, one works and the others wait. After an
    OSError, checkpoints remain for the next call and existing files are unchanged.
    """
    if ids.names is not None:
        # Checked now, not after hours of sorting.
        index_format.encode_names(ids.names)
    if _is_built(ids, path, progress):
        IndexBuild(ids, path).tidy()
        return
    with explain_full_disk(path), IndexBuild(ids, path) as index_build:
        # Another process may have built the index while this one waited.
        if _is_built(ids, path, progress):
            index_build.discard()
        else:
            index_build.run(progress)


def _is_built(ids: PatchIds, path: Path, progress: bool) -> bool:
    if not path.exists():
        return False
    head = index_format.read_head(path)
    signature = head["signature"]
    differs = (
        "the index does not record its source"
        if signature is None
        else difference(signature, ids, all_compared=False)
    )
    has_times = None not in (ids.modified, signature and signature["modified"])
    # Without modification times, sampled blocks would miss changes between them.
    if differs is None and (
        has_times or fingerprint_ids(ids, progress=progress) == head["fingerprint"]
    ):
        return True
    differs = differs or "fingerprints differ"
    raise ValueError(
        f"{path} indexes different ids ({differs}). Choose another path, or delete this file to "
        "rebuild the index."
    )


class IndexBuild:
    """Builds the index at ``path`` with three files beside it.

    ``.lock`` excludes other processes, ``.partial`` is the unfinished index and ``.progress`` the
    checkpoint.
    """

    _lock: BaseFileLock
    _file: BinaryIO

    def __init__(self, ids: PatchIds, path: Path) -> None:
        self._ids = ids
        self._path = path
        self._lock_path = path.with_name(f"{path.name}.lock")
        self._partial = path.with_name(f"{path.name}.partial")
        self._progress = path.with_name(f"{path.name}.progress")
        self._signature: dict[str, Any] = {}
        self._map: mmap.mmap | None = None
        self._token = b""
        self._next_checkpoint = 0.0

    def __enter__(self) -> IndexBuild:
        """Wait until no other process builds this index."""
        self._signature = signature_of(self._ids)
        self._lock = self._acquire_lock()
        self._next_checkpoint = time.monotonic() + CHECKPOINT_SECONDS
        return self

    def __exit__(self, exc_type: type | None, error: object, traceback: object) -> None:
        """Release the lock; unfinished files stay for the next process."""
        try:
            if isinstance(error, IdsChanged):
                # Resuming from this checkpoint would fail again.
                self._progress.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if self._partial.lstat().st_size == 0 and not self._progress.exists():
                    self._partial.unlink()
            # Removed before it is released: a process that has just opened the lock file notices
            # and creates a new one. On Windows, releasing the lock removes the file.
            with contextlib.suppress(OSError):
                self._lock_path.unlink()
        finally:
            self._lock.release()

    def saved_state(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the last checkpoint if it belongs to these ids, else None."""
        try:
            with files.open_own(self._progress) as file:
                content = file.read()
        except FileNotFoundError:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                state: StateArrays = dict(archive)
            signature, token = json.loads(str(state["signature"])), state["token"].tobytes()
            # A damaged archive may lack arrays.
            _ = state["run_starts" if "run_ids" in state else "counts"]
            _ = state["cursor" if "written" in state else "seen"]
        # A damaged archive can raise any exception.
        except Exception as error:
            warn(
                f"cannot read checkpoint {self._progress}; grouping restarts from the beginning "
                f"(no action needed): {error}"
            )
            return None
        if signature != self._signature:
            warn(
                f"checkpoint {self._progress} belongs to different ids; grouping restarts from the "
                "beginning (no action needed)"
            )
            return None
        if "written" in state:
            # The partial file may come from a different run, with different samples written.
            file_size = os.fstat(self._file.fileno()).st_size
            is_long_enough = file_size >= ORDER_OFFSET + int(state["order_bytes"])
            self._file.seek(0)
            first_bytes = self._file.read(TOKEN_OFFSET + TOKEN_BYTES)
            # A header in place of the token: the file is complete but not renamed.
            if is_long_enough and (
                first_bytes.startswith(index_format.MAGIC) or first_bytes[TOKEN_OFFSET:] == token
            ):
                self._token = token
            else:
                warn(
                    f"checkpoint {self._progress} does not match {self._partial}; sorting restarts "
                    "from the beginning (no action needed)"
                )
                del state["written"]
        step, key = ("sorted", "written") if "written" in state else ("counted", "seen")
        logger.info(
            "%s: resuming after %d of %d samples %s", self._path, state[key], self._ids.size, step
        )
        return state

    def checkpoint(self, state: Callable[[], StateArrays], is_last: bool) -> None:
        """Save the state and flush the order if a checkpoint is due or ``is_last`` is true."""
        start = time.monotonic()
        if not is_last and start < self._next_checkpoint:
            return
        order_bytes = 0
        if self._map is not None:
            self._flush_order(self._map)
            order_bytes = len(self._map) - ORDER_OFFSET
        archive: dict[str, Any] = {
            "signature": np.array(json.dumps(self._signature)),
            "token": np.frombuffer(self._token, np.uint8),
            "order_bytes": np.array(order_bytes),
            **state(),
        }
        with explain_full_disk(self._progress, sum(array.nbytes for array in archive.values())):
            temporary, new_file = files.open_temporary(self._progress)
            try:
                with new_file as file:
                    np.savez(file, **archive)
                    files.sync_file(file)
                os.replace(temporary, self._progress)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        end = time.monotonic()
        self._next_checkpoint = end + max(CHECKPOINT_SECONDS, (end - start) / CHECKPOINT_SHARE)

    def allocate_order(self, size: int, dtype: Any) -> NDArray[Any]:
        """Return the order, mapped from the partial file with its disk space reserved."""
        file_size = ORDER_OFFSET + np.dtype(dtype).itemsize * size
        reserve(self._file, file_size, self._path)
        self._map = mmap.mmap(self._file.fileno(), file_size)
        # The partial file may have a header already, if it was complete but not renamed.
        self._map[:TOKEN_OFFSET] = bytes(TOKEN_OFFSET)
        self._token = self._token or os.urandom(TOKEN_BYTES)
        self._map[TOKEN_OFFSET : TOKEN_OFFSET + TOKEN_BYTES] = self._token
        # The token must reach the disk before samples overwrite those of an earlier run.
        self._flush_order(self._map)
        return np.frombuffer(self._map, dtype, size, ORDER_OFFSET)

    def _flush_order(self, order_map: mmap.mmap) -> None:
        order_map.flush()
        os.fsync(self._file.fileno())

    def run(self, progress: bool) -> None:
        """Group the ids, finish the index and rename it."""
        # Not truncated: it may be the partial file of a killed process of this user.
        with files.open_own(self._partial, create=True) as self._file:
            grouping = group_on_host(self._ids, self, progress=progress)
            if difference(self._signature, self._ids, all_compared=False) is not None:
                raise IdsChanged
            contents = IndexContents(
                grouping.patch_ids,
                grouping.counts,
                grouping.starts,
                self._ids.names,
                source_size=self._ids.size,
                fingerprint=grouping.fingerprint,
                signature=self._signature,
                order_sums=block_sums(grouping.order),
            )
            dtype = None if grouping.order is None else grouping.order.dtype.str
            if self._map is not None:
                self._map.flush()
            # Windows cannot rename a mapped or open file.
            del grouping
            self._map = None
            index_format.write_tables_and_head(self._file, contents, dtype, self._path)
        files.replace(self._partial, self._path)
        self._remove_progress()
        patches = contents.counts.size
        logger.info("%s: %d patches, %d samples", self._path, patches, self._ids.size)

    def discard(self) -> None:
        """Remove the working files, because another process has built the index."""
        self._partial.unlink(missing_ok=True)
        self._remove_progress()

    def tidy(self) -> None:
        """Remove the working files of a process that was killed just after it built the index."""
        if not self._partial.exists():
            # Not worth an error in a read-only folder.
            with contextlib.suppress(OSError):
                self._remove_progress()
                self._lock_path.unlink(missing_ok=True)

    def _remove_progress(self) -> None:
        self._progress.unlink(missing_ok=True)
        for temporary in self._path.parent.glob(f"{glob.escape(self._progress.name)}.*.saving"):
            # A process that was killed during a checkpoint left it; if it stays, it does no harm.
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _acquire_lock(self) -> BaseFileLock:
        """Wait for the lock of this index, and return it."""
        # Lazy import: only needed to build an index.
        from filelock import FileLock, Timeout

        # The soft lock that filelock falls back to would outlive a killed process.
        lock = FileLock(self._lock_path, fallback_to_soft=False)
        # The lock empties the file at its path.
        with contextlib.suppress(FileNotFoundError):
            files.check_single_name(self._lock_path)
        try:
            try:
                lock.acquire(blocking=False)
            except Timeout:
                logger.info("%s: waiting while another process builds it", self._path)
                lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise OSError(
                error.errno,
                f"cannot lock {self._path}: its filesystem does not support file locks "
                f"({os.strerror(error.errno)}). Build the index on another filesystem and copy it "
                "here, or call PatchGroups.from_ids without path and then save.",
            ) from error
        return lock
