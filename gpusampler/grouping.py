"""Samples grouped by patch: who belongs together, sorted once, on the device the ids are on.

`PatchGroups` is the only thing that is as large as the dataset, and it is 4 bytes a sample: the
sample numbers sorted stably by patch. Where the samples of every patch lie side by side already,
in whatever order of patches, it is not there at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpusampler import arrays, fingerprint
from gpusampler.arrays import HOST, Device, Int64
from gpusampler.sorting import group_on_device, group_on_host
from gpusampler.splitting import checked_fractions, split_patches, split_samples
from gpusampler.validation import (
    as_array,
    as_int64,
    checked_choice,
    checked_ids,
    checked_int,
    checked_seed,
)

MAX_PATCH = 1 << 31
"""A patch holds fewer samples than this, so that its positions fit in 31 bits."""


class PatchGroups:
    """The samples of a dataset, grouped by patch.

    Made by `from_ids` or `from_counts`. Immutable.

    Parameters
    ----------
    patch_ids : int64 array, shape (G,)
        Distinct patch ids in ascending order.
    counts : int64 array, shape (G,)
        Samples of each patch, 1 .. 2**31 - 1.
    starts : int64 array, shape (G,)
        Where each patch starts: in ``order``, or among the samples where ``order`` is None.
    order : int32 or int64 array, shape (N,), or None
        Samples sorted stably by patch, on any device.
    source_size : int
        Samples of the dataset that the indices refer to; more than N after `select`.
    fingerprint : int, optional
        Of ids and samples, when it is known already.

    Attributes
    ----------
    patch_ids, counts, starts : int64 NumPy arrays, shape (G,)
    order : array on `device`, or None
        None where every patch is one run of consecutive samples.
    device : Device
        Where ``order`` lies, or the ids lay.

    Raises
    ------
    ValueError
        If a patch has 2**31 samples or more, or there are no samples.

    Examples
    --------
    >>> import numpy as np
    >>> groups = PatchGroups.from_ids(np.array([7, -1, 7, 7, -1]))
    >>> groups.patch_ids.tolist(), groups.counts.tolist(), groups.order.tolist()
    ([-1, 7], [2, 3], [1, 4, 0, 2, 3])
    """

    def __init__(
        self,
        patch_ids: Int64,
        counts: Int64,
        starts: Int64,
        order: Any,
        *,
        source_size: int,
        device: Device = HOST,
        fingerprint: int | None = None,
    ) -> None:
        if counts.size == 0:
            raise ValueError("counts must hold at least one patch, got none")
        if int(counts.max()) >= MAX_PATCH:
            large = int(counts.argmax())
            raise ValueError(
                f"a patch must have fewer than 2**31 samples, got {int(counts[large])} "
                f"in patch {int(patch_ids[large])}"
            )
        self.patch_ids = _read_only(patch_ids)
        self.counts = _read_only(counts)
        self.starts = _read_only(starts)
        self.order = order
        self.device = device
        self.source_size = source_size
        self._num_samples = int(counts.sum())
        self._fingerprint = fingerprint

    @classmethod
    def from_ids(cls, ids: Any) -> PatchGroups:
        """Group samples by their patch ids.

        Parameters
        ----------
        ids : integer array, shape (N,), or sequence of int
            Patch id of each sample: NumPy (memory maps too, read in chunks), torch or CuPy, on any
            device. Any int64 values, negative and sparse ones included.

        Returns
        -------
        PatchGroups
            On the device of ``ids``. The ids themselves are not kept.

        Raises
        ------
        TypeError
            If ``ids`` are no integers (booleans and floats included).
        ValueError
            If ``ids`` are not 1-D, are empty, do not fit in int64, or a patch has 2**31 samples.
        """
        ids = checked_ids(ids)
        device = arrays.device_of(ids)
        size = int(ids.shape[0])
        if device.on_host:
            found = group_on_host(arrays.to_numpy(ids))
        else:
            found = group_on_device(ids)
        order = found.order
        if order is not None:
            order = arrays.to_device(order, device)
        return cls(
            found.patch_ids,
            found.counts,
            found.starts,
            order,
            source_size=size,
            device=device,
            fingerprint=found.fingerprint,
        )

    @classmethod
    def from_counts(
        cls, counts: Sequence[int] | NDArray[Any], patch_ids: Any = None
    ) -> PatchGroups:
        """Group samples that lie patch after patch, from the sizes of the patches alone.

        Needs memory for the patches, not for the samples: 1e12 samples take kilobytes.

        Parameters
        ----------
        counts : sequence or integer array, shape (P,)
            Samples of each patch, in the order in which the patches lie. A patch of 0 is left out.
        patch_ids : sequence or integer array, shape (P,), optional
            Their ids, distinct, in any order. Default 0 .. P-1.

        Returns
        -------
        PatchGroups

        Raises
        ------
        TypeError
            If ``counts`` or ``patch_ids`` are no integers.
        ValueError
            If they are not 1-D or differ in length, a count is negative or 2**31 or more, all are
            0, ids repeat, or there are 2**62 samples or more.
        """
        sizes = as_int64(counts, "counts")
        ids = (
            np.arange(sizes.size, dtype=np.int64)
            if patch_ids is None
            else as_int64(patch_ids, "patch_ids")
        )
        if ids.size != sizes.size:
            raise ValueError(f"patch_ids must be as many as counts ({sizes.size}), got {ids.size}")
        if sizes.size and int(sizes.min()) < 0:
            raise ValueError(f"counts must be >= 0, got {int(sizes.min())}")
        by_id = np.argsort(ids, kind="stable")
        same = np.flatnonzero(np.diff(ids[by_id]) == 0)
        if same.size:
            raise ValueError(f"patch_ids must be distinct, got {int(ids[by_id][same[0]])} twice")
        total = float(sizes.astype(np.float64).sum())
        if total >= 2.0**62:
            raise ValueError(f"counts must add up to less than 2**62 samples, got {total:g}")
        starts = np.cumsum(sizes) - sizes
        kept = by_id[sizes[by_id] > 0]
        if kept.size == 0:
            raise ValueError("counts must add up to at least one sample, got none")
        return cls(ids[kept], sizes[kept], starts[kept], None, source_size=int(sizes.sum()))

    @property
    def num_patches(self) -> int:
        """Number of patches G."""
        return int(self.counts.size)

    @property
    def num_samples(self) -> int:
        """Number of samples N in these groups."""
        return self._num_samples

    @property
    def offsets(self) -> Int64:
        """Where each group starts among the samples sorted by patch: int64, shape (G + 1,)."""
        offsets = np.zeros(self.num_patches + 1, np.int64)
        np.cumsum(self.counts, out=offsets[1:])
        return offsets

    @property
    def is_contiguous(self) -> bool:
        """Whether every patch is one run of consecutive samples, so that no order is kept."""
        return self.order is None

    @property
    def nbytes(self) -> int:
        """Bytes kept, on host and device."""
        tables = self.patch_ids.nbytes + self.counts.nbytes + self.starts.nbytes
        return tables + (0 if self.order is None else int(self.order.nbytes))

    @property
    def fingerprint(self) -> int:
        """64-bit number that depends on which sample has which patch id, and on nothing else."""
        if self._fingerprint is None:
            if self.order is None:
                self._fingerprint = fingerprint.of_runs(self.patch_ids, self.starts, self.counts)
            else:
                order = arrays.to_numpy(self.order)
                self._fingerprint = fingerprint.of_order(self.patch_ids, self.counts, order)
        return self._fingerprint

    def samples_of(self, patch_id: int) -> Int64:
        """Return the samples of one patch, ascending, as a host int64 array.

        Raises
        ------
        KeyError
            If there is no such patch.
        TypeError, ValueError
            If ``patch_id`` is no int64 integer.
        """
        patch_id = checked_int(patch_id, "patch_id", least=-(1 << 63), below=1 << 63)
        group = int(np.searchsorted(self.patch_ids, patch_id))
        if group == self.num_patches or int(self.patch_ids[group]) != patch_id:
            raise KeyError(
                f"patch_id must be one of the {self.num_patches} patches, got {patch_id}"
            )
        start, count = int(self.starts[group]), int(self.counts[group])
        if self.order is None:
            return np.arange(start, start + count, dtype=np.int64)
        return arrays.to_numpy(self.order[start : start + count]).astype(np.int64)

    def select(self, indices: Any) -> PatchGroups:
        """Keep some samples only; their indices and patch ids stay what they were.

        Parameters
        ----------
        indices : integer array or sequence, shape (K,), or boolean array, shape (source_size,)
            Samples to keep, each at most once, in any order.

        Returns
        -------
        PatchGroups
            On the same device. Patches of which nothing is kept are gone.

        Raises
        ------
        TypeError
            If ``indices`` are neither integers nor a mask.
        ValueError
            If they are empty, repeat, or name a sample that these groups do not hold.
        """
        chosen = self._checked_indices(indices)
        group = self._group_of(chosen)
        found = group_on_host(group)
        patch_ids = self.patch_ids[found.patch_ids]
        samples = chosen if found.order is None else chosen[found.order]
        offsets = np.cumsum(found.counts) - found.counts
        if found.order is None:
            samples = samples[_places(found.starts, found.counts)]
        first, last = samples[offsets], samples[offsets + found.counts - 1]
        if bool((last - first + 1 == found.counts).all()):
            return self._like(patch_ids, found.counts, first, None)
        return self._like(patch_ids, found.counts, offsets, samples)

    def split(
        self,
        fractions: Iterable[float],
        by: Literal["patch", "sample"] = "patch",
        seed: int = 0,
    ) -> list[PatchGroups]:
        """Split into disjoint parts, such as training and validation.

        Parameters
        ----------
        fractions : sequence of float
            Each above 0, adding up to 1: one part for each.
        by : {"patch", "sample"}
            "patch": whole patches, so that no patch is in two parts; the fractions are of the
            number of patches. "sample": every patch gives each part its share of samples, within
            one sample.
        seed : int
            0 .. 2**64 - 1. The same seed gives the same parts, on every device.

        Returns
        -------
        list of PatchGroups
            With the original sample indices and patch ids.

        Raises
        ------
        ValueError
            If the fractions are not positive or do not add up to 1, ``by`` is unknown, or a part
            would be empty.
        """
        shares = checked_fractions(fractions)
        seed = checked_seed(seed)
        checked_choice(by, "by", ("patch", "sample"))
        if by == "patch":
            parts = split_patches(self.num_patches, shares, seed)
        else:
            order = None if self.order is None else arrays.to_numpy(self.order)
            parts = split_samples(self.counts, self.starts, order, shares, seed)
        for part, share in zip(parts, shares.tolist(), strict=True):
            if part.size == 0:
                raise ValueError(
                    f"fractions must leave no part empty, got {share:g} of "
                    f"{self.num_patches} patches and {self.num_samples} samples by {by}"
                )
        return [self._take(part) if by == "patch" else self.select(part) for part in parts]

    def _take(self, groups: Int64) -> PatchGroups:
        """Keep whole patches."""
        counts, starts = self.counts[groups], self.starts[groups]
        if self.order is None:
            return self._like(self.patch_ids[groups], counts, starts, None)
        taken = arrays.to_numpy(self.order)[_places(starts, counts)]
        return self._like(self.patch_ids[groups], counts, np.cumsum(counts) - counts, taken)

    def _like(self, patch_ids: Int64, counts: Int64, starts: Int64, order: Any) -> PatchGroups:
        if order is not None:
            narrow = np.int32 if self.source_size < MAX_PATCH else np.int64
            order = arrays.to_device(order.astype(narrow, copy=False), self.device)
        return PatchGroups(
            patch_ids,
            counts,
            starts,
            order,
            source_size=self.source_size,
            device=self.device,
        )

    def _checked_indices(self, indices: Any) -> Int64:
        chosen = arrays.to_numpy(as_array(indices, "indices"))
        if chosen.dtype == np.bool_:
            if chosen.shape != (self.source_size,):
                raise ValueError(
                    f"indices must be a mask of shape ({self.source_size},), got {chosen.shape}"
                )
            chosen = np.flatnonzero(chosen)
        chosen = np.sort(as_int64(chosen, "indices"))
        if chosen.size == 0:
            raise ValueError("indices must name at least one sample, got none")
        same = np.flatnonzero(chosen[1:] == chosen[:-1])
        if same.size:
            raise ValueError(f"indices must be distinct, got {int(chosen[same[0]])} twice")
        for extreme in (int(chosen[0]), int(chosen[-1])):
            if not 0 <= extreme < self.source_size:
                raise ValueError(f"indices must be in 0 .. {self.source_size - 1}, got {extreme}")
        return chosen

    def _group_of(self, samples: Int64) -> Int64:
        """Group of each of some samples (ascending), by whichever of two ways fits the form."""
        if self.order is None:
            by_start = np.argsort(self.starts)
            at = np.searchsorted(self.starts[by_start], samples, side="right") - 1
            group = by_start[np.maximum(at, 0)]
            held = (at >= 0) & (samples < self.starts[group] + self.counts[group])
        else:
            of_sample = np.full(self.source_size, -1, np.int32)
            numbers = np.arange(self.num_patches, dtype=np.int32)
            of_sample[arrays.to_numpy(self.order)] = np.repeat(numbers, self.counts)
            group = of_sample[samples].astype(np.int64)
            held = group >= 0
        if not held.all():
            raise ValueError(
                f"indices must be samples of these groups, got {int(samples[~held][0])}"
            )
        return group.astype(np.int64)

    def __repr__(self) -> str:
        """Return sizes, form and device."""
        form = "contiguous" if self.is_contiguous else str(self.order.dtype).split(".")[-1]
        return (
            f"PatchGroups({self.num_patches} patches, {self.num_samples} samples, "
            f"order={form}, device={str(self.device)!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Travel as NumPy: a worker process must meet no live device memory."""
        state = self.__dict__.copy()
        state["order"] = None if self.order is None else arrays.to_numpy(self.order)
        state["device"] = HOST
        return state


def _places(starts: Int64, counts: Int64) -> Int64:
    """Return the places of runs, end to end: int64, shape (sum of counts,)."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(starts - offsets, counts) + np.arange(int(counts.sum()))


def _read_only(table: Int64) -> Int64:
    view = table.view()
    view.flags.writeable = False
    return view
