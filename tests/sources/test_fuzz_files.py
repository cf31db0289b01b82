"""Mutated files are errors that name the file: no crash, no hang, no other error, little memory."""

from __future__ import annotations

import pytest

from support.processes import run_fuzzer

LIBRARIES = {
    "npy": "numpy",
    "patch": "numpy",
    "parquet": "pyarrow",
    "zarr": "zarr",
    "hdf5": "h5py",
    "index": "numpy",
}


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_few_hundred_files(kind):
    pytest.importorskip(LIBRARIES[kind])
    run_fuzzer("fuzz_files", kind, 300, 1)


@pytest.mark.battery("50,000 mutated files of ids, and 200,000 indexes")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", LIBRARIES)
def test_many_files(kind, seed):
    pytest.importorskip(LIBRARIES[kind])
    run_fuzzer("fuzz_files", kind, 20_000 if kind == "index" else 1000, 1000 + seed)
