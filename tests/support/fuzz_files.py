"""Read mutated files, in a process with a memory limit.

python -m support.fuzz_files KIND FILES SEED [SKIPPED ...]

Each file is read with `read_patch_ids`, as a patch of a groundwater folder, or as an index. It
either holds ids or raises a ValueError, TypeError or OSError that names the file or a sample.
Batches of an index are in the dataset, and those of an index whose checksums were not made again
are the right ones. Prints a JSON object: how many files were read, how many raised, and the errors
of another kind. The last line of stderr is the number of the file that is read now, for a process
that does not end well.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from gpusampler import PatchBatchSampler, PatchGroups, read_patch_ids
from gpusampler.groundwater.folder import open_arrays
from support import id_sources
from support.index_files import IndexFile

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


INDEX_SAMPLES = 17_000
"""Of two blocks."""


def index(folder: Path) -> Path:
    ids = np.random.default_rng(random.randrange(100)).integers(0, 9, INDEX_SAMPLES)
    path = folder / "ids.index"
    kind = random.randrange(4)
    if kind == 0:
        groups = PatchGroups.from_counts(np.bincount(ids))
    elif kind == 1:
        groups = PatchGroups.from_ids(ids.astype("U1"))
    else:
        groups = PatchGroups.from_ids(ids if kind == 2 else ids[:200])
    groups.save(path, progress=False)
    return path


def forge_index(path: Path, rng: random.Random) -> None:
    """Change parts of an index, and write it with right checksums."""
    file = IndexFile(path)
    samples = file.samples
    for _ in range(rng.randint(1, 3)):
        number = rng.choice([*NUMBERS, rng.randrange(2 * INDEX_SAMPLES)])
        kind = rng.randrange(5)
        if kind == 0:
            signature = file.head.get("signature")
            fields = rng.choice([file.head, file.lies])
            if isinstance(signature, dict) and rng.random() < 0.4:
                fields = signature
            values = [number, str(number), None, True, [number], {}, 1.5, rng.choice(TEXTS)]
            fields[rng.choice([*file.head, *fields])] = rng.choice(values)
        elif kind == 1:
            row, column = rng.randrange(3), rng.randrange(file.tables.shape[1])
            file.tables[row, column] = (number + 2**63) % 2**64 - 2**63
        elif kind == 2 and samples.size:
            values = [number, int(samples[rng.randrange(samples.size)])]
            width = 8 * samples.itemsize
            at = rng.randrange(samples.size)
            samples[at] = (rng.choice(values) + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
        elif kind == 3:
            file.names = mutate(file.names or b"[]", 100, rng)
        else:
            file.order = file.order[: 4 * rng.randrange(len(file.order) // 4 + 1)]
    file.write()


def batches_of(path: Path, rng: random.Random) -> list[list[int]]:
    """Return some batches of an index, after checks that their samples are in the dataset."""
    groups = PatchGroups.load(path, mmap=rng.random() < 0.8, verify=rng.random() < 0.3)
    batches: list[list[int]] = []
    for interleave in (True, False):
        sampler = PatchBatchSampler(groups, 64, seed=1, interleave=interleave, output="numpy")
        sampler.coverage()
        last = sampler.plan.num_batches - 1
        parts = [batch for batch, _ in zip(sampler, range(9), strict=False)]
        parts += list(sampler.plan.evaluate(2, [0, last // 2, last]).indices)
        for indices in parts:
            if int(indices.min()) < 0 or int(indices.max()) >= groups.source_size:
                raise AssertionError(f"{indices} is not in the dataset of {groups}")
            batches.append(indices.tolist())
    return batches


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
    "index": (index, 2000),
}
"""How to make a file, and the bytes of its header or footer."""


class Tally:
    """Counts inputs that were read and that raised, and collects errors of another kind."""

    def __init__(self) -> None:
        self.read = self.raised = self.skipped = 0
        self.errors: dict[str, str] = {}

    @contextmanager
    def file(self, number: int, names: Iterable[str]) -> Iterator[None]:
        """Count an input; an error is right if it has one of the names."""
        try:
            yield
            self.read += 1
        except BaseException as error:
            text = str(error)
            self.raised += 1
            is_clear = isinstance(error, (ValueError, TypeError, OSError))
            if not (is_clear and any(name in text for name in names)):
                self.errors[f"{type(error).__name__}: {text[:300]}"] = f"input {number}"

    def report(self) -> str:
        return json.dumps(vars(self))


def limit_memory() -> None:
    """Let this process take `MEMORY` more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def read(kind: str, path: Path, rng: random.Random) -> object:
    """Read a file, and return what a damaged copy must agree with if it can be read."""
    if kind == "index":
        return batches_of(path, rng)
    if kind == "patch":
        for array in open_arrays(path):
            float(np.asarray(array[:1], np.float64).sum())
        return None
    ids = read_patch_ids(path, progress=False)
    ids.read(0, min(ids.size, 1000))
    ids.read(max(ids.size - 1000, 0), ids.size)
    return None


def main(kind: str, count: int, seed: int, *skipped: int) -> None:
    make, head = KINDS[kind]
    rng = random.Random(seed)
    warnings.simplefilter("error")
    tally = Tally()
    with tempfile.TemporaryDirectory() as root:
        right: dict[Path, object] = {}
        for number in range(40):
            random.seed(seed + number)
            folder = Path(root, f"f{number}")
            folder.mkdir()
            path = make(folder)
            right[path] = read(kind, path, rng)
        limit_memory()
        for number in range(count):
            print(number, file=sys.stderr, flush=True)
            path = rng.choice(list(right))
            damaged = damaged_file(path, rng)
            content = damaged.read_bytes()
            is_forged = kind == "index" and rng.random() < 0.5
            if is_forged:
                forge_index(path, rng)
            else:
                damaged.write_bytes(mutate(content, head, rng))
            if number in skipped:
                tally.skipped += 1
                damaged.write_bytes(content)
                continue
            with tally.file(number, (damaged.name, path.name, "sample ")):
                found = read(kind, path, rng)
                if not is_forged and found != right[path]:
                    raise AssertionError("a damaged file was read as another one")
            damaged.write_bytes(content)
    print(tally.report())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
