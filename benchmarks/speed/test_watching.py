"""The cost of always counting time: ``pytest -m slow`` on this file.

Counted in instructions (callgrind), as seconds of a percent are not to be had on a shared machine:
draining epochs with the code as it is, against the same code from whose syntax trees all that
counts and watches was cut out when it was imported. Each is run for n and for 2n epochs, and the
difference is taken, so that starting up does not count.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CASES = {
    "100,000 samples, list of 64": ((100_000, "list", 64), 4, 1.01),
    "100,000 samples, numpy of 64": ((100_000, "numpy", 64), 4, 1.01),
    "100,000 samples, list of 8": ((100_000, "list", 8), 4, 1.01),
    "100,000 samples, numpy of 8": ((100_000, "numpy", 8), 4, 1.01),
    # One block: what an epoch does once counts most.
    "5,000 samples, list of 64": ((5_000, "list", 64), 40, 1.02),
}
"""Samples, output and batch size; epochs; and the limit of the ratio."""

CHILD = """
import ast, gc, re, sys
from importlib.machinery import PathFinder, SourceFileLoader

# What the ranges' `with` statements enter, and what else is done for figures.
WATCHED = re.compile(r"recorder\\.range\\(|self\\._\\w+_range\\b")
COUNTED = re.compile(r"self\\._recorder\\.(iterators|batches)")
RECORDS = ("gpusampler.core.tracing", "gpusampler.sampler.profile")

def remove(node):
    print("cut", ast.unparse(node), file=sys.stderr)

class Cut(ast.NodeTransformer):
    def visit_With(self, node):
        self.generic_visit(node)
        watched = [one for one in node.items if WATCHED.search(ast.unparse(one.context_expr))]
        for item in watched:
            remove(item)
            node.items.remove(item)
        return node if node.items else node.body

    def statement(self, node):
        return (remove(node) or ast.Pass()) if COUNTED.match(ast.unparse(node)) else node

    visit_Expr = visit_AugAssign = statement

    def visit_Assign(self, node):
        if ast.unparse(node.value) == "self._recorder.watcher":
            remove(node)
            node.value = ast.Constant(None)
        return node

class Loader(SourceFileLoader):
    def get_code(self, fullname):
        tree = Cut().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")

class Finder:
    def find_spec(self, fullname, path, target=None):
        spec = PathFinder.find_spec(fullname, path, target)
        ours = spec is not None and fullname.startswith("gpusampler.") and fullname not in RECORDS
        if ours and str(spec.origin).endswith(".py"):
            spec.loader = Loader(fullname, spec.origin)
        return spec

samples, output, size, epochs, cut = sys.argv[1:]
if cut == "cut":
    sys.meta_path.insert(0, Finder())
import numpy as np
from gpusampler import PatchBatchSampler
ids = np.random.default_rng(0).integers(0, 100, int(samples))
sampler = PatchBatchSampler(ids, int(size), seed=0, output=output)
# A collection of garbage costs a percent by itself, and falls into one run or the other.
gc.disable()
for _ in range(int(epochs)):
    for _batch in sampler:
        pass
"""


def instructions(settings, epochs: int, how: str) -> int:
    """Count the instructions of a child."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    done = subprocess.run(
        ["env", "PYTHONHASHSEED=0", *command, "-c", CHILD, *map(str, (*settings, epochs, how))],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    counted = re.search(r"Collected : (\d+)", done.stderr)
    assert done.returncode == 0, done.stderr[-2000:]
    assert counted, done.stderr[-2000:]
    # A cut that misses its target would call anything free.
    targets = "_hand_out_range", "_evaluate_range", "recorder.batches", "recorder.watcher"
    assert how == "whole" or all(target in done.stderr for target in targets), done.stderr
    return int(counted[1])


@pytest.mark.slow("callgrind is fifty times slower")
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
@pytest.mark.parametrize("name", CASES)
def test_watching_adds_little(say, name):
    settings, n, limit = CASES[name]
    runs = [(settings, epochs, how) for how in ("whole", "cut") for epochs in (2 * n, n)]
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(lambda run: instructions(*run), runs))
    whole, cut = ((counts[i] - counts[i + 1]) / n for i in (0, 2))
    say(f"{name}: {whole / 1e6:.3f} million instructions, {whole / cut:.4f} of those without")
    assert whole / cut < limit
