"""Memory: what is free, by machine and cgroup; what is warned of; what grows by the epoch."""

from __future__ import annotations

import copy
import mmap
import os
import sys
import warnings

import numpy as np
import pytest

from gpusampler import PatchBatchSampler
from gpusampler.core import memory
from gpusampler.core.devices import HOST, Device
from gpusampler.core.memory import GrowthWatch, check_free_memory, free_bytes
from gpusampler.core.text import format_bytes

MB = 1 << 20
GB = 1 << 30
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine made of files: `put(path, text)`."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")

    def put(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    put("proc/meminfo", f"MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: {8 * GB // 1024} kB\n")
    return put


class TestFree:
    def test_of_the_machine(self, machine):
        assert free_bytes(HOST) == free_bytes(Device("torch", "cpu")) == 8 * GB

    def test_of_a_cgroup_version_2(self, machine):
        machine("proc/self/cgroup", "0::/user/job\n")
        machine("cgroup/user/job/memory.max", f"{4 * GB}\n")
        machine("cgroup/user/job/memory.current", f"{3 * GB}\n")
        machine("cgroup/user/job/memory.stat", f"anon 5\ninactive_file {GB // 2}\nfile 7\n")
        assert free_bytes(HOST) == 3 * GB // 2

    def test_of_a_cgroup_above(self, machine):
        machine("proc/self/cgroup", "0::/user/job\n")
        machine("cgroup/user/job/memory.max", "max\n")
        machine("cgroup/user/job/memory.current", f"{3 * GB}\n")
        machine("cgroup/user/memory.max", f"{3 * GB}\n")
        machine("cgroup/user/memory.current", f"{4 * GB}\n")
        assert free_bytes(HOST) == 0

    @pytest.mark.parametrize("seen_at", ["cgroup/memory", "cgroup/memory/docker/1"])
    def test_of_a_cgroup_version_1(self, machine, seen_at):
        # In a container only the root may be seen, under the host's path.
        machine("proc/self/cgroup", "12:cpu:/x\n4:cpu,memory:/docker/1\n0::/\n")
        machine(f"{seen_at}/memory.limit_in_bytes", f"{4 * GB}\n")
        machine(f"{seen_at}/memory.usage_in_bytes", f"{2 * GB}\n")
        machine(f"{seen_at}/memory.stat", f"inactive_file 1\ntotal_inactive_file {GB}\n")
        assert free_bytes(HOST) == 3 * GB

    def test_a_limit_that_is_none_does_not_count(self, machine):
        machine("proc/self/cgroup", "4:memory:/\n0::/\n")
        machine("cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
        machine("cgroup/memory/memory.usage_in_bytes", "5\n")
        assert free_bytes(HOST) == 8 * GB

    def test_nothing_is_known_where_there_is_no_proc(self, monkeypatch, tmp_path):
        monkeypatch.setattr(memory, "PROC", tmp_path)
        assert free_bytes(HOST) is None
        assert memory.resident_bytes() is memory.anonymous_bytes() is None
        assert memory.peak_resident_bytes() is None
        check_free_memory(1 << 60, HOST, "a table", "nothing")
        GrowthWatch().check()
        assert free_bytes(Device("torch", "mps:0")) is None

    @linux
    def test_here(self):
        free = free_bytes(HOST)
        assert 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        before = memory.anonymous_bytes()
        # malloc may reuse pages that are resident already.
        with mmap.mmap(-1, 64 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            pages.write(bytes(64 * MB))
            grown = memory.anonymous_bytes() - before
        assert grown == pytest.approx(64 * MB, abs=4 * MB)
        resident = memory.resident_bytes()
        assert memory.anonymous_bytes() < resident <= memory.peak_resident_bytes() + MB


class TestRoom:
    @pytest.fixture(autouse=True)
    def eight_gigabytes(self, machine):
        pass

    def test_more_than_half_is_warned_of_with_both_figures_and_what_to_do(self):
        with pytest.warns(UserWarning, match="will take") as warned:
            check_free_memory(4 * GB + 1, HOST, "the order of 2 samples", "keep it in int32")
        assert str(warned[0].message) == (
            "the order of 2 samples will take 4.0 GiB, more than half of the 8.0 GiB that are free "
            "on numpy; keep it in int32"
        )

    def test_half_is_not(self):
        check_free_memory(4 * GB, HOST, "a table", "nothing")


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 40, "3.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_bytes_as_a_person_says_them(count, said):
    assert format_bytes(count) == said


@pytest.fixture
def said_nothing_yet(monkeypatch):
    monkeypatch.setattr(memory, "_growth_warned", [])


@pytest.mark.usefixtures("said_nothing_yet")
class TestGrowth:
    @pytest.fixture
    def size(self, monkeypatch):
        """The process's memory, as the test says."""
        size = [GB]
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: size[0])
        monkeypatch.setattr(memory, "MIN_SECONDS_BETWEEN_CHECKS", 0)
        return size

    def epochs(self, sampler, size, grown: list[int]) -> list[int]:
        """Run epochs that end with so much more memory; return where it was warned."""
        warned = []
        for epoch, more in enumerate(grown):
            with warnings.catch_warnings(record=True) as result:
                warnings.simplefilter("always")
                list(sampler)
            if result:
                assert len(result) == 1
                warned.append((epoch, str(result[0].message), result[0].filename))
            size[0] += more
        return warned

    def test_growing_is_warned_of_once(self, size):
        sampler = PatchBatchSampler([1, 1, 2], 2, seed=0)
        ((epoch, message, file),) = self.epochs(sampler, size, [40 * MB] * 12)
        assert epoch == 5
        assert (
            "in each of the last 5 epochs, from 1.0 GiB to 1.2 GiB, 40.0 MiB per epoch" in message
        )
        assert file == __file__
        # Another sampler of the process has the same memory.
        assert self.epochs(PatchBatchSampler([1, 2], 2, seed=0), size, [40 * MB] * 12) == []

    @pytest.mark.parametrize(
        "grown",
        [
            [0] * 12,
            # What a first epoch loads and allocates.
            [4 * GB, 30 * MB, 0, 0, 0, 0, 0, 0],
            [600 * MB] * 4 + [-10 * MB] + [600 * MB] * 4 + [0] * 3,
            # Losses that are kept as numbers.
            [MB] * 300,
            [(20 * MB) * (i % 5 > 0) for i in range(30)],
            # A little, but not much, in every epoch: below 128 MB in five.
            [9 * MB] * 12,
        ],
        ids=["none", "the first epoch's", "now and then", "numbers", "every other", "little"],
    )
    def test_what_settles_is_not(self, size, grown):
        assert self.epochs(PatchBatchSampler([1, 1, 2], 2, seed=0), size, grown) == []

    def test_passes_over_a_given_epoch_are_none_of_it(self, size):
        sampler = PatchBatchSampler([1, 1, 2], 2, seed=0)
        for _ in range(12):
            list(sampler.batches(epoch=0))
            size[0] += 100 * MB

    def test_very_short_epochs_do_not_read_it(self, size, monkeypatch):
        reads = []
        monkeypatch.setattr(memory, "anonymous_bytes", lambda: reads.append(GB) or GB)
        clock = [0.0]
        monkeypatch.setattr(memory, "monotonic", lambda: clock[0])
        monkeypatch.setattr(memory, "MIN_SECONDS_BETWEEN_CHECKS", 0.01)
        sampler = PatchBatchSampler([1, 1, 2], 2, seed=0)
        for elapsed in (0.0, 0.009, 0.011, 0.012, 0.03):
            clock[0] = elapsed
            list(sampler)
        assert len(reads) == 2

    def test_a_copy_begins_anew(self, size):
        sampler = PatchBatchSampler([1, 1, 2], 2, seed=0)
        assert self.epochs(sampler, size, [40 * MB] * 5) == []
        copied = copy.deepcopy(sampler)
        assert self.epochs(copied, size, [40 * MB] * 5) == []

    @linux
    def test_memory_that_is_really_kept(self):
        sampler = PatchBatchSampler([1, 1, 2], 2, seed=0)
        arrays = []
        with pytest.warns(UserWarning, match="has grown in each of the last 5 epochs"):
            arrays += [np.ones(40 * MB // 8) for _ in range(7) for _batch in sampler]

    @linux
    def test_a_look_reads_one_file(self, monkeypatch):
        opened = []
        original = type(memory.PROC).read_bytes
        monkeypatch.setattr(
            type(memory.PROC), "read_bytes", lambda path: opened.append(path) or original(path)
        )
        monkeypatch.setattr(type(memory.PROC), "read_text", None)
        monkeypatch.setattr(memory, "MIN_SECONDS_BETWEEN_CHECKS", 0)
        list(PatchBatchSampler([1, 1, 2], 2, seed=0))
        assert len(opened) == 1


def test_what_is_small_is_not_worth_the_question(monkeypatch):
    def asked(device):
        raise AssertionError

    monkeypatch.setattr("gpusampler.core.memory.free_bytes", asked)
    check_free_memory((1 << 20) - 1, HOST, "a table", "nothing")
    with pytest.raises(AssertionError):
        check_free_memory(1 << 20, HOST, "a table", "nothing")
