"""Counting and sorting block by block: wherever blocks are cut, and wherever work is taken up."""

from __future__ import annotations

import io
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpusampler import PatchGroups
from gpusampler.groups import census as census_module
from gpusampler.groups import counting_sort, fingerprint
from gpusampler.groups.census import CHUNK, Census, CensusResult
from gpusampler.groups.counting_sort import IdsChanged, OrderWriter, group_on_host
from gpusampler.sources.base import HostIds, PatchIds
from support.strategies import INT64

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]

SMALL = [
    # chunk, digit, widest, table, block
    (1 << 16, 1 << 16, 1 << 26, 1 << 18, 1 << 20),
    (7, 16, 64, 4, 11),
    (5, 4, 64, 3, 13),
    (16, 300, 300, 0, 16),
    (1, 2, 2, 2, 1),
]


def of_ids(ids: np.ndarray) -> int:
    """Return the fingerprint by the text of its definition: a weighted sum over all samples."""
    ids = ids.astype(np.int64)
    weights = fingerprint.weights_of(np.arange(ids.size))
    factors = fingerprint.mix_ids(ids) * np.uint64(2) + np.uint64(1)
    return int((factors * weights).sum(dtype=np.uint64))


def shrink(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int, int, int]) -> None:
    """Make the sizes of chunks, windows and tables small, so that a few ids reach every branch."""
    chunk, digit, widest, table, block = sizes
    for module in (census_module, counting_sort):
        monkeypatch.setattr(module, "CHUNK", chunk)
        monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(census_module, "RADIX", digit)
    monkeypatch.setattr(census_module, "MAX_WINDOW", widest)
    monkeypatch.setattr(census_module, "MAX_TABLE_IDS", table)


@st.composite
def ids_of_every_kind(draw: st.DrawFn) -> np.ndarray:
    """Ids in blocks of different nature, end to end; at most a few hundred."""
    kinds = st.sampled_from(["dense", "sparse", "runs", "rising", "falling", "distinct", "again"])
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    base = draw(st.sampled_from([0, -5, 1 << 40, INT64.min, INT64.max - 2000]))
    parts = []
    for kind in draw(st.lists(kinds, min_size=1, max_size=4)):
        size = draw(st.integers(1, 80))
        if kind == "dense":
            part = base + rng.integers(0, draw(st.integers(1, 40)), size)
        elif kind == "sparse":
            pool = rng.integers(INT64.min, INT64.max, draw(st.integers(1, 30)), endpoint=True)
            part = rng.choice(np.concatenate([pool, [INT64.min, INT64.max]]), size)
        elif kind == "runs":
            part = np.repeat(base + rng.permutation(20), rng.integers(1, 9, 20))
        elif kind == "rising":
            part = base + np.arange(size) * draw(st.integers(1, 9))
        elif kind == "falling":
            part = base + 1000 - np.arange(size) * draw(st.integers(1, 9))
        elif kind == "distinct":
            part = base + rng.permutation(size)
        else:
            part = parts[0] if parts else np.array([base])
        parts.append(part.astype(np.int64))
    return np.concatenate(parts)


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[int]:
    """Borders of blocks, from 0 to ``size``."""
    inner = draw(st.lists(st.integers(1, size), max_size=6)) if size > 1 else []
    return sorted({0, size, *inner})


def through_npz(state: census_module.StateArrays) -> census_module.StateArrays:
    """A state as it comes back from a file."""
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as kept:
        return dict(kept)


def check(found: CensusResult, ids: np.ndarray) -> None:
    """Compare what a census found with NumPy's own ways."""
    patch_ids, first, counts = np.unique(ids, return_index=True, return_counts=True)
    assert found.patch_ids.dtype == found.counts.dtype == np.int64
    np.testing.assert_array_equal(found.patch_ids, patch_ids)
    np.testing.assert_array_equal(found.counts, counts)
    assert found.fingerprint == of_ids(ids)
    if int((ids[1:] != ids[:-1]).sum()) + 1 == patch_ids.size:
        np.testing.assert_array_equal(found.starts, first)
    else:
        assert found.starts is None


def census_of(ids: np.ndarray, borders: list[int], stopping: bool) -> CensusResult:
    """Count block by block; ``stopping`` at every border, to go on from the state."""
    census = Census(ids.size)
    for start, stop in pairwise(borders):
        if stopping:
            state = through_npz(census.state())
            census = Census(ids.size, state)
            assert census.num_seen == start
        # Read into anew, as by a source that has one buffer.
        block = ids[start:stop].copy()
        census.add(block)
        block[:] = 77
    if stopping:
        census = Census(ids.size, through_npz(census.state()))
    return census.result()


def order_of(
    ids: np.ndarray, counted: CensusResult, borders: list[int], stopping: bool
) -> np.ndarray:
    """Sort block by block; ``stopping`` at every border, after more was written than was kept."""
    order = np.full(ids.size, -1, np.int32)
    scatter = OrderWriter(counted, order, None)
    for start, stop in pairwise(borders):
        if stopping:
            state = through_npz(scatter.state())
            # Work that is lost with the process, and that is done again.
            scatter.add(ids[start:stop])
            scatter = OrderWriter(counted, order, state)
            assert scatter.num_written == start
        scatter.add(ids[start:stop])
    ends = np.cumsum(counted.counts)
    np.testing.assert_array_equal(scatter.finish(), ends - counted.counts)
    return order


@pytest.mark.parametrize("sizes", SMALL, ids=str)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_counts_and_order_are_numpys_wherever_blocks_are_cut(host_form, monkeypatch, sizes, data):
    shrink(monkeypatch, sizes)
    ids = data.draw(ids_of_every_kind())
    borders = data.draw(cuts(ids.size))
    counted = census_of(ids, borders, stopping=False)
    check(counted, ids)
    resumed = census_of(ids, borders, stopping=True)
    check(resumed, ids)
    if counted.starts is None:
        expected = np.argsort(ids, kind="stable")
        for stopping in (False, True):
            np.testing.assert_array_equal(order_of(ids, counted, borders, stopping), expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(ids=ids_of_every_kind(), data=st.data())
def test_a_fingerprint_of_blocks_in_any_order_is_that_of_the_whole(ids, data):
    borders = data.draw(cuts(ids.size))
    spans = list(pairwise(borders))
    total = fingerprint.IdSum()
    for start, stop in data.draw(st.permutations(spans)):
        total.add(start, ids[start:stop])
    assert total.value(ids.size) == of_ids(ids)


@pytest.mark.parametrize("cut", [1, 65535, 65536, 65537, 131071])
def test_a_fingerprint_across_the_borders_of_its_own_blocks(cut):
    ids = np.random.default_rng(cut).integers(INT64.min, INT64.max, 200_000, endpoint=True)
    total = fingerprint.IdSum()
    total.add(cut, ids[cut:])
    total.add(0, ids[:cut])
    found = fingerprint.weights_of(np.arange(ids.size)) * (2 * fingerprint.mix_ids(ids) + 1)
    assert total.value(ids.size) == of_ids(ids) == int(found.sum(dtype=np.uint64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("sizes", SMALL[:3], ids=str)
def test_every_integer_type(host_form, monkeypatch, dtype, wide, sizes):
    shrink(monkeypatch, sizes)
    info = np.iinfo(dtype)
    low, high = int(info.min), min(int(info.max), INT64.max)
    pool = np.array([low, low + 1, high - 1, high] if wide else [1, 2, 3, 5], dtype)
    ids = np.random.default_rng(0).choice(pool, 300)
    found = group_on_host(HostIds(ids))
    np.testing.assert_array_equal(found.patch_ids, pool.astype(np.int64))
    np.testing.assert_array_equal(found.order, np.argsort(ids, kind="stable"))
    assert found.fingerprint == of_ids(ids.astype(np.int64))


@pytest.mark.parametrize("spread", [1, 3, 1 << 30, (1 << 48) + 1])
@pytest.mark.parametrize("blocks", [1, 3])
def test_more_patches_than_one_digit(host_form, spread, blocks):
    rng = np.random.default_rng(blocks)
    ids = rng.permutation(np.repeat(np.arange(-35_000, 35_000), 2)) * spread
    borders = np.linspace(0, ids.size, blocks + 1).astype(int).tolist()
    counted = census_of(ids, borders, stopping=True)
    check(counted, ids)
    np.testing.assert_array_equal(
        order_of(ids, counted, borders, stopping=True), np.argsort(ids, kind="stable")
    )


@pytest.mark.parametrize("direction", [1, -1, 0], ids=["up", "down", "both"])
def test_a_window_that_grows(direction):
    # Each chunk of 65,536 lies beyond the ones before.
    size = 1_200_000
    ids = np.arange(size) // 16 * (direction or 1)
    if not direction:
        ids[::2] *= -1
    ids[size // 2 :: 1000] = ids[0]
    counted = census_of(ids, [0, 100_000, 777_777, size], stopping=True)
    check(counted, ids)
    check(census_of(ids, [0, size], stopping=False), ids)


@pytest.mark.parametrize("end", [INT64.min, INT64.max], ids=["smallest", "largest"])
def test_a_window_that_grows_to_the_end_of_the_integers(end):
    rng = np.random.default_rng(3)
    # There is no room to spare beyond.
    far = [1000, 900, 20, 1]
    parts = [rng.integers(least, 2000, CHUNK) for least in far]
    parts[-1][7] = 0
    ids = np.concatenate(parts)
    ids = end + ids if end < 0 else end - ids
    counted = census_of(ids, [0, CHUNK, 3 * CHUNK, ids.size], stopping=False)
    check(counted, ids)
    check(census_of(ids, [0, CHUNK, 3 * CHUNK, ids.size], stopping=True), ids)
    order = order_of(ids, counted, [0, ids.size], stopping=False)
    np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))


@pytest.mark.parametrize("late", [65_537, 140_000, 199_999])
@pytest.mark.parametrize("spread", [1, 1 << 50], ids=["dense", "sparse"])
def test_runs_of_which_one_comes_again_late(late, spread):
    ids = np.repeat(np.arange(1000), 200) * spread
    check(census_of(ids, [0, 70_000, ids.size], stopping=True), ids)
    ids[late] = 0
    counted = census_of(ids, [0, 70_000, ids.size], stopping=True)
    check(counted, ids)
    borders = [0, 150_000, ids.size]
    np.testing.assert_array_equal(
        order_of(ids, counted, borders, stopping=True), np.argsort(ids, kind="stable")
    )


@pytest.mark.parametrize("distinct", [300_000, 1_500_000])
def test_all_distinct_and_sparse_ids(distinct):
    ids = np.random.default_rng(0).permutation(distinct) * 10**12 - 5 * 10**17
    check(census_of(ids, [0, distinct], stopping=False), ids)
    # One of them again, at the very end: each is known to none of the counters so far.
    ids[-1] = ids[0]
    check(census_of(ids, [0, distinct // 3, distinct], stopping=True), ids)


class Changing(PatchIds):
    """Ids that are others in the second pass."""

    def __init__(self, first: np.ndarray, second: np.ndarray) -> None:
        self.passes, self.size, self.dtype = [first, second], first.size, "int64"

    def read(self, start: int, stop: int) -> np.ndarray:
        part = self.passes[0][start:stop]
        if stop == self.size and len(self.passes) > 1:
            self.passes.pop(0)
        return part


@pytest.mark.parametrize("spread", [1, 7, 1 << 45], ids=["dense", "window", "table"])
@pytest.mark.parametrize("patches", [5, 300, 70_000])
@pytest.mark.parametrize("change", ["more", "unknown", "below", "between", "swapped"])
def test_ids_that_change_between_the_passes(host_form, spread, patches, change):
    ids = np.random.default_rng(2).permutation(np.arange(2 * patches) % patches) * spread
    other = ids.copy()
    at = np.flatnonzero(ids != ids[0])[0]
    if change == "swapped":
        # As many of every patch as before.
        other[0], other[at] = ids[at], ids[0]
    else:
        other[0] = {
            "more": ids[at],
            "unknown": int(ids.max()) + 1,
            "below": int(ids.min()) - 1,
            "between": 1,
        }[change]
        if np.array_equal(ids, other):
            pytest.skip("the id is 1 already")
    with pytest.raises(IdsChanged, match="ids changed while they were grouped"):
        group_on_host(Changing(ids, other))


def test_grouping_takes_little_more_than_its_result():
    size = 4_000_000
    rng = np.random.default_rng(0)
    for ids in (rng.integers(0, 1000, size), rng.integers(0, 1000, size) << 50):
        tracemalloc.start()
        found = group_on_host(HostIds(ids))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found.order.nbytes == 4 * size
        assert peak < 4 * size + 16_000_000


@pytest.mark.parametrize("patches", [3, 100_000])
def test_samples_beyond_two_to_the_thirty_first(host_form, patches):
    ids = np.random.default_rng(0).permutation(np.arange(300_000) % patches)
    counted = census_of(ids, [0, ids.size], stopping=False)
    order = np.zeros(ids.size, np.int64)
    scatter = OrderWriter(counted, order, None)
    # Where work goes on whose first samples are elsewhere.
    first = scatter.num_written = (1 << 31) - 100_000
    scatter.add(ids)
    np.testing.assert_array_equal(order, np.argsort(ids, kind="stable") + first)


def test_orders_of_more_samples_are_wider(host_form, monkeypatch, tmp_path):
    monkeypatch.setattr(counting_sort, "INT32_SAMPLES", 1000)
    for size, dtype in ((999, np.int32), (1000, np.int64)):
        ids = np.random.default_rng(0).integers(0, 9, size)
        in_memory = PatchGroups.from_ids(ids)
        in_file = PatchGroups.from_ids(ids, path=tmp_path / str(size))
        for groups in (in_memory, in_file, PatchGroups.load(tmp_path / str(size), mmap=False)):
            assert groups.order.dtype == dtype
            np.testing.assert_array_equal(groups.order, np.argsort(ids, kind="stable"))
        PatchGroups.load(tmp_path / str(size), ids, verify=True)


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.battery("millions of ids, sixty times")
def test_long_ids_of_every_kind(seed):
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(rng.integers(1, 6)):
        size = int(rng.integers(1, 1_000_000))
        pool = rng.integers(INT64.min, INT64.max, rng.integers(1, 500_000), endpoint=True)
        if rng.random() < 0.5:
            pool = rng.integers(0, 1 << rng.integers(1, 40)) + np.arange(pool.size)
        part = rng.choice(pool, size)
        parts.append(np.sort(part) if rng.random() < 0.3 else part)
    ids = np.concatenate(parts)
    borders = sorted({0, ids.size, *rng.integers(1, ids.size, 4).tolist()})
    counted = census_of(ids, borders, stopping=bool(seed % 2))
    check(counted, ids)
    if counted.starts is None:
        order = order_of(ids, counted, borders, stopping=bool(seed % 2))
        np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))


def test_ids_in_memory_are_not_looked_at_twice_for_changes(tmp_path, monkeypatch):
    ids = np.random.default_rng(0).integers(0, 50, 200_000)
    np.save(tmp_path / "ids.npy", ids)
    sums = []
    add = fingerprint.IdSum.add
    monkeypatch.setattr(
        fingerprint.IdSum,
        "add",
        lambda self, first, part: (sums.append(part.size), add(self, first, part))[1],
    )
    PatchGroups.from_ids(ids)
    assert sum(sums) == ids.size
    sums.clear()
    # A file, mapped or not, may be written to between the two passes.
    PatchGroups.from_ids(np.load(tmp_path / "ids.npy", mmap_mode="r"))
    assert sum(sums) == 2 * ids.size
    sums.clear()
    PatchGroups.from_ids(tmp_path / "ids.npy")
    assert sum(sums) == 2 * ids.size
