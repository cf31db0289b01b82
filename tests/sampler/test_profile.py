"""What a sampler says of its time: shares of the wall, exact states meanwhile, and profilers."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from operator import length_hint

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from gpusampler import PatchBatchSampler, PatchTensorLoader
from gpusampler.core import tracing
from gpusampler.core.tracing import EVALUATE, HAND_OUT, RANGES, TRANSFER, Recorder
from gpusampler.plan.evaluators.host import HostEvaluator
from gpusampler.plan.evaluators.select import PlanEvaluator
from gpusampler.sources.base import HostIds
from support.paths import SUPPORT
from support.processes import run_python

IDS = np.random.default_rng(1).integers(0, 40, 60_000)
NAMES = [*RANGES, "your_loop"]


def make(**settings) -> PatchBatchSampler:
    return PatchBatchSampler(IDS, 16, seed=4, **settings)


def rows_of(profile) -> dict:
    return {row.name: row for row in profile.rows}


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class TestRecorder:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that the test moves."""
        now = [100.0]
        monkeypatch.setattr(tracing, "perf_counter", lambda: now[0])
        return now

    def test_time_of_a_range_inside_is_its_own(self, clock):
        recorder = Recorder()
        with recorder.range(HAND_OUT):
            clock[0] += 1
            for _ in range(2):
                with recorder.range(EVALUATE):
                    clock[0] += 3
                    with recorder.range(TRANSFER):
                        clock[0] += 10
            clock[0] += 4
        actual = {row.name: (row.calls, row.seconds) for row in recorder.ranges if row.calls}
        assert actual == {"hand_out": (1, 5.0), "evaluate": (2, 6.0), "transfer": (2, 20.0)}

    def test_a_range_may_be_in_itself(self, clock):
        recorder = Recorder()
        with recorder.range(EVALUATE):
            clock[0] += 1
            with recorder.range(EVALUATE):
                clock[0] += 2
        (row,) = (row for row in recorder.ranges if row.calls)
        assert (row.calls, row.seconds) == (2, 3.0)

    def test_errors_go_through_and_end_the_range(self, clock):
        recorder = Recorder()
        with suppress(KeyError), recorder.range(HAND_OUT), recorder.range(EVALUATE):
            clock[0] += 2
            raise KeyError
        with recorder.range(TRANSFER):
            clock[0] += 1
        assert [row.seconds for row in recorder.ranges] == [0, 0, 2, 1, 0]
        assert recorder._open_ranges.frames == []

    @pytest.mark.parametrize("travel", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
    def test_copies_begin_at_nothing(self, travel):
        sampler = make()
        list(sampler)
        copied = travel(sampler)
        assert copied.stats().batches == 0
        assert len(list(copied)) == len(sampler) == copied.stats().batches
        # All of a copy counts into one recorder, and not into the first one's.
        assert sampler.stats().batches == len(sampler)


def test_stats_are_always_on():
    sampler = make()
    before = rows_of(sampler.stats())
    assert before["group"].calls > 0
    assert before["group"].seconds > 0
    assert before["evaluate"].calls == 0
    batches = list(sampler)
    stats = sampler.stats()
    rows = rows_of(stats)
    assert list(rows) == list(RANGES)
    assert stats.batches == len(batches)
    # Blocks, not batches.
    assert 0 < rows["evaluate"].calls < 30 < len(batches)
    assert sum(row.share for row in stats.rows) == pytest.approx(1)
    assert stats.wall_seconds == pytest.approx(sum(row.seconds for row in stats.rows))
    assert rows["evaluate"].per_batch == rows["evaluate"].seconds / stats.batches
    assert stats.table_bytes == {"numpy": sampler.plan._tables.nbytes + IDS.size * 4}
    if sys.platform == "linux":
        assert stats.host_peak_bytes > 10 << 20
    assert json.loads(json.dumps(stats.to_dict()))["rows"][2]["name"] == "evaluate"


@pytest.mark.serial("measures time")
def test_what_is_read_is_told_apart_from_what_is_grouped():
    class Dataset:
        def __len__(self):
            return 50

        def __getitem__(self, i):
            time.sleep(0.002)
            return {"patch_id": i % 3}

    class SlowIds(HostIds):
        def read(self, start, stop):
            time.sleep(0.03)
            return super().read(start, stop)

    rows = rows_of(PatchBatchSampler(Dataset(), 16).stats())
    assert rows["load_ids"].seconds >= 0.1
    assert rows["group"].seconds < rows["load_ids"].seconds
    # Lazily: what is read while it is grouped is loading, too.
    rows = rows_of(PatchBatchSampler(SlowIds(IDS), 16).stats())
    assert rows["load_ids"].seconds >= 0.06
    assert rows["group"].seconds < rows["load_ids"].seconds
    # An array is at hand: it costs next to nothing to read.
    rows = rows_of(make().stats())
    assert rows["load_ids"].seconds < rows["group"].seconds


def loops():
    def bare(sampler):
        for _ in range(3):
            for _batch in sampler:
                pass

    def one_by_one(sampler):
        for _batch in sampler.batches():
            pass

    def with_work(sampler):
        for number, _batch in enumerate(sampler):
            if number % 50 == 0:
                busy(0.002)

    def loader(sampler):
        for _batch in DataLoader(torch.arange(IDS.size), batch_sampler=sampler):
            pass

    def tensors(sampler):
        for _batch in PatchTensorLoader(sampler, x=torch.arange(IDS.size)):
            pass

    return [bare, one_by_one, with_work, loader, tensors]


@pytest.mark.parametrize("output", ["list", "numpy"])
@pytest.mark.parametrize("loop", loops(), ids=lambda loop: loop.__name__)
@pytest.mark.serial("measures time")
def test_shares_sum_to_the_wall(loop, output):
    sampler = make(output=output)
    start = time.monotonic()
    with sampler.profile() as p:
        loop(sampler)
    wall = time.monotonic() - start
    assert [row.name for row in p.rows] == NAMES
    assert sum(row.share for row in p.rows) == pytest.approx(1, abs=0.02)
    assert p.wall_seconds <= wall
    assert sum(row.seconds for row in p.rows) <= wall
    assert p.batches == len(sampler) * (3 if loop.__name__ == "bare" else 1)
    rows = rows_of(p)
    # Every batch was seen; the end of a pass is none.
    assert rows["hand_out"].calls == p.batches
    assert rows["your_loop"].calls == rows["hand_out"].calls
    assert rows["evaluate"].seconds > 0


@pytest.mark.serial("measures time")
def test_work_of_the_loop_is_the_loops():
    sampler = make()
    with sampler.profile() as p:
        for _batch, _ in zip(sampler, range(40), strict=False):
            busy(0.005)
    rows = rows_of(p)
    assert rows["your_loop"].seconds >= 40 * 0.005
    assert rows["your_loop"].seconds + rows["hand_out"].seconds < p.wall_seconds
    # A first block is 512 samples: it is nowhere near what the loop took.
    assert rows["your_loop"].share > 0.8


@pytest.mark.serial("measures time")
def test_time_is_said_of_what_took_it(monkeypatch):
    sampler = make()
    for evaluator, name in ((PlanEvaluator, "ragged"), (HostEvaluator, "slot_range")):
        # By NumPy, and in C.
        original = getattr(evaluator, name)

        def slow(*arguments, original=original):
            busy(0.03)
            return original(*arguments)

        monkeypatch.setattr(evaluator, name, slow)
    with sampler.profile() as p:
        list(sampler)
    rows = rows_of(p)
    assert rows["evaluate"].seconds >= 0.03 * rows["evaluate"].calls * 0.8
    assert rows["evaluate"].share > 0.5
    assert rows["hand_out"].share < 0.4


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize("output", ["list", "batch"])
def test_transfers_have_a_row(output):
    sampler = make(device="cpu")
    with sampler.profile() as p:
        list(sampler if output == "list" else sampler.batches())
    transfers = rows_of(p)["transfer"].calls
    # The tables, and for lists every block.
    assert transfers == 1 + (0 if output == "batch" else rows_of(p)["evaluate"].calls)
    with sampler.profile() as again:
        list(sampler.batches())
    assert rows_of(again)["transfer"].calls == 0


WANTED = list(make())


class TestInTheMiddle:
    def rest_of(self, state) -> list:
        other = make()
        other.load_state_dict(state)
        return list(other)

    @pytest.mark.parametrize("drawn", [1, 31, 33, 100, 3000])
    def test_states_are_exact(self, drawn):
        sampler = make()
        with sampler.profile():
            iterator = iter(sampler)
            begun = [next(iterator) for _ in range(drawn)]
            inside = iterator.state_dict()
            assert len(iterator) == len(WANTED) - drawn
            # Held, not ready: every batch is seen.
            assert length_hint(iterator._unwatched) == 0
        assert inside == iterator.state_dict() == sampler.state_dict()
        assert begun + self.rest_of(inside) == WANTED
        assert begun + list(iterator) == WANTED

    @pytest.mark.parametrize("before", [0, 1, 40, 500])
    @pytest.mark.parametrize("within", [0, 1, 60])
    @pytest.mark.parametrize("profiles", [1, 2])
    def test_profiles_begin_and_end_anywhere(self, before, within, profiles):
        sampler = make()
        iterator = iter(sampler)
        actual = [next(iterator) for _ in range(before)]
        for _ in range(profiles):
            with sampler.profile() as p:
                actual += [next(iterator) for _ in range(within)]
                assert len(iterator) == len(WANTED) - len(actual)
            assert p.batches == within
            assert rows_of(p)["hand_out"].calls == within
        state = iterator.state_dict()
        assert actual + self.rest_of(state) == WANTED
        actual.append(next(iterator))
        # The path that nobody sees is taken again.
        assert length_hint(iterator._watched) == 0
        actual += iterator
        assert actual == WANTED
        assert next(iterator, None) is None

    def test_a_state_that_is_loaded_drops_what_is_held(self):
        sampler = make()
        with sampler.profile():
            iterator = iter(sampler)
            begun = [next(iterator) for _ in range(7)]
            state = iterator.state_dict()
            list(zip(range(5), iterator, strict=False))
            iterator.load_state_dict(state)
            assert begun + list(iterator) == WANTED

    def test_one_at_a_time(self):
        sampler = make()
        with sampler.profile(), pytest.raises(RuntimeError, match="already active"):
            sampler.profile().__enter__()
        with sampler.profile() as p:
            next(iter(sampler))
        assert p.batches == 1

    def test_an_error_in_the_block_leaves_figures(self):
        sampler = make()
        with suppress(KeyError), sampler.profile() as p:
            next(iter(sampler))
            raise KeyError
        assert p.batches == 1
        assert p.table_bytes
        assert sampler._tracker.recorder.watcher is None


def test_passes_that_were_left_are_not_kept():
    sampler = make()
    for _ in range(3):
        next(iter(sampler))
    assert len(sampler._tracker.recorder.iterators) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_peaks_are_of_the_block():
    sampler = make()
    with sampler.profile() as p:
        list(sampler)
    before = p.host_peak_bytes
    # The first time it is the most ever; the second, it is seen at the end of an evaluation.
    for _ in range(2):
        with sampler.profile() as p:
            iterator = iter(sampler)
            next(iterator)
            held = np.ones(200 << 17)  # 200 MiB
            list(iterator)
            del held
        assert p.host_peak_bytes >= before + (150 << 20)
        assert p.device_peak_bytes is None
    with sampler.profile() as p:
        list(sampler)
    assert p.host_peak_bytes < before + (150 << 20)


def test_the_table_is_aligned():
    sampler = make()
    with sampler.profile() as p:
        list(sampler)
    lines = str(p).splitlines()
    assert len({len(line) for line in lines[:-1]}) == 1
    assert [line.split()[0] for line in lines[1:-2]] == NAMES
    assert lines[-1].startswith(f"{len(sampler)} batches, ")
    assert repr(p) == str(p)
    assert "Profile" not in json.dumps(p.to_dict())


class TestProfilers:
    def test_torch_sees_the_names(self):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
            sampler = make()
            list(sampler)
        calls = {event.key: event.count for event in p.key_averages()}
        stats = rows_of(sampler.stats())
        for name in ("group", "evaluate", "hand_out"):
            assert calls[f"gpusampler.{name}"] == stats[name].calls

    def test_nothing_is_shown_where_none_is_on(self, monkeypatch):
        made = []
        monkeypatch.setattr(torch.autograd.profiler, "record_function", made.append)
        list(make())
        assert made == []

    def test_nvtx_has_the_names(self, tmp_path):
        """Seen by a tool that NVTX loads, as it loads Nsight's."""
        pytest.importorskip("nvtx")
        if shutil.which("gcc") is None:
            pytest.skip("no gcc")
        tool, output = tmp_path / "seen.so", tmp_path / "seen.txt"
        source = SUPPORT / "nvtx_tool.c"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", tool, source], check=True)
        run_python("-c", SCRIPT, NVTX_INJECTION64_PATH=str(tool), SEEN=str(output))
        lines = output.read_text().split("\n")
        depth, actual = 0, []
        for line in filter(None, lines):
            if line.startswith("pop"):
                depth -= 1
            else:
                actual.append((depth, line.removeprefix("push ")))
                depth += 1
        assert depth == 0
        reads = [place for place, name in actual if name == "gpusampler.load_ids"]
        # Once to know the ids, then while they are grouped.
        assert reads[0] == 0
        assert set(reads[1:]) == {1}
        assert [row for row in actual if row[1] != "gpusampler.load_ids"] == [
            (0, "gpusampler.group"),
            (0, "gpusampler.group"),
            (0, "gpusampler.hand_out"),
            (1, "gpusampler.evaluate"),
        ]

    def test_nvtx_is_off_unless_asked_for(self):
        code = SCRIPT + "import sys; print('nvtx' in sys.modules)"
        assert run_python("-c", code, GPUSAMPLER_NVTX="0").stdout.split() == ["False"]


SCRIPT = textwrap.dedent("""
    import numpy as np, gpusampler
    sampler = gpusampler.PatchBatchSampler(np.arange(60) % 3, 20, seed=0)
    assert len(list(sampler)) == 3
""")
