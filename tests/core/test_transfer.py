"""Side streams: what travels to the host a block ahead is right, however late it arrives.

`LateSideStream` stands for a GPU's side stream: it copies as late as it may, and finds memory that
is used too early.
"""

from __future__ import annotations

import gc
import pickle

import numpy as np
import pytest

from gpusampler.plan.evaluators.select import PlanEvaluator

pytest.importorskip("torch")

import torch

from gpusampler import PatchBatchSampler
from gpusampler.core import devices, transfer
from gpusampler.core.devices import Device
from gpusampler.core.transfer import HostTransfer, side_stream
from gpusampler.sampler import batches as batches_module
from support.fake_streams import LateSideStream, TooEarlyError, entries_named, late_side_streams
from support.libraries import make_library
from support.strategies import IDS, make, quiet, through_json

LIBRARIES = pytest.mark.parametrize("pinned", ["numpy", "torch"])


@pytest.fixture
def sides(monkeypatch, cpu_as_device):
    """The side streams that are made, each a `LateSideStream`."""
    with late_side_streams(monkeypatch, batches_module) as made:
        yield made


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few batches, so that an epoch has many of them."""
    monkeypatch.setattr(PlanEvaluator, "block_samples", property(lambda plan: 24))
    monkeypatch.setattr(batches_module, "FIRST_LOCATED_SLOTS", 8)


def there(**settings) -> PatchBatchSampler:
    """`make`, evaluated on what counts as a device elsewhere."""
    return make(device="cpu", **settings)


def plain(batches) -> list[list[int]]:
    return [list(map(int, batch)) for batch in batches]


class TestLateSide:
    """The stand-in itself finds what it is there to find."""

    @LIBRARIES
    def test_copies_only_when_it_must(self, pinned):
        side = LateSideStream(pinned)
        sources = [torch.arange(3) + 10 * i for i in range(3)]
        targets = [side.allocate_pinned(3, "int64") for _ in sources]
        events = [side.copy_to_host(*pair) for pair in zip(sources, targets, strict=True)]
        sources[0] += 1
        assert not (set(np.asarray(targets[0]).tolist()) & {0, 1, 2, 3})
        events[1].synchronize()
        assert [np.asarray(target).tolist() for target in targets[:2]] == [[1, 2, 3], [10, 11, 12]]
        assert np.asarray(targets[2]).tolist() != [20, 21, 22]
        assert side.in_use == 1

    @LIBRARIES
    def test_finds_memory_that_is_written_too_early(self, pinned):
        side = LateSideStream(pinned)
        array, target = torch.arange(3), side.allocate_pinned(3, "int64")
        event = side.copy_to_host(array, target)
        target[1] = 7
        with pytest.raises(TooEarlyError, match="written while it was to be copied to"):
            event.synchronize()

    @LIBRARIES
    @pytest.mark.parametrize("waited", [False, True])
    def test_finds_memory_that_is_refilled_too_early(self, pinned, waited):
        side = LateSideStream(pinned)
        source = side.allocate_pinned(3, "int64")
        source[:] = 1
        array, event = side.copy_to_device(source, (3,))
        if waited:
            # Only the device waited: the host knows nothing.
            side.wait_for_copy(event, array)
            assert array.tolist() == [1, 1, 1]
        with pytest.raises(TooEarlyError, match="used while a copy had it"):
            side.copy_to_device(source, (3,))
        source[0] = 2
        with pytest.raises(TooEarlyError, match="written while it was to be copied from"):
            event.synchronize()

    def test_finds_arrays_that_are_dropped_too_early(self):
        side = LateSideStream()
        target = side.allocate_pinned(3, "int64")
        event = side.copy_to_host(torch.arange(3), target)
        with pytest.raises(TooEarlyError, match="freed before it was copied"):
            event.synchronize()

    @LIBRARIES
    def test_finds_memory_that_is_given_back_too_early(self, pinned):
        side = LateSideStream(pinned)
        array, target = torch.arange(3), side.allocate_pinned(3, "int64")
        side.copy_to_host(array, target)
        del target
        with pytest.raises(TooEarlyError, match="given back while a copy had it"):
            side.check()


class TestToHost:
    @LIBRARIES
    @pytest.mark.parametrize("dtype", ["int64", "int32", "float32"])
    def test_arrays_arrive_in_order_and_stay_until_the_next_send_but_one(self, pinned, dtype):
        rng = np.random.default_rng(0)
        side = LateSideStream(pinned)
        pipe = HostTransfer(side)
        arrays_sent = [
            torch.tensor(rng.integers(0, 99, size), dtype=getattr(torch, dtype))
            for size in rng.integers(0, 30, 40)
        ]
        expected = [array.numpy().copy() for array in arrays_sent]
        pipe.send(arrays_sent.pop(0))
        for i in range(len(expected)):
            if arrays_sent:
                # Nobody but the pipe keeps it.
                pipe.send(arrays_sent.pop(0))
            result = pipe.take()
            assert result.dtype == dtype
            np.testing.assert_array_equal(result, expected[i])
        assert side.in_use == 0

    def test_what_was_taken_stays_while_one_more_is_sent(self):
        pipe = HostTransfer(LateSideStream())
        pipe.send(torch.arange(4))
        first = pipe.take()
        pipe.send(torch.arange(4) + 4)
        assert first.tolist() == [0, 1, 2, 3]

    @LIBRARIES
    def test_two_buffers_serve_all_arrays_and_grow_when_they_must(self, pinned):
        side = LateSideStream(pinned)
        pipe = HostTransfer(side)
        for size in (3, 3, 2, 3, 10, 1, 9, 4, 10):
            pipe.send(torch.arange(size))
            assert pipe.take().tolist() == list(range(size))
        # The fifth array is too large for the first buffer, the eighth fits into the second, where
        # the second to last but one needed four places.
        assert entries_named(side.log, "pinned") == [
            ("pinned", 3),
            ("pinned", 3),
            ("pinned", 10),
            ("pinned", 4),
        ]

    def test_a_third_array_is_refused_until_one_is_taken(self):
        pipe = HostTransfer(LateSideStream())
        pipe.send(torch.arange(2))
        pipe.send(torch.arange(3))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="take must be called before a third array"):
                pipe.send(torch.arange(4))
        assert pipe.take().tolist() == [0, 1]
        pipe.send(torch.arange(4))
        assert [pipe.take().tolist() for _ in range(2)] == [[0, 1, 2], [0, 1, 2, 3]]

    @LIBRARIES
    def test_buffers_are_not_given_back_while_a_copy_has_them(self, pinned):
        side = LateSideStream(pinned)
        pipe = HostTransfer(side)
        pipe.send(torch.arange(2))
        pipe.send(torch.arange(3))
        del pipe
        gc.collect()
        side.check()
        assert side.in_use == 0
        assert side.log[-1] == ("finish", 2)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_the_host_has_no_side_stream(name):
    assert side_stream(devices.parse_device(make_library(name).device)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch-cuda", "cupy"])
def test_the_streams_of_a_gpu_carry_both_ways(name):
    library = make_library(name)
    device = devices.parse_device(library.device)
    side = side_stream(device)
    pipe = HostTransfer(side)
    rng = np.random.default_rng(0)
    expected = [rng.integers(0, 1 << 60, size) for size in rng.integers(1, 1 << 20, 12)]
    pipe.send(library.array(expected[0]))
    for i, values in enumerate(expected):
        if i + 1 < len(expected):
            pipe.send(library.array(expected[i + 1]))
        np.testing.assert_array_equal(pipe.take(), values)
    for values in expected:
        pinned = side.allocate_pinned(values.size, "int64")
        np.asarray(pinned)[:] = values
        array, event = side.copy_to_device(pinned, (values.size, 1))
        side.wait_for_copy(event, array)
        doubled = array * 2
        np.testing.assert_array_equal(library.host(doubled)[:, 0], values * 2)
        event.synchronize()
    side.finish()


CONFIGURATIONS = [
    {},
    {"interleave": False},
    {"partial": "pad"},
    {"partial": "drop", "batch_size": 3},
    {"partial": "pad", "interleave": False, "batch_size": 7},
    {"partial": "drop", "interleave": False, "batch_size": 5},
    {"shuffle_patches": False},
    {"shuffle_within_batches": False},
    {"shuffle_within_batches": False, "shuffle_patches": False, "batch_size": 1},
    {"batch_size": 50},
    {"num_replicas": 3, "rank": 1},
    {"num_replicas": 5, "rank": 4, "uneven": "drop", "partial": "pad"},
    {"num_replicas": 7, "rank": 6, "interleave": False},
    # Ranks that are more than batches: the first ones come again.
    {"num_replicas": 100, "rank": 71, "batch_size": 9},
]


@pytest.mark.parametrize("lanes", [1, 24])
@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
@pytest.mark.parametrize("settings", CONFIGURATIONS, ids=str)
def test_batches_that_travel_are_those_of_the_host(sides, monkeypatch, settings, output, lanes):
    settings = {"seed": 1, "batch_size": 4, **settings}
    ranks = settings.get("num_replicas", 1) > 1
    host = quiet(IDS, **settings)
    monkeypatch.setattr(PlanEvaluator, "block_samples", property(lambda plan: lanes))
    sampler = quiet(IDS, device="cpu", output=output, **settings)
    batch_type = {"list": list, "numpy": np.ndarray, "tensor": torch.Tensor}[output]
    for epoch in (0, 1):
        if ranks:
            sampler.set_epoch(epoch)
            host.set_epoch(epoch)
        # All of them are kept until they are compared.
        result = list(sampler)
        assert {type(batch) for batch in result} == {batch_type}
        if output != "list":
            assert {str(batch.dtype).rpartition(".")[2] for batch in result} == {"int64"}
        assert plain(result) == list(host)
        assert len(result) == len(sampler)
    assert len(sides) == 2
    if lanes == 1:
        # A block is a batch at least.
        assert len(entries_named(sides[0].log, "to_host")) == len(host)


def test_large_epochs_travel_in_blocks_of_all_sizes(sides):
    ids = np.random.default_rng(1).integers(0, 40, 200_000)
    host = PatchBatchSampler(ids, 16, seed=3)
    for output in ("list", "numpy"):
        sampler = PatchBatchSampler(ids, 16, seed=3, device="cpu", output=output)
        for epoch in range(2):
            result = plain(sampler)
            assert result == [batch.indices.tolist() for batch in host.batches(epoch)]
    assert len(entries_named(sides[0].log, "to_host")) > 5
    # Two buffers, however they grow: each is at least as large as what it was made for.
    sizes = [size for _, size in entries_named(sides[0].log, "pinned")]
    assert sizes[::2] == sorted(sizes[::2])
    assert sizes[1::2] == sorted(sizes[1::2])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
def test_batches_that_are_kept_never_change(sides, output):
    iterator = iter(there(output=output))
    batches, copies = [], []
    for batch in iterator:
        batches.append(batch)
        copies.append([int(i) for i in batch])
        assert plain(batches) == copies


@pytest.mark.usefixtures("small_blocks")
def test_numpy_batches_are_of_ordinary_memory(sides):
    batches = list(there(output="numpy"))
    # Their memory can be written, and is no pinned buffer that another block will come into.
    batches[0][:] = -1
    assert plain(batches[1:]) == list(make())[1:]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
def test_a_block_is_evaluated_and_sent_before_the_one_before_it_is_waited_for(
    sides, monkeypatch, output
):
    evaluated = []
    original = PlanEvaluator.ragged

    def ragged(evaluator, epoch, locations):
        sides[-1].log.append(("evaluate", len(evaluated)))
        evaluated.append(locations.size.size)
        return original(evaluator, epoch, locations)

    monkeypatch.setattr(PlanEvaluator, "ragged", ragged)
    sampler = there(output=output)
    iterator = iter(sampler)
    next(iterator)
    handed_out = 1
    # The first needs the second on its way; nothing beyond that is begun.
    assert entries_named(sides[0].log, "evaluate", "to_host", "synchronize") == [
        ("evaluate", 0),
        ("to_host", 0),
        ("evaluate", 1),
        ("to_host", 1),
        ("synchronize", 0),
    ]
    for _ in iterator:
        handed_out += 1
        block = int(np.searchsorted(np.cumsum(evaluated), handed_out))
        assert len(evaluated) == len(entries_named(sides[0].log, "to_host"))
        waited = entries_named(sides[0].log, "synchronize")[-1][1]
        assert waited == block
        assert len(evaluated) - 1 == block + 1 or handed_out > len(sampler) - evaluated[-1]
    blocks = len(evaluated)
    assert blocks > 4
    expected = [("evaluate", 0), ("to_host", 0)]
    for block in range(blocks):
        if block + 1 < blocks:
            expected += [("evaluate", block + 1), ("to_host", block + 1)]
        expected.append(("synchronize", block))
    assert entries_named(sides[0].log, "evaluate", "to_host", "synchronize") == expected
    # A buffer is replaced by a larger one only.
    pinned = [size for _, size in entries_named(sides[0].log, "pinned")]
    assert len(pinned) <= 4
    assert all(size > min(pinned[:at]) for at, size in enumerate(pinned) if at > 1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("output", ["list", "numpy", "tensor"])
def test_state_and_length_count_only_what_was_handed_out(sides, output):
    sampler, host = there(output=output), make()
    sampler.set_epoch(2)
    epoch_batches = [batch.indices.tolist() for batch in host.batches(2)]
    iterator = iter(sampler)
    assert len(iterator) == len(epoch_batches)
    for count in range(len(epoch_batches) + 1):
        state = through_json(sampler.state_dict())
        assert state == iterator.state_dict()
        assert (state["epoch"], state["slot"]) == (2, count)
        assert len(iterator) == len(epoch_batches) - count
        # Here and on the host, by the sampler and by the iterator.
        for resumed in (there(output=output), make()):
            resumed.load_state_dict(state)
            remaining = (
                epoch_batches[count:] if count < len(epoch_batches) else list(host.batches(3))
            )
            assert len(iter(resumed)) == len(remaining)
            if count < len(epoch_batches):
                assert plain(resumed) == remaining
        gone_on = iter(there(output=output))
        gone_on.load_state_dict(state)
        assert plain(gone_on) == epoch_batches[count:]
        if count < len(epoch_batches):
            assert plain([next(iterator)]) == [epoch_batches[count]]
    assert next(iterator, None) is None
    assert next(iterator, None) is None
    assert len(iterator) == 0
    assert sampler.state_dict()["slot"] == len(epoch_batches)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("drawn", [1, 7, 13])
def test_a_pass_may_be_left_anywhere(sides, drawn):
    sampler = there(output="numpy")
    iterator = iter(sampler)
    batches = [next(iterator) for _ in range(drawn)]
    assert sides[0].in_use > 0
    del iterator
    # The sampler still knows the pass that began last.
    assert plain(sampler) == [batch.indices.tolist() for batch in make().batches(1)]
    gc.collect()
    assert sides[0].log[-1][0] == "finish"
    assert sides[0].in_use == 0
    assert plain(batches) == list(make())[:drawn]


@pytest.mark.usefixtures("small_blocks")
def test_an_iterator_that_goes_on_elsewhere_drops_what_was_on_its_way(sides):
    state = make()
    state = iter(state).state_dict(step=5)
    sampler = there()
    iterator = iter(sampler)
    next(iterator)
    iterator.load_state_dict(state)
    assert len(iterator) == 19
    assert list(iterator) == list(make())[5:]
    assert len(sides) == 2


@pytest.mark.usefixtures("small_blocks")
def test_passes_beside_one_another_have_buffers_of_their_own(sides):
    sampler = there(output="numpy")
    first, second = iter(sampler), iter(sampler)
    pairs = list(zip(first, second, strict=True))
    host = make()
    for i, epoch in enumerate((0, 1)):
        result = plain(pair[i] for pair in pairs)
        assert result == [batch.indices.tolist() for batch in host.batches(epoch)]
    assert len(sides) == 2


def test_batches_on_the_device_do_not_travel(sides):
    result = list(there().batches())
    assert {type(batch.indices) for batch in result} == {torch.Tensor}
    assert plain(batch.indices for batch in result) == list(make())
    assert sides == []


def test_a_worker_works_on_the_host_without_a_stream(sides, monkeypatch):
    # Sent, as by "spawn": a forked worker cannot read an order on the device.
    sampler = pickle.loads(pickle.dumps(there()))
    monkeypatch.setattr(devices, "is_in_worker", lambda: True)
    assert list(sampler) == list(make())
    assert sides == []


def test_a_device_without_streams_hands_out_the_same(cpu_as_device):
    # Such as torch's "mps": `side_stream` knows none, and copies wait.
    assert side_stream(Device("torch", "cpu")) is None
    for output in ("list", "numpy", "tensor"):
        assert plain(there(output=output)) == list(make())


def test_a_device_has_one_side_stream(monkeypatch):
    # Memory that is given back stays with the stream it was made on: a new one each epoch would
    # hold more and more.
    monkeypatch.setattr(transfer, "TorchSideStream", lambda device: object())
    side_stream.cache_clear()
    device = Device("torch", "cuda:0")
    assert side_stream(device) is side_stream(device)
    assert side_stream(device) is not side_stream(Device("torch", "cuda:1"))
    side_stream.cache_clear()
