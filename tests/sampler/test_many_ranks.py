"""1,024 ranks and 1e12 samples, on paper: any process can be any rank, and draw what it would."""

from __future__ import annotations

import json
import tracemalloc
from bisect import bisect_right
from itertools import accumulate

import pytest

from gpusampler import PatchBatchSampler, PatchGroups
from support.oracle import INSIDE_A_PATCH, ORDER_OF_BATCHES, derive, permuted
from support.processes import run_python
from support.strategies import draw, grid_preimage, through_json

RANKS, BATCH_SIZE, SEED, EPOCH = 1024, 64, 42, 3
COUNTS = [10**9 + 2 * patch - 999 for patch in range(1000)]
OFFSETS = [0, *accumulate(COUNTS)]
BATCHES = [0, *accumulate(-(-count // BATCH_SIZE) for count in COUNTS)]
M = BATCHES[-1]
STEPS = -(-M // RANKS)


def sampler_of(rank: int, ranks: int = RANKS, **settings) -> PatchBatchSampler:
    groups = PatchGroups.from_counts(COUNTS)
    settings = {"num_replicas": ranks, "rank": rank, "seed": SEED, **settings}
    sampler = PatchBatchSampler(groups, BATCH_SIZE, **settings)
    sampler.set_epoch(EPOCH)
    return sampler


def by_the_oracle(slot: int) -> list[int]:
    """The batch at a slot, by the oracle, in Python integers."""
    batch = permuted(slot, M, derive(SEED, ORDER_OF_BATCHES, EPOCH, 0))
    group = bisect_right(BATCHES, batch) - 1
    start = (batch - BATCHES[group]) * BATCH_SIZE
    key = derive(SEED, INSIDE_A_PATCH, EPOCH, group)
    places = range(start, min(start + BATCH_SIZE, COUNTS[group]))
    return [OFFSETS[group] + permuted(place, COUNTS[group], key) for place in places]


def slot_of(batch: list[int]) -> int:
    """The way back: from samples to the slot that they were drawn at."""
    group = bisect_right(OFFSETS, batch[0]) - 1
    key = derive(SEED, INSIDE_A_PATCH, EPOCH, group)
    places = [grid_preimage(sample - OFFSETS[group], COUNTS[group], key) for sample in batch]
    j = places[0] // BATCH_SIZE
    assert places == [*range(j * BATCH_SIZE, j * BATCH_SIZE + len(batch))]
    return grid_preimage(BATCHES[group] + j, M, derive(SEED, ORDER_OF_BATCHES, EPOCH, 0))


def at_step(rank: int, step: int, count: int = 1) -> list[list[int]]:
    """What a rank draws after some steps of the epoch."""
    sampler = sampler_of(rank)
    sampler.load_state_dict(through_json(sampler.state_dict(step=step)))
    return draw(iter(sampler), count)


def test_the_figures():
    assert sum(COUNTS) == 10**12
    assert M == 15_625_000_500
    assert M % RANKS != 0
    assert {len(sampler_of(rank)) for rank in (0, 1, 511, 1023)} == {STEPS}
    assert len(sampler_of(0, uneven="drop")) == M // RANKS == STEPS - 1


@pytest.mark.parametrize("rank", [0, 1, 511, 1023])
@pytest.mark.parametrize("step", [0, 976_562, STEPS // 2, STEPS - 2])
def test_a_rank_draws_its_own_slots(rank, step):
    drawn = at_step(rank, step, count=2)
    # The last step of the last ranks runs over the end, to the epoch's first batches.
    slots = [(step * RANKS + rank) % M, ((step + 1) * RANKS + rank) % M]
    block = sampler_of(0, ranks=1).plan.evaluate(EPOCH, slots)
    rows = zip(block.indices.tolist(), block.lengths.tolist(), strict=True)
    assert drawn == [row[:length] for row, length in rows]
    assert drawn == [by_the_oracle(slot) for slot in slots]


def test_no_two_ranks_draw_the_same():
    # The way back from what was drawn leads to slots of one remainder each: those of other ranks
    # have others, in every step.
    for step in (0, 7_629_394, STEPS - 2):
        for rank in (0, 1, 511, 1022, 1023):
            (batch,) = at_step(rank, step)
            assert divmod(slot_of(batch), RANKS) == (step, rank)


def test_the_last_step_fills_up_with_the_first_batches():
    over = STEPS * RANKS - M
    assert 0 < over < RANKS
    first_to_fill_up = RANKS - over
    assert slot_of(at_step(first_to_fill_up - 1, STEPS - 1)[0]) == M - 1
    assert slot_of(at_step(first_to_fill_up, STEPS - 1)[0]) == 0
    assert slot_of(at_step(RANKS - 1, STEPS - 1)[0]) == over - 1


@pytest.mark.parametrize("step", [976_562, 14_648_437])
@pytest.mark.parametrize("rank", [0, 511, 767])
def test_768_ranks_go_on(step, rank):
    # The state comes from another rank than the one that loads it.
    state = through_json(sampler_of(1023).state_dict(step=step))
    slot = step * RANKS
    assert state["slot"] == slot
    resumed = sampler_of(rank, ranks=768)
    resumed.load_state_dict(state)
    remaining = iter(resumed)
    assert len(remaining) == -(-(M - slot) // 768)
    expected = [by_the_oracle(slot + rank), by_the_oracle(slot + 768 + rank)]
    assert draw(remaining, 2) == expected
    assert resumed.state_dict(step=2)["slot"] == slot + 2 * 768


def test_resuming_takes_kilobytes_wherever_it_is():
    at_step(0, 5)  # what the first call imports is no memory of the second
    tracemalloc.start()
    at_step(1023, STEPS - 2, count=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 512 * 1024


def test_the_state_is_small():
    sampler = sampler_of(1023, seed=2**64 - 1)
    sampler.set_epoch(2**63 - 2)
    assert len(json.dumps(sampler.state_dict(step=STEPS))) < 1024


def test_the_command_prints_these_figures():
    done = run_python("-m", "docs.figures.many_ranks")
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"{M:,} batches per epoch, 1,024 ranks")
    table = [line.split(" | ") for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in table] == ["| 0", "| 1", "| 511", "| 1,023"]
    assert {row[1] for row in table} == {f"{STEPS:,}"}
    assert all(0 < float(row[3]) < 512 for row in table)
    left = M - 999_999_488
    assert f"{left:,} batches left, {-(-left // 768):,} steps, {-left % 768} batches repeated" in (
        done.stdout
    )
