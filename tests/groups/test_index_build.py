"""Grouping into a file: killed, gone on with, by several at once, over what others left."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, SoftFileLock

from gpusampler import PatchGroups, read_patch_ids
from gpusampler.core import files
from gpusampler.groups import index_build
from gpusampler.groups.index_format import MAGIC, ORDER_OFFSET
from support.index_jobs import (
    BLOCK,
    SIZE,
    SlowIds,
    check_built,
    check_unfinished,
    ids_of,
    posix,
    run_job,
)
from support.processes import run_python

KINDS = ["dense", "sparse", "many", "runs"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the state after every block."""
    monkeypatch.setattr(index_build, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(index_build, "CHECKPOINT_SHARE", 1e9)


def stopped(ids: np.ndarray, folder: Path, fail_at: int) -> None:
    """Build until reading fails at a block, the first pass's or the second's."""
    with pytest.raises(OSError, match="the disk is gone"):
        PatchGroups.from_ids(SlowIds(ids, fail_at=fail_at), path=folder / "a")


BLOCKS = SIZE // BLOCK


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_is_built_is_the_one_that_is_saved(folder, tmp_path, kind):
    ids = ids_of(kind)
    groups = PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    check_built(folder, ids)
    PatchGroups.from_ids(SlowIds(ids)).save(tmp_path / "b")
    assert (folder / "a").read_bytes() == (tmp_path / "b").read_bytes()
    # The second run reads blocks to compare, and no more.
    again = SlowIds(ids)
    opened = PatchGroups.from_ids(again, path=folder / "a")
    assert again.blocks_read == []
    assert opened.fingerprint == groups.fingerprint
    check_built(folder, ids)


def kinds_and_places():
    """Where reading fails: at either end of both passes, of which runs have one."""
    slow = pytest.mark.slow("other tables, at each end of a pass")
    quick = (1, BLOCKS, BLOCKS + 1)
    return [
        pytest.param(kind, at, marks=() if kind in ("dense", "runs") or at in quick else slow)
        for kind in KINDS
        for at in (0, 1, BLOCKS - 1, BLOCKS, BLOCKS + 1, 2 * BLOCKS - 1)
        if kind != "runs" or at < BLOCKS
    ]


@pytest.mark.parametrize(("kind", "fail_at"), kinds_and_places())
def test_what_was_done_is_not_done_again(folder, kept, caplog, kind, fail_at):
    ids = ids_of(kind)
    stopped(ids, folder, fail_at)
    check_unfinished(folder, ids)
    assert os.listdir(folder) == [] or fail_at
    slow = SlowIds(ids)
    with caplog.at_level(logging.INFO, "gpusampler"):
        PatchGroups.from_ids(slow, path=folder / "a")
    at = fail_at % BLOCKS * BLOCK
    assert slow.blocks_read[0] == at
    passes = 1 if kind == "runs" else 2
    assert len(slow.blocks_read) == passes * BLOCKS - fail_at
    if fail_at:
        done = "sorted" if fail_at > BLOCKS else "counted"
        at = SIZE if fail_at == BLOCKS else at
        assert f"resuming after {at} of {SIZE} samples {done}" in caplog.text
    check_built(folder, ids)


@pytest.mark.parametrize("stops", [(3, 5, 30, 2, 9), (25, 1, 1, 1, 1), (BLOCKS, 0, 0, 0)])
def test_stopped_again_and_again(folder, kept, stops):
    ids = ids_of("sparse")
    for count in stops:
        stopped(ids, folder, min(count, BLOCKS))
        check_unfinished(folder, ids)
    PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    check_built(folder, ids)


@posix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow("several processes are killed one after the other")
def test_killed_at_random(tmp_path, kind):
    run_job(tmp_path, "killed_at_random", kind, str(random.randrange(1 << 20)))


@posix
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.battery("kills forty times as often")
def test_killed_at_random_many_times(tmp_path, kind, seed):
    run_job(tmp_path, "killed_at_random", kind, str(seed))


@posix
@pytest.mark.parametrize(
    "kind", [pytest.param("dense", marks=pytest.mark.slow("twice as many steps as runs")), "runs"]
)
def test_killed_at_every_step(tmp_path, kind):
    run_job(tmp_path, "killed_at_every_step", kind)


@posix
@pytest.mark.parametrize(
    "kill", ["killed", pytest.param("left", marks=pytest.mark.slow("four processes more"))]
)
@pytest.mark.parametrize("kind", ["dense", "runs"])
def test_several_processes_build_one_index(tmp_path, kind, kill):
    run_job(tmp_path, "many_at_once", kind, kill)


@posix
def test_processes_of_different_ids(tmp_path):
    run_job(tmp_path, "other_ids_at_once")


def test_one_that_waits_for_a_file_that_is_then_taken_away(folder):
    ids = ids_of("dense")
    lock = FileLock(folder / "a.lock")
    # Another process has it, fails before it has written anything, and leaves nothing behind.
    with ThreadPoolExecutor() as pool:
        lock.acquire()
        waiting = pool.submit(PatchGroups.from_ids, SlowIds(ids), path=folder / "a")
        time.sleep(0.3)
        assert not waiting.done()
        os.unlink(folder / "a.lock")
        lock.release()
        waiting.result(60)
    check_built(folder, ids)


def test_a_lock_file_that_is_removed_before_it_is_locked(folder, monkeypatch):
    operations, flock = [], fcntl.flock

    def remove_first(fd: int, operation: int) -> None:
        if not operations:
            os.unlink(folder / "a.lock")
        operations.append(operation)
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    ids = ids_of("dense")
    PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    assert operations.count(fcntl.LOCK_EX | fcntl.LOCK_NB) == 2
    check_built(folder, ids)


def test_several_threads_build_one_index(folder):
    ids = ids_of("dense")
    sources = [SlowIds(ids, 0.002) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda source: PatchGroups.from_ids(source, path=folder / "a"), sources))
    assert sorted(len(source.blocks_read) for source in sources) == [0, 0, 0, 2 * BLOCKS]
    check_built(folder, ids)


@posix
def test_a_child_of_a_killed_process_has_no_lock(tmp_path):
    run_job(tmp_path, "killed_with_a_child")


def test_a_link_in_place_of_the_lock_file_is_not_followed(folder):
    os.symlink(folder / "cpu_as_device", folder / "a.lock")
    with pytest.raises(OSError, match=r"a\.lock"):
        PatchGroups.from_ids(ids_of("dense"), path=folder / "a")
    assert os.listdir(folder) == ["a.lock"]


# What others left


@pytest.mark.parametrize("fail_at", [10, BLOCKS + 10])
@pytest.mark.parametrize("damage", ["empty", "cut off", "text", "other archive", "array"])
def test_progress_that_cannot_be_read(folder, kept, fail_at, damage):
    ids = ids_of("dense")
    stopped(ids, folder, fail_at)
    progress = folder / "a.progress"
    data = progress.read_bytes()
    if damage == "other archive":
        with open(progress, "wb") as file:
            np.savez(file, seen=3)
    elif damage == "array":
        with open(progress, "wb") as file:
            np.save(file, np.arange(3))
    else:
        progress.write_bytes({"empty": b"", "cut off": data[:-30], "text": b"hello"}[damage])
    slow = SlowIds(ids)
    with pytest.warns(
        UserWarning, match=r"cannot read checkpoint .*a\.progress; grouping restarts"
    ):
        PatchGroups.from_ids(slow, path=folder / "a")
    assert len(slow.blocks_read) == 2 * BLOCKS
    check_built(folder, ids)


@pytest.mark.filterwarnings("ignore:.*restarts")
def test_a_damaged_byte_of_the_progress_does_no_harm(folder, kept, monkeypatch):
    ids = ids_of("dense", 6 * BLOCK)
    stopped(ids, folder, 9)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    data = files[folder / "a.progress"]
    monkeypatch.setattr(index_build, "CHECKPOINT_SECONDS", 5.0)
    for at in random.sample(range(len(data)), 40):
        for path, content in files.items():
            path.write_bytes(content)
        (folder / "a.progress").write_bytes(
            data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
        )
        PatchGroups.from_ids(SlowIds(ids), path=folder / "a", progress=False)
        order = PatchGroups.load(folder / "a").order
        np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))
        os.unlink(folder / "a")


@pytest.mark.parametrize("fail_at", [10, BLOCKS + 10])
def test_progress_of_other_ids(folder, kept, fail_at):
    stopped(ids_of("sparse"), folder, fail_at)
    ids = ids_of("dense")
    with pytest.warns(
        UserWarning, match=r"a\.progress belongs to different ids; grouping restarts"
    ):
        PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    check_built(folder, ids)


ANEW = r"a\.progress does not match .*a\.partial; sorting restarts"


@pytest.mark.parametrize("change", ["deleted", "emptied", "cut off", "zeros"])
def test_an_order_that_is_gone_is_sorted_again(folder, kept, change):
    ids = ids_of("dense")
    stopped(ids, folder, BLOCKS + 10)
    partial = folder / "a.partial"
    size = partial.stat().st_size
    if change == "deleted":
        partial.unlink()
    elif change == "zeros":
        partial.write_bytes(bytes(size))
    else:
        os.truncate(partial, size - 1 if change == "cut off" else 0)
    slow = SlowIds(ids)
    with pytest.warns(UserWarning, match=ANEW):
        PatchGroups.from_ids(slow, path=folder / "a")
    # Counting is not.
    assert len(slow.blocks_read) == BLOCKS
    check_built(folder, ids)


def stopped_before_it_was_kept(ids: np.ndarray, folder: Path, monkeypatch: Any) -> None:
    """Build until some of the order is written and nothing of it was kept."""
    with monkeypatch.context() as patch:
        patch.setattr(index_build, "CHECKPOINT_SECONDS", 1e9)
        stopped(ids, folder, 3)


def test_an_order_that_was_begun_anew_is_not_the_one_that_was_kept(folder, kept, monkeypatch):
    ids = ids_of("dense")
    stopped(ids, folder, BLOCKS + 10)
    (folder / "a.partial").unlink()
    with pytest.warns(UserWarning, match=ANEW):
        stopped_before_it_was_kept(ids, folder, monkeypatch)
    # As long as the one that the progress is about, and empty where that was written.
    with pytest.warns(UserWarning, match=ANEW):
        PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    check_built(folder, ids)


def test_an_order_of_other_ids_is_not_the_one_that_was_kept(folder, kept, monkeypatch):
    ids, others = ids_of("dense"), ids_of("sparse")
    stopped(ids, folder, BLOCKS + 10)
    progress = (folder / "a.progress").read_bytes()
    with pytest.warns(UserWarning, match="belongs to different ids; grouping restarts"):
        stopped(others, folder, BLOCKS + 3)
    # As if the others' process had been killed before it kept anything.
    (folder / "a.progress").write_bytes(progress)
    with pytest.warns(UserWarning, match=ANEW):
        PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    check_built(folder, ids)


def test_a_head_of_other_ids_does_not_stay_over_a_new_order(folder, kept):
    others = PatchGroups.from_ids(ids_of("dense"))
    # As by a process that was killed before it gave the file its name.
    others.save(folder / "a.partial")
    ids = ids_of("sparse")
    stopped(ids, folder, BLOCKS + 10)
    check_unfinished(folder, ids)
    with pytest.raises(ValueError, match="is not an index file"):
        PatchGroups.load(folder / "a.partial")
    PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    check_built(folder, ids)


def test_an_index_without_its_name_is_given_it(folder, kept):
    ids = ids_of("dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "replace", lambda *_: (_ for _ in ()).throw(OSError("no name")))
        with pytest.raises(OSError, match="no name"):
            PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    slow = SlowIds(ids)
    PatchGroups.from_ids(slow, path=folder / "a")
    assert slow.blocks_read == []
    check_built(folder, ids)


def test_what_was_left_after_the_index_was_done_is_taken_away(folder):
    ids = ids_of("dense")
    PatchGroups.from_ids(ids, path=folder / "a")
    (folder / "a.progress").write_bytes(b"left")
    (folder / "a.progress.77-0123456789abcdef.saving").write_bytes(b"left")
    PatchGroups.from_ids(ids, path=folder / "a")
    check_built(folder, ids)


# Ids that change


class Turning(SlowIds):
    """Ids two of which change places after the first pass, between the blocks compared."""

    def blocks(self, start: int = 0, size: int = BLOCK) -> Any:
        yield from super().blocks(start, size)
        at = np.flatnonzero(self.ids != self.ids[700])
        other = at[at > 700][0]
        self.ids[[700, other]] = self.ids[[other, 700]]


def test_ids_that_change_between_the_passes_leave_nothing_to_go_on_with(folder, kept):
    ids = ids_of("dense")
    with pytest.raises(RuntimeError, match="ids changed while they were grouped"):
        PatchGroups.from_ids(Turning(ids), path=folder / "a")
    assert sorted(os.listdir(folder)) == ["a.partial"]
    PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    check_built(folder, ids)


def test_ids_whose_file_was_changed_after_it_was_opened_are_refused_the_next_time(folder, tmp_path):
    source = tmp_path / "ids.npy"
    np.save(source, ids_of("runs"))
    mapped = np.load(source, mmap_mode="r")
    ids = read_patch_ids(mapped)
    os.utime(source, ns=(0, 1))
    PatchGroups.from_ids(ids, path=folder / "a")
    with pytest.raises(ValueError, match=r"indexes different ids .*the file's modification time"):
        PatchGroups.from_ids(mapped, path=folder / "a")


def test_ids_that_change_in_a_block_that_is_compared(folder, kept, monkeypatch):
    ids = ids_of("runs")
    group = index_build.group_on_host

    def changing(*arguments: Any, **named: Any) -> Any:
        found = group(*arguments, **named)
        ids[0] += 1
        return found

    monkeypatch.setattr(index_build, "group_on_host", changing)
    with pytest.raises(RuntimeError, match="ids changed while they were grouped"):
        PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
    assert not (folder / "a").exists()
    assert not (folder / "a.progress").exists()


def test_ids_that_are_no_ids_leave_nothing_behind(folder):
    with pytest.raises(ValueError, match="ids must"):
        PatchGroups.from_ids(np.array([1, 2**63], np.uint64), path=folder / "a")
    stopped(ids_of("dense"), folder, 0)
    assert os.listdir(folder) == []


# Other systems


def test_without_locks_one_process_builds(folder, kept, monkeypatch):
    # As where the system has none; and Windows renames no file that is open.
    monkeypatch.setattr("filelock.FileLock", SoftFileLock)

    def strict(call: Any) -> Any:
        def checked(source: Any, *rest: Any, **named: Any) -> None:
            fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
            open_files = [os.readlink(fd) for fd in fds if os.path.islink(fd)]
            assert str(source) not in open_files or ".lock" in str(source)
            call(source, *rest, **named)

        return checked

    ids = ids_of("dense")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", strict(os.replace))
        patch.setattr(os, "unlink", strict(os.unlink))
        stopped(ids, folder, 0)
        assert os.listdir(folder) == []
        stopped(ids, folder, BLOCKS + 5)
        PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
        check_built(folder, ids)
        # Another process makes it between the two looks.
        there = iter([False, True])
        patch.setattr(index_build, "_is_built", lambda *_: next(there))
        PatchGroups.from_ids(SlowIds(ids), path=folder / "a")
        check_built(folder, ids)


def test_the_module_is_imported_where_there_are_no_locks(folder):
    program = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from gpusampler import PatchGroups\n"
        "assert 'filelock' not in sys.modules\n"
        "PatchGroups.from_ids([1, 0, 1], path=sys.argv[1])\n"
        "assert 'filelock' in sys.modules"
    )
    run_python("-c", program, folder / "a", timeout=60)
    check_built(folder, np.array([1, 0, 1]))


def test_an_index_that_is_there_is_opened_without_a_lock(folder):
    ids = folder.with_name("ids.npy")
    np.save(ids, ids_of("dense"))
    PatchGroups.from_ids(ids, path=folder / "a")
    program = (
        "import sys; sys.modules['filelock'] = None\n"
        "from gpusampler import PatchGroups\n"
        "PatchGroups.from_ids(sys.argv[1], path=sys.argv[2])"
    )
    run_python("-c", program, ids, folder / "a", timeout=60)
    check_built(folder, ids_of("dense"))


def test_a_filesystem_without_locks(folder, monkeypatch):
    for number in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):

        def refuses(*_: Any, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuses)
        with pytest.raises(
            OSError, match=r"cannot lock .*a: its filesystem does not support file locks"
        ):
            PatchGroups.from_ids(ids_of("dense"), path=folder / "a")


# What comes to the disk before what


def calls_of(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Note what is brought to the disk and renamed: a file with a head is "whole"."""
    noted: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_dir():
            noted.append("fsync folder")
        else:
            kind = path.suffix if path.suffix != ".saving" else "." + path.name.split(".")[1]
            whole = path.read_bytes()[: len(MAGIC)] == MAGIC
            noted.append(f"fsync {'whole ' if whole else ''}{kind}")
        fsync(fd)

    def noted_replace(source: Any, target: Any) -> None:
        noted.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return noted


LAST = ["fsync .partial", "fsync whole .partial", "rename to a", "fsync folder"]


def test_the_order_of_what_comes_to_the_disk(folder, kept, monkeypatch):
    noted = calls_of(monkeypatch, folder)
    PatchGroups.from_ids(SlowIds(ids_of("dense")), path=folder / "a")
    assert noted[-4:] == LAST
    keeping = ["fsync .progress", "rename to a.progress"]
    assert noted[: 2 * (BLOCKS + 1)] == keeping * (BLOCKS + 1)
    sorting = noted[2 * (BLOCKS + 1) : -4]
    assert sorting == ["fsync .partial", *["fsync .partial", *keeping] * (BLOCKS + 1)]
    noted.clear()
    groups = PatchGroups.from_ids(ids_of("dense"))
    groups.save(folder / "b")
    assert [entry.split()[0] for entry in noted] == ["fsync", "fsync", "rename", "fsync"]
    assert ["whole" in entry for entry in noted] == [False, True, False, False]
    assert noted[-2:] == ["rename to b", "fsync folder"]


def strace_works() -> bool:
    try:
        return subprocess.run(["strace", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not strace_works(), reason="no strace here")
def test_the_system_sees_them_in_this_order(tmp_path):
    program = (
        "import sys, numpy as np; from gpusampler import PatchGroups\n"
        "ids = np.arange(300_000) % 7\n"
        "PatchGroups.from_ids(ids, path=sys.argv[1])"
    )
    log = tmp_path / "log"
    command = ["strace", "-f", "-y", "-o", str(log), "-e", "trace=msync,fsync,rename,unlink"]
    run_python("-c", program, tmp_path / "a", launcher=command, timeout=120)
    calls = []
    for line in log.read_text().splitlines():
        call = line.split(maxsplit=1)[1].split("(")[0]
        if call == "fsync" or "a.p" in line or call == "msync":
            names = (".saving", "a.partial", "a.progress")
            calls.append((call, next((name for name in names if name in line), "folder")))
    partial = [("msync", "folder"), ("fsync", "a.partial")]
    keeping = [("fsync", ".saving"), ("rename", ".saving")]
    done = [
        ("msync", "folder"),
        ("fsync", "a.partial"),
        ("fsync", "a.partial"),
        ("rename", "a.partial"),
        ("fsync", "folder"),
        ("unlink", "a.progress"),
    ]
    assert calls == keeping + partial + partial + keeping + done


def test_the_progress_is_small_and_plain(folder, kept):
    stopped(ids_of("dense"), folder, BLOCKS + 3)
    with np.load(folder / "a.progress", allow_pickle=False) as kept_state:
        state = dict(kept_state)
    assert int(state["written"]) == 3 * BLOCK
    assert json.loads(str(state["signature"]))["size"] == SIZE
    assert (folder / "a.progress").stat().st_size < 20_000
    assert (folder / "a.partial").stat().st_size == ORDER_OFFSET + 4 * SIZE


def test_a_patch_that_is_too_large_is_refused_before_any_order_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr("gpusampler.groups.census.MAX_PATCH_SAMPLES", 1000)
    path = tmp_path / "ids.index"
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 samples, got 1001 in patch 'b'"):
        PatchGroups.from_ids(["a", "b", "a", *["b"] * 1000], path=path)
    assert not path.exists()
    assert (tmp_path / "ids.index.partial").stat().st_size == 0


def test_what_groups_are_is_said_even_when_their_file_has_changed(tmp_path):
    groups = PatchGroups.from_ids(np.arange(1000) % 3, path=tmp_path / "ids.index")
    said, size = repr(groups), groups.nbytes
    os.truncate(tmp_path / "ids.index", 100)
    assert (repr(groups), groups.nbytes) == (said, size)
    assert "order=int32" in said
    with pytest.raises(OSError, match="changed while it was in use"):
        _ = groups.order


def test_ids_of_no_file_are_compared_whole_when_their_index_is_opened(folder):
    ids = ids_of("dense")
    PatchGroups.from_ids(ids, path=folder / "a")
    check_built(folder, ids)
    PatchGroups.from_ids(ids.copy(), path=folder / "a")
    changed = ids.copy()
    # Between the blocks that a signature is made of.
    changed[1000] += 1
    PatchGroups.load(folder / "a", source=changed)
    with pytest.raises(ValueError, match=r"indexes different ids \(fingerprints differ\)"):
        PatchGroups.from_ids(changed, path=folder / "a")
    check_built(folder, ids)


def test_another_file_at_the_path_is_left_alone(folder):
    np.save(folder / "ids.npy", np.arange(5))
    with pytest.raises(ValueError, match="exists and is not an index file"):
        PatchGroups.from_ids(folder / "ids.npy", path=folder / "ids.npy")
    assert np.load(folder / "ids.npy").tolist() == [0, 1, 2, 3, 4]
    assert os.listdir(folder) == ["ids.npy"]


def test_a_selection_is_compared_with_its_ids_in_every_block(folder):
    ids = ids_of("dense")
    chosen = np.arange(0, SIZE, 3)
    PatchGroups.from_ids(ids).select(chosen).save(folder / "a")
    assert SIZE > 2 * BLOCK
    groups = PatchGroups.load(folder / "a", source=SlowIds(ids), verify=True)
    assert groups.num_samples == chosen.size
    changed = ids.copy()
    # Of what was not chosen nothing is known; of what was, in the last block too, everything.
    changed[SIZE - 1 - (SIZE - 1) % 3 - 1] += 1
    PatchGroups.load(folder / "a", source=SlowIds(changed), verify=True)
    changed[SIZE - 1 - (SIZE - 1) % 3] += 1
    with pytest.raises(ValueError, match=r"must match the index .*: fingerprints differ"):
        PatchGroups.load(folder / "a", source=SlowIds(changed), verify=True)
