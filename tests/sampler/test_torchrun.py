"""Training on several processes by torchrun and gloo: epochs shared out, killed, and resumed."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from support.pages import page_script

pytest.importorskip("torch")

import torch
import torch.distributed

from gpusampler import PatchBatchSampler
from support.ddp_script import SIZES, OnPoints, Patches
from support.network_hosts import ADDRESSES, CABLE, Hosts, two_hosts
from support.strategies import epoch_of
from support.torchrun import (
    SCRIPT,
    Attempt,
    TorchrunJob,
    free_port,
    read_attempts,
    run,
    surviving_steps,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="ends the ranks by way of /proc"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torchrun"),
]

N, M = sum(SIZES), 47


def sampler_of(ranks: int = 1, uneven: str = "pad") -> PatchBatchSampler:
    return PatchBatchSampler(Patches(), 8, seed=42, num_replicas=ranks, rank=0, uneven=uneven)


def check_epoch(attempts: list[Attempt], epoch: int, uneven: str = "pad") -> None:
    """Hold what counts of an epoch against the plan, and against counting the samples."""
    steps = [step for step in surviving_steps(attempts) if step.epoch == epoch]
    drawn = list(chain.from_iterable(step.rows for step in steps))
    epoch_batches = epoch_of(sampler_of(), epoch)
    assert len(epoch_batches) == M
    last = len(steps[-1].rows)  # ranks of the last step
    if uneven == "pad":
        # The whole epoch, in order, and then its first batches again to fill the last step.
        assert M <= len(drawn) < M + last
        assert drawn == (epoch_batches + epoch_batches)[: len(drawn)]
        counted = drawn[:M]
    else:
        assert M - last < len(drawn) <= M
        assert drawn == epoch_batches[: len(drawn)]
        counted = drawn + epoch_batches[len(drawn) :]
    assert Counter(chain.from_iterable(counted)) == Counter(range(N))


def check_end(attempts: list[Attempt]) -> None:
    """All ranks of the last attempt have come to the end, with the same parameters."""
    assert len(attempts[-1].digests) == attempts[-1].ranks
    assert len(set(attempts[-1].digests)) == 1
    assert all(not attempt.digests for attempt in attempts[:-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def uninterrupted(folder) -> list[Attempt]:
    """Two epochs on two ranks."""
    run(folder / "two", 2)
    return read_attempts(folder / "two")


@pytest.mark.expensive("the one job of torchrun")
def test_two_ranks_share_every_epoch_out(uninterrupted):
    # 47 batches on two ranks: as many steps on both, so that the last step ends, and no more.
    (attempt,) = uninterrupted
    for epoch in range(2):
        check_epoch(uninterrupted, epoch)
        steps = [step for step in attempt.steps if step.epoch == epoch]
        assert len(steps) == len(sampler_of(2)) == 24
        check_coverage(steps, sampler_of(2), epoch)
    check_end(uninterrupted)


def check_coverage(steps, sampler, epoch) -> None:
    """Compare how often samples were seen with what `coverage` says, patch by patch."""
    rows = list(chain.from_iterable(chain.from_iterable(step.rows for step in steps)))
    times = np.bincount(rows, minlength=N)
    ids = Patches().patch_ids.numpy()
    for row in sampler.coverage(epoch):
        times_in_patch = times[ids == row["patch_id"]]
        assert (times_in_patch == 0).sum() == row["missed"]
        assert (times_in_patch == 1).sum() == row["seen_once"]
        assert (times_in_patch > 1).sum() == row["repeated"]


@pytest.mark.slow("one more job of torchrun, killed and started again")
def test_a_killed_rank_and_a_restart_leave_the_losses_as_they_were(folder, uninterrupted):
    # Killed in step 18 of the second epoch, 3 steps after a checkpoint, while the workers of the
    # loaders have drawn ahead. torchrun starts both ranks again by itself.
    run(folder / "elastic", 2, kill="training:1:42", restarts=1, num_workers=2)
    attempts = read_attempts(folder / "elastic")
    assert [attempt.start for attempt in attempts] == [(0, 0), (1, 30)]
    assert (attempts[0].steps[-1].epoch, attempts[0].steps[-1].slot) == (1, 32)
    check_end(attempts)
    # Equal to the bit, in every step, on both ranks: a sum of two gradients has one order.
    assert surviving_steps(attempts) == uninterrupted[0].steps
    assert attempts[-1].digests == uninterrupted[0].digests
    # The steps after the checkpoint were done twice.
    assert sum(len(attempt.steps) for attempt in attempts) == len(uninterrupted[0].steps) + 2


@pytest.mark.slow("one more job of torchrun, killed and started again")
def test_four_ranks_become_three(folder):
    out = folder / "four-three"
    run(out, 4, uneven="drop", kill="training:2:20")
    # 11 steps, and 8 of the second epoch: the last three are not in the checkpoint.
    (attempt,) = read_attempts(out)
    assert len(attempt.steps) == 19
    run(out, 3, uneven="drop")
    attempts = read_attempts(out)
    assert [attempt.start for attempt in attempts] == [(0, 0), (1, 20)]
    for epoch in range(2):
        check_epoch(attempts, epoch, "drop")
    check_end(attempts)
    # Three batches are left out of the first epoch; 27 are left of the second, 9 for each of three.
    sampler = sampler_of(4, "drop")
    assert sampler.coverage(0).totals()["missed"] > 0
    check_coverage(attempt.steps[: len(sampler)], sampler, 0)
    assert len(attempts[1].steps) == 9
    # 47 batches on three ranks: one comes a second time, and must not count.
    check_error(out, 3)


@pytest.mark.slow("one more job of torchrun, killed and started again")
def test_two_ranks_become_three_and_then_one(folder):
    out = folder / "two-three-one"
    run(out, 2, epochs=1, save_every=3, kill="training:0:8")
    # Rank 0 dies when its second checkpoint is written, but not yet in its place.
    run(out, 3, epochs=1, save_every=3, kill="saving:0:2")
    run(out, 1, epochs=1)
    attempts = read_attempts(out)
    assert [attempt.start for attempt in attempts] == [(0, 0), (0, 12), (0, 21)]
    check_epoch(attempts, 0)
    check_end(attempts)
    assert len(attempts[2].steps) == M - 21
    check_error(out, 1)


def check_error(out: Path, ranks: int) -> None:
    """The error that ranks have found together is that of one process that sees each sample."""
    actual = {(out / f"error{rank}.json").read_text() for rank in range(ranks)}
    assert len(actual) == 1
    model, dataset = OnPoints(), Patches()
    model.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    with torch.no_grad():
        weights = model.weights(dataset.points)[dataset.patch_ids, :, 0]
    forecast = (dataset.values * weights).mean(dim=1)
    alone = (forecast - dataset.targets).double().square().mean().item()
    assert float(actual.pop()) == pytest.approx(alone, rel=1e-6)


@pytest.mark.slow("one more job of torchrun")
def test_the_script_of_the_page_goes_on(tmp_path):
    script, checkpoint = tmp_path / "train.py", tmp_path / "checkpoint.pt"
    script.write_text(page_script("distributed.md", "train.py"))
    # As if three ranks had done two steps, and all had gone wrong: the model is one that nobody
    # could have made anew.
    page = runpy.run_path(str(script))
    model = torch.nn.Module()
    model.module = page["OnPoints"]()
    optimizer = torch.optim.Adam(model.parameters())
    for part in model.parameters():
        torch.nn.init.constant_(part, torch.nan)
        part.grad = torch.ones_like(part)
    for _ in range(2):
        optimizer.step()
    sampler = PatchBatchSampler(page["Patches"](), 8, seed=42, num_replicas=3, rank=0)
    batches = sampler.plan.num_batches
    page["save"](checkpoint, model, optimizer, sampler, 2)
    command = ["--standalone", "--nproc-per-node", 2, script, "--out", tmp_path]
    with TorchrunJob(tmp_path, [*command, "--epochs", 1]) as job:
        assert job.wait() == 0, job.output()
        assert "epoch 0, loss" in job.output()
    saved = torch.load(checkpoint, weights_only=True)
    assert (saved["sampler"]["epoch"], saved["sampler"]["slot"]) == (0, batches)
    assert saved["optimizer"]["state"][0]["step"] == 2 + -(-(batches - 6) // 2)
    assert all(part.isnan().all() for part in saved["model"].values())


@pytest.mark.parametrize(
    ("ranks", "kills", "settings"),
    [
        ((4, 3), ["training:0:1"], {}),
        ((4, 3), ["training:2:21"], {}),
        ((4, 3), ["training:3:12"], {}),
        ((4, 3), ["training:3:13"], {"num_workers": 2}),
        ((4, 2), ["training:1:7"], {"uneven": "drop"}),
        ((3, 4), ["saving:0:1"], {"save_every": 1}),
        ((3, 4), ["saving:0:17"], {"save_every": 1, "uneven": "drop"}),
        ((2, 3, 1), ["training:1:24", "training:2:3"], {"save_every": 2}),
        ((1, 4, 2, 3), ["training:0:6", "saving:0:2", "training:0:3"], {"save_every": 2}),
        ((4, 1), ["saving:0:4"], {}),
    ],
)
@pytest.mark.battery("ten more jobs of torchrun, killed at other places")
def test_killed_anywhere(tmp_path, ranks, kills, settings):
    for count, kill in zip(ranks, [*kills, None], strict=True):
        run(tmp_path, count, kill=kill, **settings)
    attempts = read_attempts(tmp_path)
    assert [attempt.ranks for attempt in attempts] == list(ranks)
    for epoch in range(2):
        check_epoch(attempts, epoch, settings.get("uneven", "pad"))
    check_end(attempts)


@pytest.mark.battery("two more jobs, of three ranks")
def test_three_ranks_restart_with_losses_that_are_close(tmp_path):
    # A sum of three gradients may be taken in another order by a process group made anew.
    run(tmp_path / "whole", 3)
    run(tmp_path / "killed", 3, kill="training:1:24", restarts=1)
    (whole,), attempts = read_attempts(tmp_path / "whole"), read_attempts(tmp_path / "killed")
    assert [attempt.start for attempt in attempts] == [(0, 0), (1, 15)]
    actual = surviving_steps(attempts)
    assert [step.rows for step in actual] == [step.rows for step in whole.steps]
    losses = [[list(map(float.fromhex, step.losses)) for step in s] for s in (actual, whole.steps)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    check_end(attempts)


@pytest.mark.battery("two torchruns that stand for two machines")
def test_a_machine_joins_and_another_goes(tmp_path):
    # Two torchruns stand for two machines: two ranks, then three, then two again. It goes slowly,
    # so that the second is there before the first has come to the end.
    epochs = 50
    command = [
        *("--nnodes", "1:2", "--max-restarts", 3, "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"),
        "--rdzv-conf=last_call_timeout=3",
    ]
    script = [SCRIPT, "--out", tmp_path, "--epochs", epochs, "--save-every", 7]
    with TorchrunJob(tmp_path, [*command, "--nproc-per-node", 2, *script], PAUSE="0.02") as first:
        wait_for_lines(first, tmp_path / "rank0.jsonl", 50)
        joining = [*command, "--nproc-per-node", 1, *script]
        with TorchrunJob(tmp_path, joining, KILL="machine-training:2:40") as second:
            assert second.wait() != 0
            assert first.wait() == 0, first.output()
    attempts = read_attempts(tmp_path)
    assert [attempt.ranks for attempt in attempts] == [2, 3, 2]
    assert all(attempt.steps for attempt in attempts)
    for epoch in range(epochs):
        check_epoch(attempts, epoch)
    check_end(attempts)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


def start_on_host(hosts: Hosts, host: int, out: Path, nodes: str, epochs: int = 2) -> TorchrunJob:
    """One rank on a host; the store that torchrun needs is on the first one."""
    rendezvous = f"is_host={1 - host},last_call_timeout=3,read_timeout=10"
    command = [
        *("--nnodes", nodes, "--nproc-per-node", 1, "--max-restarts", 3 if ":" in nodes else 0),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500"),
        *("--rdzv-id", "cable", "--rdzv-conf", rendezvous, "--local-addr", ADDRESSES[host]),
        # gloo waits for half an hour by default: no packet says that the cable is cut.
        *(SCRIPT, "--out", out, "--epochs", epochs, "--timeout", 15),
    ]
    launcher = hosts.launcher(host)
    return TorchrunJob(out, command, launcher, GLOO_SOCKET_IFNAME=CABLE, PAUSE="0.2")


CUT_AFTER = 1 + 24 + 12
"""Lines of a log: the start, an epoch of two ranks, and half of the next one."""


def check_cut(attempts: list[Attempt]) -> None:
    """The first attempt was broken off in the second epoch, after a checkpoint."""
    first, second = attempts[:2]
    assert (first.ranks, second.ranks) == (2, 1)
    epoch, slot = second.start
    assert (epoch, slot % 10) == (1, 0)
    assert 0 < slot <= first.steps[-1].slot + 2 < M


def check_two_attempts(folder: Path) -> None:
    """The cable was cut in the first attempt, and both epochs are complete after the second."""
    attempts = read_attempts(folder)
    assert len(attempts) == 2
    check_cut(attempts)
    for epoch in range(2):
        check_epoch(attempts, epoch)
    check_end(attempts)


@pytest.mark.parametrize("survivor", [0, 1], ids=["first", "second"])
@pytest.mark.battery("two hosts whose cable is cut, and the wait for that to be noticed")
def test_a_cable_is_cut_and_one_host_is_started_again(tmp_path, hosts, survivor):
    first, second = (start_on_host(hosts, host, tmp_path, "2") for host in (0, 1))
    with first, second:
        wait_for_lines(first, tmp_path / "rank0.jsonl", CUT_AFTER)
        hosts.cut()
        assert first.wait() != 0
        assert "Timed out" in first.output()
    again = ["--standalone", "--nproc-per-node", 1, SCRIPT, "--out", tmp_path]
    with TorchrunJob(tmp_path, again, hosts.launcher(survivor), GLOO_SOCKET_IFNAME="lo") as job:
        assert job.wait() == 0, job.output()
    check_two_attempts(tmp_path)


@pytest.mark.battery("two hosts whose cable is cut, and the wait for that to be noticed")
def test_a_cable_is_cut_and_the_first_host_goes_on_alone(tmp_path, hosts):
    first, second = (start_on_host(hosts, host, tmp_path, "1:2") for host in (0, 1))
    with first, second:
        wait_for_lines(first, tmp_path / "rank0.jsonl", CUT_AFTER)
        hosts.cut()
        assert first.wait() == 0, first.output()
    check_two_attempts(tmp_path)


@pytest.mark.battery("two hosts whose cable is cut, and the wait for that to be noticed")
def test_a_cable_is_mended_and_the_second_host_joins_again(tmp_path, hosts):
    epochs, log = 8, tmp_path / "rank0.jsonl"
    first, second = (start_on_host(hosts, host, tmp_path, "1:2", epochs) for host in (0, 1))
    with first, second:
        wait_for_lines(first, log, CUT_AFTER)
        hosts.cut()
        wait_for_lines(first, log, CUT_AFTER + 30)
        # It waits for the store, and would raise an error when that answers again.
        os.killpg(second.process.pid, signal.SIGKILL)
        hosts.mend()
        with start_on_host(hosts, 1, tmp_path, "1:2", epochs) as again:
            assert first.wait() == 0, first.output()
            assert again.wait() == 0, again.output()
    attempts = read_attempts(tmp_path)
    assert [attempt.ranks for attempt in attempts] == [2, 1, 2]
    check_cut(attempts)
    for epoch in range(epochs):
        check_epoch(attempts, epoch)
    check_end(attempts)


def wait_for_lines(job: TorchrunJob, log: Path, lines: int) -> None:
    end = time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < lines:
        assert time.monotonic() < end, job.output()
        assert job.process.poll() is None, job.output()
        time.sleep(0.1)
