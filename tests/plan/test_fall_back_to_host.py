"""A device whose memory runs out: the host goes on, with the same batches and one warning."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups, PatchTensorLoader
from gpusampler.batching.tables import PatchTables
from gpusampler.core.devices import HOST, Device
from gpusampler.core.transfer import HostTransfer
from gpusampler.plan.evaluators.device import DeviceEvaluator
from gpusampler.sampler import batches as batches_module
from gpusampler.sampler.batches import BlockReader, HostBlockReader
from support.fake_streams import LateSideStream
from support.strategies import ragged_of

torch = pytest.importorskip("torch")

IDS = np.random.default_rng(3).integers(0, 30, 20_000)
SIZE = 16
THERE = Device("torch", "cpu")
pytestmark = pytest.mark.usefixtures("cpu_as_device", "many_blocks")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
DRIVER = RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.fixture
def many_blocks(monkeypatch):
    """An epoch is evaluated in several blocks, in whose midst something may happen."""
    monkeypatch.setattr(batches_module, "FIRST_LOCATED_SLOTS", 8)
    monkeypatch.setattr(batches_module, "FIRST_BLOCK_SAMPLES", 512)
    monkeypatch.setattr(batches_module, "MAX_BLOCK_GROWTH", 1)


def make(device: str = "cpu", source=IDS, **settings):
    return PatchBatchSampler(source, SIZE, seed=9, device=device, **settings)


def plain(batches) -> list[list[int]]:
    return [np.asarray(batch).tolist() for batch in batches]


WANTED = plain(PatchBatchSampler(IDS, SIZE, seed=9))
OTHER = plain(batch.indices for batch in PatchBatchSampler(IDS, SIZE, seed=9).batches(epoch=1))


def fails_from(monkeypatch, owner, name: str, call: int, error: Exception) -> list[int]:
    """Let a method raise from its ``call``-th call on; returns the calls so far."""
    original = getattr(owner, name)
    calls: list[int] = []

    def method(self, *arguments, **named):
        calls.append(len(calls))
        if len(calls) > call:
            raise error
        return original(self, *arguments, **named)

    monkeypatch.setattr(owner, name, method)
    return calls


PLACES = {
    "upload of the tables": (PatchTables, "on", 0),
    "first block": (DeviceEvaluator, "ragged", 0),
    "third block": (DeviceEvaluator, "ragged", 2),
}


@pytest.mark.parametrize("error", [FULL, DRIVER, MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
def test_the_epoch_goes_on_with_the_same_batches(monkeypatch, place, output, error):
    calls = fails_from(monkeypatch, *PLACES[place], error)
    sampler = make(output=output)
    with pytest.warns(UserWarning, match="cpu has run out of memory") as warned:
        assert plain(sampler) == WANTED
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert "identical batches" in str(warned[0].message)
    assert sampler.plan.evaluator.works_on_host
    assert sampler.plan.evaluator._device_evaluator is None
    # It is not tried again, and not warned of again.
    tried = len(calls)
    assert plain(sampler) == OTHER
    assert len(calls) == tried


@pytest.mark.parametrize("place", PLACES)
def test_batches_stay_on_the_device(monkeypatch, place):
    expected = [(b.patch_id, b.indices.tolist(), b.valid) for b in make("numpy").batches()]
    fails_from(monkeypatch, *PLACES[place], FULL)
    with pytest.warns(UserWarning, match="has run out") as warned:
        result = list(make().batches())
    assert len(warned) == 1
    assert all(isinstance(batch.indices, torch.Tensor) for batch in result)
    assert [(b.patch_id, b.indices.tolist(), b.valid) for b in result] == expected


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
@pytest.mark.parametrize("what", ["evaluation", "pinned memory"])
@pytest.mark.parametrize("output", ["list", "numpy"])
def test_blocks_that_are_on_their_way_arrive(monkeypatch, fails_at, what, output):
    side = LateSideStream()
    monkeypatch.setattr("gpusampler.sampler.batches.side_stream", lambda device: side)
    if what == "evaluation":
        fails_from(monkeypatch, DeviceEvaluator, "ragged", fails_at, FULL)
    else:
        error = RuntimeError("CUDA error: out of memory")
        fails_from(monkeypatch, LateSideStream, "allocate_pinned", fails_at, error)
    sampler = make(output=output)
    iterator = iter(sampler)
    with pytest.warns(UserWarning, match="has run out") as warned:
        result = plain(iterator)
    assert isinstance(iterator._reader._block_reader, HostBlockReader)
    assert result == WANTED
    assert len(warned) == 1
    side.check()


def test_a_state_in_the_middle_of_it_is_exact(monkeypatch):
    fails_from(monkeypatch, DeviceEvaluator, "ragged", 2, FULL)
    sampler = make()
    iterator = iter(sampler)
    with pytest.warns(UserWarning, match="has run out"):
        begun = plain(next(iterator) for _ in range(200))
    resumed = make("numpy")
    resumed.load_state_dict(sampler.state_dict())
    assert begun + plain(resumed) == WANTED


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_tensor_loader_goes_on(monkeypatch, fails_at):
    x = torch.arange(IDS.size)
    expected = [b["x"].tolist() for b in PatchTensorLoader(make("numpy"), device="cpu", x=x)]
    calls = fails_from(monkeypatch, DeviceEvaluator, "ragged", fails_at, FULL)
    with pytest.warns(UserWarning, match="has run out") as warned:
        result = list(PatchTensorLoader(make(), device="cpu", x=x))
    assert len(calls) == fails_at + 1
    assert len(warned) == 1
    assert all(isinstance(batch["x"], torch.Tensor) for batch in result)
    assert [batch["x"].tolist() for batch in result] == expected


def test_evaluate_hands_its_blocks_out_on_the_device(monkeypatch):
    groups = PatchGroups.from_ids(IDS)
    plan, host = EpochPlan(groups, SIZE, 1, device="cpu"), EpochPlan(groups, SIZE, 1)
    fails_from(monkeypatch, DeviceEvaluator, "block", 0, FULL)
    for slots in ([3, 0], np.array([5]), torch.tensor([7, 7])):
        expected = host.evaluate(2, np.asarray(slots), dtype="int32")
        if not plan.evaluator.works_on_host:
            with pytest.warns(UserWarning, match="has run out"):
                result = plan.evaluate(2, slots, dtype="int32")
        else:
            result = plan.evaluate(2, slots, dtype="int32")
        assert result.indices.dtype == torch.int32
        for actual, desired in zip(result, expected, strict=True):
            assert isinstance(actual, torch.Tensor)
            np.testing.assert_array_equal(actual.numpy(), desired)


def test_what_is_wrong_with_slots_is_still_said(monkeypatch):
    plan = EpochPlan(PatchGroups.from_ids(IDS), SIZE, 1, device="cpu")
    with pytest.raises(ValueError, match="slots must be in 0"):
        plan.evaluate(0, [-1])
    with pytest.raises(TypeError, match="slots must be integers"):
        plan.evaluate(0, torch.zeros(2))
    assert not plan.evaluator.works_on_host


def test_other_errors_are_not_swallowed(monkeypatch):
    fails_from(monkeypatch, DeviceEvaluator, "ragged", 1, RuntimeError("illegal memory access"))
    sampler = make()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(sampler)
    assert not sampler.plan.evaluator.works_on_host


def test_plans_that_are_alike_have_one_warning(monkeypatch):
    fails_from(monkeypatch, DeviceEvaluator, "ragged", 0, FULL)
    plan = EpochPlan(PatchGroups.from_ids(IDS), SIZE, 1, device="cpu", steps="same_patch")
    wider = plan.with_step_width(4).with_seed(2)
    with pytest.warns(UserWarning, match="has run out") as warned:
        ragged_of(wider, 0, np.arange(3))
    ragged_of(plan, 0, np.arange(3))
    assert len(warned) == 1
    assert plan.evaluator.works_on_host
    # Another process, or another device, has memory of its own.
    assert not pickle.loads(pickle.dumps(plan)).evaluator.works_on_host
    assert plan.on("numpy").evaluator.works_on_host


def test_graphs_are_told(monkeypatch):
    fails_from(monkeypatch, PatchTables, "on", 0, FULL)
    plan = EpochPlan(PatchGroups.from_ids(IDS), SIZE, 1, device="cpu")
    with pytest.raises(torch.OutOfMemoryError):
        plan.batch(torch.tensor(0), torch.tensor(0))


def test_tables_are_known_before_they_are_made():
    plan = make(source=PatchGroups.from_ids(IDS)).plan
    table_bytes = plan.table_bytes
    assert set(table_bytes) == {"numpy", "cpu"}
    groups, tables = plan.groups, plan._tables
    assert table_bytes["cpu"] == plan.evaluator.upload_nbytes
    assert plan.evaluator.needs_upload
    device_arrays = plan.evaluator.device_evaluator().array_evaluator._tables.members()
    assert table_bytes["cpu"] == sum(member.nbytes for member in device_arrays)
    assert table_bytes["numpy"] == groups.order.nbytes + tables.nbytes
    host = make("numpy").plan.table_bytes
    assert host == {"numpy": table_bytes["numpy"]}
    # The order is made on the device, where the ids are grouped there.
    grouped_there = make().plan.table_bytes
    assert grouped_there == {"numpy": tables.nbytes, "cpu": table_bytes["cpu"]}


def test_tables_larger_than_half_of_the_memory_are_warned_of(monkeypatch):
    sampler = make(source=PatchGroups.from_ids(IDS))
    expected = sampler.plan.table_bytes["cpu"]
    monkeypatch.setattr("gpusampler.core.memory.MIN_CHECKED_BYTES", 0)
    monkeypatch.setattr("gpusampler.core.memory.free_bytes", lambda device: 2 * expected - 1)
    with pytest.warns(UserWarning, match="the tables of 20000 samples will take") as warned:
        assert plain(sampler) == WANTED
    assert len(warned) == 1
    monkeypatch.setattr("gpusampler.core.memory.free_bytes", lambda device: 2 * expected + 1)
    assert plain(make()) == WANTED
    assert HOST.on_host
    assert not THERE.on_host


def test_the_pipe_is_left_as_it_was(monkeypatch):
    side = LateSideStream()
    sampler = make()
    share = sampler._tracker.shard_of(0)
    travelling = share.recorder.range("transfer")
    blocks = HostBlockReader(BlockReader(share), HostTransfer(side), travelling)
    fails_from(monkeypatch, DeviceEvaluator, "ragged", 2, FULL)
    with pytest.warns(UserWarning, match="has run out"):
        list(iter(blocks.read, None))
    assert blocks._transfer._pending == []


@pytest.mark.parametrize("compiled", [False, True])
def test_a_cursor_goes_on_where_it_is(monkeypatch, compiled):
    expected = plain(make("numpy", partial="pad"))
    sampler = make(partial="pad")
    cursor = sampler.cursor()

    def step():
        return cursor().indices

    if compiled:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="eager")
    result = [step().tolist() for _ in range(2)]
    # A graph that was captured reads the tables where they were, so they must stay there.
    tables = sampler.plan.evaluator._device_evaluator
    fails_from(monkeypatch, DeviceEvaluator, "ragged", 0, FULL)
    with pytest.warns(UserWarning, match="has run out"):
        assert plain(sampler) == expected
    assert sampler.plan.evaluator._device_evaluator is tables
    assert set(sampler.plan.table_bytes) == {"numpy", "cpu"}
    assert result + [step().tolist() for _ in range(2)] == expected[:4]
