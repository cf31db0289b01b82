"""The README's and the pages' snippets run: ``python`` blocks do, ``py`` blocks are only shown.

An ``output`` block below a ``python`` block is what that one prints, letter for letter.
"""

from __future__ import annotations

import inspect
import io
import re
import sys
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import gpusampler
from support.paths import ROOT
from support.processes import run_python

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Compares peaks of memory, which show where nothing was freed before.
ALONE = {"calibrate.md"}
MARKS = {
    "in-memory.md": [pytest.mark.slow("compiles to machine code")],
    "groundwater-gino.md": [pytest.mark.slow("trains a GINO")],
}
SLOW_FROM = {"in-memory.md": "\n## Compiled loops\n"}
"""Headings from which on a page is slow; the blocks before them also run by default."""
BLOCK = re.compile(r"^```(python|output)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def run(page: str, text: str) -> int:
    """Run a page's blocks, hold them to the outputs shown, and return how many were compared."""
    # The blocks of a page build on one another, as a reader would type them.
    names: dict[str, object] = {"__name__": "__main__"}
    printed, compared = None, 0
    for number, (kind, block) in enumerate(BLOCK.findall(text)):
        if kind == "output":
            assert printed is not None, f"{page}[{number}] is the output of nothing"
            assert printed == block, f"{page}[{number}] is not what the block above it prints"
            printed, compared = None, compared + 1
            continue
        printed_text = io.StringIO()
        with redirect_stdout(printed_text):
            exec(compile(block, f"{page}[{number}]", "exec"), names)
        printed = printed_text.getvalue()
    return compared


@pytest.mark.parametrize(
    ("page", "stop"),
    [
        *(
            pytest.param(page, None, marks=MARKS.get(page.name, []), id=str(page.relative_to(ROOT)))
            for page in PAGES
        ),
        *(
            pytest.param(page, SLOW_FROM[page.name], id=f"{page.name}, the part that is not slow")
            for page in PAGES
            if page.name in SLOW_FROM
        ),
    ],
)
def test_snippets_run(page, stop, tmp_path, monkeypatch):
    text = page.read_text()
    if stop:
        text, found, _ = text.partition(stop)
        assert found
    if not BLOCK.search(text):
        pytest.skip("no python blocks on this page")
    monkeypatch.chdir(tmp_path)
    # A reader sits in the checkout, where pages that need real data find it.
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "data").symlink_to(ROOT / "docs" / "data")
    if page.name in ALONE:
        run_python("-W", "error", __file__, page, cwd=tmp_path)
    else:
        run(page.name, text)


def test_there_are_snippets():
    assert sum(len(BLOCK.findall(page.read_text())) for page in PAGES) >= 5


def page_of(code: str, output: str) -> str:
    return f"```python\n{code}\n```\n\n```output\n{output}\n```\n"


def test_an_output_that_is_no_longer_true_fails():
    assert run("page", page_of("print(6 * 7)", "42")) == 1
    with pytest.raises(AssertionError, match=r"page\[1\] is not what the block above it prints"):
        run("page", page_of("print(6 * 7)", "41"))
    with pytest.raises(AssertionError, match=r"page\[2\] is the output of nothing"):
        run("page", page_of("print(6 * 7)", "42") + "\n```output\n42\n```\n")


MODULES = r"python -m ((?:benchmarks|docs\.figures)[\w.]*)"
PATHS = r"pytest (?:-m \S+ )?((?:benchmarks|tests|docs)\S*?)(?:::\S+)?(?=[\s`|)])"


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / ".github" / "CONTRIBUTING.md", ROOT / ".ci" / "run"]
)
def test_commands_name_what_is_there(page):
    text = page.read_text()
    assert [name for name in re.findall(MODULES, text) if find_spec(name.rstrip(".")) is None] == []
    assert [path for path in re.findall(PATHS, text) if not (ROOT / path).exists()] == []


REFERENCE = re.findall(
    r"^::: (gpusampler[\w.]*)$", (ROOT / "docs" / "reference.md").read_text(), re.M
)


def test_the_reference_has_every_public_name():
    top = {name.removeprefix("gpusampler.") for name in REFERENCE}
    assert set(gpusampler.__all__) <= top
    # What is reached by another module's name, or handed out by what is public.
    assert top - set(gpusampler.__all__) == {
        "sampler.cursor.BatchCursor",
        "sampler.cursor.CursorBatch",
        "sources.base.PatchIds",
        "sampler.iterator.EpochIterator",
        "lightning.ResumeSampler",
        "sampler.plot.plot_epoch",
        "groundwater.Normalize",
        "groundwater.collate_fn",
        "neuralop.PatchProcessor",
        "neuralop.PatchTrainer",
        "sampler.profile.Profile",
        "sampler.profile.Row",
    }
    assert len(REFERENCE) == len(set(REFERENCE))


@pytest.mark.parametrize("name", REFERENCE)
def test_what_the_reference_names_is_there(name):
    module, _, attribute = name.rpartition(".")
    if module != "gpusampler":
        pytest.importorskip("torch")
    if module in ("gpusampler.lightning", "gpusampler.neuralop"):
        pytest.importorskip(module.removeprefix("gpusampler."))
    if module == "gpusampler.sampler.plot":
        pytest.importorskip("matplotlib")
    assert inspect.getdoc(getattr(import_module(module), attribute))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[1]).read_text())
