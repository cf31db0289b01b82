"""Child processes of tests: their environment, scripts of several ranks, and how they are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gpusampler
from support.paths import ROOT, TESTS


def environment(**variables: str) -> dict[str, str]:
    """Return an environment in which a child finds the package that this process has imported.

    The repository's root comes last, and the current folder not at all (from Python 3.11 on): a
    child of a test that runs against an installed wheel must not import the source tree.
    """
    found = [str(Path(gpusampler.__file__).parent.parent), str(TESTS), str(ROOT)]
    paths = {"PYTHONPATH": os.pathsep.join(found), "PYTHONSAFEPATH": "1"}
    return {**os.environ, **paths, **variables}


def launched(script: Path, processes: int, out: Path, timeout: int = 300) -> list[dict]:
    """What each process of ``script OUT`` wrote to OUT/<rank>.json, in the order of ranks."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = subprocess.Popen(
        [sys.executable, *(["-m", *launcher] if processes > 1 else []), str(script), str(out)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        ended(run)
        said = f"not done after {timeout} s\n{run.communicate()[0]}"
    finally:
        ended(run)
    assert run.returncode == 0, said
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


def ended(run: subprocess.Popen) -> None:
    """End the launcher, which passes SIGTERM on to processes that have groups of their own."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        if run.poll() is not None:
            return
        os.killpg(run.pid, sent)
        try:
            run.wait(timeout=40)
        except subprocess.TimeoutExpired:
            continue
