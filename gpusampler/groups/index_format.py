"""Memory-mapped index file, written atomically.

Layout::

    0       b"gpusampler index"    16 bytes
    16      length and CRC-32 of the header, two little-endian uint32
    24      header, JSON; spaces up to ORDER_OFFSET
    16384   order: little-endian int32 or int64, shape (N,), or nothing
    ...     patch_ids, counts, starts: little-endian int64, shape (G,) each
    ...     checksums of the blocks of the order: little-endian uint64, shape (B,)
    ...     names: JSON, or nothing

Version 1 has no checksums of blocks; it is read, and checked as a whole when it is opened. A
temporary file is written, synced and renamed, so the file at the final path is always complete.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import files, progress_bar
from gpusampler.core.arrays import Int64
from gpusampler.groups import verification
from gpusampler.groups.index_checks import REBUILD, check_head, check_tables
from gpusampler.groups.verified_order import (
    BlockSums,
    BlockVerifier,
    VerifiedOrder,
    block_sums,
    num_blocks,
)

MAGIC = b"gpusampler index"
VERSION = 2
ORDER_OFFSET = 1 << 14
_CHUNK_BYTES = 1 << 24
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# Errors of filesystems without preallocation, if the C library does not emulate it.
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_TABLE_NAMES = ("patch_ids", "counts", "starts")


@dataclass(frozen=True)
class IndexContents:
    """Contents of an index file except the order, as in `gpusampler.PatchGroups`.

    ``signature`` identifies the source ids (see `gpusampler.groups.verification`); None if unknown.
    ``order_sums`` are the checksums of the order's blocks.
    """

    patch_ids: Int64
    counts: Int64
    starts: Int64
    names: tuple[Any, ...] | None
    source_size: int
    fingerprint: int
    signature: dict[str, Any] | None
    order_sums: BlockSums

    def pack_tables(self) -> bytes:
        """Return the tables, checksums and names, which follow the array of sample indices."""
        tables = [getattr(self, name).astype("<i8").tobytes() for name in _TABLE_NAMES]
        names = b"" if self.names is None else encode_names(self.names)
        return b"".join([*tables, self.order_sums.astype("<u8").tobytes(), names])

    def pack_head(self, order_dtype: str | None, order_bytes: int, table_bytes: bytes) -> bytes:
        """Return the file header, which precedes the array of sample indices."""
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
    """The order of an index file, shape (N,), mapped into memory.

    The caller closes ``file``. ``expected_status`` is the length and the modification time in ns
    from an earlier opening; raises OSError if those of the file differ. Use `unchecked_order`,
    which skips this check, only for dtype and size: reading a truncated file crashes the process
    (SIGBUS). So does a file that is truncated between the check and the read.
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
        # Another process may have a different working directory.
        self._absolute = path.absolute()
        # This descriptor refers to the file even after it is renamed or replaced.
        self._fd = os.dup(file.fileno())
        self._expected_status = self._read_status() if expected_status is None else expected_status
        self._check_unchanged()
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.unchecked_order: NDArray[Any] = np.frombuffer(self._map, dtype, size, ORDER_OFFSET)

    @property
    def order(self) -> NDArray[Any]:
        """The order, read-only; OSError if the file has changed since it was opened."""
        self._check_unchanged()
        return self.unchecked_order

    def _check_unchanged(self) -> None:
        status = self._read_status()
        if status != self._expected_status:
            change = f"its size was {self._expected_status[0]} bytes and is now {status[0]}"
            if status[0] == self._expected_status[0]:
                change = "its modification time differs"
            raise OSError(
                f"{self.path} changed while it was in use: {change}. Write a new file and rename "
                "it instead of modifying an open index."
            )

    def _read_status(self) -> tuple[int, int]:
        status = os.fstat(self._fd)
        return status.st_size, status.st_mtime_ns

    # At interpreter exit, the module `os` may be torn down before this object.
    _close = staticmethod(os.close)

    def __del__(self) -> None:
        """Close the descriptor; arrays keep the map alive."""
        if hasattr(self, "_fd"):
            self._close(self._fd)

    def __reduce__(self) -> Any:
        """Pickle the path: the receiving process opens the file itself."""
        order = self.unchecked_order
        return _reopen, (self._absolute, order.dtype.str, order.size, self._expected_status)

    def __deepcopy__(self, memo: Any) -> MappedFile:
        """Return self: the object is immutable, and its file may be unlinked."""
        return self


def _reopen(path: Path, dtype: str, size: int, expected_status: tuple[int, int]) -> MappedFile:
    with files.open_regular(path) as file:
        return MappedFile(path, file, dtype, size, expected_status)


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts with the magic bytes of an index."""
    try:
        with files.open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except (FileNotFoundError, IsADirectoryError):
        return False


def check_path_is_free(path: Path) -> None:
    """Raise ValueError if ``path`` is an existing file that is not an index, to protect it."""
    if path.exists() and not is_index(path):
        raise ValueError(f"{path} exists and is not an index file. Choose another path.")


def read_index(
    path: Path, *, mapped: bool, verify: bool = False, progress: bool
) -> tuple[IndexContents, VerifiedOrder | NDArray[Any] | None]:
    """Return the contents of an index file and its order, None if every patch is one run.

    ``mapped`` maps the order into memory instead of reading it; its blocks are verified when they
    are used. The header and the tables are checked now, and so is an order that is not mapped. With
    ``verify``, and for version 1, the whole order is also compared with its fingerprint now. Raise
    ValueError if the file is not an index, has a different version, or is truncated or damaged.
    """
    with files.open_regular(path) as file:
        head = _parse_head(path, file)
        file_size = os.fstat(file.fileno()).st_size
        expected_size = ORDER_OFFSET + head["order_bytes"] + head["tables_bytes"]
        if file_size != expected_size:
            raise ValueError(
                f"{path} is truncated or damaged: expected {expected_size} bytes, got "
                f"{file_size}. {REBUILD}"
            )
        file.seek(ORDER_OFFSET + head["order_bytes"])
        table_bytes = file.read(head["tables_bytes"])
        if zlib.crc32(table_bytes) != head["tables_crc"]:
            raise ValueError(f"{path} is damaged: wrong checksum of the tables. {REBUILD}")
        with _name_damage(path):
            contents = _parse_contents(head, table_bytes)
        order: VerifiedOrder | NDArray[Any] | None = None
        if head["order"] is not None and mapped:
            order_file = MappedFile(path, file, head["order"], head["num_samples"])
            if head["version"] == 1:
                contents = replace(contents, order_sums=block_sums(order_file.order))
            order = VerifiedOrder(order_file, contents.order_sums, contents.source_size)
        elif head["order"] is not None:
            order = np.empty(head["num_samples"], head["order"])
            file.seek(ORDER_OFFSET)
            _transfer(order, file.readinto, f"reading {path.name}", progress)
    if isinstance(order, np.ndarray) and head["version"] > 1:
        verifier = BlockVerifier(path, contents.order_sums, contents.source_size)
        verifier.verify_all(order, progress=progress)
    if not verify and head["version"] > 1:
        return contents, order
    whole = order.whole() if isinstance(order, VerifiedOrder) else order
    fault = verification.fault_of_order(
        contents.patch_ids,
        contents.counts,
        contents.starts,
        whole,
        contents.source_size,
        contents.fingerprint,
        progress=progress,
    )
    if fault is not None:
        raise ValueError(f"{path} is damaged: {fault}. {REBUILD}")
    return contents, order


def read_head(path: Path) -> dict[str, Any]:
    """Return the header, with "signature" and "fingerprint" as in `IndexContents`."""
    check_path_is_free(path)
    with files.open_regular(path) as file:
        return _parse_head(path, file)


@contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    """Add the path to errors of parsing."""
    try:
        yield
    # Python's JSON parser gives up on deep nesting.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. {REBUILD}") from None


def _parse_head(path: Path, file: BinaryIO) -> dict[str, Any]:
    first_bytes = file.read(ORDER_OFFSET)
    if first_bytes[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path} is not an index file; create one with PatchGroups.save or from_ids(path=...)"
        )
    if len(first_bytes) < ORDER_OFFSET:
        raise ValueError(
            f"{path} is truncated: {len(first_bytes)} bytes, header incomplete. {REBUILD}"
        )
    size, crc = struct.unpack_from("<II", first_bytes, len(MAGIC))
    start = len(MAGIC) + 8
    text, padding = first_bytes[start : start + size], first_bytes[start + size :]
    if zlib.crc32(text) != crc or padding.strip(b" "):
        raise ValueError(f"{path} is damaged: wrong checksum of the header. {REBUILD}")
    with _name_damage(path):
        head: Any = json.loads(text)
    version = head.get("version") if isinstance(head, dict) else None
    if type(version) is int and not 1 <= version <= VERSION:
        raise ValueError(
            f"{path} must be an index of version 1 or {VERSION}, got version {version}; rebuild "
            "it, or load it with the release that wrote it"
        )
    with _name_damage(path):
        check_head(head, verification.BLOCK_IDS)
    fields: dict[str, Any] = head
    return fields


def encode_names(names: tuple[Any, ...]) -> bytes:
    """Return names as JSON; raise TypeError for names that would change when read again."""
    encoded = b""
    with suppress(TypeError):
        encoded = json.dumps(names, default=_to_number).encode()
    if not encoded or _decode_names(encoded) != names:
        raise TypeError(
            "patch names must be strings or tuples of strings and numbers to be saved, got a "
            f"{type(names[0]).__name__}; pass [str(key) for key in ids]"
        )
    return encoded


def _to_number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError


def _decode_names(encoded: bytes) -> tuple[Any, ...]:
    names = json.loads(encoded)
    if not isinstance(names, list):
        raise ValueError("names must be a JSON array")
    return tuple(tuple(name) if isinstance(name, list) else name for name in names)


def _parse_contents(head: dict[str, Any], table_bytes: bytes) -> IndexContents:
    """Return the contents; raise ValueError if a table does not fit the others or the header."""
    size = head["num_patches"]
    num_sums = 0 if head["version"] == 1 else num_blocks(head["order_bytes"])
    names_start = 8 * (len(_TABLE_NAMES) * size + num_sums)
    if len(table_bytes) < names_start or (not head["named"] and len(table_bytes) > names_start):
        raise ValueError(
            f"the tables of {size} patches must have {names_start} bytes without names, got "
            f"{len(table_bytes)}"
        )
    names = _decode_names(table_bytes[names_start:]) if head["named"] else None
    tables = {
        name: np.frombuffer(table_bytes, "<i8", size, 8 * size * i).astype(np.int64)
        for i, name in enumerate(_TABLE_NAMES)
    }
    check_tables(head, **tables, names=names)
    sums_start = 8 * len(_TABLE_NAMES) * size
    return IndexContents(
        **tables,
        names=names,
        source_size=head["source_size"],
        fingerprint=head["fingerprint"],
        signature=head["signature"],
        order_sums=np.frombuffer(table_bytes, "<u8", num_sums, sums_start).astype(np.uint64),
    )


def write_index(
    path: Path, contents: IndexContents, order: NDArray[Any] | None, *, progress: bool
) -> None:
    """Write an index atomically: an OSError leaves an existing file unchanged.

    The new file has the permissions of the one that it replaces.
    """
    temporary, new_file = files.open_temporary(path, files.permissions(path))
    try:
        with explain_full_disk(path):
            with new_file as file:
                if order is not None:
                    order = np.ascontiguousarray(order, dtype=order.dtype.newbyteorder("<"))
                    reserve(file, ORDER_OFFSET + order.nbytes, path)
                    file.seek(ORDER_OFFSET)
                    _transfer(order, file.write, f"writing {path.name}", progress)
                write_tables_and_head(
                    file, contents, None if order is None else order.dtype.str, path
                )
            files.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_tables_and_head(
    file: BinaryIO, contents: IndexContents, order_dtype: str | None, path: Path
) -> None:
    """Write everything except the order to a temporary file, and sync it."""
    width = 0 if order_dtype is None else np.dtype(order_dtype).itemsize
    order_bytes = width * int(contents.counts.sum())
    table_bytes = contents.pack_tables()
    reserve(file, ORDER_OFFSET + order_bytes + len(table_bytes), path)
    file.seek(ORDER_OFFSET + order_bytes)
    file.write(table_bytes)
    file.truncate()
    files.sync_file(file)
    # The magic bytes come last: until then, no reader accepts the file as an index.
    file.seek(0)
    file.write(contents.pack_head(order_dtype, order_bytes, table_bytes))
    files.sync_file(file)


def reserve(file: BinaryIO, size: int, path: Path) -> None:
    """Reserve disk space, so that a full disk raises OSError instead of killing the process.

    On failure the file keeps its length.
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
    """Add the path and the number of needed and of free bytes to errors about a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL or "not enough disk space" in str(error):
            raise
        needed = "" if size is None else f", {size} bytes needed"
        free = ""
        if hasattr(os, "statvfs"):
            disk = os.statvfs(path.parent)
            free = f", {disk.f_bavail * disk.f_frsize} bytes free"
        raise OSError(
            error.errno,
            f"not enough disk space for {path}{needed}{free}: {os.strerror(error.errno)}",
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
    # Unbuffered: a buffered write would be retried when the file is closed.
    file.flush()
    fd, position = file.fileno(), file.tell()
    end = os.lseek(fd, 0, os.SEEK_END)
    while end < size:
        end += os.write(fd, bytes(min(_CHUNK_BYTES, size - end)))
    os.lseek(fd, position, os.SEEK_SET)


def _transfer(order: NDArray[Any], transfer: Any, label: str, progress: bool) -> None:
    """Read or write an array in chunks."""
    view = order.view(np.uint8).data
    with progress_bar.ProgressBar(len(view), label, "B", progress) as bar:
        num_done = 0
        while num_done < len(view):
            num_moved = transfer(view[num_done : num_done + _CHUNK_BYTES])
            if not num_moved:
                raise OSError(
                    f"{label} failed: {len(view) - num_done} bytes are missing; check the disk and "
                    "rebuild the index"
                )
            num_done += num_moved
            bar.update(num_moved)
