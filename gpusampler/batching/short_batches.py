"""Short batches: what ``partial`` and ``min_partial`` make of samples that do not fill a batch."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from gpusampler.core.arrays import Int64
from gpusampler.core.text import short_repr
from gpusampler.core.validation import check_int

Partial = Literal["keep", "drop", "pad", "even"]
PARTIALS = ("keep", "drop", "pad", "even")


class BatchCuts(NamedTuple):
    """How groups are cut into batches: int64, shape (G,) each.

    The first ``larger`` of a group's ``batches`` have ``sizes + 1`` samples, the others ``sizes``,
    except the last one, which may be short.
    """

    batches: Int64
    sizes: Int64
    larger: Int64 | None


def cut_into_batches(counts: Int64, sizes: Int64, partial: str, min_partial: int) -> BatchCuts:
    """Cut groups of ``counts`` samples into batches of at most ``sizes >= 1`` samples.

    Batches with fewer than ``min_partial`` samples are left out.
    """
    if partial == "drop":
        return BatchCuts(counts // sizes, sizes, None)
    if partial != "even":
        full = np.where(sizes >= min_partial, counts // sizes, 0)
        return BatchCuts(full + (counts % sizes >= min_partial), sizes, None)
    batches = -(-counts // sizes)
    smaller, larger = np.divmod(counts, batches)
    # If the smaller batches are left out, only the larger ones remain, if those are large enough.
    is_left_out = smaller < min_partial
    remaining = np.where(smaller + 1 < min_partial, 0, larger)
    larger = np.where(is_left_out, 0, larger)
    return BatchCuts(
        np.where(is_left_out, remaining, batches),
        smaller + is_left_out,
        larger if bool(larger.any()) else None,
    )


def check_min_partial(value: Any, partial: str) -> int:
    """Return ``min_partial``, or raise if it is not an integer >= 1 or has no effect."""
    min_partial = check_int(value, "min_partial", low=1, high=1 << 31)
    if min_partial > 1 and partial not in ("keep", "even"):
        raise ValueError(
            f"min_partial must be 1 under partial={partial!r}, got {short_repr(value)}: only "
            "partial='keep' and 'even' have short batches"
        )
    return min_partial


def returned_sizes(sizes: Int64, lengths: Int64, *, pad: bool) -> Int64:
    """Return the number of samples in returned batches with ``lengths`` valid samples.

    With ``pad`` this is the batch size, because padding repeats samples of the patch.
    """
    return sizes if pad else np.minimum(sizes, lengths)
