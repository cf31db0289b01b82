"""Starting torchrun, ending all of it, and reading what `ddp_script.py` has done from its logs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.paths import SUPPORT
from support.processes import environment

SCRIPT = SUPPORT / "ddp_script.py"
TIMEOUT = 180


@dataclass
class Step:
    """One step of all ranks."""

    epoch: int
    slot: int
    """Global slot of the first rank's batch."""
    rows: list[list[int]]
    losses: list[str]
    """Hexadecimal, so that equal means equal to the bit."""


@dataclass
class Attempt:
    """From a start of all ranks to their end, or to the death of one."""

    state: dict[str, Any]
    ranks: int
    steps: list[Step]
    digests: list[str]
    """Of the parameters, by rank; none where it was killed."""

    @property
    def start(self) -> tuple[int, int]:
        return self.state["epoch"], self.state["slot"]


class TorchrunJob:
    """Torchrun in a session of its own; leaving the block ends whatever is left of it.

    ``launcher`` is a command that starts it, on another host for example. ``variables`` of the
    environment tell ranks to die, or to go slowly.
    """

    def __init__(
        self, out: Path, command: list[Any], launcher: Sequence[str] = (), **variables: str
    ) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / f"output-{len([*out.glob('output-*')])}.txt").open("w+")
        env = environment(
            OMP_NUM_THREADS="1",
            # Else ranks that torchrun has restarted read addresses of the dead ones from the store
            # (torch 2.13, pytorch issue 135712), and are refused or hang.
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            **variables,
        )
        self.process = subprocess.Popen(
            [*launcher, sys.executable, "-m", "torch.distributed.run", *map(str, command)],
            env=env,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> TorchrunJob:
        return self

    def wait(self) -> int:
        """Wait for the end and return the exit code; a job that hangs is shown and fails."""
        try:
            return self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs:\n{self.output()}") from None

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        # Ranks have sessions of their own, so killing torchrun's group leaves them alive.
        for pid in list(pids_writing_to(self.out)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.log.close()


def pids_writing_to(out: Path) -> Iterator[int]:
    """Processes that were started to write into a folder, which is one test's own."""
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if str(out).encode() in line.read_bytes().split(b"\0"):
                yield int(line.parent.name)


def run(
    out: Path, ranks: int, *, kill: str | None = None, restarts: int = 0, **settings: Any
) -> None:
    """Run the training to its end, or to the end of a rank that is to be killed."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = ["--standalone", "--nproc-per-node", ranks, "--max-restarts", restarts]
    variables = {} if kill is None else {"KILL": kill}
    with TorchrunJob(out, [*command, SCRIPT, "--out", out, *options], **variables) as job:
        failed = job.wait() != 0
        assert failed == (kill is not None and restarts == 0), job.output()
        # A rank that loses its peer may end by SIGABRT before the killed one is seen.
        was_killed = re.search(r"exitcode\s*: -9", job.output()) is not None
        assert was_killed == (kill is not None), job.output()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def read_attempts(out: Path) -> list[Attempt]:
    """What all ranks have done in a folder, one attempt after the other."""
    by_rank: list[list[list[dict[str, Any]]]] = []
    for path in sorted(out.glob("rank*.jsonl")):
        attempts_of_rank: list[list[dict[str, Any]]] = []
        for line in map(json.loads, path.read_text().splitlines()):
            if "started" in line:
                attempts_of_rank.append([])
            attempts_of_rank[-1].append(line)
        by_rank.append(attempts_of_rank)
    attempts = []
    for first_log in list(by_rank[0]):
        # Rank 0 is there in every attempt, the others in those with as many ranks.
        logs = [by_rank[rank].pop(0) for rank in range(first_log[0]["ranks"])]
        heads = [log[0] for log in logs]
        assert all(head["started"] == heads[0]["started"] for head in heads)
        assert all(head["ranks"] == len(logs) for head in heads)
        attempts.append(_parse_attempt(heads[0], [log[1:] for log in logs]))
    assert not any(by_rank)
    return attempts


def _parse_attempt(head: dict[str, Any], logs: list[list[dict[str, Any]]]) -> Attempt:
    attempt = Attempt(head["started"], head["ranks"], [], [])
    # The rank that was killed has not ended the step that others may have.
    for lines in zip(*logs, strict=False):
        if "ended" in lines[0]:
            attempt.digests = [line["ended"] for line in lines]
            assert {len(log) for log in logs} == {len(attempt.steps) + 1}
            break
        assert len({(line["epoch"], line["step"]) for line in lines}) == 1
        epoch, step = lines[0]["epoch"], lines[0]["step"]
        first_slot = attempt.start[1] if epoch == attempt.start[0] else 0
        slot = first_slot + (step - 1) * attempt.ranks
        rows, losses = ([line[name] for line in lines] for name in ("rows", "loss"))
        attempt.steps.append(Step(epoch, slot, rows, losses))
    return attempt


def surviving_steps(attempts: list[Attempt]) -> list[Step]:
    """Steps whose outcome the last attempt holds.

    What an attempt did after the checkpoint that the next one started from is done again by that
    one, and is lost.
    """
    ends = [attempt.start for attempt in attempts[1:]]
    return [
        step
        for attempt, end in zip(attempts, [*ends, None], strict=True)
        for step in attempt.steps
        if end is None or (step.epoch, step.slot) < end
    ]
