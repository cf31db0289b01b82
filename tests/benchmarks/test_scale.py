"""``python -m benchmarks.scale``, cut down: all that it measures is there, and right."""

from __future__ import annotations

import json

import pytest

from benchmarks import scale as measures
from benchmarks.scale import main
from docs.figures.scale import main as draw_scale
from support.processes import environment


@pytest.fixture(autouse=True)
def _set_environment(monkeypatch):
    """Let children that the benchmark starts import the package that this process has."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow("groups a file, killed on the way")
def test_a_process_is_killed_and_another_goes_on(tmp_path):
    found = measures.killed(tmp_path, 3_000_000, patience=[0.0], checkpoint=0.0)
    assert found["codes"] == [-9, 0]
    assert found["patches"] == 500
    assert 0 < found["anonymous_gb"] < 0.5
    assert list(tmp_path.iterdir()) == []


def test_1e12_samples_from_counts():
    found = measures.from_counts(10**12, 500)
    assert found["samples"] == 10**12
    assert found["of_one_patch"]
    assert found["distinct"]
    assert found["as_the_reference"]
    assert found["kilobytes"] < 1000


@pytest.mark.slow("the whole benchmark, on small files")
def test_the_whole_is_printed_written_and_drawn(tmp_path, capsys):
    some = ["linearity", "argsort", "drained", "opening", "asking"]
    main([*some, "--size", "2e6", "--out", str(tmp_path)])
    assert "exponent" in capsys.readouterr().out
    (written,) = tmp_path.glob("scale-*.json")
    draw_scale([str(written), str(tmp_path / "p.png")])
    found = json.loads(written.read_text())
    assert set(found) == {"machine", *some}
    assert found["argsort"]["same"]
    assert found["asking"]["times_faster"] > 1.5
    assert (tmp_path / "p.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "parts must be among" in capsys.readouterr().err
