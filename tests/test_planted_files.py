"""Files that somebody else planted: no path waits for ever, no link is written through."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from gpusampler import PatchGroups, calibrate
from gpusampler.cli.main import cli
from gpusampler.core import files
from gpusampler.demo.job import PICTURE, REPORT
from gpusampler.groundwater.folder import PatchArrays, open_arrays
from gpusampler.groups import index_build
from gpusampler.sources.dispatch import read_patch_ids
from support.index_jobs import posix

pytestmark = posix

IDS = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 100))
NOT_MINE = "secret"


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise AssertionError("waits for a FIFO or a device")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _need(module: str) -> None:
    if not find_spec(module):
        pytest.skip(f"{module} is not installed")


def _read_column_of_folder(path: Path) -> None:
    _need("pyarrow")
    folder = path.parent / "many.parquet"
    folder.mkdir()
    path.rename(folder / "a.parquet")
    read_patch_ids(folder)


def _read_hdf5(path: Path) -> None:
    _need("h5py")
    read_patch_ids(path.rename(path.with_suffix(".h5")))


def _open_patch(path: Path) -> None:
    for name in PatchArrays._fields:
        np.save(path.parent / f"{name}.npy", np.zeros((2, 3)))
    path.replace(path.parent / "core_obs.npy")
    open_arrays(path.parent)


def _command(*arguments: object) -> None:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    raise OSError(result.stderr)


def _draw_inspection(path: Path, *options: object) -> None:
    _need("matplotlib")
    np.save(path.parent / "ids.npy", IDS)
    _command("inspect", path.parent / "ids.npy", "--batch-size", 8, "--out", path, *options)


def _demo(name: str, path: Path) -> None:
    for module in ("torch", "neuralop", "matplotlib"):
        _need(module)
    path.rename(path.parent / name)
    with pytest.MonkeyPatch.context() as patch:
        # Refused before the training: without the function, that would be a TypeError.
        patch.setattr("gpusampler.demo.job.train", None)
        _command("demo", "--epochs", 1, "--out", path.parent)


def _calibrate(path: Path) -> None:
    from gpusampler.calibration.calibrate import _check_picture

    assert calibrate
    _check_picture(path)


USES = {
    "ids": read_patch_ids,
    "ids in .npy": lambda path: read_patch_ids(path.rename(path.with_suffix(".npy"))),
    "ids in Parquet": lambda path: read_patch_ids(path.rename(path.with_suffix(".parquet"))),
    "ids in a folder of Parquet": _read_column_of_folder,
    "ids in HDF5": _read_hdf5,
    "load": PatchGroups.load,
    "save": lambda path: PatchGroups.from_ids(IDS).save(path),
    "index of from_ids": lambda path: PatchGroups.from_ids(IDS, path=path),
    "a patch's array": _open_patch,
    "inspect": lambda path: _command("inspect", path, "--batch-size", 8),
    "inspect --out": _draw_inspection,
    "inspect --epoch --out": lambda path: _draw_inspection(path, "--epoch", 0),
    "demo picture": lambda path: _demo(PICTURE, path),
    "demo report": lambda path: _demo(REPORT, path),
    "calibrate picture": _calibrate,
}


@pytest.mark.parametrize("use", USES)
def test_a_fifo_is_refused(tmp_path, use):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(OSError, match="expected a regular file, got a FIFO"):
        USES[use](path)


@pytest.mark.parametrize("use", ["ids", "load", "save", "index of from_ids", "inspect"])
def test_a_device_is_refused(use):
    # /dev/zero has no end, so reading it would never end either.
    with pytest.raises(OSError, match="expected a regular file, got a device"):
        USES[use](Path("/dev/zero"))


@pytest.mark.parametrize("name", ["a.partial", "a.progress", "a.lock"])
def test_a_fifo_beside_the_index_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="expected a regular file, got a FIFO"):
        PatchGroups.from_ids(IDS, path=tmp_path / "a")


@pytest.mark.parametrize("name", ["a.partial", "a.progress", "a.lock"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link"])
def test_links_beside_the_index_are_refused(tmp_path, name, kind):
    victim = tmp_path / "victim"
    if kind != "dangling link":
        victim.write_text(NOT_MINE)
    if kind == "hard link":
        os.link(victim, tmp_path / name)
    else:
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(OSError, match=r"symbolic link|hard link"):
        PatchGroups.from_ids(IDS, path=tmp_path / "a")
    assert not victim.exists() if kind == "dangling link" else victim.read_text() == NOT_MINE
    assert not (tmp_path / "a").exists()


def test_the_old_name_of_the_new_checkpoint_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(index_build, "CHECKPOINT_SHARE", 1e9)
    victim = tmp_path / "victim"
    victim.write_text(NOT_MINE)
    (tmp_path / "a.progress.saving").symlink_to(victim)
    names = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(a.name), replace(a, b)))
    assert PatchGroups.from_ids(IDS, path=tmp_path / "a").num_samples == IDS.size
    assert victim.read_text() == NOT_MINE
    temporaries = [name for name in names if name.startswith("a.progress")]
    assert len(temporaries) > 1
    assert len(set(temporaries)) == len(temporaries)
    assert sorted(os.listdir(tmp_path)) == ["a", "a.progress.saving", "victim"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root for chown")
@pytest.mark.parametrize("name", ["a.partial", "a.progress"])
def test_a_file_of_another_user_is_not_adopted(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(1 << 16))
    os.chown(tmp_path / name, 12345, 12345)
    with pytest.raises(PermissionError, match=f"belongs to another user .uid 12345.*{name}"):
        PatchGroups.from_ids(IDS, path=tmp_path / "a")
    assert (tmp_path / name).read_bytes() == bytes(1 << 16)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_replaced_index_keeps_its_permissions(tmp_path, monkeypatch, mode):
    path = tmp_path / "a"
    groups = PatchGroups.from_ids(IDS)
    groups.save(path)
    path.chmod(mode)
    seen = []
    fchmod = os.fchmod

    def watching(fd: int, new_mode: int) -> None:
        seen.append(os.fstat(fd).st_mode & 0o777)
        fchmod(fd, new_mode)

    monkeypatch.setattr(os, "fchmod", watching)
    groups.save(path)
    assert path.stat().st_mode & 0o777 == mode
    # Nobody else may open it before, either.
    assert seen == [0o600]


def test_a_link_at_the_random_name_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "urandom", bytes)
    (tmp_path / "victim").write_text(NOT_MINE)
    name = f"a.{os.getpid()}-{bytes(8).hex()}.saving"
    (tmp_path / name).symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        PatchGroups.from_ids(IDS).save(tmp_path / "a")
    assert (tmp_path / "victim").read_text() == NOT_MINE


def test_a_new_index_has_the_permissions_of_a_new_file(tmp_path):
    (tmp_path / "other").touch()
    PatchGroups.from_ids(IDS).save(tmp_path / "a")
    PatchGroups.from_ids(IDS, path=tmp_path / "b")
    expected = (tmp_path / "other").stat().st_mode
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode == expected


def test_a_link_to_an_index_is_replaced_and_not_followed(tmp_path):
    PatchGroups.from_ids(IDS).save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    (tmp_path / "link").symlink_to("a")
    PatchGroups.from_ids(IDS[:500]).save(tmp_path / "link")
    assert (tmp_path / "a").read_bytes() == before
    assert not (tmp_path / "link").is_symlink()


def test_the_file_is_checked_again_after_it_was_opened(tmp_path, monkeypatch):
    """The path may be exchanged between a look at it and the opening."""
    monkeypatch.setattr(files, "check_regular", lambda *_, **__: None)
    monkeypatch.setattr(files, "check_single_name", lambda _: None)
    os.mkfifo(tmp_path / "fifo")
    for open_file in (files.open_regular, files.open_own):
        with pytest.raises(OSError, match="got a FIFO"):
            open_file(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        files.open_regular(tmp_path / "folder")
    (tmp_path / "file").write_text(NOT_MINE)
    (tmp_path / "link").symlink_to("file")
    os.link(tmp_path / "file", tmp_path / "second")
    with pytest.raises(OSError, match="has 2 names"):
        files.open_own(tmp_path / "second", create=True)
    with pytest.raises(OSError, match="symbolic links"):
        files.open_own(tmp_path / "link", create=True)
    # With a reader, a FIFO opens for writing.
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="got a FIFO"):
        files.open_output(tmp_path / "fifo")
    os.close(reader)


def test_an_output_takes_the_place_of_all_of_the_old_one(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(NOT_MINE)
    path.chmod(0o600)
    for content in (b"new", b""):
        with files.open_output(path) as file:
            file.write(content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o600
