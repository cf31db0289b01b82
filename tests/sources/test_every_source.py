"""One law for every kind of source: any stretch of its ids is that stretch of the plain ids."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusampler import PatchBatchSampler, read_patch_ids
from gpusampler.sources import parquet, zarr_hdf5
from gpusampler.sources.base import PatchIds
from support.id_sources import EVERYWHERE, FILES, MEMORY, TABLES, check_stretches

N = 100
DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4"]
# Seldom names stand where common ones do not; one is no ASCII; order by code point, not by case.
WORDS = np.array(["clay", "sand", "Sand", "älv", "gravel", "10", "9", ""])


def plain_ids(dtype):
    values = np.random.default_rng(3).integers(0, 7, N)
    if np.dtype(dtype).kind == "i":
        values -= 3
    info = np.iinfo(dtype)
    values = values.astype(dtype)
    values[17] = info.max if dtype != "uint64" else (1 << 63) - 1
    values[63] = info.min
    return values


def plain_names():
    names = WORDS[np.random.default_rng(4).integers(0, 4, N)]
    names[50:58] = WORDS
    return names


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a few samples: borders everywhere."""
    monkeypatch.setattr(zarr_hdf5, "_MIN_READ", 1)
    monkeypatch.setattr(parquet, "BLOCK", 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", EVERYWHERE)
def test_integers(kind, dtype, tmp_path, small_pieces):
    plain = plain_ids(dtype)
    ids = read_patch_ids(EVERYWHERE[kind](plain, tmp_path))
    assert isinstance(ids, PatchIds)
    assert len(ids) == ids.size == N
    assert ids.names is None
    if kind not in ("plain_list", "plain_tuple", "objects", "pandas_object", "dataset"):
        assert ids.dtype == np.dtype(dtype).name
    check_stretches(ids, plain, [(3, 90), (0, N), (99, 100), (11, 13), (24, 24), (0, 5)])
    np.testing.assert_array_equal(np.asarray(ids), plain)


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_names(kind, tmp_path, small_pieces):
    plain = plain_names()
    ids = read_patch_ids(EVERYWHERE[kind](plain, tmp_path))
    assert ids.size == N
    assert ids.dtype == "str"
    assert ids.names == tuple(sorted(set(plain.tolist())))
    assert all(type(name) is str for name in ids.names)
    expected = np.searchsorted(np.array(ids.names), plain)
    check_stretches(ids, expected, [(3, 90), (0, N), (99, 100), (11, 13), (24, 24), (0, 5)])


@pytest.mark.parametrize("words", [False, True], ids=["integers", "names"])
@pytest.mark.parametrize("kind", EVERYWHERE)
def test_any_stretch_in_any_order(kind, words, tmp_path, small_pieces):
    plain = plain_names() if words else plain_ids("int32")
    ids = read_patch_ids(EVERYWHERE[kind](plain, tmp_path))
    expected = np.searchsorted(np.array(ids.names), plain) if words else plain
    ends = st.integers(0, N)

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(ends, ends), min_size=1, max_size=6))
    def law(stretches):
        for stretch, other in stretches:
            start, stop = sorted((stretch, other))
            np.testing.assert_array_equal(ids.read(start, stop), expected[start:stop])

    law()


@pytest.mark.parametrize("kind", ["npy", "parquet_folder", "zarr_folder", "hdf5", "polars_lazy"])
def test_the_sampler_takes_the_same(kind, tmp_path):
    plain = plain_ids("int16")
    source = EVERYWHERE[kind](plain, tmp_path)
    batches = list(PatchBatchSampler(source, 4, seed=3))
    assert batches == list(PatchBatchSampler(plain, 4, seed=3))


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_ids_that_were_read_are_sources(kind, tmp_path):
    ids = read_patch_ids(EVERYWHERE[kind](plain_ids("int64"), tmp_path))
    assert read_patch_ids(ids) is ids


@pytest.mark.parametrize("kind", FILES)
def test_files_say_when_they_were_changed(kind, tmp_path):
    EVERYWHERE[kind](plain_ids("int64"), tmp_path)
    # Opened anew below, as files that were changed in 2001, the last by name a second later.
    for path in tmp_path.rglob("*"):
        os.utime(path, ns=(0, 10**18))
    named = {"parquet_folder": "parts", "zarr_folder": "ids.zarr", "zarr_group_folder": "group"}
    if kind in ("memory_map", "npy", "parquet", "hdf5", "hdf5_contiguous", *named):
        path = tmp_path / named[kind] if kind in named else next(tmp_path.iterdir())
        folder = path / "patch_id" if kind == "zarr_group_folder" else path
        last = sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != "_")[-1:]
        last = last[0] if kind in named else path
        os.utime(last, ns=(0, 10**18 + 10**9))
        source = np.load(path, mmap_mode="r") if kind == "memory_map" else path
        assert read_patch_ids(source).modified == 10**18 + 10**9
    elif kind.startswith("hdf5"):
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "ids.h5", "r") as file:
            source = file["patch_id"] if kind == "hdf5_dataset" else file
            assert read_patch_ids(source).modified == 10**18


@pytest.mark.parametrize("kind", [*MEMORY, *TABLES])
def test_what_lies_in_no_file_was_never_changed(kind, tmp_path):
    assert read_patch_ids(EVERYWHERE[kind](plain_ids("int64"), tmp_path)).modified is None
