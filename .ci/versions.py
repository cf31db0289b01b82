"""Run tests of the sdist against the installed wheel, on one interpreter.

The environment is made for it (or is one that is there: ``--env``), the wheel is installed into it,
and the tests run in the unpacked sdist from which the package itself was taken away. With
``--record`` the result becomes a row of ``docs/supported-versions.md``::

    python .ci/versions.py /path/to/python3.12 --record
    python .ci/versions.py /path/to/python3.10 --with "numpy==2.0.*" --with torch==2.6.0 --record

It runs on Python 3.11 or newer; ``build`` must be there, or an sdist and a wheel in ``--dist``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "versions.json"
PAGE = ROOT / "docs" / "supported-versions.md"
BEGIN, END = "<!-- rows of versions.json -->\n", "<!-- end of the rows -->\n"

# What the package is: batches, their order, ranks and states, on every library that is there.
CORE = (
    "test_package",
    "permutation/test_permutation",
    "permutation/test_golden",
    "groups/test_patch_groups",
    "groups/test_subsets",
    "groups/test_from_counts",
    "sampler/test_batch_sampler",
    "sampler/test_state",
    "sampler/test_ranks",
    "plan/test_coverage",
    "sampler/test_arguments",
    "sampler/test_patch_names",
    "sampler/test_tensor_loader",
)
TOOLS = ("pytest>=8.0", "pytest-xdist>=3.6", "pytest-benchmark>=4.0", "hypothesis>=6.100")
SHOWN = ("numpy", "torch", "array-api-compat", "tqdm")

ASK = """
import importlib.metadata, json, platform
import gpusampler
found = {"python": platform.python_version(), "file": gpusampler.__file__}
for name in %r:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def one(folder: Path, pattern: str) -> Path:
    """Return the one file of this name."""
    (found,) = folder.glob(pattern)
    return found


def install(python: Path, wheel: Path, wanted: list[str]) -> None:
    """Install the wheel, what it needs, what tests need and `wanted`; then the wheel once more."""
    # -I here and below: modules of the current folder must not run in place of those asked for.
    pip = [str(python), "-I", "-m", "pip", "install", "-q"]
    subprocess.run([*pip, str(wheel), *TOOLS, *wanted], check=True)
    # pip leaves a package of the same version where it is.
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)


def tested(python: Path, sdist: Path, work: Path, tests: list[str]) -> dict[str, Any]:
    """Run the tests and return what was found; the package must come from the environment."""
    with tarfile.open(sdist) as file:
        file.extractall(work, filter="data")
    tree = one(work, "gpusampler-*/")
    shutil.rmtree(tree / "gpusampler")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["OMP_NUM_THREADS"] = "1"
    asked = [str(python), "-I", "-c", ASK % (SHOWN,)]
    done = subprocess.run(asked, cwd=tree, env=env, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    if "site-packages" not in Path(found["file"]).parts:
        raise SystemExit(f"gpusampler must come from the wheel, got {found['file']}")
    del found["file"]
    report = work / "report.xml"
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    files = [f"tests/{name}.py" for name in tests]
    began = time.perf_counter()
    code = subprocess.run([*command, *files], cwd=tree, env=env).returncode
    if code not in (0, 1):
        raise SystemExit(f"pytest ended with {code}")
    suite = next(ElementTree.parse(report).iter("testsuite"))
    number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    found |= {"passed": number["tests"] - failed - number["skipped"]}
    found |= {"skipped": number["skipped"], "failed": failed}
    return found | {"seconds": round(time.perf_counter() - began)}


def record(row: dict[str, Any]) -> None:
    """Keep the row, in place of one of the same versions, and write the page's table anew."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        numbers = [re.findall(r"\d+", row[name] or "") for name in ("python", "torch", "numpy")]
        return tuple([int(part) for part in number] for number in numbers)

    rows = sorted([other for other in rows if key(other) != key(row)] + [row], key=key)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.split(END)[1])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    head = ("Python", "NumPy", "torch", "array-api-compat", "tqdm", "passed", "skipped", "failed")
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row[name] or "none" for name in ("python", *SHOWN)]
        lines.append([*cells, *(str(row[name]) for name in head[5:])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Build or take the distributions, test them, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("python", nargs="?", help="interpreter that an environment is made with")
    parser.add_argument("--env", type=Path, help="an environment that is there, in its place")
    parser.add_argument("--with", action="append", default=[], metavar="REQUIREMENT", dest="wanted")
    parser.add_argument("--dist", type=Path, help="folder with one sdist and the wheel made of it")
    parser.add_argument(
        "--tests", nargs="+", default=list(CORE), help="files, as in permutation/test_golden"
    )
    parser.add_argument("--record", action="store_true", help="write the row into the page")
    given = parser.parse_args()
    if (given.python is None) == (given.env is None):
        parser.error("give either an interpreter or --env")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        dist = given.dist or work / "dist"
        if given.dist is None:
            build = [sys.executable, "-I", "-m", "build", "-o", str(dist), str(ROOT)]
            subprocess.run(build, check=True)
        env = given.env or work / "env"
        if given.env is None:
            subprocess.run([given.python, "-I", "-m", "venv", str(env)], check=True)
        python = env.absolute() / "bin" / "python"
        install(python, one(dist, "gpusampler-*.whl"), given.wanted)
        (work / "tree").mkdir()
        sdist = one(dist, "gpusampler-*.tar.gz")
        found = tested(python, sdist, work / "tree", given.tests)
    print(json.dumps(found))
    if given.record:
        record(found)
    sys.exit(found["failed"] > 0)


if __name__ == "__main__":
    main()
