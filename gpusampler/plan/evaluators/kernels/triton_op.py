"""The Triton kernel as an operator of torch, which torch.compile calls instead of tracing a plan.

Imported at first use only.
"""

# Annotations stay objects: torch makes the operator's schema of them.

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gpusampler.plan.evaluators.kernels import triton_batches
from gpusampler.plan.evaluators.kernels.kernel_spec import KernelSpec


@cache
def batch_operator() -> Any:
    """Return the operator that evaluates one batch; None if this torch cannot make one (2.5)."""
    if not hasattr(torch.library, "triton_op"):
        return None
    operator: Any = torch.library.triton_op("gpusampler::batch", batch, mutates_args=())
    return operator


def batch(
    epoch: Tensor,
    slot: Tensor,
    tables: list[Tensor],
    flags: list[int],
    numbers: list[int],
    order_numbers: list[int],
    geometry: list[int],
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices (1, B), lengths (1,) and patches (1,) of the batch at ``slot``.

    Parameters
    ----------
    epoch, slot : 0-d int64 tensors
    tables : list of Tensor
        Tables of the kernel in its order of arguments; the samples' order last, if there is one.
    flags, numbers : list of int
        Values of a `KernelSpec`, and integer arguments of the kernel.
    order_numbers : list of int
        Form and integer arguments of the kernel of the patches' order; empty if it is not needed.
    geometry : list of int
        Rows, columns and span of the launch, and its blocks.
    width : int
        B.
    """
    wrap: Any = torch.library.wrap_triton
    counts, sizes, search, plan, bases, sides, rests, *order = tables
    samples_order = order[0] if order else None
    patches = offsets = None
    if order_numbers:
        form, *arguments = order_numbers
        patches, offsets = (plan.new_empty((arguments[0],)) for _ in range(2))
        wrap(triton_batches.patch_order_kernel)[(1,)](
            *(patches, offsets, plan, epoch, *arguments),
            FORM=form,
            EPOCH_ON_DEVICE=True,
            TILE=triton_batches.PATCH_TILE,
            num_warps=triton_batches.WARPS,
        )
    out = plan.new_empty((1, width))
    lengths, groups = (plan.new_empty((1,)) for _ in range(2))
    rows, columns, span, *blocks = geometry
    wrap(triton_batches.batches_kernel)[tuple(blocks)](
        *(slot.reshape(1), None, epoch, out, lengths, groups),
        *(counts, sizes, search, plan, patches, offsets, bases, sides, rests),
        samples_order,
        *numbers,
        **KernelSpec._make(flags).flags(),
        ROWS=rows,
        COLS=columns,
        SPAN=span,
        num_warps=triton_batches.WARPS,
    )
    return out, lengths, groups
