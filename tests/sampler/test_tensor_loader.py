"""PatchTensorLoader: the sampler's batches, as rows of tensors, wherever these are."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
from itertools import chain

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.utils.data import DataLoader, TensorDataset

from gpusampler import PatchBatchSampler, PatchGroups, PatchTensorLoader
from gpusampler.batching.tables import PatchTables
from gpusampler.core import arrays, devices
from gpusampler.core.devices import Device
from gpusampler.sampler import batches as batches_module
from gpusampler.sampler import tensor_loader
from gpusampler.sampler.batches import BlockReader
from gpusampler.sampler.tensor_loader import ChunkReader, TensorReader, working_device
from support.fake_streams import LateSideStream, entries_named, late_side_streams
from support.libraries import make_library
from support.strategies import IDS, draw, make, quiet, through_json
from support.strategies import rows_of as rows_of_block

N = IDS.size
# A device that torch works on and that no tensor says it is on: "cpu" without an index.
ELSEWHERE = Device("torch", "cpu:0")

SETTINGS = [
    {},
    {"partial": "pad"},
    {"partial": "drop"},
    {"interleave": False},
    {"partial": "pad", "interleave": False, "batch_size": 9},
    {"shuffle_within_batches": False, "shuffle_patches": False, "batch_size": 1},
    {"batch_size": 60},
    {"num_replicas": 3, "rank": 2},
    {"num_replicas": 5, "rank": 4, "uneven": "drop", "partial": "pad"},
    {"num_replicas": 100, "rank": 71, "batch_size": 9},
]


def rows_of(tensor, indices):
    """Rows by the libraries' own indexing, on the host."""
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().cpu()[torch.from_numpy(indices)]
    return torch.from_numpy(np.ascontiguousarray(np.asarray(tensor)[indices]))


def bits(array) -> bytes:
    array = torch.as_tensor(array).detach().cpu()
    return array.resolve_conj().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check_rows(actual, tensor, indices):
    """Hold rows of a batch against a tensor: shape, dtype and every bit."""
    expected = rows_of(tensor, indices)
    assert tuple(actual.shape) == tuple(expected.shape) == (indices.size, *tensor.shape[1:])
    actual = torch.as_tensor(actual)
    assert actual.dtype == expected.dtype
    if expected.numel():
        assert bits(actual) == bits(expected)


def check_epoch(actual, sampler, epoch, tensors):
    """Hold batches of a loader against those of its sampler."""
    expected = list(sampler.batches(epoch))
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert list(a) == [*tensors, "patch_id", "valid"]
        assert (a["patch_id"], a["valid"]) == (b.patch_id, b.valid)
        assert type(a["patch_id"]) is type(a["valid"]) is int
        indices = np.asarray(arrays.to_numpy(b.indices))
        for name, tensor in tensors.items():
            check_rows(a[name], tensor, indices)


def some_tensors(rng=0):
    """Tensors of torch and NumPy, of many shapes; `row` says which sample a row is of."""
    rng = np.random.default_rng(rng)
    return {
        "x": torch.from_numpy(rng.random((N, 8), np.float32)),
        "row": torch.arange(N),
        "z": rng.random((N, 2, 3)),
        "row_too": np.arange(N),
    }


def host_tensors():
    """Tensors of NumPy, which travel where torch's "cpu" counts as a device elsewhere."""
    rng = np.random.default_rng(0)
    return {"x": rng.random((N, 8), np.float32), "row": np.arange(N), "z": rng.random((N, 2, 3))}


def row_numbers(batches, name="row") -> list[list[int]]:
    return [batch[name].tolist() for batch in batches]


def epoch_of(sampler, epoch) -> list[list[int]]:
    return [batch.indices.tolist() for batch in sampler.batches(epoch)]


def staged(sampler, tensors, side, device=ELSEWHERE):
    """An iterator over batches on a device elsewhere."""

    def begin(shard):
        plan = shard.plan.on(working_device(tensors, device))
        return TensorReader(shard._replace(plan=plan), tensors, device, stream=side)

    return sampler._iterate(begin)


@pytest.fixture(params=["numpy", "torch"])
def side(request):
    """A side stream that copies late."""
    side = LateSideStream(request.param)
    yield side
    side.check()


@pytest.fixture
def sides(monkeypatch, cpu_as_device):
    """The side streams that are made, each a `LateSideStream`."""
    with late_side_streams(monkeypatch, tensor_loader) as made:
        yield made


@pytest.fixture
def gathers(monkeypatch):
    """The sizes of all gathers from here on."""
    sizes = []
    original = arrays.take_rows

    def take(array, index):
        sizes.append(int(index.shape[0]))
        return original(array, index)

    monkeypatch.setattr(arrays, "take_rows", take)
    return sizes


class TestInPlace:
    """Tensors that are where the batches are."""

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_batches_are_the_rows_of_the_samplers_batches(self, settings):
        tensors = some_tensors()
        sampler = quiet(IDS, **{"seed": 1, "batch_size": 4, **settings})
        loaded = PatchTensorLoader(sampler, **tensors)
        for epoch in (0, 1, 7):
            loaded.set_epoch(epoch)
            actual = list(loaded)
            check_epoch(actual, sampler, epoch, tensors)
            assert len(loaded) == len(actual)

    def test_every_row_is_of_the_batchs_patch_and_comes_once(self):
        loaded = PatchTensorLoader(make(), patch=IDS, row=torch.arange(N))
        batches = list(loaded)
        for batch in batches:
            assert set(batch["patch"].tolist()) == {batch["patch_id"]}
            assert batch["valid"] == len(batch["row"])
        assert sorted(chain.from_iterable(row_numbers(batches))) == list(range(N))

    @pytest.mark.parametrize("batch_size", [4, 60])
    def test_a_batch_may_be_changed_in_place_by_what_has_a_gradient(self, batch_size):
        scale = torch.ones(1, requires_grad=True)
        for batch in PatchTensorLoader(quiet(IDS, batch_size), x=torch.ones(N, 1)):
            batch["x"].mul_(scale).sum().backward()
        assert scale.grad.item() == N

    def test_padded_batches_have_one_shape_and_say_what_counts(self):
        sampler = quiet(IDS, 8, seed=1, partial="pad")
        loaded = PatchTensorLoader(sampler, row=np.arange(N))
        batches = list(loaded)
        assert {batch["row"].shape for batch in batches} == {(8,)}
        counted = [row for batch in batches for row in batch["row"][: batch["valid"]].tolist()]
        assert sorted(counted) == list(range(N))
        assert {batch["valid"] for batch in batches} == {2, 3, 6, 7, 8}

    def test_on_every_library(self, library):
        rng = np.random.default_rng(0)
        values = {"x": rng.random((N, 3)), "y": rng.integers(0, 9, N), "z": rng.random((N, 2, 2))}
        tensors = {name: library.array(value) for name, value in values.items()}
        # Wherever the sampler is, the tensors decide.
        for sampler in (make(), PatchBatchSampler(library.array(IDS), 4, seed=1)):
            loaded = PatchTensorLoader(sampler, **tensors)
            assert loaded.device.library == (
                "numpy" if library.name == "torch" else (library.name.removesuffix("-cuda"))
            )
            for epoch in range(2):
                actual = [
                    {name: library.host(batch[name]) for name in values}
                    | {"patch_id": batch["patch_id"], "valid": batch["valid"]}
                    for batch in loaded
                ]
                check_epoch(actual, make(), epoch, values)

    @pytest.mark.parametrize(
        "dtype", ["bool", "uint8", "float16", "bfloat16", "float64", "int64", "complex64"]
    )
    @pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,), (2, 0, 3)])
    def test_torch_of_any_dtype_and_shape(self, dtype, shape):
        tensor = (torch.rand(N, *shape) * 100).to(getattr(torch, dtype))
        loaded = PatchTensorLoader(make(), x=tensor, again=tensor)
        actual = list(loaded)
        check_epoch(actual, make(), 0, {"x": tensor, "again": tensor})
        assert type(actual[0]["x"]) is torch.Tensor

    @pytest.mark.parametrize("dtype", ["bool", "uint16", "float16", "float64", "complex64", ">i4"])
    @pytest.mark.parametrize("shape", [(), (1,), (3, 2), (0,), (2, 0, 3)])
    def test_numpy_of_any_dtype_and_shape(self, dtype, shape):
        tensor = (np.random.default_rng(0).random((N, *shape)) * 100).astype(dtype)
        actual = list(PatchTensorLoader(make(), x=tensor))
        assert {batch["x"].dtype for batch in actual} == {tensor.dtype}
        for batch, indices in zip(actual, epoch_of(make(), 0), strict=True):
            assert type(batch["x"]) is np.ndarray
            np.testing.assert_array_equal(batch["x"], tensor[indices])

    def test_numpy_objects_too(self):
        names = np.array([f"sample {i}" for i in range(N)], object)
        actual = row_numbers(PatchTensorLoader(make(), row=names))
        assert actual == [[f"sample {i}" for i in batch] for batch in epoch_of(make(), 0)]

    def test_tensors_whose_rows_do_not_lie_side_by_side(self):
        wide = torch.arange(N * 6).reshape(6, N)
        numbers = np.arange(N * 6).reshape(6, N)
        tensors = {
            "transposed": wide.T,
            "strided": torch.arange(3 * N)[::3],
            "expanded": torch.arange(N)[:, None].expand(N, 4),
            "conjugated": (torch.arange(N) * 1j).to(torch.complex64).conj(),
            "columns": numbers.T,
            "backwards": np.arange(N)[::-1],
            "broadcast": np.broadcast_to(np.arange(N)[:, None], (N, 4)),
        }
        actual = list(PatchTensorLoader(make(), **tensors))
        check_epoch(actual, make(), 0, tensors)

    def test_a_memory_map_that_may_only_be_read(self, tmp_path):
        values = np.random.default_rng(0).random((N, 5), np.float32)
        path = tmp_path / "x.npy"
        np.save(path, values)
        mapped = np.load(path, mmap_mode="r")
        assert type(mapped) is np.memmap
        assert not mapped.flags.writeable
        actual = list(PatchTensorLoader(make(), x=mapped))
        check_epoch(actual, make(), 0, {"x": values})
        assert {type(batch["x"]) for batch in actual} == {np.ndarray}
        actual[0]["x"][:] = 0

    def test_no_gradient_flows_through_a_batch(self):
        x = torch.rand(N, 2, requires_grad=True)
        actual = list(PatchTensorLoader(make(), x=x))
        check_epoch(actual, make(), 0, {"x": x})
        weight = torch.ones(2, requires_grad=True)
        for batch in actual:
            # Batches come from one gather; each can have a graph of its own nevertheless.
            assert not batch["x"].requires_grad
            (batch["x"] * weight).sum().backward()
        assert x.grad is None
        torch.testing.assert_close(weight.grad, x.detach().sum(0))

    def test_tensors_are_neither_copied_nor_changed(self):
        x, y = torch.arange(N), np.arange(N)
        loaded = PatchTensorLoader(make(), x=x, y=y)
        x += 1000
        y += 2000
        batch = next(iter(loaded))
        indices = np.array(epoch_of(make(), 0)[0])
        assert batch["x"].tolist() == (indices + 1000).tolist()
        assert batch["y"].tolist() == (indices + 2000).tolist()
        batch["x"][:] = batch["y"][:] = -1
        assert int(x.min()) == 1000
        assert int(y.min()) == 2000

    @pytest.mark.parametrize("part", ["select", "split"])
    def test_parts_of_the_groups_index_the_whole_tensors(self, part):
        groups = PatchGroups.from_ids(IDS)
        if part == "select":
            parts = [groups.select(np.flatnonzero(np.arange(N) % 3))]
        else:
            parts = list(groups.split([0.5, 0.5], seed=0))
        tensors = some_tensors()
        for chosen in parts:
            sampler = PatchBatchSampler(chosen, 4, seed=1)
            actual = list(PatchTensorLoader(sampler, **tensors))
            check_epoch(actual, sampler, 0, tensors)
            assert sum(len(batch["row"]) for batch in actual) == chosen.num_samples < N
            assert {int(IDS[row]) for batch in actual for row in batch["row"]} == set(
                chosen.patch_ids.tolist()
            )
        with pytest.raises(ValueError, match=f"x must have a row for each of {N} samples"):
            PatchTensorLoader(sampler, x=torch.zeros(parts[0].num_samples))


class TestParts:
    """Rows are gathered a part at a time, and nobody can tell where the parts end."""

    @pytest.mark.parametrize("budget", [1, 100, 1000, 4000, 1 << 40])
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_parts_of_any_size_hand_out_the_same(self, monkeypatch, gathers, settings, budget):
        monkeypatch.setattr(tensor_loader, "HOST_GATHER_BYTES", budget)
        tensors = some_tensors()
        sampler = quiet(IDS, **{"seed": 1, "batch_size": 4, **settings})
        actual = list(PatchTensorLoader(sampler, **tensors))
        check_epoch(actual, sampler, 0, tensors)
        row_bytes = 8 * 4 + 8 + 6 * 8 + 8
        largest = max(len(batch["row"]) for batch in actual)
        assert max(gathers) <= max(largest, budget // row_bytes)
        if budget == 1:
            assert gathers == [len(batch["row"]) for batch in actual for _ in tensors]

    @pytest.mark.parametrize("max_rows", [1, 7, 50, 1000])
    def test_parts_are_blocks_of_their_own(self, max_rows):
        shard = make()._tracker.pending_shard()
        parts = ChunkReader(BlockReader(shard), max_rows, 1000)
        actual = []
        while (part := parts.read()) is not None:
            assert part.samples.size == part.sizes.sum()
            assert part.samples.size <= max_rows or part.sizes.size == 1
            actual += rows_of_block(part)
        assert actual == epoch_of(make(), 0)
        assert parts.read() is None

    def test_parts_are_as_large_as_they_may_be(self, monkeypatch, gathers):
        # 20 rows of 8 bytes: five batches of 4, and not six.
        monkeypatch.setattr(tensor_loader, "HOST_GATHER_BYTES", 20 * 8 + 7)
        sampler = PatchBatchSampler(PatchGroups.from_counts([400]), 4, seed=1)
        actual = list(PatchTensorLoader(sampler, row=np.arange(400)))
        assert row_numbers(actual) == epoch_of(sampler, 0)
        # Indices are evaluated for 10, 70 and 20 batches.
        assert gathers == [20] * 20

    def test_rows_above_the_budget_are_gathered_a_batch_at_a_time(self, gathers):
        long = tensor_loader.HOST_GATHER_BYTES // 4 + 1
        # All columns are one: no memory of that size.
        x = torch.arange(N, dtype=torch.float32)[:, None].expand(N, long)
        loaded = PatchTensorLoader(make(), x=x)
        for batch, indices in zip(loaded, epoch_of(make(), 0), strict=True):
            assert batch["x"].shape == (len(indices), long)
            assert batch["x"][:, 0].tolist() == indices
            assert batch["x"][:, -1].tolist() == indices
            assert gathers == [len(indices)]
            gathers.clear()

    def test_many_small_rows_are_gathered_in_few_calls(self, gathers):
        ids = np.random.default_rng(0).integers(0, 50, 100_000)
        sampler = PatchBatchSampler(ids, 16, seed=0)
        flags = torch.from_numpy(np.random.default_rng(1).random(ids.size) < 0.5)
        loaded = PatchTensorLoader(sampler, flag=flags, patch=ids.astype(np.uint8))
        actual = list(loaded)
        # Of two tensors. A batch is a dictionary and two views.
        largest_part = batches_module.MAX_OBJECTS_AT_ONCE // 3
        num_blocks = 6
        assert len(gathers) <= 2 * (len(actual) // largest_part + num_blocks)
        check_epoch(actual, sampler, 0, {"flag": flags, "patch": ids.astype(np.uint8)})

    def test_the_first_batch_asks_for_no_more_than_it_must(self, gathers):
        next(iter(PatchTensorLoader(make(), row=np.arange(N))))
        # As many as are looked up at first.
        assert gathers == [sum(map(len, epoch_of(make(), 0)[: batches_module.FIRST_LOCATED_SLOTS]))]


class TestEpochsAndState:
    def test_epochs_follow_one_another(self):
        loaded = PatchTensorLoader(make(), row=np.arange(N))
        for epoch in range(4):
            assert row_numbers(loaded) == epoch_of(make(), epoch)

    def test_set_epoch(self):
        loaded = PatchTensorLoader(make(), row=np.arange(N))
        for epoch in (3, 3, 0, 2**63 - 1):
            loaded.set_epoch(epoch)
            assert row_numbers(loaded) == epoch_of(make(), epoch)
        with pytest.raises(ValueError, match="epoch must be >= 0, got -1"):
            loaded.set_epoch(-1)

    def test_ranks_share_the_epoch_out(self):
        tensors = some_tensors()
        parts = [
            row_numbers(PatchTensorLoader(make(num_replicas=3, rank=rank), **tensors))
            for rank in range(3)
        ]
        drawn = [batch for step in zip(*parts, strict=True) for batch in step]
        assert drawn[: len(make())] == epoch_of(make(), 0)

    def test_length_counts_down(self):
        loaded = PatchTensorLoader(make(), row=np.arange(N))
        assert len(loaded) == len(make()) == 24
        iterator = iter(loaded)
        for left in reversed(range(24)):
            assert len(iterator) == left + 1
            next(iterator)
        assert len(iterator) == 0
        assert next(iterator, None) is None
        assert next(iterator, None) is None
        assert len(loaded) == 24

    def test_an_epoch_is_bound_by_the_first_batch(self):
        loaded = PatchTensorLoader(make(), row=np.arange(N))
        unused, used = iter(loaded), iter(loaded)
        assert loaded.batch_sampler.epoch == 0
        next(used)
        assert loaded.batch_sampler.epoch == 1
        assert row_numbers(unused) == epoch_of(make(), 1)

    def test_iterators_beside_one_another(self):
        loaded = PatchTensorLoader(make(), row=np.arange(N))
        pairs = list(zip(loaded, loaded, strict=True))
        assert row_numbers(first for first, _ in pairs) == epoch_of(make(), 0)
        assert row_numbers(second for _, second in pairs) == epoch_of(make(), 1)

    @pytest.mark.parametrize("budget", [1, 300, 1 << 20])
    @pytest.mark.parametrize("count", [0, 1, 8, 9, 17, 23, 24])
    def test_going_on_anywhere_equals_never_having_stopped(self, monkeypatch, count, budget):
        monkeypatch.setattr(tensor_loader, "HOST_GATHER_BYTES", budget)
        tensors = some_tensors()
        loaded = PatchTensorLoader(make(), **tensors)
        loaded.set_epoch(2)
        iterator = iter(loaded)
        drawn = row_numbers(draw(iterator, count))
        state = through_json(loaded.state_dict())
        assert (state["epoch"], state["slot"]) == (2, count)
        assert state == iterator.state_dict()
        sampler = make()
        sampler.set_epoch(2)
        draw(iter(sampler), count)
        assert state == sampler.state_dict()
        remaining = epoch_of(make(), 2)[count:]
        assert drawn + remaining == epoch_of(make(), 2)
        resumed = PatchTensorLoader(make(), **tensors)
        for _ in range(2):
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            assert row_numbers(resumed) == (remaining or epoch_of(make(), 3))
        assert row_numbers(resumed) == epoch_of(make(), 3 if remaining else 4)
        # An iterator's own, in the middle of something else.
        other = iter(PatchTensorLoader(make(), **tensors))
        next(other)
        other.load_state_dict(state)
        assert len(other) == len(remaining)
        assert other.state_dict() == state
        assert row_numbers(other) == remaining

    def test_states_of_passes_beside_one_another(self):
        loaded = PatchTensorLoader(make(), row=np.arange(N))
        first, second = iter(loaded), iter(loaded)
        draw(first, 3)
        draw(second, 5)
        slots = [(it.state_dict()["epoch"], it.state_dict()["slot"]) for it in (first, second)]
        assert slots == [(0, 3), (1, 5)]
        assert loaded.state_dict(step=5) == second.state_dict()
        draw(first, 21)
        assert loaded.state_dict() == second.state_dict()

    @pytest.mark.parametrize("count", [0, 5, 24])
    def test_states_go_to_a_sampler_in_a_dataloader_and_back(self, count):
        row = torch.arange(N)

        def in_dataloader(sampler):
            return DataLoader(TensorDataset(row), batch_sampler=sampler)

        loaded = PatchTensorLoader(make(), row=row)
        drawn = row_numbers(draw(iter(loaded), count))
        assert drawn == epoch_of(make(), 0)[:count]
        sampler = make()
        sampler.load_state_dict(loaded.state_dict())
        remaining = [batch.tolist() for (batch,) in in_dataloader(sampler)]
        assert remaining == (epoch_of(make(), 0)[count:] or epoch_of(make(), 1))
        # And back: another pass of the DataLoader, left somewhere.
        begun = iter(in_dataloader(sampler))
        draw(begun, 7)
        epoch = sampler.state_dict()["epoch"]
        back = PatchTensorLoader(make(), row=row)
        back.load_state_dict(sampler.state_dict())
        assert row_numbers(back) == epoch_of(make(), epoch)[7:]

    def test_states_of_other_ids_are_refused(self):
        loaded = PatchTensorLoader(make(), row=np.arange(N))
        with pytest.raises(ValueError, match="Cannot load state: batch_size is 5"):
            loaded.load_state_dict(make(batch_size=5).state_dict())

    def test_the_seed_of_a_state_is_taken_over(self):
        state = PatchBatchSampler(IDS, 4, seed=77).state_dict()
        loaded = PatchTensorLoader(PatchBatchSampler(IDS, 4), row=np.arange(N))
        list(loaded)
        loaded.load_state_dict(state)
        assert row_numbers(loaded) == epoch_of(PatchBatchSampler(IDS, 4, seed=77), 0)

    def test_a_loader_travels(self):
        loaded = PatchTensorLoader(make(), row=torch.arange(N))
        draw(iter(loaded), 3)
        other = pickle.loads(pickle.dumps(loaded))
        assert row_numbers(other) == epoch_of(make(), 1)
        assert repr(other).startswith(f"PatchTensorLoader(row=({N},), device='numpy', PatchBatch")


class TestTravelling:
    """Tensors on the host, batches elsewhere."""

    @pytest.mark.parametrize("budget", [1, 700, 1 << 25])
    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_rows_are_right_however_late_they_arrive(self, sides, monkeypatch, settings, budget):
        monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", budget)
        tensors = host_tensors()
        sampler = quiet(IDS, device="numpy", **{"seed": 1, "batch_size": 4, **settings})
        loaded = PatchTensorLoader(sampler, device="cpu", **tensors)
        assert loaded.device == Device("torch", "cpu")
        for epoch in (0, 1):
            loaded.set_epoch(epoch)
            # All are kept until they are compared.
            actual = list(loaded)
            assert {type(batch["x"]) for batch in actual} == {torch.Tensor}
            check_epoch(actual, sampler, epoch, tensors)
        assert len(sides) == 2
        if budget == 1:
            copies = entries_named(sides[0].log, "to_device")
            assert len(copies) == len(tensors) * len(sampler)

    def test_exactly_one_part_is_on_its_way_beyond_that_in_use(self, side, monkeypatch):
        # 14 batches of 4, two to a part.
        monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", 8 * 8)
        sampler = PatchBatchSampler(PatchGroups.from_counts([56]), 4, seed=1)
        iterator = staged(sampler, {"row": np.arange(56)}, side)
        assert side.log == []
        expected = [("pinned", 8), ("to_device", 0)]
        for part in range(7):
            if part == 0:
                expected += [("pinned", 8)]
            elif part < 6:
                # The set of buffers of the part before is filled again, once it has left them.
                expected += [("synchronize", part - 1)]
            if part < 6:
                expected += [("to_device", part + 1)]
            expected += [("wait_for", part)]
            for place in range(2):
                batch = next(iterator)
                assert side.log == expected
                assert batch["row"].tolist() == epoch_of(sampler, 0)[2 * part + place]
        assert next(iterator, None) is None
        assert side.log == expected

    def test_two_sets_of_buffers_serve_an_epoch(self, side, monkeypatch):
        monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", 300)
        tensors = host_tensors()
        sampler = make(partial="pad")
        actual = list(staged(sampler, tensors, side))
        check_epoch(actual, make(partial="pad"), 0, tensors)
        assert len(entries_named(side.log, "to_device")) > 20
        sizes = sorted(size for _, size in entries_named(side.log, "pinned"))
        assert sizes == [4, 4, 4 * 6, 4 * 6, 4 * 8, 4 * 8]

    def test_buffers_grow_with_the_parts(self, side):
        ids = np.random.default_rng(0).integers(0, 40, 30_000)
        sampler = PatchBatchSampler(ids, 16, seed=3)
        tensors = {"row": np.arange(ids.size), "x": np.random.default_rng(1).random((ids.size, 2))}
        for epoch in range(2):
            actual = list(staged(sampler, tensors, side))
            check_epoch(actual, sampler, epoch, tensors)
        assert len({size for _, size in entries_named(side.log, "pinned")}) > 4

    @pytest.mark.parametrize("dtype", ["bool", "float16", "int64", "complex64", ">f4"])
    @pytest.mark.parametrize("shape", [(), (3, 2), (0,), (2, 0, 3)])
    def test_numpy_of_any_dtype_and_shape(self, side, dtype, shape):
        tensor = (np.random.default_rng(0).random((N, *shape)) * 100).astype(dtype)
        actual = list(staged(make(), {"x": tensor, "row": np.arange(N)}, side))
        native = tensor.astype(tensor.dtype.newbyteorder("="))
        check_epoch(actual, make(), 0, {"x": native, "row": np.arange(N)})

    @pytest.mark.parametrize("dtype", ["bool", "float16", "bfloat16", "int64", "complex64"])
    @pytest.mark.parametrize("shape", [(), (3, 2), (0,), (2, 0, 3)])
    # NumPy's pinned memory has no bfloat16, and neither has CuPy.
    @pytest.mark.parametrize("side", ["torch"], indirect=True)
    def test_torch_of_any_dtype_and_shape(self, side, dtype, shape):
        tensor = (torch.rand(N, *shape) * 100).to(getattr(torch, dtype))
        tensors = {"x": tensor, "row": torch.arange(N)}
        check_epoch(list(staged(make(), tensors, side)), make(), 0, tensors)

    def test_rows_that_do_not_lie_side_by_side(self, side, tmp_path):
        np.save(tmp_path / "x.npy", np.arange(3.0 * N).reshape(N, 3))
        tensors = {
            "transposed": torch.arange(6 * N).reshape(6, N).T,
            "expanded": torch.arange(N)[:, None].expand(N, 4),
            "conjugated": (torch.arange(N) * 1j).to(torch.complex64).conj(),
            "differentiable": torch.rand(N, 2, requires_grad=True),
            "columns": np.arange(6 * N).reshape(6, N).T,
            "backwards": np.arange(N)[::-1],
            "mapped": np.load(tmp_path / "x.npy", mmap_mode="r"),
        }
        actual = list(staged(make(), tensors, side))
        check_epoch(actual, make(), 0, {**tensors, "mapped": np.array(tensors["mapped"])})
        assert not actual[0]["differentiable"].requires_grad

    @pytest.mark.parametrize("budget", [1, 400])
    def test_state_and_length_count_only_what_was_handed_out(self, sides, monkeypatch, budget):
        monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", budget)
        tensors = {"row": np.arange(N)}
        loaded = PatchTensorLoader(make(device="numpy"), device="cpu", **tensors)
        whole = epoch_of(make(device="numpy"), 0)
        iterator = iter(loaded)
        for count in range(len(whole)):
            state = through_json(loaded.state_dict())
            assert (state["epoch"], state["slot"]) == (0, count)
            assert state == iterator.state_dict()
            assert len(iterator) == len(whole) - count
            resumed = PatchTensorLoader(make(device="numpy"), device="cpu", **tensors)
            resumed.load_state_dict(state)
            assert row_numbers(resumed) == whole[count:]
            assert row_numbers([next(iterator)]) == [whole[count]]
        assert next(iterator, None) is None
        assert (loaded.state_dict()["slot"], len(iterator)) == (len(whole), 0)

    def test_tensors_there_and_tensors_on_the_host(self, sides, monkeypatch):
        monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", 500)
        tensors = some_tensors()
        sampler = make(partial="pad", interleave=False)
        loaded = PatchTensorLoader(sampler, **tensors)
        # Where the one that is on a device is.
        assert loaded.device == Device("torch", "cpu")
        for epoch in range(2):
            actual = list(loaded)
            check_epoch(actual, sampler, epoch, tensors)
            # In the order in which they were given.
            assert list(actual[0]) == [*tensors, "patch_id", "valid"]
            assert {type(actual[0][name]) for name in tensors} == {torch.Tensor}
        # Only what is not there travels.
        copies = entries_named(sides[0].log, "to_device")
        assert len(copies) % 2 == 0
        pinned = sorted({size for _, size in entries_named(sides[0].log, "pinned")})
        assert pinned == [4, 24]

    def test_tensors_that_are_all_there_need_no_stream(self, sides):
        tensors = {"x": torch.rand(N, 3), "row": torch.arange(N)}
        for sampler in (make(device="cpu"), make(device="numpy")):
            loaded = PatchTensorLoader(sampler, **tensors)
            check_epoch(list(loaded), sampler, 0, tensors)
        assert sides == []

    def test_without_a_side_stream_copies_wait(self, cpu_as_device):
        tensors = {"x": np.random.default_rng(0).random((N, 3)), "there": torch.arange(N)}
        loaded = PatchTensorLoader(make(device="numpy"), device="cpu", **tensors)
        for epoch in range(2):
            actual = list(loaded)
            check_epoch(actual, make(device="numpy"), epoch, tensors)
            assert {type(batch["x"]) for batch in actual} == {torch.Tensor}

    @pytest.mark.parametrize("drawn", [1, 8, 24])
    def test_a_pass_may_be_left_anywhere(self, sides, monkeypatch, drawn):
        monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", 8 * 8)
        loaded = PatchTensorLoader(make(device="numpy"), device="cpu", row=np.arange(N))
        iterator = iter(loaded)
        kept = draw(iterator, drawn)
        # Even at the end the host does not know that the last copies are done.
        assert sides[0].in_use > 0
        del iterator
        assert row_numbers(loaded) == epoch_of(make(device="numpy"), 1)
        gc.collect()
        assert sides[0].log[-1][0] == "finish"
        assert sides[0].in_use == 0
        assert row_numbers(kept) == epoch_of(make(device="numpy"), 0)[:drawn]

    def test_passes_beside_one_another_have_buffers_of_their_own(self, sides, monkeypatch):
        monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", 8 * 8)
        loaded = PatchTensorLoader(make(device="numpy"), device="cpu", row=np.arange(N))
        pairs = list(zip(loaded, loaded, strict=True))
        for place, epoch in enumerate((0, 1)):
            expected = epoch_of(make(device="numpy"), epoch)
            assert row_numbers(pair[place] for pair in pairs) == expected
        assert len(sides) == 2

    def test_an_iterator_that_goes_on_elsewhere_drops_what_was_on_its_way(self, sides):
        loaded = PatchTensorLoader(make(device="numpy"), device="cpu", row=np.arange(N))
        iterator = iter(loaded)
        state = iterator.state_dict(step=5)
        next(iterator)
        iterator.load_state_dict(state)
        assert row_numbers(iterator) == epoch_of(make(device="numpy"), 0)[5:]
        assert len(sides) == 2


class TestTables:
    """A plan's tables go where they are needed once, and not every epoch."""

    @pytest.mark.usefixtures("cpu_as_device")
    def test_a_plan_goes_to_the_tensors_once(self, monkeypatch):
        uploads = []
        original = PatchTables.on
        monkeypatch.setattr(
            PatchTables, "on", lambda *args: uploads.append(args) or original(*args)
        )
        sampler = PatchBatchSampler(IDS, 4, device="numpy")
        loaded = PatchTensorLoader(sampler, row=torch.arange(N))
        for _ in range(3):
            assert len(list(loaded)) == len(loaded)
        assert len(uploads) == 1
        # Another seed is another plan.
        loaded.load_state_dict(make(seed=5).state_dict())
        host = PatchBatchSampler(IDS, 4, seed=5, device="numpy")
        assert row_numbers(loaded) == epoch_of(host, 0)
        assert row_numbers(loaded) == epoch_of(host, 1)

    @pytest.mark.usefixtures("cpu_as_device")
    def test_an_order_that_is_elsewhere_comes_to_the_host_once(self, monkeypatch):
        sampler = PatchBatchSampler(torch.from_numpy(IDS), 4, seed=1)
        assert sampler.plan.device == Device("torch", "cpu")
        loaded = PatchTensorLoader(sampler, row=np.arange(N))
        expected = [epoch_of(make(device="numpy"), epoch) for epoch in range(3)]
        fetched = []
        original = arrays.to_numpy

        def to_numpy(array):
            if array is sampler.plan.groups.order:
                fetched.append(array)
            return original(array)

        monkeypatch.setattr(arrays, "to_numpy", to_numpy)
        assert [row_numbers(loaded) for _ in range(3)] == expected
        assert len(fetched) == 1


class TestWrongUse:
    @pytest.mark.parametrize(
        ("tensors", "error", "match"),
        [
            ({}, ValueError, r"tensors must be given by name, such as x=x, got none"),
            (
                {"x": torch.zeros(N - 1, 2)},
                ValueError,
                rf"x must have a row for each of {N} samples, got shape \({N - 1}, 2\)",
            ),
            (
                {"row": torch.zeros(N), "y": np.zeros((2, N))},
                ValueError,
                rf"y must have a row for each of {N} samples, got shape \(2, {N}\)",
            ),
            (
                {"x": torch.tensor(1.0)},
                ValueError,
                rf"x must have a row for each of {N} samples, got shape \(\)",
            ),
            ({"x": np.zeros((0, 3))}, ValueError, r"x must have a row .*, got shape \(0, 3\)"),
            (
                {"x": [0.0] * N},
                TypeError,
                "x must be a torch tensor, an array of NumPy, .* an HDF5 dataset, got list",
            ),
            ({"x": None}, TypeError, "x must be a torch tensor, .*, got NoneType"),
            ({"x": np.float64(1)}, TypeError, "x must be a torch tensor, .*, got float64"),
            (
                {"patch_id": torch.zeros(N)},
                ValueError,
                "tensors must not be named 'patch_id': every batch has a key of this name",
            ),
            ({"valid": np.zeros(N)}, ValueError, "tensors must not be named 'valid'"),
        ],
    )
    def test_tensors_that_cannot_be(self, tensors, error, match):
        with pytest.raises(error, match=match):
            PatchTensorLoader(make(), **tensors)

    def test_samplers_that_are_none(self):
        for given, name in (
            (torch.utils.data.SequentialSampler(range(3)), "SequentialSampler"),
            (IDS, "ndarray"),
            (make().plan, "EpochPlan"),
        ):
            with pytest.raises(TypeError, match=f"sampler must be a PatchBatchSampler, got {name}"):
                PatchTensorLoader(given, x=torch.zeros(N))

    @pytest.mark.parametrize(
        ("device", "error", "match"),
        [
            ("gpu", ValueError, "device must be 'numpy', .* got 'gpu'"),
            ("meta", ValueError, "device must not be 'meta', which stores no data"),
            (7.5, ValueError, r"device must be .*, got '7\.5'"),
        ],
    )
    def test_devices_that_cannot_be(self, device, error, match):
        with pytest.raises(error, match=match):
            PatchTensorLoader(make(), device=device, x=torch.zeros(N))

    @pytest.mark.parametrize("device", ["cuda", "cuda:3", "cupy", "cupy:2"])
    def test_devices_that_are_not_there(self, device):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        with pytest.raises(RuntimeError, match=f"device='{device}' requested, but (torch|cupy) "):
            PatchTensorLoader(make(), device=device, x=torch.zeros(N))

    @pytest.mark.usefixtures("cpu_as_device")
    def test_tensors_on_another_device_than_the_batches(self):
        with pytest.raises(
            ValueError, match=r"x must be on numpy or on the host, as the batches .*, got cpu"
        ):
            PatchTensorLoader(make(device="numpy"), device="numpy", x=torch.zeros(N))

    def test_tensors_on_several_devices(self, monkeypatch):
        where = {2: Device("torch", "cuda:0"), 3: Device("torch", "cuda:1")}
        sampler = make()
        monkeypatch.setattr(arrays, "device_of", lambda tensor: where[tensor.ndim])
        with pytest.raises(ValueError, match=r"y must be on cuda:0 or on the host, .*, got cuda:1"):
            PatchTensorLoader(sampler, x=torch.zeros(N, 1), y=torch.zeros(N, 1, 1))


class TestInAWorker:
    """No array of a GPU may be made in a worker of a DataLoader."""

    REFUSED = (
        "device must be 'numpy' or 'cpu' in a DataLoader worker, got 'cpu': .*"
        "Iterate in the main process, or use device='numpy'"
    )

    @pytest.mark.usefixtures("cpu_as_device")
    @pytest.mark.parametrize("tensor", [torch.arange(N), np.arange(N)], ids=["there", "on host"])
    def test_a_loader_elsewhere_is_refused(self, monkeypatch, tensor):
        loaded = PatchTensorLoader(make(device="numpy"), device="cpu", x=tensor)
        monkeypatch.setattr(devices, "is_in_worker", lambda: True)
        iterator = iter(loaded)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=self.REFUSED):
                next(iterator)
        with pytest.raises(RuntimeError, match=self.REFUSED):
            PatchTensorLoader(make(device="numpy"), device="cpu", x=tensor)

    @pytest.mark.usefixtures("cpu_as_device")
    def test_batches_elsewhere_are_refused(self, monkeypatch):
        sampler = make(device="cpu")
        monkeypatch.setattr(devices, "is_in_worker", lambda: True)
        with pytest.raises(RuntimeError, match=self.REFUSED):
            next(sampler.batches())
        # Lists are made on the host there; sent as by "spawn", the order is on the host, too.
        sent = pickle.loads(pickle.dumps(sampler))
        assert list(sent) == epoch_of(make(device="numpy"), 1)

    def test_a_loader_on_the_host_works(self, monkeypatch):
        loaded = PatchTensorLoader(make(), row=torch.arange(N))
        monkeypatch.setattr(devices, "is_in_worker", lambda: True)
        assert row_numbers(loaded) == epoch_of(make(), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch-cuda", "cupy"])
@pytest.mark.parametrize("budget", [1, 1 << 16, 1 << 25])
def test_tensors_on_the_host_travel_to_a_gpu(monkeypatch, name, budget):
    library = make_library(name)
    monkeypatch.setattr(tensor_loader, "DEVICE_GATHER_BYTES", budget)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30, 20_000 if budget > 1 else 500)
    values = {
        "x": rng.random((ids.size, 8), np.float32),
        "row": np.arange(ids.size),
        "none": np.zeros((ids.size, 0)),
        "there": rng.random((ids.size, 2)),
    }
    tensors = {
        **values,
        "row": torch.from_numpy(values["row"]),
        "there": library.array(values["there"]),
    }
    sampler = PatchBatchSampler(ids, 16, seed=0, device="numpy")
    loaded = PatchTensorLoader(sampler, **tensors)
    next(iter(loaded))
    for epoch in (1, 2):
        actual = [
            {name: library.host(batch[name]) for name in values}
            | {"patch_id": batch["patch_id"], "valid": batch["valid"]}
            for batch in loaded
        ]
        check_epoch(actual, sampler, epoch, values)


@pytest.mark.parametrize("tensor", [torch.eye(5).to_sparse(), torch.empty(5, device="meta")])
def test_a_tensor_without_values_is_refused(tensor):
    sampler = PatchBatchSampler([1, 1, 1, 2, 2], 2, seed=0)
    with pytest.raises(TypeError, match=r"x must be a dense tensor, not sparse, nested, "):
        PatchTensorLoader(sampler, x=tensor)


@pytest.mark.usefixtures("cpu_as_device")
@pytest.mark.parametrize(
    "tensor",
    [np.array(["a"] * 5), np.array([None] * 5), np.ma.array(np.arange(5.0), mask=[1, 0, 0, 0, 0])],
    ids=["strings", "objects", "masked"],
)
def test_what_holds_no_numbers_does_not_travel(tensor):
    sampler = PatchBatchSampler([1, 1, 1, 2, 2], 2, seed=0)
    assert len(list(PatchTensorLoader(sampler, x=tensor))) == 3
    with pytest.raises(TypeError, match=r"x must have a numeric dtype that cpu supports .*got "):
        PatchTensorLoader(sampler, x=tensor, device="cpu")


def test_rows_of_a_transposed_array_are_gathered_without_copying_it_whole():
    x = np.asfortranarray(np.arange(3_000_000.0).reshape(1_000_000, 3))
    sampler = PatchBatchSampler(PatchGroups.from_counts([500_000, 500_000]), 8, seed=0)
    tracemalloc.start()
    batch = next(iter(PatchTensorLoader(sampler, x=x)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    indices = next(sampler.batches(epoch=0)).indices
    np.testing.assert_array_equal(batch["x"], x[indices])
    assert peak < x.nbytes / 4


@pytest.mark.usefixtures("cpu_as_device")
def test_numbers_that_the_device_has_not_are_refused_at_once():
    sampler = PatchBatchSampler([1, 1, 1, 2, 2], 2, seed=0)
    x = np.zeros(5, np.longdouble)
    with pytest.raises(
        TypeError, match=f"x must have a numeric dtype that cpu supports .* of {x.dtype.name}"
    ):
        PatchTensorLoader(sampler, x=x, device="cpu")


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_what_a_library_has_numbers_for(library):
    names = {"torch": ["bfloat16", "float16", "int64"], "cupy": ["float16", "int64", "complex64"]}
    others = {"torch": ["float128", "Tensor"], "cupy": ["bfloat16", "float128", "str", "object"]}
    assert all(arrays.has_dtype(library, name) for name in names[library])
    assert not any(arrays.has_dtype(library, name) for name in others[library])


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_wide_unsigned_tensors_are_gathered_too(name, shape):
    x = np.arange(5 * int(np.prod(shape))).reshape(5, *shape).astype(name)
    x[0] = np.iinfo(name).max
    sampler = PatchBatchSampler([1, 1, 1, 2, 2], 2, seed=0)
    rows = zip(PatchTensorLoader(sampler, x=torch.from_numpy(x)), epoch_of(sampler, 0), strict=True)
    for batch, indices in rows:
        assert batch["x"].dtype == getattr(torch, name)
        np.testing.assert_array_equal(batch["x"].numpy(), x[indices])


def test_a_tensor_may_be_called_sampler():
    sampler = PatchBatchSampler([1, 1, 1, 2, 2], 2, seed=0)
    assert "sampler" in next(iter(PatchTensorLoader(sampler, sampler=np.arange(5))))


def test_an_iterator_that_has_begun_travels():
    sampler = PatchBatchSampler([1] * 30 + [2] * 20, 4, seed=0)
    batches = iter(PatchTensorLoader(sampler, x=np.arange(50)))
    next(batches)
    copied = pickle.loads(pickle.dumps(batches))
    for a, b in zip(copied, batches, strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
