"""Random runs whose number of ranks changes in mid-epoch, and what must hold of them."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from gpusampler import PatchGroups
from support.strategies import batches_of_largest_patch, epoch_of, quiet, through_json, times_seen

MAX_RANKS = 7


@dataclass(frozen=True)
class Segment:
    """Some steps on a number of ranks, after which the run is stopped and its state saved."""

    ranks: int
    fraction: float
    """Of the steps that are left; rounded, so that the first and the last are met often."""
    reporter: int
    """The rank whose state goes on."""
    batches_ahead: int
    """Batches that are drawn beyond the steps; a loader with workers draws its own."""


@dataclass(frozen=True)
class Case:
    """One run: an epoch in segments, and the next one whole. ``workers=None`` takes no loader."""

    number: int
    ids: list[int]
    settings: dict[str, Any]
    uneven: str
    epoch: int
    segments: list[Segment]
    ranks_after: int
    workers: int | None


def draw_settings(rng: np.random.Generator, ids: np.ndarray) -> dict[str, Any]:
    """Draw everything that a sampler is told besides its ids, its ranks and ``uneven``."""
    partial = str(rng.choice(["keep", "drop", "pad"]))
    largest = int(np.unique(ids, return_counts=True)[1].max())
    steps = str(rng.choice(["free", "balanced", "same_patch"], p=[0.5, 0.25, 0.25]))
    settings = {
        "batch_size": int(rng.integers(1, (largest if partial == "drop" else 12) + 1)),
        "seed": int(rng.integers(0, 2**63)),
        "partial": partial,
        "interleave": bool(rng.random() < 0.8),
        "shuffle_patches": bool(rng.random() < 0.8),
        "shuffle_within_batches": bool(rng.random() < 0.8),
        "steps": steps,
    }
    if steps == "balanced":
        settings["interleave"] = True
        settings["patch_costs"] = {int(patch): rng.lognormal() for patch in np.unique(ids)}
    return settings


def draw_case(
    number: int, kind: int, workers: int | None = None, max_ranks: int = MAX_RANKS
) -> Case:
    """Draw a case; the same one for the same numbers, so that one that fails can be made again."""
    rng = np.random.default_rng([kind, number])
    sizes = rng.integers(1, 41, rng.integers(1, 8))
    ids = np.repeat(rng.permutation(sizes.size) * 3 - 2, sizes)
    if rng.random() < 0.5:
        ids = rng.permutation(ids)
    settings = draw_settings(rng, ids)
    uneven = str(rng.choice(["pad", "drop"]))
    if uneven == "drop":
        # Every rank must have a batch there.
        enough = quiet(ids, **settings).plan.num_batches
        if settings["steps"] == "same_patch":
            enough = batches_of_largest_patch(ids, settings)
        max_ranks = min(max_ranks, enough)

    def ranks() -> int:
        return int(rng.integers(1, max_ranks + 1))

    fractions, chances = [0, 0.1, 0.3, 0.5, 0.8, 1], [0.1, 0.3, 0.3, 0.2, 0.05, 0.05]
    segments = [
        Segment(
            ranks=(size := ranks()),
            fraction=float(rng.choice(fractions, p=chances)),
            reporter=int(rng.integers(size)),
            batches_ahead=int(rng.integers(4)) if rng.random() < 0.5 else 0,
        )
        for _ in range(rng.choice([1, 2, 3, 5], p=[0.4, 0.2, 0.2, 0.2]))
    ]
    # The rest of the epoch.
    segments.append(Segment(ranks(), 1, 0, 0))
    epoch = int(rng.choice([0, 1, 5, 2**40]))
    return Case(number, ids.tolist(), settings, uneven, epoch, segments, ranks(), workers)


class World:
    """The ranks of a segment, in one process."""

    def __init__(self, case: Case, groups: PatchGroups, size: int):
        self.case, self.size = case, size
        self.samplers = [
            quiet(groups, num_replicas=size, rank=rank, uneven=case.uneven, **case.settings)
            for rank in range(size)
        ]
        self.iterators: list[Any] = []
        self.steps = 0

    def load(self, state: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            # Other ranks may cut across steps of one patch; test_steps_state.py asks for that.
            warnings.filterwarnings("ignore", "Until epoch .* ends, ")
            for sampler in self.samplers:
                sampler.load_state_dict(state)

    def begin(self) -> int:
        """Begin a pass on every rank; return how many steps it has, the same on all."""
        iterators = [iter(sampler) for sampler in self.samplers]
        lengths = {len(iterator) for iterator in iterators}
        assert len(lengths) == 1, f"ranks of different lengths: {lengths}"
        if self.case.workers is None:
            self.iterators = iterators
        else:
            # Imported here: most cases do without torch.
            from torch.utils.data import Dataset

            from support.dataloaders import loader_of

            class Numbers(Dataset):
                def __getitems__(self, rows):
                    return rows

            self.iterators = [
                iter(loader_of(Numbers(), sampler, num_workers=self.case.workers, collate_fn=list))
                for sampler in self.samplers
            ]
        return lengths.pop()

    def draw(self, steps: int) -> list[list[int]]:
        """The batches of some steps, step by step and rank by rank."""
        batches_by_rank = [list(islice(iterator, steps)) for iterator in self.iterators]
        assert {len(batches) for batches in batches_by_rank} == {steps}
        self.steps = steps
        return list(chain.from_iterable(zip(*batches_by_rank, strict=True)))

    def save(self, segment: Segment) -> dict[str, Any]:
        """The state of one rank, which may have drawn more than training has done."""
        sampler = self.samplers[segment.reporter]
        if segment.batches_ahead or self.case.workers:
            list(islice(self.iterators[segment.reporter], segment.batches_ahead))
            return through_json(sampler.state_dict(step=self.steps))
        return through_json(sampler.state_dict())


def run_case(case: Case) -> Counter[str]:
    """Run a case, check what must hold of it, and return what happened in it."""
    groups = PatchGroups.from_ids(case.ids)
    events: Counter[str] = Counter()
    # Begun in steps of the first ranks, which hold to its end.
    width = None if case.settings["steps"] == "free" else case.segments[0].ranks
    alone = quiet(groups, step_width=width, uneven=case.uneven, **case.settings)
    epoch_batches = epoch_of(alone, case.epoch)
    total = len(epoch_batches)
    drawn: list[list[int]] = []
    state, before = None, 0
    for segment in case.segments:
        world = World(case, groups, segment.ranks)
        if state is None:
            for sampler in world.samplers:
                sampler.set_epoch(case.epoch)
        else:
            world.load(state)
            events[f"{before} to {segment.ranks}"] += 1
            events["between the steps of the new ranks"] += bool(state["slot"] % segment.ranks)
        before = segment.ranks
        if case.uneven == "drop" and total - len(drawn) < segment.ranks:
            # Too few are left for these ranks, so the epoch is over.
            assert {sampler.epoch for sampler in world.samplers} == {case.epoch + 1}
            state = world.samplers[segment.reporter].state_dict()
            events["nothing left for so many"] += 1
        else:
            steps_left = world.begin()
            drawn += world.draw(round(steps_left * segment.fraction))
            state = world.save(segment)
            assert state["slot"] == (total if world.steps == steps_left else len(drawn))
            events["nothing done"] += world.steps == 0
        assert state["epoch"] == case.epoch
        assert state["step_width"] == (width or 1)
        events["in steps of other ranks"] += width not in (None, segment.ranks)
        if state["slot"] == total:
            break
    # The last world finished the epoch, whatever came before.
    assert state["slot"] == total
    extra = len(drawn) - total
    assert -segment.ranks < extra < segment.ranks
    if case.uneven == "pad":
        assert extra >= 0
        # Every slot in its turn, and then the first again, round and round on very many ranks.
        assert drawn == (epoch_batches * (1 + segment.ranks))[: len(drawn)]
    else:
        assert extra <= 0
        assert drawn == epoch_batches[: len(drawn)]
    events["repeated"] += extra > 0
    events["left out"] += extra < 0
    check_samples(case, drawn[:total], left_out=epoch_batches[len(drawn) :])
    world = World(case, groups, case.ranks_after)
    world.load(state)
    check_whole_epoch(case, world, case.epoch + 1)
    return events


def check_samples(case: Case, drawn: list[list[int]], left_out: list[list[int]]) -> None:
    """Check what was handed out against the ids alone."""
    ids = np.array(case.ids)
    for batch in drawn:
        assert np.unique(ids[batch]).size == 1, f"a mixed batch: {batch}"
    times = times_seen(drawn + left_out, ids.size)
    size, partial = case.settings["batch_size"], case.settings["partial"]
    if case.settings["steps"] == "same_patch":
        # Batches come again, or are left out, so that steps are of one patch.
        if case.uneven == "pad" and partial != "drop":
            assert (times >= 1).all()
        if case.uneven == "drop" and partial != "pad":
            assert (times <= 1).all()
        return
    if partial == "keep":
        assert (times == 1).all()
    elif partial == "pad":
        assert (times >= 1).all()
        assert all(len(batch) == size for batch in drawn)
    for patch, count in zip(*np.unique(ids, return_counts=True), strict=True):
        if partial == "drop":
            assert (times[ids == patch] <= 1).all()
            assert times[ids == patch].sum() == count - count % size
        if partial == "pad":
            assert times[ids == patch].sum() == -(-count // size) * size


def check_whole_epoch(case: Case, world: World, epoch: int) -> None:
    """Check an epoch on one number of ranks, from its first slot to its last, with `coverage`."""
    epoch_batches = epoch_of(world.samplers[0], epoch)
    steps = world.begin()
    assert steps == len(world.samplers[0])
    drawn = world.draw(steps)
    if case.uneven == "pad":
        assert drawn == (epoch_batches * (1 + world.size))[: len(drawn)]
        assert 0 <= len(drawn) - len(epoch_batches) < world.size
    else:
        assert drawn == epoch_batches[: len(epoch_batches) - len(epoch_batches) % world.size]
    times = times_seen(drawn, len(case.ids))
    for sampler in world.samplers:
        for patch in sampler.coverage(epoch):
            times_in_patch = times[np.array(case.ids) == patch["patch_id"]]
            assert patch["seen_once"] == (times_in_patch == 1).sum()
            assert patch["repeated"] == (times_in_patch > 1).sum()
            assert patch["missed"] == (times_in_patch == 0).sum()


def run_cases(cases: list[Case]) -> Counter[str]:
    """Run cases; the one that fails is printed in full."""
    events: Counter[str] = Counter()
    for case in cases:
        try:
            events += run_case(case)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} in {case!r}: {error}") from error
    return events


def rank_changes(events: Counter[str]) -> set[str]:
    """The changes of the number of ranks that happened."""
    return {name for name in events if " to " in name}
