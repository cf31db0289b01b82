"""PatchGroups: what it finds, against the obvious way of finding it."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gpusampler import PatchGroups
from gpusampler.core.arrays import device_of, reuse_temporaries, to_numpy
from gpusampler.groups.census import CHUNK, Census
from gpusampler.groups.counting_sort import group_on_device, group_on_host
from gpusampler.groups.hash_table import IdTable
from gpusampler.sources.base import HostIds
from support.strategies import (
    INT64,
    expected_by_patch,
    id_arrays,
    ids_any,
    is_contiguous,
    samples_by_patch,
)


def check(groups: PatchGroups, ids: np.ndarray) -> None:
    """Compare groups with int64 ids in every respect that the class documents."""
    patch_ids, counts = np.unique(ids, return_counts=True)
    assert groups.patch_ids.dtype == groups.counts.dtype == groups.starts.dtype == np.int64
    np.testing.assert_array_equal(groups.patch_ids, patch_ids)
    np.testing.assert_array_equal(groups.counts, counts)
    np.testing.assert_array_equal(groups.offsets, [0, *np.cumsum(counts)])
    assert (groups.num_patches, groups.num_samples) == (patch_ids.size, ids.size)
    assert groups.source_size == ids.size
    order = np.argsort(ids, kind="stable")
    if is_contiguous(ids):
        assert groups.is_contiguous
        assert groups.order is None
        np.testing.assert_array_equal(groups.starts, order[groups.offsets[:-1]])
    else:
        assert not groups.is_contiguous
        assert str(groups.order.dtype).endswith("int32")
        np.testing.assert_array_equal(groups.starts, groups.offsets[:-1])
        np.testing.assert_array_equal(to_numpy(groups.order), order)
    assert groups.nbytes <= (0 if groups.is_contiguous else 4 * ids.size) + 24 * patch_ids.size


@given(ids=id_arrays())
@example(ids=np.array([INT64.min, INT64.max, INT64.min]))
@example(ids=np.array([INT64.max, INT64.min]))
@example(ids=np.array([5]))
def test_groups_are_those_of_a_stable_sort(library, ids):
    groups = PatchGroups.from_ids(library.array(ids))
    assert str(groups.device) == library.device
    check(groups, ids)
    if groups.order is not None:
        assert device_of(groups.order) == groups.device
    for patch_id, samples in expected_by_patch(ids).items():
        found = groups.samples_of(patch_id)
        assert found.dtype == np.int64
        assert found.tolist() == samples


@given(ids=id_arrays())
def test_the_device_path_equals_the_host_path(ids):
    torch = pytest.importorskip("torch")
    host, device = group_on_host(HostIds(ids)), group_on_device(torch.tensor(ids))
    for name in ("patch_ids", "counts", "starts"):
        np.testing.assert_array_equal(getattr(host, name), getattr(device, name), name)
        assert getattr(device, name).dtype == np.int64
    assert host.fingerprint == device.fingerprint
    assert (host.order is None) == (device.order is None)
    if host.order is not None:
        assert device.order.dtype == torch.int32
        np.testing.assert_array_equal(host.order, device.order.numpy())


@pytest.mark.parametrize("patches", [255, 256, 257, 32768, 32769, 65536, 65537, 70_000])
@pytest.mark.parametrize("spread", [1, 1 << 40], ids=["dense", "sparse"])
def test_numbers_of_patches_around_every_width_of_key(patches, spread, library):
    ids = np.random.default_rng(patches).permutation(np.repeat(np.arange(patches), 2)) * spread
    if library.name == "numpy":
        check(PatchGroups.from_ids(ids), ids)
    else:
        found = group_on_device(library.array(ids))
        np.testing.assert_array_equal(to_numpy(found.order), np.argsort(ids, kind="stable"))
        np.testing.assert_array_equal(found.patch_ids, np.arange(patches) * spread)


def test_dense_ids_over_a_span_of_two_digits():
    # Fewer patches than 65,536, spread over more: the key has a high digit.
    ids = np.random.default_rng(0).integers(-150_000, 150_000, 400_000)
    check(PatchGroups.from_ids(ids), ids)


def test_more_distinct_sparse_ids_than_a_table_is_made_for():
    rng = np.random.default_rng(1)
    pool = rng.integers(INT64.min, INT64.max, CHUNK, endpoint=True)
    ids = rng.choice(pool, 3 * CHUNK)
    assert np.unique(ids[:CHUNK]).size > CHUNK // 4
    check(PatchGroups.from_ids(ids), ids)


@pytest.mark.parametrize("late", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 1])
def test_sparse_ids_that_are_first_met_late(late):
    rng = np.random.default_rng(late)
    ids = rng.choice(np.array([1 << 60, -(1 << 61), 3]), 5 * CHUNK)
    ids[late:] = rng.choice(np.array([1 << 59, 3, -7, INT64.max]), 5 * CHUNK - late)
    ids[-1] = INT64.min
    census = Census(ids.size)
    census.add(ids)
    np.testing.assert_array_equal(census.result().patch_ids, np.unique(ids))
    check(PatchGroups.from_ids(ids), ids)


@given(
    held=st.lists(ids_any, min_size=1, max_size=60, unique=True),
    asked=st.lists(ids_any, max_size=20),
)
def test_id_table_finds_what_it_holds_and_nothing_else(held, asked):
    held = sorted(held)
    found = IdTable(np.array(held)).lookup(np.array(held + asked, np.int64)).tolist()
    assert found == [held.index(i) if i in held else -1 for i in held + asked]


@pytest.mark.parametrize("shift", [0, 16, 32, 48, 56])
def test_id_table_holds_ids_that_differ_in_a_few_bits_only(shift):
    ids = np.sort((np.arange(256, dtype=np.uint64) << np.uint64(shift)).view(np.int64))
    np.testing.assert_array_equal(IdTable(ids).lookup(ids), np.arange(256))


DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("spread", [False, True], ids=["dense", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_dtype(library, dtype, spread):
    rng = np.random.default_rng(3)
    info = np.iinfo(dtype)
    low, high = int(info.min), min(int(info.max), INT64.max)
    pool = np.array([low, low + 1, high - 1, high] if spread else [1, 2, 3, 5], dtype)
    ids = rng.choice(pool, 1000)
    groups = PatchGroups.from_ids(library.array(ids))
    check(groups, ids.astype(np.int64))
    assert groups.fingerprint == PatchGroups.from_ids(ids.astype(np.int64)).fingerprint


@pytest.mark.parametrize("dtype", [">i2", ">i4", ">i8", ">u4", ">u8"])
@pytest.mark.parametrize("contiguous", [False, True])
def test_big_endian_ids(dtype, contiguous):
    ids = np.array([3, 300, 3, 7, 300, 3] if not contiguous else [300, 300, 3, 7], dtype)
    check(PatchGroups.from_ids(ids), ids.astype(np.int64))


@pytest.mark.parametrize("spread", [1, 1 << 50])
def test_strided_read_only_and_mapped_ids(tmp_path, spread):
    ids = np.random.default_rng(4).integers(-9, 9, 200_000) * spread
    padded = np.zeros((ids.size, 3), np.int64)
    padded[:, 1] = ids
    backward = ids[::-1].copy()[::-1]
    read_only = ids.copy()
    read_only.flags.writeable = False
    np.save(tmp_path / "ids.npy", ids)
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    for form in (padded[:, 1], backward, read_only, mapped):
        check(PatchGroups.from_ids(form), ids)


def test_strided_and_read_only_ids_reach_torch(library):
    ids = np.repeat([5, 1, 5, 2], 50)
    if library.name != "numpy":
        spaced = library.array(np.repeat(ids, 2))[::2]
        check(PatchGroups.from_ids(spaced), ids)
    ids.flags.writeable = False
    check(PatchGroups.from_ids(ids), ids)


def test_the_ids_are_left_as_they_were(library):
    ids = np.random.default_rng(5).integers(0, 5, 1000)
    given_ids = library.array(ids)
    PatchGroups.from_ids(given_ids)
    np.testing.assert_array_equal(library.host(given_ids), ids)


def test_patches_lie_in_any_order_without_an_order_array():
    # Folders sort patch_10 before patch_2.
    ids = np.repeat([1, 10, 11, 2, 3], [4, 1, 6, 5, 2])
    groups = PatchGroups.from_ids(ids)
    assert groups.order is None
    assert samples_by_patch(groups) == expected_by_patch(ids)
    assert groups.starts.tolist() == [0, 11, 16, 4, 5]


def test_a_list_of_int_is_taken():
    check(PatchGroups.from_ids([4, 4, -1, 4]), np.array([4, 4, -1, 4]))


def test_tables_are_read_only():
    groups = PatchGroups.from_ids(np.array([1, 2, 1]))
    for table in (groups.patch_ids, groups.counts, groups.starts):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 7


@pytest.mark.parametrize("unknown", [-1, 2, 8, INT64.max])
def test_samples_of_an_unknown_patch(unknown):
    groups = PatchGroups.from_ids(np.array([7, 1, 7]))
    with pytest.raises(KeyError, match=f"patch_id must be one of the 2 patches, got {unknown}"):
        groups.samples_of(unknown)


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        (np.zeros(3), TypeError, "ids must be integers, got dtype float64"),
        (np.array([1.0, np.nan]), TypeError, "ids must be integers, got dtype float64"),
        (np.array([True, False]), TypeError, "ids must be integers, got dtype bool"),
        (np.array([1, None]), ValueError, "ids must have a value .* got none in sample 1"),
        (np.array([1, 2], "m8[s]"), TypeError, "ids must be integers, got dtype"),
        (np.zeros((2, 2), np.int64), ValueError, r"ids must be 1-D.*\(2, 2\)"),
        (np.int64(3), ValueError, r"ids must be 1-D.*\(\)"),
        (np.zeros(0, np.int64), ValueError, "ids must name at least one sample, got none"),
        ([], ValueError, "ids must name at least one sample, got none"),
        (np.array([2**63], np.uint64), ValueError, f"ids must fit in int64, got {2**63}"),
        (np.array([1, 2**64 - 1], ">u8"), ValueError, f"ids must fit in int64, got {2**64 - 1}"),
        ([[1, 2], [3]], ValueError, "ids must be a 1-D array"),
    ],
)
def test_bad_ids(ids, error, match):
    with pytest.raises(error, match=match):
        PatchGroups.from_ids(ids)


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ([1.0, 2.0], TypeError, "ids must be integers, got dtype float64"),
        ([True], TypeError, "ids must be integers, got dtype bool"),
        (np.zeros((1, 2), np.int64), ValueError, "ids must be 1-D"),
        (np.zeros(0, np.int64), ValueError, "ids must name at least one sample"),
        (np.array([2**63], np.uint64), ValueError, "ids must fit in int64"),
    ],
)
def test_bad_ids_of_any_library(library, values, error, match):
    with pytest.raises(error, match=match):
        PatchGroups.from_ids(library.array(values))


def test_pickled_groups_are_the_same_groups_on_the_host(library):
    ids = np.random.default_rng(6).integers(0, 9, 500)
    groups = PatchGroups.from_ids(library.array(ids))
    copied = pickle.loads(pickle.dumps(groups))
    check(copied, ids)
    assert copied.order is None or type(copied.order) is np.ndarray
    assert copied.fingerprint == groups.fingerprint
    assert groups.order is None or device_of(groups.order) == groups.device


def test_repr_says_how_much_in_which_form_and_where(library):
    groups = PatchGroups.from_ids(library.array([1, 2, 1]))
    assert repr(groups) == (
        f"PatchGroups(2 patches, 3 samples, order=int32, device={library.device!r})"
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_memory_map_is_read_in_chunks(tmp_path, seed):
    size = 2_000_000
    ids = np.random.default_rng(seed).integers(0, 50, size, dtype=np.int64)
    np.save(tmp_path / "ids.npy", ids)
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    reuse_temporaries()
    tracemalloc.start()
    groups = PatchGroups.from_ids(mapped)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The order itself, and chunks: never a copy of the ids (8 bytes a sample).
    assert groups.order.nbytes == 4 * size
    assert peak < 4 * size + 4_000_000


def test_ids_on_a_device_that_do_not_fit_are_refused():
    torch = pytest.importorskip("torch")
    ids = torch.tensor([7, -5, 7]).view(torch.uint64)
    with pytest.raises(ValueError, match="ids must fit in int64, got 18446744073709551611"):
        group_on_device(ids)
