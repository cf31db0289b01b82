"""``python -m docs.figures.epochs``: it draws the library's batches, and pages show it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from docs.figures import epochs
from support.paths import ROOT

pytest.importorskip("matplotlib")


@pytest.mark.slow("draws every picture")
def test_all_pictures_are_drawn_and_shown(tmp_path, capsys):
    epochs.main(["--out", str(tmp_path / "img")])
    drawn = {path.name for path in (tmp_path / "img").iterdir()}
    assert drawn == {f"{name}.png" for name in epochs.PICTURES}
    assert all((ROOT / "docs" / "img" / name).exists() for name in drawn)
    shown = {
        Path(link).name
        for page in (ROOT / "docs").rglob("*.md")
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }
    assert drawn <= shown


def test_shades_tell_patches_and_samples_apart():
    ids = epochs.tutorial_ids()
    colours = epochs.shades(ids)
    assert len(np.unique(colours, axis=0)) == ids.size
    assert epochs.places_of(np.array(["b", "a", "b"])).tolist() == [0, 0, 1]


def test_the_tutorials_ids_are_those_of_the_pictures():
    """The page shows the first of them."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    assert str(epochs.tutorial_ids()[:5]) in page
