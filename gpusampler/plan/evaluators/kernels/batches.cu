// The batch kernel: `gpusampler.plan.evaluators.array` in a single launch, integer for integer.
//
// A block of threads computes several rows (batches). First, one thread per row locates the row:
// slot -> batch (keyed bijection) -> patch (search) -> key, grid and first position. Then all
// threads write the rows' samples: position -> permutation -> order. Macros leave out what no
// patch of the plan needs:
//
//   SLOTS     0 no permutation of slots, 1 Fisher-Yates, 2 grid of 32-bit slots, 3 of 64-bit slots
//   STEPS     steps of several slots: 1 all of one size, 2 with a short step
//   RUNS      batches lie in runs of cost buckets, 2 after a permutation inside the bucket
//   COSTLIEST the most expensive batches come first; 2: which ones these are depends on the epoch
//   IN_ORDER  the batches of a patch are consecutive, patches in the order of `epoch_patches`
//   VISITS    each slot visits the next group, 2 in permuted order
//   FEW       the number of group ends compared with a batch to find its group, 0 to bisect
//   OWN       1 a group's batches repeat, 2 its passes continue from epoch to epoch
//   PASSES    each row is in its own pass over its patch, not in the epoch
//   SAMPLES   permute inside the patches
//   SMALL     the largest n permuted by Fisher-Yates, 0 if none
//   FEWEST, MOST  pairs of rounds of the largest and of the smallest patch above 32; 0 if none
//   ORDERED   look samples up in `order`
//   BINS      groups are cost bins: return their patches
//   RAGGED    rows start at `starts`, each of its own length; otherwise rows of `width`, end to end
//   PAD       a ragged row is as long as its patch's batch size
//   ORDER_T, OUT_T  element types
//   PATCH_ORDER  the kernel of the patches' order, instead of that of batches
//   AT_...    where the numbers of `plan` are: see PLAN_WORDS in kernel_spec.py
//
// Without nvcc or NVRTC, this is C++ for the host: tests compile and run it.

#ifdef __CUDACC__
#define KERNEL extern "C" __global__
#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define FOR_EACH_THREAD(t) { const int t = threadIdx.x;
#define END_THREADS } __syncthreads();
#define MULHI(x, y) __umulhi((x), (y))
#else
#define KERNEL extern "C"
#define DEVICE static inline
#define SHARED static thread_local
struct Index { int x, y; };
struct longlong2 { long long x, y; };
static thread_local Index blockIdx;
#define FOR_EACH_THREAD(t) for (int t = 0; t < THREADS; ++t) {
#define END_THREADS }
#define MULHI(x, y) ((u32)(((unsigned long long)(x) * (y)) >> 32))
#endif

#include "permutation.h"

#define THREADS 256
#define MOST_ROWS 64

// Aligned so that loads take 16 bytes.
struct alignas(16) Row {
    i64 base, out_bytes;
    u32 first, end, n, a, last, b, rem, inverse, shift, k0, step, coin;
    int pairs;
};

// The image of (line, col) after `pairs` pairs of rounds; both stay in the ragged grid.
DEVICE void shuffle_grid(u32 &line, u32 &col, u32 a, u32 last, u32 b, u32 rem, u32 key, u32 step,
                         int pairs) {
    for (int pair = 0; pair < pairs; ++pair) {
        rotate_pair(&line, &col, a, last, b, rem, key, step);
        key += 2 * step;
    }
}

DEVICE u32 permute_few(u32 x, u32 n, u32 key, u32 step) {
    for (u32 i = n - 1; i > 0; --i) {
        const u32 j = swap_of(key, step, i);
        x = x == i ? j : x == j ? i : x;
    }
    return x;
}

// Permute 0 <= x < n < 2**62.
DEVICE i64 permute_wide(i64 x, i64 n, i64 a, i64 b, i64 rem, u32 k0, u32 k1) {
    const u32 step = k1 | 1u;
    if (n <= SMALL_N) return n > 1 ? permute_few((u32)x, (u32)n, k0, step) : x;
    u32 line = (u32)(x / b), col = (u32)(x - (i64)line * b);
    shuffle_grid(line, col, (u32)a, (u32)a - 1, (u32)b, (u32)rem, k0, step, pairs_of(n));
    x = (i64)line * b + col;
    return x < 2 ? x ^ coin_of(k0, step) : x;
}

// Numbers and arrays of the plan.
#define NUMBER(name) (plan[AT_##name])
#define ARRAY(name) (plan + plan[AT_##name])

// The last of `count` ascending offsets that is not above the value, by 2**bits >= count.
DEVICE int search_offsets(const i64 *offsets, int count, int bits, i64 value) {
    int place = 0;
    for (int bit = bits - 1; bit >= 0; --bit) {
        const int ahead = place + (1 << bit);
        if (ahead < count && offsets[ahead] <= value) place = ahead;
    }
    return place;
}

// divmod(epoch * slots + j, own): the pass over a group and the batch in it. The pass wraps.
DEVICE i64 pass_and_batch(i64 epoch, i64 j, i64 slots, i64 own, i64 &batch) {
    const i64 epoch_quotient = epoch / own, epoch_rest = epoch % own;
    const i64 slot_quotient = slots / own, slot_rest = slots % own;
    const i64 product = epoch_rest * slot_rest, sum = product % own + j;
    batch = sum % own;
    return (i64)((unsigned long long)epoch * slot_quotient +
                 (unsigned long long)epoch_quotient * slot_rest) + product / own + sum / own;
}

struct Epoch {
    i64 number;
    int slot_n, slot_a, slot_b, slot_rem, slot_pairs;
    u32 key0, key1, other0, other1;
};

// The batch of a slot, as an index into the batches before shuffling; without `COSTLIEST`.
DEVICE i64 batch_of(i64 slot, const i64 *plan, const Epoch &epoch) {
    i64 index = slot;
#if SLOTS || STEPS
    const u32 key_step = epoch.key1 | 1u;
#endif
#if STEPS
    const i64 step_width = NUMBER(STEP_WIDTH), num_steps = NUMBER(NUM_STEPS);
    const i64 step = slot / step_width, within = slot - step * step_width;
    index = step == num_steps ? 0 : step;
#endif
#if SLOTS == 1
    index = permute_few((u32)index, epoch.slot_n, epoch.key0, key_step);
#elif SLOTS
#if SLOTS == 2
    u32 line = (u32)index / (u32)epoch.slot_b, col = (u32)index - line * (u32)epoch.slot_b;
#else
    u32 line = (u32)(index / epoch.slot_b), col = (u32)(index - (i64)line * epoch.slot_b);
#endif
    shuffle_grid(line, col, epoch.slot_a, epoch.slot_a - 1, epoch.slot_b, epoch.slot_rem,
                 epoch.key0, key_step, epoch.slot_pairs);
    index = (i64)line * epoch.slot_b + col;
    if (index < 2) index ^= coin_of(epoch.key0, key_step);
#endif
#if STEPS
    index = index * step_width + within;
#endif
#if STEPS == 2
    // The short step takes consecutive batches, cyclically, from a random start.
    const i64 num_slots = NUMBER(NUM_SLOTS), short_step = NUMBER(SHORT_STEP);
    const i64 limit = num_slots < 0x7FFFFFFF ? num_slots : 0x7FFFFFFF;
    const i64 start = MULHI(hash(epoch.key0 + 62u * key_step), (u32)limit);
    const i64 overflow = start + short_step - num_slots;
    index += overflow > 0 ? overflow : 0;
    index += index >= start ? short_step : 0;
    if (step == num_steps) index = (start + within) % num_slots;
#endif
#if RUNS == 2
    const i64 *offsets = ARRAY(BUCKET_OFFSETS);
    const int bucket = search_offsets(offsets, NUMBER(NUM_BUCKETS), NUMBER(BUCKET_BITS), index);
    u32 b0 = epoch.other0, b1 = epoch.other1;
    absorb_pair(&b0, &b1, bucket);
    index = offsets[bucket] + permute_wide(index - offsets[bucket], ARRAY(BUCKET_COUNTS)[bucket],
                                           ARRAY(BUCKET_A)[bucket], ARRAY(BUCKET_B)[bucket],
                                           ARRAY(BUCKET_REM)[bucket], b0, b1);
#endif
    return index;
}

#if COSTLIEST
// The index of the i-th chosen batch in this epoch; they ascend.
DEVICE i64 chosen_batch(const i64 *plan, i64 epoch, int i) {
    i64 index = ARRAY(CHOSEN)[i];
#if COSTLIEST == 2
    const i64 nth = ARRAY(CHOSEN_NTH)[i], slots = ARRAY(CHOSEN_SLOTS)[i];
    const i64 own = ARRAY(CHOSEN_OWN)[i];
    i64 first, slot = nth;
    pass_and_batch(epoch, 0, slots, own, first);
    const i64 first_short = own - 1 - first;
    if (own > 1 && nth >= first_short) slot += 1 + (nth - first_short) / (own - 1);
    index += slot < slots ? slot : slots - 1;
#endif
    return index;
}

// Where a batch is among the chosen ones; -1 if it is not.
DEVICE int find_chosen(const i64 *plan, i64 epoch, i64 index) {
    const int count = NUMBER(NUM_CHOSEN);
    int place = 0;
    for (int bit = (int)NUMBER(CHOSEN_BITS) - 1; bit >= 0; --bit) {
        const int ahead = place + (1 << bit);
        if (ahead < count && chosen_batch(plan, epoch, ahead) <= index) place = ahead;
    }
    return chosen_batch(plan, epoch, place) == index ? place : -1;
}
#endif

#if PATCH_ORDER
// One block: the order of an epoch's patches, and the first slot of each.
KERNEL void gpusampler_patch_order(
    i64 *patches, i64 *offsets, const i64 *plan, int num_patches, int a, int b, int rem,
    int key0, int key1, int shuffled) {
    SHARED i64 sizes[2][THREADS];
    const i64 *first_batch = ARRAY(FIRST_BATCH);
    i64 before = 0;
    for (int first = 0; first < num_patches; first += THREADS) {
        FOR_EACH_THREAD(t)
            i64 size = 0;
            if (first + t < num_patches) {
                i64 patch = first + t;
                if (shuffled) patch = permute_wide(patch, num_patches, a, b, rem, key0, key1);
                patches[first + t] = patch;
                size = first_batch[patch + 1] - first_batch[patch];
            }
            sizes[0][t] = size;
        END_THREADS
        // Running totals, by doubling; from one array into the other.
        int now = 0;
        for (int distance = 1; distance < THREADS; distance *= 2) {
            FOR_EACH_THREAD(t)
                sizes[1 - now][t] = sizes[now][t] + (t >= distance ? sizes[now][t - distance] : 0);
            END_THREADS
            now = 1 - now;
        }
        // Read before the barrier: after it, the next turn writes to the totals.
        const i64 total = sizes[now][THREADS - 1];
        FOR_EACH_THREAD(t)
            if (first + t < num_patches)
                offsets[first + t] = before + (t ? sizes[now][t - 1] : 0);
        END_THREADS
        before += total;
    }
}
#else
KERNEL void gpusampler_batches(
    const i64 *slots, const i64 *starts, OUT_T *out, i64 *lengths, i64 *groups,
    const i64 *counts, const i64 *sizes, const i64 *search, const i64 *plan,
    const i64 *epoch_patches, const i64 *epoch_offsets, const i64 *bases,
    const i64 *sides, const i64 *rests, const ORDER_T *order,
    int num_rows, int width, int num_offsets, int search_bits,
    int slot_n, int slot_a, int slot_b, int slot_rem, int slot_pairs,
    int key0, int key1, int state0, int state1, int other0, int other1,
    int epoch_low, int epoch_high,
    int rows_a_block, int columns, int span) {
    SHARED Row rows[MOST_ROWS];
#if SAMPLES && SMALL
    // Rows of 36 bytes begin in different banks.
    SHARED unsigned char images[MOST_ROWS][36];
#endif
    const int row_0 = blockIdx.x * rows_a_block;
    const int here = num_rows - row_0 < rows_a_block ? num_rows - row_0 : rows_a_block;
    const u32 from = (u32)blockIdx.y * span;

    FOR_EACH_THREAD(t)
        if (t < here) {
            i64 slot = slots[row_0 + t];
#if STEPS || RUNS || COSTLIEST || IN_ORDER || VISITS
            // Slots on a GPU are not checked: invalid ones must not lead outside an array.
            slot %= NUMBER(NUM_SLOTS);
            if (slot < 0) slot += NUMBER(NUM_SLOTS);
#endif
            const Epoch epoch = {(i64)((unsigned long long)(u32)epoch_high << 32 | (u32)epoch_low),
                                 slot_n, slot_a, slot_b, slot_rem, slot_pairs,
                                 (u32)key0, (u32)key1, (u32)other0, (u32)other1};
#if VISITS
            i64 place, j;
            const i64 num_visited = NUMBER(NUM_VISITED);
            const i64 round = pass_and_batch(epoch.number, slot, NUMBER(NUM_SLOTS), num_visited, place);
#if VISITS == 2
            u32 v0 = epoch.other0, v1 = epoch.other1;
            absorb_pair(&v0, &v1, round);
            absorb_pair(&v0, &v1, 0);
            place = permute_wide(place, num_visited, NUMBER(VISIT_A), NUMBER(VISIT_B),
                                 NUMBER(VISIT_REM), v0, v1);
#endif
            const i64 group = ARRAY(VISITED)[place], own = ARRAY(OWN_BATCHES)[group];
            const i64 pass = round / own;
            j = round % own;
#else
#if IN_ORDER
            const int turn =
                search_offsets(epoch_offsets, NUMBER(NUM_PATCHES), NUMBER(PATCH_BITS), slot);
            const i64 index = ARRAY(FIRST_BATCH)[epoch_patches[turn]] + slot - epoch_offsets[turn];
#else
            i64 index = batch_of(slot, plan, epoch);
#if COSTLIEST
            if (slot < NUMBER(NUM_CHOSEN)) {
                index = chosen_batch(plan, epoch.number, (int)ARRAY(CHOSEN_OF_SLOT)[slot]);
            } else {
                // What a chosen batch left its slot for; that may be a chosen one, too.
                for (int left = NUMBER(NUM_CHOSEN); left > 0; --left) {
                    const int k = find_chosen(plan, epoch.number, index);
                    if (k < 0) break;
                    index = batch_of(ARRAY(SLOT_OF_CHOSEN)[k], plan, epoch);
                }
            }
#endif
#endif
            // The last group (or run) whose first batch is not after this one.
#if FEW
            int place = 0;
            for (int pair = 0; pair < FEW / 2; ++pair) {
                const longlong2 last = ((const longlong2 *)search)[pair];
                place += (last.x < index) + (last.y < index);
            }
#else
            const int place = search_offsets(search, num_offsets, search_bits, index);
#endif
            i64 j = index - search[FEW + place];
#if RUNS
            const i64 group = ARRAY(RUN_GROUPS)[place];
            j += ARRAY(RUN_FIRST)[place];
#else
            const i64 group = place;
#endif
#if OWN == 1
            j %= ARRAY(OWN_BATCHES)[group];
#elif OWN == 2
            const i64 pass = pass_and_batch(epoch.number, j, ARRAY(GROUP_SLOTS)[group],
                                            ARRAY(OWN_BATCHES)[group], j);
#endif
#endif
            // Low word: the size. High word: how many of the first batches have one sample more.
            const i64 n = counts[group], low = sizes[group] & 0xFFFFFFFF, larger = sizes[group] >> 32;
            const i64 first = j * low + (j < larger ? j : larger), size = low + (j < larger);
            const i64 length = n - first < size ? n - first : size;
            Row &row = rows[t];
            row.n = (u32)n;
            row.first = (u32)first;
            row.base = bases[group];
#if RAGGED
            row.out_bytes = starts[row_0 + t] * (i64)sizeof(OUT_T);
            // No lanes, so no writes, for an invalid slot.
            const u32 lanes = (u32)(PAD ? size : length > 0 ? length : 0);
#else
            row.out_bytes = (i64)(row_0 + t) * width * (i64)sizeof(OUT_T);
            const u32 lanes = width;
            if (blockIdx.y == 0) {
                lengths[row_0 + t] = length;
#if BINS
                groups[row_0 + t] = ARRAY(PATCH_OF_BIN)[group];
#else
                groups[row_0 + t] = group;
#endif
            }
#endif
            row.end = lanes < from + span ? lanes : from + span;
#if SAMPLES
            u32 s0 = state0, s1 = state1;
#if PASSES
            absorb_pair(&s0, &s1, pass);
#endif
            absorb_pair(&s0, &s1, group);
            row.k0 = s0;
            row.step = s1 | 1u;
            row.coin = coin_of(row.k0, row.step);
            const u32 lines = (u32)sides[group], columns = (u32)(sides[group] >> 32);
            row.a = lines & 0xFFFF;
            row.last = lines >> 16;
            row.b = columns & 0xFFFF;
            row.shift = columns >> 16;
            row.rem = (u32)rests[group];
            row.inverse = (u32)(rests[group] >> 32);
            row.pairs = pairs_of(n);
#endif
        }
    END_THREADS
#if SAMPLES && SMALL
    FOR_EACH_THREAD(t)
        for (int at = t; at < here * 32; at += THREADS) {
            const Row &row = rows[at >> 5];
            images[at >> 5][at & 31] = (unsigned char)swap_of(row.k0, row.step, at & 31);
        }
    END_THREADS
    // Compose a row's swaps: the image of i becomes that of j, whose own becomes i.
    FOR_EACH_THREAD(t)
        if (t < here && rows[t].pairs == 0) {
            for (u32 i = 1; i < rows[t].n; ++i) {
                const u32 j = images[t][i];
                images[t][i] = images[t][j];
                images[t][j] = (unsigned char)i;
            }
        }
    END_THREADS
#endif
    // `columns` threads, a power of two, share a row.
    FOR_EACH_THREAD(t)
        for (int r = t / columns; r < here; r += THREADS / columns) {
            const Row row = rows[r];
            OUT_T *const row_out = (OUT_T *)((char *)out + row.out_bytes);
            for (u32 lane = from + (t & (columns - 1)); lane < row.end; lane += columns) {
                u32 x = row.first + lane;
                if (x >= row.n) x %= row.n;
#if SAMPLES && SMALL
                if (row.pairs == 0) x = images[r][x];
#endif
#if SAMPLES && MOST
                if (!SMALL || row.pairs) {
                    // Division by multiplication with a reciprocal: see `side_words`.
                    u32 line = MULHI(x, row.inverse) >> row.shift, col = x - line * row.b;
                    shuffle_grid(line, col, row.a, row.last, row.b, row.rem, row.k0, row.step, FEWEST);
#if FEWEST < MOST
                    shuffle_grid(line, col, row.a, row.last, row.b, row.rem,
                                 row.k0 + 2 * FEWEST * row.step, row.step, row.pairs - FEWEST);
#endif
                    x = line * row.b + col;
                    if (x < 2) x ^= row.coin;
                }
#endif
                const i64 sample = row.base + x;
#if ORDERED
                row_out[lane] = (OUT_T)order[sample];
#else
                row_out[lane] = (OUT_T)sample;
#endif
            }
        }
    END_THREADS
}
#endif
