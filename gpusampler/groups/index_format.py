"""Groups in a file: one that is opened in milliseconds, and that is whole or not there.

A file holds a head of JSON, the order as it is in memory, and the tables by patch::

    0       b"gpusampler index"    16 bytes
    16      length and CRC-32 of the head, two little-endian uint32
    24      the head, JSON; spaces up to ORDER_AT
    16384   order: little-endian int32 or int64, shape (N,), or nothing
    ...     patch_ids, counts, starts: little-endian int64, shape (G,) each
    ...     names: JSON, or nothing

It is written aside, brought to the disk and renamed: what stands under its own name is whole.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import progress_bar
from gpusampler.core.arrays import Int64

MAGIC = b"gpusampler index"
VERSION = 1
ORDER_AT = 1 << 14
_PIECE = 1 << 24
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# What filesystems say that cannot take room beforehand, where the C library does not step in.
_NO_SUCH_CALL = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_TABLES = ("patch_ids", "counts", "starts")


@dataclass(frozen=True)
class Contents:
    """What a file holds.

    Attributes
    ----------
    patch_ids, counts, starts : int64 arrays, shape (G,)
        As in `gpusampler.PatchGroups`.
    names : tuple of str, or None
    source_size, fingerprint : int
    signature : dict, or None
        Of the ids that it was made of (see `gpusampler.groups.verification`).
    """

    patch_ids: Int64
    counts: Int64
    starts: Int64
    names: tuple[str, ...] | None
    source_size: int
    fingerprint: int
    signature: dict[str, Any] | None

    def tables(self) -> bytes:
        """Return the bytes that stand after the order."""
        parts = [getattr(self, name).astype("<i8").tobytes() for name in _TABLES]
        names = b"" if self.names is None else json.dumps(self.names).encode()
        return b"".join([*parts, names])

    def head(self, order_dtype: str | None, order_bytes: int, tables: bytes) -> bytes:
        """Return the bytes that stand before the order."""
        listed = {
            "version": VERSION,
            "num_patches": self.patch_ids.size,
            "num_samples": int(self.counts.sum()),
            "source_size": self.source_size,
            "order": order_dtype,
            "order_bytes": order_bytes,
            "tables_bytes": len(tables),
            "tables_crc": zlib.crc32(tables),
            "named": self.names is not None,
            "fingerprint": self.fingerprint,
            "signature": self.signature,
        }
        text = json.dumps(listed).encode()
        head = MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text
        return head.ljust(ORDER_AT)


class MappedFile:
    """A file's order in memory that the system reads as it is used, and lets go of as it likes.

    Parameters
    ----------
    path : Path
    file : binary file
        Open for reading; closed by the caller.
    dtype : str
    size : int
        Samples.
    known : tuple of int, optional
        Length and time that the file must have still, if it was opened before.

    Attributes
    ----------
    path : Path
    unchecked : array, shape (N,)
        The order, for who asks how large it is: its values may end the process.

    Raises
    ------
    OSError
        If it is not the file that is known.
    """

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        dtype: str,
        size: int,
        known: tuple[int, int] | None = None,
    ) -> None:
        self.path = path
        # Another process may open it from another folder.
        self._absolute = path.absolute()
        # One descriptor of ours: it says what became of this very file, whatever its name is now.
        self._fd = os.dup(file.fileno())
        self._known = self._status() if known is None else known
        self._check()
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.unchecked: NDArray[Any] = np.frombuffer(self._map, dtype, size, ORDER_AT)

    @property
    def order(self) -> NDArray[Any]:
        """The order, read-only.

        Raises
        ------
        OSError
            If the file was written to or cut off since it was opened: pages that are gone would
            end the process without a word.
        """
        self._check()
        return self.unchecked

    def _check(self) -> None:
        now = self._status()
        if now != self._known:
            what = f"one of {now[0]} bytes where it had {self._known[0]}"
            if now[0] == self._known[0]:
                what = "one that was written to since it was opened"
            raise OSError(
                f"{self.path} must stay as it is while it is in use, got {what}; write a new file "
                "beside it and rename it"
            )

    def _status(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    # When the program ends, the module may be gone before this.
    _close = staticmethod(os.close)

    def __del__(self) -> None:
        """Close the descriptor; the map goes with the arrays that are made of it."""
        if hasattr(self, "_fd"):
            self._close(self._fd)

    def __reduce__(self) -> Any:
        """Travel as a path: another process opens the file itself."""
        order = self.unchecked
        return _mapped_again, (self._absolute, order.dtype.str, order.size, self._known)

    def __deepcopy__(self, memo: Any) -> MappedFile:
        """Return itself, which nothing changes: the file may have lost its name."""
        return self


def _mapped_again(path: Path, dtype: str, size: int, known: tuple[int, int]) -> MappedFile:
    with open(path, "rb") as file:
        return MappedFile(path, file, dtype, size, known)


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file says at its start that it is an index."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (FileNotFoundError, IsADirectoryError):
        return False


def check_free(path: Path) -> None:
    """Raise ValueError if there is a file that is no index, and should stay what it is."""
    if path.exists() and not is_index(path):
        raise ValueError(f"path must be free or an index, got another file in {path}")


def read_index(
    path: Path, *, mapped: bool, progress: bool
) -> tuple[Contents, MappedFile | NDArray[Any] | None]:
    """Read a file that `write_index` or a `gpusampler.groups.index_build.Build` has made.

    Parameters
    ----------
    path : Path
    mapped : bool
        Whether the order stays in the file, read where it is used; else it is read now.
    progress : bool

    Returns
    -------
    contents : Contents
    order : MappedFile, array, or None
        None where the samples of every patch are a run.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is no index, of another version, cut off or damaged.
    """
    with open(path, "rb") as file:
        head = _head_of(path, file)
        there = os.fstat(file.fileno()).st_size
        whole = ORDER_AT + head["order_bytes"] + head["tables_bytes"]
        if there != whole:
            raise ValueError(f"{path} must be a whole index of {whole} bytes, got {there}")
        file.seek(ORDER_AT + head["order_bytes"])
        tables = file.read(head["tables_bytes"])
        if zlib.crc32(tables) != head["tables_crc"]:
            raise ValueError(f"{path} must hold the tables it was saved with, got damaged ones")
        contents = _contents(head, tables)
        if head["order"] is None:
            return contents, None
        dtype, size = head["order"], head["num_samples"]
        if mapped:
            return contents, MappedFile(path, file, dtype, size)
        file.seek(ORDER_AT)
        order = np.empty(size, dtype)
        _in_pieces(order, file.readinto, f"reading {path.name}", progress)
        return contents, order


def read_head(path: Path) -> dict[str, Any]:
    """Return what the head of a file says: "signature" and "fingerprint" as in `Contents`.

    Raises
    ------
    ValueError
        If there is another file, or a head that is damaged or of another version.
    """
    check_free(path)
    with open(path, "rb") as file:
        return _head_of(path, file)


def _head_of(path: Path, file: BinaryIO) -> dict[str, Any]:
    start = file.read(ORDER_AT)
    if start[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path} must be an index that PatchGroups.save or from_ids(path=...) made, "
            "got another file"
        )
    damaged = f"{path} must be a whole index, got a damaged head"
    if len(start) < ORDER_AT:
        raise ValueError(f"{damaged}: {len(start)} bytes in all")
    size, crc = struct.unpack_from("<II", start, len(MAGIC))
    text = start[len(MAGIC) + 8 :][:size]
    if zlib.crc32(text) != crc:
        raise ValueError(damaged)
    head: dict[str, Any] = json.loads(text)
    if head["version"] != VERSION:
        raise ValueError(
            f"{path} must be an index of version {VERSION}, got version {head['version']}; "
            "make it anew, or with the release that made it"
        )
    return head


def _contents(head: dict[str, Any], tables: bytes) -> Contents:
    size = head["num_patches"]
    named = json.loads(tables[3 * 8 * size :]) if head["named"] else None
    by_name = {
        name: np.frombuffer(tables, "<i8", size, 8 * size * place).astype(np.int64)
        for place, name in enumerate(_TABLES)
    }
    return Contents(
        **by_name,
        names=None if named is None else tuple(named),
        source_size=head["source_size"],
        fingerprint=head["fingerprint"],
        signature=head["signature"],
    )


def write_index(
    path: Path, contents: Contents, order: NDArray[Any] | None, *, progress: bool
) -> None:
    """Write a file in place of what is there, which stays as it is until the new one is whole.

    Raises
    ------
    OSError
        If there is no room, or no permission; nothing is left behind then.
    """
    # Processes of the same number, in containers, may share a disk.
    aside = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.saving")
    try:
        with told_of_room(path):
            with open(aside, "x+b") as file:
                if order is not None:
                    order = np.ascontiguousarray(order, dtype=order.dtype.newbyteorder("<"))
                    reserve(file, ORDER_AT + order.nbytes, path)
                    file.seek(ORDER_AT)
                    _in_pieces(order, file.write, f"writing {path.name}", progress)
                complete(file, contents, None if order is None else order.dtype.str, path)
            rename(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def complete(file: BinaryIO, contents: Contents, order_dtype: str | None, path: Path) -> None:
    """Write all but the order to a file that is written aside, and bring it to the disk."""
    width = 0 if order_dtype is None else np.dtype(order_dtype).itemsize
    order_bytes = width * int(contents.counts.sum())
    tables = contents.tables()
    reserve(file, ORDER_AT + order_bytes + len(tables), path)
    file.seek(ORDER_AT + order_bytes)
    file.write(tables)
    file.truncate()
    to_disk(file)
    # Only now may anybody take it for an index.
    file.seek(0)
    file.write(contents.head(order_dtype, order_bytes, tables))
    to_disk(file)


def rename(aside: Path, path: Path) -> None:
    """Give a file that was written aside its name; on Windows it must be closed."""
    os.replace(aside, path)
    folder_to_disk(path.parent)


def reserve(file: BinaryIO, size: int, path: Path) -> None:
    """Take room for a file before it is written, so that a full disk is an error and not a signal.

    Raises
    ------
    OSError
        If there is none; the file is as long as before then.
    """
    before = os.fstat(file.fileno()).st_size
    if size <= before:
        return
    with told_of_room(path, size):
        try:
            _take_room(file, size)
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


@contextmanager
def told_of_room(path: Path, size: int | None = None) -> Iterator[None]:
    """Name the file, and what there is, where the system only says that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM or "must have room" in str(error):
            raise
        needed = "" if size is None else f" for {size} bytes"
        free = ""
        if hasattr(os, "statvfs"):
            disk = os.statvfs(path.parent)
            free = f", where {disk.f_bavail * disk.f_frsize} are free"
        raise OSError(
            error.errno,
            f"{path} must have room{needed} on its disk{free}: {os.strerror(error.errno)}",
        ) from error


def _take_room(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _NO_SUCH_CALL:
                raise
        else:
            return
    # Not through its buffer, which would try again when the file is closed.
    file.flush()
    fd, there = file.fileno(), file.tell()
    end = os.lseek(fd, 0, os.SEEK_END)
    while end < size:
        end += os.write(fd, bytes(min(_PIECE, size - end)))
    os.lseek(fd, there, os.SEEK_SET)


def to_disk(file: BinaryIO) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def folder_to_disk(folder: Path) -> None:
    """Bring the names in a folder to the disk, where folders can be opened."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _in_pieces(order: NDArray[Any], move: Any, what: str, progress: bool) -> None:
    """Read or write an array piece by piece."""
    view = order.view(np.uint8).data
    with progress_bar.Bar(len(view), what, "B", progress) as shown:
        done = 0
        while done < len(view):
            moved = move(view[done : done + _PIECE])
            if not moved:
                raise OSError(f"the file ended {len(view) - done} bytes early while it was read")
            done += moved
            shown.update(moved)
