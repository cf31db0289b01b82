"""What it costs that time is always counted: ``python -m benchmarks.profiling``.

Counted in instructions (callgrind), as seconds of a percent are not to be had on a shared machine:
draining epochs with the code as it is, against the same code from whose syntax trees all that
counts and watches was cut out when it was imported. Each is run for n and for 2n epochs, and the
difference is taken, so that starting up does not count. Then a loop is profiled.
"""

from __future__ import annotations

import argparse
import ast
import gc
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType
from typing import Any, NamedTuple

LIMIT = 1.01
WATCHED = re.compile(r"recorder\.range\(|self\._\w+_range\b")
"""What the ranges' `with` statements enter."""
COUNTED = re.compile(r"self\._(recorder\.(iterators|batches)|growth\.check)")
"""What else is done for figures: a count of batches, the living iterators, an epoch's memory."""


class Case(NamedTuple):
    """An epoch that is drained."""

    samples: int
    output: str
    batch_size: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.samples} samples, {self.output} of {self.batch_size}"


CASES = (
    Case(100_000, "list", 64, 4),
    Case(100_000, "numpy", 64, 4),
    Case(100_000, "list", 8, 4),
    Case(100_000, "numpy", 8, 4),
    Case(5_000, "list", 64, 40),
)


class Cut(ast.NodeTransformer):
    """Takes out of a module what counts and watches; remembers how much that was."""

    def __init__(self) -> None:
        self.removed: list[str] = []

    def visit_With(self, node: ast.With) -> Any:
        self.generic_visit(node)
        kept = [item for item in node.items if not WATCHED.search(ast.unparse(item.context_expr))]
        self.removed += [ast.unparse(item) for item in node.items if item not in kept]
        node.items = kept
        return node if kept else node.body

    def statement(self, node: ast.stmt) -> Any:
        if COUNTED.match(ast.unparse(node)):
            self.removed.append(ast.unparse(node))
            return ast.Pass()
        return node

    visit_Expr = visit_AugAssign = statement

    def visit_Assign(self, node: ast.Assign) -> Any:
        if ast.unparse(node.value) == "self._recorder.watcher":
            self.removed.append(ast.unparse(node))
            node.value = ast.Constant(None)
        return node


class CutLoader(SourceFileLoader):
    """Compiles a module without it."""

    def get_code(self, fullname: str) -> CodeType:
        cut = Cut()
        tree = cut.visit(ast.parse(self.get_data(self.path)))
        for removed in cut.removed:
            print(f"cut {fullname}: {removed}", file=sys.stderr)
        return compile(ast.fix_missing_locations(tree), self.path, "exec")


class CutFinder(MetaPathFinder):
    """Finds the package's modules for `CutLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or not fullname.startswith("gpusampler.") or spec.origin is None:
            return spec
        if fullname.split(".")[1] in ("telemetry", "profiling"):
            return spec
        spec.loader = CutLoader(fullname, spec.origin)
        return spec


def drain(case: Case, epochs: int) -> None:
    """Hand out epochs and forget them; runs in the child."""
    import numpy as np

    from gpusampler import PatchBatchSampler

    ids = np.random.default_rng(0).integers(0, 100, case.samples)
    sampler = PatchBatchSampler(ids, case.batch_size, seed=0, output=case.output)
    # A collection of garbage costs a percent by itself, and falls into one run or the other.
    gc.disable()
    for _ in range(epochs):
        for _batch in sampler:
            pass


def instructions(case: Case, epochs: int, cut: bool) -> int:
    """Count the instructions of a child."""
    child = [sys.executable, "-m", "benchmarks.profiling", "--child", *map(str, case)]
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *child]
    done = subprocess.run(
        [*command, "--run", str(epochs), *(["--cut"] if cut else [])],
        env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    counted = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or counted is None:
        raise RuntimeError(f"callgrind counted nothing:\n{done.stderr[-2000:]}")
    # A cut that misses its target would call anything free.
    if cut and "_handing_out" not in done.stderr:
        raise RuntimeError("nothing was cut out")
    return int(counted[1])


def per_epoch(case: Case, cut: bool) -> float:
    """Return the instructions of an epoch, without those of starting up."""
    n = case.epochs
    return (instructions(case, 2 * n, cut) - instructions(case, n, cut)) / n


def a_loop() -> Any:
    """Profile a loop that does something with every tenth batch."""
    import numpy as np

    from gpusampler import PatchBatchSampler

    sampler = PatchBatchSampler(np.random.default_rng(0).integers(0, 100, 500_000), 64, seed=0)
    with sampler.profile() as p:
        for number, _batch in enumerate(sampler):
            if number % 10 == 0:
                time.sleep(1e-4)
    return p


def main(arguments: list[str] | None = None) -> int:
    """Print both; 1 if the counts do not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiling", description=__doc__)
    parser.add_argument("--first", type=int, default=len(CASES), help="only so many cases")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cut", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        if asked.cut:
            sys.meta_path.insert(0, CutFinder())
        samples, output, batch_size, epochs = asked.child
        drain(Case(int(samples), output, int(batch_size), int(epochs)), asked.run)
        return 0
    if shutil.which("valgrind") is None:
        print("valgrind is needed")
        return 2
    print(f"{platform.machine()}, Python {platform.python_version()}")
    print("instructions of an epoch, in millions\n")
    print("| epoch | as it is | with nothing that counts | ratio |\n|---|---|---|---|")
    held = True
    with ThreadPoolExecutor(2) as pool:
        for case in CASES[: asked.first]:
            ours, bare = pool.map(per_epoch, [case] * 2, [False, True])
            held = held and ours / bare < LIMIT
            print(f"| {case} | {ours / 1e6:.3f} | {bare / 1e6:.3f} | {ours / bare:.4f} |")
    profile = a_loop()
    total = sum(row.share for row in profile.rows)
    held = held and abs(total - 1) <= 0.02
    print(f"\n{profile}")
    print(f"\nratios below {LIMIT} and shares that sum to 100 +- 2 %: {'yes' if held else 'NO'}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
