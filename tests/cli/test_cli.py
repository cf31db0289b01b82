"""The command line: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import gpusampler
from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.cli import main as cli_module
from gpusampler.cli.inspect import draw, inspect_source
from gpusampler.cli.main import cli
from gpusampler.demo.embedded import small_data
from support.processes import environment, refused, run_python
from support.strategies import quiet


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*args: object):
        return CliRunner().invoke(cli, [str(arg) for arg in args])

    return invoke


@pytest.fixture
def ids(tmp_path) -> Path:
    counts = np.array([5, 1, 12, 8])
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).permutation(np.repeat([30, -4, 7, 2**40], counts)))
    return path


def run_module(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "gpusampler", *arguments, check=False)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 5000


# Real processes


def test_version():
    process = run_module("--version")
    assert process.returncode == 0
    assert process.stdout.startswith(f"gpusampler, version {gpusampler.__version__}, host ")


def test_a_real_refusal(tmp_path):
    process = run_module("inspect", tmp_path / "no.npy", "--batch-size", 2)
    assert process.returncode == 2
    assert process.stdout == ""
    assert (
        process.stderr
        == f"gpusampler: source must be an existing file or folder: {tmp_path / 'no.npy'}\n"
    )


def test_without_click():
    code = "import sys; sys.modules['click'] = None\nfrom gpusampler.__main__ import main\nmain()"
    process = run_python("-c", code, check=False)
    assert process.returncode == 2
    assert process.stderr == "the command line needs click: pip install click\n"


def test_inspect_does_not_import_torch(ids):
    code = (
        "import sys; from gpusampler.cli.main import cli\n"
        f"cli.main(['inspect', {str(ids)!r}, '--batch-size', '4', '--out', {str(ids)!r} + '.png'],"
        " standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    run_python("-c", code)


DROPPED = r"Exception ignored in: .*\n(Traceback .*\n( .*\n)+)?KeyboardInterrupt: ?\n"


def interrupted(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Interrupt a process up to three times until it ends; return its stdout and stderr."""
    try:
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=30)
        raise AssertionError("three interrupts did not end the process")
    finally:
        # Not `kill`: the tests of other systems run this one without SIGKILL.
        if process.poll() is None:
            process.terminate()


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
def test_ctrl_c(tmp_path):
    command = [sys.executable, "-m", "gpusampler", "demo", "--epochs", "500", "--out", "out"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell runs in the background ignores SIGINT, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    # Python reports and drops an interrupt inside a finalizer; the test then interrupts again.
    stdout, stderr = interrupted(process)
    assert process.returncode == 130
    assert stdout == ""
    assert re.sub(DROPPED, "", stderr).strip() == ""


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("source", ["interrupt()", "exec('interrupt()')", "mangled()"])
def test_ctrl_c_wherever_it_strikes(source, tmp_path):
    code = (
        "from gpusampler.cli.main import cli\n"
        "def interrupt():\n"
        "    raise KeyboardInterrupt\n"
        "def mangled():\n"
        "    try:\n"
        "        interrupt()\n"
        "    except BaseException as error:\n"
        "        raise RuntimeError('of a library') from error\n"
        f"cli.commands['inspect'].callback = lambda **_: {source}\n"
        "import sys; sys.argv = ['gpusampler', 'inspect', 'x', '--batch-size', '4']\n"
        "from gpusampler.__main__ import main\n"
        "main()\n"
    )
    script = tmp_path / "probe.py"
    script.write_text(code)
    process = run_python(script, check=False)
    assert process.returncode == 130
    assert process.stdout == process.stderr.strip() == ""


@pytest.mark.skipif(os.name != "posix", reason="pipes as on POSIX")
def test_a_closed_pipe_is_quiet(tmp_path):
    folder = tmp_path / "ids"
    folder.mkdir()
    np.save(folder / "ids.npy", np.arange(20))
    command = f"{sys.executable} -m gpusampler inspect ids.npy --batch-size 2 | true"
    process = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert "Traceback" not in process.stderr
    assert "BrokenPipe" not in process.stderr


# inspect


def test_inspect_an_array(run, ids, tmp_path):
    result = run("inspect", ids, "--batch-size", 4)
    assert result.exit_code == 0, result.stderr
    words = [line.split() for line in result.stdout.splitlines()]
    assert ["keep", "8", "0", "(0.0", "%)", "0", "(0.0", "%)"] in words
    # 5 = 4 + 1, 1, 12 = 3 * 4, 8 = 2 * 4
    assert ["drop", "6", "2", "(7.7", "%)", "0", "(0.0", "%)"] in words
    row = next(line for line in words if line[:1] == ["pad"])
    assert row[:3] == ["pad", "8", "0"]
    assert ["-4", "1"] in words
    assert [str(2**40), "8"] in words
    assert "ids.npy: 26 samples in 4 patches" in result.stdout
    assert "written: gpusampler-inspect.png" in result.stdout
    assert is_png(tmp_path / "gpusampler-inspect.png")


def test_inspect_a_patch_folder(run, tmp_path):
    result = run("inspect", small_data(), "--batch-size", 8, "--out", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    assert "small: 378 samples in 9 patches" in result.stdout
    assert "samples sorted by patch, no order stored" in result.stdout
    assert is_png(tmp_path / "a.png")
    result = run(
        "inspect", small_data(), "--batch-size", 8, "--split", "val", "--input-window", 3,
        "--output-window", 3, "--out", tmp_path / "b.png",
    )  # fmt: skip
    assert "small: 27 samples in 9 patches" in result.stdout


def test_inspect_a_column_and_an_index(run, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"well": ["b", "a", "b"], "other": [1, 2, 3]})
    frame.to_parquet(tmp_path / "ids.parquet")
    result = run("inspect", "ids.parquet", "--batch-size", 2, "--column", "well")
    assert "3 samples in 2 patches" in result.stdout
    assert re.search(r"^ *b +2", result.stdout, re.M)
    refused(run("inspect", "ids.parquet", "--batch-size", 2), "it has 'well', 'other'")
    PatchGroups.from_ids(frame["well"]).save(tmp_path / "ids.index")
    second = run("inspect", "ids.index", "--batch-size", 2)
    assert second.stdout.partition("\n")[2] == result.stdout.partition("\n")[2]


def test_inspect_sums_up_many_patches(run, tmp_path):
    np.save(tmp_path / "many.npy", np.repeat(np.arange(1000), np.arange(1, 1001)))
    result = run("inspect", "many.npy", "--batch-size", 10)
    assert result.exit_code == 0, result.stderr
    assert "smallest (patch 0)" in result.stdout
    assert "largest (patch 999)" in result.stdout
    assert len(result.stdout.splitlines()) <= 20


def test_inspect_agrees_with_the_batches():
    ids = np.repeat([3, 1, 2], [7, 2, 9])
    inspection = inspect_source(ids, 4, "x")
    for row in inspection.outcomes:
        if row.partial == "drop":
            with pytest.warns(UserWarning, match="drop"):
                sampler = PatchBatchSampler(ids, 4, seed=9, partial=row.partial)
        else:
            sampler = PatchBatchSampler(ids, 4, seed=9, partial=row.partial)
        batches = list(sampler)
        times_seen = np.bincount(np.concatenate(batches), minlength=len(ids))
        assert row.batches == len(batches)
        assert row.missed == (times_seen == 0).sum()
        assert row.repeated == (times_seen > 1).sum()
    assert inspection.full_batches == 3
    assert sorted(inspection.short_batches) == [1, 2, 3]


def test_inspect_when_no_patch_fills_a_batch(run, ids):
    result = run("inspect", ids, "--batch-size", 10**9)
    assert result.exit_code == 0, result.stderr
    assert ["drop", "0", "26", "(100.0", "%)"] in [
        line.split()[:5] for line in result.stdout.splitlines()
    ]


five_more = pytest.mark.slow("draws five more pictures")


@pytest.mark.parametrize(
    "batch_size", [pytest.param(1, marks=five_more), 4, pytest.param(500, marks=five_more)]
)
def test_pictures_of_every_kind(tmp_path, batch_size):
    rng = np.random.default_rng(0)
    wide = np.maximum(1, rng.lognormal(4, 2, 300)).astype(int)
    for name, counts in {
        "few": np.array([3, 9]),
        "one": np.array([1]),
        "some": rng.integers(1, 90, 50),
        "equal": np.full(200, 42),
        "wide": wide,
    }.items():
        inspection = inspect_source(
            np.repeat(np.arange(len(counts)) - 10**12, counts), batch_size, name
        )
        draw(inspection, tmp_path / f"{name}.png")
        assert is_png(tmp_path / f"{name}.png")


def test_inspect_without_matplotlib(run, ids, monkeypatch, tmp_path):
    monkeypatch.setattr(
        cli_module, "find_spec", lambda name: None if name == "matplotlib" else object()
    )
    result = run("inspect", ids, "--batch-size", 4)
    assert result.exit_code == 0
    assert "keep" in result.stdout
    assert result.stderr == "no picture: it needs matplotlib (pip install matplotlib)\n"
    assert list(tmp_path.glob("*.png")) == []
    refused(
        run("inspect", ids, "--batch-size", 4, "--out", "x.png"),
        "the picture needs matplotlib: pip install matplotlib",
    )


def test_inspect_an_epoch(run, ids, tmp_path, monkeypatch):
    plot = pytest.importorskip("gpusampler.sampler.plot")
    drawn = []

    def batches_of(sampler, epoch):
        return [batch.indices.tolist() for batch in sampler.batches(epoch)]

    def plot_epoch(sampler, epoch):
        figure = actual(sampler, epoch)
        drawn.append((figure.get_suptitle(), batches_of(sampler, epoch)))
        return figure

    actual = plot.plot_epoch
    monkeypatch.setattr(plot, "plot_epoch", plot_epoch)
    plain = run("inspect", ids, "--batch-size", 4)
    assert drawn == []
    result = run("inspect", ids, "--batch-size", 4, "--epoch", 2)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == plain.stdout
    assert is_png(tmp_path / "gpusampler-inspect.png")
    options = ["--seed", 9, "--partial", "pad", "--out", "e.png"]
    result = run("inspect", ids, "--batch-size", 4, "--epoch", 0, *options)
    assert "written: e.png" in result.stdout
    assert is_png(tmp_path / "e.png")
    # 5, 1, 12 and 8 samples in 8 batches
    headings = [
        "Epoch 2: 8 batches from 4 patches, 26 samples, no padding",
        "Epoch 0: 8 batches from 4 patches, 26 samples, 18.8 % padding",
    ]
    samplers = [
        PatchBatchSampler(np.load(ids), 4, seed=0),
        quiet(np.load(ids), 4, seed=9, partial="pad"),
    ]
    for sampler, epoch, heading, found in zip(samplers, (2, 0), headings, drawn, strict=True):
        assert found == (heading, batches_of(sampler, epoch))


def test_an_epoch_that_cannot_be_drawn(run, ids, monkeypatch):
    refused(run("inspect", ids, "--batch-size", 4, "--epoch", -1), "'--epoch': -1 is not in the")
    refused(
        run("inspect", ids, "--batch-size", 40, "--epoch", 0, "--partial", "drop"),
        "partial='drop' leaves no batches",
    )
    monkeypatch.setattr(
        cli_module, "find_spec", lambda name: None if name == "matplotlib" else object()
    )
    refused(
        run("inspect", ids, "--batch-size", 4, "--epoch", 0),
        "the picture needs matplotlib: pip install matplotlib",
    )


# Refusals


def test_bad_sources(run, tmp_path):
    (tmp_path / "text.npy").write_text("1, 2, 3")
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "table.npy", np.zeros((3, 2), dtype=int))
    np.save(tmp_path / "empty.npy", np.zeros(0, dtype=int))
    (tmp_path / "folder").mkdir()
    for name, text in (
        (
            "nowhere.npy",
            f"source must be an existing file or folder: {tmp_path / 'nowhere.npy'}",
        ),
        ("text.npy", "text.npy"),
        ("float.npy", "float64"),
        ("table.npy", "(3, 2)"),
        ("empty.npy", "empty.npy' must name at least one sample, got none"),
        ("folder", ". Folder folder is not a patch folder: it has no folders patch_<id>"),
    ):
        refused(run("inspect", name, "--batch-size", 4), text)


def test_bad_usage(run, ids):
    refused(run("inspect", ids, "--batch-size", 0), "0 is not in the range x>=1")
    refused(run("inspect", ids), "Missing option '--batch-size'")
    refused(run("inspect", ids, "--batch-size", "many"), "'many' is not a valid integer")
    refused(run("inspect", ids, "--batch-size", 2**31), "batch_size must be < 2147483648")
    refused(run("frobnicate"), "No such command 'frobnicate'")
    refused(run("demo", "--epochs", 0), "0 is not in the range x>=1")
    refused(run("demo", "--seed", -1), "'--seed'")


def test_help_without_a_command(run):
    result = run()
    assert result.exit_code == 2
    assert "demo" in result.stderr
    assert run("--help").exit_code == 0


def test_an_unwritable_out(run, ids, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run("demo", "--out", "file"), "file")
    result = run("inspect", ids, "--batch-size", 4, "--out", "file/x.png")
    assert result.exit_code == 2
    assert "file/x.png" in result.stderr


def test_demo_refuses_a_broken_folder(run, tmp_path):
    patch = tmp_path / "data" / "patch_5"
    patch.mkdir(parents=True)
    refused(run("demo", "--data", "data"), "patch_5/core_coords.npy is missing")
    for kind in ("core", "ghost"):
        np.save(patch / f"{kind}_coords.npy", np.zeros((2, 3)))
        np.save(patch / f"{kind}_obs.npy", np.zeros((8, 2, 3)))
    refused(
        run("demo", "--data", "data"),
        "has 6 of the 8 time steps in patch_5/core_obs.npy, but a window needs 7",
    )


@pytest.mark.parametrize("missing", ["torch", "neuralop", "matplotlib"])
def test_demo_without_an_extra(run, monkeypatch, missing):
    monkeypatch.setattr(cli_module, "find_spec", lambda name: None if name == missing else object())
    package = "neuraloperator" if missing == "neuralop" else missing
    refused(run("demo"), f"the demo needs {missing}: pip install {package}")


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("gpusampler.demo.job.run_demo", broken)
    result = run("demo")
    assert isinstance(result.exception, ZeroDivisionError)


# demo


@pytest.mark.slow("trains once more; test_demo.py shares one training")
def test_demo(run, tmp_path):
    result = run("demo", "--epochs", 1, "--batch-size", 16)
    assert result.exit_code == 0, result.stderr
    assert "probe loss" in result.stdout
    assert "gpusampler-demo/demo.png and gpusampler-demo/report.json" in result.stdout
    assert is_png(tmp_path / "gpusampler-demo" / "demo.png")
    assert (tmp_path / "gpusampler-demo" / "report.json").stat().st_size > 1000
