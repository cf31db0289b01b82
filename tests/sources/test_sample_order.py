"""Subclasses of torch's Subset and ConcatDataset: those that transform, and those that reorder."""

from __future__ import annotations

import numpy as np
import pytest

from gpusampler import PatchBatchSampler
from gpusampler.sources.sample_order import READ_PATCHES, READ_PER_PATCH

data = pytest.importorskip("torch.utils.data")

IDS = [0, 0, 0, 0, 1, 1, 1, 1]


class Part(data.Dataset):
    """Samples with a patch_id; counts how many were read."""

    def __init__(self, ids):
        self.patch_ids = list(ids)
        self.reads = 0

    def __len__(self):
        return len(self.patch_ids)

    def __getitem__(self, i):
        self.reads += 1
        return {"patch_id": self.patch_ids[i], "index": i}


class Bare(Part):
    """Samples without a patch_id."""

    def __getitem__(self, i):
        return super().__getitem__(i)["patch_id"], i


class Batched:
    """What a subclass of Subset that overrides __getitem__ must also have."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


class Interleaved(data.ConcatDataset):
    def __getitem__(self, i):
        return self.datasets[i % 2][i // 2]


class Reversed(Batched, data.Subset):
    def __getitem__(self, i):
        return super().__getitem__(len(self) - 1 - i)


class ReversedParts(data.ConcatDataset):
    """The parts are put in another order after torch has counted their samples."""

    def __init__(self, datasets):
        super().__init__(datasets)
        self.datasets = self.datasets[::-1]


class OwnSizes(data.ConcatDataset):
    """Every part gives two samples fewer than it has, and the last one two more."""

    @staticmethod
    def cumsum(sequence):
        return [max(len(sequence[0]) - 2, 0), sum(map(len, sequence)) - 2]


class Twice(Batched, data.Subset):
    def __len__(self):
        return 2 * super().__len__()

    def __getitem__(self, i):
        return super().__getitem__(i // 2)


class Repeated(Batched, data.Subset):
    """Begins in torch's order."""

    def __len__(self):
        return 2 * super().__len__()

    def __getitem__(self, i):
        return super().__getitem__(i % super().__len__())


class Direct(Batched, data.Subset):
    """Reads what the dataset stores, not the dataset."""

    def __getitem__(self, i):
        patch_id = self.dataset.patch_ids[self.indices[len(self) - 1 - i]]
        return {"patch_id": patch_id} if type(self.dataset) is Part else (patch_id, i)


def reordering(kind, parts):
    """A wrapper of two parts that returns their samples in another order."""
    first, second = parts(IDS[:3]), parts([1, 1, 1, 1, 1])
    even = [parts([0] * 4), parts([1] * 4)]
    if kind in ("Interleaved", "Subset of it", "ConcatDataset of it", "Interleaved of Subsets"):
        if kind == "Interleaved of Subsets":
            even = [data.Subset(part, [3, 1, 2, 0]) for part in even]
        inner = Interleaved(even)
        if kind == "Subset of it":
            return data.Subset(inner, list(range(8)))
        return data.ConcatDataset([inner, first]) if kind == "ConcatDataset of it" else inner
    if kind == "OwnSizes":
        return OwnSizes([first, second])
    if kind == "instance":
        wrapper = data.ConcatDataset([first, second])
        wrapper.__getitems__ = lambda indices: [wrapper[7 - i] for i in indices]
        return wrapper
    whole = parts([0, 0, 0, 1, 1, 1, 1, 1])
    return {c.__name__: c for c in (Reversed, Twice, Repeated, Direct)}[kind](whole, range(8))


KINDS = (
    "Interleaved",
    "Subset of it",
    "ConcatDataset of it",
    "Interleaved of Subsets",
    "OwnSizes",
    "Reversed",
    "Twice",
    "Repeated",
    "Direct",
)


def batches_of(wrapper):
    """The patches of the samples in each batch of a DataLoader."""
    sampler = PatchBatchSampler(wrapper, 2, seed=0)
    loader = data.DataLoader(wrapper, batch_sampler=sampler, collate_fn=list)
    return [{s["patch_id"] if isinstance(s, dict) else s[0] for s in batch} for batch in loader]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_in_another_order_decide(kind):
    batches = batches_of(reordering(kind, Part))
    assert {len(patches) for patches in batches} == {1}
    assert set.union(*batches) == {0, 1}


def test_a_subset_of_samples_in_another_order_reads_its_own_only():
    parts = [Part([0] * 4), Part([1] * 4)]
    PatchBatchSampler(data.Subset(Interleaved(parts), [7, 0, 2]), 2)
    assert [part.reads for part in parts] == [2, 1]


def test_parts_in_another_order_than_their_sizes():
    # Torch has counted 3 and 5 samples, and asks the part of 3 samples for the 5th one.
    with pytest.raises(RuntimeError, match=r"sample 6 raised IndexError"):
        PatchBatchSampler(ReversedParts([Part(IDS[:3]), Part([1] * 5)]), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_in_another_order_without_ids_are_refused(kind):
    wrapper = reordering(kind, Bare)
    with pytest.raises(TypeError, match="samples with a 'patch_id', got a tuple") as caught:
        PatchBatchSampler(wrapper, 2)
    if kind in ("Interleaved", "Reversed", "Twice", "Repeated", "Direct"):
        assert f"{kind} overrides __getitem__" in str(caught.value)
        assert f"add `def get_all_patch_ids(self): return [...]` to {kind}" in str(caught.value)
        order = [wrapper[i][0] for i in range(len(wrapper))]
        type(wrapper).get_all_patch_ids = lambda self: order
        try:
            assert {len(patches) for patches in batches_of(wrapper)} == {1}
        finally:
            del type(wrapper).get_all_patch_ids


class Scaled(Batched, data.Subset):
    def __getitem__(self, i):
        return super().__getitem__(i)


class ScaledBatches(data.Subset):
    def __getitems__(self, indices):
        return list(super().__getitems__(indices))


class ScaledParts(data.ConcatDataset):
    def __getitem__(self, i):
        return super().__getitem__(i)


class OwnLookup(data.ConcatDataset):
    def __getitem__(self, i):
        part = int(np.searchsorted(self.cumulative_sizes, i, side="right"))
        assert isinstance(self.datasets[part], Part)
        assert len(self.datasets[part]) == 4
        return self.datasets[part][i - 4 * part]


class UsesAttribute(Batched, data.Subset):
    def __getitem__(self, i):
        return (len(self.dataset.patch_ids), super().__getitem__(i))[1]


class Retries(Batched, data.Subset):
    def __getitem__(self, i):
        try:
            return super().__getitem__(i)
        except Exception:
            return super().__getitem__(0)


class RetriesAlways(Batched, data.Subset):
    def __getitem__(self, i):
        while True:
            try:
                return super().__getitem__(i)
            except:  # noqa: E722
                i = (i + 1) % len(self)


class Mixed(Batched, data.Subset):
    """Adds a second sample, as mixup does."""

    def __getitem__(self, i):
        return (super().__getitem__(i), super().__getitem__(len(self) - 1 - i))[0]


class Cached(Batched, data.Subset):
    def __init__(self, dataset, indices):
        super().__init__(dataset, indices)
        self.samples, self.original = {}, dataset

    def __getitem__(self, i):
        if i not in self.samples:
            self.samples[i] = self.original[self.indices[i]]
        return self.samples[i]


class Permuted(data.Subset):
    """Computes its indices; torch's methods use them, so nothing is checked."""

    @property
    def indices(self):
        return [7, 0, 6, 1, 5, 2, 4, 3]

    @indices.setter
    def indices(self, value):
        pass


TRANSFORMING = {
    **{cls.__name__: cls for cls in (Scaled, ScaledBatches, UsesAttribute, Mixed, Cached)},
    "Retries": Retries,
    "Permuted": Permuted,
    "Scaled of Scaled": lambda whole, indices: Scaled(Scaled(whole, indices), range(8)),
    "Subset of Scaled": lambda whole, indices: data.Subset(Scaled(whole, indices), range(8)),
    "shuffled": lambda whole, _: Scaled(whole, [5, 0, 6, 1, 7, 2, 3, -4]),
    "tensor of indices": lambda whole, indices: Scaled(
        whole, pytest.importorskip("torch").tensor(indices)
    ),
}


@pytest.mark.parametrize("parts", [Part, Bare])
@pytest.mark.parametrize("kind", TRANSFORMING)
def test_a_subset_that_only_transforms_reads_no_sample(kind, parts):
    whole = parts(IDS)
    wrapper = TRANSFORMING[kind](whole, list(range(8)))
    sampler = PatchBatchSampler(wrapper, 2, seed=0)
    assert whole.reads == 0
    assert len(sampler) == 4
    assert all(len(patches) == 1 for patches in batches_of(wrapper))


@pytest.mark.parametrize("parts", [Part, Bare])
@pytest.mark.parametrize("kind", [ScaledParts, OwnLookup])
def test_a_concatenation_that_only_transforms_reads_no_sample(kind, parts):
    wrapper = kind([parts(IDS[:4]), parts(IDS[4:])])
    PatchBatchSampler(wrapper, 2, seed=0)
    assert [part.reads for part in wrapper.datasets] == [0, 0]
    same = parts(IDS[:4])
    assert all(len(patches) == 1 for patches in batches_of(kind([same, same])))


def test_a_wrapper_that_tries_again_whatever_happens():
    whole = Part(IDS)
    assert all(len(patches) == 1 for patches in batches_of(RetriesAlways(whole, range(8))))


class Stored(Batched, data.Subset):
    """Keeps the order, but reads what the dataset stores."""

    def __getitem__(self, i):
        self.dataset.reads += 1
        return {"patch_id": self.dataset.patch_ids[self.indices[i]]}


@pytest.mark.parametrize("names", [False, True])
def test_a_few_samples_are_read_where_requests_do_not_tell(names):
    ids = np.repeat(np.arange(10), 1000).tolist()
    whole = Part([f"patch {i}" for i in ids] if names else ids)
    wrapper = Stored(whole, range(9999, -1, -1))
    sampler = PatchBatchSampler(wrapper, 100, seed=0)
    assert whole.reads <= 2 * READ_PATCHES * READ_PER_PATCH + 2
    assert all(len(patches) == 1 for patches in batches_of(wrapper))
    assert sampler.plan.groups.samples_of("patch 9" if names else 9)[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [2000, 100_000])
def test_few_samples_out_of_order_of_many(size):
    class SwappedThird(data.ConcatDataset):
        def __getitem__(self, i):
            return super().__getitem__(i if i < 2 * len(self) // 3 else len(self) - 1 - i)

    wrapper = SwappedThird([Part([0] * (size // 2)), Part([1] * (size // 2))])
    groups = PatchBatchSampler(wrapper, 100, seed=0, progress=False).plan.groups
    assert groups.samples_of(0).size == size // 2 + (size - 2 * size // 3)


class ReversedBatches(data.Subset):
    def __getitems__(self, indices):
        return super().__getitems__([len(self) - 1 - i for i in indices])


@pytest.mark.parametrize("parts", [Part, Bare])
def test_methods_that_disagree_are_refused(parts):
    match = "from __getitem__ and __getitems__, got ReversedBatches, .* different ones for index 0"
    with pytest.raises(ValueError, match=match):
        PatchBatchSampler(ReversedBatches(parts(IDS), range(8)), 2)
    with pytest.raises(ValueError, match=match):
        PatchBatchSampler(data.Subset(ReversedBatches(parts(IDS), range(8)), range(8)), 2)


def test_methods_of_an_instance_that_disagree_are_refused():
    with pytest.raises(ValueError, match="got ConcatDataset, which returns different ones for ind"):
        PatchBatchSampler(reordering("instance", Part), 2)
    with pytest.raises(TypeError, match="ConcatDataset overrides __getitems__ of ConcatDataset"):
        PatchBatchSampler(reordering("instance", Bare), 2)


def test_ids_that_a_wrapper_declares_are_taken():
    class Declares(Interleaved):
        patch_ids = [0, 1] * 4

    wrapper = Declares([Bare([0] * 4), Bare([1] * 4)])
    assert all(len(patches) == 1 for patches in batches_of(wrapper))
    assert sum(part.reads for part in wrapper.datasets) == 8
