"""Plans and the oracle's settings for them, drawn together, for hypothesis."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from gpusampler import EpochPlan, PatchGroups
from support import oracle
from support.optional_torch import torch
from support.strategies import patchy_ids, ragged_of, rows_of, seeds

PARTIALS = ("keep", "drop", "pad")
KINDS = [
    {},
    {"interleave": False},
    {"steps": "balanced"},
    {"steps": "same_patch"},
    {"steps": "same_patch", "interleave": False},
]
WEIGHTS = st.one_of(
    st.integers(1, 5),
    st.floats(0.1, 10),
    st.sampled_from([0.1, 1e-9, 1e-200, 1e150, 2.0**51, 2.0**52 - 1, 1 / 3]),
)


class Case(NamedTuple):
    """A plan with weights, sizes by patch, or both, and the same settings for the oracle."""

    ids: np.ndarray
    batch_size: Any
    given: dict[str, Any]
    oracle: oracle.Settings
    seed: int

    @property
    def plan(self) -> EpochPlan:
        return self.on("numpy")

    def on(self, library: str) -> EpochPlan:
        ids = self.ids if library == "numpy" else torch.from_numpy(self.ids)
        return EpochPlan(PatchGroups.from_ids(ids), self.batch_size, self.seed, **self.given)

    @property
    def counts(self) -> list[int]:
        return np.unique(self.ids, return_counts=True)[1].tolist()

    @property
    def own(self) -> list[int]:
        return list(map(len, oracle.own_batches(self.counts, self.oracle)))


@st.composite
def cases(
    draw: st.DrawFn,
    kinds: list[dict[str, Any]] = KINDS,
    partials: tuple[str, ...] = PARTIALS,
    always_mixed: bool = False,
    **fixed: Any,
) -> Case:
    """Cases in which every patch with a batch has a slot in every epoch."""
    ids = draw(patchy_ids())
    counts = np.unique(ids, return_counts=True)[1]
    partial = draw(st.sampled_from(partials))
    size = st.sampled_from([1, 2, 3, 7, 20, 40])
    sizes = draw(st.one_of(size, st.lists(size, min_size=counts.size, max_size=counts.size)))
    settings = oracle.Settings(
        sizes,
        partial,
        shuffle_patches=draw(st.sampled_from([True, True, False])),
        shuffle_within_batches=draw(st.sampled_from([True, True, True, False])),
    )._replace(**draw(st.sampled_from(kinds)))
    if settings.steps != "free":
        settings = settings._replace(
            step_width=draw(st.sampled_from([1, 2, 3, 5, 8])),
            uneven=draw(st.sampled_from(["pad", "drop"])),
        )
    if settings.steps == "balanced" and draw(st.booleans()):
        settings = settings._replace(patch_costs=[draw(st.floats(0.1, 10)) for _ in counts])
    own_batches = list(map(len, oracle.own_batches(counts.tolist(), settings)))
    num_patches = sum(map(bool, own_batches))
    assume(num_patches)
    smallest = num_patches
    if settings.steps == "same_patch" and settings.uneven == "drop":
        smallest *= settings.step_width
    # The oracle takes a while for each sample.
    length = st.one_of(st.integers(smallest, smallest + 10), st.integers(smallest, smallest + 80))
    weights = st.lists(WEIGHTS, min_size=counts.size, max_size=counts.size)
    mixing = draw(st.sampled_from(["both", "weights", "length"] + ["none"] * (not always_mixed)))
    if mixing in ("both", "weights"):
        settings = settings._replace(weights=draw(weights))
    if mixing in ("both", "length") or (mixing == "weights" and smallest > sum(own_batches)):
        settings = settings._replace(epoch_batches=draw(length))
    if mixing == "none":
        # Left to tests of steps.
        assume(isinstance(sizes, list) and (settings.uneven == "pad" or smallest <= num_patches))
    return draw(with_arguments(ids, settings._replace(**fixed)))


@st.composite
def with_arguments(draw: st.DrawFn, ids: np.ndarray, settings: oracle.Settings) -> Case:
    """The arguments of a plan for settings of the oracle, by patch or by ascending patch id."""
    patch_ids = np.unique(ids).tolist()
    arguments, sizes = settings._asdict(), settings.batch_size
    # Cost bins are other tests' matter.
    del arguments["batch_size"], arguments["patch_of_bin"]
    if isinstance(sizes, list):
        sizes = dict(zip(patch_ids, sizes, strict=True))
    if settings.weights is not None and draw(st.booleans()):
        arguments["weights"] = dict(zip(patch_ids, settings.weights, strict=True))
    return Case(ids, sizes, arguments, settings, draw(seeds))


@st.composite
def short_batch_cases(draw: st.DrawFn) -> Case:
    """Cases of even batches, short ones left out, costliest first, weights of 0, few visits."""
    ids = draw(patchy_ids())
    counts = np.unique(ids, return_counts=True)[1].tolist()
    size = st.sampled_from([1, 2, 3, 7, 20, 40])
    partial = draw(st.sampled_from(["even", "even", "keep", "drop", "pad"]))
    per_patch = st.lists(size, min_size=len(counts), max_size=len(counts))
    kind = draw(st.sampled_from(["few", "few", *KINDS])) if len(counts) > 1 else {}
    settings = oracle.Settings(
        draw(st.one_of(size, per_patch)),
        partial,
        shuffle_patches=draw(st.sampled_from([True, True, False])),
        shuffle_within_batches=draw(st.sampled_from([True, True, True, False])),
    )
    sizes = [settings.size(g) for g in range(len(counts))]
    if partial in ("keep", "even"):
        settings = settings._replace(min_partial=draw(st.integers(1, min(max(sizes), 4))))
    num_batches = [len(batches) for batches in oracle.own_batches(counts, settings)]
    visited = sum(map(bool, num_batches))
    assume(visited)
    if kind == "few":
        return draw(
            with_arguments(
                ids, settings._replace(epoch_batches=draw(st.integers(1, max(visited - 1, 1))))
            )
        )
    settings = settings._replace(**kind)
    if settings.steps != "free":
        uneven = draw(st.sampled_from(["pad", "drop"]))
        settings = settings._replace(step_width=draw(st.integers(1, 5)), uneven=uneven)
    if settings.steps != "same_patch" and settings.interleave and draw(st.booleans()):
        settings = settings._replace(costliest_first=True, step_width=draw(st.integers(1, 6)))
    uses_costs = settings.costliest_first or settings.steps == "balanced"
    if uses_costs and draw(st.booleans()):
        cost = st.sampled_from([1, 1, 1.05, 2, 0.3])
        costs = draw(st.lists(cost, min_size=len(counts), max_size=len(counts)))
        settings = settings._replace(patch_costs=costs)
    if draw(st.booleans()):
        weight = st.one_of(st.just(0), WEIGHTS)
        weights = draw(st.lists(weight, min_size=len(counts), max_size=len(counts)))
        visited = sum(nb > 0 and w > 0 for nb, w in zip(num_batches, weights, strict=True))
        assume(visited)
        settings = settings._replace(weights=weights)
    smallest = visited
    if settings.steps == "same_patch" and settings.uneven == "drop":
        smallest *= settings.step_width
        if settings.weights is None:
            assume(max(num_batches) >= settings.step_width)
    needs_length = settings.weights is not None and sum(num_batches) < smallest
    if needs_length or (settings.weights is not None and draw(st.booleans())):
        length = st.integers(smallest, smallest + 30)
        settings = settings._replace(epoch_batches=draw(length))
    return draw(with_arguments(ids, settings))


def whole(plan: EpochPlan, epoch: int) -> list[tuple[int, list[int]]]:
    """All batches of an epoch, each as (patch id, samples), as they are handed out."""
    result = ragged_of(plan, epoch, np.arange(plan.num_batches))
    patch_ids = plan.groups.patch_ids.tolist()
    rows = zip(result.groups.tolist(), rows_of(result), strict=True)
    return [(patch_ids[group], samples) for group, samples in rows]
