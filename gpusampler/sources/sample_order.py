"""Whether a wrapper returns the samples of what it wraps in the order of their ids.

A subclass of torch's ``Subset`` or ``ConcatDataset`` may override the methods that return samples.
If it only transforms them, the ids of the wrapped datasets are those of its samples. To tell, it is
asked for a few samples, with the wrapped datasets replaced by objects that record which sample is
requested and raise, so that no sample is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core.log import logger
from gpusampler.sources.base import BLOCK, PatchIds
from gpusampler.sources.sample_by_sample import id_of_sample

MAX_REQUESTS = 1000
"""Number of samples that a wrapper is asked for; none of them is read."""
READ_PATCHES, READ_PER_PATCH = 4, 4
"""Number of patches of which samples are read, and of samples of each."""
METHODS = ("__getitem__", "__getitems__", "__len__")

Source = tuple[int, int]
"""(``id`` of a wrapped dataset, index in it)."""


def overridden_methods(wrapper: Any, base: type) -> list[str]:
    """Return the names of the methods of torch's class ``base`` that a wrapper overrides."""
    # DataLoader calls __getitems__ of the instance, which may have one of its own.
    return [
        name
        for name in METHODS
        if _function(getattr(wrapper, name, None)) is not getattr(base, name, None)
    ]


def keeps_order(wrapper: Any, base: type, parts: list[Any], expected: list[Any]) -> bool | None:
    """Return whether sample i of a wrapper is a certain sample of a part; None if unknown.

    Parameters
    ----------
    wrapper : Subset or ConcatDataset
        An instance of torch's class ``base`` or of a subclass.
    parts : list
        The wrapped datasets.
    expected : list of sequences of int
        For each part in turn, the indices of the samples that follow one another in the wrapper.

    Raises
    ------
    ValueError
        If ``__getitem__`` and ``__getitems__`` return different samples for an index.
    """
    stops = np.cumsum([len(indices) for indices in expected])
    size = int(stops[-1])
    if len(wrapper) != size:
        return False
    overridden = overridden_methods(wrapper, base)
    has_torch_sizes = np.array_equal(getattr(wrapper, "cumulative_sizes", stops), stops)
    if not overridden and has_torch_sizes:
        return True
    probe = _Probe(wrapper, parts)
    methods = _read_methods(wrapper)
    for i in _spread(size, MAX_REQUESTS).tolist():
        part = int(np.searchsorted(stops, i, side="right"))
        index = int(expected[part][i - int(stops[part]) + len(expected[part])])
        sources = [probe.source(method, i) for method in methods]
        known = set(sources) - {None}
        _check_methods_agree(wrapper, known, i)
        if known - {(id(parts[part]), index)}:
            return False
        if None in sources:
            # Without a request, the wrapper may have read a sample: do not go on.
            return None
    return True


def samples_match(dataset: Any, ids: PatchIds, advice: str) -> bool:
    """Read a few samples of a few patches, and return whether their ``"patch_id"`` are the ids."""
    block: NDArray[Any] = ids.read(0, min(ids.size, BLOCK))
    patch_ids = np.unique(block)
    for patch_id in patch_ids[_spread(patch_ids.size, READ_PATCHES)]:
        samples = np.flatnonzero(block == patch_id)
        expected = int(patch_id) if ids.names is None else ids.names[int(patch_id)]
        for i in samples[_spread(samples.size, READ_PER_PATCH)].tolist():
            found = {
                id_of_sample(dataset, i, advice, batched=method == "__getitems__")
                for method in _read_methods(dataset)
            }
            _check_methods_agree(dataset, found, i)
            if found != {expected}:
                return False
    return True


def _read_methods(dataset: Any) -> list[str]:
    # A DataLoader calls __getitems__ where a dataset has it.
    return [name for name in METHODS[:2] if callable(getattr(dataset, name, None))]


def _check_methods_agree(dataset: Any, found: set[Any], i: int) -> None:
    """Raise ValueError if several samples, or ids of samples, were found for an index."""
    if len(found) > 1:
        name = type(dataset).__name__
        raise ValueError(
            "source must return the same samples from __getitem__ and __getitems__, got "
            f"{name}, which returns different ones for index {i}: override both in {name}"
        )


def _spread(size: int, count: int) -> NDArray[np.int64]:
    """Return up to ``count`` distinct indices below ``size``, the first and the last included."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


class _Requested(BaseException):
    """A sample of a wrapped dataset was requested; wrappers may catch an Exception."""


class _Recorder:
    """Stands for a wrapped dataset: records the first request for a sample, and raises.

    Later requests read samples, so that a wrapper that catches everything and tries again ends.
    """

    def __init__(self, dataset: Any, requests: list[tuple[int, Any]]) -> None:
        self._dataset = dataset
        self._requests = requests

    def __getitem__(self, index: Any) -> Any:
        self._record(index)
        return self._dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        self._record(indices)
        return [self._dataset[i] for i in indices]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        # A wrapper may check the type of what it wraps.
        return type(self._dataset)

    def _record(self, index: Any) -> None:
        if not self._requests:
            self._requests.append((id(self._dataset), index))
            raise _Requested


class _Probe:
    """A shallow copy of a wrapper whose attributes hold recorders in place of its parts."""

    def __init__(self, wrapper: Any, parts: list[Any]) -> None:
        self._requests: list[tuple[int, Any]] = []
        recorders = {id(part): _Recorder(part, self._requests) for part in parts}

        def replaced(value: Any) -> Any:
            if type(value) in (list, tuple) and len(value) == len(parts):
                return type(value)(recorders.get(id(item), item) for item in value)
            return recorders.get(id(value), value)

        self._copy = object.__new__(type(wrapper))
        attributes = {name: replaced(value) for name, value in vars(wrapper).items()}
        self._copy.__dict__.update(attributes)

    def source(self, method: str, i: int) -> Source | None:
        """Return which sample is requested first for index i; None if that cannot be told."""
        self._requests.clear()
        try:
            if method == "__getitem__":
                self._copy[i]
            else:
                self._copy.__getitems__([i])
        except _Requested:
            pass
        except Exception as error:
            # The wrapper needs more than the recorders offer; its samples are read instead.
            logger.debug("%s does not work on a recorder: %r", type(self._copy).__name__, error)
        for part, requested in self._requests:
            index = np.asarray(requested).reshape(-1)
            if index.size == 1 and index.dtype.kind in "iu":
                return part, int(index[0])
        return None


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
