"""``python -m benchmarks.gpu``: what it survives, its table, and a rehearsal on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.gpu import __main__ as main_module
from benchmarks.gpu import report
from benchmarks.gpu.machine import Timing
from benchmarks.gpu.record import Case, Record
from benchmarks.gpu.workload import patch_counts
from support.processes import environment, run_python

CHILD = """
import os, signal, sys, time
from benchmarks.gpu import record
from benchmarks.gpu.__main__ import end_with_parent
from benchmarks.gpu.record import Case, Record

class Machine:
    is_lost = False
    def free(self):
        # torch's `empty_cache` on a device that is lost
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

class Bench:
    machine = Machine()

def fine(bench):
    results.append("check", case="", name="fine", ok=True, detail="")

def lose_the_device(bench):
    bench.machine.is_lost = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def lose_it_unseen(bench):
    bench.machine.is_lost = True

def hang(bench):
    results.append("note", case="hang", text=str(os.getpid()))
    time.sleep(60)

def crash(bench):
    os.kill(os.getpid(), signal.SIGSEGV)

def be_killed_while_writing(bench):
    with results.path.open("a") as file:
        file.write('{"kind": "check", "na')
    os.kill(os.getpid(), signal.SIGKILL)

def be_wrong(bench):
    raise ValueError("wrong")

record.MARGIN = float(os.environ.get("MARGIN", 0.2))
results = Record(__import__("pathlib").Path(sys.argv[1]), float(sys.argv[2]))
end_with_parent()
results.run_all([Case(name, 0.1, globals()[name]) for name in sys.argv[3:]], Bench())
"""


@pytest.fixture
def results(tmp_path):
    return Record(tmp_path / "gpu.jsonl", time.time() + 100)


@pytest.fixture
def run_children(results, monkeypatch):
    """Runs cases of CHILD by name, in as many processes as it takes; returns their statuses."""
    children = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kw: children.append(popen(*args, **kw)) or children[-1]
    )

    def run(*cases, seconds=60.0):
        children.clear()
        results.deadline = time.time() + seconds
        command = [sys.executable, "-c", CHILD, str(results.path), str(results.deadline), *cases]
        code = main_module.watch(command, results)
        assert all(child.poll() is not None for child in children)
        ends = {line["case"]: line for line in results.lines("end")}
        statuses = {name: line["status"] for name, line in ends.items()}
        return SimpleNamespace(code=code, children=len(children), ends=ends, statuses=statuses)

    return run


# What a run survives


@pytest.mark.parametrize(
    ("case", "status", "words"),
    [
        ("lose_the_device", "error", "illegal memory access"),
        ("lose_it_unseen", "error", "illegal memory access"),
        ("crash", "lost", "SIGSEGV"),
        ("hang", "lost", "exit code 1"),
        ("be_killed_while_writing", "lost", "SIGKILL"),
    ],
)
def test_what_breaks_in_a_case_costs_that_case_only(run_children, results, case, status, words):
    ran = run_children("fine", case, "be_wrong")
    assert ran.statuses == {"fine": "ok", case: status, "be_wrong": "error"}
    assert words in ran.ends[case]["error"]
    # One more process than the first, which nothing of the lost device could reach.
    assert (ran.code, ran.children) == (0, 2)
    assert [line["case"] for line in results.lines("begin")] == ["fine", case, "be_wrong"]
    assert report.has_failed(results)
    assert f"{case}: {status}" in report.table(results)


def test_an_error_that_leaves_the_device_alive_needs_no_other_process(run_children):
    ran = run_children("be_wrong", "fine")
    assert ran.statuses == {"be_wrong": "error", "fine": "ok"}
    assert ran.children == 1


def test_a_run_that_is_started_again_goes_on_after_the_case_that_ended_it(run_children, results):
    results.append("begin", case="crash")
    with results.path.open("a") as file:
        file.write('{"kind": "check", "na')
    for children in (1, 1):
        ran = run_children("crash", "fine")
        assert ran.statuses == {"crash": "lost", "fine": "ok"}
        assert (ran.code, ran.children) == (0, children)
    assert "an earlier run ended in this case" in ran.ends["crash"]["error"]
    assert [line["case"] for line in results.lines("begin")] == ["crash", "fine"]


def test_no_process_is_left_when_the_one_that_watches_is_killed(run_children, results):
    deadline = time.time() + 60
    child = [sys.executable, "-c", CHILD, str(results.path), str(deadline), "hang", "fine"]
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import __main__, record\n"
        f"__main__.watch({child!r}, record.Record(Path({str(results.path)!r}), {deadline}))"
    )
    # Without the margin the child would end itself.
    watching = subprocess.Popen([sys.executable, "-c", code], env=environment(MARGIN="60"))
    wait_until(lambda: any(line["kind"] == "note" for line in results.lines()))
    pid = next(line["text"] for line in results.lines() if line["kind"] == "note")
    assert is_running(pid)
    watching.kill()
    watching.wait()
    wait_until(lambda: not is_running(pid))
    assert run_children("hang", "fine").statuses == {"hang": "lost", "fine": "ok"}


def wait_until(holds):
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid):
    """Whether a process is there and not a zombie, which nothing may have waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_begins_no_case_is_not_started_again(run_children, results):
    ran = run_children("no_such_case")
    assert (ran.code, ran.children) == (1, 1)
    assert results.lines() == []


def test_a_process_that_hangs_is_killed_at_the_end_of_the_time(results, monkeypatch):
    monkeypatch.setattr(main_module, "GRACE", 0.2)
    results.deadline = time.time() + 0.1
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    start = time.monotonic()
    results.append("begin", case="hangs")
    assert main_module.watch(command, results) == 1
    assert time.monotonic() - start < 20


def test_what_does_not_fit_in_the_time_is_skipped_and_can_run_later(run_children, results):
    late = run_children("fine", seconds=5)
    assert (late.code, late.statuses) == (0, {})
    assert "fine: skipped: 5 s were left" in report.table(results)
    assert run_children("fine").statuses == {"fine": "ok"}
    assert "skipped" not in report.table(results)


def test_the_watching_process_imports_no_array_library():
    code = (
        "import sys; from benchmarks.gpu import __main__\n"
        "__main__.subprocess.Popen = lambda *args, **kw: exec('raise SystemExit(5)')\n"
        "try: __main__.main(['--out', sys.argv[1]])\n"
        "except SystemExit as end: assert end.code == 5\n"
        "print(sorted({'torch', 'cupy', 'triton', 'numpy', 'gpusampler'} & set(sys.modules)))"
    )
    assert run_python("-c", code, "results").stdout == "[]\n"


def test_what_is_missing_is_told_before_anything_runs(tmp_path, monkeypatch, capsys):
    def find_spec(name):
        return None if name == "array_api_compat" else object()

    monkeypatch.setattr(main_module, "find_spec", find_spec)
    assert main_module.main(["--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().out == "benchmarks.gpu cannot import array_api_compat\n"
    assert not (tmp_path / "none").exists()


# What a run finds


def test_a_case_that_breaks_keeps_what_it_found(results):
    record = results
    bench = SimpleNamespace(machine=SimpleNamespace(free=lambda: None))
    timing = Timing(1.0, 1.0, 1.0, 1)

    def breaks(bench):
        record.timing("this", timing, 10, layout="contiguous")
        warnings.warn("careful", stacklevel=1)
        raise ValueError("what went wrong")

    def is_late(bench):
        record._case_ends = 0
        record.stop_if_late()

    def is_wrong(bench):
        record.check("1 is 2", 1 == 2, "it is 1")

    assert record.run(Case("fine", 1, lambda bench: record.note("so")), bench) == "ok"
    assert not report.has_failed(results)
    assert record.run(Case("long", 1000, breaks), bench) == "skipped"
    assert record.run(Case("late", 1, is_late), bench) == "partial"
    assert not report.has_failed(results)
    assert record.run(Case("broken", 1, breaks), bench) == "error"
    assert report.has_failed(results)
    assert record.run(Case("wrong", 1, is_wrong), bench) == "ok"
    assert results.lines("timing")[0]["ns_per_index"] == 1e5
    table = report.table(results)
    for words in (
        "FAILED 1 is 2: it is 1",
        "broken: error: ValueError: what went wrong",
        "what went wrong",
        "UserWarning: careful",
        "late: partial: its time was spent",
        "in fine: so",
    ):
        assert words in table


@pytest.mark.parametrize(
    "samples",
    [2100, 10**6, 10**7, 10**8, pytest.param(10**9, marks=pytest.mark.slow("20 million patches"))],
)
@pytest.mark.parametrize(
    ("mix", "least", "most"),
    [("large", 1025, 65_535), ("wide", 1025, 1 << 20), ("mixed", 10, 10**5), ("small", 20, 60)],
)
def test_sizes_of_patches(samples, mix, least, most):
    counts = patch_counts(samples, mix, np.random.default_rng(1))
    assert counts.sum() == samples
    assert counts.min() >= least
    assert counts.max() <= most


# A rehearsal


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    # A machine that has a GPU rehearses as well.
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": None}
    command = ["-m", "benchmarks.gpu", *arguments]
    return run_python(*command, check=False, timeout=900, **variables)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    for needed in ("torch", "triton"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("proof") / "made" / "here"
    process = run("--dry-run", "--out", out)
    assert process.returncode == 0, process.stdout + process.stderr
    return SimpleNamespace(process=process, out=out, found=Record(out / "gpu.jsonl", 0.0))


rehearsed = pytest.mark.slow("the whole benchmark, rehearsed on a CPU, takes a minute")


@rehearsed
def test_every_case_ends_well(rehearsal):
    ended = report.ended(rehearsal.found)
    statuses = {name: case["status"] for name, case in ended.items()}
    assert set(statuses.values()) == {"ok"}, ended
    assert list(statuses)[:3] == ["epoch of 3e+03", "steps in a graph", "peak memory"]
    assert list(statuses)[-1] == "tiles of Triton"


@rehearsed
def test_every_check_holds(rehearsal):
    checks = {check["name"]: check["ok"] for check in rehearsal.found.lines("check")}
    assert all(checks.values()), checks
    assert {
        "large gathered int32: a kernel evaluates",
        "compiled, contiguous, batch 256: a kernel evaluates",
        "steps through an epoch's end: eager, gathered, batch 64, in a graph",
        "steps through an epoch's end: compiled, contiguous, batch 256, without a graph",
    } <= set(checks)


@rehearsed
def test_what_is_timed(rehearsal):
    rows = rehearsal.found.lines("timing")
    assert all(0 < row["least"] <= row["ms"] <= row["most"] for row in rows)
    whats = {row["what"] for row in rows}
    assert {"ours, chunks", "ours, one call", "copy", "pure gather", "randperm"} <= whats
    assert {"argsort of hashed keys", "grouping", "tolist() alone", "PatchTensorLoader"} <= whats
    epochs = {(r["layout"], r["dtype"]) for r in rows if r["what"].startswith("ours, chunks")}
    layouts = {(layout, dtype) for layout in ("contiguous", "gathered") for dtype in ("int64",)}
    assert epochs == {*layouts, ("contiguous", "int32"), ("gathered", "int32")}
    assert all(np.isfinite(goal["value"]) for goal in rehearsal.found.lines("goal"))
    notes = {(note["case"], note["text"]) for note in rehearsal.found.lines("note")}
    assert ("epoch by CuPy", "left out: a dry run") in notes


@rehearsed
def test_what_matters_most_is_printed_last(rehearsal):
    printed = rehearsal.process.stdout
    parts = [printed.index(f"== {name}") for name in ("machine", "checks", "cases", "goals")]
    assert parts == sorted(parts)
    assert len(printed[parts[0] :]) < 12_000
    assert printed.endswith("passed\n")


@rehearsed
def test_results_of_another_kind_are_not_mixed(rehearsal):
    path = rehearsal.out / "gpu.jsonl"
    before = path.read_text()
    line = json.dumps({"kind": "machine", "commit": "another", "dry_run": True})
    path.write_text(f"{line}\n{before}")
    process = run("--dry-run", "--out", rehearsal.out)
    path.write_text(before)
    assert process.returncode == 2
    assert "has results of {'commit': 'another', 'dry_run': True}, not of" in process.stdout


@pytest.mark.slow("processes that import torch")
def test_no_device_is_said_at_once(tmp_path):
    process = run("--out", tmp_path)
    assert process.returncode == 2
    assert "needs a CUDA device, but torch" in process.stdout
    assert (tmp_path / "gpu.jsonl").exists() is False
