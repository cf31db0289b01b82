"""Files of ids as large as a benchmark asks for, and what a process holds while it runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent.parent
PATCHES = 500
_BLOCK = 1 << 24


def make_ids(path: Path, size: int, dtype: str = "int16", patches: int = PATCHES) -> None:
    """Write shuffled ids to a .npy file, block by block."""
    rng = np.random.default_rng(size)
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(size,))
    for first in range(0, size, _BLOCK):
        count = min(_BLOCK, size - first)
        mapped[first : first + count] = rng.integers(0, patches, count, dtype=dtype)
    mapped.flush()


class Held(NamedTuple):
    """What a process held at most, in bytes, and how it ended.

    ``anonymous`` is what it holds beyond the page cache (RssAnon of Linux); the pages of a file
    that it has mapped are the system's, which takes them back when it needs them.
    """

    anonymous: int
    seconds: float
    code: int
    output: str


def watched(
    arguments: list[str], kill_when: Callable[[float], bool] = lambda seconds: False
) -> Held:
    """Run this interpreter on arguments; look every few milliseconds, and kill it when asked to."""
    start = time.perf_counter()
    most = 0
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            if kill_when(time.perf_counter() - start):
                process.kill()
            time.sleep(0.005)
        output = process.communicate()[0]
    return Held(most, time.perf_counter() - start, process.returncode, output)


def anonymous(pid: int | str) -> int:
    """Return the anonymous resident memory of a process in bytes, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
