"""``python -m benchmarks.pictures``: it draws what the library hands out, and pages show it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pictures
from support.paths import ROOT

pytest.importorskip("matplotlib")


@pytest.mark.slow("draws every picture")
def test_all_pictures_are_drawn_and_shown(tmp_path, capsys):
    pictures.main(["--out", str(tmp_path / "img")])
    drawn = {path.name for path in (tmp_path / "img").iterdir()}
    assert drawn == {f"{name}.png" for name in pictures.PICTURES}
    assert all((ROOT / "docs" / "img" / name).exists() for name in drawn)
    shown = {
        Path(link).name
        for page in (ROOT / "docs").rglob("*.md")
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    }
    assert drawn <= shown


def test_shades_tell_patches_and_samples_apart():
    ids = pictures.tutorial_ids()
    colours = pictures.shades(ids)
    assert len(np.unique(colours, axis=0)) == ids.size
    assert pictures.places_of(np.array(["b", "a", "b"])).tolist() == [0, 0, 1]


def test_the_tutorials_ids_are_those_of_the_pictures():
    """The page shows the first of them."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    assert str(pictures.tutorial_ids()[:5]) in page
