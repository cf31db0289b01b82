"""Grouping into a file: one process at a time, gone on with where the last one was killed."""

from __future__ import annotations

import contextlib
import errno
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

from gpusampler.core.log import logger, warn
from gpusampler.groups import index_format
from gpusampler.groups.census import StateArrays
from gpusampler.groups.counting_sort import IdsChanged, group_on_host
from gpusampler.groups.index_format import (
    ORDER_OFFSET,
    IndexContents,
    explain_full_disk,
    reserve,
    sync_file,
)
from gpusampler.groups.verification import difference, fingerprint_ids, signature_of
from gpusampler.sources.base import PatchIds

if TYPE_CHECKING:
    from filelock import BaseFileLock

CHECKPOINT_SECONDS = 5.0
"""Work that is lost at most when a process is killed; more where keeping it takes long."""

CHECKPOINT_SHARE = 0.1
"""Of all time, for keeping what was done."""

TOKEN_OFFSET, TOKEN_BYTES = len(index_format.MAGIC), 16
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def build(ids: PatchIds, path: Path, *, progress: bool) -> None:
    """Group ids into an index at a path, unless it is there.

    Where several processes do so at a time (the ranks of a node), one works and the others wait.

    Raises
    ------
    ValueError
        If there is an index of other ids, or another file.
    OSError
        If there is no room or no permission. What was done is kept, and so is what was there.
    RuntimeError
        If the ids changed meanwhile.
    """
    if _is_built(ids, path, progress):
        IndexBuild(ids, path).tidy()
        return
    with explain_full_disk(path), IndexBuild(ids, path) as index_build:
        # Another process may have built it while this one waited.
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
        "ids nobody knows" if signature is None else difference(signature, ids, all_compared=False)
    )
    has_times = None not in (ids.modified, signature and signature["modified"])
    # Without a file's time to go by, blocks alone would let a change between them pass.
    if differs is None and (
        has_times or fingerprint_ids(ids, progress=progress) == head["fingerprint"]
    ):
        return True
    differs = differs or "other ids"
    raise ValueError(
        f"path must be free or hold an index of these ids, got one of {differs} in {path}; "
        "delete it if it is of no more use"
    )


class IndexBuild:
    """The work on an index, in files beside it: ``.lock``, ``.partial`` and ``.progress``.

    Parameters
    ----------
    ids : PatchIds
    path : Path
        Where the index is to be.
    """

    _lock: BaseFileLock
    _file: BinaryIO

    def __init__(self, ids: PatchIds, path: Path) -> None:
        self._ids = ids
        self._path = path
        self._lock_path = path.with_name(f"{path.name}.lock")
        self._partial = path.with_name(f"{path.name}.partial")
        self._progress = path.with_name(f"{path.name}.progress")
        self._new_progress = path.with_name(f"{path.name}.progress.saving")
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
        """Let others go on; what is not finished stays, to be gone on with."""
        try:
            if isinstance(error, IdsChanged):
                # Gone on with, it would find the same again.
                self._progress.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if self._partial.stat().st_size == 0 and not self._progress.exists():
                    self._partial.unlink()
            # Removed before it is released: a process that has just opened it then sees that it is
            # gone, and makes a new one. On Windows releasing it removes it.
            with contextlib.suppress(OSError):
                self._lock_path.unlink()
        finally:
            self._lock.release()

    def saved_state(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the state that was kept last, if it is of these ids."""
        try:
            content = self._progress.read_bytes()
        except FileNotFoundError:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                state: StateArrays = dict(archive)
            signature, token = json.loads(str(state["signature"])), state["token"].tobytes()
            # A damaged list of the archive's arrays may end early.
            _ = state["run_starts" if "run_ids" in state else "counts"]
            _ = state["cursor" if "written" in state else "seen"]
        # What a damaged archive raises depends on the byte that is damaged.
        except Exception as error:
            warn(f"{self._progress} cannot be read, so grouping begins anew: {error}")
            return None
        if signature != self._signature:
            warn(f"{self._progress} is of other ids, so grouping begins anew")
            return None
        if "written" in state:
            # An order of another start may be as long, and written in other places.
            file_size = os.fstat(self._file.fileno()).st_size
            is_long_enough = file_size >= ORDER_OFFSET + int(state["order_bytes"])
            self._file.seek(0)
            first_bytes = self._file.read(TOKEN_OFFSET + TOKEN_BYTES)
            # A head in the token's place: all was written, but for the name.
            if is_long_enough and (
                first_bytes.startswith(index_format.MAGIC) or first_bytes[TOKEN_OFFSET:] == token
            ):
                self._token = token
            else:
                warn(
                    f"{self._partial} is not the file that {self._progress} is about, so sorting "
                    "begins anew"
                )
                del state["written"]
        step, key = ("sorted", "written") if "written" in state else ("counted", "seen")
        logger.info(
            "%s: going on after %d of %d samples %s", self._path, state[key], self._ids.size, step
        )
        return state

    def checkpoint(self, state: Callable[[], StateArrays], is_last: bool) -> None:
        """Keep the state, if it is time to or the last one, with all written to the order."""
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
            try:
                with open(self._new_progress, "wb") as file:
                    np.savez(file, **archive)
                    sync_file(file)
                os.replace(self._new_progress, self._progress)
            except BaseException:
                self._new_progress.unlink(missing_ok=True)
                raise
        end = time.monotonic()
        self._next_checkpoint = end + max(CHECKPOINT_SECONDS, (end - start) / CHECKPOINT_SHARE)

    def allocate_order(self, size: int, dtype: Any) -> NDArray[Any]:
        """Return the order in the file that is written aside, its room on the disk taken."""
        file_size = ORDER_OFFSET + np.dtype(dtype).itemsize * size
        reserve(self._file, file_size, self._path)
        self._map = mmap.mmap(self._file.fileno(), file_size)
        # It may have been all but whole when it was left.
        self._map[:TOKEN_OFFSET] = bytes(TOKEN_OFFSET)
        self._token = self._token or os.urandom(TOKEN_BYTES)
        self._map[TOKEN_OFFSET : TOKEN_OFFSET + TOKEN_BYTES] = self._token
        # Before anything else is written over what another start may have left.
        self._flush_order(self._map)
        return np.frombuffer(self._map, dtype, size, ORDER_OFFSET)

    def _flush_order(self, order_map: mmap.mmap) -> None:
        order_map.flush()
        os.fsync(self._file.fileno())

    def run(self, progress: bool) -> None:
        """Group the ids and make the index of what was written."""
        # Not cut off: a killed process may have left it.
        self._partial.touch()
        with open(self._partial, "r+b") as self._file:
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
            )
            dtype = None if grouping.order is None else grouping.order.dtype.str
            if self._map is not None:
                self._map.flush()
            # Windows renames no file that is mapped or open.
            del grouping
            self._map = None
            index_format.write_tables_and_head(self._file, contents, dtype, self._path)
        index_format.rename(self._partial, self._path)
        self._remove_progress()
        patches = contents.counts.size
        logger.info("%s: %d patches of %d samples", self._path, patches, self._ids.size)

    def discard(self) -> None:
        """Leave nothing behind: another process has made the index."""
        self._partial.unlink(missing_ok=True)
        self._remove_progress()

    def tidy(self) -> None:
        """Take away what a process left behind that was killed just after it was done."""
        if not self._partial.exists():
            # Not worth an error in a folder that is only to be read.
            with contextlib.suppress(OSError):
                self._remove_progress()
                self._lock_path.unlink(missing_ok=True)

    def _remove_progress(self) -> None:
        self._progress.unlink(missing_ok=True)
        self._new_progress.unlink(missing_ok=True)

    def _acquire_lock(self) -> BaseFileLock:
        """Return the lock, once this process alone has it."""
        # Imported where it is needed: only who builds an index waits for it.
        from filelock import FileLock, Timeout

        # What filelock falls back to would outlive a process that is killed.
        lock = FileLock(self._lock_path, fallback_to_soft=False)
        try:
            try:
                lock.acquire(blocking=False)
            except Timeout:
                logger.info("%s: waiting for the process that builds it", self._path)
                lock.acquire()
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise OSError(
                error.errno,
                f"path must be on a filesystem that has locks, got {self._path}: "
                f"{os.strerror(error.errno)}; group elsewhere and copy the index, or use save",
            ) from error
        return lock
