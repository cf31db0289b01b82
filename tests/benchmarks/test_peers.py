"""``python -m benchmarks`` counts correctly; its tables, pictures and page are complete."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from gpusampler.permutation import _native
from support.paths import ROOT
from support.processes import run_python

pytest.importorskip("torch")

from benchmarks.__main__ import main
from benchmarks.peers.cases import Case
from benchmarks.peers.correctness import Epoch, compared, counted
from benchmarks.peers.measure import _judge
from benchmarks.peers.peer import Peer, as_array, importer, missing, version
from benchmarks.peers.registry import PEERS
from benchmarks.peers.running import run
from docs.figures.peer_tables import (
    HEAD,
    NOT_IN_SUMMARY,
    everything,
    length,
    losses,
    members,
    of_middle,
    of_page,
    of_series,
    put_into,
    unmeasured,
)
from docs.figures.peers import draw

ON_LINUX = Path("/proc/self/clear_refs").exists()
PATCH_OF = np.repeat([0, 1, 2], [7, 4, 1])
RIGHT = [[0, 1, 2], [7, 8, 9], [3, 4, 5], [11], [6], [10]]

pytestmark = [
    pytest.mark.skipif(not ON_LINUX, reason="reads Linux's /proc"),
    # Each peer runs in a forked process.
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]


class Planted:
    """Epochs as they are given, one after the other; ``len`` as it is given."""

    def __init__(self, *epochs, length=None):
        self.epochs, self.length, self.drawn = epochs, length, 0

    def __iter__(self):
        self.drawn += 1
        return iter(self.epochs[(self.drawn - 1) % len(self.epochs)])

    def __len__(self):
        return len(self.epochs[0]) if self.length is None else self.length


def planted(make, **settings):
    return Peer("planted", as_array, lambda work, seed: make(work), **settings)


def one_patch_after_another(work, short=0):
    """Batches in order, without the last few."""
    samples = np.argsort(work.patch_of, kind="stable")
    batches = []
    for patch in np.unique(work.patch_of):
        of_patch = samples[work.patch_of[samples] == patch].tolist()
        size = work.batch_size
        batches += [of_patch[begin : begin + size] for begin in range(0, len(of_patch), size)]
    return batches[: len(batches) - short]


def found_of(peer, limit=20.0):
    (row,) = run([peer], [Case(200, 4, 8)], limit, rounds=1)
    return row


def test_a_right_epoch_has_nothing_to_report():
    assert counted(Epoch(RIGHT), PATCH_OF) == {
        "batches": 6,
        "empty": 0,
        "largest": 3,
        "missed": 0,
        "repeated": 0,
        "mixed": 0,
    }
    as_arrays = Epoch([np.array(batch) for batch in RIGHT])
    assert counted(as_arrays, PATCH_OF) == counted(Epoch(RIGHT), PATCH_OF)


@pytest.mark.parametrize(
    ("batches", "what"),
    [
        (RIGHT[1:], {"missed": 3, "repeated": 0, "mixed": 0}),
        ([*RIGHT, [0, 1]], {"missed": 0, "repeated": 2, "mixed": 0}),
        ([[0, 0, 2], *RIGHT[1:]], {"missed": 1, "repeated": 1, "mixed": 0}),
        ([[0, 1, 2], [7, 8, 3], [9, 4, 5], *RIGHT[3:]], {"missed": 0, "repeated": 0, "mixed": 2}),
        ([*RIGHT, []], {"batches": 7, "empty": 1, "missed": 0, "mixed": 0}),
    ],
)
def test_what_is_lost_repeated_or_mixed_is_counted(batches, what):
    found = counted(Epoch(batches), PATCH_OF)
    assert {name: found[name] for name in what} == what


def test_a_sample_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match="samples must be below 12, got 12"):
        counted(Epoch([*RIGHT, [12]]), PATCH_OF)


def test_members_that_met_before_are_known_in_any_order():
    first = Epoch(RIGHT)
    assert compared(first, Epoch(RIGHT), PATCH_OF)["same_epoch"]
    turned = [batch[::-1] for batch in RIGHT[::-1]]
    assert compared(first, Epoch(turned), PATCH_OF) == {
        "second_batches": 6,
        "same_members": 1.0,
        "same_epoch": False,
    }
    # Batches of one sample count for nothing, so one in three is as it was.
    other = [[0, 1, 3], [2, 4, 5], [8, 7, 9], [11], [6], [10]]
    assert compared(first, Epoch(other), PATCH_OF)["same_members"] == pytest.approx(1 / 3)
    # Nor do those of a whole patch, which has no other samples.
    whole = [[7, 8, 9, 10]]
    assert compared(Epoch(whole), Epoch(whole), PATCH_OF)["same_members"] is None


def test_a_planted_sampler_is_found_out():
    def right(work):
        return Planted(one_patch_after_another(work))

    def lossy(work):
        batches = one_patch_after_another(work)
        return Planted(batches[2:], length=len(batches))

    def mixing(work):
        samples = np.arange(work.patch_of.size)
        return Planted(np.array_split(samples, 25), np.array_split(samples[::-1], 25))

    row = found_of(planted(right))
    assert (row["missed"], row["repeated"], row["mixed"]) == (0, 0, 0)
    assert (length(row), members(row)) == ("exact", "identical epoch")
    row = found_of(planted(lossy))
    assert row["missed"] == 16
    assert length(row) == f"{row['batches'] + 2}, yielded {row['batches']}"
    row = found_of(planted(mixing))
    assert row["mixed"] == 25
    assert (length(row), members(row)) == ("exact", "same members")


def test_a_length_that_changes_with_the_epoch_is_not_right():
    def shrinking(work):
        whole = one_patch_after_another(work)
        return Planted(whole, whole[1:])

    row = found_of(planted(shrinking))
    assert row["len"] == row["batches"] == row["second_batches"] + 1
    assert length(row) != "exact"


def test_memory_is_what_is_held_at_most():
    def heavy(work):
        # Touched, held for a moment, and gone before the first batch.
        if work.patch_of.size == 200:
            np.ones(5_000_000)
        return Planted(one_patch_after_another(work))

    row = found_of(planted(heavy))
    assert 39 < row["peak_mb"] < 45
    assert found_of(planted(lambda work: Planted(one_patch_after_another(work))))["peak_mb"] < 5


@pytest.mark.slow("waits until a limit of time has passed")
def test_what_takes_too_long_is_named_and_larger_cases_are_left_out():
    def endless(work):
        batches = one_patch_after_another(work)
        if work.patch_of.size >= 1000:
            while True:
                batches.sort()
        return Planted(batches)

    cases = [Case(900, 4, 8), Case(1000, 4, 8), Case(2000, 4, 8), Case(1000, 4, 16)]
    rows = list(run([planted(endless)], cases, limit=0.5, rounds=1))
    assert "over" not in rows[0]
    assert rows[0]["missed"] == 0
    assert rows[1]["over"] == rows[3]["over"] == 0.5
    assert "construct_s" not in rows[1]
    assert rows[2]["skipped"] == "over 0.5 s with 1,000 samples, 4 patches, batches of 8"
    printed = everything({"rows": rows})
    assert "| planted | over 0.5 s |" in printed
    assert "| planted | over 0.5 s with 1,000 samples" in printed


@pytest.mark.slow("waits until a limit of time has passed")
def test_what_was_found_before_the_limit_is_kept():
    def slow_second_epoch(work):
        batches = one_patch_after_another(work)
        return Planted(batches) if work.patch_of.size != 200 else Slow(batches)

    class Slow(Planted):
        def __iter__(self):
            if self.drawn:
                time.sleep(60)
            return super().__iter__()

    # It sleeps, so it is the clock on the wall that ends it.
    row = found_of(planted(slow_second_epoch), limit=0.3)
    assert row["over"] == 0.3
    assert row["epoch_s"] > 0
    assert "second_epoch_s" not in row


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda work: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda work: os._exit(3), "its process ended with 3"),
    ],
)
def test_what_breaks_is_named(make, why):
    assert found_of(planted(make))["error"] == why


def test_a_peer_that_is_not_there_is_named_with_the_reason(monkeypatch):
    absent = planted(Planted, package="no-such-sampler", load=importer("no_such_sampler"))
    row = found_of(absent)
    assert row["missing"] == "no-such-sampler is not installed"
    assert "| planted | no-such-sampler is not installed | - |" in everything({"rows": [row]})
    assert "| planted | all | no-such-sampler is not installed |" in unmeasured({"rows": [row]})
    broken = planted(Planted, package="numpy", load=importer("no_such_sampler"))
    assert missing(broken) == (
        f"numpy {np.__version__} does not import: "
        "ModuleNotFoundError: No module named 'no_such_sampler'"
    )


SMALL, LARGE = Case(100, 2, 8), Case(9000, 2, 8)


def results(**of_peer):
    """Return results of two cases: a peer's rows lack the case."""
    peers = [{"name": name, "drawn": name != "undrawn"} for name in of_peer]
    rows = [
        {"peer": name, "case": case._asdict(), **row}
        for name, both in of_peer.items()
        for case, row in zip((SMALL, LARGE), both, strict=True)
    ]
    series = {"samples": [SMALL._asdict(), LARGE._asdict()]}
    return {"peers": peers, "rows": rows, "series": series, "middle": LARGE._asdict()}


def test_losses_are_the_worst_ratio_and_the_number_of_cases():
    found = results(
        gpusampler=({"epoch_s": 2.0, "peak_mb": 0.9}, {"epoch_s": 3.0, "peak_mb": 8.0}),
        faster=({"epoch_s": 0.5, "peak_mb": 0.1}, {"epoch_s": 2.0, "peak_mb": 9.0}),
        smaller=({"epoch_s": 2.0, "peak_mb": 0.1}, {"epoch_s": 4.0, "peak_mb": 0.0}),
        slower=({"epoch_s": 2.1, "peak_mb": 0.1}, {"over": 20.0}),
    )
    lines = losses(found).splitlines()
    assert lines[0] == (
        "| sampler | construct | ids to first batch | first epoch | second epoch | peak |"
    )
    # A peak below 1 MB is no loss; one that is not measured is no case.
    assert lines[2:] == [
        "| faster | - | - | 4 (2 of 2) | - | - |",
        "| smaller | - | - | - | - | inf (1 of 2) |",
    ]


def test_series_and_summary_leave_out_samplers_without_results():
    missing_row = {"missing": "x is not installed"}
    found = results(
        gpusampler=({"epoch_s": 2.0}, {"epoch_s": 3.0}),
        late=({"epoch_s": 2.0}, {"over": 20.0}),
        undrawn=({"epoch_s": 2.0}, {"epoch_s": 3.0}),
        absent=(missing_row, missing_row),
    )
    assert of_series(found, "samples", lambda row: row.get("epoch_s")).splitlines() == [
        "| number of samples | 100 | 9,000 |",
        "|---|---|---|",
        "| gpusampler | 2 | 3 |",
        "| late | 2 | timeout |",
    ]
    summary = of_middle(found).splitlines()
    assert [line.split(" | ")[0] for line in summary[2:]] == ["| gpusampler", "| late", "| undrawn"]
    heads = summary[0].strip("| ").split(" | ")
    assert heads == [name for name in HEAD if name not in NOT_IN_SUMMARY]


def test_what_was_not_measured_is_one_row_per_sampler_and_reason():
    skipped = {"skipped": "over 20 s with 100 samples, 2 patches, batches of 8"}
    found = results(late=({"over": 20.0}, {"over": 20.0}), later=({"over": 20.0}, skipped))
    assert unmeasured(found).splitlines()[2:] == [
        f"| late | {SMALL}; {LARGE} | over 20 s |",
        f"| later | {SMALL} | over 20 s |",
        f"| later | {LARGE} | not run: timeout in an easier case |",
    ]


def test_peers_that_are_there_hand_out_what_they_promise(monkeypatch):
    # One of ours has NumPy evaluate, in the process that makes it.
    monkeypatch.setattr(_native, "module", _native.module)
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    case = Case(600, 5, 16)
    # Importing takes seconds where there is much to import: only what needs nothing, and ours.
    for peer in (peer for peer in PEERS if peer.package is None):
        assert version(peer) == "here"
        work = peer.prepare(case.ids(), case.batch_size)
        found = {}
        _judge(peer.make(work, 0), case, work.patch_of, found.update)
        assert bool(found["mixed"]) != peer.pure, peer.name
        assert found["largest"] == 16
        assert not found["same_epoch"]
        once = found["missed"] == found["repeated"] == 0
        assert once != peer.name.startswith("torchvision"), peer.name
        assert found["same_members"] == (1 if "fixed batches" in peer.name else 0), peer.name


tabled = pytest.mark.slow("measures a table of samplers, however small")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The command itself, in a process of its own, on small cases."""
    folder = tmp_path_factory.mktemp("peers")
    page = folder / "page.md"
    page.write_text("# Page\n\n<!-- table: middle -->\nold\n<!-- end -->\n\nText.\n")
    command = ["-m", "benchmarks", "--quick", "--peers", "mask", "clustered"]
    measured = run_python(*command, "--out", folder, timeout=240)
    (written,) = folder.glob("peers-*.json")
    page_command = ["-m", "docs.figures.peers", written, "--pictures", folder / "img"]
    process = run_python(*page_command, "--markdown", page, timeout=240)
    assert measured.stdout.count("| gpusampler |") == 4
    assert "| torch BatchSampler(RandomSampler) | 1 |" in measured.stdout
    return folder, process.stdout, json.loads(written.read_text())


@tabled
def test_one_table_is_printed_with_ratios(quick):
    _, printed, _ = quick
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:1] == "|"]
    assert rows[0] == list(HEAD)
    blocks = sum(row[0].startswith("**") for row in rows)
    assert blocks == 4
    lines = [dict(zip(HEAD, row, strict=True)) for row in rows if len(row) == len(HEAD)][1:]
    ungrouped = [row for row in lines if row["sampler"] == "torch BatchSampler(RandomSampler)"]
    ours = [row for row in lines if row["sampler"] == "gpusampler"]
    assert len(ungrouped) == len(ours) == 4
    assert {row["epoch / ungrouped"] for row in ungrouped} == {"1"}
    assert {row["epoch / gpusampler"] for row in ours} == {"1"}
    assert all(row["mixed"] == "0" and row["len()"] == "exact" for row in ours)
    for row in ours:
        taken = float(row["epoch, ms"].replace(",", ""))
        base = float(ungrouped[ours.index(row)]["epoch, ms"].replace(",", ""))
        assert float(row["epoch / ungrouped"]) == pytest.approx(taken / base, rel=0.02)


@tabled
def test_figures_are_written_with_where_they_come_from(quick):
    _, _, found = quick
    assert set(found["machine"]) >= {"processor", "python", "numpy", "torch", "commit", "date"}
    assert [peer["name"] for peer in found["peers"]] == [
        "gpusampler",
        "torch BatchSampler(RandomSampler)",
        "clustered-batch-sampler",
        "fixed batches, one mask per patch",
    ]
    assert len(found["rows"]) == 4 * 4
    for row in found["rows"]:
        measured = {"construct_s", "first_s", "epoch_s", "second_epoch_s", "peak_mb", "len"}
        assert set(row) >= measured or row["missing"] == "clustered-batch-sampler is not installed"


@tabled
def test_pictures_are_drawn(quick):
    folder, _, _ = quick
    names = {path.name for path in (folder / "img").iterdir()}
    assert names == {"peers-time.png", "peers-memory.png", "peers-correctness.png"}
    for path in (folder / "img").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


@tabled
def test_tables_are_put_into_the_page(quick, tmp_path):
    folder, _, found = quick
    page = (folder / "page.md").read_text()
    assert page.startswith("# Page\n\n<!-- table: middle -->\n\n| sampler |")
    assert page.endswith("<!-- end -->\n\nText.\n")
    assert "old" not in page
    put_into(folder / "page.md", of_page(found))
    assert (folder / "page.md").read_text() == page
    put_into(tmp_path / "new.md", of_page(found))
    assert (tmp_path / "new.md").read_text().count("## ") == len(of_page(found))
    (tmp_path / "wrong.md").write_text("<!-- table: nonsense -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"a mark must be one of machine.*got nonsense"):
        put_into(tmp_path / "wrong.md", of_page(found))


@tabled
def test_what_was_not_asked_for_is_left_empty(quick, tmp_path):
    *_, found = quick
    less = found | {"series": {"batch": found["series"]["batch"]}}
    assert len(draw(less, tmp_path)) == 3
    assert of_page(less).keys() == of_page(found).keys()
    assert (
        of_series(less, "samples", lambda row: row["epoch_s"]).splitlines()[0]
        == "| number of samples |"
    )


def test_peers_are_chosen_by_part_of_a_name():
    with pytest.raises(SystemExit, match="--peers must name some of gpusampler, "):
        main(["--peers", "nonsense"])


@tabled
def test_the_pages_own_marks_are_tables(quick, tmp_path):
    *_, found = quick
    page = tmp_path / "comparison.md"
    page.write_text((ROOT / "docs/explanation/comparison.md").read_text())
    put_into(page, of_page(found))
    assert page.read_text().count("<!-- table: ") >= 5
