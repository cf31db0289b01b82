"""The batch kernel in Triton: the arithmetic of `evaluators.array`, exactly, in a single launch.

Imported at first use only. A program computes ``ROWS`` rows (batches). First it locates each row:
slot -> batch (keyed bijection) -> patch (search) -> key, grid and first position. Then it writes
the rows' samples: position -> permutation -> order, ``COLS`` per row at a time. If LOCATED,
``slots`` holds batches of the patches in ``row_groups``; if PASSES, each row is in the pass over
its patch that ``row_passes`` holds.

Integer arguments are signed 32-bit numbers, including keys (reinterpreted bits). Triton types an
argument by its value, so a key that needs 64 bits in one epoch would compile another kernel.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from gpusampler.plan.evaluators.kernels.kernel_spec import Geometry, KernelSpec

WARPS = 4


@triton.jit
def _mix(h):
    h ^= h >> 16
    h *= 0x21F0AAAD
    h ^= h >> 15
    h *= 0x735A2D97
    return h ^ (h >> 15)


@triton.jit
def _absorb(s0, s1, word):
    s0 = _mix(s0 ^ word)
    return s0, _mix((s1 + s0) ^ (word * 0x2C1B3C6D))


@triton.jit
def _hash(value, round_key):
    h = (value * 0x2C1B3C6D) ^ round_key
    return (h ^ (h >> 16)) * 0x21F0AAAD


@triton.jit
def _rotate(line, amount, side):
    # If moved < side, the difference wraps to a huge number, so the minimum is still right.
    moved = line + tl.umulhi(amount, side)
    return tl.minimum(moved, moved - side)


@triton.jit
def _coin(key, step):
    return _hash(key * 0, key + 63 * step) >> 31


@triton.jit
def _round_pair(line, col, a, b, rem, key, step):
    line = _rotate(line, _hash(col, key), a - (col >= rem).to(tl.uint32))
    col = _rotate(col, _hash(line, key + step), tl.where(line == a - 1, rem, b))
    return line, col


@triton.jit
def _fisher_yates(x, n, key, step, MOST: tl.constexpr):
    """Transpositions (i, j_i) from i = MOST-1 down to 1; those with i >= n change nothing."""
    for done in range(MOST - 1):
        # In the key's shape: one hash per row, not per lane.
        i = (key * 0 + (MOST - 1 - done)).to(tl.uint32)
        j = tl.umulhi(_hash(i, key + i * step), i + 1)
        j = tl.where(i < n, j, i)
        x = tl.where(x == i, j, tl.where(x == j, i, x))
    return x


@triton.jit
def _absorb_epoch(s0, s1, epoch):
    s0, s1 = _absorb(s0, s1, epoch.to(tl.uint32))
    return _absorb(s0, s1, (epoch >> 32).to(tl.uint32))


@triton.jit
def _permute_slots(slot, n, a, b, rem, pairs, key, step, FORM: tl.constexpr):
    if FORM == 1:
        few = _fisher_yates(slot.to(tl.uint32), n.to(tl.uint32), key, step, 32)
        image = few.to(tl.int64)
    else:
        if FORM == 2:
            line = slot.to(tl.uint32) // b.to(tl.uint32)
        else:
            line = (slot // b).to(tl.uint32)
        col = (slot - line.to(tl.int64) * b).to(tl.uint32)
        side_a, side_b, side_rem = a.to(tl.uint32), b.to(tl.uint32), rem.to(tl.uint32)
        round_key = key
        for _pair in range(pairs):
            line, col = _round_pair(line, col, side_a, side_b, side_rem, round_key, step)
            round_key += 2 * step
        image = line.to(tl.int64) * b + col.to(tl.int64)
        coin = _coin(key, step).to(tl.int64)
        image = tl.where(image < 2, image ^ coin, image)
    return image


# Not specialized: a value of 1, or a multiple of 16, must not compile another kernel. (The width is
# specialized: rows of a multiple of 16 are written 16 bytes at a time.)
_VALUES = [
    "num_rows",
    "num_groups",
    "steps",
    "slot_n",
    "slot_a",
    "slot_b",
    "slot_rem",
    "slot_pairs",
    "key0",
    "key1",
    "state0",
    "state1",
]

# Not specialized on alignment: these may be views of a user's tensors.
_PLACES = ["slots", "starts", "epoch", "row_groups", "row_passes"]


@triton.jit(do_not_specialize=_VALUES, do_not_specialize_on_alignment=_PLACES)
def batches_kernel(
    slots,
    starts,
    epoch,
    out,
    lengths,
    groups,
    counts,
    sizes,
    search,
    row_groups,
    row_passes,
    bases,
    side_a,
    side_b,
    side_rem,
    order,
    num_rows,
    width,
    num_groups,
    steps,
    slot_n,
    slot_a,
    slot_b,
    slot_rem,
    slot_pairs,
    key0,
    key1,
    state0,
    state1,
    SLOTS: tl.constexpr,
    LOCATED: tl.constexpr,
    PASSES: tl.constexpr,
    SAMPLES: tl.constexpr,
    SMALL: tl.constexpr,
    FEWEST: tl.constexpr,
    MOST: tl.constexpr,
    ORDERED: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    EPOCH_ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """See `KernelSpec` for the arguments in capitals, `KernelEvaluator._run` for the others."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    slot = tl.load(slots + row, mask=inside, other=0)
    k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
    s0, s1 = state0.to(tl.uint32), state1.to(tl.uint32)
    if EPOCH_ON_DEVICE:
        # The epoch is in a tensor, so that a CUDA graph can replay the kernel for any epoch.
        now = tl.load(epoch)
        k0, k1 = _absorb_epoch(k0, k1, now)
        k0, k1 = _absorb_epoch(k0, k1, now * 0)
        s0, s1 = _absorb_epoch(s0, s1, now)
    if SLOTS > 0:
        slot = _permute_slots(slot, slot_n, slot_a, slot_b, slot_rem, slot_pairs, k0, k1 | 1, SLOTS)

    if LOCATED:
        j = slot
        group = tl.load(row_groups + row, mask=inside, other=0)
    else:
        # Search for the last patch whose first batch is not after this one.
        place = tl.zeros([ROWS], tl.int32)
        step_ahead = 1 << steps
        for _ in range(steps):
            step_ahead = step_ahead >> 1
            ahead = place + step_ahead
            known = inside & (ahead < num_groups)
            entry = tl.load(search + ahead, mask=known, other=0)
            place = tl.where(known & (entry <= slot), ahead, place)
        j = slot - tl.load(search + place, mask=inside, other=0)
        group = place.to(tl.int64)

    # Low word: the size. High word: how many of the first batches have one sample more.
    size_word = tl.load(sizes + group, mask=inside, other=1)
    size, larger = size_word & 0xFFFFFFFF, size_word >> 32
    first_position = j * size + tl.minimum(j, larger)
    size += (j < larger).to(tl.int64)
    count = tl.load(counts + group, mask=inside, other=1)
    base = tl.load(bases + group, mask=inside, other=0)
    first = first_position.to(tl.uint32)
    n = count.to(tl.uint32)
    length = tl.minimum(size, count - first_position)
    if RAGGED:
        begin = tl.load(starts + row, mask=inside, other=0)
        # No lanes, so no writes, for an invalid slot.
        lanes = tl.maximum(length, 0)
        if PAD:
            lanes = size
        lanes = tl.where(inside, lanes, 0).to(tl.uint32)
        widest = tl.max(lanes.to(tl.int32), axis=0)
    else:
        begin = row.to(tl.int64) * width
        lanes = tl.where(inside, width, 0).to(tl.uint32)
        widest = width
        if tl.program_id(1) == 0:
            tl.store(lengths + row, length, mask=inside)
            tl.store(groups + row, group, mask=inside)

    if SAMPLES:
        # Values per row, as columns that broadcast over lanes.
        key, step = s0, s1
        if PASSES:
            passes = tl.load(row_passes + row, mask=inside, other=0)
            key, step = _absorb_epoch(key, step, passes)
        key, step = _absorb(key, step, group.to(tl.uint32))
        key, step = _absorb(key, step, (group * 0).to(tl.uint32))
        step = step | 1
        coin = _coin(key, step)[:, None]
        a = tl.load(side_a + group, mask=inside, other=1).to(tl.uint32)[:, None]
        b = tl.load(side_b + group, mask=inside, other=1).to(tl.uint32)[:, None]
        rem = tl.load(side_rem + group, mask=inside, other=1).to(tl.uint32)[:, None]
        # One division per row; per lane, a multiplication that is at most 1 too small.
        inverse = 0xFFFFFFFF // b
        own = tl.where(n >= 128, 5, tl.where(n > 32, 6, 0))
        own = tl.where(n >= 65536, 3, tl.where(n >= 1024, 4, own))
        own = tl.where(inside, own, 0)
        pairs = tl.max(own, axis=0)
        own = own[:, None]
        smallest = tl.min(tl.where(inside, count, 1 << 31), axis=0)
        row_key, row_step = key[:, None], step[:, None]
        # Loop-carried values keep their layout, so they are broadcast before the loop.
        tile_key = tl.broadcast_to(row_key, [ROWS, COLS])

    lane_0 = tl.program_id(1) * SPAN
    # Whether any row wraps around its patch in this span.
    beyond = inside & (first.to(tl.int64) + tl.minimum(lanes, lane_0 + SPAN) > count)
    wraps = tl.max(beyond.to(tl.int32), axis=0)
    row_first, row_n = first[:, None], n[:, None]
    row_base, row_begin, row_lanes = base[:, None], begin[:, None], lanes[:, None]
    for done in range(0, tl.minimum(widest - lane_0, SPAN), COLS):
        lane = (lane_0 + done + tl.arange(0, COLS)).to(tl.uint32)[None, :]
        mask = lane < row_lanes
        x = row_first + lane
        if wraps > 0:
            x = x % row_n
        image = x
        if SAMPLES and MOST > 0:
            if SMALL == 0 or pairs > 0:
                line = tl.umulhi(x, inverse)
                col = x - line * b
                line += (col >= b).to(tl.uint32)
                col = tl.minimum(col, col - b)
                round_key = tile_key
                for _common in tl.static_range(FEWEST):
                    line, col = _round_pair(line, col, a, b, rem, round_key, row_step)
                    round_key += 2 * row_step
                if MOST > FEWEST:
                    for pair in range(FEWEST, pairs):
                        more_line, more_col = _round_pair(line, col, a, b, rem, round_key, row_step)
                        line = tl.where(pair < own, more_line, line)
                        col = tl.where(pair < own, more_col, col)
                        round_key += 2 * row_step
                image = line * b + col
                image = tl.where(image < 2, image ^ coin, image)
        if SAMPLES and SMALL > 0:
            if smallest <= 32:
                few = _fisher_yates(x, row_n, row_key, row_step, SMALL)
                image = tl.where(row_n <= 32, few, image)
        sample = row_base + image.to(tl.int64)
        if ORDERED:
            sample = tl.load(order + sample, mask=mask, other=0).to(tl.int64)
        tl.store(out + row_begin + lane.to(tl.int64), sample.to(out.dtype.element_ty), mask=mask)


def launch(spec: KernelSpec, geometry: Geometry, args: tuple[Any, ...]) -> None:
    """Run the kernel on torch tensors, on their device's current stream."""
    batches_kernel[geometry.blocks](
        *args,
        **spec.flags(),
        ROWS=geometry.rows,
        COLS=geometry.columns,
        SPAN=geometry.span,
        num_warps=WARPS,
    )
