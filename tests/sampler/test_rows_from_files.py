"""PatchTensorLoader over HDF5 datasets, zarr arrays and memory maps: the same as in memory."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
import time
import traceback
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("h5py")
pytest.importorskip("zarr")

import h5py
import torch
import zarr

from gpusampler import PatchBatchSampler, PatchTensorLoader
from gpusampler.sampler import file_rows, tensor_loader
from gpusampler.sampler.file_rows import Hdf5Rows, MappedHdf5Rows, MappedRows, ZarrRows, in_file
from support.fake_streams import entries_named, late_side_streams
from support.processes import run_python
from support.strategies import IDS, draw, epoch_of, make, quiet, through_json

N = IDS.size
IS_ZARR_3 = int(zarr.__version__.split(".")[0]) >= 3
THREAD = "gpusampler-rows"


def hdf5(path, values, mode="r", driver=None, userblock=0, **options):
    with h5py.File(path, "w", userblock_size=userblock) as file:
        file.create_dataset("x", data=values, **options)
    return h5py.File(path, mode, driver=driver)["x"]


def external(path, values):
    """An HDF5 dataset whose values are in another file."""
    values.tofile(f"{path}.raw")
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "x", values.shape, values.dtype, external=[(f"{path}.raw", 0, values.nbytes)]
        )
    return h5py.File(path, "r")["x"]


def virtual(path, values):
    """A virtual HDF5 dataset of two parts."""
    half = len(values) // 2
    layout = h5py.VirtualLayout(values.shape, values.dtype)
    with h5py.File(path, "w") as file:
        for name, part in (("a", slice(half)), ("b", slice(half, None))):
            stored = file.create_dataset(name, data=values[part])
            layout[part] = h5py.VirtualSource(stored)
        file.create_virtual_dataset("x", layout)
    return h5py.File(path, "r")["x"]


def large_chunks(path, values):
    """HDF5 chunks without filters that do not fit in the chunk cache."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=values, chunks=(64, *values.shape[1:]))
    return h5py.File(path, "r", rdcc_nbytes=100)["x"]


def zarr_array(path, values, **options):
    if IS_ZARR_3:
        array = zarr.create_array(path, shape=values.shape, dtype=values.dtype, **options)
    else:
        array = zarr.open_array(path, "w", shape=values.shape, dtype=values.dtype, **options)
    array[:] = values
    return zarr.open_array(path, mode="r")


def chunks_of(values, rows, columns=None):
    """Chunks of some rows, and of some columns of the last dimension."""
    return (rows, *values.shape[1:-1], columns or values.shape[-1])[: values.ndim]


def mapped(path, values):
    np.save(f"{path}.npy", values)
    return np.load(f"{path}.npy", mmap_mode="r")


KINDS = {
    "hdf5": hdf5,
    "hdf5, writable": lambda p, v: hdf5(p, v, "r+"),
    "hdf5, in memory": lambda p, v: hdf5(p, v, driver="core"),
    "hdf5, userblock": lambda p, v: hdf5(p, v, userblock=512),
    "hdf5, chunks": lambda p, v: hdf5(p, v, chunks=chunks_of(v, 7)),
    "hdf5, chunks of a row": lambda p, v: hdf5(p, v, chunks=chunks_of(v, 1)),
    "hdf5, columns, gzip": lambda p, v: hdf5(
        p, v, chunks=chunks_of(v, 16, 1), compression="gzip", shuffle=True
    ),
    "hdf5, large chunks": large_chunks,
    "hdf5, external": external,
    "hdf5, virtual": virtual,
    "zarr": lambda p, v: zarr_array(p, v, chunks=chunks_of(v, 7)),
    "zarr, columns": lambda p, v: zarr_array(p, v, chunks=chunks_of(v, 100, 1)),
    "zarr, format 2": lambda p, v: zarr_array(p, v, chunks=chunks_of(v, 16), zarr_format=2),
    "zarr, shards": lambda p, v: zarr_array(p, v, chunks=chunks_of(v, 5), shards=chunks_of(v, 20)),
    "memory map": mapped,
    "memory map, columns": lambda p, v: mapped(p, np.ascontiguousarray(v.T)).T,
}
NEEDS_ZARR_3 = {"zarr, format 2", "zarr, shards"}
FEW = ["hdf5", "hdf5, chunks", "zarr", "memory map"]
SETTINGS = [
    {},
    {"partial": "pad", "batch_size": 9},
    {"partial": "drop"},
    {"partial": "even", "batch_size": 8},
    {"interleave": False, "batch_size": 60},
    {"batch_size": 1},
    {"num_replicas": 3, "rank": 2},
    {"num_replicas": 100, "rank": 71, "batch_size": 9},
]


@pytest.fixture(autouse=True)
def no_thread_left():
    """Every test ends without a reading thread."""
    yield
    gc.collect()
    wait_for_threads(0)


@pytest.fixture(params=KINDS)
def store(request, tmp_path):
    """A function that writes values to a file, and returns the array there."""
    return storer(request.param, tmp_path)


@pytest.fixture(params=FEW)
def common(request, tmp_path):
    """As `store`, of the common kinds."""
    return storer(request.param, tmp_path)


def storer(kind, folder):
    if kind in NEEDS_ZARR_3 and not IS_ZARR_3:
        pytest.skip("zarr 2 makes no such array")
    count = iter(range(100))
    return lambda values: KINDS[kind](str(folder / f"{next(count)}"), values)


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def wait_for_threads(count) -> None:
    deadline = time.monotonic() + 5
    while len(reading_threads()) != count and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(reading_threads()) == count


def some_values(size=N, width=6, seed=0):
    return np.random.default_rng(seed).random((size, width), np.float32)


def check_equal(actual, expected) -> None:
    """Hold batches against those of a loader in memory."""
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert list(a) == list(b)
        assert (a["patch_id"], a["valid"]) == (b["patch_id"], b["valid"])
        for name in a.keys() - {"patch_id", "valid"}:
            one, other = np.asarray(a[name]), np.asarray(b[name])
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


WINDOWS = [(4000, 300), (1 << 27, 1 << 20), (1, 1 << 20), (1 << 27, 1)]
"""Bytes to read ahead, and bytes that are gathered at once."""


def settings_and_windows():
    """By default small windows for all settings, and one window for one process and for a rank."""
    slow = pytest.mark.slow("every pair of settings and windows, for each kind of file")
    quick = [(0, i) for i in range(len(SETTINGS))] + [(1, 0), (1, 6)]
    return [
        pytest.param(SETTINGS[i], WINDOWS[j], marks=() if (j, i) in quick else slow)
        for j, i in np.ndindex(len(WINDOWS), len(SETTINGS))
    ]


class TestEqual:
    @pytest.mark.parametrize(("settings", "window"), settings_and_windows(), ids=str)
    def test_batches_are_those_in_memory(self, store, monkeypatch, settings, window):
        ahead, chunk = window
        monkeypatch.setattr(tensor_loader, "HOST_GATHER_BYTES", chunk)
        x = some_values()
        sampler = quiet(IDS, **{"seed": 1, "batch_size": 4, **settings})
        loader = PatchTensorLoader(sampler, read_ahead_bytes=ahead, x=store(x), row=np.arange(N))
        for epoch in (0, 3):
            loader.set_epoch(epoch)
            actual = list(loader)
            assert len(loader) == len(actual)
            in_memory = PatchTensorLoader(sampler, x=x, row=np.arange(N))
            in_memory.set_epoch(epoch)
            check_equal(actual, list(in_memory))
            assert {type(batch["x"]) for batch in actual} == {np.ndarray}
            actual[0]["x"][:] = 0

    @pytest.mark.parametrize("piece", [1, 100, 1 << 22])
    @pytest.mark.parametrize("cell", [1, 100, 1 << 15])
    def test_pieces_of_any_size(self, store, monkeypatch, piece, cell):
        monkeypatch.setattr(file_rows, "PIECE_BYTES", piece)
        monkeypatch.setattr(file_rows, "CELL_BYTES", cell)
        x = some_values()
        loader = PatchTensorLoader(make(), read_ahead_bytes=3000, x=store(x))
        check_equal(list(loader), list(PatchTensorLoader(make(), x=x)))

    @pytest.mark.parametrize(
        "dtype", ["bool", "uint8", "int16", "uint64", "float16", "float64", "complex64", ">i4"]
    )
    @pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
    def test_any_dtype_and_shape(self, common, dtype, shape):
        x = (np.random.default_rng(0).random((N, *shape)) * 100).astype(dtype)
        array = common(x)
        # zarr 3 keeps the byte order to itself.
        x = x.astype(array.dtype)
        check_equal(list(PatchTensorLoader(make(), x=array)), list(PatchTensorLoader(make(), x=x)))

    @pytest.mark.parametrize("kind", ["hdf5", "memory map"])
    def test_rows_of_nothing(self, tmp_path, kind):
        x = np.zeros((N, 0, 2))
        if kind == "hdf5":
            array = storer(kind, tmp_path)(x)
        else:
            array = x.view(np.memmap)
        check_equal(list(PatchTensorLoader(make(), x=array)), list(PatchTensorLoader(make(), x=x)))

    def test_several_files_and_tensors_in_one_batch(self, tmp_path):
        x, z = some_values(), np.arange(N) * 1.5
        loader = PatchTensorLoader(
            make(),
            read_ahead_bytes=2000,
            x=storer("hdf5, chunks", tmp_path)(x),
            row=torch.arange(N),
            z=storer("zarr", tmp_path / "z")(z),
        )
        in_memory = PatchTensorLoader(make(), x=x, row=torch.arange(N), z=z)
        check_equal(list(loader), list(in_memory))

    def test_parts_of_the_groups_index_the_whole_file(self, common):
        x = some_values()
        part = make().plan.groups.select(np.flatnonzero(np.arange(N) % 3))
        loaders = (
            PatchTensorLoader(PatchBatchSampler(part, 4, seed=1), x=array)
            for array in (common(x), x)
        )
        check_equal(*map(list, loaders))

    def test_values_that_were_never_written_are_the_fill_value(self, tmp_path):
        for userblock in (0, 512):
            path = tmp_path / f"{userblock}.h5"
            with h5py.File(path, "w", userblock_size=userblock) as file:
                file.create_dataset("x", (N, 3), "f4", fillvalue=7)
            for batch in PatchTensorLoader(make(), x=h5py.File(path, "r")["x"]):
                assert (batch["x"] == 7).all()

    def test_what_is_written_to_an_open_file_is_read(self, tmp_path):
        array = storer("hdf5, writable", tmp_path)(some_values())
        loader = PatchTensorLoader(make(), x=array)
        array[:] = 5
        for batch in loader:
            assert (batch["x"] == 5).all()


class TestDevice:
    @pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
    @pytest.mark.parametrize("ahead", [1, 2000, 1 << 27])
    def test_rows_go_through_pinned_memory(
        self, common, monkeypatch, cpu_as_device, settings, ahead
    ):
        monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", 500)
        x, y = some_values(), some_values(width=2, seed=1)
        sampler = quiet(IDS, device="numpy", **{"seed": 1, "batch_size": 4, **settings})
        with late_side_streams(monkeypatch, tensor_loader) as sides:
            loader = PatchTensorLoader(
                sampler,
                device="cpu",
                read_ahead_bytes=ahead,
                x=common(x),
                resident=torch.from_numpy(x),
                y=y,
            )
            actual = list(loader)
            assert {type(batch["x"]) for batch in actual} == {torch.Tensor}
            sampler.set_epoch(0)
            in_memory = PatchTensorLoader(sampler, device="cpu", x=x, resident=x, y=y)
            check_equal(actual, list(in_memory))
            # Of the file, and of `y`.
            assert len(entries_named(sides[0].log, "to_device")) % 2 == 0

    def test_without_a_side_stream(self, common, cpu_as_device):
        x = some_values()
        loader = PatchTensorLoader(make(device="numpy"), device="cpu", x=common(x))
        actual = list(loader)
        assert {type(batch["x"]) for batch in actual} == {torch.Tensor}
        check_equal(actual, list(PatchTensorLoader(make(), x=x)))


class TestOrder:
    @pytest.fixture
    def reads(self, monkeypatch):
        """The indices of all reads from here on."""
        calls = []
        for cls in (MappedRows, ZarrRows, Hdf5Rows, MappedHdf5Rows):
            original = cls.read_piece

            def read_piece(self, rows, out, original=original):
                calls.append(rows.copy())
                original(self, rows, out)

            monkeypatch.setattr(cls, "read_piece", read_piece)
        return calls

    def test_windows_are_read_ascending_and_once(self, tmp_path, reads):
        sampler = quiet(IDS, 9, seed=1, partial="pad")
        row_bytes = 8 + 32
        loader = PatchTensorLoader(
            sampler, read_ahead_bytes=2 * 36 * row_bytes, x=storer("zarr", tmp_path)(np.arange(N))
        )
        actual = [batch["x"].tolist() for batch in loader]
        # Every window is four batches.
        windows = [np.unique(np.concatenate(actual[i : i + 4])) for i in range(0, len(actual), 4)]
        assert len(reads) == len(windows)
        for rows, expected in zip(reads, windows, strict=True):
            np.testing.assert_array_equal(rows, expected)

    def test_arrays_in_memory_need_no_thread(self):
        iterator = iter(PatchTensorLoader(make(), x=np.arange(N), y=torch.arange(N)))
        next(iterator)
        assert reading_threads() == []

    def test_the_first_batch_waits_for_few_rows(self, monkeypatch):
        """The second window is read while the batches of the first one are in use."""
        ids = np.zeros(20_000, np.int64)
        begun, blocked, numbers = threading.Event(), threading.Event(), iter(range(100))
        original = MappedRows.read_piece

        def read_piece(self, rows, out):
            if next(numbers):
                begun.set()
                assert blocked.wait(10)
            original(self, rows, out)

        monkeypatch.setattr(MappedRows, "read_piece", read_piece)
        x = np.arange(ids.size).view(np.memmap)
        iterator = iter(PatchTensorLoader(PatchBatchSampler(ids, 64, seed=0), x=x))
        first = draw(iterator, 2048 // 64)
        assert begun.wait(10)
        blocked.set()
        rest = list(iterator)
        assert sorted(np.concatenate([b["x"] for b in first + rest]).tolist()) == x.tolist()

    def test_hdf5_maps_only_what_lies_in_the_file_as_it_is(self, tmp_path):
        kinds = {
            kind: type(in_file("x", storer(kind, tmp_path / str(i))(some_values())))
            for i, kind in enumerate(KINDS)
            if kind.startswith("hdf5") and (tmp_path / str(i)).mkdir() is None
        }
        mapped_kinds = {kind for kind, cls in kinds.items() if cls is MappedHdf5Rows}
        assert mapped_kinds == {"hdf5", "hdf5, userblock"}
        assert set(kinds.values()) == {MappedHdf5Rows, Hdf5Rows}

    @pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("hdf5") and "core" not in k])
    @pytest.mark.parametrize("piece", [1, 200, 1 << 22])
    def test_pieces_are_whole_and_bounded(self, tmp_path, monkeypatch, kind, piece):
        monkeypatch.setattr(file_rows, "PIECE_BYTES", piece)
        source = in_file("x", storer(kind, tmp_path)(some_values()))
        if isinstance(source, MappedHdf5Rows):
            source = Hdf5Rows(source._array)
        rng = np.random.default_rng(0)
        for count in (1, 5, 40, N):
            rows = np.sort(rng.choice(N, count, replace=False))
            pieces = list(source.pieces(rows))
            assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])]
            assert pieces[-1][1] == count
            for start, end in pieces:
                assert start < end
                cells = rows[start:end] // source._cell_rows
                span = (rows[end - 1] + 1 - rows[start]) * source.row_bytes
                assert span <= piece or cells[0] == cells[-1]
                assert (np.diff(cells) <= 1).all()
            if piece == 1 << 22:
                # Neighbouring cells are read together.
                cells = np.unique(rows // source._cell_rows)
                assert len(pieces) == 1 + (np.diff(cells) > 1).sum()

    def test_chunks_are_cells_where_hdf5_loads_them_whole(self, tmp_path):
        sizes = {
            kind: in_file("x", storer(kind, tmp_path / str(i))(some_values()))._cell_rows
            for i, kind in enumerate(KINDS)
            if kind.startswith("hdf5") and (tmp_path / str(i)).mkdir() is None
        }
        assert sizes["hdf5, chunks"] == 7
        assert sizes["hdf5, chunks of a row"] == 1
        assert sizes["hdf5, columns, gzip"] == 16
        by_bytes = file_rows.CELL_BYTES // (6 * 4)
        assert sizes["hdf5, large chunks"] == sizes["hdf5, virtual"] == by_bytes


class TestMemory:
    @pytest.mark.parametrize("kind", ["hdf5", "hdf5, chunks", "memory map", "memory map, columns"])
    def test_rows_in_memory_are_bounded(self, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(file_rows, "PIECE_BYTES", 1 << 14)
        monkeypatch.setattr(tensor_loader, "HOST_GATHER_BYTES", 1 << 14)
        size, width = 8000, 256
        array = storer(kind, tmp_path)(some_values(size, width))
        sampler = PatchBatchSampler(np.arange(size) % 10, 16, seed=0)
        ahead = 1 << 20
        loader = PatchTensorLoader(sampler, read_ahead_bytes=ahead, x=array)
        next(iter(loader))
        tracemalloc.start()
        try:
            for batch in loader:
                del batch
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # A third window would be half of that more.
        assert ahead / 2 < peak < 1.5 * ahead < size * width * 4 / 5

    def test_of_a_large_chunk_only_wanted_rows_are_kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr(file_rows, "PIECE_BYTES", 1 << 16)
        values = some_values(16_000, 256)
        array = hdf5(tmp_path / "x.h5", values, chunks=(16_000, 1), compression="lzf")
        rows = np.arange(0, 16_000, 100)
        source = in_file("x", array)
        assert list(source.pieces(rows)) == [(0, 160)]
        tracemalloc.start()
        try:
            actual = source.read(rows, threading.Event())
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        np.testing.assert_array_equal(actual, values[rows])
        assert peak < 5 * actual.nbytes < values.nbytes / 10

    @pytest.mark.parametrize(
        ("ahead", "error", "match"),
        [
            (0, ValueError, "read_ahead_bytes must be >= 1, got 0"),
            (1.5, TypeError, "read_ahead_bytes must be an int, got 1.5"),
            (None, TypeError, "read_ahead_bytes must be an int, got None"),
        ],
    )
    def test_bounds_that_cannot_be(self, ahead, error, match):
        with pytest.raises(error, match=match):
            PatchTensorLoader(make(), read_ahead_bytes=ahead, x=np.arange(N))


class TestState:
    @pytest.mark.parametrize("ahead", [1, 3000, 1 << 27])
    @pytest.mark.parametrize("count", [0, 1, 9, 23, 24])
    def test_going_on_anywhere_equals_never_having_stopped(self, common, count, ahead):
        array = common(np.arange(N))

        def loader_of():
            return PatchTensorLoader(make(), read_ahead_bytes=ahead, row=array)

        loader = loader_of()
        loader.set_epoch(2)
        iterator = iter(loader)
        drawn = [batch["row"].tolist() for batch in draw(iterator, count)]
        state = through_json(loader.state_dict())
        assert (state["epoch"], state["slot"]) == (2, count)
        assert state == iterator.state_dict()
        whole = epoch_of(make(), 2)
        assert drawn == whole[:count]
        resumed = loader_of()
        resumed.load_state_dict(state)
        remaining = whole[count:] or epoch_of(make(), 3)
        assert [batch["row"].tolist() for batch in resumed] == remaining
        # The iterator that read ahead goes on, too, and can be sent elsewhere.
        iterator.load_state_dict(through_json(make().state_dict()))
        assert [batch["row"].tolist() for batch in iterator] == epoch_of(make(), 0)

    def test_profile_counts_the_time_that_the_loop_waits(self, tmp_path, monkeypatch):
        original = MappedRows.read_piece

        def read_slowly(self, rows, out):
            time.sleep(0.05)
            original(self, rows, out)

        monkeypatch.setattr(MappedRows, "read_piece", read_slowly)
        sampler = make()
        loader = PatchTensorLoader(sampler, x=np.arange(N).view(np.memmap))
        with sampler.profile() as profile:
            assert len(list(loader)) == len(loader)
        seconds = {row.name: row.seconds for row in profile.rows}
        assert profile.batches == len(loader)
        assert seconds["transfer"] > 0.045 > seconds["evaluate"]
        assert sum(row.share for row in profile.rows) == pytest.approx(1, abs=0.05)
        assert sampler.stats().rows[3].seconds > 0.045


class BrokenError(Exception):
    pass


@contextmanager
def breaking(monkeypatch, cls, *numbers):
    """Let the reads of these numbers fail."""
    count = iter(range(1 << 30))
    original = cls.read_piece

    def read_piece(self, rows, out):
        number = next(count)
        if number in numbers:
            raise BrokenError(f"read {number}")
        original(self, rows, out)

    with monkeypatch.context() as patch:
        patch.setattr(cls, "read_piece", read_piece)
        yield


class TestErrors:
    @pytest.mark.parametrize("ahead", [1, 3000])
    def test_an_error_of_the_thread_is_raised_in_the_loop(self, monkeypatch, ahead):
        loader = PatchTensorLoader(make(), read_ahead_bytes=ahead, row=np.arange(N).view(np.memmap))
        whole = epoch_of(make(), 0)
        with breaking(monkeypatch, MappedRows, 1, 3):
            iterator, delivered, errors = iter(loader), [], 0
            while len(delivered) < len(whole):
                try:
                    delivered.append(next(iterator)["row"].tolist())
                except BrokenError as error:
                    errors += 1
                    frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
                    assert frames[-1] == "read_piece"
                    assert "_read_rows" in frames
                    # The error refers to what was closed.
                    wait_for_threads(0)
                assert loader.state_dict()["slot"] == len(delivered)
                assert len(iterator) == len(whole) - len(delivered)
        assert delivered == whole
        assert errors == 2

    @pytest.mark.parametrize("kind", ["hdf5", "hdf5, chunks"])
    def test_a_file_that_is_closed_meanwhile(self, tmp_path, kind):
        array = storer(kind, tmp_path)(np.arange(N))
        loader = PatchTensorLoader(make(), read_ahead_bytes=1, row=array)
        iterator = iter(loader)
        next(iterator)
        name = array.file.filename
        array.file.close()
        with pytest.raises(
            ValueError, match=f"must stay open while rows are read: '/x' of '{name}"
        ):
            list(iterator)

    @pytest.mark.parametrize("kind", ["hdf5", "hdf5, chunks"])
    def test_a_file_that_is_closed_during_a_read(self, tmp_path, monkeypatch, kind):
        array = storer(kind, tmp_path)(np.arange(N))

        def read_piece(self, rows, out):
            array.file.close()
            raise BrokenError

        monkeypatch.setattr(Hdf5Rows, "read_piece", read_piece)
        monkeypatch.setattr(MappedHdf5Rows, "read_piece", read_piece)
        with pytest.raises(ValueError, match="must stay open while rows are read: '/x' of"):
            list(PatchTensorLoader(make(), row=array))

    def test_a_chunk_that_is_damaged(self, tmp_path):
        array = zarr_array(tmp_path / "x", np.arange(N), chunks=(30,))
        loader = PatchTensorLoader(make(), row=array)
        chunk = tmp_path / "x" / ("c/1" if IS_ZARR_3 else "1")
        chunk.write_bytes(b"nothing")
        with pytest.raises((RuntimeError, ValueError, OSError)):
            list(loader)

    @pytest.mark.parametrize(
        ("make_array", "error", "match"),
        [
            (
                lambda file: file.create_dataset("x", data=np.zeros((N - 1, 2))),
                ValueError,
                rf"x must have a row for each of {N} samples, got shape \({N - 1}, 2\)",
            ),
            (
                lambda file: file.create_dataset("x", data=2.0),
                ValueError,
                r"x must be an HDF5 dataset with a row for each sample, got shape \(\)",
            ),
            (
                lambda file: file.create_dataset("x", data=h5py.Empty("f4")),
                TypeError,
                "x must be an HDF5 dataset of numbers, got dtype float32 without a shape",
            ),
            (
                lambda file: file.create_dataset("x", data=["a"] * N),
                TypeError,
                "x must be an HDF5 dataset of numbers, got dtype object",
            ),
            (
                lambda file: file.create_dataset("x", data=np.zeros(N, [("a", "f4")])),
                TypeError,
                r"x must be an HDF5 dataset of numbers, got dtype \[\('a', '<f4'\)\]",
            ),
            (
                lambda file: file.create_group("x"),
                TypeError,
                "x must be a torch tensor, .* or an HDF5 dataset, got Group",
            ),
            (lambda file: file, TypeError, "x must be a torch tensor, .*, got File"),
        ],
    )
    def test_hdf5_that_cannot_be(self, tmp_path, make_array, error, match):
        with h5py.File(tmp_path / "x.h5", "w") as file, pytest.raises(error, match=match):
            PatchTensorLoader(make(), x=make_array(file))

    def test_a_closed_file(self, tmp_path):
        array = hdf5(tmp_path / "x.h5", np.arange(N))
        array.file.close()
        with pytest.raises(ValueError, match="x must be a dataset of an open HDF5 file, got <Clos"):
            PatchTensorLoader(make(), x=array)

    def test_zarr_that_cannot_be(self, tmp_path):
        array = zarr_array(tmp_path / "x", np.zeros((2, N)), chunks=(1, N))
        with pytest.raises(ValueError, match=rf"x must have a row for each .* shape \(2, {N}\)"):
            PatchTensorLoader(make(), x=array)
        times = zarr_array(tmp_path / "t", np.zeros(N, "M8[s]"), chunks=(N,))
        with pytest.raises(
            TypeError, match=r"t must be a zarr array of numbers, got dtype datetim"
        ):
            PatchTensorLoader(make(), t=times)
        group = zarr.open_group(tmp_path / "g", mode="w")
        with pytest.raises(TypeError, match=r"x must be a torch tensor, .*, got Group"):
            PatchTensorLoader(make(), x=group)

    def test_dtypes_that_torch_lacks_cannot_go_to_it(self, tmp_path, cpu_as_device):
        array = hdf5(tmp_path / "x.h5", np.zeros(N, np.longdouble))
        with pytest.raises(TypeError, match="x must have a numeric dtype that cpu supports"):
            PatchTensorLoader(make(device="numpy"), device="cpu", x=array)


class TestThread:
    @pytest.fixture
    def loader(self):
        return PatchTensorLoader(make(), read_ahead_bytes=1, row=np.arange(N).view(np.memmap))

    def test_it_ends_with_the_epoch(self, loader):
        iterator = iter(loader)
        assert reading_threads() == []
        next(iterator)
        assert len(reading_threads()) == 1
        list(iterator)
        # The iterator still exists.
        wait_for_threads(0)
        assert len(iterator) == 0

    def test_it_ends_when_the_iterator_is_freed_or_goes_elsewhere(self, loader):
        iterator = iter(loader)
        next(iterator)
        state = iterator.state_dict()
        iterator.load_state_dict(state)
        wait_for_threads(0)
        next(iterator)
        wait_for_threads(1)
        del iterator
        wait_for_threads(0)

    def test_it_reads_no_further_when_the_iterator_is_freed(self, monkeypatch):
        monkeypatch.setattr(file_rows, "PIECE_BYTES", 8)
        entered, release, calls = threading.Event(), threading.Event(), []
        original = MappedRows.read_piece

        def read_piece(self, rows, out):
            calls.append(rows)
            if len(calls) == 10:
                entered.set()
                assert release.wait(10)
            original(self, rows, out)

        monkeypatch.setattr(MappedRows, "read_piece", read_piece)
        loader = PatchTensorLoader(make(), row=np.arange(N).view(np.memmap))
        iterator = iter(loader)
        with ThreadPoolExecutor(1) as caller:
            drawn = caller.submit(next, iterator)
            assert entered.wait(10)
            # As where Ctrl-C interrupts the loop.
            iterator._reader._read_ahead.close()
            release.set()
            with pytest.raises((IndexError, ValueError)):
                drawn.result(10)
        del iterator, drawn
        wait_for_threads(0)
        assert len(calls) == 10

    @pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "os.kill(os.getpid(), 2)"])
    def test_the_interpreter_exits_in_the_middle_of_an_epoch(self, tmp_path, end):
        hdf5(tmp_path / "x.h5", np.arange(N), chunks=(7,)).file.close()
        code = f"""
import os, signal, h5py, numpy as np
from gpusampler import PatchBatchSampler, PatchTensorLoader
# A process that a shell started in the background ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
x = h5py.File({str(tmp_path / "x.h5")!r}, "r")["x"]
iterator = iter(PatchTensorLoader(PatchBatchSampler(np.arange({N}) % 3, 4, seed=0), x=x))
print(len(next(iterator)["x"]), flush=True)
{end}
"""
        done = run_python("-c", code, timeout=30, check=False)
        assert done.stdout == "4\n"
        if "kill" in end:
            assert done.returncode in (-2, 130)
            assert "KeyboardInterrupt" in done.stderr
        else:
            assert (done.returncode, done.stderr) == (0, "")


def in_fork(call) -> str:
    """What a call in a forked child returns, or its error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        # A child that waits for a thread of its parent would wait forever.
        signal.alarm(20)
        try:
            result = str(call())
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, result.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        result = pipe.read()
    os.waitpid(pid, 0)
    return result


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
class TestProcesses:
    @pytest.mark.parametrize("kind", ["hdf5", "hdf5, chunks"])
    def test_hdf5_is_not_read_after_a_fork(self, tmp_path, kind):
        loader = PatchTensorLoader(make(), x=storer(kind, tmp_path)(np.arange(N)))
        said = in_fork(lambda: list(loader))
        assert said.startswith("RuntimeError: '/x' of ")
        assert "was opened before this process was forked" in said
        assert len(list(loader)) == len(loader)

    def test_other_files_are_read_after_a_fork(self):
        loader = PatchTensorLoader(make(), row=np.arange(N).view(np.memmap))
        said = in_fork(lambda: [batch["row"].tolist() for batch in loader])
        assert said == str(epoch_of(make(), 0))

    def test_an_iterator_does_not_go_on_in_a_fork(self):
        loader = PatchTensorLoader(make(), read_ahead_bytes=1, row=np.arange(N).view(np.memmap))
        iterator = iter(loader)
        first = next(iterator)["row"].tolist()
        said = in_fork(lambda: next(iterator))
        assert said.startswith("RuntimeError: an iterator that reads rows from files cannot")
        rest = [batch["row"].tolist() for batch in iterator]
        assert [first, *rest] == epoch_of(make(), 0)

    @pytest.mark.parametrize("kind", ["hdf5", "hdf5, chunks"])
    def test_a_loader_of_hdf5_cannot_be_pickled(self, tmp_path, kind):
        loader = PatchTensorLoader(make(), x=storer(kind, tmp_path)(np.arange(N)))
        with pytest.raises(TypeError, match=r"a loader of '/x' of .* cannot be pickled"):
            pickle.dumps(loader)

    @pytest.mark.parametrize("kind", ["zarr", "memory map"])
    def test_other_loaders_travel(self, tmp_path, kind):
        loader = PatchTensorLoader(make(), row=storer(kind, tmp_path)(np.arange(N)))
        next(iter(loader))
        other = pickle.loads(pickle.dumps(loader))
        assert [batch["row"].tolist() for batch in other] == epoch_of(make(), 1)
        assert repr(other).startswith(f"PatchTensorLoader(row=({N},), device='numpy', PatchBatch")
