"""The benchmark of rows from files measures every file, on small ones."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import zarr

from benchmarks.peers import rows


@pytest.mark.parametrize("kind", rows.FILES)
def test_files_hold_the_rows_as_they_are_named(kind, tmp_path):
    values = np.random.default_rng(0).random((200, 1024), np.float32)
    array = rows.write(kind, values, tmp_path)()
    np.testing.assert_array_equal(array[:], values)
    if kind.startswith("zarr"):
        assert isinstance(array, zarr.Array)
        assert (array.chunks, bool(array.compressors)) == ((32, 1024), "zstd" in kind)
    else:
        assert isinstance(array, h5py.Dataset)
        assert array.chunks == (None if "contiguous" in kind else (32, 1024))
        assert array.compression == ("gzip" if "gzip" in kind else None)


def test_the_table(monkeypatch, capsys):
    monkeypatch.setattr(rows, "WIDTHS", (256,))
    monkeypatch.setattr(rows, "PAIRS", 1)
    monkeypatch.setattr(rows, "MOST_SECONDS", 0.01)
    rows.main(["--megabytes", "1", "--file", "HDF5, chunks"])
    cells = capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]
    assert [cell.strip() for cell in cells[:2]] == ["HDF5, chunks", "1024"]
    assert all(float(cell) >= 0 for cell in cells[2:])


@pytest.mark.parametrize("kind", ["HDF5, chunks", "zarr, chunks"])
def test_the_plain_loop_reads_the_same_batches(kind, tmp_path):
    values = np.random.default_rng(0).random((600, 64), np.float32)
    array = rows.write(kind, values, tmp_path)()
    ids = np.arange(600) % 3

    def sampler():
        return rows.PatchBatchSampler(ids, 16, seed=0, device="numpy", output="numpy")

    for plain, ours in zip(
        rows.plain(sampler(), array), rows.PatchTensorLoader(sampler(), x=array), strict=True
    ):
        np.testing.assert_array_equal(plain, ours["x"])
