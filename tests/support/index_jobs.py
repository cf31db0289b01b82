"""What tests of index files do in processes of their own: ``python index_jobs.py NAME FOLDER``.

A job asserts what it finds; its process is killed, has no room, or must not.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.groups import index_build, index_format
from gpusampler.sources.base import PatchIds
from support.processes import run_python

BLOCK = 5_000
SIZE = 100_000


posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")


def run_job(folder: Path, name: str, *arguments: str, launcher: Sequence[str] = ()) -> str:
    """Run a job of index_jobs.py in a process of its own; its folder is empty at first."""
    work = folder / "work"
    work.mkdir()
    command = ["-X", "faulthandler", __file__, name, work, *arguments]
    return run_python(*command, launcher=launcher, timeout=300).stdout


def ids_of(kind: str, size: int = SIZE) -> np.ndarray:
    """Ids that take the ways through counting: in windows, in tables, many patches, and runs."""
    rng = np.random.default_rng(1)
    if kind == "dense":
        return rng.integers(0, 100, size)
    if kind == "sparse":
        return rng.integers(0, 300, size) << 50
    if kind == "many":
        return rng.permutation(np.arange(size) % 70_000)
    return np.repeat(rng.permutation(size // 10), 10)


class SlowIds(PatchIds):
    """Ids that are read in small blocks, each of which is noted down.

    Parameters
    ----------
    ids : integer array
    seconds : float
        What a block takes.
    log : Path, optional
        Gets a line for each block.
    fail_at : int, optional
        At which block reading fails.
    """

    def __init__(
        self,
        ids: np.ndarray,
        seconds: float = 0.0,
        log: Path | None = None,
        fail_at: int | None = None,
    ) -> None:
        self.ids, self.seconds, self.log, self.fail_at = ids, seconds, log, fail_at
        self.size, self.dtype = ids.size, ids.dtype.name
        self.blocks_read: list[int] = []
        # As in a file: without its time, opening an index again would read everything.
        self.modified = 1

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]

    def blocks(self, start: int = 0, size: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        for first, block in super().blocks(start, BLOCK):
            if len(self.blocks_read) == self.fail_at:
                raise OSError("the disk is gone")
            time.sleep(self.seconds)
            self.blocks_read.append(first)
            if self.log is not None:
                with open(self.log, "a") as file:
                    file.write(f"{first}\n")
            yield first, block


def checkpoint_every_block() -> None:
    """Keep the state after every block."""
    index_build.CHECKPOINT_SECONDS, index_build.CHECKPOINT_SHARE = 0.0, 1e9


def check_built(folder: Path, ids: np.ndarray) -> None:
    """Compare an index, which must be all there is, with one that was never stopped."""
    assert sorted(os.listdir(folder)) == ["a"], os.listdir(folder)
    groups = PatchGroups.load(folder / "a", source=ids, verify=True)
    expected = PatchGroups.from_ids(ids)
    np.testing.assert_array_equal(groups.patch_ids, expected.patch_ids)
    np.testing.assert_array_equal(groups.counts, expected.counts)
    if expected.order is None:
        assert groups.order is None
        np.testing.assert_array_equal(groups.starts, expected.starts)
    else:
        np.testing.assert_array_equal(groups.order, np.argsort(ids, kind="stable"))


def check_unfinished(folder: Path, ids: np.ndarray) -> None:
    """See that nothing that is not whole is taken for an index."""
    assert not (folder / "a").exists() or not (folder / "a.partial").exists()
    for path in folder.iterdir():
        try:
            groups = PatchGroups.load(path)
        except (ValueError, FileNotFoundError):
            assert path.name != "a"
            continue
        # Killed between the last byte and the name.
        assert path.name in ("a", "a.partial"), path
        groups = PatchGroups.load(path, verify=True)
        assert groups.fingerprint == PatchGroups.from_ids(ids).fingerprint


def run_forked(work: Callable[[], Any], seconds: float | None = None) -> int:
    """Do work in a forked process, kill it after a time, and return its status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_random(folder: Path, kind: str, seed: str) -> None:
    """Kill the work at random moments until it is done all the same."""
    checkpoint_every_block()
    rng = np.random.default_rng(int(seed))
    ids, log = ids_of(kind), folder.with_name("log")
    # Of runs there is one pass.
    kills, pause = 0, 0.005 if kind == "runs" else 0.002
    while True:
        status = run_forked(
            lambda: PatchGroups.from_ids(
                SlowIds(ids, pause, log), path=folder / "a", progress=False
            ),
            # Longer each time: a busy machine may take this long for what is kept first.
            rng.uniform(0.01, 0.1 * 1.05**kills),
        )
        assert status in (0, -signal.SIGKILL), status
        check_unfinished(folder, ids)
        if status == 0:
            break
        kills += 1
        assert kills < 200
    if not (folder / "a").exists():
        PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    check_built(folder, ids)
    blocks, passes = SIZE // BLOCK, 1 if kind == "runs" else 2
    read = len(log.read_text().split())
    # What is lost at most: the block that was being added, and the one that was being kept.
    assert passes * blocks <= read <= passes * blocks + 2 * kills, (read, kills)
    print(f"{kills} kills, {read} blocks")
    assert kills


def killed_at_every_step(folder: Path, kind: str) -> None:
    """Kill the work before each call that the disk sees, then go on to the end."""
    checkpoint_every_block()
    ids = ids_of(kind, 20_000)
    step = 0
    while True:
        shutil.rmtree(folder)
        folder.mkdir()
        status = run_forked(lambda at=step: _killed_before(at, folder, ids))
        check_unfinished(folder, ids)
        slow = SlowIds(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PatchGroups.from_ids(slow, path=folder / "a")
        check_built(folder, ids)
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
        step += 1
    print(f"{step} steps")
    assert step > 20


def _killed_before(step: int, folder: Path, ids: np.ndarray) -> None:
    remaining = [step]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if remaining[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining[0] -= 1
            return call(*arguments, **named)

        return wrapped

    for name in ("fsync", "replace", "open", "ftruncate", "posix_fallocate", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    index_build.np.savez = counted(np.savez)
    PatchGroups.from_ids(SlowIds(ids), path=folder / "a")


class Forking(SlowIds):
    """Ids whose process starts a child at a block, which outlives it, and is then killed."""

    def blocks(self, start: int = 0, size: int = BLOCK) -> Iterator[tuple[int, np.ndarray]]:
        for first, block in super().blocks(start, size):
            if len(self.blocks_read) == 3:
                pid = os.fork()
                if pid == 0:
                    time.sleep(60)
                    os._exit(0)
                assert self.log is not None
                self.log.write_text(str(pid))
                os.kill(os.getpid(), signal.SIGKILL)
            yield first, block


def killed_with_a_child(folder: Path) -> None:
    """Go on while a child of the process that was killed is alive."""
    checkpoint_every_block()
    ids, log = ids_of("dense"), folder.with_name("log")
    path = folder / "a"
    assert run_forked(lambda: PatchGroups.from_ids(Forking(ids, 0.0, log), path=path)) < 0
    slow = SlowIds(ids)
    PatchGroups.from_ids(slow, path=path)
    os.kill(int(log.read_text()), signal.SIGKILL)
    assert slow.blocks_read[0] == 2 * BLOCK
    check_built(folder, ids)


def many_at_once(folder: Path, kind: str, kill: str) -> None:
    """Build one index in several processes, of which the first is killed if asked."""
    checkpoint_every_block()
    ids, log = ids_of(kind), folder.with_name("log")
    pids = []
    for rank in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                time.sleep(0.05 * (rank > 0))
                groups = PatchGroups.from_ids(SlowIds(ids, 0.004, log), path=folder / "a")
                sampler = PatchBatchSampler(groups, 64, seed=1, num_replicas=4, rank=rank)
                batches = [len(batch) for batch in sampler]
                assert groups.fingerprint == PatchGroups.from_ids(ids).fingerprint
                code = 0 if batches else 2
            finally:
                os._exit(code)
        pids.append(pid)
    if kill == "killed":
        time.sleep(0.07)
        os.kill(pids[0], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes[1:] == [0, 0, 0], codes
    assert codes[0] == (-signal.SIGKILL if kill == "killed" else 0), codes
    check_built(folder, ids)
    read = len(log.read_text().split())
    passes = 1 if kind == "runs" else 2
    assert read <= passes * SIZE // BLOCK + (2 if kill == "killed" else 0), read


def other_ids_at_once(folder: Path) -> None:
    """Build indexes of different ids at one place: the later one is refused."""
    path = folder / "a"

    def second() -> None:
        time.sleep(0.05)
        with pytest.raises(ValueError, match="indexes different ids"):
            PatchGroups.from_ids(SlowIds(ids_of("sparse")), path=path)

    pid = os.fork()
    if pid == 0:
        os._exit(run_forked(second))
    PatchGroups.from_ids(SlowIds(ids_of("dense"), 0.005), path=path)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    check_built(folder, ids_of("dense"))


# No room


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A disk of so many bytes; the process must have its mounts to itself (unshare -m)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True, timeout=60
        )
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True, timeout=60)


def free_bytes(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def fill_disk(folder: Path, size: int) -> None:
    """Fill a disk until so many bytes are free."""
    with open(folder / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free_bytes(folder) - size)


def check_full(work: Callable[[], Any], path: Path, needed: int | None, free: int | None) -> None:
    """See that work ends in an error that says what was needed and what there was."""
    with pytest.raises(OSError) as caught:
        work()
    text = str(caught.value)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG), text
    match = re.search(r"space for (.*), (\d+) bytes needed, (\d+) bytes free", text)
    assert match is not None, text
    assert match[1] == str(path), text
    assert needed is None or int(match[2]) == needed, text
    assert free is None or abs(int(match[3]) - free) <= 8192, (text, free)


def full_while_saving(_: Path) -> None:
    old, new = PatchGroups.from_ids([5, 4, 5]), PatchGroups.from_ids(ids_of("dense"))
    order_bytes = index_format.ORDER_OFFSET + 4 * SIZE
    with small_disk(1 << 20) as folder:
        path = folder / "a"
        old.save(path)
        for free in (0, 4096, 200_000, order_bytes - 4096):
            fill_disk(folder, free)
            needed = None if free == 0 else order_bytes
            if free == 0:
                # Even an empty file needs room on some disks.
                with contextlib.suppress(OSError):
                    new.save(path)
            else:
                check_full(lambda: new.save(path), path, needed, free)
            assert sorted(os.listdir(folder)) == ["a", "filler"]
            assert PatchGroups.load(path, [5, 4, 5], verify=True).order.tolist() == [1, 0, 2]
            os.unlink(folder / "filler")
        # The order has its room, the tables have not.
        named = PatchGroups.from_ids([f"{number % 1000:0500d}" for number in range(3000)])
        fill_disk(folder, index_format.ORDER_OFFSET + 4 * 3000 + 8192)
        check_full(lambda: named.save(path), path, None, 4096)
        assert sorted(os.listdir(folder)) == ["a", "filler"]
        os.unlink(folder / "filler")
        new.save(path)
        groups = PatchGroups.load(path, ids_of("dense"), verify=True)
        assert groups.fingerprint == new.fingerprint


def full_while_building(_: Path) -> None:
    ids = ids_of("dense")
    needed = index_format.ORDER_OFFSET + 4 * SIZE
    with small_disk(1 << 20) as folder:
        path = folder / "a"
        fill_disk(folder, 100_000)
        slow = SlowIds(ids)
        check_full(lambda: PatchGroups.from_ids(slow, path=path), path, needed, 90_000)
        assert slow.blocks_read == list(range(0, SIZE, BLOCK))
        os.unlink(folder / "filler")
        # Going on: the first pass is not done again.
        slow = SlowIds(ids)
        PatchGroups.from_ids(slow, path=path)
        assert slow.blocks_read == list(range(0, SIZE, BLOCK))
        check_built(folder, ids)


def full_while_keeping(_: Path) -> None:
    checkpoint_every_block()
    ids = ids_of("many")
    with small_disk(2 << 20) as folder:
        path, progress = folder / "a", folder / "a.progress"
        fill_disk(folder, 300_000)
        slow = SlowIds(ids)
        check_full(lambda: PatchGroups.from_ids(slow, path=path), progress, None, None)
        assert 0 < len(slow.blocks_read) < SIZE // BLOCK
        assert sorted(os.listdir(folder)) == ["a.partial", "a.progress", "filler"]
        first = slow.blocks_read[-1]
        os.unlink(folder / "filler")
        grow_disk(folder)
        slow = SlowIds(ids)
        PatchGroups.from_ids(slow, path=path)
        assert slow.blocks_read[0] == first
        check_built(folder, ids)


def grow_disk(folder: Path) -> None:
    """Make a small disk one of 16 MiB."""
    subprocess.run(["mount", "-o", "remount,size=16m", str(folder)], check=True, timeout=60)


def full_while_finishing(_: Path) -> None:
    names = [f"{number % 5000:0400d}" for number in range(20_000)]
    with small_disk(1 << 20) as folder:
        path = folder / "a"
        check_full(lambda: PatchGroups.from_ids(names, path=path), path, None, 819_200)
        remaining_files = sorted(os.listdir(folder))
        assert remaining_files == ["a.partial", "a.progress"], remaining_files
        check_unfinished(folder, np.zeros(1, np.int64))
        grow_disk(folder)
        text = io.StringIO()
        logger = logging.getLogger("gpusampler")
        logger.addHandler(logging.StreamHandler(text))
        logger.setLevel(logging.INFO)
        groups = PatchGroups.from_ids(names, path=path)
        assert "after 20000 of 20000 samples sorted" in text.getvalue()
        assert os.listdir(folder) == ["a"]
        expected = PatchGroups.from_ids(names)
        np.testing.assert_array_equal(groups.order, expected.order)
        assert groups.names == expected.names


def over_the_limit_of_a_file(folder: Path) -> None:
    path, ids = folder / "a", ids_of("dense")
    PatchGroups.from_ids([5, 4, 5]).save(path)
    groups = PatchGroups.from_ids(ids)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    needed = index_format.ORDER_OFFSET + 4 * SIZE
    check_full(lambda: groups.save(path), path, needed, None)
    assert os.listdir(folder) == ["a"]
    other = folder / "b"
    check_full(lambda: PatchGroups.from_ids(ids, path=other), other, needed, None)
    assert PatchGroups.load(path, [5, 4, 5], verify=True).num_samples == 3
    # Where room can only be taken by writing zeros.
    fallocate = os.posix_fallocate
    del os.posix_fallocate
    check_full(lambda: groups.save(path), path, needed, None)
    check_full(lambda: PatchGroups.from_ids(ids, path=other), other, needed, None)
    assert sorted(os.listdir(folder)) == ["a", "b.partial", "b.progress"]
    assert (folder / "b.partial").stat().st_size == 0
    os.posix_fallocate = fallocate
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    PatchGroups.from_ids(ids, path=other)
    groups.save(path)
    assert path.read_bytes() == other.read_bytes()


# Files that change while they are mapped


def changed_while_mapped(folder: Path, change: str, device: str) -> None:
    path, ids = folder / "a", ids_of("dense", 1_000_000)
    PatchGroups.from_ids(ids, path=path)
    sampler = PatchBatchSampler(PatchGroups.load(path), 1000, seed=1, device=device)
    expected = [batch.indices.tolist() for batch in sampler.batches(0)]
    errors = []
    iterator = sampler.batches(0)
    errors.append(next(iterator).indices.tolist())
    if change == "cut off":
        os.truncate(path, 1000)
    elif change == "emptied":
        os.truncate(path, 0)
    elif change == "written":
        # In place, as by cp over it.
        with open(path, "r+b") as file:
            file.seek(index_format.ORDER_OFFSET)
            file.write(bytes(4_000_000))
    elif change == "replaced":
        PatchGroups.from_ids([1, 2, 1]).save(path)
    else:
        os.unlink(path)
    if change in ("replaced", "removed"):
        errors.extend(batch.indices.tolist() for batch in iterator)
        assert errors == expected
        return
    with pytest.raises(OSError, match=f"^{path} changed while it was in use: its"):
        errors.extend(batch.indices.tolist() for batch in iterator)
    assert errors == expected[: len(errors)]
    assert len(errors) < len(expected)


# Not permitted


def not_permitted(_: Path) -> None:
    # The user below may not be able to read the environment.
    import_module("filelock")
    ids = ids_of("dense")
    groups = PatchGroups.from_ids(ids)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        groups.save(folder / "closed")
        groups.save(folder / "a")
        (folder / "a.progress").write_bytes(b"left by a process that was killed")
        os.chmod(folder / "closed", 0)
        os.chmod(folder, 0o555)

        def work() -> None:
            os.setgid(65534)
            os.setuid(65534)
            before = sorted(os.listdir(folder))
            for refused_work, path in {
                lambda: groups.save(folder / "new"): "new",
                lambda: groups.save(folder / "a"): "a",
                lambda: PatchGroups.from_ids(ids, path=folder / "new"): "new",
                lambda: groups.save(folder / "closed"): "closed",
                lambda: PatchGroups.load(folder / "closed"): "closed",
                lambda: PatchGroups.from_ids(ids, path=folder / "closed"): "closed",
            }.items():
                with pytest.raises(PermissionError, match=re.escape(str(folder / path))):
                    refused_work()
            # What is there is used.
            assert PatchGroups.from_ids(ids, path=folder / "a").fingerprint == groups.fingerprint
            assert sorted(os.listdir(folder)) == before

        assert run_forked(work) == 0


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
