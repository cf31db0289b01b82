"""The proof on a GPU, rehearsed: ``python -m benchmarks.gpu --dry-run``, toy sizes on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from support.processes import run_python

KEPT_BY_THE_REPLY = 12_000


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    # A machine that has a GPU rehearses as well.
    defaults = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": None}
    command = ["-m", "benchmarks.gpu", *arguments]
    return run_python(*command, check=False, timeout=900, **{**defaults, **variables})


@pytest.fixture
def package(monkeypatch):
    """What runs no case in this process may be imported into it."""
    from benchmarks.gpu import __main__, identity, machine, record, report, workload

    return SimpleNamespace(
        main=__main__,
        identity=identity,
        machine=machine,
        record=record,
        report=report,
        workload=workload,
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    for needed in ("torch", "triton", "matplotlib"):
        pytest.importorskip(needed)
    out = tmp_path_factory.mktemp("proof") / "made" / "here"
    process = run("--dry-run", "--out", out)
    assert process.returncode == 0, process.stdout + process.stderr
    return SimpleNamespace(process=process, out=out, path=next(out.glob("gpu-*.json")))


@pytest.fixture(scope="module")
def found(rehearsal):
    return json.loads(rehearsal.path.read_text())


# A dry run


rehearsed = pytest.mark.slow("the whole benchmark, rehearsed on a CPU, takes a minute")


@rehearsed
def test_every_case_ends_well(found):
    statuses = {case["name"]: case["status"] for case in found["cases"]}
    assert set(statuses.values()) == {"ok"}, found["cases"]
    assert {"kernel", "identity", "no waiting", "steps in a graph", "peak memory"} <= set(statuses)
    assert list(statuses)[:3] == ["kernel", "identity", "no waiting"]
    assert list(statuses)[-1] == "picture"


@rehearsed
def test_every_check_holds(found):
    checks = {check["name"] for check in found["checks"]}
    assert all(check["ok"] for check in found["checks"])
    assert {
        "torch: the kernel was built and is in use",
        "torch: every form of the kernel was built",
        "torch kernel: indices",
        "torch kernel: int32 indices",
        "torch reference: indices",
        "torch: grouping",
        "torch: lists",
        "torch: indices of batches()",
        "batches() waits for nothing",
        "steps through an epoch's end: eager, gathered, batch 64, in a graph",
        "steps through an epoch's end: compiled, contiguous, batch 256, without a graph",
    } <= checks


@rehearsed
def test_what_is_timed(found):
    rows = found["timings"]
    assert all(0 < row["least"] <= row["ms"] <= row["most"] for row in rows)
    whats = {row["what"] for row in rows}
    assert {"ours, chunks", "ours, one call", "copy", "pure gather", "randperm"} <= whats
    assert {"argsort of hashed keys", "grouping", "tolist() alone", "PatchTensorLoader"} <= whats
    epochs = {(r["layout"], r["dtype"]) for r in rows if r["what"].startswith("ours, chunks")}
    layouts = {(layout, dtype) for layout in ("contiguous", "gathered") for dtype in ("int64",)}
    assert epochs == {*layouts, ("contiguous", "int32"), ("gathered", "int32")}
    assert all(np.isfinite(goal["value"]) for goal in found["goals"])
    assert found["header"]["cupy_left_out"] == "a dry run"


@rehearsed
def test_the_table_fits_into_a_reply(rehearsal):
    printed = rehearsal.process.stdout
    assert len(printed) < KEPT_BY_THE_REPLY
    assert "checks: " in printed
    assert printed.endswith("passed\n")
    assert all(len(line) < 170 for line in printed.splitlines())


@rehearsed
def test_the_picture(rehearsal):
    picture = rehearsal.path.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


@rehearsed
def test_goes_on_where_another_process_ended(rehearsal, found, tmp_path):
    path = tmp_path / "gpu.json"
    left_out = {"grouping", "picture"}
    cases = [case for case in found["cases"] if case["name"] not in left_out]
    path.write_text(json.dumps({**found, "cases": cases}))
    process = run("--dry-run", "--out", tmp_path, "--resume", path)
    assert process.returncode == 0, process.stdout + process.stderr
    again = json.loads(path.read_text())
    assert [case["name"] for case in again["cases"][len(cases) :]] == ["grouping", "picture"]
    assert again["checks"] == found["checks"]


# Where it does not go well


@pytest.mark.slow("a process that imports torch")
def test_no_device_is_said_at_once(tmp_path):
    process = run("--out", tmp_path / "none")
    assert process.returncode == 2
    assert "needs a CUDA device: torch" in process.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.slow("a process that imports everything, to draw an empty picture")
def test_a_budget_of_nothing_leaves_everything_out(tmp_path):
    pytest.importorskip("torch")
    process = run("--dry-run", "--out", tmp_path, "--budget", 0)
    assert process.returncode == 0, process.stdout + process.stderr
    cases = json.loads(next(tmp_path.glob("*.json")).read_text())["cases"]
    assert {case["status"] for case in cases[:-1]} == {"skipped"}
    assert "skipped: identity" in process.stdout


def test_a_case_that_breaks_loses_nothing(package, tmp_path):
    record = package.record.Record(tmp_path / "r.json", budget=100)
    timing = package.machine.Timing(1.0, 1.0, 1.0, 1)

    def breaks(bench):
        bench.timing("this", timing, 10, layout="contiguous")
        warnings.warn("careful", stacklevel=1)
        raise ValueError("what went wrong")

    def is_late(bench):
        record.found["budget_s"] = -1
        bench.stop_if_late()

    def is_wrong(bench):
        bench.check("1 is 2", 1 == 2, "it is 1")

    case = package.record.Case
    assert record.run(case("fine", 1, lambda bench: None), record) == "ok"
    assert not record.failed
    assert record.run(case("long", 1000, breaks), record) == "skipped"
    assert record.run(case("broken", 1, breaks), record) == "error"
    assert record.failed
    assert record.run(case("late", 1, is_late), record) == "partial"
    record.found["budget_s"] = 100
    record.found["cases"] = [c for c in record.found["cases"] if c["status"] != "error"]
    assert not record.failed
    assert record.run(case("wrong", 1, is_wrong), record) == "ok"
    assert record.failed
    again = package.record.Record(tmp_path / "r.json", 100, resume=True)
    assert again.found == record.found
    assert again.done("late")
    assert again.found["timings"][0]["ns_per_index"] == 1e5
    table = package.report.table(
        {**again.found, "cases": [_broken("ValueError: what went wrong", "UserWarning: careful")]}
    )
    assert "FAILED 1 is 2: it is 1" in table
    assert "ERROR in broken" in table
    assert "what went wrong" in table
    assert "UserWarning: careful" in table


def _broken(error, warning):
    case = {"name": "broken", "status": "error", "seconds": 1}
    return {**case, "error": error, "warnings": [warning]}


def test_a_long_table_keeps_its_end(package):
    row = {"case": "c", "ms": 1.0, "least": 1.0, "most": 1.0, "ns_per_index": 1.0}
    found = {
        "header": {},
        "budget_s": 1,
        "cases": [],
        "checks": [],
        "goals": [],
        "timings": [{**row, "what": f"way {n}", "mix": f"mix {n // 3}"} for n in range(2000)],
    }
    table = package.report.table(found)
    assert len(table) < KEPT_BY_THE_REPLY
    assert "more lines: see the JSON file" in table
    assert "== goals" in table


def test_a_lost_device_is_found_again_by_another_process(package, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(package.main.os, "execv", lambda *args: ran.append(args))
    args = package.main._parse(["--out", str(tmp_path), "--budget", "9", "--dry-run"])
    package.main._begin_again(args, tmp_path / "r.json")
    ((program, command),) = ran
    assert program == command[0] == sys.executable
    again = package.main._parse(command[3:])
    assert again.resume == tmp_path / "r.json"
    assert (again.out, again.budget, again.dry_run) == (tmp_path, 9.0, True)


# What it stands on


def test_differences_are_found(package):
    drawn = next(package.identity.random_plans(1))
    seen = package.identity.Differences()
    right = np.arange(6).reshape(2, 3)
    wrong = right.copy()
    wrong[1, 2] = 9
    for what, ours in {"same": right, "value": wrong, "type": right.astype(np.int32)}.items():
        seen.compare(drawn, what, ours, right)
    seen.compare(drawn, "list", [[1]], [[2]])
    seen.failed(drawn, "works", RuntimeError("no"))
    checks = {}
    record = SimpleNamespace(check=lambda what, ok, detail: checks.update({what: (ok, detail)}))
    seen.report(SimpleNamespace(record=record))
    assert [what for what, (ok, _) in checks.items() if ok] == ["same"]
    assert "1 of 6 wrong, first at 5: got 9, wanted 5" in checks["value"][1][1]
    assert "plan 0 (small" in checks["works"][1][1]


def test_a_hundred_plans_are_of_all_kinds(package):
    drawn = list(package.identity.random_plans(100))

    def order_of(settings):
        return settings.get("steps", "free"), settings.get("interleave", True)

    orders = {order_of(order) for order in package.identity.ORDERS}
    assert orders == {
        ("free", True),
        ("free", False),
        ("balanced", True),
        ("same_patch", True),
        ("same_patch", False),
    }
    mixes = package.identity.MIXES
    assert {(d.mix, order_of(d.settings)) for d in drawn} == set(product(mixes, orders))
    # By slots and told, each with an order of the samples and without.
    located = {(d.mix, d.ids is None, order_of(d.settings) == ("free", True)) for d in drawn}
    assert located == set(product(mixes, (True, False), (True, False)))
    assert {d.settings["partial"] for d in drawn} == {"keep", "drop", "pad"}
    assert {bool(d.settings["shuffle_within_batches"]) for d in drawn} == {True, False}
    assert {d.ids.dtype.name for d in drawn if d.ids is not None} == {"int64", "int32", "int16"}
    assert any(d.seed >= 1 << 63 for d in drawn)
    assert any(d.epoch > 1 << 32 for d in drawn)
    assert [str(d) for d in drawn] == [str(d) for d in package.identity.random_plans(100)]
    for d in drawn:
        assert d.plan(d.groups("numpy"), "numpy").num_batches > 0


@pytest.mark.parametrize(
    "samples",
    [2100, 10**6, 10**7, 10**8, pytest.param(10**9, marks=pytest.mark.slow("20 million patches"))],
)
@pytest.mark.parametrize(
    ("mix", "least", "most"),
    [("large", 1025, 65_535), ("wide", 1025, 1 << 20), ("mixed", 10, 10**5), ("small", 20, 60)],
)
def test_sizes_of_patches(package, samples, mix, least, most):
    counts = package.workload.patch_counts(samples, mix, np.random.default_rng(1))
    assert counts.sum() == samples
    assert counts.min() >= least
    assert counts.max() <= most
