"""Patch ids that are names, encoded block by block as indices into the sorted names.

A name is a string, or any other key that hashes and sorts, such as a tuple of integers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpusampler.core import arrays
from gpusampler.core.progress_bar import ProgressBar
from gpusampler.core.text import short_repr
from gpusampler.sources.base import BLOCK, Load, PatchIds
from gpusampler.sources.checks import check_key, is_key, is_missing, raise_missing

Factorized = tuple[NDArray[Any], Sequence[Any]]
"""(codes, labels): an index per sample into labels, which may be unsorted or unused."""


READ_BYTES = 1 << 26
"""Default number of bytes per read of values that are wider than integers."""

MAX_BYTES = 1 << 30
"""Maximum number of bytes that a file may require to be read at once: of a chunk or a string."""


class NamedIds(PatchIds):
    """Names from ``factorize(start, stop)``, a `Factorized`; it raises if a name is missing.

    All names are read once, with a bar if ``progress``, and only the distinct ones are stored.

    Examples
    --------
    >>> names = ["sand", "clay", "sand"]
    >>> ids = NamedIds(lambda start, stop: factorize_list(names[start:stop], start), 3)
    >>> ids.names, ids.read(0, 3).tolist()
    (('clay', 'sand'), [1, 0, 1])
    """

    dtype = "str"

    def __init__(
        self,
        factorize: Callable[[int, int], Factorized],
        size: int,
        *,
        modified: int | None = None,
        seekable: bool = True,
        progress: bool = False,
    ) -> None:
        self._factorize = factorize
        self.size = size
        self.modified = modified
        self.seekable = seekable
        names: set[Any] = set()
        with ProgressBar(size, "patch names", "samples", progress) as bar:
            for start in range(0, size, BLOCK):
                stop = min(start + BLOCK, size)
                codes, labels = factorize(start, stop)
                names.update(labels[i] for i in used_codes(codes, len(labels)))
                bar.update(stop - start)
        self.names = sort_names(names)
        self._id_of_name = {name: i for i, name in enumerate(self.names)}
        self._id_dtype = np.dtype(arrays.narrowest_dtype("numpy", len(self.names))[0])

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the name indices of samples ``start .. stop - 1``; see `PatchIds.read`."""
        if start == stop:
            return np.empty(0, self._id_dtype)
        codes, labels = self._factorize(start, stop)
        id_of_label = np.array([self._id_of_name.get(label, -1) for label in labels], np.int64)
        ids = id_of_label[codes]
        if ids.min() < 0:
            i = int(ids.argmin())
            raise OSError(
                "source must not change while it is read, got the new name "
                f"{labels[int(codes[i])]!r} in sample {start + i}"
            )
        return ids.astype(self._id_dtype)


class CategoricalIds(PatchIds):
    """Names from an in-memory index per sample, shape (N,), into distinct ``labels`` in any order.

    Unused labels are dropped.
    """

    dtype = "str"

    def __init__(self, codes: NDArray[Any], labels: Sequence[Any]) -> None:
        self.size = int(codes.shape[0])
        used = used_codes(codes, len(labels))
        self.names = sort_names(labels[i] for i in used)
        id_of_name = {name: i for i, name in enumerate(self.names)}
        id_of_label = np.zeros(len(labels), arrays.narrowest_dtype("numpy", len(self.names))[0])
        id_of_label[used] = [id_of_name[labels[i]] for i in used]
        self._ids = id_of_label[codes]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the name indices of samples ``start .. stop - 1``."""
        ids: NDArray[Any] = self._ids[start:stop]
        return ids


def used_codes(codes: NDArray[Any], num_labels: int) -> NDArray[np.int64]:
    """Return the distinct codes, below ``num_labels``, in ascending order."""
    is_used = np.zeros(num_labels, np.bool_)
    is_used[codes] = True
    return np.flatnonzero(is_used)


def sort_names(names: Iterable[Any]) -> tuple[Any, ...]:
    """Return names in ascending order; raise TypeError if two of them cannot be compared."""
    try:
        return tuple(sorted(names))
    except TypeError as error:
        raise TypeError(
            f"ids must be of one type, whose values sort: {error}; convert them to one type, such "
            "as [str(key) for key in ids]"
        ) from error


def find_name(names: tuple[Any, ...], name: Any) -> int | None:
    """Return the index of a name, or None; raise TypeError for another key among strings."""
    if isinstance(names[0], str) and not isinstance(name, str):
        raise TypeError(f"patch_id must be a str, got {name!r}")
    try:
        index = bisect_left(names, name)
    except TypeError:
        # The name cannot be compared with the others, so it is none of them.
        return None
    return index if index < len(names) and names[index] == name else None


def fixed_width_factorizer(
    load: Load, dtype: np.dtype[Any], label: str
) -> Callable[[int, int], Factorized]:
    """Return ``factorize(start, stop)`` of strings that `load` returns as an array of a dtype.

    It loads at most `READ_BYTES` at once. Raises ValueError if one string has over `MAX_BYTES`.
    """
    if dtype.itemsize > MAX_BYTES:
        raise ValueError(
            f"a string must have at most {MAX_BYTES} bytes, got {dtype.itemsize} in {label}"
        )
    num_rows = max(READ_BYTES // dtype.itemsize, 1)

    def factorize(start: int, stop: int) -> Factorized:
        codes = np.empty(stop - start, np.int64)
        code_of_label: dict[Any, int] = {}
        for first in range(start, stop, num_rows):
            last = min(first + num_rows, stop)
            values = load(first, last)
            try:
                texts = values.tolist()
            # NumPy raises SystemError for a code point above U+10FFFF.
            except (SystemError, ValueError) as error:
                raise ValueError(
                    f"ids must be Unicode, got other bytes in samples {first} .. {last - 1} of "
                    f"{label}: {error}"
                ) from error
            piece, labels = factorize_list(texts, first)
            new_codes = [code_of_label.setdefault(name, len(code_of_label)) for name in labels]
            codes[first - start : last - start] = np.array(new_codes, np.int64)[piece]
        return codes, list(code_of_label)

    return factorize


def factorize_list(values: list[Any], first: int) -> Factorized:
    """Factorize a list of names: str, UTF-8 bytes, or other keys."""
    if not all(issubclass(t, (str, bytes)) for t in set(map(type, values))):
        if is_key(values[0]) and not isinstance(values[0], (str, bytes)):
            return _factorize_keys(values, first)
        for i, value in enumerate(values):
            if is_missing(value):
                raise_missing(first + i)
            if not isinstance(value, (str, bytes)):
                raise TypeError(
                    f"ids must be all strings or all integers, got {short_repr(value)} in sample "
                    f"{first + i}; convert them to one type"
                )
    code_of_value = dict.fromkeys(values)
    labels = []
    for code, value in enumerate(code_of_value):
        code_of_value[value] = code
        try:
            # str(value) of an Enum member is not its value.
            labels.append(value.decode() if isinstance(value, bytes) else str.__str__(value))
        except UnicodeDecodeError:
            sample = first + values.index(value)
            raise ValueError(
                f"ids must be UTF-8, got {short_repr(value)} in sample {sample}"
            ) from None
    codes = np.fromiter(map(code_of_value.__getitem__, values), np.int64, len(values))
    return codes, labels


def _factorize_keys(keys: list[Any], first: int) -> Factorized:
    code_of_key: dict[Any, int] = {}
    codes = np.empty(len(keys), np.int64)
    for i, key in enumerate(keys):
        try:
            codes[i] = code_of_key[key]
            continue
        except (KeyError, TypeError):
            # New, or without a hash: checked once per distinct key, not once per sample.
            check_key(key, first + i)
        if isinstance(key, (str, bytes)) or not is_key(key):
            raise TypeError(
                f"ids must be all keys of one type, got {short_repr(key)} in sample {first + i}; "
                "convert them to one type"
            )
        codes[i] = code_of_key[key] = len(code_of_key)
    return codes, list(code_of_key)
