"""Samplers that travel: to spawned processes and workers, by pickle, and as deep copies."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from functools import partial
from itertools import islice

import numpy as np
import pytest

from gpusampler import PatchBatchSampler
from support.strategies import IDS, draw, epoch_of, make, mid_epoch_state, quiet


def as_lists(batches) -> list[list[int]]:
    return [np.asarray(batch).tolist() for batch in batches]


def what_it_does(sampler: PatchBatchSampler) -> dict:
    """What a sampler says and hands out, where it is, to the end of the next epoch but one."""
    before = sampler.state_dict()
    batches = iter(sampler)
    first, epoch, during = as_lists(islice(batches, 3)), sampler.epoch, sampler.state_dict()
    return {
        "before": before,
        "epoch": epoch,
        "during": during,
        "pass": first + as_lists(batches),
        "after": sampler.state_dict(),
        "next": as_lists(sampler),
        "seed": sampler.seed,
    }


def unpacked(pickled: bytes) -> dict:
    return what_it_does(pickle.loads(pickled))


@pytest.fixture(scope="module")
def in_spawned_process():
    """Say what a sampler does in a spawned process, which shares nothing with this one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield lambda sampler: pool.apply_async(unpacked, (pickle.dumps(sampler),)).get(300)


def loaded(sampler: PatchBatchSampler, epoch: int, count: int) -> PatchBatchSampler:
    sampler.load_state_dict(mid_epoch_state(epoch, count))
    return sampler


def skipped(sampler: PatchBatchSampler) -> PatchBatchSampler:
    sampler.reshuffle()
    return sampler


def told(sampler: PatchBatchSampler, epoch: int) -> PatchBatchSampler:
    sampler.set_epoch(epoch)
    return sampler


SAMPLERS = {
    "new": make,
    "a drawn seed": partial(make, seed=None),
    "told its epoch": lambda: told(make(), 7),
    "skipped an epoch": lambda: skipped(make()),
    "loaded in the middle": lambda: loaded(make(seed=None), 3, 5),
    "loaded at the end": lambda: loaded(make(), 3, 24),
    "numpy": lambda: quiet(IDS, 9, partial="drop", output="numpy", seed=3, interleave=False),
    "padded": lambda: quiet(IDS, 9, partial="pad", seed=2**64 - 1, shuffle_patches=False),
    "a rank": lambda: told(make(num_replicas=3, rank=2, uneven="drop"), 2),
}


@pytest.mark.filterwarnings("ignore:a second pass on 3 ranks")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_spawned_process_gets_the_same_batches_and_states(in_spawned_process, name):
    sampler = SAMPLERS[name]()
    actual = in_spawned_process(sampler)
    assert actual["pass"]
    assert actual == what_it_does(sampler)


@pytest.mark.filterwarnings("ignore:a second pass on 3 ranks")
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_deep_copy_does_what_the_sampler_does(name):
    sampler = SAMPLERS[name]()
    assert what_it_does(copy.deepcopy(sampler)) == what_it_does(sampler)


@pytest.mark.parametrize("count", [1, 5, 24])
def test_a_copy_made_during_a_pass_says_that_it_begins_at_the_next_epoch(count):
    sampler = make()
    begun = iter(sampler)
    draw(begun, count)
    for copied in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        state = copied.state_dict()
        assert (state["epoch"], state["slot"]) == (1, 0)
        other = make()
        other.load_state_dict(state)
        assert list(other) == list(copied) == epoch_of(sampler, 1)
    assert len(list(begun)) == 24 - count


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
@pytest.mark.parametrize("count", [0, 1, 7, 23, 24])
def test_an_iterator_travels_with_its_place(copier, count):
    begun = iter(make())
    draw(begun, count)
    copied = copier(begun)
    assert len(copied) == len(begun) == 24 - count
    assert copied.state_dict() == begun.state_dict()
    assert list(copied) == list(begun) == epoch_of(make(), 0)[count:]
