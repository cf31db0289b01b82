// The batch kernel: `gpusampler.plan.evaluators.array` in a single launch, integer for integer.
//
// A block of threads computes several rows (batches). First, one thread per row locates the row:
// slot -> batch (keyed bijection) -> patch (search) -> key, grid and first position. Then all
// threads write the rows' samples: position -> permutation -> order. Macros leave out what no
// patch of the plan needs:
//
//   SLOTS     0 no permutation of slots, 1 Fisher-Yates, 2 grid of 32-bit slots, 3 of 64-bit slots
//   LOCATED   `slots` holds batches of the patches in `row_groups`
//   PASSES    each row is in the pass over its patch in `row_passes`, not in the epoch
//   SAMPLES   permute inside the patches
//   SMALL     the largest n permuted by Fisher-Yates, 0 if none
//   FEWEST, MOST  pairs of rounds of the largest and of the smallest patch above 32; 0 if none
//   ORDERED   look samples up in `order`
//   RAGGED    rows start at `starts`, each of its own length; otherwise rows of `width`, end to end
//   PAD       a ragged row is as long as its patch's batch size
//   ORDER_T, OUT_T  element types
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
static thread_local Index blockIdx;
#define FOR_EACH_THREAD(t) for (int t = 0; t < THREADS; ++t) {
#define END_THREADS }
#define MULHI(x, y) ((u32)(((unsigned long long)(x) * (y)) >> 32))
#endif

#include "permutation.h"

#define THREADS 256
#define MOST_ROWS 64

struct Row {
    i64 base, out;
    u32 first, lanes, n, a, b, rem, inverse, k0, step, coin;
    int pairs;
};

// The image of (line, col) after `pairs` pairs of rounds; both stay in the ragged grid.
DEVICE void shuffle_grid(u32 &line, u32 &col, u32 a, u32 b, u32 rem, u32 key, u32 step, int pairs) {
    for (int pair = 0; pair < pairs; ++pair) {
        rotate_pair(&line, &col, a, b, rem, key, step);
        key += 2 * step;
    }
}

KERNEL void gpusampler_batches(
    const i64 *slots, const i64 *starts, OUT_T *out, i64 *lengths, i64 *groups,
    const i64 *counts, const i64 *sizes, const i64 *search, const i64 *row_groups,
    const i64 *row_passes, const i64 *bases,
    const i64 *side_a, const i64 *side_b, const i64 *side_rem, const ORDER_T *order,
    int num_rows, int width, int num_groups, int steps,
    int slot_n, int slot_a, int slot_b, int slot_rem, int slot_pairs,
    int key0, int key1, int state0, int state1,
    int rows_a_block, int columns, int span) {
    SHARED Row rows[MOST_ROWS];
#if SAMPLES && SMALL
    SHARED unsigned char swaps[MOST_ROWS][32];
#endif
    const int row_0 = blockIdx.x * rows_a_block;
    const int here = num_rows - row_0 < rows_a_block ? num_rows - row_0 : rows_a_block;

    FOR_EACH_THREAD(t)
        if (t < here) {
            i64 slot = slots[row_0 + t];
#if SLOTS
            const u32 slot_step = (u32)key1 | 1u;
#endif
#if SLOTS == 1
            u32 x = (u32)slot;
            for (u32 i = slot_n - 1; i > 0; --i) {
                const u32 j = swap_of(key0, slot_step, i);
                x = x == i ? j : x == j ? i : x;
            }
            slot = x;
#elif SLOTS
#if SLOTS == 2
            u32 line = (u32)slot / (u32)slot_b, col = (u32)slot - line * (u32)slot_b;
#else
            u32 line = (u32)(slot / slot_b), col = (u32)(slot - (i64)line * slot_b);
#endif
            shuffle_grid(line, col, slot_a, slot_b, slot_rem, key0, slot_step, slot_pairs);
            slot = (i64)line * slot_b + col;
            if (slot < 2) slot ^= coin_of(key0, slot_step);
#endif
#if LOCATED
            const i64 j = slot, group = row_groups[row_0 + t];
#else
            // Search for the last patch whose first batch is not after this one.
            int place = 0;
            for (int bit = steps - 1; bit >= 0; --bit) {
                const int ahead = place + (1 << bit);
                if (ahead < num_groups && search[ahead] <= slot) place = ahead;
            }
            const i64 j = slot - search[place], group = place;
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
            row.out = starts[row_0 + t];
            // No lanes, so no writes, for an invalid slot.
            row.lanes = (u32)(PAD ? size : length > 0 ? length : 0);
#else
            row.out = (i64)(row_0 + t) * width;
            row.lanes = width;
            if (blockIdx.y == 0) {
                lengths[row_0 + t] = length;
                groups[row_0 + t] = group;
            }
#endif
#if SAMPLES
            u32 s0 = state0, s1 = state1;
#if PASSES
            const i64 pass = row_passes[row_0 + t];
            absorb_pair(&s0, &s1, pass);
#endif
            absorb_pair(&s0, &s1, group);
            row.k0 = s0;
            row.step = s1 | 1u;
            row.coin = coin_of(row.k0, row.step);
            row.a = (u32)side_a[group];
            row.b = (u32)side_b[group];
            row.rem = (u32)side_rem[group];
            row.inverse = 0xFFFFFFFFu / row.b;
            row.pairs = pairs_of(n);
#endif
        }
    END_THREADS
#if SAMPLES && SMALL
    FOR_EACH_THREAD(t)
        for (int at = t; at < here * 32; at += THREADS) {
            const Row &row = rows[at >> 5];
            swaps[at >> 5][at & 31] = (unsigned char)swap_of(row.k0, row.step, at & 31);
        }
    END_THREADS
#endif
    // `columns` threads, a power of two, share a row.
    FOR_EACH_THREAD(t)
        const u32 from = (u32)blockIdx.y * span;
        for (int r = t / columns; r < here; r += THREADS / columns) {
            const Row row = rows[r];
            const u32 end = row.lanes < from + span ? row.lanes : from + span;
            for (u32 lane = from + (t & (columns - 1)); lane < end; lane += columns) {
                u32 x = row.first + lane;
                if (x >= row.n) x %= row.n;
#if SAMPLES && SMALL
                if (row.pairs == 0) {
                    for (u32 i = row.n - 1; i > 0; --i) {
                        const u32 j = swaps[r][i];
                        x = x == i ? j : x == j ? i : x;
                    }
                }
#endif
#if SAMPLES && MOST
                if (!SMALL || row.pairs) {
                    // Division by a multiplication that is at most 1 too small.
                    u32 line = MULHI(x, row.inverse), col = x - line * row.b;
                    if (col >= row.b) { ++line; col -= row.b; }
                    shuffle_grid(line, col, row.a, row.b, row.rem, row.k0, row.step,
                                 FEWEST == MOST ? MOST : row.pairs);
                    x = line * row.b + col;
                    if (x < 2) x ^= row.coin;
                }
#endif
                const i64 sample = row.base + x;
#if ORDERED
                out[row.out + lane] = (OUT_T)order[sample];
#else
                out[row.out + lane] = (OUT_T)sample;
#endif
            }
        }
    END_THREADS
}
