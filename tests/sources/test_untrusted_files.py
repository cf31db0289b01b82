"""Files from strangers run no code, name no other files and take little memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from gpusampler import PatchGroups, read_patch_ids
from support.processes import run_python


class Evil:
    """Its pickle makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def zarr_v2(folder, content, **metadata):
    """An array of 10 ids in one chunk, which has the given content."""
    folder.mkdir(parents=True)
    default = {
        "zarr_format": 2,
        "shape": [10],
        "chunks": [10],
        "dtype": "<i8",
        "compressor": None,
        "filters": None,
        "fill_value": 0,
        "order": "C",
    }
    (folder / ".zarray").write_text(json.dumps({**default, **metadata}))
    (folder / "0").write_bytes(content)
    return folder


PICKLE = {"id": "pickle", "protocol": 5}
UNSAFE = {
    "compressor": {"compressor": PICKLE},
    "filter": {"filters": [{"id": "delta", "dtype": "<i8"}, PICKLE]},
    "object codec": {"filters": [PICKLE], "dtype": "|O"},
}


@pytest.mark.parametrize("where", ["path", "group", "array"])
@pytest.mark.parametrize("metadata", UNSAFE.values(), ids=UNSAFE.keys())
def test_no_chunk_of_zarr_is_unpickled(tmp_path, monkeypatch, metadata, where):
    zarr, pickles = pytest.importorskip("zarr"), pytest.importorskip("numcodecs.pickles")
    # numcodecs refuses from 0.16.6 on, unless told otherwise.
    monkeypatch.setattr(pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    folder = zarr_v2(tmp_path / "g" / "patch_id", pickle.dumps(Evil(tmp_path / "ran")), **metadata)
    (tmp_path / "g" / ".zgroup").write_text('{"zarr_format": 2}')
    source = {"path": folder, "group": tmp_path / "g"}.get(where)
    if source is None:
        try:
            source = zarr.open(folder, mode="r")
        except Exception:
            pytest.skip("this zarr does not open it")
    # zarr 3 opens all arrays of a group to list them, and may refuse this one.
    with pytest.raises(ValueError, match=r"must not have the codec 'pickle'|No Zarr data type"):
        read_patch_ids(source)
    assert not (tmp_path / "ran").exists()


def test_codecs_in_codecs_are_checked(tmp_path):
    pytest.importorskip("zarr")
    inner = {"name": "numcodecs.Pickle", "configuration": {}}
    codecs = [{"name": "sharding_indexed", "configuration": {"codecs": [inner]}}]
    (tmp_path / "a.zarr").mkdir()
    text = json.dumps({"zarr_format": 3, "node_type": "array", "codecs": codecs})
    (tmp_path / "a.zarr" / "zarr.json").write_text(text)
    with pytest.raises(ValueError, match=r"codec 'numcodecs.Pickle', .*a\.zarr'"):
        read_patch_ids(tmp_path / "a.zarr")


@pytest.mark.parametrize("shards", [None, (20,)])
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("opened", [False, True])
def test_chunks_that_zarr_does_not_have(tmp_path, zarr_format, shards, opened):
    zarr = pytest.importorskip("zarr")
    if zarr_format == 2 and shards:
        pytest.skip("version 2 has no shards")
    # The last shard is not full.
    values, path = np.arange(1, 96), tmp_path / "a.zarr"
    array = zarr.create_array(
        path, data=values, chunks=(10,), shards=shards, zarr_format=zarr_format
    )
    source = array if opened else path
    np.testing.assert_array_equal(read_patch_ids(source), values)
    os.remove(path / ("2" if zarr_format == 2 else "c/2"))
    # Files that are no chunks do not count.
    (path / ("9.bak" if zarr_format == 2 else "c/9.bak")).write_text("")
    with pytest.raises(ValueError, match=r"some chunks are not stored in .*allow_missing=True"):
        read_patch_ids(source)
    ids = read_patch_ids(source, allow_missing=True)
    length = 20 if shards else 10
    assert np.count_nonzero(np.asarray(ids) == 0) == length
    # A worker opens it in the same way.
    if not opened:
        assert pickle.loads(pickle.dumps(ids)).read(2 * length, 3 * length).sum() == 0


def h5(tmp_path, fill, name="a.h5"):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / name
    with h5py.File(path, "w") as file:
        fill(h5py, file)
    return path


def test_values_that_hdf5_does_not_have(tmp_path):
    def fill(h5py, file):
        chunked = file.create_dataset("chunked", (110,), "i8", chunks=(10,))
        chunked[:10] = 1
        file.create_dataset("contiguous", (2**62,), "i1")
        file.create_dataset("text", (5,), h5py.string_dtype())

    path = h5(tmp_path, fill)
    with pytest.raises(ValueError, match=r"only 1 of 11 chunks are stored in .*a\.h5'"):
        read_patch_ids(path, "chunked")
    for column in ("contiguous", "text"):
        with pytest.raises(ValueError, match=f"those of '/{column}' are not stored in"):
            read_patch_ids(path, column)
    ids = read_patch_ids(path, "chunked", allow_missing=True)
    assert PatchGroups.from_ids(ids).counts.tolist() == [100, 10]


def virtual(tmp_path, name="part.h5"):
    def part(h5py, file):
        file["x"] = np.arange(10) + 1

    def fill(h5py, file):
        layout = h5py.VirtualLayout((20,), "i8")
        layout[:10] = h5py.VirtualSource("part.h5", "x", (10,))
        layout[10:] = h5py.VirtualSource(str(tmp_path / "part.h5"), "x", (10,))
        file.create_virtual_dataset("patch_id", layout, fillvalue=0)

    h5(tmp_path, part, "part.h5")
    return h5(tmp_path, fill)


def external(tmp_path):
    np.arange(1, 21).tofile(tmp_path / "raw")

    def fill(h5py, file):
        file.create_dataset("patch_id", (20,), "i8", external=[(str(tmp_path / "raw"), 0, 160)])

    return h5(tmp_path, fill)


def link(tmp_path):
    h5(tmp_path, lambda h5py, file: file.create_dataset("x", data=np.arange(20) + 1), "part.h5")

    def fill(h5py, file):
        file["patch_id"] = h5py.SoftLink("/g/x")
        file["g/x"] = h5py.ExternalLink("part.h5", "/x")

    return h5(tmp_path, fill)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("make", [virtual, external, link])
def test_hdf5_reads_other_files_only_if_allowed(tmp_path, make, opened):
    path = make(tmp_path)
    h5py = pytest.importorskip("h5py")
    source = h5py.File(path) if opened else path
    with pytest.raises(ValueError, match=r"must not read other files, got the .*allow_external="):
        read_patch_ids(source)
    if opened and make is not link:
        with pytest.raises(ValueError, match="must not read other files"):
            read_patch_ids(source["patch_id"])
    ids = np.asarray(read_patch_ids(source, allow_external=True))
    assert ids.size == 20
    assert ids.min() > 0


def test_a_link_to_another_file_does_not_hide_the_rest(tmp_path):
    path = link(tmp_path)
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "a") as file:
        file["more"] = [4, 5]
    assert read_patch_ids(path, "more").read(0, 2).tolist() == [4, 5]
    with pytest.raises(ValueError, match="got the external link 'g/x'"):
        read_patch_ids(path, "g/x")


@pytest.mark.parametrize("damage", ["gone", "shorter", "hole", "no dataset"])
def test_sources_of_a_virtual_dataset_that_are_not_there(tmp_path, damage):
    path = virtual(tmp_path)
    h5py = pytest.importorskip("h5py")
    if damage == "gone":
        os.remove(tmp_path / "part.h5")
    else:
        with h5py.File(tmp_path / "part.h5", "a") as file:
            del file["x"]
            if damage == "shorter":
                file["x"] = np.arange(9)
            elif damage == "hole":
                file.create_dataset("x", (10,), "i8", chunks=(5,))[:5] = 1
    with pytest.raises(ValueError, match=r"must store a value of every sample.*part\.h5"):
        read_patch_ids(path, allow_external=True)
    if damage != "no dataset":
        assert read_patch_ids(path, allow_external=True, allow_missing=True).size == 20


def test_a_virtual_dataset_with_a_gap(tmp_path):
    def fill(h5py, file):
        file["x"] = np.arange(10)
        layout = h5py.VirtualLayout((20,), "i8")
        layout[:10] = h5py.VirtualSource(file["x"])
        file.create_virtual_dataset("patch_id", layout)

    path = h5(tmp_path, fill)
    with pytest.raises(ValueError, match="10 of 20 have a virtual source"):
        read_patch_ids(path, "patch_id", allow_external=True)


def test_external_storage_that_is_too_short(tmp_path):
    path = external(tmp_path)
    os.truncate(tmp_path / "raw", 159)
    with pytest.raises(ValueError, match=r"names '.*raw', which is missing or too short"):
        read_patch_ids(path, allow_external=True)


def test_links_of_hdf5_in_circles(tmp_path):
    def fill(h5py, file):
        file["a"], file["b"] = h5py.SoftLink("/b"), h5py.SoftLink("/a")
        file["broken"] = h5py.SoftLink("/nowhere")
        file["g/ids"] = [4, 5]
        file["g/up"] = file["/"]
        file["soft"] = h5py.SoftLink("g/up/g/ids")

    path = h5(tmp_path, fill)
    with pytest.raises(ValueError, match=r"at most 16 soft links, got 'a' in .*a\.h5'"):
        read_patch_ids(path, "a")
    with pytest.raises(ValueError, match=r"column must be one of .*got 'broken'"):
        read_patch_ids(path, "broken")
    for column in ("soft", "g/up/g/ids", "/soft"):
        assert read_patch_ids(path, column).read(0, 2).tolist() == [4, 5]


def test_an_hdf5_dataset_without_a_shape(tmp_path):
    path = h5(tmp_path, lambda h5py, file: file.create_dataset("ids", data=h5py.Empty("i8")))
    with pytest.raises(ValueError, match=r"ids in .*a\.h5' must have a shape, got an empty"):
        read_patch_ids(path)


def test_chunks_that_need_too_much_memory(tmp_path):
    pytest.importorskip("zarr")
    path = h5(
        tmp_path,
        lambda h5py, file: file.create_dataset(
            "ids", (100,), "i8", maxshape=(None,), chunks=(3 << 27,), compression=1
        ),
    )
    with pytest.raises(ValueError, match=r"must have 1 to 1073741824 bytes, got 3221225472: write"):
        read_patch_ids(path, allow_missing=True)
    for chunk, size, match in (
        (1 << 60, 10, "must have 1 to 1073741824 bytes, got"),
        (0, 10, "length >= 1, got 0|Zarr array"),
        (-1, 10, "length >= 1, got -1|Zarr array"),
        (1, 1 << 70, r"< 2\*\*63, got|Zarr array"),
        (1, 1 << 60, "some chunks are not stored"),
    ):
        path = zarr_v2(tmp_path / "a.zarr", b"", shape=[size], chunks=[chunk])
        with pytest.raises(ValueError, match=match) as caught:
            read_patch_ids(path)
        assert "a.zarr" in str(caught.value)
        shutil.rmtree(path)


def test_metadata_of_zarr_that_is_damaged(tmp_path):
    pytest.importorskip("zarr")
    folder = tmp_path / "a.zarr"
    folder.mkdir()
    for text in ("", "[1", "[" * 100_000, "7", '{"zarr_format": 2}', '{"codecs": ' + "[" * 5000):
        for name in (".zarray", "zarr.json"):
            (folder / name).write_text(text)
        with pytest.raises(ValueError, match=r"a\.zarr'"):
            read_patch_ids(folder)
    os.truncate(folder / ".zarray", 1 << 40)
    with pytest.raises(ValueError, match=r"must be a file of at most 67108864 bytes, got 1099511"):
        read_patch_ids(folder)
    os.remove(folder / ".zarray")
    os.mkfifo(folder / ".zarray")
    with pytest.raises(ValueError, match=r"'\.zarray' of .* must be a file"):
        read_patch_ids(folder)


def test_a_chunk_that_is_damaged(tmp_path):
    zarr = pytest.importorskip("zarr")
    values = np.arange(1000)
    zarr.create_array(tmp_path / "a.zarr", data=values, chunks=(1000,))
    (tmp_path / "a.zarr" / "c" / "0").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"Zarr array or group, got .*a\.zarr'"):
        read_patch_ids(tmp_path / "a.zarr").read(0, 10)

    path = h5(
        tmp_path,
        lambda h5py, file: file.create_dataset("ids", data=values, chunks=(1000,), fletcher32=True),
    )
    content = path.read_bytes()
    place = content.index(values.tobytes()[:800])
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    ids = read_patch_ids(path)
    with pytest.raises(OSError, match=r"must be a whole HDF5 file, got .*a\.h5'"):
        ids.read(0, 10)


def test_a_parquet_page_that_is_damaged(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "ids.parquet"
    values = np.random.default_rng(0).integers(0, 1 << 60, 1000)
    pq.write_table(pa.table({"patch_id": values}), path, compression="zstd", use_dictionary=False)
    content = path.read_bytes()
    path.write_bytes(content[:50] + bytes(200) + content[250:])
    ids = read_patch_ids(path)
    with pytest.raises((OSError, ValueError), match=r"complete Parquet file, got .*ids\.parquet'"):
        ids.read(0, 10)


@pytest.mark.parametrize(
    ("groups", "values", "total", "match"),
    [
        ([3, -1], [3, -1], 2, "has -1 rows"),
        ([3, 4], [3, 5], 7, "has 4 rows, but 5 values"),
        ([3, 4], [3, 4], 8, "have 7 rows, but it has 8"),
    ],
)
def test_a_parquet_footer_that_contradicts_itself(tmp_path, groups, values, total, match):
    from gpusampler.sources.parquet import _column_ids

    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"patch_id": [1] * 7}), tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")

    def row_group(i):
        column = SimpleNamespace(num_values=values[i])
        return SimpleNamespace(num_rows=groups[i], column=lambda index: column)

    metadata = SimpleNamespace(
        schema=file.metadata.schema,
        num_columns=1,
        num_row_groups=2,
        row_group=row_group,
        num_rows=total,
    )
    damaged = SimpleNamespace(schema_arrow=file.schema_arrow, metadata=metadata)
    with pytest.raises(ValueError, match=f"complete Parquet file, got 'a.parquet': .*{match}"):
        _column_ids([lambda: damaged], ["a.parquet"], None, None, False)


def test_a_parquet_string_that_is_not_utf8(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "ids.parquet"
    pq.write_table(pa.table({"patch_id": ["abcdefg", "b"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"abcdefg", b"abc\xffefg"))
    with pytest.raises(ValueError, match=r"must be UTF-8, got b'abc.* in a sample from sample 0"):
        read_patch_ids(path)


def test_wide_strings_are_read_in_pieces(tmp_path, monkeypatch):
    from gpusampler.sources import strings

    values = np.resize(np.array(["a", "b" * 20, "c"]), 1000)
    np.save(tmp_path / "ids.npy", values)
    monkeypatch.setattr(strings, "READ_BYTES", 1000)
    ids = read_patch_ids(tmp_path / "ids.npy")
    assert ids.names == ("a", "b" * 20, "c")
    np.testing.assert_array_equal(np.array(ids.names)[ids.read(100, 999)], values[100:999])
    monkeypatch.setattr(strings, "MAX_BYTES", 79)
    with pytest.raises(ValueError, match=r"must have at most 79 bytes, got 80 in .*ids\.npy'"):
        read_patch_ids(tmp_path / "ids.npy")


def test_npy_files_of_every_form(tmp_path):
    path = tmp_path / "ids.npy"
    values = np.arange(5)
    for version in ((1, 0), (2, 0), (3, 0)):
        stream = io.BytesIO()
        np.lib.format.write_array(stream, values, version)
        path.write_bytes(stream.getvalue() + b"trailing")
        assert np.asarray(read_patch_ids(path)).tolist() == values.tolist()
        fortran = stream.getvalue().replace(b"False", b"True ")
        path.write_bytes(fortran)
        assert np.asarray(read_patch_ids(path)).tolist() == values.tolist()
    np.save(path, np.zeros(3, [("a", "i8")]))
    with pytest.raises(ValueError, match=r"ids\.npy': .*structured dtypes are not supported"):
        read_patch_ids(path)
    path.write_bytes(stream.getvalue().replace(b"(5,)", b"(2305843009213693952,)"))
    with pytest.raises(ValueError, match=r"ids\.npy'"):
        read_patch_ids(path)


FIFTY_MB = """
import resource, sys
import gpusampler
from gpusampler import read_patch_ids
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (50 << 20),) * 2)
try:
    read_patch_ids(sys.argv[1])
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_a_header_of_four_gigabytes(tmp_path):
    (tmp_path / "ids.npy").write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xffab")
    line = run_python("-c", FIFTY_MB, tmp_path / "ids.npy").stdout
    assert "ids.npy': its header must have at most 10000 bytes, got 4294967295" in line
