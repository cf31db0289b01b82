"""Laws of the keyed permutation: oracle, array reference and lanes are one function."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler.permutation import numpy_impl
from gpusampler.permutation.host import permute_one, permute_ranges
from gpusampler.permutation.reference import (
    SMALL,
    derive_key,
    grid_of,
    grids_of,
    permute,
    rounds_for,
)
from support import oracle
from support.optional_torch import every_namespace

words = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
keys = st.tuples(words, words)
int63 = st.integers(0, 2**63 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1])
uint64 = int63 | st.integers(2**63, 2**64 - 1)

# Every scale alike, and what lies beside squares, k * (k + 1) and the changes of form.
edges = st.integers(1, 2**30).flatmap(
    lambda k: st.sampled_from([k * k - 1, k * k, k * k + 1, k * (k + 1), k * (k + 1) + 1])
)
forms = st.sampled_from([1, 2, 31, 32, 33, 34, 127, 128, 1023, 1024, 1025, 65535, 65536, 65537])
scales = st.integers(1, 61).flatmap(lambda bits: st.integers(1, 2**bits))


def sizes(max_size: int) -> st.SearchStrategy[int]:
    return (scales | edges | forms).filter(lambda n: 1 <= n <= max_size)


def lanes_up_to(
    max_size: int, count: int = 20
) -> st.SearchStrategy[list[tuple[int, int, int, int]]]:
    """Lists of (x, n, k0, k1)."""
    lane = sizes(max_size).flatmap(
        lambda n: st.tuples(st.integers(0, n - 1) | st.just(n - 1), st.just(n), words, words)
    )
    return st.lists(lane, min_size=1, max_size=count)


def by_oracle(rows: list[tuple[int, int, int, int]]) -> list[int]:
    return [oracle.permuted(x, n, (k0, k1)) for x, n, k0, k1 in rows]


def by_reference(xp: Any, rows: list[Any], smallest: int, largest: int) -> list[int]:
    x, n, k0, k1 = (xp.asarray(column) for column in zip(*rows, strict=True))
    return permute(xp, x, n, (k0, k1), grids_of(xp, n), smallest, largest).tolist()


@every_namespace
@given(seed=uint64, purpose=st.integers(1, 5), pass_=int63, group=int63)
def test_key_is_the_oracles(xp, seed, purpose, pass_, group):
    expected = oracle.derive(seed, purpose, pass_, group)
    assert derive_key(seed, purpose, pass_, group) == expected
    key = derive_key(seed, purpose, xp.asarray([[pass_]]), xp.asarray([group, group]))
    assert [tuple(word.shape) for word in key] == [(1, 2), (1, 2)]
    assert [word.tolist() for word in key] == [[[word, word]] for word in expected]


@every_namespace
@given(n=st.lists(sizes(2**62 - 1), min_size=1, max_size=20))
def test_grids_are_exact(xp, n):
    grids = grids_of(xp, xp.asarray(n))
    for i, size in enumerate(n):
        a, b, rem = grid_of(size)
        assert tuple(int(side[i]) for side in grids) == (a, b, rem)
        assert (a - 1) ** 2 < size <= a * a or size == 1
        assert (a - 1) * b + rem == size
        assert 1 <= rem <= b <= a < 2**31 + 1


@every_namespace
@given(rows=lanes_up_to(2**61))
def test_reference_is_the_oracle_at_any_mix_of_sizes(xp, rows):
    n = [row[1] for row in rows]
    assert by_reference(xp, rows, min(n), max(n)) == by_oracle(rows)


@every_namespace
@given(rows=lanes_up_to(2**31 - 1, 8), slack=st.tuples(sizes(2**31), sizes(2**31)))
def test_bounds_never_change_the_result(xp, rows, slack):
    n = [row[1] for row in rows]
    tight = by_reference(xp, rows, min(n), max(n))
    assert by_reference(xp, rows, 1, 2**61) == tight
    assert by_reference(xp, rows, min(*n, slack[0]), max(*n, slack[1])) == tight


@every_namespace
@given(n=sizes(2**40).filter(lambda n: n > 1), key=keys, data=st.data())
def test_sizes_and_keys_broadcast(xp, n, key, data):
    x = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    column = xp.asarray([[n], [n]])
    pair = tuple(xp.asarray([[word], [word ^ 1]]) for word in key)
    images = permute(xp, xp.asarray(x)[None, :], column, pair, grids_of(xp, column), n, n)
    expected = [[oracle.permuted(i, n, (key[0] ^ f, key[1] ^ f)) for i in x] for f in (0, 1)]
    assert images.tolist() == expected


@given(n=sizes(2**61), key=keys, data=st.data())
def test_one_in_lanes_is_the_oracle(host_form, n, key, data):
    x = data.draw(st.lists(st.integers(0, n - 1), max_size=20))
    images = permute_one(np.array(x, np.int64), n, key)
    assert images.dtype == np.int64
    assert images.tolist() == [oracle.permuted(i, n, key) for i in x]


@given(n=st.integers(1, 400), key=keys)
def test_bijective(host_form, n, key):
    assert sorted(permute_one(np.arange(n), n, key).tolist()) == list(range(n))


def runs(rows: list[tuple[int, int, int, int, int]], base: list[int], order: Any) -> list[Any]:
    """`permute_ranges` of rows (first, length, n, k0, k1): one list of samples a row."""
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    first, lengths, n, k0, k1 = (np.ascontiguousarray(column) for column in columns)
    samples = permute_ranges(first, lengths, n, (k0, k1), np.array(base, np.int64), order)
    assert samples.size == lengths.sum()
    return [part.tolist() for part in np.split(samples, np.cumsum(lengths)[:-1])]


def run_by_oracle(first: int, length: int, n: int, k0: int, k1: int) -> list[int]:
    return [oracle.permuted(x % n, n, (k0, k1)) for x in range(first, first + length)]


run_rows = st.lists(
    sizes(2**31 - 1).flatmap(
        lambda n: st.tuples(st.integers(0, n - 1), st.integers(0, 40), st.just(n), words, words)
    ),
    min_size=1,
    max_size=8,
)


@given(rows=run_rows, data=st.data())
def test_runs_of_any_sizes_wrap_and_may_be_empty(host_form, rows, data):
    base = [data.draw(st.integers(0, 2**40)) for _ in rows]
    expected = [
        [start + i for i in run_by_oracle(*row)] for row, start in zip(rows, base, strict=True)
    ]
    assert runs(rows, base, None) == expected


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("empty", [[0], [1], [3], [0, 1], [1, 2], [2, 3], [0, 1, 2], [0, 1, 2, 3]])
def test_runs_beside_empty_ones(host_form, small, empty):
    n = 30 if small else 300
    rows = [(k, 0 if k in empty else 3 + k, n, k, k) for k in range(4)]
    assert runs(rows, [0, 100, 200, 300], None) == [
        [100 * k + image for image in run_by_oracle(*row)] for k, row in enumerate(rows)
    ]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@given(
    rows=st.lists(
        st.integers(1, 90).flatmap(
            lambda n: st.tuples(st.integers(0, n - 1), st.integers(1, 40), st.just(n), words, words)
        ),
        min_size=1,
        max_size=6,
    )
)
def test_runs_look_up_the_order(host_form, dtype, rows):
    order = np.arange(1000, 1000 + 100 * len(rows), dtype=dtype)[::-1].copy()
    base = [100 * k for k in range(len(rows))]
    expected = [
        [int(order[start + i]) for i in run_by_oracle(*row)]
        for row, start in zip(rows, base, strict=True)
    ]
    assert runs(rows, base, order) == expected


@pytest.mark.parametrize("n", [7, 32, 33, 700, 5_000, 100_003])
def test_runs_longer_than_a_tile(host_form, n):
    # Beside short runs, starting inside, wrapping often where n is small.
    length = 2 * numpy_impl.TILE + 17
    rows = [
        (3, 5, 7, 1, 2),
        (n // 2, length, n, 2**32 - 1, 2**31),
        (0, numpy_impl.TILE, n, 5, 6),
        (n - 1, numpy_impl.TILE + 1, n, 7, 8),
        (0, 2, 50, 3, 4),
    ]
    result = runs(rows, [0] * len(rows), None)
    for row, samples in zip(rows, result, strict=True):
        first, length, n, k0, k1 = row
        x = (first + np.arange(length)) % n
        key = (np.array([k0]), np.array([k1]))
        size = np.array([n])
        grid = grids_of(array_api_compat.numpy, size)
        images = permute(array_api_compat.numpy, x, size, key, grid, n, n)
        assert samples == images.tolist()
        for position in (0, length // 2, length - 1):
            assert samples[position] == oracle.permuted((first + position) % n, n, (k0, k1))


def test_runs_without_a_key_stay_where_they_are(host_form):
    n = np.array([5, 100])
    samples = permute_ranges(
        np.array([3, 98]),
        np.array([4, 3]),
        n,
        None,
        np.array([1000, 2000]),
        None,
    )
    assert samples.tolist() == [1003, 1004, 1000, 1001, 2098, 2099, 2000]


@pytest.mark.parametrize("keyed", [True, False])
def test_no_runs_at_all(host_form, keyed):
    none = np.zeros(0, np.int64)
    key = (none, none) if keyed else None
    assert permute_ranges(none, none, none, key, none, None).size == 0


def test_no_positions_at_all(host_form):
    none = np.zeros(0, np.int64)
    for n in (5, 50):
        assert permute_one(none, n, (1, 2)).size == 0


@pytest.mark.parametrize("n", [2, SMALL, SMALL + 1, 127, 128, 1023, 1024, 65535, 65536])
def test_rounds_are_the_designs(n):
    assert rounds_for(n) == (0 if n <= SMALL else oracle.rounds(n))
