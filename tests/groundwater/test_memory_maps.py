"""Patch folders larger than memory: what is read, in which order, and what stays open."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
import tqdm
from torch.utils.data import DataLoader

from gpusampler import PatchBatchSampler
from gpusampler.core.npy_header import NpyHeader
from gpusampler.groundwater import GWPatchDataset, Normalize, folder
from gpusampler.groundwater.reader import _read_windows
from support.processes import run_python

FILES = ("core_coords", "core_obs", "ghost_coords", "ghost_obs")
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts in /proc")


def write_patch(root: Path, patch_id: int, core: int = 3, ghost: int = 1, steps: int = 24) -> Path:
    rng = np.random.default_rng(abs(patch_id))
    path = root / f"patch_{patch_id}"
    path.mkdir(parents=True)
    for prefix, points in (("core", core), ("ghost", ghost)):
        np.save(path / f"{prefix}_coords.npy", rng.normal(size=(points, 3)))
        np.save(path / f"{prefix}_obs.npy", rng.normal(size=(steps, points, 3)).astype("f4"))
    return path


def write_sparse(root: Path, patch_id: int, steps: int, points: int) -> int:
    """Write a patch of zeros that takes no room on the disk; return its bytes."""
    path = write_patch(root, patch_id, points, 0, steps=1)
    np.save(path / "ghost_obs.npy", np.zeros((steps, 0, 3), "f4"))
    with open(path / "core_obs.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (steps, points, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        size = steps * points * 12
        file.truncate(file.tell() + size)
    return size


def open_files(root: Path) -> int:
    """Return how many files under a folder this process has open."""
    count = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{entry}").startswith(str(root))
        except OSError:  # closed meanwhile, or the listing's own
            continue
    return count


def open_maps(root: Path) -> int:
    return sum(str(root) in line for line in Path("/proc/self/maps").read_text().splitlines())


def run(code: str, *arguments: object) -> list[str]:
    """Run code in a process of its own, which may be killed; return the lines it printed."""
    variables = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return run_python("-c", code, *arguments, **variables).stdout.splitlines()


# What is read


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2", "<i2", "<u8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_equal_the_files_bit_for_bit(tmp_path, dtype, order):
    rng = np.random.default_rng(3)
    for patch_id in (0, 7, 12):
        path = write_patch(tmp_path, patch_id, steps=40)
        obs = (rng.normal(size=(40, 3, 3)) * 50).astype(dtype)
        if obs.dtype.kind == "f":
            obs[rng.random(obs.shape) < 0.1] = np.nan
        np.save(path / "core_obs.npy", np.asarray(obs, order=order))
    for inputs, outputs, stride, targets in (
        *((6, 1, None, None), (5, 3, 1, ["pressure", "head"]), (2, 2, 9, None)),
        *((4, 2, 6, "head"), (3, 3, 2, [0, 1, 2]), (1, 1, 1, [2, 1, 0])),
    ):
        dataset = GWPatchDataset(
            tmp_path, inputs, outputs, stride=stride, split="all", target_columns=targets
        )
        starts = dataset.windows.starts()
        columns = [dataset.columns.index(name) for name in dataset.target_columns]
        for size in (1, 2, 9, 40):
            rows = rng.integers(0, len(dataset), size)  # of all patches, some of them twice
            for row, sample in zip(rows.tolist(), dataset.__getitems__(rows), strict=True):
                patch, window = divmod(row, len(starts))
                path, first = dataset.patches[patch].path, starts[window]
                assert sample["patch_id"] == dataset.patches[patch].patch_id
                for prefix in ("core", "ghost"):
                    obs = np.load(path / f"{prefix}_obs.npy").astype(np.float32)
                    cut, last = first + inputs, first + inputs + outputs
                    for part, expected in (
                        ("in", obs[first:cut]),
                        ("out", obs[cut:last][..., columns]),
                    ):
                        values = sample[f"{prefix}_{part}"]
                        assert values.is_contiguous()
                        assert values.numpy().tobytes() == expected.tobytes()


class Recorder:
    """An array that notes which steps are read."""

    def __init__(self, steps: int) -> None:
        self.array = np.arange(steps * 2, dtype=np.float64).reshape(steps, 2, 1)
        self.shape = self.array.shape
        self.read: list[int] = []

    def __getitem__(self, steps: slice) -> np.ndarray:
        assert isinstance(steps, slice)
        self.read += range(len(self.array))[steps]
        return self.array[steps]


@pytest.mark.parametrize("length", [1, 3, 7])
def test_steps_are_read_once_and_forwards(length):
    rng = np.random.default_rng(length)
    for size in (0, 1, 2, 5, 30):
        obs, starts = Recorder(60), rng.integers(0, 60 - length + 1, size)
        windows = _read_windows(obs, starts, length)
        steps = starts[:, None] + np.arange(length)
        assert windows.dtype == np.float32
        assert np.array_equal(windows, obs.array[steps])
        assert obs.read == np.unique(steps).tolist()


def test_samples_of_a_batch_share_no_value(tmp_path):
    write_patch(tmp_path, 0)
    dataset = GWPatchDataset(tmp_path, 4, 2, stride=1)
    rows = [3, 3, 4, 2, 9]
    untouched = dataset.__getitems__(rows)
    for row in range(len(rows)):
        samples = dataset.__getitems__(rows)
        for key, value in samples[row].items():
            if isinstance(value, torch.Tensor):
                value.fill_(-1.0)
                for other in range(len(rows)):
                    for name, tensor in untouched[other].items():
                        if name != "patch_id" and (other, name) != (row, key):
                            assert torch.equal(samples[other][name], tensor)
                value.copy_(untouched[row][key])


# What stays open


@linux
def test_open_files_and_maps_are_bounded(tmp_path):
    for patch_id in range(60):
        write_patch(tmp_path, patch_id)
    dataset = GWPatchDataset(tmp_path, 4, 1, max_open_patches=3)
    assert open_files(tmp_path) == open_maps(tmp_path) == 0  # the constructor leaves none
    max_open = 0
    for rows in PatchBatchSampler(dataset, 5, seed=0, device="numpy", progress=False):
        dataset.__getitems__(rows)
        max_open = max(max_open, open_files(tmp_path))
        assert open_maps(tmp_path) <= 4 * 3
    assert max_open == 4 * 3
    dataset.__getitems__(np.random.default_rng(0).permutation(len(dataset)))
    Normalize.from_dataset(dataset)
    assert open_files(tmp_path) == open_maps(tmp_path) == 4 * 3


@linux
def test_threads_that_read_keep_to_the_bound(tmp_path):
    for patch_id in range(60):
        write_patch(tmp_path, patch_id)
    threads, most_open, per_thread = 4, 3, 150
    dataset = GWPatchDataset(tmp_path, 4, 1, max_open_patches=most_open)
    expected = [dataset[i]["core_in"].numpy().tobytes() for i in range(len(dataset))]
    most, wrong = [0], []

    def read(seed: int) -> None:
        try:
            for i in np.random.default_rng(seed).integers(0, len(dataset), per_thread).tolist():
                if dataset[i]["core_in"].numpy().tobytes() != expected[i]:
                    wrong.append(i)
                most.append(open_files(tmp_path))
        except Exception as error:  # told below: a thread's own is only a warning
            wrong.append(error)

    pool = [threading.Thread(target=read, args=(seed,)) for seed in range(threads)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    # One patch more for each thread, which may just have a file open to read its header, too.
    assert max(most) <= 4 * (most_open + threads) + threads
    assert open_files(tmp_path) == 4 * most_open


class Counted:
    """Transform that notes how many files the worker has open."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, sample: dict) -> dict:
        return {**sample, "open": open_files(self.root)}


@linux
# Python 3.12 and later warn of every fork beside a thread, and torch has threads.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "start",
    ["fork", pytest.param("spawn", marks=pytest.mark.slow("spawned workers import torch anew"))],
)
def test_workers_keep_to_the_bound(tmp_path, start):
    for patch_id in range(30):
        write_patch(tmp_path, patch_id)
    dataset = GWPatchDataset(
        tmp_path, 4, 1, max_open_patches=3, transform=Counted(tmp_path), stride=4
    )
    dataset.__getitems__(np.arange(len(dataset)))  # maps that a forked worker inherits
    sampler = PatchBatchSampler(dataset, 5, seed=0, device="numpy", progress=False)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=dataset.collate_fn,
        num_workers=2,
        multiprocessing_context=start,
    )
    counts = [count for batch in loader for count in batch["open"]]
    assert len(counts) == len(dataset)
    assert max(counts) == 4 * 3


# Memory

MEMORY = """
import resource, sys
import numpy as np, torch
from gpusampler import GWPatchDataset, PatchBatchSampler
from gpusampler.groundwater import Normalize

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024

root, room, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
# Every allocation beyond it fails; a file that is mapped to be read is none.
limit = status("VmData") + room
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = status("RssAnon")
most = 0
dataset = GWPatchDataset(root, 6, 2, max_open_patches=2)
if what == "read":
    sampler = PatchBatchSampler(dataset, 2, seed=0, device="numpy", progress=False)
    for rows in sampler:
        samples = dataset.__getitems__(rows)
        most = max(most, status("RssAnon") - before)
if what == "statistics":
    Normalize.from_dataset(dataset)
most = max(most, status("RssAnon") - before)
print(dataset.nbytes, most)
"""


@linux
@pytest.mark.parametrize(
    ("what", "patches", "steps", "points", "room"),
    [
        # Headers of 2 TB of files; 1.2 GB of which every training step is read.
        ("headers", 100, 40_000, 41_667, 32 << 20),
        ("read", 4, 250, 100_000, 192 << 20),
        ("statistics", 4, 60, 100_000, 64 << 20),
    ],
)
@pytest.mark.serial("measures memory")
def test_memory_is_bounded_by_the_batch(tmp_path, what, patches, steps, points, room):
    size = sum(write_sparse(tmp_path, patch_id, steps, points) for patch_id in range(patches))
    nbytes, most = map(int, run(MEMORY, tmp_path, room, what)[0].split())
    assert nbytes >= size > 4 * room
    assert most < room


# Files that go wrong


SHRINKING = """
import os, sys
from pathlib import Path
from gpusampler.groundwater import GWPatchDataset, Normalize

dataset = GWPatchDataset(sys.argv[1], 4, 1)
reads = [lambda: dataset[5], lambda: Normalize.from_dataset(dataset)]
for path in sorted(Path(sys.argv[1]).rglob("*.npy")):
    content = path.read_bytes()
    for read in reads:
        read()
        os.truncate(path, 200)
        for attempt in range(2):
            try:
                read()
            except (OSError, ValueError) as error:
                print(type(error).__name__, error)
        with open(path, "r+b") as file:
            file.write(content)
        read()
print("read again")
"""


def test_a_file_that_shrinks_is_an_error_and_not_the_end(tmp_path):
    # Files of several pages: the end of the last page may be read in any case.
    path = write_patch(tmp_path, 4, core=500, ghost=500)
    lines = run(SHRINKING, tmp_path)
    assert lines.pop() == "read again"
    for name in FILES:
        size = (path / f"{name}.npy").stat().st_size
        for _ in ("a sample", "statistics"):
            assert lines.pop(0) == (
                f"OSError patch_4/{name}.npy has shrunk to 200 bytes since it was mapped, "
                f"but its array needs {size}: restore the file"
            )
            text = f"ValueError patch_4/{name}.npy cannot be mapped as a .npy array"
            assert lines.pop(0).startswith(text)
    assert lines == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_refused_by_the_constructor(tmp_path, name):
    path = write_patch(tmp_path, 4, core=50, ghost=50) / f"{name}.npy"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"^patch_4/{name}.npy cannot be mapped as a .npy array"):
        GWPatchDataset(tmp_path, 4, 1)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_shape_is_noticed(tmp_path, name):
    path = write_patch(tmp_path, 4) / f"{name}.npy"
    dataset = GWPatchDataset(tmp_path, 4, 1)
    array = np.load(path)
    np.save(path, np.concatenate([array, array[:1]]))
    with pytest.raises(
        ValueError, match=rf"patch_4 changed on disk since the dataset was made: {name}.npy has"
    ):
        dataset[0]


def test_a_file_that_vanishes(tmp_path):
    for patch_id in (3, 4):
        write_patch(tmp_path, patch_id)
    dataset = GWPatchDataset(tmp_path, 4, 1)
    before = dataset[0]["core_in"]
    shutil.rmtree(tmp_path / "patch_3")
    shutil.rmtree(tmp_path / "patch_4")
    assert torch.equal(dataset[0]["core_in"], before)  # what is mapped is still there
    with pytest.raises(FileNotFoundError, match=r"^patch_4/core_coords.npy is missing: no file"):
        dataset[-1]


def _opens_badly(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    plain = folder.read_npy_header

    def read(file: BinaryIO) -> NpyHeader:
        if file.name.endswith(os.path.join("patch_4", "ghost_obs.npy")):
            raise error
        return plain(file)

    monkeypatch.setattr(folder, "read_npy_header", read)


@pytest.mark.parametrize("when", ["constructor", "read"])
def test_files_that_cannot_be_opened_are_named(tmp_path, monkeypatch, when):
    write_patch(tmp_path, 4)
    dataset = GWPatchDataset(tmp_path, 4, 1)
    denied = PermissionError(errno.EACCES, "Permission denied")
    _opens_badly(monkeypatch, denied)
    text = r"patch_4/ghost_obs.npy cannot be opened: Permission denied"
    with pytest.raises(PermissionError, match=text) as caught:
        dataset[0] if when == "read" else GWPatchDataset(tmp_path, 4, 1)
    assert caught.value.errno == errno.EACCES
    assert caught.value.filename == str(tmp_path / "patch_4" / "ghost_obs.npy")


def test_a_folder_in_place_of_a_file(tmp_path):
    path = write_patch(tmp_path, 4) / "core_obs.npy"
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"patch_4/core_obs.npy cannot be opened"):
        GWPatchDataset(tmp_path, 4, 1)


@linux
def test_too_many_open_files_says_what_to_do(tmp_path):
    for patch_id in range(12):
        write_patch(tmp_path, patch_id)
    code = """
import os, resource, sys
import torch
from gpusampler.groundwater import GWPatchDataset
few, many = (GWPatchDataset(sys.argv[1], 4, 1, max_open_patches=n) for n in (2, 12))
few[0], many[0]
room = len(os.listdir("/proc/self/fd")) + 20
resource.setrlimit(resource.RLIMIT_NOFILE, (room, room))
few.__getitems__(range(len(few)))
try:
    many.__getitems__(range(len(many)))
except OSError as error:
    print(error)
"""
    (text,) = run(code, tmp_path)
    assert "npy cannot be opened: Too many open files; reduce max_open_patches" in text
    assert "[Errno 24] patch_" in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("after", "progress"), [(0.0, True), (0.0, False), (60.0, True)])
def test_bars_for_what_takes_long(tmp_path, monkeypatch, after, progress):
    for patch_id in range(3):
        write_patch(tmp_path, patch_id)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)
    monkeypatch.setattr("gpusampler.core.progress_bar.SHOW_AFTER_SECONDS", after)
    dataset = GWPatchDataset(tmp_path, 2, 1, progress=progress)
    Normalize.from_dataset(dataset, progress=progress)
    terminal_text = terminal.getvalue()
    for label in ("reading headers", "statistics"):
        assert (label in terminal_text) == (progress and after == 0)
