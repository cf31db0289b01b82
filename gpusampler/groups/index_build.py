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
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.log import logger, warn
from gpusampler.groups import index_format
from gpusampler.groups.census import Counted, State
from gpusampler.groups.counting_sort import Grouped, IdsChanged, group_on_host
from gpusampler.groups.index_format import ORDER_AT, Contents, reserve, to_disk, told_of_room
from gpusampler.groups.verification import difference, mark_of, signature_of
from gpusampler.sources.base import PatchIds

try:
    import fcntl
except ImportError:  # Windows has no such locks: there only one process may build an index.
    fcntl = None  # type: ignore[assignment]

CHECKPOINT_SECONDS = 5.0
"""Work that is lost at most when a process is killed; more where keeping it takes long."""

CHECKPOINT_SHARE = 0.1
"""Of all time, for keeping what was done."""

TOKEN_AT, TOKEN_BYTES = len(index_format.MAGIC), 16
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
    if _is_there(ids, path, progress):
        Build(ids, path).tidy()
        return
    with told_of_room(path), Build(ids, path) as work:
        # Another process may have built it while this one waited.
        if _is_there(ids, path, progress):
            work.discard()
            return
        work.finish(group_on_host(ids, work, progress=progress))


def _is_there(ids: PatchIds, path: Path, progress: bool) -> bool:
    if not path.exists():
        return False
    head = index_format.read_head(path)
    saved = head["signature"]
    differs = "ids nobody knows" if saved is None else difference(saved, ids, whole=False)
    if differs is None and None in (ids.modified, saved and saved["modified"]):
        # Without a file's time to go by, blocks alone would let a change between them pass.
        same = mark_of(ids, progress=progress) == head["fingerprint"]
        differs = None if same else "other ids"
    if differs is None:
        return True
    raise ValueError(
        f"path must be free or hold an index of these ids, got one of {differs} in {path}; "
        "delete it if it is of no more use"
    )


class Build:
    """The work on an index, in two files beside it: ``.partial`` and ``.progress``.

    Parameters
    ----------
    ids : PatchIds
    path : Path
        Where the index is to be.
    """

    def __init__(self, ids: PatchIds, path: Path) -> None:
        self._ids = ids
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._progress = path.with_name(f"{path.name}.progress")
        self._aside = path.with_name(f"{path.name}.progress.saving")
        self._signature: dict[str, Any] = {}
        self._map: mmap.mmap | None = None
        self._token = b""
        self._next = 0.0

    def __enter__(self) -> Build:
        """Wait until no other process builds this index."""
        self._signature = signature_of(self._ids)
        self._file = self._locked()
        self._next = time.monotonic() + CHECKPOINT_SECONDS
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        """Let others go on; what is not finished stays, to be gone on with."""
        self._map = None
        if self._file.closed:
            return
        if isinstance(error, IdsChanged):
            # Gone on with, it would find the same again.
            self._progress.unlink(missing_ok=True)
        empty = os.fstat(self._file.fileno()).st_size == 0 and self._is_partial(self._file)
        if fcntl is None:
            self._file.close()
        if empty and not self._progress.exists():
            self._partial.unlink(missing_ok=True)
        if fcntl is not None:
            # Said, for an array that is still about would keep the file, and the lock with it.
            fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()

    def resumed(self) -> Mapping[str, NDArray[Any]] | None:
        """Return the state that was kept last, if it is of these ids."""
        try:
            content = self._progress.read_bytes()
        except FileNotFoundError:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as kept:
                state: State = dict(kept)
            signature, token = json.loads(str(state["signature"])), state["token"].tobytes()
        # What a damaged archive raises depends on the byte that is damaged.
        except Exception as error:
            warn(f"{self._progress} cannot be read, so grouping begins anew: {error}")
            return None
        if signature != self._signature:
            warn(f"{self._progress} is of other ids, so grouping begins anew")
            return None
        if "written" in state:
            # An order of another start may be as long, and written in other places.
            whole = os.fstat(self._file.fileno()).st_size >= ORDER_AT + int(state["order_bytes"])
            self._file.seek(0)
            begin = self._file.read(TOKEN_AT + TOKEN_BYTES)
            # A head in the token's place: all was written, but for the name.
            if whole and (begin.startswith(index_format.MAGIC) or begin[TOKEN_AT:] == token):
                self._token = token
            else:
                warn(
                    f"{self._partial} is not the file that {self._progress} is about, so sorting "
                    "begins anew"
                )
                del state["written"]
        done, at = ("sorted", "written") if "written" in state else ("counted", "seen")
        logger.info(
            "%s: going on after %d of %d samples %s", self._path, state[at], self._ids.size, done
        )
        return state

    def checkpoint(self, state: Callable[[], State], now: bool) -> None:
        """Keep the state, now or if it is time to, with all that was written to the order."""
        start = time.monotonic()
        if not now and start < self._next:
            return
        if self._map is not None:
            self._map.flush()
            os.fsync(self._file.fileno())
        order_bytes = 0 if self._map is None else len(self._map) - ORDER_AT
        kept: dict[str, Any] = {
            "signature": np.array(json.dumps(self._signature)),
            "token": np.frombuffer(self._token, np.uint8),
            "order_bytes": np.array(order_bytes),
            **state(),
        }
        with told_of_room(self._progress, sum(part.nbytes for part in kept.values())):
            try:
                with open(self._aside, "wb") as file:
                    np.savez(file, **kept)
                    to_disk(file)
                os.replace(self._aside, self._progress)
            except BaseException:
                self._aside.unlink(missing_ok=True)
                raise
        end = time.monotonic()
        self._next = end + max(CHECKPOINT_SECONDS, (end - start) / CHECKPOINT_SHARE)

    def order(self, counted: Counted, size: int, dtype: Any) -> NDArray[Any]:
        """Return the order in the file that is written aside, its room on the disk taken."""
        width = np.dtype(dtype).itemsize
        reserve(self._file, ORDER_AT + width * size, self._path)
        self._map = mmap.mmap(self._file.fileno(), ORDER_AT + width * size)
        # It may have been all but whole when it was left.
        self._map[:TOKEN_AT] = bytes(TOKEN_AT)
        self._token = self._token or os.urandom(TOKEN_BYTES)
        self._map[TOKEN_AT : TOKEN_AT + TOKEN_BYTES] = self._token
        # Before anything else is written over what another start may have left.
        self._map.flush()
        os.fsync(self._file.fileno())
        return np.frombuffer(self._map, dtype, size, ORDER_AT)

    def finish(self, found: Grouped) -> None:
        """Make the index of what was written."""
        if difference(self._signature, self._ids, whole=False) is not None:
            raise IdsChanged
        contents = Contents(
            found.patch_ids,
            found.counts,
            found.starts,
            self._ids.names,
            source_size=self._ids.size,
            fingerprint=found.fingerprint,
            signature=self._signature,
        )
        dtype, patches = None if found.order is None else found.order.dtype.str, found.counts.size
        if self._map is not None:
            self._map.flush()
        index_format.complete(self._file, contents, dtype, self._path)
        if fcntl is None:
            self._map = None
            del found
            self._file.close()
        # Where there are locks, one is held until the file has its name.
        index_format.rename(self._partial, self._path)
        self._progress.unlink(missing_ok=True)
        self._aside.unlink(missing_ok=True)
        logger.info("%s: %d patches of %d samples", self._path, patches, self._ids.size)

    def discard(self) -> None:
        """Leave nothing behind: another process has made the index."""
        if fcntl is None:
            self._file.close()
        for left in (self._partial, self._progress, self._aside):
            left.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Take away what a process left behind that was killed just after it was done."""
        if not self._partial.exists():
            # Not worth an error in a folder that is only to be read.
            with contextlib.suppress(OSError):
                self._progress.unlink(missing_ok=True)
                self._aside.unlink(missing_ok=True)

    def _locked(self) -> BinaryIO:
        """Return the partial file, open, once this process alone has it."""
        while True:
            # Not cut off: another process may be writing it, or a killed one have left it.
            file = os.fdopen(os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            if fcntl is None:
                return file
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: waiting for the process that builds it", self._path)
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                file.close()
                if error.errno not in _NO_LOCKS:
                    raise
                raise OSError(
                    error.errno,
                    f"path must be on a filesystem that has locks, got {self._path}: "
                    f"{os.strerror(error.errno)}; group elsewhere and copy the index, or use save",
                ) from error
            if self._is_partial(file):
                return file
            # It was finished, and renamed, while this process waited for it.
            file.close()

    def _is_partial(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._partial))
        except FileNotFoundError:
            return False
