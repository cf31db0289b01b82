"""Samples grouped by patch: sorted once, on a device or on the host.

Only the order of a `PatchGroups` is as large as the dataset: sample indices sorted stably by patch,
4 bytes per sample. If every patch is one run of consecutive samples, no order is stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays, validation
from gpusampler.core.arrays import Int64
from gpusampler.core.devices import HOST, Device
from gpusampler.core.text import short_repr
from gpusampler.groups import fingerprint, index_format, subsets, verification
from gpusampler.groups.census import check_patch_sizes, label_of
from gpusampler.groups.counting_sort import INT32_SAMPLES, group_ids
from gpusampler.groups.index_build import build
from gpusampler.groups.verified_order import VerifiedOrder, block_sums
from gpusampler.sources.base import HostIds, PatchIds
from gpusampler.sources.checks import is_key
from gpusampler.sources.dispatch import read_patch_ids
from gpusampler.sources.strings import find_name


class PatchGroups:
    """The samples of a dataset, grouped by patch.

    Create it with `from_ids`, `from_counts` or `load`. Immutable.

    Parameters
    ----------
    patch_ids : int64 array, shape (G,)
        Distinct patch ids in ascending order.
    counts : int64 array, shape (G,)
        Number of samples of each patch, 1 .. 2**31 - 1.
    starts : int64 array, shape (G,)
        Offset of each patch in ``order``, or its first sample if ``order`` is None.
    order : int32 or int64 array, shape (N,), or None
        Sample indices sorted stably by patch, on any device.
    source_size : int
        Number of samples in the dataset; larger than N after `select`.
    device : Device
        Device of ``order``.
    fingerprint : int, optional
        Fingerprint of the ids, if known. Default: computed when needed.
    names : tuple, optional
        Names of patches, sorted; a patch id is an index into them.

    Attributes
    ----------
    patch_ids, counts, starts : int64 NumPy arrays, shape (G,)
    names : tuple, or None
    device : Device
        Device of ``order``, or of the ids if ``order`` is None.
    grouped_on : Device or None
        Where `from_ids` grouped the ids; None for other groups.

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
        names: tuple[Any, ...] | None = None,
    ) -> None:
        if counts.size == 0:
            raise ValueError("counts must hold at least one patch, got none")
        check_patch_sizes(patch_ids, counts, names)
        self.patch_ids = _read_only(patch_ids)
        self.counts = _read_only(counts)
        self.starts = _read_only(starts)
        self.names = names
        self._order = order
        self.device = device
        self.grouped_on: Device | None = None
        self.source_size = source_size
        self._num_samples = int(counts.sum())
        self._fingerprint = fingerprint
        self._signature: dict[str, Any] | None = None
        # Ids of the datasets that these samples are a part of.
        self._wholes: tuple[PatchIds, ...] = ()

    @classmethod
    def from_ids(
        cls,
        ids: Any,
        column: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> PatchGroups:
        """Group samples by their patch ids.

        Parameters
        ----------
        ids : array, sequence, path, column, table or dataset
            Patch id of each sample, in any form that `read_patch_ids` accepts: int64 values,
            including negative and sparse ones, or strings. Read twice, in blocks, and not stored.
        column : str, optional
            As in `read_patch_ids`.
        path : str or os.PathLike, optional
            Index file, for more samples than fit in memory and for a fast start of the next run.
            An existing index of these ids is opened, an interrupted build is resumed, otherwise the
            index is built. If several processes call this, one builds and the others wait.
        progress : bool
            Show a progress bar after one second, if stderr is a terminal.

        Returns
        -------
        PatchGroups
            On the device of ``ids``; with ``path``, on the host, with memory-mapped sample indices.

        Raises
        ------
        TypeError
            If ``ids`` are neither integers nor strings; booleans and floats are rejected.
        ValueError
            If ``ids`` are not 1-D, are empty or do not fit in int64; if a patch has 2**31 samples
            or more; or if ``path`` is a file other than an index of these ids. Ids are compared as
            in `load`, and completely if they have no modification time.
        OSError
            If a file cannot be read, or the disk has no space for the index.
        RuntimeError
            If the ids change during grouping, or a library is missing.

        Warns
        -----
        UserWarning
            If this takes more than half of the free memory, or if a GPU runs out of memory and
            the host groups instead.
        """
        progress = validation.check_bool(progress, "progress")
        # Checked before the ids are read, which may take minutes.
        target = None if path is None else validation.check_path(path)
        source_ids = read_patch_ids(ids, column, progress=progress)
        if target is not None:
            build(source_ids, target, progress=progress)
            return cls._from_index(target, True, progress)
        result = group_ids(source_ids, progress=progress)
        device = source_ids.grouping_device
        if result.order is not None and device.on_host:
            result = result._replace(order=arrays.to_device(result.order, device))
        groups = cls(
            *result[:4],
            source_size=source_ids.size,
            device=device,
            fingerprint=result.fingerprint,
            names=source_ids.names,
        )
        groups.grouped_on = result.device
        groups._signature = verification.signature_of(source_ids)
        groups._wholes = source_ids.wholes
        return groups

    def save(self, path: str | os.PathLike[str], *, progress: bool = True) -> None:
        """Write the groups to an index file, which `load` opens in milliseconds.

        The file is written atomically: an existing index is replaced only by a complete new one.

        Parameters
        ----------
        path : str or os.PathLike
        progress : bool
            Show a progress bar after one second, if stderr is a terminal.

        Raises
        ------
        ValueError
            If ``path`` is a file other than an index.
        OSError
            If the file cannot be written; an existing index remains unchanged.
        """
        validation.check_bool(progress, "progress")
        target = validation.check_path(path)
        index_format.check_path_is_free(target)
        order = self._host_order
        contents = index_format.IndexContents(
            self.patch_ids,
            self.counts,
            self.starts,
            self.names,
            source_size=self.source_size,
            fingerprint=self._id_fingerprint(),
            signature=self._signature,
            order_sums=block_sums(order),
        )
        index_format.write_index(target, contents, order, progress=progress)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        source: Any = None,
        column: Any = None,
        *,
        mmap: bool = True,
        verify: bool = False,
        progress: bool = True,
    ) -> PatchGroups:
        """Open an index file written by `save` or by `from_ids` with a path.

        Parameters
        ----------
        path : str or os.PathLike
        source : object, optional
            Expected ids, in any form that `read_patch_ids` accepts; raise ValueError if the index
            was built from different ids. By default this compares length, dtype, names,
            modification time and up to 64 evenly spaced blocks, so it can miss an edit.
        column : str, optional
            As in `read_patch_ids`.
        mmap : bool
            Map the sample indices into memory and read them on demand. False reads all now.
        verify : bool
            Compare the fingerprints of all ids and of the whole index instead of modification
            times; reads everything once. A following `save` stores the current modification time,
            so that later calls need no ``verify``. Without it, the header and the tables are
            checked now, and the blocks of a mapped order when they are first used: a damaged block
            then raises ValueError.
        progress : bool
            Show a progress bar after one second, if stderr is a terminal.

        Returns
        -------
        PatchGroups
            On the host.

        Raises
        ------
        FileNotFoundError
            If ``path`` does not exist.
        ValueError
            If the file is not an index, is truncated or damaged, or indexes different ids.

        Examples
        --------
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "ids.index")
        >>> PatchGroups.from_ids([7, -1, 7, 7, -1]).save(path)
        >>> PatchGroups.load(path, source=[7, -1, 7, 7, -1]).order.tolist()
        [1, 4, 0, 2, 3]
        """
        validation.check_bool(mmap, "mmap"), validation.check_bool(progress, "progress")
        validation.check_bool(verify, "verify")
        if source is None and column is not None:
            raise ValueError(f"column must be None without a source, got {short_repr(column)}")
        groups = cls._from_index(validation.check_path(path), mmap, progress, verify)
        if source is None:
            return groups
        ids = read_patch_ids(source, column, progress=progress)
        differs = None
        if groups._signature is not None:
            differs = verification.difference(groups._signature, ids, all_compared=verify)
        elif not verify:
            differs = "the index does not record its source; pass verify=True to compare all ids"
        elif groups.source_size != ids.size:
            differs = f"the index has {groups.source_size} samples, the ids {ids.size}"
        elif groups.names != ids.names:
            differs = "the patch names differ"
        if differs is None and verify:
            current = verification.fingerprint_ids(ids, groups._sample_mask(), progress=progress)
            differs = None if current == groups._id_fingerprint() else "fingerprints differ"
        if differs is not None:
            raise ValueError(f"source must match the index {path}: {differs}")
        if verify and groups._signature is not None and ids.modified is not None:
            # All ids match, so `save` may store the current modification time.
            groups._signature = verification.signature_of(ids)
        return groups

    @classmethod
    def _from_index(
        cls, path: Path, mapped: bool, progress: bool, verify: bool = False
    ) -> PatchGroups:
        contents, order = index_format.read_index(
            path, mapped=mapped, verify=verify, progress=progress
        )
        groups = cls(
            contents.patch_ids,
            contents.counts,
            contents.starts,
            order,
            source_size=contents.source_size,
            fingerprint=contents.fingerprint,
            names=contents.names,
        )
        groups._signature = contents.signature
        return groups

    def _sample_mask(self) -> NDArray[np.bool_] | None:
        """Return a mask of the dataset's samples that are in these groups, or None if all are."""
        if self.num_samples == self.source_size:
            return None
        mask = np.zeros(self.source_size, np.bool_)
        order = self._host_order
        mask[subsets.expand_runs(self.starts, self.counts) if order is None else order] = True
        return mask

    @classmethod
    def from_counts(
        cls, counts: Sequence[int] | NDArray[Any] | Mapping[Any, int], patch_ids: Any = None
    ) -> PatchGroups:
        """Group samples that are stored patch after patch, given the number in each patch.

        Memory grows with the number of patches, not of samples: 1e12 samples take kilobytes.

        Parameters
        ----------
        counts : sequence or integer array, shape (P,), mapping or pandas Series
            Number of samples of each patch, in storage order. Patches with 0 samples are omitted.
            The keys of a mapping, or the index of a Series, are the patch ids or names.
        patch_ids : sequence or array of integers or names, shape (P,), optional
            Distinct ids or names of the patches, in any order. Default: the keys of ``counts``,
            else 0 .. P-1. Not with a mapping; with a Series, they replace its index.

        Returns
        -------
        PatchGroups

        Raises
        ------
        TypeError
            If ``counts`` are not integers, or ``patch_ids`` neither integers nor names.
        ValueError
            If the arguments are not 1-D or differ in length, both give patch ids, a count is
            negative or 2**31 or more, all counts are 0, ids repeat, or the counts sum to 2**62 or
            more.
        """
        if isinstance(counts, Mapping) and patch_ids is not None:
            raise ValueError(
                "patch_ids must be None if counts is a mapping, whose keys are the patch ids, got "
                f"{short_repr(patch_ids)}"
            )
        numbers: Any = counts
        if patch_ids is None and validation.is_mapping(numbers):
            patch_ids = list(numbers.keys())
        if isinstance(numbers, Mapping):
            numbers = list(numbers.values())
        sizes = validation.as_int64(numbers, "counts")
        ids, names = _ids_and_names(patch_ids, sizes.size)
        if ids.size != sizes.size:
            raise ValueError(f"patch_ids must be as long as counts ({sizes.size}), got {ids.size}")
        if sizes.size and int(sizes.min()) < 0:
            raise ValueError(f"counts must be >= 0, got {int(sizes.min())}")
        id_order = np.argsort(ids, kind="stable")
        repeats = np.flatnonzero(np.diff(ids[id_order]) == 0)
        if repeats.size:
            label = label_of(ids[id_order][repeats[0]], names)
            raise ValueError(f"patch_ids must be distinct, got {label!r} twice")
        total = float(sizes.astype(np.float64).sum())
        if total >= 2.0**62:
            raise ValueError(f"counts must add up to less than 2**62 samples, got {total:g}")
        starts = np.cumsum(sizes) - sizes
        groups = id_order[sizes[id_order] > 0]
        if groups.size == 0:
            raise ValueError("counts must add up to at least one sample, got none")
        size = int(sizes.sum())
        result = cls(
            ids[groups], sizes[groups], starts[groups], None, source_size=size, names=names
        )
        if groups.size < ids.size:
            result._wholes = (HostIds(ids, names),)
        return result

    @property
    def order(self) -> Any:
        """Sample indices sorted stably by patch, on `device`: int32 or int64, shape (N,), or None.

        None if every patch is one run of consecutive samples. An order that is mapped from a file
        is verified as a whole when it is first returned.

        Raises
        ------
        OSError
            If the order is mapped from a file that has changed since it was opened.
        ValueError
            If the order is mapped from a damaged file.
        """
        return self._order.whole() if isinstance(self._order, VerifiedOrder) else self._order

    @property
    def _host_order(self) -> NDArray[Any] | None:
        """`order` as NumPy."""
        order = self.order
        return None if order is None else arrays.to_numpy(order)

    @property
    def _unchecked_order(self) -> Any:
        """`order` without any check; use it only for dtype and size."""
        order = self._order
        return order.unchecked_order if isinstance(order, VerifiedOrder) else order

    @property
    def _needs_verification(self) -> bool:
        """Whether blocks of the order's file are not verified yet."""
        return isinstance(self._order, VerifiedOrder) and not self._order.is_verified

    @property
    def _order_to_look_up(self) -> Any:
        """`order`, or a `VerifiedOrder` while some of its blocks are not verified."""
        return self._order if self._needs_verification else self.order

    def _samples_between(self, start: int, stop: int) -> Int64:
        """Return the samples at positions ``start .. stop - 1`` of all patches, on the host."""
        if self._order is None:
            return np.arange(start, stop, dtype=np.int64)
        if isinstance(self._order, VerifiedOrder):
            samples = self._order.read(start, stop)
        else:
            samples = self._order[start:stop]
        return arrays.to_numpy(samples).astype(np.int64)

    @property
    def labels(self) -> NDArray[Any]:
        """Names of the patches, or `patch_ids` if they have no names: shape (G,)."""
        if self.names is None:
            return self.patch_ids
        # An object array does not copy the strings, and has tuples as elements.
        names = (self.names[i] for i in self.patch_ids.tolist())
        return np.fromiter(names, object, self.num_patches)

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
        """Offsets of the patches in the samples sorted by patch: int64, shape (G + 1,)."""
        return np.append(0, np.cumsum(self.counts))

    @property
    def is_contiguous(self) -> bool:
        """Whether every patch is one run of consecutive samples, so `order` is None."""
        return self._order is None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, on host and device."""
        order_bytes = int(getattr(self._unchecked_order, "nbytes", 0))
        return self.patch_ids.nbytes + self.counts.nbytes + self.starts.nbytes + order_bytes

    @property
    def fingerprint(self) -> int:
        """64-bit hash of every sample's patch id (or name); the same on every device."""
        if self.names is None:
            return self._id_fingerprint()
        names_fingerprint = fingerprint.of_names(self.labels.tolist())
        return fingerprint.combine(self._id_fingerprint(), names_fingerprint)

    def _id_fingerprint(self) -> int:
        """Return the fingerprint of the ids, without names."""
        if self._fingerprint is None:
            order = self._host_order
            if order is None:
                self._fingerprint = fingerprint.of_runs(self.patch_ids, self.starts, self.counts)
            else:
                self._fingerprint = fingerprint.of_order(self.patch_ids, self.counts, order)
        return self._fingerprint

    def samples_of(self, patch_id: Any) -> Int64:
        """Return the samples of one patch, ascending, as a host int64 array.

        Raises
        ------
        KeyError
            If the patch does not exist.
        TypeError, ValueError
            If ``patch_id`` is not an int64 integer, or not a str if names are strings.
        """
        group = self._find_group(patch_id)
        if group is None:
            raise KeyError(
                f"patch_id must be one of the {self.num_patches} patches, got {patch_id!r}"
            )
        start = int(self.starts[group])
        return self._samples_between(start, start + int(self.counts[group]))

    def _find_group(self, patch_id: Any) -> int | None:
        """Return the index of a patch in `patch_ids`, or None."""
        if self.names is not None:
            patch_id = find_name(self.names, patch_id)
            if patch_id is None:
                return None
        number = validation.check_int(patch_id, "patch_id", low=-(1 << 63), high=1 << 63)
        group = int(np.searchsorted(self.patch_ids, number))
        is_present = group < self.num_patches and int(self.patch_ids[group]) == number
        return group if is_present else None

    def unknown_patches(self, patch_ids: Iterable[Any]) -> list[Any]:
        """Return the given ids that are patches neither here nor in the dataset these are part of.

        ``patch_ids`` are names if patches have names.
        """
        unknown = set(patch_ids).difference(self.labels.tolist())
        for whole in self._wholes:
            if not unknown:
                break
            if whole.names is not None:
                unknown.difference_update(whole.names)
                continue
            for _, ids in whole.blocks():
                unknown.difference_update(np.unique(ids).tolist())
        return [patch_id for patch_id in patch_ids if patch_id in unknown]

    def select(self, indices: Any) -> PatchGroups:
        """Return the groups of a subset of samples, with unchanged indices and patch ids.

        Parameters
        ----------
        indices : integer array or sequence, shape (K,), or boolean array, shape (source_size,)
            Samples to select: distinct indices in any order, or a mask.

        Returns
        -------
        PatchGroups
            On the same device, without patches that have no selected sample.

        Raises
        ------
        TypeError
            If ``indices`` are neither integers nor a mask.
        ValueError
            If ``indices`` are empty, repeat, or contain a sample outside these groups.
        """
        samples = subsets.check_indices(indices, self.source_size)
        order = self._host_order
        group = subsets.find_groups(samples, self.counts, self.starts, order, self.source_size)
        return self._make_subset(*subsets.sort_by_group(samples, group))

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
            Size of each part relative to the whole; each > 0, summing to 1.
        by : {"patch", "sample"}
            "patch" assigns whole patches, so no patch is in two parts; fractions refer to the
            number of patches. "sample" divides every patch by the fractions, within one sample.
        seed : int
            0 .. 2**64 - 1. The same seed gives the same parts on every device.

        Returns
        -------
        list of PatchGroups
            One for each fraction, with the original sample indices and patch ids.

        Raises
        ------
        ValueError
            If fractions are not > 0 or do not sum to 1, ``by`` is unknown, or a part is empty.
        """
        shares = subsets.check_fractions(fractions)
        seed = validation.check_seed(seed)
        validation.check_choice(by, "by", ("patch", "sample"))
        if by == "patch":
            parts = subsets.split_patches(self.num_patches, shares, seed)
        else:
            parts = subsets.split_samples(self.counts, self.starts, self._host_order, shares, seed)
        for part, share in zip(parts, shares.tolist(), strict=True):
            if part.size == 0:
                split = f"{self.num_patches} patches, {self.num_samples} samples"
                advice = " or by='sample'" if by == "patch" else ""
                raise ValueError(
                    f"a fraction of {share:g} gives an empty part when splitting {split} by {by}; "
                    f"use a larger fraction{advice}"
                )
        return [self._take_patches(part) if by == "patch" else self.select(part) for part in parts]

    def _take_patches(self, groups: Int64) -> PatchGroups:
        """Return the groups of whole patches, given by index."""
        counts, starts, order = self.counts[groups], self.starts[groups], self._host_order
        if order is not None:
            starts, order = np.cumsum(counts) - counts, order[subsets.expand_runs(starts, counts)]
        return self._make_subset(groups, counts, starts, order)

    def _make_subset(self, groups: Int64, counts: Int64, starts: Int64, order: Any) -> PatchGroups:
        if order is not None:
            narrow = np.int32 if self.source_size < INT32_SAMPLES else np.int64
            order = arrays.to_device(order.astype(narrow, copy=False), self.device)
        part = PatchGroups(
            self.patch_ids[groups],
            counts,
            starts,
            order,
            source_size=self.source_size,
            device=self.device,
            names=self.names,
        )
        part._wholes = (*self._wholes, HostIds(self.patch_ids, self.names))
        return part

    def __repr__(self) -> str:
        form = "contiguous" if self.is_contiguous else arrays.dtype_name(self._unchecked_order)
        return (
            f"PatchGroups({self.num_patches} patches, {self.num_samples} samples, "
            f"order={form}, device={str(self.device)!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as NumPy arrays, or as the path of the index, so workers get no device memory."""
        # The ids of a whole dataset may be large, or not picklable.
        wholes = tuple(ids for ids in self._wholes if isinstance(ids, HostIds))
        state = {**self.__dict__, "device": HOST, "_wholes": wholes}
        if self._order is not None and not isinstance(self._order, VerifiedOrder):
            state["_order"] = arrays.to_numpy(self._order)
        return state


def _ids_and_names(patch_ids: Any, size: int) -> tuple[Int64, tuple[Any, ...] | None]:
    """Return int64 ids and their names (None without names); default ids are 0 .. size-1."""
    if patch_ids is None:
        return np.arange(size, dtype=np.int64), None
    # Names in an array of strings or objects, or in a pandas Index.
    if getattr(getattr(patch_ids, "dtype", None), "kind", "i") in "OSTU":
        patch_ids = patch_ids.tolist()
    is_list = isinstance(patch_ids, (list, tuple))
    one_of_each_type = {type(p): p for p in patch_ids}.values() if is_list else ()
    if any(isinstance(p, Enum) or is_key(p) for p in one_of_each_type):
        ids = read_patch_ids(patch_ids)
        return ids.read(0, ids.size).astype(np.int64), ids.names
    return validation.as_int64(patch_ids, "patch_ids"), None


def _read_only(table: Int64) -> Int64:
    view = table.view()
    view.flags.writeable = False
    return view
