"""A cursor whose batch, and whose way to the next one, take a single launch of the kernel."""

from __future__ import annotations

import numpy as np
import pytest

from gpusampler.core.devices import Device
from gpusampler.plan.evaluators import device as device_module
from support.kernels import device_of_kernel, evaluator_settings_of, kernel_evaluator_of
from support.strategies import quiet

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

IDS = np.random.default_rng(5).permutation(np.repeat([4, -1, 8, 30, 11], [33, 7, 64, 1, 50]))
PLANS = {
    "plain": ({}, 1),
    "uniform": ({"partial": "drop"}, 1),
    "unshuffled": ({"shuffle_patches": False, "shuffle_within_batches": False}, 1),
    "in a row": ({"interleave": False}, 2),
    "in a row, unshuffled": ({"interleave": False, "shuffle_patches": False}, 2),
    "weights": ({"weights": [2, 1, 5, 0.5, 1]}, 1),
    "weights, in a row": ({"weights": [2, 0, 5, 0.5, 1], "interleave": False}, 2),
    "few visits": ({"epoch_batches": 3}, 1),
    "same patch": ({"steps": "same_patch", "step_width": 6}, 1),
    "same patch, in a row": ({"steps": "same_patch", "step_width": 6, "interleave": False}, 2),
    "balanced": ({"steps": "balanced", "step_width": 6}, 1),
    "costliest first": ({"costliest_first": True, "step_width": 6}, 1),
    "even": ({"partial": "even", "min_partial": 8}, 1),
}
"""Settings, and the launches of a call."""
RANKS = [(1, 0, "pad"), (3, 2, "pad"), (3, 1, "drop")]


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The launches from here on, by kernel."""
    launched: list[str] = []

    def kernel_evaluator_on(tables, device, settings):
        evaluator = kernel_evaluator_of(tables, device, settings, "triton")
        for name in ("_launch", "_launch_patch_order"):
            launch = getattr(evaluator, name)

            def counted(*args, name=name, launch=launch):
                launched.append(name)
                launch(*args)

            setattr(evaluator, name, counted)
        return evaluator

    monkeypatch.setattr(device_module, "kernel_evaluator_on", kernel_evaluator_on)
    return launched


def sampler_of(settings, num_replicas=1, rank=0, uneven="pad", device="numpy"):
    arguments = {"batch_size": 9, "seed": 3, **settings}
    if "steps" not in settings and not settings.get("costliest_first"):
        arguments["uneven"] = uneven
    arguments |= {"num_replicas": num_replicas, "rank": rank, "device": device}
    return quiet(IDS, **arguments)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_a_call_is_one_launch(launches, name, ranks):
    settings, expected_launches = PLANS[name]
    device = device_of_kernel("triton")
    sampler = sampler_of(settings, *ranks)
    cursor = sampler_of(settings, *ranks, device=str(device)).cursor()
    patch_ids = sampler.plan.groups.patch_ids.tolist()
    # The interpreter takes a while for a batch: the end of an epoch, and the beginning of the next.
    expected = [batch for epoch in (4, 5) for batch in sampler.batches(epoch)]
    steps = len(sampler)
    first = max(steps - 3, 0)
    cursor.seek(4, first * sampler.num_replicas)
    for batch in expected[first : steps + 3]:
        launches.clear()
        drawn = cursor()
        assert len(launches) == expected_launches
        assert drawn.indices[: len(batch.indices)].tolist() == batch.indices.tolist()
        assert int(drawn.valid) == batch.valid
        assert patch_ids[int(drawn.group)] == batch.patch_id
        assert (tuple(drawn.valid.shape), tuple(drawn.group.shape)) == ((), (1,))
    assert cursor.position() == ((5, 3 * sampler.num_replicas) if steps > 3 else (6, 0))


@pytest.mark.parametrize("name", PLANS)
def test_the_operator_for_compiled_code_returns_the_batches(launches, name):
    """What torch.compile calls, called here as it is."""
    from gpusampler.plan.evaluators.kernels.triton_op import batch_operator

    plan = sampler_of(PLANS[name][0]).plan
    device = device_of_kernel("triton")
    tables = plan.tables.on(device, plan.groups.order)
    kernel = kernel_evaluator_of(tables, device, evaluator_settings_of(plan), "triton")
    kernel._operator = batch_operator()
    streams, epoch = plan.evaluator.streams, 2**33 + 5
    for slot in (0, plan.num_batches - 1):
        counters = (torch.tensor(number, device=str(device)) for number in (epoch, slot))
        indices, length, patch = kernel.compiled_batch(streams, *counters)
        expected = plan.evaluate(epoch, [slot])
        assert indices.tolist() == expected.indices[0].tolist()
        assert (int(length), int(patch)) == (expected.lengths[0], expected.groups[0])


def test_repeats_that_do_not_count(launches):
    ids = [4, 4, 4, 9]
    device = str(device_of_kernel("triton"))
    for rank in range(2):
        make = type(quiet(ids, 2)).for_evaluation
        sampler = make(ids, 2, num_replicas=2, rank=rank)
        cursor = make(ids, 2, num_replicas=2, rank=rank, device=device).cursor()
        expected = [batch.valid for epoch in (0, 1) for batch in sampler.batches(epoch)]
        assert [int(cursor().valid) for _ in expected] == expected
        assert 0 in expected or rank == 0
    assert set(launches) == {"_launch"}


def test_batches_wider_than_a_program_advance_by_other_operations(launches):
    ids = np.zeros(20_000, np.int64)
    device = device_of_kernel("triton")
    sampler = quiet(ids, 6000, seed=0)
    cursor = quiet(ids, 6000, seed=0, device=str(device)).cursor()
    assert isinstance(device, Device)
    for batch in sampler.batches():
        drawn = cursor()
        assert drawn.indices[: len(batch.indices)].tolist() == batch.indices.tolist()
    assert cursor.position() == (1, 0)
