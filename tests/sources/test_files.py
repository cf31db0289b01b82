"""Ids in files: only what is asked for is read, and what is wrong with a file is said."""

from __future__ import annotations

import copy
import gzip
import io
import mmap
import os
import pickle
import shutil
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, read_patch_ids
from support.id_sources import hdf5, parquet, parquet_folder, table, zarr_group
from support.processes import run_python

MB = 1 << 20


def saved(tmp_path, values, name="ids.npy"):
    path = tmp_path / name
    np.save(path, np.asarray(values))
    return path


# .npy


def test_an_npy_file_is_read_where_it_is_asked_for(tmp_path):
    path = saved(tmp_path, np.arange(4 * MB))
    tracemalloc.start()
    try:
        ids = read_patch_ids(path)
        assert ids.read(3_000_000, 3_000_100).tolist() == list(range(3_000_000, 3_000_100))
        assert tracemalloc.get_traced_memory()[1] < MB
        total = sum(int(block.sum()) for _, block in ids.blocks(size=10_000))
        assert total == 4 * MB * (4 * MB - 1) // 2
        assert tracemalloc.get_traced_memory()[1] < MB
    finally:
        tracemalloc.stop()


def test_names_in_an_npy_file_are_read_in_blocks(tmp_path, monkeypatch):
    from gpusampler.sources import strings

    monkeypatch.setattr(strings, "BLOCK", 1000)
    path = saved(tmp_path, np.resize(np.array(["a", "b" * 20, "c"]), 100_000))
    tracemalloc.start()
    try:
        ids = read_patch_ids(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.names == ("a", "b" * 20, "c")
    assert os.path.getsize(path) > 8_000_000
    assert peak < MB


@pytest.mark.parametrize("gone", [1, 7, 800])
def test_a_cut_npy_file_says_how_much_is_missing(tmp_path, gone):
    path = saved(tmp_path, np.arange(100))
    file_size = os.path.getsize(path)
    os.truncate(path, file_size - gone)
    problem = rf"must have {file_size} bytes, got {file_size - gone}, so {gone} bytes are missing"
    with pytest.raises(ValueError, match=problem):
        read_patch_ids(path)


def test_an_npy_file_that_shrinks_is_an_error_and_no_crash(tmp_path):
    path = saved(tmp_path, np.arange(10_000))
    ids = read_patch_ids(path)
    os.truncate(path, 8000 * 8)
    np.testing.assert_array_equal(ids.read(0, 7000), np.arange(7000))
    with pytest.raises(OSError, match=r"must not shrink .*ids\.npy' must have \d+ bytes, got"):
        ids.read(7000, 10_000)


def test_a_file_that_goes_away(tmp_path):
    path = saved(tmp_path, np.arange(10))
    ids = read_patch_ids(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"ids\.npy"):
        ids.read(0, 1)


def test_a_file_that_grows_is_read_as_long_as_it_was(tmp_path):
    path = saved(tmp_path, np.arange(10))
    with open(path, "ab") as file:
        file.write(b"more")
    assert read_patch_ids(path).read(0, 10).tolist() == list(range(10))


def content(kind):
    stream = io.BytesIO()
    if kind == "gzip":
        with gzip.GzipFile(fileobj=stream, mode="w") as file:
            np.save(file, np.arange(3))
    elif kind == "npz":
        np.savez(stream, ids=np.arange(3))
    elif kind == "text":
        stream.write(b"1\n2\n3\n")
    elif kind == "pickled":
        np.save(stream, np.array([1, None], dtype=object), allow_pickle=True)
    elif kind == "2-D":
        np.save(stream, np.zeros((3, 2), np.int64))
    elif kind == "0-D":
        np.save(stream, np.int64(3))
    elif kind == "no ids":
        np.save(stream, np.zeros(0, np.int64))
    elif kind == "floats":
        np.save(stream, np.zeros(3))
    elif kind == "booleans":
        np.save(stream, np.zeros(3, bool))
    elif kind == "dates":
        np.save(stream, np.zeros(3, "M8[s]"))
    elif kind == "no UTF-8":
        np.save(stream, np.array([b"a", b"\xff"]))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [
        ("gzip", ValueError, "got a gzip file: .*ids.npy'; decompress it first"),
        ("npz", ValueError, r"got an \.npz archive"),
        ("text", ValueError, "must be an .npy file, got .*magic string"),
        ("empty", ValueError, "must be an .npy file, got .*ids.npy'"),
        ("pickled", TypeError, r"must be integers or strings, got dtype object \(pickled"),
        ("2-D", ValueError, r"ids in .* must be 1-D, one id per sample, got shape \(3, 2\)"),
        ("0-D", ValueError, r"must be 1-D, one id per sample, got shape \(\)"),
        ("no ids", ValueError, "must name at least one sample, got none"),
        ("floats", TypeError, "must be integers or strings, got dtype float64 in .*ids.npy"),
        ("booleans", TypeError, "must be integers or strings, got dtype bool"),
        ("dates", TypeError, r"must be integers or strings, got dtype datetime64\[s\]"),
        ("no UTF-8", ValueError, r"must be UTF-8, got b'\\xff' in sample 1"),
    ],
)
def test_npy_files_that_hold_no_ids(tmp_path, kind, error, match):
    path = tmp_path / "ids.npy"
    path.write_bytes(content(kind))
    with pytest.raises(error, match=match):
        read_patch_ids(path)


def test_uint64_beyond_int64_is_found_when_it_is_read(tmp_path):
    values = np.arange(100, dtype=np.uint64)
    values[70] = 1 << 63
    for source in (saved(tmp_path, values), values, parquet(values, tmp_path)):
        ids = read_patch_ids(source)
        assert ids.read(0, 70).tolist() == list(range(70))
        with pytest.raises(ValueError, match=f"must fit in int64, got {1 << 63} in sample 70"):
            ids.read(60, 80)


# Memory maps


@pytest.mark.parametrize(
    "view",
    [
        lambda mapped: mapped,
        lambda mapped: np.asarray(mapped),
        lambda mapped: mapped[1000:],
        lambda mapped: np.asarray(mapped)[5:][::2],
        lambda mapped: mapped[::-1],
    ],
    ids=["map", "array", "slice", "strides", "backwards"],
)
def test_a_file_that_shrinks_under_a_map_is_an_error_and_no_crash(tmp_path, view):
    # Without the check this kills the process by SIGBUS.
    path = saved(tmp_path, np.arange(1_000_000))
    mapped = np.load(path, mmap_mode="r")
    plain = np.array(view(mapped))
    ids = read_patch_ids(view(mapped))
    samples = np.flatnonzero(plain < 400_000)
    start, stop = int(samples.min()), int(samples.max()) + 1
    np.testing.assert_array_equal(ids.read(0, ids.size), plain)
    os.truncate(path, 500_000 * 8)
    np.testing.assert_array_equal(ids.read(start, stop), plain[start:stop])
    with pytest.raises(OSError, match=r"must not shrink .*ids\.npy' must have .* got 4000000"):
        ids.read(0, ids.size)
    samples = np.flatnonzero(plain > 600_000)
    with pytest.raises(OSError, match="must not shrink"):
        ids.read(int(samples.min()), int(samples.max()) + 1)


def test_a_plain_map_without_a_name(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(np.arange(1_000_000).tobytes())
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    ids = read_patch_ids(np.frombuffer(mapped, np.int64))
    os.truncate(path, 4096)
    assert ids.read(0, 512).tolist() == list(range(512))
    with pytest.raises(OSError, match="the file under the memory map must have 4104 bytes or more"):
        ids.read(0, 513)
    assert ids.modified is None


def test_a_map_that_starts_in_the_middle_of_a_file(tmp_path):
    path = tmp_path / "raw"
    path.write_bytes(np.arange(100_000).tobytes())
    mapped = np.memmap(path, np.int64, "r", offset=80_000, shape=(80_000,))
    ids = read_patch_ids(mapped)
    os.truncate(path, 400_000)
    assert ids.read(39_000, 40_000).tolist() == list(range(49_000, 50_000))
    with pytest.raises(OSError, match="must have 400008 bytes or more, got 400000"):
        ids.read(39_000, 40_001)


def test_names_under_a_map_are_checked_too(tmp_path):
    path = saved(tmp_path, np.resize(np.array(["aaaaaaaa", "b"]), 100_000))
    ids = read_patch_ids(np.load(path, mmap_mode="r"))
    assert ids.names == ("aaaaaaaa", "b")
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="must not shrink"):
        ids.read(50_000, 60_000)


# Paths


@pytest.mark.parametrize("name", ["ids", "ids.dat", "IDS.NPY"])
def test_what_a_file_is_shows_at_its_beginning(tmp_path, name):
    path = tmp_path / name
    with open(path, "wb") as file:
        np.save(file, np.array([4, 2]))
    assert read_patch_ids(str(path)).read(0, 2).tolist() == [4, 2]
    shutil.copy(parquet([5, 6], tmp_path), path.with_suffix(".x"))
    assert read_patch_ids(path.with_suffix(".x")).read(0, 2).tolist() == [5, 6]
    shutil.copy(hdf5([7, 8], tmp_path, None), path.with_suffix(".y"))
    assert read_patch_ids(path.with_suffix(".y")).read(0, 2).tolist() == [7, 8]


def test_files_that_are_not_understood(tmp_path):
    (tmp_path / "ids.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"path that ends in \.npy, \.parquet or .*, \.h5"):
        read_patch_ids(tmp_path / "ids.csv")
    with pytest.raises(ValueError, match=r"a folder with \.parquet or \.pq files, got the folder"):
        read_patch_ids(tmp_path)


@pytest.mark.parametrize("name", ["none.npy", "none.parquet", "none.zarr", "none.h5", "none", ""])
def test_files_that_are_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="source must be an existing file or folder"):
        read_patch_ids(tmp_path / "nowhere" / name)
    with pytest.raises(FileNotFoundError, match="must be an existing"):
        PatchBatchSampler(str(tmp_path / "nowhere" / name), 2)


REFUSED = """
import os, sys
import h5py, numpy, pyarrow.dataset, pyarrow.parquet
from gpusampler import PatchBatchSampler, read_patch_ids
if os.geteuid() == 0:
    # What root may read says nothing.
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    for read in (read_patch_ids, lambda path: PatchBatchSampler(path, 2)):
        try:
            read(path)
            print("read", path)
        except PermissionError as error:
            print(error)
"""


@pytest.fixture
def public_folder():
    """A folder that every user may read; pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_files_that_may_not_be_read(public_folder):
    pytest.importorskip("h5py")
    folder = public_folder
    paths = [saved(folder, [1]), parquet([1], folder), hdf5([1], folder, None)]
    closed = folder / "closed"
    closed.mkdir()
    npy_path = saved(closed, [1])
    parquet_path = parquet_folder(np.arange(100), folder)
    for path in (*paths, closed, parquet_path / "a2.pq"):
        path.chmod(0)
    paths += [closed, npy_path, parquet_path]
    lines = run_python("-c", REFUSED, *paths).stdout.splitlines()
    closed.chmod(0o700)
    assert len(lines) == 2 * len(paths)
    for path, line in zip(np.repeat(paths, 2), lines, strict=True):
        assert "source must be readable by this user" in line
        assert "chmod a+r" in line
        assert str(path) in line


MISSING = """
import sys
sys.modules[sys.argv[1]] = None
from gpusampler import PatchBatchSampler, read_patch_ids
for make in (read_patch_ids, lambda path: PatchBatchSampler(path, 2)):
    try:
        make(sys.argv[2])
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("name", "module"), [("ids.parquet", "pyarrow"), ("a.zarr", "zarr"), ("a.h5", "h5py")]
)
def test_a_library_that_is_not_installed(tmp_path, name, module):
    path = tmp_path / name
    path.mkdir() if name == "a.zarr" else path.write_text("nothing")
    lines = run_python("-c", MISSING, module, path).stdout.splitlines()
    line = f"Cannot read {str(path)!r}: {module} is not installed. Run `pip install {module}`."
    assert lines == [line] * 2


def test_reading_what_needs_no_library_imports_none(tmp_path):
    code = (
        "import sys, numpy, gpusampler\n"
        "class Known(list):\n"
        "    patch_ids = [1, 2]\n"
        "for source in (sys.argv[1], [1, 2], ['a', 'b'], numpy.arange(2), Known([3, 4])):\n"
        "    gpusampler.read_patch_ids(source).read(0, 2)\n"
        "class Samples:\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, i): return {'patch_id': i}\n"
        "gpusampler.read_patch_ids(Samples()).read(0, 2)\n"
        "print({'pyarrow', 'zarr', 'h5py', 'pandas', 'polars', 'datasets', 'torch', 'cupy'}"
        " & set(sys.modules))"
    )
    assert run_python("-c", code, saved(tmp_path, [3, 4])).stdout.strip() == "set()"


# Columns


@pytest.mark.parametrize("make", [parquet, hdf5, zarr_group])
def test_columns_are_chosen_by_name(make, tmp_path):
    source = make(np.arange(100), tmp_path)
    assert read_patch_ids(source, "patch_id").size == 100
    with pytest.raises(TypeError, match=r"must be integers or strings, got dtype (double|float)"):
        read_patch_ids(source, "x")
    with pytest.raises(ValueError, match=r"column must be one of .*'patch_id'.*, got 'y'"):
        read_patch_ids(source, "y")


def test_a_column_must_be_named_where_none_is_called_patch_id(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    several = table([1, 2]).rename_columns(["a", "b"])
    pq.write_table(several, path)
    with pytest.raises(ValueError, match=r"column must be given for .*, got None; it has 'a', 'b'"):
        read_patch_ids(path)
    assert read_patch_ids(path, "b").read(0, 2).tolist() == [1, 2]
    pq.write_table(several.select(["b"]), path)
    assert read_patch_ids(path).read(0, 2).tolist() == [1, 2]


def test_groups_in_groups(tmp_path):
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["in/ids"] = [4, 5]
        file["z"] = [1]
    assert read_patch_ids(tmp_path / "a.h5", "in/ids").read(0, 2).tolist() == [4, 5]
    with pytest.raises(ValueError, match=r"column must be one of 'z' of .*, got 'in'"):
        read_patch_ids(tmp_path / "a.h5", "in")
    group = zarr.open_group(tmp_path / "g", mode="w")
    group.create_array("in/ids", shape=(2,), dtype="int8")[:] = [4, 5]
    for column in ("in/ids", "/in/ids"):
        ids = read_patch_ids(tmp_path / "g", column)
        assert ids.read(0, 2).tolist() == [4, 5]
        assert ids.modified is not None
    with pytest.raises(ValueError, match=r"column must be a path in .*, got '\.\./g'"):
        read_patch_ids(tmp_path / "g", "../g")
    # No array at the top: what there is instead is named.
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["z"]
    for source in (tmp_path / "a.h5", tmp_path / "g"):
        with pytest.raises(
            ValueError, match=r"also has groups \('in'\): .* as column, such as 'in/"
        ):
            read_patch_ids(source)


def test_a_column_of_what_has_none(tmp_path):
    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(tmp_path / "a.zarr", shape=(3,), dtype="int8")
    for source in (saved(tmp_path, [1]), np.arange(3), [1, 2], array, tmp_path / "a.zarr"):
        with pytest.raises(ValueError, match=r"column must be None for .*, got 'x'"):
            read_patch_ids(source, "x")


# Parquet


class Counted(io.FileIO):
    """A file that says which bytes of it are read."""

    def __init__(self, path):
        super().__init__(path)
        self.ranges = []

    def read(self, size=-1):
        offset = self.tell()
        data = super().read(size)
        self.ranges.append((offset, offset + len(data)))
        return data


def test_only_the_row_groups_and_the_column_that_are_asked_for_are_read(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 1 << 60, 40_000)
    columns = pa.table({"x": rng.random(40_000), "patch_id": plain, "y": rng.random(40_000)})
    path = tmp_path / "a.parquet"
    pq.write_table(columns, path, row_group_size=10_000, compression="none", use_dictionary=False)
    counted = Counted(path)
    file = pq.ParquetFile(pa.PythonFile(counted))
    offsets = []
    for group in range(4):
        column = file.metadata.row_group(group).column(1)
        offsets.append((column.data_page_offset, column.data_page_offset + 80_000))
    counted.ranges.clear()
    ids = read_patch_ids(file)
    assert not ids.seekable
    assert sum(stop - start for start, stop in counted.ranges) < 10_000
    for stretch, group in (((20_500, 20_510), 2), ((29_000, 30_000), 2), ((5, 10_000), 0)):
        counted.ranges.clear()
        np.testing.assert_array_equal(ids.read(*stretch), plain[slice(*stretch)])
        start, stop = offsets[group]
        for first, last in counted.ranges:
            assert start - 200 <= first <= last <= stop + 200
    # The second stretch above lay in the group that the first had decoded.
    counted.ranges.clear()
    for first in range(0, 10_000, 100):
        ids.read(first, first + 100)
    assert counted.ranges == []
    for _, _ in ids.blocks(start=10_000, size=999):
        pass
    assert sum(stop - start for start, stop in counted.ranges) < 3 * 81_000
    counted.close()


def test_a_large_row_group_is_decoded_in_batches_and_once(tmp_path, monkeypatch):
    from gpusampler.sources import parquet as parquet_module

    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"patch_id": np.arange(10_000)}), path)
    monkeypatch.setattr(parquet_module, "BLOCK", 1000)
    file = pq.ParquetFile(path)
    begun, batches = [], []

    class Watched:
        schema_arrow, metadata = file.schema_arrow, file.metadata

        def iter_batches(self, size, **settings):
            begun.append(settings["row_groups"])
            for batch in file.iter_batches(size, **settings):
                batches.append(len(batch))
                yield batch

    ids = parquet_module._column_ids([Watched], ["a"], None, None, False)
    assert ids.read(0, 10).tolist() == list(range(10))
    assert batches == [1000]
    for first in range(10, 9000, 70):
        assert ids.read(first, first + 70)[0] == first
    assert begun == [[0]]
    assert len(batches) == 10
    assert ids.read(500, 510)[0] == 500
    assert begun == [[0], [0]]


def test_a_folder_is_read_in_the_order_of_pyarrow(tmp_path):
    import_dataset = pytest.importorskip("pyarrow.dataset")
    pq = pytest.importorskip("pyarrow.parquet")
    names = ["b.parquet", "a10.parquet", "a9.parquet", "a/z.parquet", "a-/z.parquet", "B.parquet"]
    for number, name in enumerate(names):
        path = tmp_path / "t" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([number, number]), path)
    expected = import_dataset.dataset(tmp_path / "t").to_table()["patch_id"].to_pylist()
    assert np.asarray(read_patch_ids(tmp_path / "t")).tolist() == expected
    (tmp_path / "t.parquet").mkdir()
    with pytest.raises(ValueError, match=r"must be a folder with \.parquet files, got .*/t\."):
        read_patch_ids(tmp_path / "t.parquet")


def test_files_of_a_folder_that_differ(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(*columns):
        for number, column in enumerate(columns):
            pq.write_table(pa.table({"patch_id": column}), tmp_path / f"{number}.parquet")
        return read_patch_ids(tmp_path)

    ids = write(pa.array([1, -2], pa.int8()), pa.array([300], pa.int32()))
    assert ids.dtype == "int32"
    assert ids.read(0, 3).tolist() == [1, -2, 300]
    ids = write(pa.array([-1, (1 << 62) + 1]), pa.array([(1 << 62) + 1], pa.uint64()))
    assert ids.dtype == "int64"
    assert ids.read(0, 3).tolist() == [-1, (1 << 62) + 1, (1 << 62) + 1]
    ids = write(pa.array(["b", "a"]), pa.array(["a", "c"]).dictionary_encode())
    assert ids.names == ("a", "b", "c")
    assert ids.read(1, 4).tolist() == [0, 0, 2]
    with pytest.raises(TypeError, match=r"strings or all integers, got int64 .*1\.parquet', un"):
        write(pa.array(["b", "a"]), pa.array([1]))
    pq.write_table(pa.table({"other": [1]}), tmp_path / "1.parquet")
    with pytest.raises(ValueError, match=r"must be one of 'other' of .*1\.parquet', got 'pat"):
        read_patch_ids(tmp_path)


def test_fields_of_a_struct(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    inner = pa.array([{"id": 4, "x": 0.5}, {"id": 2, "x": 0.5}, None])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"s": inner, "a.b": [7, 8, 9]}), path, row_group_size=2)
    ids = read_patch_ids(path, "s.id")
    assert ids.read(0, 2).tolist() == [4, 2]
    with pytest.raises(ValueError, match="got none in sample 2"):
        ids.read(0, 3)
    assert read_patch_ids(path, "a.b").read(1, 3).tolist() == [8, 9]
    with pytest.raises(ValueError, match="column must be one of 'id', 'x' of 's', got 'y'"):
        read_patch_ids(path, "s.y")


def test_nulls_in_parquet_are_found_when_they_are_read(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"patch_id": [*range(50), None, 51]}), path, row_group_size=7)
    ids = read_patch_ids(path)
    assert ids.read(43, 50).tolist() == list(range(43, 50))
    with pytest.raises(ValueError, match="a value for every sample, got none in sample 50"):
        ids.read(40, 52)


def test_parquet_that_is_none_or_cut_off(tmp_path):
    path = parquet(np.arange(100), tmp_path)
    os.truncate(path, os.path.getsize(path) - 9)
    with pytest.raises(ValueError, match=r"a complete Parquet file, got .*ids\.parquet'"):
        read_patch_ids(path)
    path.write_text("no Parquet")
    with pytest.raises(ValueError, match=r"a complete Parquet file, got .*ids\.parquet'"):
        read_patch_ids(path)


def test_parquet_without_rows(tmp_path):
    with pytest.raises(ValueError, match="must name at least one sample"):
        read_patch_ids(parquet(np.zeros(0, np.int64), tmp_path))


def test_datasets_of_another_format_are_refused(tmp_path):
    ds = pytest.importorskip("pyarrow.dataset")
    (tmp_path / "a.csv").write_text("patch_id\n1\n")
    for source in (ds.dataset(tmp_path / "a.csv", format="csv"), ds.dataset(table([1]))):
        with pytest.raises(TypeError, match="must be a dataset of Parquet files, got a"):
            read_patch_ids(source)


# Zarr and HDF5


def watched_chunks(monkeypatch, ids):
    """The stretches that a reader asks its library for."""
    reads = []
    pieces = ids._load
    load = pieces._load

    def watched(start, stop):
        reads.append((start, stop))
        return load(start, stop)

    monkeypatch.setattr(pieces, "_load", watched)
    return reads


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
def test_chunks_are_decoded_once_and_only_where_asked(tmp_path, monkeypatch, kind):
    from gpusampler.sources import zarr_hdf5

    monkeypatch.setattr(zarr_hdf5, "_MIN_READ", 20)
    values = np.arange(100)
    source = zarr_group(values, tmp_path) if kind == "zarr" else hdf5(values, tmp_path)
    ids = read_patch_ids(source)
    reads = watched_chunks(monkeypatch, ids)
    assert ids.read(50, 60).tolist() == list(range(50, 60))
    # Chunks of 12, at least 20 at once: 24.
    assert reads == [(48, 72)]
    assert ids.read(60, 75).tolist() == list(range(60, 75))
    assert reads[1:] == [(72, 96)]
    reads.clear()
    np.testing.assert_array_equal(np.concatenate([b for _, b in ids.blocks(size=7)]), values)
    assert reads == [(0, 24), (24, 48), (48, 72), (72, 96), (96, 100)]
    ids.read(0, 90)
    # Of what was read only the last piece stays, not a view that keeps all of it.
    assert ids._load._last[1].shape == (24,)
    assert ids._load._last[1].base is None


def test_a_chunk_larger_than_a_block_is_dear(tmp_path, monkeypatch):
    from gpusampler.sources import zarr_hdf5

    zarr = pytest.importorskip("zarr")
    array = zarr.create_array(tmp_path / "a", data=np.arange(100), chunks=(50,))
    assert read_patch_ids(array).seekable
    monkeypatch.setattr(zarr_hdf5, "BLOCK", 49)
    assert not read_patch_ids(array).seekable


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        (np.zeros((3, 2), np.int64), ValueError, r"must be 1-D, one id per sample, got shape"),
        (np.zeros(0, np.int64), ValueError, "must name at least one sample"),
        (np.zeros(3), TypeError, "must be integers or strings, got dtype float64"),
        (np.zeros(3, bool), TypeError, "must be integers or strings, got dtype bool"),
        (np.array(3), ValueError, "must be 1-D"),
    ],
)
def test_arrays_of_zarr_and_hdf5_that_hold_no_ids(tmp_path, values, error, match):
    zarr, h5py = pytest.importorskip("zarr"), pytest.importorskip("h5py")
    group = zarr.open_group(tmp_path / "g", mode="w")
    group.create_array("ids", shape=values.shape, dtype=values.dtype)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["ids"] = values
    for path in (tmp_path / "g", tmp_path / "a.h5"):
        with pytest.raises(error, match=match):
            read_patch_ids(path)


def test_hdf5_that_is_cut_off_and_zarr_that_is_none(tmp_path):
    path = hdf5(np.arange(10_000), tmp_path, None)
    pytest.importorskip("zarr")
    os.truncate(path, 5000)
    with pytest.raises(OSError, match=r"must be a whole HDF5 file, got .*ids\.h5'.*truncated"):
        read_patch_ids(path)
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(ValueError, match=r"must be a Zarr array or group, got .*a\.zarr'"):
        read_patch_ids(tmp_path / "a.zarr")
    h5py = pytest.importorskip("h5py")
    h5py.File(tmp_path / "none.h5", "w").close()
    with pytest.raises(ValueError, match="must have a column of patch ids"):
        read_patch_ids(tmp_path / "none.h5")


def test_an_hdf5_file_is_open_only_while_it_is_read(tmp_path):
    path = hdf5(np.arange(100), tmp_path)
    h5py = pytest.importorskip("h5py")
    ids = read_patch_ids(path)
    ids.read(0, 10)
    with h5py.File(path, "a") as file:
        file["more"] = 1
    assert ids.read(90, 100).tolist() == list(range(90, 100))


def test_an_array_in_chunks_that_shrinks_is_an_error(tmp_path):
    h5py, zarr = pytest.importorskip("h5py"), pytest.importorskip("zarr")
    values = np.arange(200_000) // 100
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("patch_id", data=values, maxshape=(None,), chunks=(1000,))
        array = zarr.create_array(tmp_path / "a.zarr", data=values, chunks=(1000,))
        for source in (dataset, array):
            ids = read_patch_ids(source)
            source.resize((150_000,))
            # Libraries cut a stretch off at the end; the last patch would have 50,000 samples more.
            with pytest.raises(OSError, match=r"not shrink .* got 150000 ids for samples 0"):
                PatchBatchSampler(ids, 8)


def test_ids_in_memory_that_processes_share():
    mapped = mmap.mmap(-1, 8 * 5000)
    shared = np.frombuffer(mapped, np.int64)
    shared[:] = np.arange(5000) % 7
    assert PatchBatchSampler(shared, 8).plan.groups.num_patches == 7
    assert read_patch_ids(shared).modified is None


def test_threads_may_read_the_same_ids(tmp_path, monkeypatch):
    files = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("gpusampler.sources.parquet.BLOCK", 500)
    values = np.random.default_rng(0).integers(0, 1000, 100_000)
    path = tmp_path / "ids.parquet"
    files.write_table(table(values), path, row_group_size=5000)
    ids = read_patch_ids(path)
    starts = np.random.default_rng(1).integers(0, values.size - 3000, 200).tolist()

    def right(start: int) -> bool:
        return np.array_equal(ids.read(start, start + 3000), values[start : start + 3000])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, starts))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda ids: pickle.loads(pickle.dumps(ids))])
def test_ids_in_a_file_travel_as_its_name(tmp_path, monkeypatch, copied):
    np.save(tmp_path / "ids.npy", np.arange(100_000) % 7)
    monkeypatch.chdir(tmp_path)
    ids = read_patch_ids("ids.npy")
    assert len(pickle.dumps(ids)) < 1000
    # The program may go elsewhere meanwhile.
    monkeypatch.chdir("/")
    assert ids.read(5, 9).tolist() == [5, 6, 0, 1]
    assert copied(ids).read(5, 9).tolist() == [5, 6, 0, 1]


def test_a_column_of_a_file_travels(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pandas.DataFrame({"a": ["x", "y"], "b": [1, 2]}).to_parquet(tmp_path / "t.parquet")
    ids = pickle.loads(pickle.dumps(read_patch_ids(tmp_path / "t.parquet", "a")))
    assert ids.names == ("x", "y")


def test_ids_in_memory_travel_as_they_are():
    ids = pickle.loads(pickle.dumps(read_patch_ids(np.array([3, 1, 3]))))
    assert ids.read(0, 3).tolist() == [3, 1, 3]
