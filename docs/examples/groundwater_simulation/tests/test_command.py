"""The command of the groundwater simulation: its options and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import groundwater_simulation.__main__ as command
from groundwater_simulation import simulate as simulation
from support.processes import refused, run_python


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*args: object):
        return CliRunner().invoke(command.main, [str(arg) for arg in args])

    return invoke


def test_simulate_passes_its_options_on(run, monkeypatch, tmp_path):
    calls: list[tuple] = []

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        return tmp_path / "made"

    monkeypatch.setattr(command, "simulate", record)
    result = run(
        "--preset", "medium", "--out", "x", "--seed", 5, "--mf6", "m", "--overwrite"
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"written: {tmp_path / 'made'}\n"
    assert calls == [((Path("x"), "medium"), {"seed": 5, "mf6": Path("m"), "overwrite": True})]
    run("--out", "x")
    assert calls[1] == (
        (Path("x"), "small"),
        {"seed": simulation.DEFAULT_SEED, "mf6": None, "overwrite": False},
    )


def test_simulate_refuses(run, monkeypatch):
    refused(run(), "Missing option '--out'")
    refused(run("--preset", "huge", "--out", "x"), "preset must be one of")
    refused(run("--out", "x", "--mf6", "nowhere/mf6"), "nowhere/mf6")
    monkeypatch.setattr(simulation, "find_spec", lambda name: None if name == "flopy" else object())
    refused(run("--out", "x"), "the simulation needs flopy: pip install")


@pytest.mark.slow("a process of its own")
def test_the_package_runs_as_a_command():
    arguments = ("-m", "groundwater_simulation", "--preset", "huge", "--out", "x")
    process = run_python(*arguments, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("groundwater_simulation: preset must be one of small, medium")
