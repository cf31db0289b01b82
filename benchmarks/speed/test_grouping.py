"""Building the groups: 1e7 ids."""

from __future__ import annotations

import numpy as np
import pytest

from gpusampler import PatchGroups

N = 10_000_000
MASKS = 50


@pytest.fixture
def rng():
    return np.random.default_rng(2026)


def _by_masks(ids, patch_ids):
    """Group as the project's first document did: one mask a patch."""
    return [np.flatnonzero(ids == patch_id) for patch_id in patch_ids]


def test_dense_against_argsort(against, rng, scaled):
    ids = rng.integers(0, 1000, scaled(N))
    against(
        "group 1e7 shuffled ids, 1,000 patches",
        lambda: PatchGroups.from_ids(ids),
        "np.argsort(ids, kind='stable')",
        lambda: np.argsort(ids, kind="stable"),
    )


@pytest.mark.parametrize("patches", [1000, 20_000])
def test_dense_against_masks(against, rng, scaled, patches):
    ids = rng.integers(0, patches, scaled(N))
    against(
        f"group 1e7 shuffled ids, {patches:,} patches",
        lambda: PatchGroups.from_ids(ids),
        f"a mask a patch ({MASKS} measured, x{patches // MASKS})",
        lambda: _by_masks(ids, range(MASKS)),
        scale=patches / MASKS,
    )


@pytest.mark.parametrize("patches", [1000, 50_000])
def test_sparse_against_argsort(against, rng, scaled, patches):
    names = rng.integers(-(2**63), 2**63 - 1, patches)
    ids = names[rng.integers(0, patches, scaled(N))]
    against(
        f"group 1e7 sparse 64-bit ids, {patches:,} patches",
        lambda: PatchGroups.from_ids(ids),
        "np.argsort(ids, kind='stable')",
        lambda: np.argsort(ids, kind="stable"),
    )
