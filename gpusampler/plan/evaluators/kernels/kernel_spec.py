"""Compile-time settings of a kernel, and how a launch is divided into blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from gpusampler.batching.tables import PatchTables
from gpusampler.permutation.reference import MASK, SMALL, Grid, grid_of, rounds_for
from gpusampler.plan.evaluators.base import EvaluatorSettings

SLOTS_AS_THEY_ARE, SLOTS_FISHER_YATES, SLOTS_32_BIT, SLOTS_64_BIT = range(4)

PLAN_WORDS = (
    # Numbers of the plan.
    *("num_slots", "step_width", "num_steps", "short_step"),
    *("num_visited", "visit_a", "visit_b", "visit_rem"),
    *("num_buckets", "bucket_bits", "num_chosen", "chosen_bits", "num_patches", "patch_bits"),
    # Where its arrays begin.
    *("visited", "run_groups", "run_first", "own_batches", "group_slots"),
    *("bucket_offsets", "bucket_counts", "bucket_a", "bucket_b", "bucket_rem"),
    *("chosen", "slot_of_chosen", "chosen_of_slot", "chosen_nth", "chosen_slots", "chosen_own"),
    *("first_batch", "patch_of_bin"),
)
"""What the first numbers of a `plan_words` array are."""


ORDER_ARGUMENT = 15
"""Index of the samples' order among the arguments of a launch."""


class KernelSpec(NamedTuple):
    """Compile-time settings of a kernel: macros in CUDA C and constants in Triton, by these names.

    ``slots``: how slots (or whole steps) are permuted: not at all (0), by Fisher-Yates (1), on a
    grid of 32-bit slots (2), or on a grid of 64-bit slots (3). ``steps``: a step is one slot (0),
    or several slots (1), with a short step (2). ``runs``: batches are found by runs of cost buckets
    (1), after a permutation inside the bucket (2). ``costliest``: the most expensive batches come
    first (1); which batches these are depends on the epoch (2). ``in_order``: each patch's batches
    are consecutive, in the order that the patch-order kernel wrote. ``visits``: a slot visits the
    next group (1), in permuted order (2). ``few``: number of group ends that the kernel compares
    with a batch to find its group (or run), a power of two; 0 if it bisects. ``own``: a group's
    batch is taken modulo its own batches (1), or continues its passes across epochs (2).
    ``passes``: each row has its own pass over its patch; otherwise the epoch is the pass.
    ``samples``: samples are permuted inside patches. ``small``: a power of two, at least the size
    of every patch of up to 32 samples; 0 if there is no such patch. ``fewest``: number of pairs of
    permutation rounds for the largest patch; ``most``: the same for the smallest patch above 32
    samples; both are 0 if no patch has more than 32 samples. ``ordered``: samples are looked up in
    the groups' order. ``bins``: groups are cost bins, of which the kernel returns the patch.
    ``ragged``: rows are stored end to end, each with its own length. ``pad``: the length of a
    ragged row is the batch size of its patch. ``epoch_on_device``: the kernel reads the epoch from
    device memory. ``advance``: the kernel advances epoch and slot to the next step, which repeats
    slots after the last (1) or is dropped if it is not whole (2). ``skip_repeats``: repeated
    batches have length 0. (The last three: Triton only.)
    """

    slots: int
    steps: int
    runs: int
    costliest: int
    in_order: bool
    visits: int
    few: int
    own: int
    passes: bool
    samples: bool
    small: int
    fewest: int
    most: int
    ordered: bool
    bins: bool
    ragged: bool
    pad: bool
    epoch_on_device: bool
    advance: int
    skip_repeats: bool

    @classmethod
    def of(
        cls,
        tables: PatchTables,
        settings: EvaluatorSettings,
        *,
        ragged: bool,
        epoch_on_device: bool = False,
    ) -> KernelSpec:
        """Return the spec for a plan's tables, without anything that none of its patches needs."""
        shuffled, layout = settings.shuffle_batches, tables.layout
        visits = in_order = False
        if tables.visited is not None:
            visits = True
        elif not settings.interleave:
            in_order = True
        slots = SLOTS_AS_THEY_ARE
        has_step_order = shuffled and layout.has_step_order and not visits and not in_order
        if has_step_order and layout.full > 1:
            slots = slots_form(layout.full)
        own = 0
        if tables.batches_per_pass is not None and not visits:
            own = 1 if tables.slot_shares is None else 2
        small = fewest = most = 0
        if settings.shuffle_samples and tables.smallest_patch <= SMALL:
            small = power_of_two(max(2, min(tables.largest_patch, SMALL)))
        if settings.shuffle_samples and tables.largest_patch > SMALL:
            fewest = rounds_for(tables.largest_patch) // 2
            most = rounds_for(max(tables.smallest_patch, SMALL + 1)) // 2
        costliest = tables.costliest
        return cls(
            slots=slots,
            steps=(1 + (layout.short > 0)) if has_step_order and layout.width > 1 else 0,
            runs=0 if tables.buckets is None or in_order else 1 + shuffled,
            costliest=0 if costliest is None else 1 + (costliest.nth is not None),
            in_order=in_order,
            visits=visits * (1 + shuffled),
            few=0 if visits else few_ends(first_batches(tables)),
            own=own,
            passes=(visits or own == 2) and settings.shuffle_samples,
            samples=settings.shuffle_samples,
            small=small,
            fewest=fewest,
            most=most,
            ordered=tables.order is not None,
            bins=not ragged and tables.patch_of_bin is not None,
            ragged=ragged,
            pad=ragged and settings.pad,
            epoch_on_device=epoch_on_device,
            advance=0,
            skip_repeats=False,
        )

    def flags(self) -> dict[str, int]:
        """Return the values by macro name."""
        return {name.upper(): int(value) for name, value in self._asdict().items()}


def slots_form(count: int) -> int:
    """Return how a permutation of ``count > 1`` slots is evaluated."""
    if count <= SMALL:
        return SLOTS_FISHER_YATES
    return SLOTS_32_BIT if count <= 1 << 32 else SLOTS_64_BIT


MAX_FEW = 8
"""The most group ends that a kernel loads at once, instead of bisecting."""


def first_batches(tables: PatchTables) -> Any:
    """Return the first batch of each group, or of each run of cost buckets; ascending."""
    return tables.batch_offsets[:-1] if tables.buckets is None else tables.buckets.run_offsets


def few_ends(offsets: Any) -> int:
    """Return how many ends of groups `search_table` has for these first batches."""
    width = power_of_two(max(2, int(offsets.shape[0]) - 1))
    return width if width <= MAX_FEW else 0


def search_table(xp: Any, offsets: Any, to_device: Callable[[list[int]], Any]) -> Any:
    """Return the table in which the kernel finds a batch's group, for `first_batches` of a plan.

    If there are few groups, it begins with the last batch of each group except the last. A batch's
    group is the number of these that are before the batch; padding is before no batch. Then, or in
    general, it holds the first batch of each group.
    """
    few, count = few_ends(offsets), int(offsets.shape[0])
    if not few:
        return offsets
    padding = [to_device([(1 << 63) - 1] * (few - count + 1))] if few >= count else []
    return xp.concat([offsets[1:] - 1, *padding, offsets])


def side_words(grid: Grid) -> tuple[Any, Any]:
    """Return two int64 arrays of what the kernel knows about each patch's grid (a, b, rem).

    The first holds a, a - 1, b and a shift s, 16 bits each, lowest first: a patch of fewer than
    2**31 samples has sides below 2**16. The second holds rem and r = ceil(2**(32 + s) / b), 32 bits
    each, where 2**s < b <= 2**(s + 1). (x * r) >> (32 + s) is x // b for all x below 2**31, because
    r * b - 2**(32 + s) is less than b and thus x times it less than 2**(32 + s). For b = 1, r is
    cut to 0: such patches have at most two samples and need no grid.
    """
    a, b, rem = grid
    shift = b * 0
    for step in (8, 4, 2, 1):
        shift = shift + ((b - 1) >> (shift + step) > 0) * step
    reciprocal = ((((b * 0 + 1) << (shift + 32)) + b - 1) // b) & MASK
    return a + ((a - 1) << 16) + (b << 32) + (shift << 48), rem + (reciprocal << 32)


def plan_words(xp: Any, tables: PatchTables, to_device: Callable[[list[int]], Any]) -> Any:
    """Return the tables that locate slots, apart from the common ones, in one int64 array.

    The array begins with the numbers of `PLAN_WORDS`. ``to_device`` makes an array of a list.
    """
    layout, buckets, costliest = tables.layout, tables.buckets, tables.costliest
    num_slots = tables.num_batches
    numbers = [num_slots, layout.width, layout.full, layout.short]
    num_visited = 0 if tables.visited is None else int(tables.visited.shape[0])
    numbers += [num_visited, *(grid_of(num_visited) if num_visited else (0, 0, 0))]
    for member in (
        None if buckets is None else buckets.counts,
        None if costliest is None else costliest.batches,
    ):
        size = 0 if member is None else int(member.shape[0])
        numbers += [size, search_bits(size)]
    first_batch = tables.batch_offsets
    if tables.first_bin is not None:
        first_batch = first_batch[tables.first_bin]
    numbers += [tables.num_patches, search_bits(tables.num_patches)]
    members: list[Any] = [tables.visited]
    members += [None] * 2 if buckets is None else [buckets.run_groups, buckets.run_first]
    members += [tables.own_batches, tables.batches]
    members += [None] * 5 if buckets is None else [buckets.offsets, buckets.counts, *buckets.grid]
    members += (
        [None] * 6
        if costliest is None
        else [
            *(costliest.batches, costliest.slot_of_batch, costliest.batch_of_slot),
            *(costliest.nth, costliest.patch_slots, costliest.own_batches),
        ]
    )
    members += [first_batch, tables.patch_of_bin]
    start, arrays = len(PLAN_WORDS), []
    for member in members:
        numbers.append(start)
        if member is not None:
            arrays.append(member)
            start += int(member.shape[0])
    assert len(numbers) == len(PLAN_WORDS)
    return xp.concat([to_device(numbers), *arrays])


def search_bits(count: int) -> int:
    """Return the number of steps of a binary search among ``count`` offsets."""
    return (count - 1).bit_length() if count > 0 else 0


class Geometry(NamedTuple):
    """Division of a launch into blocks; a lane is one element of a row.

    A block evaluates ``rows`` rows, ``columns`` lanes at a time, up to ``span`` lanes of each row.
    Wider rows are divided among several blocks. ``blocks``: the number of blocks that divide the
    rows, and the number of blocks that divide the lanes of a row.
    """

    rows: int
    columns: int
    span: int
    blocks: tuple[int, int]


MAX_BLOCKS = (1 << 16) - 1
"""CUDA's limit on the number of blocks in the second dimension of a launch."""


def triton_geometry(spec: KernelSpec, num_rows: int, width: int) -> Geometry:
    """Return tiles of 1,024 or 2,048 lanes; their shape depends only on spec and width.

    Each shape is compiled separately, so there are only a few; `batch`, with its single row, uses a
    shape of its own. The larger tile spreads the work of a row over more lanes, but would not fit
    in registers if rows are wide, need different permutations, or are not written 16 bytes at a
    time.
    """
    is_plain = spec.fewest == spec.most and not spec.small and not spec.ragged
    columns = power_of_two(width)
    if width > 32:
        # The shape with the fewest idle lanes. Of several, the narrowest if it takes two to four
        # turns, over which the work of a row is spread, and otherwise the widest.
        is_narrow = is_plain and width < 128 and width != 64 and not spec.epoch_on_device
        columns = min(
            (32, 64, 128),
            key=lambda lanes: (-(-width // lanes) * lanes, lanes if is_narrow else -lanes),
        )
    span = max(columns, min(power_of_two(width), 4096), power_of_two(-(-width // MAX_BLOCKS)))
    lanes = 2048 if is_plain and span == columns and width % 16 == 0 else 1024
    rows = 1 if spec.epoch_on_device else lanes // columns
    return Geometry(rows, columns, span, (-(-num_rows // rows), -(-width // span)))


THREADS = 256
MOST_ROWS = 64
BLOCK_LANES = 4096


def cuda_geometry(spec: KernelSpec, num_rows: int, width: int) -> Geometry:
    """Return blocks of 256 threads and about 4,096 lanes (constants of ``batches.cu``)."""
    rows = max(1, min(MOST_ROWS, BLOCK_LANES // width, num_rows))
    # 16 lanes write whole lines of 128 bytes. With more, fewer would share the work of a row.
    columns = min(power_of_two(width), max(16, THREADS // power_of_two(rows)))
    span = width if width <= BLOCK_LANES else max(BLOCK_LANES, -(-width // MAX_BLOCKS))
    return Geometry(rows, columns, span, (-(-num_rows // rows), -(-width // span)))


def power_of_two(minimum: int) -> int:
    """Return the smallest power of two that is at least ``minimum >= 1``."""
    return 1 << (minimum - 1).bit_length()
