"""Samples grouped by patch: who belongs together, sorted once, on the device the ids are on.

`PatchGroups` is the only thing that is as large as the dataset, and it is 4 bytes a sample: the
sample numbers sorted stably by patch. Where the samples of every patch lie side by side already,
in whatever order of patches, it is not there at all.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Sequence
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
from gpusampler.groups.index_format import MappedFile
from gpusampler.sources.dispatch import read_patch_ids


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
    names : tuple of str, optional
        Where patches have names: a patch id is a place in these.

    Attributes
    ----------
    patch_ids, counts, starts : int64 NumPy arrays, shape (G,)
    names : tuple of str, or None
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
        names: tuple[str, ...] | None = None,
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
        self.source_size = source_size
        self._num_samples = int(counts.sum())
        self._fingerprint = fingerprint
        self._signature: dict[str, Any] | None = None

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
            Patch id of each sample, in anything that `read_patch_ids` takes: any int64 values,
            negative and sparse ones included, or names. Read in blocks, twice; not kept.
        column : str, optional
            As for `read_patch_ids`.
        path : str or os.PathLike, optional
            Keep the groups in an index file there, for more samples than fit in memory, and so that
            the next run opens it at once: it is made, or gone on with after this process was
            killed, or, if it is there and of these ids, opened. Of several processes one works, the
            others wait.
        progress : bool
            Show bars where it takes more than a second; never where stderr is no terminal.

        Returns
        -------
        PatchGroups
            On the device of ``ids``; with ``path``, on the host, the order mapped from the file.

        Raises
        ------
        TypeError
            If ``ids`` are neither integers (booleans and floats are none) nor names.
        ValueError
            If ``ids`` are not 1-D, are empty, do not fit in int64, or a patch has 2**31 samples; or
            ``path`` has an index of other ids (compared as by `load`, and whole where they lie in
            no file that has a time), or another file.
        OSError
            If a file cannot be read, or the disk has no room for an index.
        RuntimeError
            If the ids change meanwhile, or a library is missing.

        Warns
        -----
        UserWarning
            If this takes more than half of the free memory, or a GPU's does not suffice, so that
            the host groups instead.
        """
        progress = validation.check_bool(progress, "progress")
        # Before ids are read, which may take minutes.
        target = None if path is None else validation.check_path(path)
        source_ids = read_patch_ids(ids, column, progress=progress)
        if target is not None:
            build(source_ids, target, progress=progress)
            return cls._from_index(target, True, progress)
        patch_ids, counts, starts, order, id_fingerprint = group_ids(source_ids, progress=progress)
        device = source_ids.device
        if order is not None and device.on_host:
            order = arrays.to_device(order, device)
        groups = cls(
            patch_ids,
            counts,
            starts,
            order,
            source_size=source_ids.size,
            device=device,
            fingerprint=id_fingerprint,
            names=source_ids.names,
        )
        groups._signature = verification.signature_of(source_ids)
        return groups

    def save(self, path: str | os.PathLike[str], *, progress: bool = True) -> None:
        """Write the groups to an index file, which `load` opens in milliseconds.

        What is there is replaced when the new file is whole and on the disk, and not before.

        Parameters
        ----------
        path : str or os.PathLike
        progress : bool
            Show a bar if it takes more than a second.

        Raises
        ------
        ValueError
            If there is a file that is no index.
        OSError
            If there is no room or no permission; what was there is there still.
        """
        validation.check_bool(progress, "progress")
        target = validation.check_path(path)
        index_format.check_path_is_free(target)
        contents = index_format.IndexContents(
            self.patch_ids,
            self.counts,
            self.starts,
            self.names,
            source_size=self.source_size,
            fingerprint=self._id_fingerprint(),
            signature=self._signature,
        )
        index_format.write_index(target, contents, self._host_order, progress=progress)

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
        """Open an index file that `save`, or `from_ids` with a path, has written.

        Parameters
        ----------
        path : str or os.PathLike
        source : object, optional
            The ids that it was made of, in anything that `read_patch_ids` takes: an index of others
            is refused. Their length, type and names, the time of their file and some blocks of
            them, spread over all, are compared.
        column : str, optional
            As for `read_patch_ids`.
        mmap : bool
            Leave the order in the file, mapped into memory, which the system reads where it is used
            and lets go of as it likes; False reads it now.
        verify : bool
            Compare all ids with the index, by hashes, and the index with what it was saved as:
            reads everything once, and does not ask when a file was changed. `save` then notes the
            time that the file has now, so that it is opened without this again.
        progress : bool
            Show bars where it takes more than a second.

        Returns
        -------
        PatchGroups
            On the host.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no index, is cut off or damaged, or is of other ids.

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
        groups = cls._from_index(validation.check_path(path), mmap, progress)
        if verify:
            groups._verify_order(path, progress)
        if source is None:
            return groups
        ids = read_patch_ids(source, column, progress=progress)
        differs = None
        if groups._signature is not None:
            differs = verification.difference(groups._signature, ids, all_compared=verify)
        elif not verify:
            differs = "ids that it knows nothing of (verify=True compares all of them)"
        elif groups.source_size != ids.size:
            differs = f"{groups.source_size} samples, got {ids.size}"
        elif groups.names != ids.names:
            differs = "patches of other names"
        if differs is None and verify:
            current = verification.fingerprint_ids(ids, groups._sample_mask(), progress=progress)
            differs = None if current == groups._id_fingerprint() else "other ids"
        if differs is not None:
            raise ValueError(f"source must be the ids that {path} was made of, which are {differs}")
        if verify and groups._signature is not None and ids.modified is not None:
            # All ids were compared: what is saved from here on is of the file as it is now.
            groups._signature = verification.signature_of(ids)
        return groups

    @classmethod
    def _from_index(cls, path: Path, mapped: bool, progress: bool) -> PatchGroups:
        contents, order = index_format.read_index(path, mapped=mapped, progress=progress)
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
        """Return which samples of the dataset these are, None if all."""
        if self.num_samples == self.source_size:
            return None
        mask = np.zeros(self.source_size, np.bool_)
        order = self._host_order
        mask[subsets.expand_runs(self.starts, self.counts) if order is None else order] = True
        return mask

    def _verify_order(self, path: Any, progress: bool) -> None:
        """Raise ValueError unless an index is what it was saved as."""
        current = verification.fingerprint_order(
            self.patch_ids, self.counts, self.starts, self._host_order, progress=progress
        )
        if current != self._fingerprint:
            raise ValueError(f"{path} must hold what it was saved with, got a damaged order")

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
        patch_ids : sequence or integer array, or sequence of str, shape (P,), optional
            Their ids or names, distinct, in any order. Default 0 .. P-1.

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
        sizes = validation.as_int64(counts, "counts")
        ids, names = _ids_and_names(patch_ids, sizes.size)
        if ids.size != sizes.size:
            raise ValueError(f"patch_ids must be as many as counts ({sizes.size}), got {ids.size}")
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
        return cls(ids[groups], sizes[groups], starts[groups], None, source_size=size, names=names)

    @property
    def order(self) -> Any:
        """Samples sorted stably by patch, on `device`: int32 or int64, shape (N,), or None.

        None where every patch is one run of consecutive samples.

        Raises
        ------
        OSError
            If it is mapped from a file that was written to or cut off since it was opened.
        """
        return self._order.order if isinstance(self._order, MappedFile) else self._order

    @property
    def _host_order(self) -> NDArray[Any] | None:
        """`order` as NumPy."""
        order = self.order
        return None if order is None else arrays.to_numpy(order)

    @property
    def _unchecked_order(self) -> Any:
        """`order`, for who asks of which type and how large it is, without a look at its file."""
        return self._order.unchecked_order if isinstance(self._order, MappedFile) else self._order

    @property
    def labels(self) -> NDArray[Any]:
        """What the user calls the patches: `patch_ids`, or an array of their names, shape (G,)."""
        if self.names is None:
            return self.patch_ids
        # Python's own strings: handed out batch by batch, they are not made anew.
        labels = np.empty(self.num_patches, object)
        labels[:] = [self.names[i] for i in self.patch_ids.tolist()]
        return labels

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
        return np.append(0, np.cumsum(self.counts))

    @property
    def is_contiguous(self) -> bool:
        """Whether every patch is one run of consecutive samples, so that no order is kept."""
        return self._order is None

    @property
    def nbytes(self) -> int:
        """Bytes kept, on host and device."""
        order_bytes = int(getattr(self._unchecked_order, "nbytes", 0))
        return self.patch_ids.nbytes + self.counts.nbytes + self.starts.nbytes + order_bytes

    @property
    def fingerprint(self) -> int:
        """64-bit number that depends on which sample has which patch id, and on nothing else."""
        if self.names is None:
            return self._id_fingerprint()
        names_fingerprint = fingerprint.of_names(self.labels.tolist())
        return fingerprint.combine(self._id_fingerprint(), names_fingerprint)

    def _id_fingerprint(self) -> int:
        """Return the fingerprint of the ids alone, whatever their names."""
        if self._fingerprint is None:
            order = self._host_order
            if order is None:
                self._fingerprint = fingerprint.of_runs(self.patch_ids, self.starts, self.counts)
            else:
                self._fingerprint = fingerprint.of_order(self.patch_ids, self.counts, order)
        return self._fingerprint

    def samples_of(self, patch_id: int | str) -> Int64:
        """Return the samples of one patch, ascending, as a host int64 array.

        Raises
        ------
        KeyError
            If there is no such patch.
        TypeError, ValueError
            If ``patch_id`` is no int64 integer, or no str where patches have names.
        """
        group = self._find_group(patch_id)
        if group is None:
            raise KeyError(
                f"patch_id must be one of the {self.num_patches} patches, got {patch_id!r}"
            )
        start, count = int(self.starts[group]), int(self.counts[group])
        if self.order is None:
            return np.arange(start, start + count, dtype=np.int64)
        return arrays.to_numpy(self.order[start : start + count]).astype(np.int64)

    def _find_group(self, patch_id: int | str) -> int | None:
        """Return the place of a patch among the sorted ones, or None."""
        if self.names is not None:
            if not isinstance(patch_id, str):
                raise TypeError(f"patch_id must be a str, got {patch_id!r}")
            position = bisect_left(self.names, patch_id)
            if position == len(self.names) or self.names[position] != patch_id:
                return None
            patch_id = position
        number = validation.check_int(patch_id, "patch_id", low=-(1 << 63), high=1 << 63)
        group = int(np.searchsorted(self.patch_ids, number))
        is_present = group < self.num_patches and int(self.patch_ids[group]) == number
        return group if is_present else None

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
        shares = subsets.check_fractions(fractions)
        seed = validation.check_seed(seed)
        validation.check_choice(by, "by", ("patch", "sample"))
        if by == "patch":
            parts = subsets.split_patches(self.num_patches, shares, seed)
        else:
            parts = subsets.split_samples(self.counts, self.starts, self._host_order, shares, seed)
        for part, share in zip(parts, shares.tolist(), strict=True):
            if part.size == 0:
                raise ValueError(
                    f"fractions must leave no part empty, got {share:g} of "
                    f"{self.num_patches} patches and {self.num_samples} samples by {by}"
                )
        return [self._take_patches(part) if by == "patch" else self.select(part) for part in parts]

    def _take_patches(self, groups: Int64) -> PatchGroups:
        """Keep whole patches."""
        counts, starts, order = self.counts[groups], self.starts[groups], self._host_order
        if order is not None:
            starts, order = np.cumsum(counts) - counts, order[subsets.expand_runs(starts, counts)]
        return self._make_subset(groups, counts, starts, order)

    def _make_subset(self, groups: Int64, counts: Int64, starts: Int64, order: Any) -> PatchGroups:
        if order is not None:
            narrow = np.int32 if self.source_size < INT32_SAMPLES else np.int64
            order = arrays.to_device(order.astype(narrow, copy=False), self.device)
        return PatchGroups(
            self.patch_ids[groups],
            counts,
            starts,
            order,
            source_size=self.source_size,
            device=self.device,
            names=self.names,
        )

    def __repr__(self) -> str:
        """Return sizes, form and device."""
        form = "contiguous" if self.is_contiguous else arrays.dtype_name(self._unchecked_order)
        return (
            f"PatchGroups({self.num_patches} patches, {self.num_samples} samples, "
            f"order={form}, device={str(self.device)!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Travel as NumPy, or as the file's path: a worker must meet no live device memory."""
        state = self.__dict__.copy()
        if self._order is not None and not isinstance(self._order, MappedFile):
            state["_order"] = arrays.to_numpy(self._order)
        state["device"] = HOST
        return state


def _ids_and_names(patch_ids: Any, size: int) -> tuple[Int64, tuple[str, ...] | None]:
    """Return ids that were given as integers, as names or not at all."""
    if patch_ids is None:
        return np.arange(size, dtype=np.int64), None
    if isinstance(patch_ids, (list, tuple)) and any(isinstance(p, str) for p in patch_ids):
        ids = read_patch_ids(patch_ids)
        return ids.read(0, ids.size).astype(np.int64), ids.names
    return validation.as_int64(patch_ids, "patch_ids"), None


def _read_only(table: Int64) -> Int64:
    view = table.view()
    view.flags.writeable = False
    return view
