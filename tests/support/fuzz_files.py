"""Read mutated files of ids, in a process with a memory limit.

python -m support.fuzz_files KIND FILES SEED

Each file is read with `read_patch_ids`, or as a patch of a groundwater folder. It either holds ids
or raises a ValueError, TypeError or OSError that names the file or a sample. Prints a JSON object:
how many files were read, how many raised, and the errors of another kind. The last line of stderr
is the number of the file that is read now, for a process that does not end well.
"""

from __future__ import annotations

import io
import json
import random
import re
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gpusampler import read_patch_ids
from gpusampler.groundwater.folder import open_arrays
from support import id_sources

MEMORY = 1 << 30
"""Bytes that a file may take beyond those of the imports."""

NUMBERS = [0, 1, 5, 99, 127, 128, 255, 256, 65535, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
           1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 70, -1, -5]  # fmt: skip
TEXTS = ["(", ")", "((((((", "[" * 3000, "{", "}", "'", '"', ",", ":", "\\", "\0", "\n", "L", "-",
         "None", "True", "False", "<i8", "<U9999999", "<U0", "|O", "i4,i4", "1e9",
         "__import__('os')", "pickle", "null", "NaN", "\xff\xfe"]  # fmt: skip
IDS = np.arange(100) // 7 + 1


def mutate(content: bytes, head: int, rng: random.Random) -> bytes:
    """Damage a file in one to four places, mostly within ``head`` bytes of its start or end."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        size = len(data)
        if not size:
            break
        place = rng.randrange(min(head, size))
        if rng.random() < 0.3:
            place = rng.randrange(size)
        elif rng.random() < 0.5:
            place = size - 1 - place
        kind = rng.randrange(7)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif kind == 2:
            width = rng.choice([1, 2, 4, 8])
            number = rng.choice(NUMBERS) % (1 << 8 * width)
            data[place : place + width] = number.to_bytes(width, "little")
        elif kind == 3:
            numbers = list(re.finditer(rb"-?\d+", data[:4096]))
            if numbers:
                found = rng.choice(numbers)
                data[found.start() : found.end()] = str(rng.choice(NUMBERS)).encode()
        elif kind == 4:
            data[place:place] = rng.choice(TEXTS).encode("latin1")
        elif kind == 5:
            del data[place : place + rng.randint(1, 40)]
        else:
            del data[place:]
    return bytes(data)


def npy(folder: Path) -> Path:
    version = random.choice([(1, 0), (2, 0), (3, 0)])
    values = random.choice([IDS, IDS.astype("U3"), IDS.astype(">u2"), IDS.astype("S3")])
    stream = io.BytesIO()
    np.lib.format.write_array(stream, values, version)
    path = folder / "ids.npy"
    path.write_bytes(stream.getvalue())
    return path


def patch(folder: Path) -> Path:
    for name, shape in (
        ("core_coords", (3, 3)),
        ("core_obs", (5, 3, 3)),
        ("ghost_coords", (0, 3)),
        ("ghost_obs", (5, 0, 3)),
    ):
        np.save(folder / f"{name}.npy", np.asarray(np.ones(shape), order=random.choice("CF")))
    return folder


def hdf5(folder: Path) -> Path:
    h5py = id_sources.library("h5py")
    settings = random.choice(
        [{}, {"chunks": (12,)}, {"chunks": (12,), "compression": 1, "maxshape": (None,)}]
    )
    with h5py.File(folder / "ids.h5", "w", libver=random.choice(["earliest", "latest"])) as file:
        file.create_dataset("patch_id", data=IDS, **settings)
        file["more"] = h5py.SoftLink("/patch_id")
    return folder / "ids.h5"


def parquet(folder: Path) -> Path:
    pq = id_sources.library("pyarrow.parquet")
    values = random.choice([IDS, IDS.astype("U3")])
    path = folder / "ids.parquet"
    compression = random.choice(["none", "snappy", "zstd"])
    pq.write_table(id_sources.table(values), path, row_group_size=12, compression=compression)
    return path


def zarr(folder: Path) -> Path:
    library = id_sources.library("zarr")
    version = random.choice([2, 3])
    # Version 3 has no specification of strings of a fixed width.
    text = IDS.astype("U3") if version == 2 else IDS.astype("U3").astype(np.dtypes.StringDType())
    values = random.choice([IDS, IDS.astype(">u2"), text])
    shards = random.choice([None, (24,)]) if version == 3 else None
    library.create_array(
        folder / "ids.zarr", data=values, chunks=(12,), shards=shards, zarr_format=version
    )
    return folder / "ids.zarr"


def damaged_file(path: Path, rng: random.Random) -> Path:
    """Return the file to damage: of a folder, mostly the metadata."""
    if path.is_file():
        return path
    files = sorted(file for file in path.rglob("*") if file.is_file())
    metadata = [file for file in files if file.suffix == ".json" or file.name.startswith(".z")]
    return rng.choice(metadata if metadata and rng.random() < 0.8 else files)


KINDS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "npy": (npy, 128),
    "patch": (patch, 128),
    "parquet": (parquet, 600),
    "zarr": (zarr, 600),
    "hdf5": (hdf5, 2000),
}
"""How to make a file, and the bytes of its header or footer."""


def read(kind: str, path: Path) -> None:
    if kind == "patch":
        for array in open_arrays(path):
            float(np.asarray(array[:1], np.float64).sum())
        return
    ids = read_patch_ids(path, progress=False)
    ids.read(0, min(ids.size, 1000))
    ids.read(max(ids.size - 1000, 0), ids.size)


def main(kind: str, count: int, seed: int) -> None:
    make, head = KINDS[kind]
    rng = random.Random(seed)
    warnings.simplefilter("error")
    result: dict[str, object] = {"read": 0, "raised": 0}
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        folders = []
        for number in range(40):
            random.seed(seed + number)
            folder = Path(root, f"f{number}")
            folder.mkdir()
            path = make(folder)
            read(kind, path)
            folders.append(path)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in range(count):
            print(number, file=sys.stderr, flush=True)
            path = rng.choice(folders)
            damaged = damaged_file(path, rng)
            content = damaged.read_bytes()
            damaged.write_bytes(mutate(content, head, rng))
            try:
                read(kind, path)
                result["read"] = int(str(result["read"])) + 1
            except (ValueError, TypeError, OSError) as error:
                result["raised"] = int(str(result["raised"])) + 1
                text = str(error)
                if damaged.name not in text and path.name not in text and "sample " not in text:
                    errors[f"{type(error).__name__}: {text[:300]}"] = f"file {number}"
            except BaseException as error:
                errors[f"{type(error).__name__}: {str(error)[:300]}"] = f"file {number}"
            damaged.write_bytes(content)
    print(json.dumps({**result, "errors": errors}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
