"""What only a GPU can show. Without torch, or without CuPy, the tests of that library skip."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque

import numpy as np
import pytest

from gpusampler import EpochPlan, PatchBatchSampler, PatchGroups, PatchTensorLoader
from gpusampler.core import arrays, devices
from support.libraries import has_cupy_cuda

pytestmark = [
    pytest.mark.gpu,
    # torch says once that its detector does not see everything.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

COUNTS = np.array([40, 2000, 3000, 33, 1500, 7])
IDS = np.random.default_rng(5).permutation(np.repeat([-3, 8, 2, 1 << 40, 11, 0], COUNTS))
BATCH = 64

ORDERS = {
    "interleaved": {},
    "in a row": {"interleave": False},
    "balanced": {"steps": "balanced", "step_width": 4},
    "same patch": {"steps": "same_patch", "step_width": 4},
}
every_order = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


@pytest.fixture
def cupy():
    if not has_cupy_cuda():
        pytest.skip("cupy is not installed or sees no CUDA device")
    import cupy

    return cupy


@pytest.fixture
def ids(torch):
    return torch.from_numpy(IDS).cuda()


@pytest.fixture
def nothing_waits(torch):
    """A context in which torch raises where the host would wait for the device."""

    class NothingWaits:
        def __enter__(self):
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *exception):
            torch.cuda.set_sync_debug_mode("default")

    return NothingWaits()


def drained(iterable):
    deque(iterable, maxlen=0)


def host_plan(**settings):
    return EpochPlan(PatchGroups.from_ids(IDS), BATCH, 3, **settings)


# On the device


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16])
def test_ids_stay_on_the_device(torch, monkeypatch, dtype):
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 9, 5000).astype(dtype)).cuda()
    copied = []
    original = torch.Tensor.cpu

    def cpu(tensor, *args, **kwargs):
        copied.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    sampler = PatchBatchSampler(ids, BATCH, seed=0)
    batches = list(sampler.batches())
    # What comes to the host is as long as the patches are many, or the fingerprint's sums.
    assert max(copied) <= 64
    assert sampler.plan.groups.order.device == ids.device
    assert sampler.plan.groups.order.dtype == torch.int32
    assert {batch.indices.device for batch in batches} == {ids.device}
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(5000))
    for batch in batches:
        assert set(ids[batch.indices].tolist()) == {batch.patch_id}


# No waiting


def test_the_detector_detects(torch, nothing_waits):
    number = torch.ones((), device="cuda")
    with nothing_waits, pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


@pytest.mark.parametrize("fresh", [False, True], ids=["second epoch", "right after construction"])
@every_order
def test_batches_wait_for_nothing(ids, nothing_waits, order, fresh):
    # Kernels are compiled beforehand in either case.
    drained(PatchBatchSampler(ids, BATCH, seed=0, **order).batches())
    sampler = PatchBatchSampler(ids, BATCH, seed=0, **order)
    if not fresh:
        drained(sampler.batches())
    with nothing_waits:
        drained(sampler.batches())
    assert sampler.plan.evaluator.device_evaluator().has_kernel


@pytest.mark.parametrize("fresh", [False, True], ids=["second epoch", "right after construction"])
def test_loader_of_tensors_there_waits_for_nothing(torch, ids, nothing_waits, fresh):
    x = torch.rand((IDS.size, 3), device="cuda")
    drained(PatchTensorLoader(PatchBatchSampler(ids, BATCH, seed=0), x=x))
    loader = PatchTensorLoader(PatchBatchSampler(ids, BATCH, seed=0), x=x)
    if not fresh:
        drained(loader)
    with nothing_waits:
        drained(loader)
    assert loader.batch_sampler.plan.evaluator.device_evaluator().has_kernel


def test_loader_of_tensors_on_the_host(torch, ids):
    x = torch.arange(IDS.size * 3, dtype=torch.float32).reshape(-1, 3)
    sampler = PatchBatchSampler(ids, BATCH, seed=0)
    wanted = list(sampler.batches(0))
    for number, batch in enumerate(PatchTensorLoader(sampler, device="cuda", x=x)):
        assert batch["x"].is_cuda
        assert batch["patch_id"] == wanted[number].patch_id
        assert torch.equal(batch["x"].cpu(), x[wanted[number].indices.cpu()])


# CUDA graphs


def test_a_graph_runs_through_the_end_of_an_epoch(torch, ids):
    cursor = PatchBatchSampler(ids, BATCH, seed=3, partial="pad").cursor()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            cursor()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = cursor()
    host = host_plan(partial="pad")
    total = host.num_batches
    cursor.seek((1 << 40) - 1, total - 2)
    for epoch, slot in [
        ((1 << 40) - 1, total - 2),
        ((1 << 40) - 1, total - 1),
        (1 << 40, 0),
        (1 << 40, 1),
    ]:
        assert cursor.position() == (epoch, slot)
        graph.replay()
        wanted = host.evaluate(epoch, [slot])
        for ours, theirs in zip(batch, wanted, strict=True):
            np.testing.assert_array_equal(ours.cpu().numpy().reshape(theirs[0].shape), theirs[0])
    assert cursor.plan.evaluator.device_evaluator().has_kernel


# Streams


@every_order
def test_two_current_streams(torch, order):
    """What one stream has uploaded another one uses, whichever gets there first."""
    host = host_plan(**order)
    plan = host.on("cuda")
    slots = np.arange(host.num_batches)
    device_slots = torch.from_numpy(slots).cuda()
    plan.evaluate(0, device_slots)
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for epoch in (1, 2):
        results = []
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                if number == 0:
                    # The first stream is late with everything that it was given to do.
                    torch.cuda._sleep(200_000_000)
                results.append(plan.evaluate(epoch, device_slots).indices)
        torch.cuda.synchronize()
        for indices in results:
            wanted = host.evaluate(epoch, slots).indices
            np.testing.assert_array_equal(indices.cpu().numpy(), wanted)


def test_iterating_on_a_stream_of_ones_own(torch, ids):
    wanted = list(PatchBatchSampler(IDS, BATCH, seed=0))
    with torch.cuda.stream(torch.cuda.Stream()):
        sampler = PatchBatchSampler(ids, BATCH, seed=0)
        assert list(sampler) == wanted
        assert [batch.indices.tolist() for batch in sampler.batches(0)] == wanted


def test_cupy_on_a_stream_of_ones_own(cupy):
    host = host_plan()
    slots = np.arange(host.num_batches)
    wanted = host.evaluate(0, slots).indices
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        plan = host.on("cupy")
        indices = plan.evaluate(0, slots).indices
        sampler = PatchBatchSampler(cupy.asarray(IDS), BATCH, seed=0)
        lists = list(sampler)
    stream.synchronize()
    np.testing.assert_array_equal(indices.get(), wanted)
    assert lists == list(PatchBatchSampler(IDS, BATCH, seed=0))


# Between libraries


def test_arrays_go_over_without_a_copy(torch, cupy):
    tensor = torch.arange(1000, device="cuda")
    index = tensor.device.index
    lent = arrays.to_device(tensor, devices.Device("cupy", str(index)))
    assert isinstance(lent, cupy.ndarray)
    assert lent.data.ptr == tensor.data_ptr()
    back = arrays.to_device(lent, devices.Device("torch", f"cuda:{index}"))
    assert back.data_ptr() == tensor.data_ptr()
    np.testing.assert_array_equal(back.cpu().numpy(), np.arange(1000))


def test_ids_of_cupy_for_torch_and_the_other_way_round(torch, cupy, ids):
    wanted = list(PatchBatchSampler(IDS, BATCH, seed=0))
    for source, device in ((cupy.asarray(IDS), "cuda"), (ids, "cupy"), (IDS, "cupy")):
        sampler = PatchBatchSampler(source, BATCH, seed=0, device=device)
        assert list(sampler) == wanted
        assert sampler.plan.evaluator.device_evaluator().has_kernel


# Other processes


def as_lists(pickled: bytes) -> list[list[int]]:
    return list(pickle.loads(pickled))


def test_a_sampler_goes_to_a_process_that_is_spawned(ids):
    sampler = PatchBatchSampler(ids, BATCH, seed=0)
    drained(sampler.batches(0))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        batches = pool.apply(as_lists, (pickle.dumps(sampler),))
    assert batches == list(PatchBatchSampler(IDS, BATCH, seed=0))


# torch's threads and CUDA's are no business of workers that touch neither.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_that_are_forked(torch, ids):
    from torch.utils.data import DataLoader

    sampler = PatchBatchSampler(ids, BATCH, seed=0)
    drained(sampler.batches(0))
    loader = DataLoader(
        list(range(IDS.size)),
        batch_sampler=sampler,
        num_workers=2,
        multiprocessing_context="fork",
    )
    for _ in range(2):
        epoch = sampler.epoch
        batches = [batch.tolist() for batch in loader]
        host_sampler = PatchBatchSampler(IDS, BATCH, seed=0)
        host_sampler.set_epoch(epoch)
        assert batches == list(host_sampler)


# Wrong use


def test_a_gpu_that_is_not_there(torch, ids):
    count = torch.cuda.device_count()
    with pytest.raises(RuntimeError, match=f"device='cuda:{count}' .* torch finds {count} CUDA"):
        PatchBatchSampler(ids, BATCH, device=f"cuda:{count}")


def test_a_gpu_that_is_not_there_for_cupy(cupy):
    count = cupy.cuda.runtime.getDeviceCount()
    with pytest.raises(RuntimeError, match=f"device='cupy:{count}' .* cupy finds {count} CUDA"):
        PatchBatchSampler(IDS, BATCH, device=f"cupy:{count}")
