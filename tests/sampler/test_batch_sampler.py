"""PatchBatchSampler: iteration, epochs, what frameworks look for, and clear errors."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import Batch, PatchBatchSampler, PatchGroups
from gpusampler.sampler import batches as batches_module
from support.strategies import (
    IDS,
    epoch_of,
    expected_by_patch,
    make,
    patchy_ids,
    plan_settings,
    quiet,
    seeds,
)


@given(data=st.data(), seed=seeds)
def test_iteration_hands_out_the_plan(library, data, seed):
    ids = data.draw(patchy_ids())
    settings = data.draw(plan_settings(ids, steps_of=1))
    sampler = quiet(library.array(ids), seed=seed, **settings)
    expected = epoch_of(sampler, 0)
    assert len(sampler) == len(expected)
    drawn = list(sampler)
    assert drawn == expected
    assert all(type(batch) is list for batch in drawn)
    assert {type(sample) for batch in drawn for sample in batch} == {int}
    size = settings["batch_size"]
    if settings["partial"] == "keep":
        assert sampler.batch_size is None
        assert {len(batch) for batch in drawn} <= set(range(1, size + 1))
    else:
        assert sampler.batch_size == size
        assert {len(batch) for batch in drawn} == {size}
    assert str(sampler.plan.device) == library.device


@given(data=st.data(), seed=seeds)
def test_batches_carry_patch_and_count(library, data, seed):
    ids = data.draw(patchy_ids())
    sampler = quiet(library.array(ids), seed=seed, **data.draw(plan_settings(ids, steps_of=1)))
    lengths = sampler.plan.evaluate(0, range(len(sampler))).lengths.tolist()
    drawn = list(sampler.batches())
    assert [library.host(batch.indices).tolist() for batch in drawn] == epoch_of(sampler, 0)
    for batch, length in zip(drawn, lengths, strict=True):
        assert type(batch) is Batch
        assert type(batch.patch_id) is int
        assert type(batch.valid) is int
        assert batch.valid == length
        indices = library.host(batch.indices)
        assert indices.dtype == np.int64
        assert set(ids[indices].tolist()) == {batch.patch_id}


@pytest.mark.parametrize("partial", ["keep", "drop", "pad"])
@pytest.mark.parametrize("interleave", [False, True])
def test_outputs_hold_the_same_integers(library, partial, interleave):
    torch = pytest.importorskip("torch")
    settings = {"partial": partial, "interleave": interleave, "seed": 3}
    expected = epoch_of(quiet(IDS, 4, **settings), 0)
    for output, kind in (("numpy", np.ndarray), ("tensor", torch.Tensor), ("list", list)):
        sampler = quiet(library.array(IDS), 4, output=output, **settings)
        drawn = list(sampler)
        assert {type(batch) for batch in drawn} == {kind}
        assert [list(map(int, batch)) for batch in drawn] == expected
        if output == "numpy":
            assert {batch.dtype for batch in drawn} == {np.dtype(np.int64)}
        if output == "tensor":
            assert {(batch.dtype, str(batch.device)) for batch in drawn} == {(torch.int64, "cpu")}


def test_a_batch_may_be_written_to_without_harm_to_others():
    sampler = make(output="numpy")
    drawn = []
    for batch in sampler:
        drawn.append(batch.tolist())
        batch[...] = -1
    assert drawn == epoch_of(sampler, 0)


@pytest.mark.parametrize("ids", [IDS, np.sort(IDS)], ids=["shuffled", "runs"])
def test_everyone_is_seen_once_over_many_blocks(ids):
    ids = np.tile(ids, 2000)
    drawn = list(PatchBatchSampler(ids, 3, seed=0))
    flat = [sample for batch in drawn for sample in batch]
    assert sorted(flat) == list(range(ids.size))
    assert all(len(set(ids[batch].tolist())) == 1 for batch in drawn[::97])


def test_len_of_an_iterator_is_what_remains():
    sampler = make()
    total = len(epoch_of(sampler, 0))
    iterator = iter(sampler)
    for drawn in range(total):
        assert len(iterator) == total - drawn
        assert len(sampler) == total
        next(iterator)
    assert len(iterator) == 0
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(iterator)


def test_iter_has_no_side_effect():
    sampler = make()
    before = sampler.state_dict()
    # A DataLoader with workers calls iter twice a pass.
    unused, used, third = iter(sampler), iter(sampler), iter(sampler)
    assert sampler.epoch == 0
    assert sampler.state_dict() == before
    assert list(used) == epoch_of(sampler, 0)
    assert list(third) == epoch_of(sampler, 1)
    assert list(unused) == epoch_of(sampler, 2)


def test_passes_are_epochs():
    sampler = make()
    for epoch in range(4):
        assert sampler.epoch == sampler.get_epoch_count() == epoch
        assert list(sampler) == epoch_of(sampler, epoch)
    assert epoch_of(sampler, 0) != epoch_of(sampler, 1)


def test_the_epoch_is_bound_by_the_first_batch_drawn():
    sampler = make()
    iterator = iter(sampler)
    sampler.set_epoch(7)
    assert sampler.epoch == 7
    first = next(iterator)
    assert sampler.epoch == 8
    sampler.set_epoch(3)
    assert [first, *iterator] == epoch_of(sampler, 7)
    assert sampler.epoch == 3
    assert list(sampler) == epoch_of(sampler, 3)


def test_a_pass_that_was_left_is_followed_by_the_next_epoch():
    sampler = make()
    left = iter(sampler)
    drawn = [next(left), next(left)]
    assert list(sampler) == epoch_of(sampler, 1)
    assert drawn + list(left) == epoch_of(sampler, 0)


def test_set_epoch_can_go_back_and_repeat():
    sampler = make()
    for epoch in (5, 5, 2, 0):
        sampler.set_epoch(epoch)
        assert sampler.epoch == epoch
        assert list(sampler) == epoch_of(sampler, epoch)
    assert sampler.epoch == 1


def test_set_epoch_through_the_object_that_frameworks_look_for():
    sampler = make()
    sampler.sampler.set_epoch(6)
    assert list(sampler) == epoch_of(sampler, 6)
    assert not hasattr(sampler.sampler, "generator")


def test_batches_of_a_given_epoch_leave_the_sampler_alone():
    sampler = make()
    sampler.set_epoch(2)
    before = sampler.state_dict()
    for epoch in (9, 2):
        actual = [batch.indices.tolist() for batch in sampler.batches(epoch)]
        assert actual == epoch_of(sampler, epoch)
    assert sampler.epoch == 2
    assert sampler.state_dict() == before
    assert [batch.indices.tolist() for batch in sampler.batches()] == epoch_of(sampler, 2)
    assert sampler.epoch == 3


def test_reshuffle_skips_an_epoch():
    sampler = make()
    list(sampler)
    sampler.reshuffle()
    assert sampler.epoch == sampler.get_epoch_count() == 2
    assert list(sampler) == epoch_of(sampler, 2)


def test_seeds_are_used_and_drawn():
    assert list(make(seed=1)) == list(make(seed=1))
    assert list(make(seed=1)) != list(make(seed=2))
    drawn = {PatchBatchSampler(IDS, 4).seed for _ in range(5)}
    assert len(drawn) == 5
    assert all(0 <= seed < 2**64 for seed in drawn)
    assert make(seed=2**64 - 1).seed == 2**64 - 1


def test_positional_arguments_are_those_of_the_seed_document():
    sampler = PatchBatchSampler(IDS, 4, False, False, 17)
    settings = sampler.plan.settings
    assert settings["batch_size"] == 4
    assert settings["shuffle_within_batches"] is settings["shuffle_patches"] is False
    assert sampler.seed == 17
    patches = expected_by_patch(IDS).values()
    assert list(sampler) == [p[k : k + 4] for p in patches for k in range(0, len(p), 4)]


@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
def test_global_generators_are_left_alone(output):
    torch = pytest.importorskip("torch")

    def states():
        numpy_state = np.random.get_state()  # noqa: NPY002
        return random.getstate(), numpy_state[1].tolist(), numpy_state[2:], torch.get_rng_state()

    before = states()
    sampler = PatchBatchSampler(IDS, 4, output=output)
    list(sampler)
    list(sampler.batches())
    sampler.coverage()
    sampler.plan.groups.split([0.5, 0.5])
    PatchBatchSampler(IDS, 4).load_state_dict(sampler.state_dict())
    after = states()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_what_frameworks_must_and_must_not_find():
    pytest.importorskip("torch")
    from torch.utils.data import BatchSampler, Sampler

    for partial in ("keep", "drop", "pad"):
        sampler = quiet(IDS, 4, partial=partial)
        # Lightning rebuilds whatever has both batch_size and drop_last.
        assert not hasattr(sampler, "drop_last")
        assert not isinstance(sampler, (BatchSampler, Sampler))
        assert not hasattr(type(sampler), "__slots__")
        assert callable(sampler.sampler.set_epoch)
        assert callable(sampler.state_dict)
        assert callable(sampler.load_state_dict)
        # Accelerate takes an integer as a promise that every batch has this size.
        assert sampler.batch_size == (None if partial == "keep" else 4)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize("drawn", [0, 3])
def test_copies_go_on_by_themselves(library, copier, drawn):
    sampler = PatchBatchSampler(library.array(IDS), 4, seed=8)
    list(sampler)
    iterator = iter(sampler)
    begun = [next(iterator) for _ in range(drawn)]
    copied = copier(sampler)
    assert copied.epoch == sampler.epoch
    following = sampler.epoch
    assert list(copied) == epoch_of(sampler, following)
    # Neither disturbs the other.
    assert sampler.epoch == following
    copied.sampler.set_epoch(30)
    assert copied.epoch == 30
    assert begun + list(iterator) == epoch_of(sampler, 1)


def test_a_loaded_position_survives_pickling():
    sampler = make()
    iterator = iter(sampler)
    for _ in range(5):
        next(iterator)
    resumed = make()
    resumed.load_state_dict(sampler.state_dict())
    assert list(pickle.loads(pickle.dumps(resumed))) == list(iterator)


def test_pickle_is_small_without_an_order():
    sampler = PatchBatchSampler(PatchGroups.from_counts([10**9] * 10), 64, seed=0)
    assert len(pickle.dumps(sampler)) < 10_000


def test_repr():
    assert repr(make()) == (
        "PatchBatchSampler(90 samples, 4 patches, 24 batches of 4, epoch=0, seed=1, "
        "partial='keep', device='numpy')"
    )
    assert "rank 1 of 3" in repr(make(num_replicas=3, rank=1))


@pytest.mark.parametrize("max_batches", [1, 3, 100])
@pytest.mark.parametrize("output", ["list", "numpy"])
@pytest.mark.parametrize("partial", ["keep", "pad"])
def test_blocks_are_cut_a_few_batches_at_a_time(monkeypatch, max_batches, output, partial):
    ids = np.repeat(np.arange(40), 50)

    def plain(batches):
        return [np.asarray(batch).tolist() for batch in batches]

    def begin():
        return PatchBatchSampler(ids, 3, seed=4, partial=partial, output=output)

    block = begin().plan.evaluate(0, np.arange(len(begin())))
    sizes = np.full(block.lengths.shape, 3) if partial == "pad" else block.lengths
    rows = zip(block.indices.tolist(), sizes.tolist(), strict=True)
    expected = [row[:size] for row, size in rows]
    monkeypatch.setattr(batches_module, "MAX_OBJECTS_AT_ONCE", max_batches)
    sampler = begin()
    iterator = iter(sampler)
    begun = plain(next(iterator) for _ in range(2 * max_batches + 1))
    assert len(iterator) == len(expected) - len(begun)
    resumed = begin()
    resumed.load_state_dict(sampler.state_dict())
    assert begun + plain(iterator) == expected
    assert begun + plain(resumed) == expected
