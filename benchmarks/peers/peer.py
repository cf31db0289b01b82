"""What a peer is: how its sampler is made, and why it is missing where it cannot be."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine


class Work(NamedTuple):
    """What a sampler is given: the samples' patches, as the peer's own documentation wants them.

    ``patch_of`` is the patch of each sample as the peer numbers them: where it is given data that
    lie patch after patch, samples are numbered so.
    """

    given: Any
    patch_of: np.ndarray
    batch_size: int


class Peer(NamedTuple):
    """A sampler under test.

    ``prepare`` puts ids into the form that ``make`` takes; its time and memory are not counted.
    ``package`` is the distribution and ``load`` imports it; None: nothing beyond torch is needed.
    ``given`` names that form for the tables. ``pure``: batches are promised to be of one patch.
    """

    name: str
    prepare: Callable[[np.ndarray, int], Work]
    make: Callable[[Work, int], Any]
    package: str | None = None
    load: Callable[[], Any] | None = None
    given: str = "ids"
    pure: bool = True
    note: str = ""
    drawn: bool = True
    """Whether the pictures show it: one of two that differ in an argument is enough there."""


def importer(module: str) -> Callable[[], Any]:
    """Return a call that imports a module."""
    return lambda: importlib.import_module(module)


def version(peer: Peer) -> str | None:
    """Return the version of a peer's package, None where it is not installed."""
    return "here" if peer.package is None else machine.version(peer.package)


def missing(peer: Peer) -> str | None:
    """Import what a peer needs; return why that cannot be done, or None."""
    found = version(peer)
    if found is None:
        return f"{peer.package} is not installed"
    if peer.load is None:
        return None
    try:
        with warnings.catch_warnings():
            # Of what they use themselves.
            warnings.simplefilter("ignore")
            peer.load()
    except Exception as error:
        # The table shows any error of the import as the reason.
        first = str(error).splitlines()[0] if str(error) else ""
        return f"{peer.package} {found} does not import: {type(error).__name__}: {first}"
    return None


def as_array(ids: np.ndarray, batch_size: int) -> Work:
    """Give the ids as they are."""
    return Work(ids, ids, batch_size)


def as_list(ids: np.ndarray, batch_size: int) -> Work:
    """Give the ids as a list of ints."""
    return Work(ids.tolist(), ids, batch_size)


def as_counts(ids: np.ndarray, batch_size: int) -> Work:
    """Give the number of samples of each patch: the samples lie patch after patch."""
    counts = np.bincount(ids)
    counts = counts[counts > 0]
    return Work(counts, np.repeat(np.arange(counts.size), counts), batch_size)
