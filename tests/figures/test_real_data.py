"""``python -m docs.figures.real_data``: the page says what it prints, and counts are right."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from docs.figures import real_data
from docs.figures.real_data import load, sizes_of
from support.paths import ROOT

PAGE = ROOT / "docs" / "how-to" / "sequences.md"
PICTURES = ("length-buckets.png", "same-size-molecules.png", "ragged-groups.png")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    pytest.importorskip("matplotlib")
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def printed(drawn):
    """What the command prints, while it draws."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        real_data.main(["--pictures", str(drawn)])
    return out.getvalue()


def test_the_tables_on_the_page_are_those_that_are_printed(printed):
    rows = {line for line in printed.splitlines() if line.startswith("| ")}
    assert len(rows) == 16
    assert rows <= set(PAGE.read_text().splitlines())


def test_pictures_are_drawn_and_shown(printed, drawn):
    for picture in PICTURES:
        assert (drawn / picture).read_bytes().startswith(b"\x89PNG")
        assert f"(../img/{picture})" in PAGE.read_text()


def test_padding_is_what_a_padded_tensor_has():
    torch = pytest.importorskip("torch")
    lengths = sizes_of("vowels")
    frames = torch.from_numpy(load("vowels")["frames"]).split(lengths.tolist())
    found = real_data.by_length()[0]
    real = padded = largest = 0
    sampler = real_data.PatchBatchSampler(np.zeros(640, int), real_data.BATCH_SIZE, seed=0)
    for epoch in range(real_data.EPOCHS):
        for batch in sampler.batches(epoch):
            members = [frames[sample] for sample in batch.indices]
            x = torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=np.nan)
            padded += x[..., 0].numel()
            real += int((~x[..., 0].isnan()).sum())
            largest = max(largest, x[..., 0].numel())
    assert found.share() == 1 - real / padded
    assert found.largest() == largest


def test_a_pair_of_padded_molecules_is_padding_unless_both_atoms_are_there():
    two = real_data.Padding("two", [np.array([2, 3]), np.array([3])])
    assert two.share() == 1 - 8 / 9
    assert two.share(2) == pytest.approx(1 - (4 + 9 + 9) / (2 * 9 + 9))
    assert two.largest(2) == 18
    assert two.used(2) == (18 + 9) / 2 / 18
    assert two.members == 1.5
