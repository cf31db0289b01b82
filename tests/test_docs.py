"""The README's and the pages' snippets run: ``python`` blocks do, ``py`` blocks are only shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What measures memory does so in a process of its own.
MARKS = {"calibrate.md": [pytest.mark.fresh]}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=MARKS.get(page.name, []), id=str(page.relative_to(ROOT)))
        for page in PAGES
    ],
)
def test_snippets_run(page, tmp_path, monkeypatch):
    blocks = BLOCK.findall(page.read_text())
    if not blocks:
        pytest.skip("no python blocks on this page")
    monkeypatch.chdir(tmp_path)
    # A reader sits in the checkout, where pages that need real data find it.
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "data").symlink_to(ROOT / "docs" / "data")
    # The blocks of a page build on one another, as a reader would type them.
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}[{number}]", "exec"), names)


def test_there_are_snippets():
    assert sum(len(BLOCK.findall(page.read_text())) for page in PAGES) >= 5
