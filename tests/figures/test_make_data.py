"""The committed data sets: what is in them, and that the named wheels still make them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest

from docs.figures import make_data
from docs.figures.make_data import ORIGINS, OUT
from docs.figures.real_data import load, sizes_of

WHEELS = os.environ.get("GPUSAMPLER_WHEELS")
PROVENANCE = (OUT / "PROVENANCE.md").read_text()


@pytest.mark.parametrize("name", ORIGINS)
def test_the_wheel_makes_the_committed_file_byte_for_byte(name):
    try:
        made = make_data.made(name, Path(WHEELS) if WHEELS else None)
    except FileNotFoundError as error:
        pytest.skip(f"{error}; GPUSAMPLER_WHEELS names a folder of wheels")
    assert made == (OUT / f"{name}.npz").read_bytes()


@pytest.mark.parametrize("name", ORIGINS)
def test_the_provenance_names_file_and_source(name):
    file = (OUT / f"{name}.npz").read_bytes()
    assert len(file) < 1_000_000
    mark = hashlib.sha256(file).hexdigest()
    assert re.search(rf"`{name}\.npz` \| {len(file):,} \| `{mark}`", PROVENANCE)
    origin = ORIGINS[name]
    assert f"{origin.package}=={origin.version}" in PROVENANCE
    assert all(f"`{member.sha256}`" in PROVENANCE for member in origin.members)


def test_another_file_than_the_named_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "some.txt").write_text("other")
    member = make_data.Member("some.txt", hashlib.sha256(b"this").hexdigest())
    origin = make_data.Origin("some", "1.0", [member], lambda file: {})

    class Installed:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(make_data.importlib.metadata, "distribution", lambda name: Installed())
    with pytest.raises(ValueError, match=r"some\.txt is not that of some 1\.0"):
        make_data.read(origin, None)


def test_wheels_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ase-3\.29\.0 wheel in"):
        make_data.made("molecules", tmp_path)


def test_utterances_are_those_that_were_published():
    vowels = load("vowels")
    lengths = sizes_of("vowels")
    assert (lengths.size, lengths.min(), lengths.max()) == (640, 7, 29)
    assert lengths.sum() == len(vowels["frames"])
    assert (np.bincount(vowels["speaker"][~vowels["test"]])[1:] == 30).all()
    # As UCI's description of the test file lists them.
    of_speakers = np.bincount(vowels["speaker"][vowels["test"]])[1:].tolist()
    assert of_speakers == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    # float32 keeps the six decimals of the source.
    micro = np.rint(vowels["frames"].astype(np.float64) * 1e6) / 1e6
    assert (micro.astype(np.float32) == vowels["frames"]).all()


def test_molecules_are_those_of_g2():
    molecules = load("molecules")
    atoms = sizes_of("molecules")
    assert (atoms.size, (atoms == 1).sum(), atoms.max()) == (162, 14, 14)
    of = dict(zip(molecules["name"].tolist(), range(atoms.size), strict=True))
    water = slice(*molecules["offsets"][of["H2O"] : of["H2O"] + 2])
    assert sorted(molecules["numbers"][water].tolist()) == [1, 1, 8]
    oxygen, one, other = molecules["positions"][water]
    assert np.linalg.norm(one - oxygen) == pytest.approx(0.969, abs=0.005)
    assert np.linalg.norm(other - oxygen) == pytest.approx(np.linalg.norm(one - oxygen))
    # Experiment: 232.2 and 109.5 kcal/mol, with the zero-point energy taken out.
    assert molecules["atomization"][of["H2O"]] == pytest.approx(232.2, abs=1)
    assert molecules["atomization"][of["H2"]] == pytest.approx(109.5, abs=1)
    assert (molecules["atomization"][atoms == 1] == 0).all()
    assert (molecules["atomization"][atoms > 1] > 0).all()


def test_storms_are_series_in_order_of_time():
    storms = load("storms")
    counts = np.bincount(storms["storm"])
    assert (counts.size, counts.min(), counts.max()) == (512, 2, 89)
    assert len(set(storms["name"].tolist())) == 512
    for storm in range(counts.size):
        assert (np.diff(storms["time"][storms["storm"] == storm]).astype(int) >= 0).all()
    of_wilma = storms["storm"] == storms["name"].tolist().index("Wilma 2005")
    # The lowest pressure of an Atlantic storm on record.
    assert storms["pressure"][of_wilma].min() == storms["pressure"].min() == 882
