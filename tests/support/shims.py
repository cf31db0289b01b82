"""Windows and macOS, as far as one process on Linux can show them: what Python lacks there.

`apply` takes away what the other system lacks, for good: call it in a child process. It shows that
the package does not use what is missing. It does not show that the package runs there.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MISSING: dict[str, dict[Any, tuple[str, ...]]] = {
    "windows": {
        os: (
            *("fork", "forkpty", "register_at_fork", "getuid", "geteuid", "getgid", "fchmod"),
            *("posix_fallocate", "statvfs", "sysconf", "mkfifo", "chown", "pread", "nice"),
            *("sched_getaffinity", "sched_setaffinity", "getpgid", "killpg", "setsid", "uname"),
            *("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_DIRECTORY", "O_CLOEXEC"),
        ),
        signal: ("SIGBUS", "SIGKILL", "SIGALRM", "alarm", "setitimer", "pthread_sigmask"),
    },
    "macos": {os: ("posix_fallocate", "sched_getaffinity", "sched_setaffinity")},
}
MISSING_MODULES = {"windows": ("resource", "fcntl", "pwd", "grp"), "macos": ()}


def apply(system: str) -> None:
    """Make this process like one of a system, "windows" or "macos"."""
    # These choose what they use when they are imported; they have been ported.
    import filelock  # noqa: F401
    import numpy as np  # noqa: F401

    # filelock has a part for each system, and this process has imported that of Linux.
    whole_os = SimpleNamespace(**vars(os))
    for name, part in list(sys.modules.items()):
        if name.partition(".")[0] == "filelock" and getattr(part, "os", None) is os:
            part.os = whole_os  # type: ignore[attr-defined]
    for module, names in MISSING[system].items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in MISSING_MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]
    from gpusampler.core import memory

    memory.PROC = memory.CGROUPS = Path("/no such folder")
    if system == "windows":
        _windows_files()
        _windows_lookups()


def _windows_files() -> None:
    """Folders cannot be opened, and a file that is open or mapped cannot be replaced or removed."""
    system_open, system_replace, system_unlink = os.open, os.replace, os.unlink

    def denied(path: Any) -> PermissionError:
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))

    def open_file(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if os.path.isdir(path) and not options:
            raise denied(path)
        return system_open(path, flags, mode, **options)

    def replace(source: Any, target: Any, **options: Any) -> None:
        for path in (source, target):
            if in_use(path):
                raise denied(path)
        system_replace(source, target, **options)

    def unlink(path: Any, **options: Any) -> None:
        if not options and in_use(path):
            raise denied(path)
        system_unlink(path, **options)

    os.open, os.replace = open_file, replace
    os.unlink = os.remove = unlink


def in_use(path: Any) -> bool:
    """Whether this process has a file open or mapped."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    for name in os.listdir("/proc/self/fd"):
        try:
            other = os.stat(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if os.path.samestat(status, other):
            return True
    with open("/proc/self/maps") as maps:
        return any(line.split()[4] == str(status.st_ino) for line in maps)


def _windows_lookups() -> None:
    """`CDLL(None)` is an error, and `shutil.which` looks in the current folder first."""
    library, which = ctypes.CDLL, shutil.which

    class Library(library):  # type: ignore[misc, valid-type]
        def __init__(self, name: Any, *arguments: Any, **options: Any) -> None:
            if name is None:
                raise TypeError("LoadLibrary() argument 1 must be str, not None")
            super().__init__(name, *arguments, **options)

    def which_here(command: str, mode: int = os.F_OK | os.X_OK, path: Any = None) -> Any:
        here = os.path.join(os.curdir, command)
        is_here = os.path.isfile(here) and os.access(here, mode)
        return here if is_here else which(command, mode, path)

    ctypes.CDLL, shutil.which = Library, which_here
