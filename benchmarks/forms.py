"""What ours runs on, on the host: C or NumPy, chosen for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gpusampler.permutation import _native

MODULE = _native.module
FORMS = ("NumPy",) if MODULE is None else ("NumPy", "C")
"""The forms that there are: C only where the package was compiled."""


def names() -> list[str]:
    """Return what `evaluated_by` takes: the forms that there are, and those that C itself has."""
    return [*FORMS, *(() if MODULE is None else MODULE.forms())]


@contextmanager
def evaluated_by(name: str) -> Iterator[None]:
    """Group ids and evaluate batches by one of `names`; "C" is the form of C that is in use."""
    before = _native.module
    c_form = None if MODULE is None else MODULE.form()
    _native.module = None if name == "NumPy" else MODULE
    if name not in FORMS:
        MODULE.use(name)
    try:
        yield
    finally:
        _native.module = before
        if MODULE is not None:
            MODULE.use(c_form)
