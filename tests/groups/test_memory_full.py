"""Grouping where memory is short: the host for a device that is full, and warnings before."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from gpusampler import PatchBatchSampler, PatchGroups
from gpusampler.core import arrays, memory
from gpusampler.groups import counting_sort
from support.optional_torch import torch

IDS = np.random.default_rng(2).integers(0, 40, 5000)


@pytest.fixture
def full_device(cpu_as_device, monkeypatch):
    """A device of torch's whose memory does not suffice to sort."""
    asked = []

    def sort(array):
        asked.append(array)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(counting_sort.arrays, "stable_argsort", sort)
    return asked


def test_the_host_groups_instead_with_one_warning(full_device):
    plain = PatchGroups.from_ids(IDS)
    with pytest.warns(UserWarning, match=r"not enough memory on cpu to sort 5000 ids") as said:
        groups = PatchGroups.from_ids(torch.tensor(IDS))
    assert len(said) == 1
    assert "2.00 GiB" in str(said[0].message)
    assert said[0].filename == __file__
    assert full_device
    np.testing.assert_array_equal(arrays.to_numpy(groups.order), plain.order)
    assert groups.fingerprint == plain.fingerprint
    # Batches are still wanted where the ids are.
    assert str(groups.device) == "cpu"


def test_batches_stay_the_same_and_on_the_device(full_device):
    expected = list(PatchBatchSampler(IDS, 16, seed=1))
    with pytest.warns(UserWarning, match="not enough memory"):
        sampler = PatchBatchSampler(torch.tensor(IDS), 16, seed=1)
    assert list(sampler) == expected
    for batch in sampler.batches(0):
        assert isinstance(batch.indices, torch.Tensor)


def test_other_errors_are_raised(cpu_as_device, monkeypatch):
    def sort(array):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(counting_sort.arrays, "stable_argsort", sort)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        PatchGroups.from_ids(torch.tensor(IDS))


@pytest.fixture
def free(monkeypatch):
    """Let a device have so many bytes free."""

    def have(number):
        monkeypatch.setattr(memory, "MIN_CHECKED_BYTES", 0)
        monkeypatch.setattr(memory, "free_bytes", lambda device: number)

    return have


def test_a_warning_before_half_of_the_host_is_taken(free):
    free(2 * 4 * IDS.size - 1)
    with pytest.warns(UserWarning, match=r"order of 5000 samples .*path=") as said:
        PatchGroups.from_ids(IDS)
    assert len(said) == 1
    free(2 * 4 * IDS.size)
    PatchGroups.from_ids(IDS)
    # Nothing is kept for samples that lie in order.
    free(10)
    PatchGroups.from_ids(np.sort(IDS))


def test_an_index_file_takes_no_memory(free, tmp_path):
    free(10)
    groups = PatchGroups.from_ids(IDS, path=tmp_path / "ids.index")
    assert groups.order.nbytes == 4 * IDS.size


def test_a_warning_before_half_of_a_device_is_taken(cpu_as_device, free):
    free(2 * 40 * IDS.size - 1)
    with pytest.warns(UserWarning, match=r"sorting 5000 ids .*int32"):
        PatchGroups.from_ids(torch.tensor(IDS))
    free(2 * 40 * IDS.size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PatchGroups.from_ids(torch.tensor(IDS))


@pytest.mark.parametrize("make", [PatchGroups.from_ids, lambda ids: PatchBatchSampler(ids, 16)])
def test_the_line_that_called_is_warned(full_device, free, make):
    for ids in (IDS, torch.tensor(IDS)):
        free(10)
        with pytest.warns(UserWarning, match="5000") as said:
            make(ids)
        assert {warning.filename for warning in said} == {__file__}
