"""Files: open regular ones only, and replace them atomically.

Nothing waits for a FIFO or a device, and working files are never written through a link.

The type of a file is read from its open descriptor, so it cannot be exchanged after the check.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from io import BufferedRandom, BufferedReader, BufferedWriter

# Windows has none of these three flags. Opening a FIFO, or a terminal line, must not wait.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# Only Windows has this one.
_BINARY = getattr(os, "O_BINARY", 0)
_TYPES = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open an existing regular file for reading.

    Raises
    ------
    IsADirectoryError
        If it is a folder, on every system.
    OSError
        If it is a FIFO, a device or a socket, or cannot be opened.
    """
    try:
        return open(path, "rb", opener=_open_checked)
    except OSError:
        # Windows reports a folder as PermissionError, and Linux a socket as ENXIO.
        check_regular(path)
        raise


def open_output(path: str | os.PathLike[str]) -> BufferedWriter:
    """Open a regular file for writing, empty; it is created if it is missing.

    Raises
    ------
    OSError
        As for `open_regular`.
    """
    check_regular(path, missing_ok=True)
    fd = _open_checked(path, os.O_WRONLY | os.O_CREAT)
    # Not O_TRUNC: only a file that passed the check is emptied.
    os.ftruncate(fd, 0)
    return open(fd, "wb")


def save_png(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure of matplotlib to a regular file, as PNG.

    Raises
    ------
    OSError
        As for `open_regular`.
    """
    with open_output(path) as file:
        figure.savefig(file, dpi=110, format="png")


def check_regular(path: str | os.PathLike[str], *, missing_ok: bool = False) -> None:
    """Raise OSError if a path is not a regular file, before a library opens it by name."""
    try:
        _check_type(os.stat(path), path)
    except FileNotFoundError:
        if not missing_ok:
            raise


def open_temporary(path: Path, mode: int | None = None) -> tuple[Path, BufferedRandom]:
    """Create a file beside ``path``, with a random name, for reading and writing.

    A link or a file that exists at the path is an error. ``mode`` gives the permissions; by default
    they are those of a new file.
    """
    # Random, because processes in different containers may share a disk and a process id.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(8).hex()}.saving")
    # O_EXCL follows no link. Private until fchmod: another user who opened the file earlier could
    # read what is written later.
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    fd = os.open(temporary, flags | _BINARY, 0o666 if mode is None else 0o600)
    if mode is not None and hasattr(os, "fchmod"):
        os.fchmod(fd, mode)
    return temporary, open(fd, "w+b")


def permissions(path: Path) -> int | None:
    """Return the permissions of a file, or None if it does not exist."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


def open_own(path: Path, *, create: bool = False) -> BufferedRandom:
    """Open a file with a predictable name for reading and writing, if this user made it.

    With ``create``, a missing file is created.

    Raises
    ------
    FileNotFoundError
        If it is missing, without ``create``.
    OSError
        If it is a link, a FIFO, a device or a folder, belongs to another user, or has a second
        name (a hard link).
    """
    if create:
        # A file that this call creates is this user's, also where a disk names another owner.
        with suppress(FileExistsError):
            return open(_open_checked(path, os.O_RDWR | os.O_CREAT | os.O_EXCL), "r+b")
    check_single_name(path)
    return open(_open_checked(path, os.O_RDWR | _NO_LINK, _check_owner), "r+b")


def check_single_name(path: Path) -> None:
    """Raise OSError if a path is not a regular file, or is a link, or has a second name."""
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise _planted(path, "is a symbolic link")
    _check_names(status, path)


def replace(temporary: Path, path: Path) -> None:
    """Move a temporary file, which is closed, to its final path, also if there is a file."""
    try:
        os.replace(temporary, path)
    except PermissionError as error:
        if not path.exists():
            raise
        raise PermissionError(
            error.errno,
            f"cannot replace {path}: {error.strerror}. Windows does not replace a file that is "
            "mapped or open: close it (load an index with mmap=False), or choose another path",
        ) from error
    sync_folder(path.parent)


def sync_file(file: BinaryIO) -> None:
    """Flush a file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, except on Windows, which cannot open a folder."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_owner(status: os.stat_result, path: Path) -> None:
    _check_names(status, path)
    # Windows has no user ids.
    if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
        owner, user = status.st_uid, os.geteuid()
        raise _planted(path, f"belongs to another user (uid {owner}, this process has {user})")


def _check_names(status: os.stat_result, path: Path) -> None:
    _check_type(status, path)
    if status.st_nlink > 1:
        raise _planted(path, f"has {status.st_nlink} names (hard links)")


def _planted(path: Path, problem: str) -> OSError:
    return PermissionError(
        errno.EPERM, f"a working file {problem}; delete it, or choose another path", str(path)
    )


def _check_type(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder", os.fspath(path))
    name = next((name for is_type, name in _TYPES if is_type(mode)), "a special file")
    raise OSError(errno.EINVAL, f"expected a regular file, got {name}", os.fspath(path))


def _open_checked(
    path: Any, flags: int, check: Callable[[os.stat_result, Any], None] = _check_type
) -> int:
    """Open a descriptor and check its file; a new file has the permissions of new files."""
    fd = os.open(path, flags | _NO_WAIT | _BINARY, 0o666)
    try:
        check(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd
