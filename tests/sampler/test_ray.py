"""Ray Train: the script of the how-to page, whose workers are killed and become more."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from support.pages import page_script
from support.processes import run_python
from support.torchrun import read_attempts, surviving_steps

pytest.importorskip("torch")
pytest.importorskip("ray.train")

from gpusampler import PatchBatchSampler
from support.strategies import epoch_of

pytestmark = pytest.mark.slow("starts Ray, up to twice")

EPOCHS = 2


RECORD = """
import json
import os
import signal

OUT = Path({out!r})


def record(sampler=None, optimizer=None, **line):
    context = ray.train.get_context()
    if sampler:
        trained = max((int(part["step"]) for part in optimizer.state.values()), default=0)
        line = dict(started=sampler.state_dict(), ranks=context.get_world_size(), trained=trained)
    with (OUT / f"rank{{context.get_world_rank()}}.jsonl").open("a") as file:
        print(json.dumps(line), file=file)
    if {kill} == (line.get("epoch"), line.get("step"), context.get_world_rank()):
        killed = OUT / "killed"
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def train(config):
"""
RECORD_STEP = """\
record(epoch=epoch, step=step, rows=values[:, 0].tolist(), loss=loss.item().hex())
"""


def script_of(out: Path, kill: tuple[int, int, int] | None) -> str:
    """The page's script, which also records what its workers do, and dies on one of them."""
    script = page_script("in-your-loop.md", "train_ray.py")
    for line, with_more in (
        ("def train(config):\n", RECORD.format(out=str(out), kill=kill)),
        ("model = prepare_model(plain)\n", "{}    record(sampler, optimizer)\n"),
        ("optimizer.step()\n", "{}            " + RECORD_STEP),
        # Workers beyond the CPUs of this machine wait for ever.
        ("trainer = TorchTrainer(\n", "ray.init(num_cpus=4, include_dashboard=False)\n    {}"),
    ):
        assert script.count(line) == 1
        script = script.replace(line, with_more.replace("{}", line))
    return script


def run(out: Path, workers: int, change=None, kill=None, check=True):
    (out / "train.py").write_text(page_script("distributed.md", "train.py"))
    script = script_of(out, kill)
    (out / "train_ray.py").write_text(change(script) if change else script)
    # Ray's workers run in sessions of their own, and look for modules where the driver does.
    return run_python(
        out / "train_ray.py",
        workers,
        cwd=out,
        timeout=240,
        check=check,
        PYTHONSAFEPATH=None,
        RAY_USAGE_STATS_ENABLED="0",
    )


def check_epochs(out: Path, numbers: list[int]) -> None:
    """Hold what counts of every epoch against the plan; `numbers` of workers, by attempt."""
    dataset = runpy.run_path(str(out / "train.py"))["Patches"]()
    row_of = {value: row for row, value in enumerate(dataset.values[:, 0].tolist())}
    attempts = read_attempts(out)
    assert [attempt.ranks for attempt in attempts] == numbers
    # The parameters have had the steps that lie before the sampler's place, and no other.
    lines = map(json.loads, (out / "rank0.jsonl").read_text().splitlines())
    trained = [line["trained"] for line in lines if "started" in line]
    (epoch, slot), steps_per_epoch = attempts[1].start, 24
    assert (epoch, trained) == (1, [0, steps_per_epoch + slot // 2])
    sampler = PatchBatchSampler(dataset, 8, seed=42, num_replicas=1, rank=0)
    steps = surviving_steps(attempts)
    for epoch in range(EPOCHS):
        drawn = [
            [row_of[value] for value in batch]
            for step in steps
            if step.epoch == epoch
            for batch in step.rows
        ]
        batches = epoch_of(sampler, epoch)
        again = len(drawn) - len(batches)
        assert 0 <= again < max(numbers)
        assert drawn == batches + batches[:again]
        assert sorted(row for batch in batches for row in batch) == list(range(len(dataset)))


def test_a_killed_worker_and_a_restart_leave_every_sample_once(tmp_path):
    run(tmp_path, 2, kill=(1, 13, 1))
    assert (tmp_path / "killed").exists()
    check_epochs(tmp_path, [2, 2])


def test_two_workers_become_three(tmp_path):
    def gives_up(script):
        assert "max_failures=1" in script
        return script.replace("max_failures=1", "max_failures=0")

    assert run(tmp_path, 2, gives_up, kill=(1, 13, 1), check=False).returncode != 0
    run(tmp_path, 3)
    check_epochs(tmp_path, [2, 3])


def test_without_the_argument_ray_drops_the_sampler(tmp_path):
    def forgets(script):
        assert ", add_dist_sampler=False" in script
        return script.replace(", add_dist_sampler=False", "")

    result = run(tmp_path, 2, forgets, check=False)
    assert result.returncode != 0
    assert "assert loader.batch_sampler is sampler" in result.stdout + result.stderr
