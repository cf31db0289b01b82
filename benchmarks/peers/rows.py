"""Rows of files: ``python -m benchmarks.peers.rows``.

`PatchTensorLoader` reads batches of 64 rows, of patches that are scattered over the file, beside
two loops over the same batches: a plain loop, which reads the distinct rows of a batch in order,
and a DataLoader with two workers, which reads row by row. Files are in the page cache. Ratios are
ours / theirs by the wall time of a batch, medians of adjacent pairs in one process with one thread:
of a whole epoch of ours, and of the first seconds of theirs. The start of the DataLoader's workers
does not count. ``--read-ahead`` stands for a larger file: what matters is the file's size in
windows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from benchmarks import markdown
from benchmarks.machine import line, machine
from gpusampler import PatchBatchSampler, PatchTensorLoader
from gpusampler.sampler.read_ahead import READ_AHEAD_BYTES

FILE_BYTES = 1 << 27
WIDTHS = (64, 1024)
"""Numbers of 4 bytes in a row."""
CHUNK_BYTES = 1 << 17
PATCHES = 100
BATCH = 64
PAIRS = 3
MOST_SECONDS = 1.0

Open = Callable[[], Any]
HDF5 = "HDF5, contiguous", "HDF5, chunks", "HDF5, chunks, gzip"
FILES = *HDF5, "zarr, chunks", "zarr, chunks, zstd"


def write(kind: str, rows: np.ndarray, folder: Path) -> Open:
    """Write rows to a file, and return the function that opens it."""
    path = folder / kind.replace(", ", "-")
    chunks = (max(1, CHUNK_BYTES // rows[0].nbytes), rows.shape[1])
    if kind.startswith("zarr"):
        compressors = "auto" if "zstd" in kind else None
        zarr.create_array(path, data=rows, chunks=chunks, compressors=compressors)
        return partial(zarr.open_array, path, mode="r")
    options: dict[str, Any] = {} if "contiguous" in kind else {"chunks": chunks}
    if "gzip" in kind:
        options |= {"compression": "gzip", "compression_opts": 1}
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=rows, **options)
    return lambda: h5py.File(path, "r")["x"]


class RowByRow(Dataset[torch.Tensor]):
    """What a user writes for a DataLoader: each worker opens the file."""

    def __init__(self, open_file: Open, size: int) -> None:
        self._open, self._size, self._rows = open_file, size, None

    def __getitem__(self, sample: int) -> torch.Tensor:
        if self._rows is None:
            self._rows = self._open()
        return torch.from_numpy(self._rows[sample])

    def __len__(self) -> int:
        return self._size


def plain(sampler: PatchBatchSampler, rows: Any) -> Iterator[np.ndarray]:
    """Read batch by batch: HDF5 wants ascending, distinct samples."""
    select = rows.oindex if isinstance(rows, zarr.Array) else rows
    for batch in sampler:
        distinct, index = np.unique(batch, return_inverse=True)
        yield select[distinct][index]


def batch_seconds(batches: Iterable[Any], starts: bool = False, most: float = math.inf) -> float:
    """Return the seconds of a batch; without those up to the first batch if workers start."""
    begin, count = time.perf_counter(), 0
    for count, _ in enumerate(batches, 1):
        now = time.perf_counter()
        if count == 1 and starts:
            begin = now
        if now - begin > most:
            break
    return (time.perf_counter() - begin) / max(count - starts, 1)


def compared(open_file: Open, ids: np.ndarray, ahead: int) -> Iterator[tuple[float, float]]:
    """Yield ours and the median ratio against the plain loop, then against the DataLoader."""
    size, rows = ids.size, open_file()
    by_list, by_array = (
        PatchBatchSampler(ids, BATCH, seed=0, device="numpy", output=output)
        for output in ("list", "numpy")
    )
    ours = PatchTensorLoader(by_list, read_ahead_bytes=ahead << 20, x=rows)
    workers = DataLoader(RowByRow(open_file, size), batch_sampler=by_list, num_workers=2)
    for starts, make in ((False, lambda: plain(by_array, rows)), (True, lambda: workers)):
        pairs = [
            (batch_seconds(ours), batch_seconds(make(), starts, MOST_SECONDS)) for _ in range(PAIRS)
        ]
        first, ratios = zip(*((one, one / other) for one, other in pairs), strict=True)
        yield statistics.median(first), statistics.median(ratios)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.rows", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=FILE_BYTES >> 20, help="of a file")
    parser.add_argument("--read-ahead", type=int, default=READ_AHEAD_BYTES >> 20, metavar="MB")
    parser.add_argument("--file", nargs="+", choices=FILES, default=FILES)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(line(machine()))
    print(f"batches of {BATCH}, {PATCHES} patches, files of {asked.megabytes} MiB, ", end="")
    print(f"{asked.read_ahead} MiB read ahead\n")
    head = ("file", "bytes in a row", "ours, µs a batch", "/ plain loop", "/ DataLoader, 2 workers")
    print(markdown.head(head))
    rng = np.random.default_rng(0)
    for width in WIDTHS:
        # Rounded, so that they can be compressed.
        rows = rng.normal(size=((asked.megabytes << 20) // (4 * width), width)).round(1)
        ids = rng.integers(0, PATCHES, len(rows))
        for kind in asked.file:
            with tempfile.TemporaryDirectory() as folder:
                open_file = write(kind, rows.astype(np.float32), Path(folder))
                (ours, by_plain), (_, by_workers) = compared(open_file, ids, asked.read_ahead)
            cells = kind, 4 * width, f"{ours * 1e6:.0f}", f"{by_plain:.2f}", f"{by_workers:.2f}"
            print(markdown.row(cells), flush=True)


if __name__ == "__main__":
    main()
