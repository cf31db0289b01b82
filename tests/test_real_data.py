"""What is promised of batches, on real data: utterances by length, molecules by size, storms."""

from __future__ import annotations

import json

import numpy as np
import pytest

from docs.figures.real_data import load, sizes_of
from gpusampler import CostBudget, PatchBatchSampler, PatchGroups, Temperature
from support.strategies import quiet

BATCH_SIZE = 16


def ids_of(name: str) -> np.ndarray:
    return load("storms")["storm"] if name == "storms" else sizes_of(name)


@pytest.fixture(params=["vowels", "molecules", "storms"])
def ids(request):
    """The patch of each sample: a length, a number of atoms, a storm."""
    return ids_of(request.param)


def lists(batches) -> list[list[int]]:
    return [np.asarray(batch.indices).tolist() for batch in batches]


def seen(size: int, batches: list[list[int]]) -> np.ndarray:
    return np.bincount(np.concatenate(batches), minlength=size)


class TestAnEpoch:
    def test_every_batch_is_of_one_patch_and_every_sample_comes_once(self, ids):
        sampler = PatchBatchSampler(ids, BATCH_SIZE, seed=1)
        for epoch in range(3):
            batches = list(sampler.batches(epoch))
            assert all((ids[batch.indices] == batch.patch_id).all() for batch in batches)
            assert all(1 <= batch.valid == len(batch.indices) <= BATCH_SIZE for batch in batches)
            assert (seen(ids.size, lists(batches)) == 1).all()

    def test_len_and_coverage_are_exact(self, ids):
        sampler = PatchBatchSampler(ids, BATCH_SIZE, seed=1)
        _, counts = np.unique(ids, return_counts=True)
        assert len(sampler) == sum(1 for _ in sampler) == (-(-counts // BATCH_SIZE)).sum()
        assert sampler.coverage().exact
        assert (sampler.coverage().counts == counts).all()

    def test_members_change_from_epoch_to_epoch_where_there_is_a_choice(self, ids):
        sampler = PatchBatchSampler(ids, BATCH_SIZE, seed=1)
        first, second = (
            {frozenset(batch) for batch in lists(sampler.batches(epoch))} for epoch in range(2)
        )
        count_of = dict(zip(*(a.tolist() for a in np.unique(ids, return_counts=True)), strict=True))
        again = [count_of[int(ids[min(batch)])] for batch in first & second]
        # A patch of one batch has the same members every time; of others, a rest of one or two may.
        only = sum(count <= BATCH_SIZE for count in count_of.values())
        assert sum(count <= BATCH_SIZE for count in again) == only
        assert len(again) - only < 0.02 * len(first)
        assert {count % BATCH_SIZE for count in again if count > BATCH_SIZE} <= {1, 2}

    def test_batches_are_the_same_on_every_library(self, ids, library):
        """Ids on a device; batches there, and as lists."""
        device_sampler = PatchBatchSampler(library.array(ids), BATCH_SIZE, seed=7)
        host_sampler = PatchBatchSampler(ids, BATCH_SIZE, seed=7, device="numpy")
        for ours, theirs in zip(host_sampler.batches(3), device_sampler.batches(3), strict=True):
            assert (ours.patch_id, ours.valid) == (theirs.patch_id, theirs.valid)
            assert ours.indices.tolist() == library.host(theirs.indices).tolist()
        host_sampler.set_epoch(3)
        device_sampler.set_epoch(3)
        assert list(host_sampler) == list(device_sampler)

    def test_budgets_make_the_same_batches_on_every_library(self, library):
        lengths = sizes_of("vowels")
        speakers = load("vowels")["speaker"].astype(np.int64)
        budget = CostBudget(256, sample_costs=lengths)
        device_sampler = PatchBatchSampler(library.array(speakers), budget, seed=7)
        host_sampler = PatchBatchSampler(speakers, budget, seed=7)
        assert lists(host_sampler.batches(2)) == [
            library.host(batch.indices).tolist() for batch in device_sampler.batches(2)
        ]


class TestBudgets:
    @pytest.mark.parametrize("patch_kind", ["all", "speaker", "speaker and length"])
    @pytest.mark.parametrize("budget", [29, 100, 256, 2000])
    def test_padded_utterances_are_never_over(self, patch_kind, budget):
        lengths = sizes_of("vowels")
        speaker = load("vowels")["speaker"].astype(np.int64)
        patches = {"all": np.zeros_like(lengths), "speaker": speaker}
        ids = patches.get(patch_kind, speaker * 100 + lengths)
        sampler = PatchBatchSampler(ids, CostBudget(budget, sample_costs=lengths), seed=3)
        for epoch in range(2):
            batches = list(sampler.batches(epoch))
            assert max(b.valid * lengths[b.indices].max() for b in batches) <= budget
            assert all((ids[batch.indices] == batch.patch_id).all() for batch in batches)
            assert (seen(ids.size, lists(batches)) == 1).all()

    def test_an_utterance_over_the_budget_is_named_or_left_out(self):
        lengths = sizes_of("vowels")
        with pytest.raises(ValueError, match="29"):
            PatchBatchSampler(lengths, CostBudget(28, sample_costs=lengths))
        skipping = CostBudget(28, sample_costs=lengths, over_budget="skip")
        with pytest.warns(UserWarning, match="leaves out 1 sample"):
            sampler = PatchBatchSampler(lengths, skipping, seed=0)
        assert sampler.coverage().missed.sum() == 1
        assert seen(640, list(sampler))[lengths == 29].tolist() == [0]

    @pytest.mark.parametrize("power", [1, 2, 3])
    @pytest.mark.parametrize("settings", [{}, {"power_of_two": True}, {"max_batch_size": 6}])
    def test_pairs_and_triples_of_atoms_are_never_over(self, power, settings):
        atoms = sizes_of("molecules")
        max_cost = 4 * 14**power
        budget = CostBudget(max_cost, cost=lambda size: size**power, **settings)
        sampler = PatchBatchSampler(atoms, budget, seed=3)
        sizes = sampler.plan.sizes_by_patch
        _, counts = np.unique(atoms, return_counts=True)
        for size, count, batch_size in zip(range(1, 15), counts, sizes, strict=True):
            assert batch_size * size**power <= max_cost
            if not settings:
                # The largest size within the budget, as far as there are molecules.
                assert batch_size == min(max_cost // size**power, count)
        assert max(b.valid * b.patch_id**power for b in sampler.batches(0)) <= max_cost
        assert sampler.coverage().exact

    def test_a_budget_uses_more_of_its_peak_than_a_number(self):
        atoms = sizes_of("molecules")

        def used(batch_size) -> float:
            batches = list(PatchBatchSampler(atoms, batch_size, seed=0).batches(0))
            pairs = [batch.valid * batch.patch_id**2 for batch in batches]
            return float(np.mean(pairs)) / max(pairs)

        assert used(CostBudget(784, cost=lambda size: size**2)) > 1.5 * used(BATCH_SIZE)


class TestRareSizes:
    """G2 has two molecules of 14 atoms, and 10 of 14 sizes have fewer than 16."""

    def test_kept_they_are_short_batches(self):
        atoms = sizes_of("molecules")
        sampler = PatchBatchSampler(atoms, BATCH_SIZE, seed=0)
        batches = {b.patch_id: b.valid for b in sampler.batches(0) if b.valid < BATCH_SIZE}
        assert batches[14] == 2
        assert len(batches) == 13  # of all sizes but that of 16 molecules

    def test_dropped_they_are_warned_of_and_counted(self):
        atoms = sizes_of("molecules")
        with pytest.warns(UserWarning, match=r"leaves out 10 of 14 patches \(80 samples\)"):
            sampler = PatchBatchSampler(atoms, BATCH_SIZE, seed=0, partial="drop")
        coverage = sampler.coverage(0)
        assert len(sampler) == 4
        assert coverage.missed.sum() == 162 - 64
        handed_out = seen(162, list(sampler))
        assert [handed_out[atoms == row["patch_id"]].sum() for row in coverage] == [
            row["seen_once"] for row in coverage
        ]

    def test_padded_they_are_filled_up_with_their_own(self):
        atoms = sizes_of("molecules")
        sampler = quiet(atoms, BATCH_SIZE, seed=0, partial="pad")
        for batch in sampler.batches(0):
            assert len(batch.indices) == BATCH_SIZE
            assert (atoms[batch.indices] == batch.patch_id).all()
        largest = next(b for b in sampler.batches(0) if b.patch_id == 14)
        assert largest.valid == 2
        assert np.unique(largest.indices, return_counts=True)[1].tolist() == [8, 8]
        valid = [b.indices[: b.valid].tolist() for b in sampler.batches(0)]
        assert (seen(162, valid) == 1).all()


class TestSeries:
    @pytest.fixture
    def storm(self):
        return ids_of("storms")

    def test_a_batch_of_the_longest_size_is_a_whole_series_in_order_of_time(self, storm):
        counts = np.bincount(storm)
        time = load("storms")["time"]
        sampler = PatchBatchSampler(storm, int(counts.max()), shuffle_within_batches=False, seed=0)
        order = []
        for batch in sampler.batches(0):
            assert batch.indices.tolist() == np.flatnonzero(storm == batch.patch_id).tolist()
            assert (np.diff(time[batch.indices]).astype(int) >= 0).all()
            order.append(batch.patch_id)
        assert sorted(order) == list(range(512))
        assert order != sorted(order)

    def test_rows_in_any_order_are_the_same_series(self, storm):
        """As from a database without an order: samples are rows wherever they lie."""
        mixed = np.random.default_rng(0).permutation(storm.size)
        sampler = PatchBatchSampler(storm[mixed], 8, seed=0)
        assert not sampler.plan.groups.is_contiguous
        batches = list(sampler.batches(0))
        assert (seen(storm.size, lists(batches)) == 1).all()
        assert all((storm[mixed][b.indices] == b.patch_id).all() for b in batches)

    def test_even_batches_of_a_series_have_no_tiny_rest(self, storm):
        counts = np.bincount(storm)
        even = PatchBatchSampler(storm, 8, seed=0, partial="even")
        plain = PatchBatchSampler(storm, 8, seed=0)
        assert len(even) == len(plain)
        assert even.coverage().exact

        def tiny(sampler) -> int:
            return sum(b.valid < 4 <= counts[b.patch_id] for b in sampler.batches(0))

        assert tiny(even) == 0 < tiny(plain)

    @pytest.mark.parametrize("temperature", [2, 5, float("inf")])
    def test_weights_share_the_batches_out(self, storm, temperature):
        sampler = PatchBatchSampler(storm, 8, seed=0, weights=Temperature(temperature))
        own_batches = sampler.plan.own_batches_by_patch
        share = own_batches ** (1 / temperature)
        ideal = len(sampler) * share / share.sum()
        shares = sampler.coverage(0).batches
        assert np.abs(shares - ideal).max() < 1
        of_each = np.bincount([b.patch_id for b in sampler.batches(0)], minlength=512)
        assert (of_each == shares).all()

    def test_a_long_series_comes_round_exactly_and_a_short_one_many_times(self, storm):
        sampler = PatchBatchSampler(storm, 8, seed=0, weights=Temperature(float("inf")))
        own_batches, slots = sampler.plan.own_batches_by_patch, sampler.coverage(0).batches
        longest, shortest = int(own_batches.argmax()), int(np.bincount(storm).argmin())
        epochs = int(np.lcm(own_batches[longest], slots[longest]) // slots[longest])
        rows = [b.indices for epoch in range(epochs) for b in sampler.batches(epoch)]
        times = seen(storm.size, rows)
        assert len(set(times[storm == longest].tolist())) == 1
        assert (times[storm == shortest] == epochs * slots[shortest]).all()

    def test_series_that_are_held_out_are_whole(self, storm):
        train, test = PatchGroups.from_ids(storm).split([0.8, 0.2], by="patch", seed=0)
        samples = [
            np.concatenate([b.indices for b in PatchBatchSampler.for_evaluation(p, 8).batches()])
            for p in (train, test)
        ]
        assert not set(storm[samples[0]].tolist()) & set(storm[samples[1]].tolist())
        assert sorted(np.concatenate(samples).tolist()) == list(range(storm.size))

    def test_names_are_ids(self, storm):
        names = load("storms")["name"]
        sampler = PatchBatchSampler(names[storm], 8, seed=0)
        for batch in sampler.batches(0):
            assert isinstance(batch.patch_id, str)
            assert (names[storm[batch.indices]] == batch.patch_id).all()
        weights = {name: 1 + (name == "Wilma 2005") for name in names.tolist()}
        twice = PatchBatchSampler(names[storm], 8, seed=0, weights=weights, epoch_batches=5130)
        shares = {row["patch_id"]: row["batches"] for row in twice.coverage(0)}
        assert (shares["Wilma 2005"], shares["Amy 1975"]) == (20, 10)


class TestRanksAndStates:
    @pytest.mark.parametrize("ranks", [2, 3, 8])
    def test_ranks_share_an_epoch(self, ids, ranks):
        world = [
            PatchBatchSampler(ids, BATCH_SIZE, seed=5, num_replicas=ranks, rank=rank)
            for rank in range(ranks)
        ]
        alone = lists(PatchBatchSampler(ids, BATCH_SIZE, seed=5).batches(0))
        steps = zip(*(lists(rank.batches(0)) for rank in world), strict=True)
        together = [batch for step in steps for batch in step]
        assert together[: len(alone)] == alone
        assert together[len(alone) :] == alone[: -len(alone) % ranks]

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_evaluation_counts_every_sample_once(self, ids, ranks):
        total = np.zeros(ids.size, int)
        for rank in range(ranks):
            sampler = PatchBatchSampler.for_evaluation(
                ids, BATCH_SIZE, num_replicas=ranks, rank=rank
            )
            for batch in sampler.batches():
                total[batch.indices[: batch.valid]] += 1
        assert (total == 1).all()

    def test_a_run_that_stops_in_mid_epoch_goes_on(self, ids):
        uninterrupted = PatchBatchSampler(ids, BATCH_SIZE, seed=5)
        expected = [batch for _ in range(3) for batch in uninterrupted]
        sampler = PatchBatchSampler(ids, BATCH_SIZE, seed=5)
        batches_before = list(sampler)
        batches = iter(sampler)
        batches_before += [next(batches) for _ in range(len(sampler) // 3)]
        state = json.loads(json.dumps(sampler.state_dict()))
        resumed = PatchBatchSampler(ids, BATCH_SIZE, seed=5)
        resumed.load_state_dict(state)
        assert batches_before + list(resumed) + list(resumed) == expected

    def test_a_state_goes_on_with_other_ranks_budget_and_weights(self):
        storm = ids_of("storms")

        def sampler(ranks, rank):
            return PatchBatchSampler(
                storm,
                8,
                seed=5,
                partial="even",
                weights=Temperature(2),
                num_replicas=ranks,
                rank=rank,
            )

        expected = lists(sampler(1, 0).batches(0))
        four = [sampler(4, rank) for rank in range(4)]
        iterators = [iter(rank) for rank in four]
        batches_before = [next(iterator) for _ in range(100) for iterator in iterators]
        three = [sampler(3, rank) for rank in range(3)]
        for rank in three:
            rank.load_state_dict(four[0].state_dict())
        batches_after = [batch for step in zip(*three, strict=True) for batch in step]
        assert (batches_before + batches_after)[: len(expected)] == expected

    def test_a_state_of_other_data_is_refused(self):
        state = PatchBatchSampler(ids_of("vowels"), BATCH_SIZE, seed=5).state_dict()
        other = PatchBatchSampler(ids_of("vowels")[::-1].copy(), BATCH_SIZE, seed=5)
        with pytest.raises(ValueError, match="ids"):
            other.load_state_dict(state)

    def test_balanced_steps_wait_less_for_molecules_of_many_pairs(self):
        atoms = sizes_of("molecules")

        def waited(steps: str, **settings) -> float:
            """What the dearest batches of all steps cost, beside an even share of everything."""
            sampler = PatchBatchSampler(atoms, 4, seed=0, steps=steps, **settings)
            took = []
            for epoch in range(10):
                pairs = [b.valid * b.patch_id**2 for b in sampler.batches(epoch)]
                took.append(sum(max(pairs[i : i + 4]) for i in range(0, len(pairs), 4)))
            return float(np.mean(took)) * 4 / float((atoms**2).sum())

        balanced = waited("balanced", step_width=4, patch_costs=lambda size: size**2)
        assert balanced < 1.3 < waited("free") / 1.3
