"""Where and when something is measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Return the processor, the versions (None: not installed), the commit and the date."""
    from gpusampler.permutation import _native

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "torch", "gpusampler", *packages)},
        # No reason follows where a benchmark itself chose NumPy.
        "evaluated by": _native.describe().removesuffix(" ()"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def line(found: dict[str, Any]) -> str:
    """Return a machine as one line."""
    return ", ".join(f"{name} {value}" for name, value in found.items())


def write(found: dict[str, Any], folder: Path, name: str) -> Path:
    """Write results as JSON, named by the day of the run; a file of results is always whole."""
    path = folder / f"{name}-{found['machine']['date']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    return part.replace(path)


def version(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def commit() -> str | None:
    """Return the commit of the checkout, marked where files differ; None outside of one."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
