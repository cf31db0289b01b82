"""The permutation and the plan, written apart from the package, in Python integers.

Written from the text alone and sharing nothing with the package: no array library, no import of
``gpusampler``. It is what the golden vectors are made from, so that a slip in the package cannot
pin itself.
"""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise
from math import frexp, fsum, isqrt
from typing import NamedTuple

WORD = 0xFFFFFFFF
ORDER_OF_BATCHES, ORDER_OF_PATCHES, INSIDE_A_PATCH, INSIDE_A_CLASS = 1, 2, 3, 6
SHORT_STEP_ROUND = 62

Key = tuple[int, int]


def mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x21F0AAAD & WORD
    h ^= h >> 15
    h = h * 0x735A2D97 & WORD
    return h ^ h >> 15


def keyed(r: int, v: int, key: Key) -> int:
    k0, k1 = key
    h = (v * 0x2C1B3C6D & WORD) ^ ((k0 + r * (k1 | 1)) & WORD)
    return (h ^ h >> 16) * 0x21F0AAAD & WORD


def absorb(state: Key, w: int) -> Key:
    s0, s1 = state
    s0 = mix(s0 ^ w)
    s1 = mix(((s1 + s0) & WORD) ^ (w * 0x2C1B3C6D & WORD))
    return s0, s1


def derive(seed: int, purpose: int, pass_: int, group: int) -> Key:
    state = (0x243F6A88, 0x85A308D3)
    for w in (
        seed & WORD,
        seed >> 32,
        purpose,
        pass_ & WORD,
        pass_ >> 32,
        group & WORD,
        group >> 32,
    ):
        state = absorb(state, w)
    return state


def rounds(n: int) -> int:
    if n < 128:
        return 12
    if n < 1024:
        return 10
    return 8 if n < 65536 else 6


def fisher_yates(x: int, n: int, key: Key) -> int:
    for i in range(n - 1, 0, -1):
        j = keyed(i, i, key) * (i + 1) >> 32
        if x == i:
            x = j
        elif x == j:
            x = i
    return x


def sheared(x: int, n: int, key: Key) -> int:
    a = isqrt(n - 1) + 1
    b = -(-n // a)
    rem = n - (a - 1) * b
    row, column = divmod(x, b)
    for r in range(rounds(n)):
        if r % 2 == 0:
            h = a - (column >= rem)
            row = (row + (keyed(r, column, key) * h >> 32)) % h
        else:
            w = rem if row == a - 1 else b
            column = (column + (keyed(r, row, key) * w >> 32)) % w
    x = row * b + column
    if x < 2 and keyed(63, 0, key) >> 31:
        x ^= 1
    return x


def permuted(x: int, n: int, key: Key) -> int:
    """Image of position x under the permutation of 0 .. n-1 that the key names."""
    return fisher_yates(x, n, key) if n <= 32 else sheared(x, n, key)


class Settings(NamedTuple):
    """What an epoch depends on besides the seed, the epoch and the patches."""

    batch_size: int | list[int]
    """Or that of each patch, patch ids ascending; a patch of size 0 is left out."""
    partial: str = "keep"
    interleave: bool = True
    shuffle_patches: bool = True
    shuffle_within_batches: bool = True
    steps: str = "free"
    step_width: int = 1
    uneven: str = "pad"
    patch_costs: list[float] | None = None
    """Of one sample of each patch, patch ids ascending; 1 for all where there is none."""
    weights: list[float] | None = None
    """Of each patch, patch ids ascending; its own batches where there is only a length."""
    epoch_batches: int | None = None
    min_partial: int = 1
    costliest_first: bool = False
    patch_of_bin: list[int] | None = None
    """The patch of each, where what is called patches here are cost bins of one."""

    def size(self, g: int) -> int:
        return self.batch_size if isinstance(self.batch_size, int) else self.batch_size[g]

    @property
    def mixed(self) -> bool:
        return self.weights is not None or self.epoch_batches is not None


def epoch(ids: list[int], seed: int, epoch: int, settings: Settings) -> list[tuple[int, list[int]]]:
    """All batches of one epoch in order, each as (patch id, samples).

    Settings are those of the public constructor, patches by their places.
    """
    patch_ids = sorted(set(ids))
    members = [[i for i, p in enumerate(ids) if p == patch] for patch in patch_ids]
    sizes = list(map(len, members))
    places = own_batches(sizes, settings)

    out = []
    for g, pass_, number in passes_of(sizes, seed, epoch, settings):
        n = len(members[g])
        key = derive(seed, INSIDE_A_PATCH, pass_, g)
        positions = [p % n for p in places[g][number]]
        if settings.shuffle_within_batches:
            positions = [permuted(p, n, key) for p in positions]
        out.append((patch_ids[g], [members[g][i] for i in positions]))
    return out


def passes_of(
    sizes: list[int], seed: int, epoch: int, settings: Settings
) -> list[tuple[int, int, int]]:
    """The batches of one epoch in order, each as (patch, pass, number of its own batch)."""
    batches_per_patch = [len(batches) for batches in own_batches(sizes, settings)]
    visited = [g for g, nb in enumerate(batches_per_patch) if nb]
    num_slots = settings.epoch_batches
    if settings.weights is None and num_slots is not None and num_slots < len(visited):
        # Fewer batches than patches: every patch once in so many visits.
        out = []
        for slot in range(num_slots):
            round_, place = divmod(epoch * num_slots + slot, len(visited))
            if settings.shuffle_patches:
                key = derive(seed, ORDER_OF_PATCHES, round_, 0)
                place = permuted(place, len(visited), key)
            g = visited[place]
            out.append((g, *divmod(round_, batches_per_patch[g])))
        return out
    order = order_of(sizes, seed, epoch, settings)
    if not settings.mixed:
        return [(g, epoch, number) for g, number in order]
    slots = slots_of(batches_per_patch, settings)
    out = []
    for g, j in order:
        # A patch goes on where it stood at the end of the epoch before.
        pass_, number = divmod(epoch * slots[g] + j, batches_per_patch[g])
        out.append((g, pass_ % 2**64, number))
    return out


def order_of(sizes: list[int], seed: int, epoch: int, settings: Settings) -> list[tuple[int, int]]:
    """The slots of one epoch in order, each as (patch, number of the slot in it).

    Without mixing a patch's slots are its own batches.
    """
    patch_batches = own_batches(sizes, settings)
    counts = slots_of(list(map(len, patch_batches)), settings)
    if settings.steps == "balanced":
        if settings.mixed:
            # Which batch a slot holds is another one each epoch: all are classed as whole ones.
            runs = [
                (g, 0, counts[g], len(patch_batches[g][0]))
                for g in range(len(sizes))
                if patch_batches[g]
            ]
        else:
            runs = [
                (g, number, 1, len(batch))
                for g in range(len(sizes))
                for number, batch in enumerate(patch_batches[g])
            ]
        balanced = Balanced(runs, seed, epoch, settings)
        order = [balanced.at(slot) for slot in range(sum(counts))]
        return costliest_first(order, sizes, epoch, settings)

    # Steps of one batch each are the free order.
    width = 1 if settings.steps == "free" else settings.step_width
    if settings.steps == "same_patch" and settings.uneven == "drop":
        steps = [nb // width for nb in counts]
    else:
        steps = [-(-nb // width) for nb in counts]
    natural = [(g, q) for g in range(len(sizes)) for q in range(steps[g])]
    if settings.interleave:
        key = derive(seed, ORDER_OF_BATCHES, epoch, 0)
        total = len(natural)
        order = [
            natural[permuted(t, total, key) if settings.shuffle_patches else t]
            for t in range(total)
        ]
    else:
        key = derive(seed, ORDER_OF_PATCHES, epoch, 0)
        patch_of_bin = (
            list(range(len(sizes))) if settings.patch_of_bin is None else settings.patch_of_bin
        )
        patches = sorted(set(patch_of_bin))
        if settings.shuffle_patches:
            patches = [permuted(position, len(patches), key) for position in patches]
        groups = [
            g for patch in patches for g, parent in enumerate(patch_of_bin) if parent == patch
        ]
        order = [(g, q) for g in groups for q in range(steps[g])]
    order = [(g, (q * width + p) % counts[g]) for g, q in order for p in range(width)]
    return costliest_first(order, sizes, epoch, settings)


def costliest_first(
    order: list[tuple[int, int]], sizes: list[int], epoch: int, settings: Settings
) -> list[tuple[int, int]]:
    """The order after the costliest full batches have changed places with the first ones."""
    if not settings.costliest_first:
        return order
    patch_batches = own_batches(sizes, settings)
    slots = slots_of(list(map(len, patch_batches)), settings)
    full = []
    for g, batches in enumerate(patch_batches):
        if not slots[g]:
            continue
        own, lengths = len(batches), [len(batch) for batch in batches]
        numbers = [(epoch * slots[g] + j) % own for j in range(slots[g])]
        if settings.partial == "even":
            places = list(range(slots[g]))
        elif settings.mixed:
            # As many as are full in every epoch, at least one.
            places = [j for j, number in enumerate(numbers) if lengths[number] == lengths[0]] or [0]
            if lengths[-1] < lengths[0]:
                places = places[: max(1, slots[g] - -(-slots[g] // own))]
        else:
            places = [j for j in range(own) if lengths[j] == lengths[0]]
        per_sample = 1.0 if settings.patch_costs is None else float(settings.patch_costs[g])
        for j in places:
            length = lengths[0] if settings.mixed else lengths[j]
            cost = rounded(Fraction(length) * Fraction(per_sample))
            full.append((-cost, g, j))
    order = list(order)
    for slot, (_, g, j) in enumerate(sorted(full)[: settings.step_width]):
        place = order.index((g, j))
        order[slot], order[place] = order[place], order[slot]
    return order


def slots_of(batches_per_patch: list[int], settings: Settings) -> list[int]:
    """How many slots each patch has in an epoch: its own batches, or its share of them all."""
    if not settings.mixed:
        return batches_per_patch
    weights = batches_per_patch if settings.weights is None else settings.weights
    patches_with_batches = [g for g, nb in enumerate(batches_per_patch) if nb and weights[g]]
    total = sum(batches_per_patch) if settings.epoch_batches is None else settings.epoch_batches
    shares = apportion(whole_weights([weights[g] for g in patches_with_batches]), total)
    if settings.steps == "same_patch":
        # Whole steps, in the proportions of the batches.
        width = settings.step_width
        steps = total // width if settings.uneven == "drop" else -(-total // width)
        if settings.uneven == "pad":
            steps = max(steps, len(patches_with_batches))
        shares = [width * share for share in apportion(shares, steps)]
    slots = [0] * len(batches_per_patch)
    for g, share in zip(patches_with_batches, shares, strict=True):
        slots[g] = share
    return slots


def whole_weights(weights: list[float]) -> list[int]:
    """Weights as integers: as they are, or in units of a power of two, rounded half to even."""
    if all(w == int(w) for w in weights) and sum(map(int, weights)) <= 2**52:
        return list(map(int, weights))
    # The sum becomes at least 2**51, less than 2**52.
    _, exponent = frexp(fsum(weights))
    return [round(Fraction(w) * Fraction(2) ** (52 - exponent)) for w in weights]


def apportion(weights: list[int], total: int) -> list[int]:
    """Whole shares of a total: at least one each, the others by largest remainder."""
    if total < len(weights):
        raise ValueError(f"{total} is less than one for each of {len(weights)}")
    shares = [0] * len(weights)
    free, remaining = list(range(len(weights))), total
    while True:
        sum_ = sum(weights[g] for g in free)
        quotas = {g: Fraction(weights[g] * remaining, sum_) for g in free}
        lifted = [g for g in free if quotas[g] < 1]
        if not lifted:
            break
        for g in lifted:
            shares[g] = 1
        free = [g for g in free if quotas[g] >= 1]
        remaining -= len(lifted)
    for g in free:
        shares[g] = int(quotas[g])
    # Ties go to the lower patch: the sort is stable.
    by_remainder = sorted(free, key=lambda g: shares[g] - quotas[g])
    for g in by_remainder[: total - sum(shares)]:
        shares[g] += 1
    return shares


def size_of(
    n: int,
    partial: str,
    cost: float,
    max_cost: float,
    minimum: int = 1,
    maximum: int = 2**31 - 1,
    multiple_of: int = 1,
    power_of_two: bool = False,
) -> int | None:
    """How many samples of a cost a patch of n puts into a batch; none where the budget has no size.

    0 where the patch has too few samples for any batch.
    """

    def allowed_down(size: int) -> int:
        size -= size % multiple_of
        if power_of_two and size:
            size = 1 << size.bit_length() - 1
        return size if size >= minimum else 0

    def allowed_up(size: int) -> int:
        size = -(-max(size, minimum) // multiple_of) * multiple_of
        return 1 << (size - 1).bit_length() if power_of_two else size

    fitting = bisect_right(range(1, maximum + 1), max_cost, key=lambda size: size * cost)
    size = allowed_down(fitting)
    if size == 0:
        return None
    return min(size, allowed_down(n)) if partial == "drop" else min(size, allowed_up(n))


class Balanced:
    """Steps of about equal cost, at any slot, from runs of like batches.

    A run is (patch, number of its first batch, batches, samples in each).
    """

    def __init__(
        self,
        runs: list[tuple[int, int, int, int]],
        seed: int,
        epoch: int,
        settings: Settings,
    ) -> None:
        self.seed, self.epoch, self.settings = seed, epoch, settings
        costs = settings.patch_costs
        classed = []
        for patch, first, batches, samples in runs:
            if batches:
                per_sample = 1.0 if costs is None else float(costs[patch])
                classed.append((cost_class(samples, per_sample), patch, first, batches))
        # Natural order: classes ascending, in a class patches, in a patch its batches.
        self.runs = sorted(classed)
        self.starts = [0]
        for run in self.runs:
            self.starts.append(self.starts[-1] + run[3])
        self.total = self.starts[-1]
        self.classes: list[tuple[int, int]] = []
        kinds = sorted({run[0] for run in self.runs})
        for kind in kinds:
            bucket_runs = [index for index, run in enumerate(self.runs) if run[0] == kind]
            first = self.starts[bucket_runs[0]]
            self.classes.append((first, self.starts[bucket_runs[-1] + 1] - first))

    def at(self, slot: int) -> tuple[int, int]:
        """Patch and number of the batch at a slot."""
        y = slot
        if self.settings.shuffle_patches:
            y = self.place(slot)
            c = bisect_right([first for first, _ in self.classes], y) - 1
            first, n = self.classes[c]
            y = first + permuted(y - first, n, derive(self.seed, INSIDE_A_CLASS, self.epoch, c))
        run = bisect_right(self.starts, y) - 1
        _, patch, number, _ = self.runs[run]
        return patch, number + y - self.starts[run]

    def place(self, slot: int) -> int:
        """Where a slot's step puts it in the natural order."""
        width = self.settings.step_width
        full, remainder = divmod(self.total, width)
        key = derive(self.seed, ORDER_OF_BATCHES, self.epoch, 0)
        t, p = divmod(slot, width)
        if remainder == 0:
            return permuted(t, full, key) * width + p
        # Where the short step's places begin; they go on round the end.
        v = keyed(SHORT_STEP_ROUND, 0, key) * min(self.total, 2**31 - 1) >> 32
        if t == full:
            # With no full step at all, slots are places.
            return (v + p) % self.total if full else slot
        # The others in their order, those that the end's overflow has taken left out.
        y = permuted(t, full, key) * width + p + max(v + remainder - self.total, 0)
        return y if y < v else y + remainder


def cost_class(samples: int, per_sample: float) -> int:
    """Sign, exponent and three leading bits of the mantissa of a batch's cost in float64."""
    cost = rounded(Fraction(samples) * Fraction(per_sample))
    mantissa, exponent = frexp(cost)
    # 1.xxx times a power of two, biased as IEEE 754 has it; the smallest have a fixed exponent.
    if exponent - 1 < -1022:
        return int(Fraction(cost) * 2**1025)
    return (exponent - 1 + 1023) * 8 + int(mantissa * 16) - 8


def rounded(exact: Fraction) -> float:
    """The float64 nearest to a fraction."""
    return exact.numerator / exact.denominator


def batches_of(n: int, size: int, partial: str, min_partial: int = 1) -> list[range]:
    """Positions that each batch of a patch of n samples covers; past n they start again."""
    if size == 0:
        return []
    if partial == "even":
        smaller, larger = divmod(n, -(-n // size))
        lengths = [smaller + 1] * larger + [smaller] * (-(-n // size) - larger)
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        whole = [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        return [batch for batch in whole if len(batch) >= min_partial]
    edges = list(range(0, n, size))
    if partial == "drop":
        return [range(p, p + size) for p in edges if p + size <= n]
    if partial == "pad":
        return [range(p, p + size) for p in edges]
    batches = [range(p, q) for p, q in pairwise([*edges, n])]
    return [batch for batch in batches if len(batch) >= min_partial]


def own_batches(sizes: list[int], settings: Settings) -> list[list[range]]:
    """Positions of every batch that each patch is cut into."""
    return [
        batches_of(n, settings.size(g), settings.partial, settings.min_partial)
        for g, n in enumerate(sizes)
    ]
