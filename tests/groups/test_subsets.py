"""PatchGroups.select and .split: parts that keep the samples' own numbers."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gpusampler import PatchGroups
from support.strategies import expected_by_patch, id_arrays, samples_by_patch


def restricted(ids: np.ndarray, kept: np.ndarray) -> dict[int, list[int]]:
    """Patches and samples of what is kept."""
    kept_set = set(kept.tolist())
    chosen = {
        patch_id: [sample for sample in samples if sample in kept_set]
        for patch_id, samples in expected_by_patch(ids).items()
    }
    return {patch_id: samples for patch_id, samples in chosen.items() if samples}


def is_run(samples: list[int]) -> bool:
    return samples == list(range(samples[0], samples[0] + len(samples)))


@given(ids=id_arrays(), data=st.data())
def test_selected_samples_keep_number_and_patch(library, ids, data):
    kept = data.draw(st.lists(st.integers(0, ids.size - 1), min_size=1, unique=True))
    kept = np.array(kept)
    groups = PatchGroups.from_ids(library.array(ids))
    wanted = restricted(ids, kept)
    mask = np.zeros(ids.size, np.bool_)
    mask[kept] = True
    for indices in (kept, kept.tolist(), library.array(kept), mask, library.array(mask)):
        part = groups.select(indices)
        assert samples_by_patch(part) == wanted
        assert list(part.patch_ids) == sorted(wanted)
        assert part.source_size == ids.size
        assert part.num_samples == kept.size
        assert part.device == groups.device
        assert part.order is None or str(part.order.dtype).endswith("int32")
        assert part.is_contiguous == all(is_run(samples) for samples in wanted.values())
    # A second selection is one of the first one's samples.
    again = part.select(kept[:1])
    assert samples_by_patch(again) == restricted(ids, kept[:1])
    mark = PatchGroups.from_ids(ids).select(kept).fingerprint
    assert part.fingerprint == groups.select(kept).fingerprint == mark


def test_selections_of_other_samples_have_other_fingerprints():
    groups = PatchGroups.from_ids(np.zeros(100, np.int64))
    marks = {
        groups.select([first, second]).fingerprint
        for second in range(100)
        for first in range(second)
    }
    assert len(marks) == 100 * 99 // 2


def test_select_from_counts_of_a_trillion():
    groups = PatchGroups.from_counts([10**9] * 1000, np.arange(1000)[::-1])
    part = groups.select([999_999_999_999, 0, 10**9, 10**9 - 1])
    assert samples_by_patch(part) == {
        0: [999_999_999_999],
        998: [10**9],
        999: [0, 10**9 - 1],
    }
    assert part.order.dtype == np.int64


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        ([], ValueError, "indices must contain at least one sample, got none"),
        (np.zeros(6, np.bool_), ValueError, "indices must contain at least one sample, got none"),
        ([0, 3, 0], ValueError, "indices must be distinct, got 0 twice"),
        ([6], ValueError, r"indices must be in 0 \.\. 5, got 6"),
        ([-1], ValueError, r"indices must be in 0 \.\. 5, got -1"),
        ([0.0], TypeError, "indices must be integers, got dtype float64"),
        ([[0]], ValueError, r"indices must be 1-D, got shape \(1, 1\)"),
        (
            np.ones(5, np.bool_),
            ValueError,
            r"a boolean mask .* shape \(6,\), .*, got \(5,\)",
        ),
    ],
)
@pytest.mark.parametrize("ids", [[3, 3, 1, 1, 1, 2], [3, 1, 3, 1, 2, 1]], ids=["runs", "shuffled"])
def test_bad_indices(ids, indices, error, match):
    with pytest.raises(error, match=match):
        PatchGroups.from_ids(np.array(ids)).select(indices)


@pytest.mark.parametrize("ids", [[3, 3, 1, 1, 1, 2], [3, 1, 3, 1, 2, 1]], ids=["runs", "shuffled"])
@pytest.mark.parametrize("left_out", [0, 2, 5])
def test_a_sample_that_was_left_out_cannot_be_selected(ids, left_out):
    part = PatchGroups.from_ids(np.array(ids)).select(np.delete(np.arange(6), left_out))
    with pytest.raises(
        ValueError, match=f"indices must be samples of these groups, got {left_out}"
    ):
        part.select([left_out])


fractions_any = st.lists(st.integers(1, 20), min_size=1, max_size=5).map(
    lambda parts: [part / sum(parts) for part in parts]
)


def split_or_none(groups: PatchGroups, fractions: list[float], by: str, seed: int):
    """Parts, or None where one would be empty, which is an error of its own."""
    try:
        return groups.split(fractions, by=by, seed=seed)
    except ValueError as error:
        if "gives an empty part when splitting" not in str(error):
            raise
        return None


@given(
    ids=id_arrays(),
    fractions=fractions_any,
    by=st.sampled_from(["patch", "sample"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_parts_are_disjoint_and_complete_and_keep_numbers(library, ids, fractions, by, seed):
    groups = PatchGroups.from_ids(library.array(ids))
    parts = split_or_none(groups, fractions, by, seed)
    assume(parts is not None)
    assert len(parts) == len(fractions)
    whole = expected_by_patch(ids)
    together = defaultdict(list)
    for part in parts:
        assert part.source_size == ids.size
        assert part.device == groups.device
        for patch_id, samples in samples_by_patch(part).items():
            assert samples == sorted(samples)
            together[patch_id] += samples
    assert {patch_id: sorted(samples) for patch_id, samples in together.items()} == whole
    # The parts are the same on every library, and pure functions of the seed.
    on_host = PatchGroups.from_ids(ids).split(fractions, by=by, seed=seed)
    assert list(map(samples_by_patch, on_host)) == list(map(samples_by_patch, parts))


@given(ids=id_arrays(), fractions=fractions_any, seed=st.integers(0, 99))
def test_by_patch_keeps_patches_whole(ids, fractions, seed):
    groups = PatchGroups.from_ids(ids)
    parts = split_or_none(groups, fractions, "patch", seed)
    assume(parts is not None)
    whole = expected_by_patch(ids)
    for part, fraction in zip(parts, fractions, strict=True):
        for patch_id, samples in samples_by_patch(part).items():
            assert samples == whole[patch_id]
        assert abs(part.num_patches - fraction * len(whole)) <= 1
        # Whole patches that are runs stay runs: no order is made for them.
        assert part.is_contiguous or not groups.is_contiguous


@given(ids=id_arrays(), fractions=fractions_any, seed=st.integers(0, 99))
def test_by_sample_shares_every_patch_out(ids, fractions, seed):
    parts = split_or_none(PatchGroups.from_ids(ids), fractions, "sample", seed)
    assume(parts is not None)
    whole = expected_by_patch(ids)
    for part, fraction in zip(parts, fractions, strict=True):
        held = samples_by_patch(part)
        for patch_id, samples in whole.items():
            share = fraction * len(samples)
            assert abs(len(held.get(patch_id, [])) - share) <= 1 + 1e-9


@pytest.mark.parametrize("fractions", [[0.8, 0.2], [0.7, 0.2, 0.1], [0.5, 0.25, 0.25]])
def test_by_sample_keeps_the_fractions_over_many_small_patches(fractions):
    # One sample of rounding in each of 1,000 patches must not add up.
    groups = PatchGroups.from_counts([3] * 1000)
    for part, fraction in zip(groups.split(fractions, by="sample"), fractions, strict=True):
        assert abs(part.num_samples - 3000 * fraction) <= 0.02 * 3000


@pytest.mark.parametrize("by", ["patch", "sample"])
def test_seeds_make_other_splits(by):
    groups = PatchGroups.from_counts([40] * 40)
    firsts = [
        tuple(np.concatenate([part.samples_of(i) for i in part.patch_ids.tolist()]).tolist())
        for part in (groups.split([0.5, 0.5], by=by, seed=seed)[0] for seed in range(20))
    ]
    assert len(set(firsts)) == 20
    assert (
        groups.split([0.5, 0.5], by=by)[0].fingerprint
        == groups.split([0.5, 0.5], by=by, seed=0)[0].fingerprint
    )


def test_by_sample_draws_from_the_whole_patch():
    # A tenth of each patch, over seeds: every sample is drawn sometimes, none always.
    groups = PatchGroups.from_ids(np.tile([5, 9], 50))
    drawn = np.zeros(100)
    for seed in range(100):
        part = groups.split([0.1, 0.9], by="sample", seed=seed)[0]
        drawn[np.concatenate([part.samples_of(5), part.samples_of(9)])] += 1
    assert drawn.sum() == 1000
    assert drawn.min() > 0
    assert drawn.max() < 30


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([],), ValueError, "fractions must each be > 0"),
        (([0.5, 0.4],), ValueError, "fractions must add up to 1, got 0.9"),
        (([1.5, -0.5],), ValueError, "fractions must each be > 0"),
        (([float("nan"), 1.0],), ValueError, "fractions must each be > 0"),
        (([0.5, 0.5], "sampel"), ValueError, "by must be one of 'patch', 'sample', got 'sampel'"),
        (([0.5, 0.5], "patch", -1), ValueError, "seed must be >= 0, got -1"),
        (([0.5, 0.5], "patch", 1.0), TypeError, "seed must be an int, got 1.0"),
        (([0.9, 0.1],), ValueError, "a fraction of 0.1 gives an empty part when splitting 2 pat"),
    ],
)
def test_bad_splits(arguments, error, match):
    with pytest.raises(error, match=match):
        PatchGroups.from_counts([3, 4]).split(*arguments)
