"""Mutated files are errors that name the file: no crash, no hang, no other error, little memory."""

from __future__ import annotations

import json
import sys

import pytest

from support.processes import run_python

LIBRARIES = {"npy": "numpy", "patch": "numpy", "parquet": "pyarrow", "zarr": "zarr", "hdf5": "h5py"}


def run_fuzzer(kind: str, count: int, seed: int, timeout: float) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("limits its memory as Linux does")
    pytest.importorskip(LIBRARIES[kind])
    module = ("-m", "support.fuzz_files")
    process = run_python(*module, kind, count, seed, timeout=timeout, check=False)
    where = f"seed {seed}, after file {process.stderr[-300:]}"
    assert process.returncode == 0, where
    result = json.loads(process.stdout)
    assert result["errors"] == {}, f"seed {seed}"
    assert result["read"] + result["raised"] == count
    assert min(result["read"], result["raised"]) > 0


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_few_hundred_files(kind):
    run_fuzzer(kind, 300, 1, 60)


@pytest.mark.battery("50,000 mutated files")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", LIBRARIES)
def test_fifty_thousand_files(kind, seed):
    run_fuzzer(kind, 1000, 1000 + seed, 600)
