"""The batch kernel in Triton: the arithmetic of `evaluators.array`, exactly, in a single launch.

Imported at first use only. A program computes ``ROWS`` rows (batches). First it locates each row:
slot -> batch (keyed bijection) -> patch (search) -> key, grid and first position. Then it writes
the rows' samples: position -> permutation -> order, ``COLS`` per row at a time.

Integer arguments are signed 32-bit numbers, including keys (reinterpreted bits). Triton types an
argument by its value, so a key that needs 64 bits in one epoch would compile another kernel.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from gpusampler.plan.evaluators.kernels.kernel_spec import PLAN_WORDS, Geometry, KernelSpec

WARPS = 4
PATCH_TILE = 1024

# Where the numbers of `plan` are, in the order of `PLAN_WORDS`; Triton reads only such globals.
(
    AT_NUM_SLOTS, AT_STEP_WIDTH, AT_NUM_STEPS, AT_SHORT_STEP,
    AT_NUM_VISITED, AT_VISIT_A, AT_VISIT_B, AT_VISIT_REM,
    AT_NUM_BUCKETS, AT_BUCKET_BITS, AT_NUM_CHOSEN, AT_CHOSEN_BITS,
    AT_NUM_PATCHES, AT_PATCH_BITS, AT_VISITED, AT_RUN_GROUPS,
    AT_RUN_FIRST, AT_OWN_BATCHES, AT_GROUP_SLOTS, AT_BUCKET_OFFSETS,
    AT_BUCKET_COUNTS, AT_BUCKET_A, AT_BUCKET_B, AT_BUCKET_REM,
    AT_CHOSEN, AT_SLOT_OF_CHOSEN, AT_CHOSEN_OF_SLOT, AT_CHOSEN_NTH,
    AT_CHOSEN_SLOTS, AT_CHOSEN_OWN, AT_FIRST_BATCH, AT_PATCH_OF_BIN,
) = map(tl.constexpr, range(len(PLAN_WORDS)))  # fmt: skip


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
def _round_pair(line, col, a, last, b, rem, key, step):
    """A pair of rounds on the grid; ``last`` is ``a - 1``."""
    line = _rotate(line, _hash(col, key), tl.where(col >= rem, last, a))
    col = _rotate(col, _hash(line, key + step), tl.where(line == last, rem, b))
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
            line, col = _round_pair(
                line, col, side_a, side_a - 1, side_b, side_rem, round_key, step
            )
            round_key += 2 * step
        image = line.to(tl.int64) * b + col.to(tl.int64)
        coin = _coin(key, step).to(tl.int64)
        image = tl.where(image < 2, image ^ coin, image)
    return image


@triton.jit
def _permute_wide(x, n, a, b, rem, key, step):
    """Permute 0 <= x < n, each element by its own permutation; int64, n < 2**62."""
    side_a, side_b, side_rem = a.to(tl.uint32), b.to(tl.uint32), rem.to(tl.uint32)
    line = (x // b).to(tl.uint32)
    col = (x - line.to(tl.int64) * b).to(tl.uint32)
    own = tl.where(n >= 128, 5, tl.where(n > 32, 6, 0))
    own = tl.where(n >= 65536, 3, tl.where(n >= 1024, 4, own))
    round_key = key
    for pair in range(tl.max(own, axis=0)):
        more_line, more_col = _round_pair(
            line, col, side_a, side_a - 1, side_b, side_rem, round_key, step
        )
        line = tl.where(pair < own, more_line, line)
        col = tl.where(pair < own, more_col, col)
        round_key += 2 * step
    image = line.to(tl.int64) * b + col.to(tl.int64)
    image = tl.where(image < 2, image ^ _coin(key, step).to(tl.int64), image)
    if tl.min(n, axis=0) <= 32:
        few = _fisher_yates(x.to(tl.uint32), n.to(tl.uint32), key, step, 32)
        image = tl.where(n <= 32, few.to(tl.int64), image)
    return image


@triton.jit
def _array(plan, AT: tl.constexpr):
    """Where an array of the plan begins."""
    return plan + tl.load(plan + AT)


@triton.jit
def _search(offsets, count, bits, value, inside):
    """The last of ``count`` ascending offsets that is not above the value."""
    place = (value * 0).to(tl.int32)
    step_ahead = 1 << bits
    for _ in range(bits):
        step_ahead = step_ahead >> 1
        ahead = place + step_ahead
        known = inside & (ahead < count)
        entry = tl.load(offsets + ahead, mask=known, other=0)
        place = tl.where(known & (entry <= value), ahead, place)
    return place


@triton.jit
def _pass_and_batch(epoch, j, slots, own):
    """divmod(epoch * slots + j, own): the pass over a group and the batch in it; the pass wraps."""
    epoch_quotient, epoch_rest = epoch // own, epoch % own
    slot_quotient, slot_rest = slots // own, slots % own
    product = epoch_rest * slot_rest
    total = product % own + j
    passes = epoch * slot_quotient + epoch_quotient * slot_rest
    return passes + product // own + total // own, total % own


@triton.jit
def _batch_of(
    slot, plan, inside,
    slot_n, slot_a, slot_b, slot_rem, slot_pairs, k0, k1, b0, b1,
    SLOTS: tl.constexpr, STEPS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """The batch of a slot, as an index into the batches before shuffling; without COSTLIEST."""
    index = slot
    if STEPS > 0:
        step_width = tl.load(plan + AT_STEP_WIDTH)
        num_steps = tl.load(plan + AT_NUM_STEPS)
        step = slot // step_width
        within = slot - step * step_width
        index = tl.where(step == num_steps, 0, step)
    if SLOTS > 0:
        index = _permute_slots(
            index, slot_n, slot_a, slot_b, slot_rem, slot_pairs, k0, k1 | 1, SLOTS
        )
    if STEPS > 0:
        index = index * step_width + within
    if STEPS == 2:
        # The short step takes consecutive batches, cyclically, from a random start.
        num_slots = tl.load(plan + AT_NUM_SLOTS)
        short_step = tl.load(plan + AT_SHORT_STEP)
        limit = tl.minimum(num_slots, 0x7FFFFFFF).to(tl.uint32)
        start = tl.umulhi(_hash(k0 * 0, k0 + 62 * (k1 | 1)), limit).to(tl.int64)
        index += tl.maximum(start + short_step - num_slots, 0)
        index += tl.where(index >= start, short_step, 0)
        index = tl.where(step == num_steps, (start + within) % num_slots, index)
    if RUNS == 2:
        offsets = _array(plan, AT_BUCKET_OFFSETS)
        count, bits = tl.load(plan + AT_NUM_BUCKETS), tl.load(plan + AT_BUCKET_BITS)
        bucket = _search(offsets, count, bits.to(tl.int32), index, inside)
        key, step_key = _absorb_epoch(b0, b1, bucket.to(tl.int64))
        first = tl.load(offsets + bucket, mask=inside, other=0)
        n = tl.load(_array(plan, AT_BUCKET_COUNTS) + bucket, mask=inside, other=1)
        a = tl.load(_array(plan, AT_BUCKET_A) + bucket, mask=inside, other=1)
        b = tl.load(_array(plan, AT_BUCKET_B) + bucket, mask=inside, other=1)
        rem = tl.load(_array(plan, AT_BUCKET_REM) + bucket, mask=inside, other=1)
        index = first + _permute_wide(index - first, n, a, b, rem, key, step_key | 1)
    return index


@triton.jit
def _chosen_batch(plan, epoch, i, inside, COSTLIEST: tl.constexpr):
    """The index of the i-th chosen batch in this epoch; they ascend."""
    index = tl.load(_array(plan, AT_CHOSEN) + i, mask=inside, other=0)
    if COSTLIEST == 2:
        nth = tl.load(_array(plan, AT_CHOSEN_NTH) + i, mask=inside, other=0)
        slots = tl.load(_array(plan, AT_CHOSEN_SLOTS) + i, mask=inside, other=1)
        own = tl.load(_array(plan, AT_CHOSEN_OWN) + i, mask=inside, other=1)
        _passes, first = _pass_and_batch(epoch, nth * 0, slots, own)
        first_short = own - 1 - first
        others = tl.maximum(own - 1, 1)
        num_short = tl.where(nth < first_short, 0, 1 + (nth - first_short) // others)
        slot = nth + tl.where(own > 1, num_short, 0)
        index += tl.minimum(slot, slots - 1)
    return index


@triton.jit
def _find_chosen(plan, epoch, index, inside, COSTLIEST: tl.constexpr):
    """Where a batch is among the chosen ones, and whether it is."""
    count = tl.load(plan + AT_NUM_CHOSEN)
    bits = tl.load(plan + AT_CHOSEN_BITS).to(tl.int32)
    place = (index * 0).to(tl.int32)
    step_ahead = 1 << bits
    for _ in range(bits):
        step_ahead = step_ahead >> 1
        ahead = place + step_ahead
        known = inside & (ahead < count)
        entry = _chosen_batch(plan, epoch, ahead, known, COSTLIEST)
        place = tl.where(known & (entry <= index), ahead, place)
    return place, inside & (_chosen_batch(plan, epoch, place, inside, COSTLIEST) == index)


# Not specialized: a value of 1, or a multiple of 16, must not compile another kernel. (The width is
# specialized: rows of a multiple of 16 are written 16 bytes at a time.)
_VALUES = [
    "num_rows",
    "num_offsets",
    "search_bits",
    "slot_n",
    "slot_a",
    "slot_b",
    "slot_rem",
    "slot_pairs",
    "key0",
    "key1",
    "state0",
    "state1",
    "other0",
    "other1",
    "epoch_low",
    "epoch_high",
    "num_replicas",
    "rank",
]

# Not specialized on alignment: these may be views of a user's tensors.
_PLACES = ["slots", "starts", "epoch"]


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
    plan,
    epoch_patches,
    epoch_offsets,
    bases,
    sides,
    rests,
    order,
    num_rows,
    width,
    num_offsets,
    search_bits,
    slot_n,
    slot_a,
    slot_b,
    slot_rem,
    slot_pairs,
    key0,
    key1,
    state0,
    state1,
    other0,
    other1,
    epoch_low,
    epoch_high,
    num_replicas,
    rank,
    SLOTS: tl.constexpr,
    STEPS: tl.constexpr,
    RUNS: tl.constexpr,
    COSTLIEST: tl.constexpr,
    IN_ORDER: tl.constexpr,
    VISITS: tl.constexpr,
    FEW: tl.constexpr,
    OWN: tl.constexpr,
    PASSES: tl.constexpr,
    SAMPLES: tl.constexpr,
    SMALL: tl.constexpr,
    FEWEST: tl.constexpr,
    MOST: tl.constexpr,
    ORDERED: tl.constexpr,
    BINS: tl.constexpr,
    RAGGED: tl.constexpr,
    PAD: tl.constexpr,
    EPOCH_ON_DEVICE: tl.constexpr,
    ADVANCE: tl.constexpr,
    SKIP_REPEATS: tl.constexpr,
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
    o0, o1 = other0.to(tl.uint32), other1.to(tl.uint32)
    if EPOCH_ON_DEVICE:
        # The epoch is in a tensor, so that a CUDA graph can replay the kernel for any epoch.
        now = tl.load(epoch)
        k0, k1 = _absorb_epoch(k0, k1, now)
        k0, k1 = _absorb_epoch(k0, k1, now * 0)
        if not PASSES:
            s0, s1 = _absorb_epoch(s0, s1, now)
        if RUNS == 2:
            o0, o1 = _absorb_epoch(o0, o1, now)
    else:
        now = (epoch_high.to(tl.int64) << 32) | (epoch_low.to(tl.int64) & 0xFFFFFFFF)
    counts_fully = inside
    if ADVANCE > 0:
        # Slot `rank` of the step that begins here; both counters move on to the next step.
        num_slots = tl.load(plan + AT_NUM_SLOTS)
        begin_slot = tl.load(slots)
        slot = slot + rank
        counts_fully = slot < num_slots
        slot = tl.where(counts_fully, slot, slot - num_slots)
        next_slot = begin_slot + num_replicas
        # A dropped step lacks a slot for some rank.
        last_begin = num_slots - 1
        if ADVANCE == 2:
            last_begin = num_slots - num_replicas
        is_done = next_slot > last_begin
        # All threads have read the counters before one of them writes.
        tl.debug_barrier()
        tl.store(slots, tl.where(is_done, 0, next_slot))
        tl.store(epoch, now + is_done.to(tl.int64))
    if STEPS > 0 or RUNS > 0 or COSTLIEST > 0 or IN_ORDER or VISITS > 0:
        # Slots on a GPU are not checked: invalid ones must not lead outside an array.
        all_slots = tl.load(plan + AT_NUM_SLOTS)
        slot = slot % all_slots
        slot = tl.where(slot < 0, slot + all_slots, slot)

    if VISITS > 0:
        num_visited = tl.load(plan + AT_NUM_VISITED)
        visit_round, place = _pass_and_batch(now, slot, tl.load(plan + AT_NUM_SLOTS), num_visited)
        if VISITS == 2:
            v0, v1 = _absorb_epoch(o0, o1, visit_round)
            v0, v1 = _absorb_epoch(v0, v1, visit_round * 0)
            zero = place * 0
            place = _permute_wide(
                place,
                zero + num_visited,
                zero + tl.load(plan + AT_VISIT_A),
                zero + tl.load(plan + AT_VISIT_B),
                zero + tl.load(plan + AT_VISIT_REM),
                v0,
                v1 | 1,
            )
        group = tl.load(_array(plan, AT_VISITED) + place, mask=inside, other=0)
        own = tl.load(_array(plan, AT_OWN_BATCHES) + group, mask=inside, other=1)
        passes = visit_round // own
        j = visit_round % own
    else:
        if IN_ORDER:
            count, bits = tl.load(plan + AT_NUM_PATCHES), tl.load(plan + AT_PATCH_BITS)
            turn = _search(epoch_offsets, count, bits.to(tl.int32), slot, inside)
            patch = tl.load(epoch_patches + turn, mask=inside, other=0)
            index = tl.load(_array(plan, AT_FIRST_BATCH) + patch, mask=inside, other=0)
            index += slot - tl.load(epoch_offsets + turn, mask=inside, other=0)
        else:
            index = _batch_of(
                slot, plan, inside,
                slot_n, slot_a, slot_b, slot_rem, slot_pairs, k0, k1, o0, o1,
                SLOTS, STEPS, RUNS,
            )  # fmt: skip
        if COSTLIEST > 0:
            num_chosen = tl.load(plan + AT_NUM_CHOSEN)
            is_first = inside & (slot < num_chosen)
            others = inside & (slot >= num_chosen)
            # What a chosen batch left its slot for; that may be a chosen one, too.
            left = num_chosen
            link, is_chosen = _find_chosen(plan, now, index, others, COSTLIEST)
            while (tl.max(is_chosen.to(tl.int32), axis=0) > 0) & (left > 0):
                vacated = tl.load(_array(plan, AT_SLOT_OF_CHOSEN) + link, mask=is_chosen, other=0)
                substitute = _batch_of(
                    vacated, plan, inside,
                    slot_n, slot_a, slot_b, slot_rem, slot_pairs, k0, k1, o0, o1,
                    SLOTS, STEPS, RUNS,
                )  # fmt: skip
                index = tl.where(is_chosen, substitute, index)
                link, is_chosen = _find_chosen(plan, now, index, is_chosen, COSTLIEST)
                left -= 1
            turn = tl.load(_array(plan, AT_CHOSEN_OF_SLOT) + slot, mask=is_first, other=0)
            chosen = _chosen_batch(plan, now, turn, is_first, COSTLIEST)
            index = tl.where(is_first, chosen, index)
        # The last patch (or run) whose first batch is not after this one.
        if FEW > 0:
            # Loads that do not wait for each other. A tile of rows and ends would take more
            # instructions to exchange its values between threads than it saves.
            place = (index * 0).to(tl.int32)
            for end in tl.static_range(FEW):
                place += (tl.load(search + end) < index).to(tl.int32)
        else:
            place = _search(search, num_offsets, search_bits, index, inside)
        j = index - tl.load(search + FEW + place, mask=inside, other=0)
        if RUNS > 0:
            group = tl.load(_array(plan, AT_RUN_GROUPS) + place, mask=inside, other=0)
            j += tl.load(_array(plan, AT_RUN_FIRST) + place, mask=inside, other=0)
        else:
            group = place.to(tl.int64)
        if OWN > 0:
            own = tl.load(_array(plan, AT_OWN_BATCHES) + group, mask=inside, other=1)
        if OWN == 1:
            j = j % own
        if OWN == 2:
            group_slots = tl.load(_array(plan, AT_GROUP_SLOTS) + group, mask=inside, other=1)
            passes, j = _pass_and_batch(now, j, group_slots, own)

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
            valid = length
            if SKIP_REPEATS:
                valid = tl.where(counts_fully, length, 0)
            tl.store(lengths + row, valid, mask=inside)
            patch_number = group
            if BINS:
                patches = _array(plan, AT_PATCH_OF_BIN)
                patch_number = tl.load(patches + group, mask=inside, other=0)
            tl.store(groups + row, patch_number, mask=inside)

    if SAMPLES:
        # Values per row, as columns that broadcast over lanes.
        key, step = s0, s1
        if PASSES:
            key, step = _absorb_epoch(key, step, passes)
        key, step = _absorb(key, step, group.to(tl.uint32))
        key, step = _absorb(key, step, (group * 0).to(tl.uint32))
        step = step | 1
        coin = _coin(key, step)[:, None]
        side_word = tl.load(sides + group, mask=inside, other=1)
        rest_word = tl.load(rests + group, mask=inside, other=1)
        lines, columns = side_word.to(tl.uint32)[:, None], (side_word >> 32).to(tl.uint32)[:, None]
        a, b, shift = lines & 0xFFFF, columns & 0xFFFF, columns >> 16
        # Not from the word, which has it, too: on an A100, ptxas then has too few registers.
        last = a - 1
        rem, inverse = rest_word.to(tl.uint32)[:, None], (rest_word >> 32).to(tl.uint32)[:, None]
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
                # Division by multiplication with a reciprocal: see `side_words`.
                line = tl.umulhi(x, inverse) >> shift
                col = x - line * b
                round_key = tile_key
                for _common in tl.static_range(FEWEST):
                    line, col = _round_pair(line, col, a, last, b, rem, round_key, row_step)
                    round_key += 2 * row_step
                if MOST > FEWEST:
                    for pair in range(FEWEST, pairs):
                        more_line, more_col = _round_pair(
                            line, col, a, last, b, rem, round_key, row_step
                        )
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


@triton.jit(do_not_specialize=["num_patches", "a", "b", "rem", "pairs", "key0", "key1"])
def patch_order_kernel(
    patches,
    offsets,
    plan,
    epoch,
    num_patches,
    a,
    b,
    rem,
    pairs,
    key0,
    key1,
    FORM: tl.constexpr,
    EPOCH_ON_DEVICE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: write the order of an epoch's patches, and the first slot of each."""
    k0, k1 = key0.to(tl.uint32), key1.to(tl.uint32)
    if EPOCH_ON_DEVICE:
        now = tl.load(epoch)
        k0, k1 = _absorb_epoch(k0, k1, now)
        k0, k1 = _absorb_epoch(k0, k1, now * 0)
    first_batch = _array(plan, AT_FIRST_BATCH)
    before = tl.load(first_batch) * 0
    for first in range(0, num_patches, TILE):
        place = first + tl.arange(0, TILE)
        inside = place < num_patches
        patch = tl.where(inside, place, 0).to(tl.int64)
        if FORM > 0:
            patch = _permute_slots(patch, num_patches, a, b, rem, pairs, k0, k1 | 1, FORM)
            patch = tl.where(inside, patch, 0)
        size = tl.load(first_batch + patch + 1, mask=inside, other=0)
        size -= tl.load(first_batch + patch, mask=inside, other=0)
        total = tl.cumsum(size, axis=0)
        tl.store(patches + place, patch, mask=inside)
        tl.store(offsets + place, before + total - size, mask=inside)
        before += tl.sum(size, axis=0)


def launch_patch_order(form: int, epoch_on_device: bool, args: tuple[Any, ...]) -> None:
    """Run the patch-order kernel on torch tensors, as `launch` does."""
    patch_order_kernel[(1,)](
        *args, FORM=form, EPOCH_ON_DEVICE=epoch_on_device, TILE=PATCH_TILE, num_warps=WARPS
    )


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
