"""Child processes of tests: their environment, how they are run, and how they are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import gpusampler
from support.paths import ROOT, TESTS


def environment(**variables: str | None) -> dict[str, str]:
    """Return an environment in which a child imports the package that this process has imported.

    A child of a test that runs against an installed wheel must not import the source tree, so the
    repository's root comes last and the current folder is not searched. Python 3.10 ignores
    PYTHONSAFEPATH: there a child with ``-c`` or ``-m`` must not start in the repository's root.
    A variable whose value is None is removed.
    """
    installed = Path(gpusampler.__file__).parent.parent
    folders = map(str, [installed, TESTS, ROOT / "docs" / "examples", ROOT])
    paths = {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
    merged = {**os.environ, **paths, **variables}
    return {name: value for name, value in merged.items() if value is not None}


def run_python(
    *arguments: object,
    launcher: Sequence[str] = (),
    cwd: Path | None = None,
    timeout: float | None = None,
    check: bool = True,
    **variables: str | None,
) -> subprocess.CompletedProcess[str]:
    """Run Python with some arguments and capture its output.

    Parameters
    ----------
    *arguments
        Of the interpreter, such as ``"-c", code``.
    launcher : sequence of str
        A command that starts the interpreter, such as ``["strace"]``.
    cwd : Path, optional
        An empty folder by default.
    check : bool
        Fail, with all output, where the exit code is not 0.
    **variables
        As for `environment`.
    """
    __tracebackhide__ = True
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.run(
            [*launcher, sys.executable, *map(str, arguments)],
            cwd=cwd or empty,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if check and process.returncode:
        output = f"{process.stdout[-8000:]}\n{process.stderr[-8000:]}"
        raise AssertionError(f"exit code {process.returncode}\n{output}")
    return process


IN_PYARROW = "terminate called after throwing an instance of 'parquet::ParquetException'"
"""pyarrow ends the process where it reads the metadata of a column, and nothing can catch it."""


def run_fuzzer(module: str, *arguments: object, **variables: str | None) -> None:
    """Run a fuzzer of this package, and check what it reports.

    The last two arguments are a number of inputs and a seed. At most two inputs may end the process
    in pyarrow; the fuzzer is run again without them.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("limits its memory as Linux does")
    skipped: list[int] = []
    while True:
        command = ("-m", f"support.{module}", *arguments, *skipped)
        process = run_python(*command, timeout=1200, check=False, **variables)
        if process.returncode != -signal.SIGABRT or IN_PYARROW not in process.stderr:
            break
        assert len(skipped) < 2, process.stderr[-3000:]
        skipped.append(int(process.stderr.split(IN_PYARROW)[0].split()[-1]))
    assert process.returncode == 0, f"{command}, in or after input {process.stderr[-3000:]}"
    result = json.loads(process.stdout)
    assert result["errors"] == {}, command
    assert result["read"] + result["raised"] + len(skipped) == arguments[-2]
    assert min(result["read"], result["raised"]) > 0


def run_ranks(script: Path, ranks: int, out: Path, timeout: int = 300) -> list[dict]:
    """Run ``script OUT`` on some ranks; return what each wrote to OUT/<rank>.json."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [sys.executable, *(["-m", *launcher] if ranks > 1 else []), str(script), str(out)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        terminate(process)
        output = f"not done after {timeout} s\n{process.communicate()[0]}"
    finally:
        terminate(process)
    assert process.returncode == 0, output
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def terminate(process: subprocess.Popen) -> None:
    """End a launcher, which passes SIGTERM on to processes that have groups of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            continue


def refused(result: Any, text: str) -> None:
    """Check that a command, run by click, ended with one line of error and exit code 2."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr
