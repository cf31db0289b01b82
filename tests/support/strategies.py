"""The slow and obvious forms that the package is compared with, and inputs for hypothesis."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from math import isqrt
from typing import Any

import numpy as np
from hypothesis import strategies as st

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.permutation.reference import COIN_ROUND, keyed_hash, rounds_for
from gpusampler.plan.evaluators.base import RaggedBlock

STEPS = ["balanced", "same_patch"]

INT64 = np.iinfo(np.int64)


def samples_by_patch(groups: PatchGroups) -> dict[int, list[int]]:
    """Every patch id with its samples, read off the tables that groups keep."""
    order = None if groups.order is None else np.asarray(groups.order.tolist())
    samples = {}
    tables = (groups.patch_ids, groups.starts, groups.counts)
    for patch_id, start, count in zip(*(column.tolist() for column in tables), strict=True):
        span = range(start, start + count)
        samples[patch_id] = list(span) if order is None else order[start : start + count].tolist()
    return samples


def expected_by_patch(ids: Any) -> dict[int, list[int]]:
    """What `samples_by_patch` must be: patches ascending, samples ascending."""
    samples: dict[int, list[int]] = {}
    for sample, patch_id in enumerate(np.asarray(ids).tolist()):
        samples.setdefault(patch_id, []).append(sample)
    return dict(sorted(samples.items()))


def is_contiguous(ids: Any) -> bool:
    """Whether the samples of every patch lie side by side."""
    ids = np.asarray(ids)
    return int((ids[1:] != ids[:-1]).sum()) + 1 == np.unique(ids).size


def rows_of(block: RaggedBlock) -> list[list[int]]:
    """The samples of each batch."""
    samples, ends = block.samples.tolist(), block.ends.tolist()
    return [samples[end - size : end] for end, size in zip(ends, block.sizes.tolist(), strict=True)]


def ragged_of(plan: EpochPlan, epoch: int, slots: np.ndarray) -> RaggedBlock:
    """The batches at some slots, as iteration evaluates them."""
    return plan.evaluator.ragged(epoch, plan.evaluator.locate(epoch, slots))


def times_seen(batches: Any, size: int) -> np.ndarray:
    """How often each sample stands in some batches."""
    counts = Counter(int(sample) for batch in batches for sample in batch)
    return np.array([counts[sample] for sample in range(size)])


def grid_preimage(y: int, n: int, key: tuple[int, int]) -> int:
    """Undo the keyed grid permutation of n > 32 cells, in Python integers."""
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    rem = n - (a - 1) * b
    if y < 2:
        y ^= keyed_hash(key, COIN_ROUND, 0) >> 31
    row, col = divmod(y, b)
    for r in reversed(range(rounds_for(n))):
        if r % 2 == 0:
            side = a - (col >= rem)
            row = (row - (keyed_hash(key, r, col) * side >> 32)) % side
        else:
            side = rem if row == a - 1 else b
            col = (col - (keyed_hash(key, r, row) * side >> 32)) % side
    return row * b + col


ids_any = st.integers(INT64.min, INT64.max)


@st.composite
def id_arrays(draw: st.DrawFn) -> np.ndarray:
    """Int64 ids, shape (N,): dense or sparse, shuffled, in runs, or all alike."""
    low = draw(st.sampled_from([0, 0, -3, 1000, INT64.min, INT64.max - 300]))
    pool = draw(
        st.one_of(
            st.lists(st.integers(low, low + 300), min_size=1, max_size=12, unique=True),
            st.lists(ids_any, min_size=1, max_size=12, unique=True),
            st.just([INT64.min, INT64.max, 0, -1]),
        )
    )
    if draw(st.booleans()):
        run_lengths = draw(st.lists(st.integers(1, 40), min_size=len(pool), max_size=len(pool)))
        return np.repeat(np.array(pool, np.int64), run_lengths)
    positions = draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=300))
    return np.array(pool, np.int64)[positions]


@st.composite
def patchy_ids(draw: st.DrawFn) -> np.ndarray:
    """Small int64 ids whose patches have sizes on both sides of the permutation's two forms."""
    sizes = draw(
        st.lists(st.sampled_from([1, 2, 3, 7, 20, 32, 33, 34, 60, 101]), min_size=1, max_size=6)
    )
    ids = np.repeat(draw(st.permutations(range(-2, len(sizes) - 2))), sizes).astype(np.int64)
    if draw(st.booleans()):
        np.random.default_rng(draw(st.integers(0, 99))).shuffle(ids)
    return ids


@st.composite
def plan_settings(
    draw: st.DrawFn,
    ids: np.ndarray,
    steps_of: int | None = None,
    uneven: str = "pad",
    partials: tuple[str, ...] = ("keep", "drop", "pad"),
) -> dict[str, Any]:
    """Keyword arguments of a plan that leaves at least one batch of these ids.

    With ``steps_of`` in steps of any kind, whose width is a multiple of that.
    """
    partial = draw(st.sampled_from(partials))
    largest = int(np.unique(ids, return_counts=True)[1].max())
    top = largest if partial == "drop" else 45
    settings = {
        "batch_size": draw(st.integers(1, min(top, 45))),
        "partial": partial,
        "shuffle_within_batches": draw(st.booleans()),
        "shuffle_patches": draw(st.booleans()),
        "interleave": draw(st.booleans()),
    }
    steps = "free" if steps_of is None else draw(st.sampled_from(["free", *STEPS]))
    if steps == "free":
        return settings
    if steps == "same_patch" and uneven == "drop":
        max_batches = batches_of_largest_patch(ids, settings) // steps_of
        if max_batches == 0:
            return settings
    else:
        max_batches = 5
    settings |= {"steps": steps, "step_width": steps_of * draw(st.integers(1, min(max_batches, 5)))}
    if steps == "balanced":
        settings["interleave"] = True
        costs = st.one_of(st.just(1), st.integers(1, 4), st.floats(0.01, 1e6))
        settings["patch_costs"] = {int(patch_id): draw(costs) for patch_id in np.unique(ids)}
    return settings


def batches_of_largest_patch(ids: np.ndarray, settings: dict[str, Any]) -> int:
    """The batches that the largest patch is cut into."""
    largest = int(np.unique(ids, return_counts=True)[1].max())
    size = settings["batch_size"]
    return largest // size if settings["partial"] == "drop" else -(-largest // size)


seeds = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
epochs = st.one_of(st.integers(0, 3), st.integers(0, 2**63 - 1))


IDS = np.random.default_rng(0).permutation(np.repeat([5, -2, 9, 40], [30, 7, 50, 3]))


def make(**settings) -> PatchBatchSampler:
    return PatchBatchSampler(IDS, settings.pop("batch_size", 4), **{"seed": 1, **settings})


def epoch_of(sampler: PatchBatchSampler, epoch: int) -> list[list[int]]:
    """The batches of an epoch, from the plan, as its first rank of one gets them."""
    block = sampler.plan.evaluate(epoch, np.arange(sampler.plan.num_batches))
    rows = zip(block.indices.tolist(), block.lengths.tolist(), strict=True)
    return [row if sampler.plan.partial == "pad" else row[:length] for row, length in rows]


def quiet(*arguments, **settings) -> PatchBatchSampler:
    """A sampler without the warnings of patches that are left out, or padded with copies."""
    expected = (
        "(((partial|uneven)='drop'|over_budget='skip'|min_partial=).* leaves out|partial='pad')"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=expected)
        return PatchBatchSampler(*arguments, **settings)


def draw(iterator: Any, count: int) -> list[Any]:
    """The next batches of an iterator."""
    return [next(iterator) for _ in range(count)]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a checkpoint; it must be small."""
    written = json.dumps(state)
    assert len(written) < 1024
    return json.loads(written)


def mid_epoch_state(epoch: int = 3, drawn: int = 5) -> dict[str, Any]:
    """The state of `make` after some batches of an epoch."""
    sampler = make()
    sampler.set_epoch(epoch)
    draw(iter(sampler), drawn)
    return sampler.state_dict()


def smallest_size(minimum: int, multiple_of: int, power_of_two: bool) -> int:
    """The smallest batch size that bounds of a budget allow."""
    sizes = (size for size in range(multiple_of, 1 << 20, multiple_of) if size >= minimum)
    return next(size for size in sizes if not power_of_two or size & (size - 1) == 0)
