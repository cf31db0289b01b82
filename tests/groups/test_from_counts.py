"""PatchGroups.from_counts, and the fingerprint that all ways of grouping share."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpusampler import PatchGroups
from support.strategies import INT64, expected_by_patch, id_arrays, ids_any, samples_by_patch


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any),
    data=st.data(),
)
def test_counts_say_the_same_as_the_ids_written_out(sizes, data):
    patch_ids = data.draw(
        st.none() | st.lists(ids_any, min_size=len(sizes), max_size=len(sizes), unique=True)
    )
    groups = PatchGroups.from_counts(sizes, patch_ids)
    named = range(len(sizes)) if patch_ids is None else patch_ids
    ids = np.repeat(np.array(named, np.int64), sizes)
    written_out = PatchGroups.from_ids(ids)
    assert samples_by_patch(groups) == samples_by_patch(written_out) == expected_by_patch(ids)
    assert groups.order is None
    assert groups.source_size == ids.size
    assert groups.fingerprint == written_out.fingerprint


def test_a_trillion_samples_take_kilobytes():
    tracemalloc.start()
    groups = PatchGroups.from_counts([10**9] * 1000)
    mark = groups.fingerprint
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert groups.num_samples == 10**12
    assert groups.nbytes == 24_000
    assert peak < 600_000
    assert int(groups.starts[-1]) == 999 * 10**9
    counts = [10**9] * 1000
    counts[500:502] = [10**9 - 1, 10**9 + 1]
    assert PatchGroups.from_counts(counts).fingerprint != mark


def test_empty_patches_are_left_out():
    groups = PatchGroups.from_counts([0, 3, 0, 2], [9, 4, 1, 2])
    assert samples_by_patch(groups) == {2: [3, 4], 4: [0, 1, 2]}
    assert groups.num_patches == 2


@pytest.mark.parametrize(
    "patch_ids",
    [["b", "a", "c"], [9, -4, 2], [(2, 1), (1, 2), (1, 1)]],
    ids=["strings", "integers", "tuples"],
)
def test_keys_of_counts_are_patch_ids(patch_ids):
    pd = pytest.importorskip("pandas")
    sizes = [5, 3, 0]
    expected = PatchGroups.from_counts(sizes, patch_ids)
    index = pd.MultiIndex.from_tuples(patch_ids) if isinstance(patch_ids[0], tuple) else patch_ids
    for counts in (dict(zip(patch_ids, sizes, strict=True)), pd.Series(sizes, index=index)):
        groups = PatchGroups.from_counts(counts)
        assert groups.labels.tolist() == expected.labels.tolist() == sorted(patch_ids[:2])
        assert groups.samples_of(patch_ids[0]).tolist() == list(range(5))
        assert groups.samples_of(patch_ids[1]).tolist() == [5, 6, 7]
        assert groups.fingerprint == expected.fingerprint
    renamed = PatchGroups.from_counts(pd.Series(sizes, index=index), ["z", "y", "x"])
    assert renamed.labels.tolist() == ["y", "z"]
    with pytest.raises(ValueError, match=r"patch_ids must be None if counts is a mapping, .*, got"):
        PatchGroups.from_counts(dict(zip(patch_ids, sizes, strict=True)), patch_ids)


def test_counts_of_a_series_without_names():
    pd = pytest.importorskip("pandas")
    assert PatchGroups.from_counts(pd.Series([2, 3])).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="patch_ids must be distinct, got 'b' twice"):
        PatchGroups.from_counts(pd.Series([2, 3], index=["b", "b"]))
    with pytest.raises(TypeError, match="patch_ids must be integers, got dtype float64"):
        PatchGroups.from_counts(pd.Series([2, 3], index=[0.5, 1.5]))


def test_names_in_an_array_or_an_index():
    pd = pytest.importorskip("pandas")
    for names in (np.array(["b", "a"]), np.array(["b", "a"], object), pd.Index(["b", "a"])):
        assert PatchGroups.from_counts([5, 3], names).labels.tolist() == ["a", "b"]


def test_the_callers_arrays_stay_writable():
    counts, patch_ids = np.array([2, 3]), np.array([5, 4])
    PatchGroups.from_counts(counts, patch_ids)
    counts[0] = patch_ids[0] = 1


@pytest.mark.parametrize(
    ("counts", "patch_ids", "error", "match"),
    [
        ([1.5], None, TypeError, "counts must be integers, got dtype float64"),
        ([True], None, TypeError, "counts must be integers, got dtype bool"),
        ([[1]], None, ValueError, r"counts must be 1-D, got shape \(1, 1\)"),
        (3, None, ValueError, r"counts must be 1-D, got shape \(\)"),
        ([2, -1], None, ValueError, "counts must be >= 0, got -1"),
        ([], None, ValueError, "counts must .*at least one sample"),
        ([0, 0], None, ValueError, "counts must .*at least one sample"),
        ([2, 2**31], None, ValueError, f"fewer than 2\\*\\*31 samples, got {2**31} in patch 1"),
        ([2, 2**31], [7, 3], ValueError, f"fewer than 2\\*\\*31 samples, got {2**31} in patch 3"),
        (np.array([2**63], np.uint64), None, ValueError, "counts must fit in int64"),
        ([1, 2], [1], ValueError, r"patch_ids must be as long as counts \(2\), got 1"),
        ([1, 2], [4, 4], ValueError, "patch_ids must be distinct, got 4 twice"),
        ([1, 2], [4.0, 5.0], TypeError, "patch_ids must be integers, got dtype float64"),
    ],
)
def test_bad_counts(counts, patch_ids, error, match):
    with pytest.raises(error, match=match):
        PatchGroups.from_counts(counts, patch_ids)


def test_more_samples_than_a_slot_can_number():
    counts = np.broadcast_to(np.int64((1 << 31) - 1), (1 << 20,))
    assert PatchGroups.from_counts(counts[:1000]).num_samples == 1000 * ((1 << 31) - 1)
    with pytest.raises(ValueError, match=r"counts must add up to less than 2\*\*62"):
        PatchGroups.from_counts(np.full(3, (1 << 61) + 1))


@given(ids=id_arrays())
def test_fingerprint_is_the_same_for_every_way_to_the_same_groups(library, ids):
    mark = PatchGroups.from_ids(ids).fingerprint
    assert type(mark) is int
    assert 0 <= mark < 1 << 64
    assert PatchGroups.from_ids(library.array(ids)).fingerprint == mark
    assert PatchGroups.from_ids(ids.tolist()).fingerprint == mark
    everything = PatchGroups.from_ids(library.array(ids)).select(np.arange(ids.size))
    assert everything.fingerprint == mark


@pytest.mark.parametrize("size", [1, 255, 256, 257, 65_535, 65_536, 65_537, 300_000])
def test_fingerprint_does_not_depend_on_blocks(library, size):
    rng = np.random.default_rng(size)
    shuffled = rng.integers(0, 7, size)
    in_runs = np.sort(shuffled)[::-1].copy()
    for ids in (shuffled, in_runs):
        groups = PatchGroups.from_ids(library.array(ids))
        again = PatchGroups(
            groups.patch_ids, groups.counts, groups.starts, groups.order, source_size=size
        )
        assert again.fingerprint == groups.fingerprint
        assert groups.fingerprint == PatchGroups.from_ids(ids).fingerprint


@given(ids=id_arrays(), data=st.data())
def test_fingerprint_changes_with_any_id(ids, data):
    at = data.draw(st.integers(0, ids.size - 1))
    other = data.draw(st.sampled_from([0, 1, -1, INT64.min, INT64.max]) | ids_any)
    assume(int(ids[at]) != other)
    changed = ids.copy()
    changed[at] = other
    assert PatchGroups.from_ids(changed).fingerprint != PatchGroups.from_ids(ids).fingerprint


@pytest.mark.parametrize("bit", range(64))
def test_fingerprint_sees_every_bit_of_an_id(bit):
    ids = np.arange(5, dtype=np.uint64)
    changed = ids.copy()
    changed[2] ^= np.uint64(1 << bit)
    marks = [PatchGroups.from_ids(each.view(np.int64)).fingerprint for each in (ids, changed)]
    assert marks[0] != marks[1]


@pytest.mark.parametrize("bit", range(64))
def test_fingerprint_sees_two_samples_change_places(bit):
    # Ids that are packed from parts often differ in high bits alone.
    ids = np.tile(np.array([0, 1 << bit], np.uint64), 50).view(np.int64)
    mark = PatchGroups.from_ids(ids).fingerprint
    same = []
    for first, second in ((0, 1), (0, 99), (10, 77), (40, 51)):
        changed = ids.copy()
        changed[[first, second]] = ids[[second, first]]
        if PatchGroups.from_ids(changed).fingerprint == mark:
            same.append((first, second))
    assert not same


@pytest.mark.parametrize("more", [1, 255, 65_536])
def test_fingerprint_changes_with_samples_added(more):
    # Patch 0 must count as well as any other.
    short, long = np.zeros(1000, np.int64), np.zeros(1000 + more, np.int64)
    assert PatchGroups.from_ids(short).fingerprint != PatchGroups.from_ids(long).fingerprint
