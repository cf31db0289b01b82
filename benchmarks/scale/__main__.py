"""Group, open and draw from datasets larger than memory: ``python -m benchmarks.scale``.

Needs some 13 GB of disk and ten minutes in full; ``--size`` cuts all of it down.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.scale import measures

LARGEST = 2 * 10**9


def parts(folder: Path, largest: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what there is to measure, for a largest dataset of so many samples."""
    share = largest / LARGEST

    def cut(size: int) -> int:
        return max(round(size * share), 1000)

    sizes = [cut(size) for size in (10**6, 10**7, 10**8, 10**9)]
    return {
        "linearity": lambda: measures.linearity(folder, sizes),
        "argsort": lambda: measures.against_argsort(cut(10**8)),
        "opening": lambda: measures.opening(folder, cut(10**9)),
        "drained": lambda: measures.drained(folder, cut(10**9), 20_000),
        "counts": lambda: measures.from_counts(10**12, 10_000),
        "asking": lambda: measures.asking(10_000 if share == 1 else 1_500),
        "killed": lambda: measures.killed(folder, largest),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print what was measured; write it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("parts", nargs="*", help="some of the parts only")
    parser.add_argument("--size", type=float, default=LARGEST, help="samples of the largest set")
    parser.add_argument("--folder", type=Path, help="where the ids are written, and removed again")
    parser.add_argument("--out", type=Path, help="folder for the figures, as JSON")
    asked = parser.parse_args(arguments)
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        offered = parts(Path(folder), int(asked.size))
        unknown = set(asked.parts) - set(offered)
        if unknown:
            parser.error(f"parts must be among {', '.join(offered)}, got {', '.join(unknown)}")
        for name, measure in offered.items():
            if not asked.parts or name in asked.parts:
                found[name] = measure()
                print(f"{name}: {json.dumps(found[name], indent=2)}", flush=True)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        path = asked.out / f"scale-{found['machine']['date']}.json"
        path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
