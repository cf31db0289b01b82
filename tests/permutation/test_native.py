"""The compiled module: its results are those of the reference, and wrong tables are errors."""

from __future__ import annotations

import importlib
import logging
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.permutation import _native, host, position_ranges
from gpusampler.permutation._native import address, sources
from gpusampler.permutation.reference import key_of
from support import oracle
from support.processes import run_python

EDGES = [1, 2, 3, 31, 32, 33, 37, 127, 128, 129, 1023, 1024, 1025, 65535, 65536, 65537, 2**31 - 1]
WIDE = [2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**52, 2**52 + 3, 2**60 - 1, 2**62 - 1]
words = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))

if _native.module is None:
    pytest.skip(_native.describe(), allow_module_level=True)
native = _native.module


@pytest.fixture(scope="module", params=native.forms())
def form(request):
    """Each form that this processor can run."""
    before = native.form()
    native.use(request.param)
    yield request.param
    native.use(before)


@st.composite
def position_rows(draw):
    sizes = st.one_of(st.sampled_from(EDGES), st.integers(1, 3000), st.integers(1, 2**31 - 1))
    n = np.array(draw(st.lists(sizes, min_size=1, max_size=12)), np.int64)
    first = np.array([draw(st.integers(0, int(2 * m))) for m in n], np.int64)
    lengths = st.one_of(st.integers(0, 70), st.integers(120, 140), st.integers(0, 5_000))
    lengths = np.array([draw(lengths) for _ in n], np.int64)
    key = tuple(np.array([draw(words) for _ in n], np.int64) for _ in range(2))
    base = np.array([draw(st.integers(0, 2**40)) for _ in n], np.int64)
    return first, lengths, n, draw(st.sampled_from([key, None])), base


@given(position_rows())
def test_rows_are_those_of_numpy(form, rows):
    first, lengths, n, key, base = rows
    arguments = first, lengths, n, key, base, None
    samples = host.permute_ranges(*arguments)
    assert samples.dtype == np.int64
    np.testing.assert_array_equal(samples, position_ranges.permute_ranges(*arguments))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 65, 129, 200])
def test_every_number_of_lanes_wraps_where_the_patch_ends(form, size):
    key = (2**32 - 1, 2**31 + 5)
    words = tuple(np.array([word], np.int64) for word in key)
    for n in [*EDGES, 1000, *range(4, 70)]:
        for first in {0, n // 2, n - 1}:
            row = [np.array([value], np.int64) for value in (first, size, n)]
            samples = host.permute_ranges(*row, words, np.array([10]), None)
            expected = [10 + oracle.permuted((first + i) % n, n, key) for i in range(size)]
            assert samples.tolist() == expected, (n, first)


@pytest.mark.parametrize("n", [*EDGES, *WIDE])
def test_positions_of_one_permutation_are_the_oracles(form, n):
    x = np.unique(np.r_[np.linspace(0, min(n, 2**53) - 1, 150).astype(np.int64), 0, n // 2, n - 1])
    for key in ((2**32 - 1, 2**31 + 5), (0, 0), (7, 12)):
        images = host.permute_one(x, n, key)
        assert images.tolist() == [oracle.permuted(i, n, key) for i in x.tolist()]
    assert host.permute_one(x[:0], n, key).size == 0


@given(
    st.tuples(words, words),
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1)), max_size=150),
    st.integers(0, 2**63 - 1),
)
def test_keys_are_those_of_the_reference(form, state, rows, one_pass):
    passes, groups = np.array(rows, np.int64).reshape(-1, 2).T
    for given_passes in (passes, one_pass, np.int64(one_pass)):
        expected = key_of(state, given_passes, groups)
        actual = host.keys_of(state, given_passes, groups)
        for word, desired in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(word, desired)


def test_keys_of_more_rows_than_a_tile(form):
    passes, groups = np.arange(1000) * 2**33, np.arange(1000, 0, -1)
    for word, desired in zip(
        host.keys_of((1, 2), passes, groups), key_of((1, 2), passes, groups), strict=True
    ):
        np.testing.assert_array_equal(word, desired)


# Looking samples up


@pytest.mark.parametrize(
    "order",
    [
        np.arange(2**31 - 1, 2**31 - 101, -1).astype(np.int32),
        np.arange(100, 0, -1, dtype=np.int64) + 2**40,
        np.arange(100, 0, -1).astype(">i8"),
        np.arange(200, 0, -1)[::2],
        np.arange(100, 0, -1, dtype=np.uint16),
        np.frombuffer(b"\0" + np.arange(100, dtype=np.int64).tobytes(), np.int64, 100, 1),
    ],
    ids=["int32", "int64", "big-endian", "strided", "uint16", "unaligned"],
)
def test_samples_are_looked_up_in_any_order(order):
    order.flags.writeable = False
    positions = np.random.default_rng(0).integers(0, 100, 5000)
    samples = positions.copy()
    host.look_up(order, samples)
    np.testing.assert_array_equal(samples, order[positions])


@pytest.mark.parametrize("position", [100, -1, 2**62, -(2**63)])
def test_a_position_outside_the_order_is_an_error(position):
    order = np.arange(100, dtype=np.int32)
    with pytest.raises(ValueError, match=r"a position is not in 0 \.\. 99"):
        host.look_up(order, np.array([5, position, 7]))


# Wrong tables

INT64 = [-(2**63), -1, 2**31, 2**62, 2**63 - 1]


class Job:
    """A set of batches for `native.evaluate`; two groups of 5 and 40 samples, batches of 4."""

    def __init__(self, **changes) -> None:
        tables = {
            "counts": [5, 40],
            "starts": [0, 5],
            "sizes": [4, 4],
            "larger": [0, 0],
            "offsets": [0, 2],
            "group_of": [0, 1],
        }
        numbers = {"permute_slots": 1, "permute_samples": 1, "pad": 0, "width": 0}
        tables |= {name: value for name, value in changes.items() if name in tables}
        numbers |= {name: value for name, value in changes.items() if name in numbers}
        self.arrays = [
            None if value is None else np.array(value, np.int64) for value in tables.values()
        ]
        self.job = np.array(
            [
                changes.get("num_groups", 2),
                changes.get("num_slots", 12),
                *map(address, self.arrays),
                *numbers.values(),
                *(1, 2, 3, 4),
            ],
            np.int64,
        )

    def run(self, slots=range(12), capacity=100, epoch=0):
        slots = np.array(slots, np.int64)
        buffer = np.full(4 * slots.size + capacity + 16, -77, np.int64)
        rows, out = buffer[8:], buffer[8 + 4 * slots.size :]
        arguments = address(slots), 0, 0, slots.size, address(rows), address(out), capacity
        result = native.evaluate(address(self.job), epoch, *arguments)
        assert (buffer[:8] == -77).all()
        assert (buffer[-8:] == -77).all()
        num_rows, num_samples = result
        assert (out[num_samples:] == -77).all()
        return rows[: 4 * slots.size].reshape(4, -1)[:, :num_rows], out[:num_samples]


def test_all_batches_of_right_tables():
    rows, samples = Job().run()
    assert rows.shape == (4, 12)
    assert sorted(samples.tolist()) == list(range(45))
    assert rows[3].sum() == 45


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("counts", [0, *INT64]),
        ("sizes", [0, *INT64]),
        ("larger", [-1, -(2**63)]),
        ("offsets", [5, 2**62, 2**63 - 1]),
        ("group_of", [2, *INT64]),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_table_is_an_error(table, values, place):
    right = {"counts": [5, 40], "sizes": [4, 4], "larger": [0, 0], "offsets": [0, 2]}
    for value in values:
        column = list(right.get(table, [0, 1]))
        column[place] = value
        with pytest.raises(ValueError, match="no batch for slot number"):
            Job(**{table: column}).run()


@pytest.mark.parametrize("slot", [-1, -(2**63)])
def test_a_negative_slot_is_an_error(slot):
    with pytest.raises(ValueError, match="no batch for slot number 1 of 3"):
        Job().run([0, slot, 2])


@pytest.mark.parametrize(("name", "value"), [("num_groups", 0), ("num_slots", 0)])
def test_no_groups_and_no_slots_are_errors(name, value):
    for wrong in (value, -1, *([2**62] if name == "num_slots" else [])):
        with pytest.raises(ValueError, match="empty or too large"):
            Job(**{name: wrong}).run()


def test_as_many_rows_as_fit():
    everything = Job().run()[1].tolist()
    sizes = Job().run()[0][3]
    for capacity in range(46):
        rows, samples = Job().run(capacity=capacity)
        num_rows = int((np.cumsum(sizes) <= capacity).sum())
        assert rows.shape[1] == num_rows
        assert samples.tolist() == everything[: int(sizes[:num_rows].sum())]


def test_slots_beyond_the_last_repeat_the_first():
    rows, samples = Job().run(range(12, 24))
    again, expected = Job().run()
    np.testing.assert_array_equal(rows, again)
    np.testing.assert_array_equal(samples, expected)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("first", [-1, -(2**63)]),
        ("size", [-1, 2**63 - 1, -(2**63)]),
        ("n", [0, *INT64]),
    ],
)
def test_a_wrong_row_is_an_error(column, values):
    for value in values:
        row = {"first": 3, "size": 4, "n": 50} | {column: value}
        first, size, n = (np.array([0, row[name], 0]) for name in ("first", "size", "n"))
        n[[0, 2]] = 10
        key = np.zeros(3, np.int64)
        out = np.empty(100, np.int64)
        arrays = first, size, n, key, key, key
        with pytest.raises(ValueError, match="row 1 of 3 is out of range"):
            native.ranges(*map(address, arrays), 3, address(out), 100)


def test_rows_must_fill_the_output():
    n, zero = np.array([10]), np.zeros(1, np.int64)
    out = np.empty(6, np.int64)
    for size in (5, 7):
        arrays = zero, np.array([size]), n, zero, zero, zero
        with pytest.raises(ValueError, match="is out of range"):
            native.ranges(*map(address, arrays), 1, address(out), 6)


@pytest.mark.parametrize("n", [0, -1, 2**62])
def test_one_permutation_checks_its_size(n):
    with pytest.raises(ValueError, match=r"n must be in 1 \.\. 2\*\*62 - 1"):
        host.permute_one(np.zeros(1, np.int64), n, (1, 2))


@pytest.mark.parametrize("x", [10, -1, 2**62])
def test_one_permutation_checks_its_positions(x):
    with pytest.raises(ValueError, match=r"positions must be in 0 \.\. 9"):
        host.permute_one(np.array([3, x]), 10, (1, 2))


@pytest.mark.parametrize("group_dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("order_dtype", [np.int32, np.int64])
class TestPlace:
    def place(self, groups, ends, group_dtype, order_dtype, *, num_groups=None, order_size=None):
        groups = np.array(groups).astype(group_dtype)
        ends = np.array(ends, np.int64)
        cursor = np.r_[0, ends[:-1]]
        order = np.full(8, -1, order_dtype)
        arguments = address(groups), groups.itemsize, groups.size, 100, address(cursor)
        placed = native.place(
            *(*arguments, address(ends), num_groups or ends.size),
            *(address(order), order.itemsize, order_size or order.size),
        )
        return placed, order.tolist(), cursor.tolist()

    def test_samples_go_to_their_groups_in_order(self, group_dtype, order_dtype):
        placed, order, cursor = self.place([1, 0, 1, 2, 1, 0], [2, 5, 6], group_dtype, order_dtype)
        assert placed == 6
        assert order == [101, 105, 100, 102, 104, 103, -1, -1]
        assert cursor == [2, 5, 6]

    def test_it_stops_where_a_group_is_full_or_unknown(self, group_dtype, order_dtype):
        dtypes = group_dtype, order_dtype
        assert self.place([1, 0, 0, 0, 1], [2, 5], *dtypes)[0] == 3
        assert self.place([1, 0, 2, 0], [2, 5], *dtypes)[0] == 2
        assert self.place([1, 0, -1, 0], [2, 5], *dtypes)[0] == 2
        # A table of ends that exceed the order.
        assert self.place([1, 1, 1], [2, 2**40], *dtypes, order_size=4)[0] == 2
        assert self.place([1, 0], [-5, 3], *dtypes)[0] == 0


def test_arguments_are_counted_and_integers():
    functions = native.evaluate, native.ranges, native.keys, native.permute, native.look_up
    for function in (*functions, native.place):
        with pytest.raises(TypeError, match="integers, got 1"):
            function(1)
    with pytest.raises(TypeError):
        native.permute("x", 0, 0, 1, 0, 0)
    with pytest.raises(OverflowError):
        native.permute(2**64, 0, 0, 1, 0, 0)
    for name in ("mmx", 3, None):
        with pytest.raises(ValueError, match="form must be one of"):
            native.use(name)
    with pytest.raises(ValueError, match="4 or 8 bytes"):
        native.look_up(0, 2, 10, 0, 0, 0)
    with pytest.raises(ValueError, match="4 or 8 bytes"):
        native.place(0, 4, 0, 0, 0, 0, 0, 0, 2, 0)
    with pytest.raises(ValueError, match="groups have 1, 2, 4 or 8 bytes, got 3"):
        native.place(0, 3, 0, 0, 0, 0, 0, 0, 4, 0)


def test_other_threads_run_meanwhile():
    """A long call releases Python's lock: without that, the thread could not count."""
    size = 1 << 22
    arrays = [np.array([value], np.int64) for value in (0, size, 2**31 - 1, 0, 1, 2)]
    out = np.empty(size, np.int64)
    counted, running = [0], threading.Event()

    def count() -> None:
        running.set()
        while running.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    running.wait()
    progress = []
    for _ in range(20):
        before = counted[0]
        native.ranges(*map(address, arrays), 1, address(out), size)
        progress.append(counted[0] - before)
    running.clear()
    thread.join()
    # Taking the lock back waits for the thread, so a call that kept it could have counted some.
    assert sum(progress) > 0


# Loading


def test_it_is_the_default(monkeypatch):
    module, reason = _native.load("")
    assert module is native
    assert reason == ""
    assert _native.describe() == f"C ({native.form()})"


def test_it_can_be_switched_off():
    code = (
        "from gpusampler import PatchBatchSampler; from gpusampler.permutation import _native\n"
        "sampler = PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0)\n"
        "print(list(sampler), sampler.stats().host_form)"
    )
    expected = list(PatchBatchSampler([7, 7, 7, 2, 2], 2, seed=0))
    assert run_python("-c", code, GPUSAMPLER_NATIVE="0").stdout == (
        f"{expected} NumPy (GPUSAMPLER_NATIVE=0)\n"
    )
    best = native.forms()[0]
    assert run_python("-c", code, GPUSAMPLER_NATIVE="1").stdout == f"{expected} C ({best})\n"


def raise_import_error(name):
    raise ImportError("no module")


def test_without_a_module_numpy_evaluates(monkeypatch):
    monkeypatch.setattr(_native, "import_module", raise_import_error)
    assert _native.load("") == (None, "no compiled module: no module")
    with pytest.raises(ImportError, match=r"GPUSAMPLER_NATIVE=1 needs .* no compiled module"):
        _native.load("1")


def test_a_stale_module_is_refused(monkeypatch):
    stale = SimpleNamespace(SOURCE_HASH="0123456789abcdef")
    monkeypatch.setattr(_native, "import_module", lambda name: stale)
    with pytest.warns(UserWarning, match="older than its sources: run `pip install -e") as warned:
        module, reason = _native.load("")
    assert module is None
    assert "older than its sources" in reason
    assert len(warned) == 1
    with pytest.raises(ImportError, match="older than its sources"):
        _native.load("1")
    # Where the sources are not installed, there is nothing to compare with.
    monkeypatch.setattr(_native, "source_hash", lambda: "")
    assert _native.load("") == (stale, "")


def test_the_hash_is_that_of_the_sources(monkeypatch, tmp_path):
    assert sources.source_hash() == native.SOURCE_HASH
    for name in sources.SOURCES:
        shutil.copy(sources.FOLDER / name, tmp_path)
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    assert sources.source_hash() == native.SOURCE_HASH
    header = tmp_path / "permutation.h"
    header.write_bytes(header.read_bytes().replace(b"\n", b"\r\n"))
    assert sources.source_hash() == native.SOURCE_HASH
    header.write_bytes(header.read_bytes() + b" ")
    assert sources.source_hash() != native.SOURCE_HASH
    header.unlink()
    assert sources.source_hash() == ""


def test_the_log_says_what_is_used(caplog):
    with caplog.at_level(logging.DEBUG, "gpusampler"):
        importlib.reload(_native)
    assert caplog.messages == [f"what evaluates batches on the host: {_native.describe()}"]


def test_splits_are_those_of_numpy(monkeypatch):
    groups = PatchGroups.from_ids(np.random.default_rng(0).integers(0, 4, 3000))

    def parts():
        return [
            [part.order.tolist() for part in groups.split([0.3, 0.7], by=by, seed=3)]
            for by in ("sample", "patch")
        ]

    compiled = parts()
    monkeypatch.setattr(_native, "module", None)
    assert parts() == compiled
