"""Groups in a file: one that is opened in milliseconds, and that is whole or not there.

A file holds a head of JSON, the order as it is in memory, and the tables by patch::

    0       b"gpusampler index"    16 bytes
    16      length and CRC-32 of the head, two little-endian uint32
    24      the head, JSON; spaces up to ORDER_OFFSET
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
ORDER_OFFSET = 1 << 14
_CHUNK_BYTES = 1 << 24
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# What filesystems say that cannot take room beforehand, where the C library does not step in.
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_TABLE_NAMES = ("patch_ids", "counts", "starts")


@dataclass(frozen=True)
class IndexContents:
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

    def pack_tables(self) -> bytes:
        """Return the bytes that stand after the order."""
        tables = [getattr(self, name).astype("<i8").tobytes() for name in _TABLE_NAMES]
        names = b"" if self.names is None else json.dumps(self.names).encode()
        return b"".join([*tables, names])

    def pack_head(self, order_dtype: str | None, order_bytes: int, table_bytes: bytes) -> bytes:
        """Return the bytes that stand before the order."""
        fields = {
            "version": VERSION,
            "num_patches": self.patch_ids.size,
            "num_samples": int(self.counts.sum()),
            "source_size": self.source_size,
            "order": order_dtype,
            "order_bytes": order_bytes,
            "tables_bytes": len(table_bytes),
            "tables_crc": zlib.crc32(table_bytes),
            "named": self.names is not None,
            "fingerprint": self.fingerprint,
            "signature": self.signature,
        }
        text = json.dumps(fields).encode()
        head = MAGIC + struct.pack("<II", len(text), zlib.crc32(text)) + text
        return head.ljust(ORDER_OFFSET)


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
    expected_status : tuple of int, optional
        Length and time that the file must have still, if it was opened before.

    Attributes
    ----------
    path : Path
    unchecked_order : array, shape (N,)
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
        expected_status: tuple[int, int] | None = None,
    ) -> None:
        self.path = path
        # Another process may open it from another folder.
        self._absolute = path.absolute()
        # One descriptor of ours: it says what became of this very file, whatever its name is now.
        self._fd = os.dup(file.fileno())
        self._expected_status = self._read_status() if expected_status is None else expected_status
        self._check_unchanged()
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.unchecked_order: NDArray[Any] = np.frombuffer(self._map, dtype, size, ORDER_OFFSET)

    @property
    def order(self) -> NDArray[Any]:
        """The order, read-only.

        Raises
        ------
        OSError
            If the file was written to or cut off since it was opened: pages that are gone would
            end the process without a word.
        """
        self._check_unchanged()
        return self.unchecked_order

    def _check_unchanged(self) -> None:
        status = self._read_status()
        if status != self._expected_status:
            change = f"one of {status[0]} bytes where it had {self._expected_status[0]}"
            if status[0] == self._expected_status[0]:
                change = "one that was written to since it was opened"
            raise OSError(
                f"{self.path} must stay as it is while it is in use, got {change}; write a new "
                "file beside it and rename it"
            )

    def _read_status(self) -> tuple[int, int]:
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
        order = self.unchecked_order
        return _reopen, (self._absolute, order.dtype.str, order.size, self._expected_status)

    def __deepcopy__(self, memo: Any) -> MappedFile:
        """Return itself, which nothing changes: the file may have lost its name."""
        return self


def _reopen(path: Path, dtype: str, size: int, expected_status: tuple[int, int]) -> MappedFile:
    with open(path, "rb") as file:
        return MappedFile(path, file, dtype, size, expected_status)


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file says at its start that it is an index."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (FileNotFoundError, IsADirectoryError):
        return False


def check_path_is_free(path: Path) -> None:
    """Raise ValueError if there is a file that is no index, and should stay what it is."""
    if path.exists() and not is_index(path):
        raise ValueError(f"path must be free or an index, got another file in {path}")


def read_index(
    path: Path, *, mapped: bool, progress: bool
) -> tuple[IndexContents, MappedFile | NDArray[Any] | None]:
    """Read a file that `write_index` or a `gpusampler.groups.index_build.IndexBuild` has made.

    Parameters
    ----------
    path : Path
    mapped : bool
        Whether the order stays in the file, read where it is used; else it is read now.
    progress : bool

    Returns
    -------
    contents : IndexContents
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
        head = _parse_head(path, file)
        file_size = os.fstat(file.fileno()).st_size
        expected_size = ORDER_OFFSET + head["order_bytes"] + head["tables_bytes"]
        if file_size != expected_size:
            raise ValueError(
                f"{path} must be a whole index of {expected_size} bytes, got {file_size}"
            )
        file.seek(ORDER_OFFSET + head["order_bytes"])
        table_bytes = file.read(head["tables_bytes"])
        if zlib.crc32(table_bytes) != head["tables_crc"]:
            raise ValueError(f"{path} must hold the tables it was saved with, got damaged ones")
        contents = _parse_contents(head, table_bytes)
        if head["order"] is None:
            return contents, None
        dtype, size = head["order"], head["num_samples"]
        if mapped:
            return contents, MappedFile(path, file, dtype, size)
        file.seek(ORDER_OFFSET)
        order = np.empty(size, dtype)
        _transfer(order, file.readinto, f"reading {path.name}", progress)
        return contents, order


def read_head(path: Path) -> dict[str, Any]:
    """Return what the head of a file says: "signature" and "fingerprint" as in `IndexContents`.

    Raises
    ------
    ValueError
        If there is another file, or a head that is damaged or of another version.
    """
    check_path_is_free(path)
    with open(path, "rb") as file:
        return _parse_head(path, file)


def _parse_head(path: Path, file: BinaryIO) -> dict[str, Any]:
    first_bytes = file.read(ORDER_OFFSET)
    if first_bytes[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path} must be an index that PatchGroups.save or from_ids(path=...) made, "
            "got another file"
        )
    damaged = f"{path} must be a whole index, got a damaged head"
    if len(first_bytes) < ORDER_OFFSET:
        raise ValueError(f"{damaged}: {len(first_bytes)} bytes in all")
    size, crc = struct.unpack_from("<II", first_bytes, len(MAGIC))
    text = first_bytes[len(MAGIC) + 8 :][:size]
    if zlib.crc32(text) != crc:
        raise ValueError(damaged)
    head: dict[str, Any] = json.loads(text)
    if head["version"] != VERSION:
        raise ValueError(
            f"{path} must be an index of version {VERSION}, got version {head['version']}; "
            "make it anew, or with the release that made it"
        )
    return head


def _parse_contents(head: dict[str, Any], table_bytes: bytes) -> IndexContents:
    size = head["num_patches"]
    names = json.loads(table_bytes[3 * 8 * size :]) if head["named"] else None
    tables = {
        name: np.frombuffer(table_bytes, "<i8", size, 8 * size * i).astype(np.int64)
        for i, name in enumerate(_TABLE_NAMES)
    }
    return IndexContents(
        **tables,
        names=None if names is None else tuple(names),
        source_size=head["source_size"],
        fingerprint=head["fingerprint"],
        signature=head["signature"],
    )


def write_index(
    path: Path, contents: IndexContents, order: NDArray[Any] | None, *, progress: bool
) -> None:
    """Write a file in place of what is there, which stays as it is until the new one is whole.

    Raises
    ------
    OSError
        If there is no room, or no permission; nothing is left behind then.
    """
    # Processes of the same number, in containers, may share a disk.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.saving")
    try:
        with explain_full_disk(path):
            with open(temporary, "x+b") as file:
                if order is not None:
                    order = np.ascontiguousarray(order, dtype=order.dtype.newbyteorder("<"))
                    reserve(file, ORDER_OFFSET + order.nbytes, path)
                    file.seek(ORDER_OFFSET)
                    _transfer(order, file.write, f"writing {path.name}", progress)
                write_tables_and_head(
                    file, contents, None if order is None else order.dtype.str, path
                )
            rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tables_and_head(
    file: BinaryIO, contents: IndexContents, order_dtype: str | None, path: Path
) -> None:
    """Write all but the order to a file that is written aside, and bring it to the disk."""
    width = 0 if order_dtype is None else np.dtype(order_dtype).itemsize
    order_bytes = width * int(contents.counts.sum())
    table_bytes = contents.pack_tables()
    reserve(file, ORDER_OFFSET + order_bytes + len(table_bytes), path)
    file.seek(ORDER_OFFSET + order_bytes)
    file.write(table_bytes)
    file.truncate()
    sync_file(file)
    # Only now may anybody take it for an index.
    file.seek(0)
    file.write(contents.pack_head(order_dtype, order_bytes, table_bytes))
    sync_file(file)


def rename(temporary: Path, path: Path) -> None:
    """Give a file that was written aside its name; on Windows it must be closed."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def reserve(file: BinaryIO, size: int, path: Path) -> None:
    """Take room for a file before it is written, so that a full disk is an error and not a signal.

    Raises
    ------
    OSError
        If there is none; the file is as long as before then.
    """
    current_size = os.fstat(file.fileno()).st_size
    if size <= current_size:
        return
    with explain_full_disk(path, size):
        try:
            _allocate(file, size)
        except OSError:
            os.ftruncate(file.fileno(), current_size)
            raise


@contextmanager
def explain_full_disk(path: Path, size: int | None = None) -> Iterator[None]:
    """Name the file, and what there is, where the system only says that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL or "must have room" in str(error):
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


def _allocate(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        else:
            return
    # Not through its buffer, which would try again when the file is closed.
    file.flush()
    fd, position = file.fileno(), file.tell()
    end = os.lseek(fd, 0, os.SEEK_END)
    while end < size:
        end += os.write(fd, bytes(min(_CHUNK_BYTES, size - end)))
    os.lseek(fd, position, os.SEEK_SET)


def sync_file(file: BinaryIO) -> None:
    """Bring what was written to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where folders can be opened."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _transfer(order: NDArray[Any], transfer: Any, label: str, progress: bool) -> None:
    """Read or write an array piece by piece."""
    view = order.view(np.uint8).data
    with progress_bar.ProgressBar(len(view), label, "B", progress) as bar:
        num_done = 0
        while num_done < len(view):
            num_moved = transfer(view[num_done : num_done + _CHUNK_BYTES])
            if not num_moved:
                raise OSError(
                    f"the file ended {len(view) - num_done} bytes early while it was read"
                )
            num_done += num_moved
            bar.update(num_moved)
