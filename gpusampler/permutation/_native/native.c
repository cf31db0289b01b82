/* Evaluation of batches on the host: the permutation of `permutation.h` for rows of positions.
 *
 * Functions take addresses and sizes of arrays, and know nothing about plans or NumPy. A row is a
 * range of consecutive positions of one patch. Tiles of 64 rows are located and get their keys
 * together; then each row's positions are permuted, up to 64 at a time, with the row's values in
 * registers. The compiler vectorizes these loops, once for each form in `FORMS`; the processor
 * decides which form runs.
 *
 * No content of a table leads to an access outside the arrays: every index that is read from a
 * table or computed from one is compared with the size of the array that it indexes, before use,
 * and every row with the room that is left in the output. Grids are
 * not read but computed. Whatever fails a check raises ValueError. Sums that could overflow wrap.
 */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "permutation.h"

#ifndef SOURCE_HASH
#define SOURCE_HASH ""
#endif

/* A job's members are addresses and numbers of 64 bits. */
#if UINTPTR_MAX != UINT64_MAX
#error "pointers must have 64 bits"
#endif

#define TILE 64
#define STEP 16 /* lanes are permuted in multiples of this many, whatever the form */
#define MAX_SIDE 0x7FFFFFFF
#define GIL_SAMPLES 4096 /* shorter calls keep the GIL: it may take 5 ms to get it back */

typedef unsigned long long u64;

/* ---- one tile of lanes ---- */

typedef struct {
    u32 a, b, rem;
} Grid;

/* The grid of 1 <= n < 2**62 cells, as `reference.grid_of`. */
DEVICE Grid grid_of(i64 n) {
    const i64 m = n - 1;
    i64 root = (i64)sqrt((double)m), b;
    Grid grid;
    /* From 2**52 on, the root of the rounded number may be one too large, never too small. */
    root -= root * root > m;
    grid.a = (u32)(root + 1);
    b = (n + root) / (root + 1);
    grid.b = (u32)b;
    grid.rem = (u32)(n - root * b);
    return grid;
}

DEVICE void permute_lanes(u32 *line, u32 *col, u32 lanes, Grid grid, u32 k0, u32 step, int pairs) {
    for (int pair = 0; pair < pairs; ++pair) {
        for (u32 i = 0; i < lanes; ++i)
            rotate_pair(line + i, col + i, grid.a, grid.a - 1, grid.b, grid.rem, k0, step);
        k0 += 2 * step;
    }
}

/* Permute positions 0 .. n-1 for n <= 32. */
DEVICE void permute_small(unsigned char *images, u32 n, u32 k0, u32 step) {
    unsigned char positions[SMALL_N];
    u32 swaps[SMALL_N];
    for (u32 i = 0; i < SMALL_N; ++i) {
        swaps[i] = swap_of(k0, step, i);
        positions[i] = (unsigned char)i;
    }
    for (u32 i = n - 1; i > 0; --i) {
        const unsigned char swapped = positions[i];
        positions[i] = positions[swaps[i]];
        positions[swaps[i]] = swapped;
    }
    for (u32 i = 0; i < n; ++i) images[positions[i]] = (unsigned char)i;
}

DEVICE u32 round_up(u32 lanes) { return (lanes + STEP - 1) & ~(u32)(STEP - 1); }

/* ---- rows ---- */

typedef struct {
    i64 first[TILE], size[TILE], n[TILE], base[TILE];
    u32 k0[TILE], k1[TILE];
} Rows;

DEVICE void write_grid_row(i64 *out, u32 first, i64 size, u32 n, i64 base, u32 k0, u32 k1) {
    const Grid grid = grid_of(n);
    const u32 step = k1 | 1, coin = coin_of(k0, step), inverse = 0xFFFFFFFFu / grid.b;
    const int pairs = pairs_of(n);
    u32 line[TILE], col[TILE];
    while (size > 0) {
        const u32 lanes = size < TILE ? (u32)size : TILE, width = round_up(lanes);
        /* 32 < n: beyond a patch's end, at most two rounds through it. */
        for (u32 i = 0; i < width; ++i) {
            u32 x = first + i;
            x = x >= n ? x - n : x;
            line[i] = x >= n ? x - n : x;
        }
        for (u32 i = 0; i < width; ++i) {
            /* Division by a multiplication that is at most 1 too small. */
            const u32 x = line[i], quotient = MULHI(x, inverse), rest = x - quotient * grid.b;
            const u32 is_short = rest >= grid.b;
            line[i] = quotient + is_short;
            col[i] = rest - (is_short ? grid.b : 0);
        }
        permute_lanes(line, col, width, grid, k0, step, pairs);
        for (u32 i = 0; i < lanes; ++i) {
            u32 x = line[i] * grid.b + col[i];
            x ^= x < 2 ? coin : 0;
            out[i] = (i64)((u64)base + x);
        }
        out += lanes;
        size -= lanes;
        if (size > 0) first = (u32)(((u64)first + lanes) % n);
    }
}

/* Write base plus the permuted positions of checked rows, end to end. */
DEVICE void write_rows(const Rows *rows, int count, int permuted, i64 *out) {
    for (int k = 0; k < count; ++k) {
        const u32 n = (u32)rows->n[k];
        const i64 size = rows->size[k], base = rows->base[k];
        u32 x = (u32)(rows->first[k] % n);
        if (permuted && n > SMALL_N) {
            write_grid_row(out, x, size, n, base, rows->k0[k], rows->k1[k]);
        } else {
            unsigned char images[SMALL_N];
            if (permuted) permute_small(images, n, rows->k0[k], rows->k1[k] | 1);
            for (i64 i = 0; i < size; ++i) {
                out[i] = (i64)((u64)base + (permuted ? images[x] : x));
                x = x + 1 == n ? 0 : x + 1;
            }
        }
        out += size;
    }
}

/* Keys of rows: `reference.key_of`. `passes` may be NULL: then `pass` is the pass of all. */
DEVICE void derive_keys(u32 s0, u32 s1, const i64 *passes, i64 pass, const i64 *groups, int count,
                        u32 *k0, u32 *k1) {
    if (passes == NULL) absorb_pair(&s0, &s1, pass);
    for (int k = 0; k < count; ++k) {
        u32 t0 = s0, t1 = s1;
        if (passes != NULL) absorb_pair(&t0, &t1, passes[k]);
        absorb_pair(&t0, &t1, groups[k]);
        k0[k] = t0;
        k1[k] = t1;
    }
}

/* Permute up to 64 positions, 0 <= x < n < 2**62, by one permutation. */
DEVICE void permute_tile(i64 *x, int count, i64 n, Grid grid, u32 k0, u32 k1) {
    const u32 step = k1 | 1, width = round_up((u32)count);
    if (n <= SMALL_N) {
        unsigned char images[SMALL_N];
        permute_small(images, (u32)n, k0, step);
        for (int i = 0; i < count; ++i) x[i] = images[x[i]];
    } else {
        const u32 coin = coin_of(k0, step);
        u32 line[TILE], col[TILE];
        for (u32 i = (u32)count; i < width; ++i) line[i] = col[i] = 0;
        if (n <= 0xFFFFFFFFLL) {
            for (int i = 0; i < count; ++i) {
                line[i] = (u32)x[i] / grid.b;
                col[i] = (u32)x[i] - line[i] * grid.b;
            }
        } else {
            for (int i = 0; i < count; ++i) {
                line[i] = (u32)(x[i] / grid.b);
                col[i] = (u32)(x[i] - (i64)line[i] * grid.b);
            }
        }
        permute_lanes(line, col, width, grid, k0, step, pairs_of(n));
        for (int i = 0; i < count; ++i) {
            const i64 image = (i64)line[i] * grid.b + col[i];
            x[i] = image < 2 ? image ^ coin : image;
        }
    }
}

/* ---- checksums of an order ---- */

#define BLOCK_BYTES 65536

/* mix(i + 1) of each word i of a block. */
static u32 factors[BLOCK_BYTES / 4];

/* The wrapping sum of words, each times a factor of its place in its block. The factors differ and
 * are not 0, so a changed word and two exchanged words always change the sum of a block. */
DEVICE u64 sum_words(const u32 *words, const u32 *factor, u32 count) {
    u64 sum = 0;
    for (u32 i = 0; i < count; ++i) sum += (u64)words[i] * factor[i];
    return sum;
}

/* Whether all items are in 0 .. last, a number that is not negative: else a sign bit is set. */
DEVICE int are_in_range(const void *items, int is_32_bit, i64 count, i64 last) {
    u64 wrong = 0;
    if (is_32_bit) {
        const u32 *item = items, end = (u32)last;
        u32 signs = 0;
        for (i64 i = 0; i < count; ++i) signs |= item[i] | (end - item[i]);
        wrong = (u64)signs << 32;
    } else {
        const u64 *item = items, end = (u64)last;
        for (i64 i = 0; i < count; ++i) wrong |= item[i] | (end - item[i]);
    }
    return !(wrong >> 63);
}

/* The lowest and the highest of at least one position. */
DEVICE void find_span(const i64 *positions, i64 count, i64 *low, i64 *high) {
    i64 lowest = positions[0], highest = positions[0];
    for (i64 i = 1; i < count; ++i) {
        lowest = positions[i] < lowest ? positions[i] : lowest;
        highest = positions[i] > highest ? positions[i] : highest;
    }
    *low = lowest;
    *high = highest;
}

/* ---- the same code, compiled for several processors ---- */

typedef struct {
    const char *name;
    void (*rows)(const Rows *, int, int, i64 *);
    void (*keys)(u32, u32, const i64 *, i64, const i64 *, int, u32 *, u32 *);
    void (*tile)(i64 *, int, i64, Grid, u32, u32);
    u64 (*sum)(const u32 *, const u32 *, u32);
    int (*range)(const void *, int, i64, i64);
    void (*span)(const i64 *, i64, i64 *, i64 *);
} Form;

#define DEFINE_FORM(name, target)                                                               \
    target static void rows_##name(const Rows *rows, int count, int permuted, i64 *out) {       \
        write_rows(rows, count, permuted, out);                                                 \
    }                                                                                           \
    target static void keys_##name(u32 s0, u32 s1, const i64 *passes, i64 pass,                 \
                                   const i64 *groups, int count, u32 *k0, u32 *k1) {            \
        derive_keys(s0, s1, passes, pass, groups, count, k0, k1);                               \
    }                                                                                           \
    target static void tile_##name(i64 *x, int count, i64 n, Grid grid, u32 k0, u32 k1) {       \
        permute_tile(x, count, n, grid, k0, k1);                                                \
    }                                                                                           \
    target static u64 sum_##name(const u32 *words, const u32 *factor, u32 count) {              \
        return sum_words(words, factor, count);                                                 \
    }                                                                                           \
    target static int range_##name(const void *items, int is_32_bit, i64 count, i64 last) {     \
        return are_in_range(items, is_32_bit, count, last);                                     \
    }                                                                                           \
    target static void span_##name(const i64 *positions, i64 count, i64 *low, i64 *high) {      \
        find_span(positions, count, low, high);                                                 \
    }

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define HAS_X86_FORMS 1
#ifdef __clang__
#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512)))
#else
#define WIDE \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
DEFINE_FORM(avx512, WIDE)
DEFINE_FORM(avx2, __attribute__((target("avx2"))))
#endif
DEFINE_FORM(plain, )

/* Best first. The compiler vectorizes `plain` for what every processor of the platform has. */
static const Form FORMS[] = {
#ifdef HAS_X86_FORMS
    {"avx512", rows_avx512, keys_avx512, tile_avx512, sum_avx512, range_avx512,
     span_avx512},
    {"avx2", rows_avx2, keys_avx2, tile_avx2, sum_avx2, range_avx2,
     span_avx2},
#endif
    {"plain", rows_plain, keys_plain, tile_plain, sum_plain, range_plain,
     span_plain},
};
#define NUM_FORMS ((int)(sizeof FORMS / sizeof FORMS[0]))

static const Form *form = NULL;

static int is_supported(int index) {
#ifdef HAS_X86_FORMS
    __builtin_cpu_init();
    if (index == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (index == 1) return __builtin_cpu_supports("avx2") != 0;
#endif
    return index < NUM_FORMS;
}

/* ---- batches: what a launch of the kernel does ---- */

/* Description of a set of batches. Python fills an array of int64 in this order. */
typedef struct {
    i64 num_groups, num_slots;
    const i64 *counts, *starts; /* samples of each group, and the first position of each */
    const i64 *sizes, *larger;  /* batch size; number of first batches with one more, or NULL */
    const i64 *offsets;         /* num_groups: number of slots before each group */
    const i64 *group_of;        /* num_groups: group that each offset belongs to; NULL: the same */
    i64 permute_slots, permute_samples, pad, width; /* width > 0: of every row */
    i64 slot_state[2], sample_state[2];
} Job;

typedef struct {
    i64 *group, *batch, *length, *size; /* shape (count,) each */
} Columns;

typedef struct {
    i64 rows, samples, wrong; /* wrong: 1 + the slot with a wrong table, or 0 */
} Done;

/* Find the batch of a slot, and write its row. Return 0 if a table is wrong. */
static int locate(const Job *job, i64 slot, Rows *rows, int k, i64 *group, i64 *batch,
                  i64 *length) {
    i64 low = 0, more = job->num_groups, j, g, n, size, larger, first;
    /* The last offset that is not above the slot: low is in 0 .. num_groups - 1. */
    while (more > 1) {
        const i64 half = more / 2;
        low = job->offsets[low + half] <= slot ? low + half : low;
        more -= half;
    }
    j = (i64)((u64)slot - (u64)job->offsets[low]);
    g = job->group_of == NULL ? low : job->group_of[low];
    if (g < 0 || g >= job->num_groups) return 0;
    n = job->counts[g];
    size = job->sizes[g];
    larger = job->larger == NULL ? 0 : job->larger[g];
    /* With j < n, no product overflows. */
    if (n < 1 || n > MAX_SIDE || j < 0 || j >= n || size < 1 || size > MAX_SIDE || larger < 0)
        return 0;
    first = j * size + (j < larger ? j : larger);
    size += j < larger;
    if (first >= n) return 0;
    rows->first[k] = first;
    rows->n[k] = n;
    rows->base[k] = job->starts[g];
    *group = g;
    *batch = j;
    *length = n - first < size ? n - first : size;
    rows->size[k] = job->width > 0 ? job->width : job->pad ? size : *length;
    return 1;
}

/* Evaluate slots, as many as fit: with `slots` those, else first, first + stride, ... */
static Done evaluate(const Job *job, i64 epoch, const i64 *slots, i64 first, i64 stride, i64 count,
                     Columns columns, i64 *out, i64 capacity) {
    Done done = {0, 0, 0};
    Rows rows;
    i64 tile[TILE];
    u32 s0 = (u32)job->slot_state[0], s1 = (u32)job->slot_state[1];
    const int permute_slots = job->permute_slots && job->num_slots > 1;
    const Grid grid = grid_of(job->num_slots);
    absorb_pair(&s0, &s1, epoch);
    absorb_pair(&s0, &s1, 0);
    while (done.rows < count) {
        const int in_tile = count - done.rows < TILE ? (int)(count - done.rows) : TILE;
        i64 samples = 0;
        int k;
        for (k = 0; k < in_tile; ++k) {
            const i64 row = done.rows + k;
            i64 slot = slots != NULL ? slots[row] : (i64)((u64)first + (u64)row * (u64)stride);
            if (slot < 0) {
                done.wrong = 1 + row;
                return done;
            }
            tile[k] = slot < job->num_slots ? slot : slot % job->num_slots;
        }
        if (permute_slots) form->tile(tile, in_tile, job->num_slots, grid, s0, s1);
        for (k = 0; k < in_tile; ++k) {
            const i64 row = done.rows + k;
            if (!locate(job, tile[k], &rows, k, columns.group + row, columns.batch + row,
                        columns.length + row)) {
                done.wrong = 1 + row;
                return done;
            }
            columns.size[row] = rows.size[k];
            if (out != NULL) {
                if (rows.size[k] > capacity - done.samples - samples) break;
                samples += rows.size[k];
            }
        }
        if (out != NULL) {
            if (job->permute_samples)
                form->keys((u32)job->sample_state[0], (u32)job->sample_state[1], NULL, epoch,
                           columns.group + done.rows, k, rows.k0, rows.k1);
            form->rows(&rows, k, job->permute_samples != 0, out + done.samples);
        }
        done.rows += k;
        done.samples += samples;
        if (k < in_tile) break;
    }
    return done;
}

/* Permute given rows, end to end; keys may be NULL. Return 1 + the number of a wrong row, or 0. */
static i64 write_ranges(const i64 *first, const i64 *size, const i64 *n, const i64 *base,
                        const i64 *k0, const i64 *k1, i64 count, i64 *out, i64 capacity) {
    Rows rows;
    for (i64 row = 0; row < count; row += TILE) {
        const int in_tile = count - row < TILE ? (int)(count - row) : TILE;
        i64 samples = 0;
        for (int k = 0; k < in_tile; ++k) {
            const i64 at = row + k;
            if (first[at] < 0 || n[at] < 1 || n[at] > MAX_SIDE || size[at] < 0 ||
                size[at] > capacity - samples)
                return 1 + at;
            rows.first[k] = first[at];
            rows.n[k] = n[at];
            rows.size[k] = size[at];
            rows.base[k] = base[at];
            rows.k0[k] = k0 == NULL ? 0 : (u32)k0[at];
            rows.k1[k] = k1 == NULL ? 0 : (u32)k1[at];
            samples += size[at];
        }
        form->rows(&rows, in_tile, k0 != NULL, out);
        out += samples;
        capacity -= samples;
    }
    return capacity == 0 ? 0 : 1 + count;
}

/* Replace positions by `order[position]`. Return whether all are in range. */
static int look_up(const void *order, int is_32_bit, i64 order_size, const i64 *positions, i64 *out,
                   i64 count) {
    u64 beyond = 0;
    for (i64 i = 0; i < count; ++i) {
        const u64 position = (u64)positions[i];
        const int is_beyond = position >= (u64)order_size;
        const u64 at = is_beyond ? 0 : position;
        beyond |= (u64)is_beyond;
        out[i] = is_32_bit ? ((const int32_t *)order)[at] : ((const i64 *)order)[at];
    }
    return !beyond;
}

/* An order of `size` items of 4 or 8 bytes, in blocks of 64 KiB. */
typedef struct {
    const char *items;
    i64 item_bytes, size;
} Order;

#define POSITIONS_PER_BLOCK 256
#define POSITIONS_AT_ONCE 4096

static i64 items_in_block(const Order *order, i64 block) {
    const i64 each = BLOCK_BYTES / order->item_bytes, left = order->size - block * each;
    return left < each ? left : each;
}

/* Items that the cache closest to the processor holds while they are read twice. */
#define ITEMS_AT_ONCE 2048

/* The checksum of a block; *in_range is cleared if an item is not in 0 .. last. */
static u64 block_sum(const Order *order, i64 block, i64 last, int *in_range) {
    const i64 words = order->item_bytes / 4, count = items_in_block(order, block);
    const u32 *block_words = (const u32 *)(order->items + block * BLOCK_BYTES);
    u64 sum = 0;
    for (i64 start = 0; start < count; start += ITEMS_AT_ONCE) {
        const i64 items = count - start < ITEMS_AT_ONCE ? count - start : ITEMS_AT_ONCE;
        const u32 *first = block_words + start * words;
        sum += form->sum(first, factors + start * words, (u32)(items * words));
        if (in_range != NULL) *in_range &= form->range(first, words == 1, items, last);
    }
    return sum;
}

/* Blocks of an order that are verified when they are first used. */
typedef struct {
    Order order;
    i64 last; /* the last sample */
    const u64 *sums;
    unsigned char *is_verified;
    i64 num_new; /* blocks verified by this call */
} Blocks;

/* Compare a block's sum, and its items with the last sample, unless the block is verified. Return
 * whether it is right. Threads may verify a block at once: they store the same 1. */
static int verify_block(Blocks *blocks, i64 block) {
    int in_range = 1;
    if (blocks->is_verified[block]) return 1;
    if (block_sum(&blocks->order, block, blocks->last, &in_range) != blocks->sums[block] ||
        !in_range)
        return 0;
    blocks->is_verified[block] = 1;
    blocks->num_new += 1;
    return 1;
}

/* Verify the blocks of positions, `part` at a time: all blocks between the lowest and the highest,
 * if they are few. Return 1 + the number of a wrong block, -1 for a position that the order does
 * not have, or 0. */
static i64 verify_blocks(Blocks *blocks, const i64 *positions, i64 count, i64 part) {
    const int shift = blocks->order.item_bytes == 4 ? 14 : 13;
    for (i64 start = 0; start < count; start += part) {
        const i64 size = count - start < part ? count - start : part;
        i64 low, high;
        form->span(positions + start, size, &low, &high);
        if (low < 0 || high >= blocks->order.size) return -1;
        const i64 first = low >> shift, last = high >> shift;
        if (memchr(blocks->is_verified + first, 0, (size_t)(last - first + 1)) == NULL) continue;
        if (last - first <= size / POSITIONS_PER_BLOCK) {
            for (i64 block = first; block <= last; ++block)
                if (!verify_block(blocks, block)) return 1 + block;
        } else {
            /* Neighbours are mostly of one patch, so smaller parts have few blocks. A single
             * position has one. */
            const i64 wrong = verify_blocks(blocks, positions + start, size,
                                            size > TILE ? (size + 7) / 8 : 1);
            if (wrong) return wrong;
        }
    }
    return 0;
}

/* Write sample numbers, counting from `sample`, to the next place of each one's group. Return how
 * many were written: fewer than `count` if a group is unknown or full. */
DEVICE i64 place(const void *groups, int group_bytes, i64 count, i64 sample, i64 *next,
                 const i64 *ends, i64 num_groups, void *order, int order_bytes, i64 order_size) {
    for (i64 i = 0; i < count; ++i) {
        const u64 g = group_bytes == 1   ? ((const uint8_t *)groups)[i]
                      : group_bytes == 2 ? ((const uint16_t *)groups)[i]
                      : group_bytes == 4 ? (u64)((const int32_t *)groups)[i]
                                         : (u64)((const i64 *)groups)[i];
        if (g >= (u64)num_groups) return i;
        const i64 at = next[g];
        if (at < 0 || at >= ends[g] || at >= order_size) return i;
        next[g] = at + 1;
        if (order_bytes == 4)
            ((int32_t *)order)[at] = (int32_t)((u64)sample + (u64)i);
        else
            ((i64 *)order)[at] = (i64)((u64)sample + (u64)i);
    }
    return count;
}

/* ---- Python ---- */

static int read_numbers(PyObject *const *args, Py_ssize_t given, Py_ssize_t expected, i64 *values) {
    if (given != expected) {
        PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", expected, given);
        return 0;
    }
    for (Py_ssize_t i = 0; i < expected; ++i) {
        values[i] = PyLong_AsLongLong(args[i]);
        if (values[i] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

#define ADDRESS(type, value) ((type *)(uintptr_t)(value))

static PyObject *py_evaluate(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    i64 v[9];
    (void)self;
    if (!read_numbers(args, given, 9, v)) return NULL;
    const Job *job = ADDRESS(const Job, v[0]);
    const i64 count = v[5], capacity = v[8];
    i64 *rows = ADDRESS(i64, v[6]), *out = ADDRESS(i64, v[7]);
    const Columns columns = {rows, rows + count, rows + 2 * count, rows + 3 * count};
    if (job->num_groups < 1 || job->num_slots < 1 || job->num_slots >= 1LL << 62 || count < 0 ||
        capacity < 0) {
        PyErr_SetString(PyExc_ValueError, "a table of batches is empty or too large");
        return NULL;
    }
    const int is_long = capacity > GIL_SAMPLES || count > GIL_SAMPLES;
    PyThreadState *state = is_long ? PyEval_SaveThread() : NULL;
    const Done done = evaluate(job, v[1], ADDRESS(const i64, v[2]), v[3], v[4], count, columns, out,
                               capacity);
    if (state != NULL) PyEval_RestoreThread(state);
    if (done.wrong) {
        PyErr_Format(PyExc_ValueError, "the tables have no batch for slot number %lld of %lld",
                     done.wrong - 1, count);
        return NULL;
    }
    return Py_BuildValue("LL", done.rows, done.samples);
}

static PyObject *py_ranges(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    i64 v[9];
    (void)self;
    if (!read_numbers(args, given, 9, v)) return NULL;
    PyThreadState *state = v[8] > GIL_SAMPLES ? PyEval_SaveThread() : NULL;
    const i64 wrong = write_ranges(
        ADDRESS(const i64, v[0]), ADDRESS(const i64, v[1]), ADDRESS(const i64, v[2]),
        ADDRESS(const i64, v[3]), ADDRESS(const i64, v[4]), ADDRESS(const i64, v[5]), v[6],
        ADDRESS(i64, v[7]), v[8]);
    if (state != NULL) PyEval_RestoreThread(state);
    if (wrong) {
        PyErr_Format(PyExc_ValueError, "row %lld of %lld is out of range", wrong - 1, v[6]);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_keys(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    i64 v[8];
    u32 k0[TILE], k1[TILE];
    (void)self;
    if (!read_numbers(args, given, 8, v)) return NULL;
    const i64 *passes = ADDRESS(const i64, v[2]), *groups = ADDRESS(const i64, v[4]);
    i64 *out0 = ADDRESS(i64, v[6]), *out1 = ADDRESS(i64, v[7]);
    PyThreadState *state = v[5] > GIL_SAMPLES ? PyEval_SaveThread() : NULL;
    for (i64 row = 0; row < v[5]; row += TILE) {
        const int in_tile = v[5] - row < TILE ? (int)(v[5] - row) : TILE;
        form->keys((u32)v[0], (u32)v[1], passes == NULL ? NULL : passes + row, v[3], groups + row,
                   in_tile, k0, k1);
        for (int k = 0; k < in_tile; ++k) {
            out0[row + k] = k0[k];
            out1[row + k] = k1[k];
        }
    }
    if (state != NULL) PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

static PyObject *py_permute(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    i64 v[6];
    (void)self;
    if (!read_numbers(args, given, 6, v)) return NULL;
    const i64 *x = ADDRESS(const i64, v[0]), count = v[2], n = v[3];
    i64 *out = ADDRESS(i64, v[1]), row = 0;
    if (n < 1 || n >= 1LL << 62) {
        PyErr_Format(PyExc_ValueError, "n must be in 1 .. 2**62 - 1, got %lld", n);
        return NULL;
    }
    const Grid grid = grid_of(n);
    PyThreadState *state = count > GIL_SAMPLES ? PyEval_SaveThread() : NULL;
    int wrong = 0;
    for (; row < count && !wrong; row += TILE) {
        const int in_tile = count - row < TILE ? (int)(count - row) : TILE;
        i64 tile[TILE];
        for (int k = 0; k < in_tile; ++k) {
            tile[k] = x[row + k];
            wrong |= tile[k] < 0 || tile[k] >= n;
        }
        if (wrong) break;
        form->tile(tile, in_tile, n, grid, (u32)v[4], (u32)v[5]);
        for (int k = 0; k < in_tile; ++k) out[row + k] = tile[k];
    }
    if (state != NULL) PyEval_RestoreThread(state);
    if (wrong) {
        PyErr_Format(PyExc_ValueError, "positions must be in 0 .. %lld", n - 1);
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *py_look_up(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    i64 v[6];
    (void)self;
    if (!read_numbers(args, given, 6, v)) return NULL;
    if (v[2] < 1 || (v[1] != 4 && v[1] != 8)) {
        PyErr_SetString(PyExc_ValueError, "order must not be empty, and its items have 4 or 8 bytes");
        return NULL;
    }
    PyThreadState *state = v[5] > GIL_SAMPLES ? PyEval_SaveThread() : NULL;
    /* The size is a constant of each copy, so that its loop has no branch for it. */
    const int in_range = v[1] == 4
        ? look_up(ADDRESS(const void, v[0]), 1, v[2], ADDRESS(const i64, v[3]), ADDRESS(i64, v[4]), v[5])
        : look_up(ADDRESS(const void, v[0]), 0, v[2], ADDRESS(const i64, v[3]), ADDRESS(i64, v[4]), v[5]);
    if (state != NULL) PyEval_RestoreThread(state);
    if (!in_range) {
        PyErr_Format(PyExc_ValueError, "a position is not in 0 .. %lld, the order's last", v[2] - 1);
        return NULL;
    }
    Py_RETURN_NONE;
}

static int read_order(const i64 *v, Order *order) {
    order->items = ADDRESS(const char, v[0]);
    order->item_bytes = v[1];
    order->size = v[2];
    if (v[2] >= 1 && (v[1] == 4 || v[1] == 8)) return 1;
    PyErr_SetString(PyExc_ValueError, "order must not be empty, and its items have 4 or 8 bytes");
    return 0;
}

static PyObject *py_sums(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    i64 v[4];
    Order order;
    (void)self;
    if (!read_numbers(args, given, 4, v) || !read_order(v, &order)) return NULL;
    const i64 num_blocks = (order.size - 1) / (BLOCK_BYTES / order.item_bytes) + 1;
    u64 *sums = ADDRESS(u64, v[3]);
    PyThreadState *state = PyEval_SaveThread();
    for (i64 block = 0; block < num_blocks; ++block) sums[block] = block_sum(&order, block, 0, NULL);
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
}

static PyObject *py_verify(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    i64 v[8];
    Blocks blocks;
    (void)self;
    if (!read_numbers(args, given, 8, v) || !read_order(v, &blocks.order)) return NULL;
    if (v[3] < 0) {
        PyErr_Format(PyExc_ValueError, "the last sample must be >= 0, got %lld", v[3]);
        return NULL;
    }
    blocks.last = v[3];
    blocks.sums = ADDRESS(const u64, v[4]);
    blocks.is_verified = ADDRESS(unsigned char, v[5]);
    blocks.num_new = 0;
    /* Reading may wait for a disk. */
    PyThreadState *state = PyEval_SaveThread();
    const i64 wrong = verify_blocks(&blocks, ADDRESS(const i64, v[6]), v[7], POSITIONS_AT_ONCE);
    PyEval_RestoreThread(state);
    if (wrong < 0) {
        PyErr_Format(PyExc_ValueError, "a position is not in 0 .. %lld, the order's last", v[2] - 1);
        return NULL;
    }
    /* The number of blocks that were verified, and 1 + the number of a wrong one. */
    return Py_BuildValue("LL", blocks.num_new, wrong);
}

static PyObject *py_place(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    i64 v[10], placed = 0;
    (void)self;
    if (!read_numbers(args, given, 10, v)) return NULL;
    const void *groups = ADDRESS(const void, v[0]);
    i64 *next = ADDRESS(i64, v[4]);
    const i64 *ends = ADDRESS(const i64, v[5]);
    void *order = ADDRESS(void, v[7]);
    if (v[8] != 4 && v[8] != 8) {
        PyErr_SetString(PyExc_ValueError, "the items of an order have 4 or 8 bytes");
        return NULL;
    }
    PyThreadState *state = v[2] > GIL_SAMPLES ? PyEval_SaveThread() : NULL;
/* The sizes are constants of each copy, so that its loop has no branch for them. */
#define PLACE(group_bytes, order_bytes)                                                         \
    placed = place(groups, group_bytes, v[2], v[3], next, ends, v[6], order, order_bytes, v[9])
#define PLACE_GROUPS(order_bytes)                                                               \
    switch (v[1]) {                                                                             \
    case 1: PLACE(1, order_bytes); break;                                                       \
    case 2: PLACE(2, order_bytes); break;                                                       \
    case 4: PLACE(4, order_bytes); break;                                                       \
    case 8: PLACE(8, order_bytes); break;                                                       \
    default: placed = -1;                                                                       \
    }
    if (v[8] == 4) PLACE_GROUPS(4) else PLACE_GROUPS(8)
    if (state != NULL) PyEval_RestoreThread(state);
    if (placed < 0) {
        PyErr_Format(PyExc_ValueError, "groups have 1, 2, 4 or 8 bytes, got %lld", v[1]);
        return NULL;
    }
    return PyLong_FromLongLong(placed);
}

static PyObject *py_use(PyObject *self, PyObject *name) {
    (void)self;
    for (int i = 0; i < NUM_FORMS && PyUnicode_Check(name); ++i) {
        if (PyUnicode_CompareWithASCIIString(name, FORMS[i].name) == 0 && is_supported(i)) {
            form = &FORMS[i];
            Py_RETURN_NONE;
        }
    }
    PyErr_Format(PyExc_ValueError, "form must be one of forms(), got %R", name);
    return NULL;
}

static PyObject *py_forms(PyObject *self, PyObject *unused) {
    PyObject *names = PyList_New(0);
    (void)self;
    (void)unused;
    for (int i = 0; names != NULL && i < NUM_FORMS; ++i) {
        if (!is_supported(i)) continue;
        PyObject *name = PyUnicode_FromString(FORMS[i].name);
        if (name == NULL || PyList_Append(names, name) < 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_form(PyObject *self, PyObject *unused) {
    (void)self;
    (void)unused;
    return PyUnicode_FromString(form->name);
}

#define METHOD(name, flags, text) {#name, (PyCFunction)(void (*)(void))py_##name, flags, text}

static PyMethodDef METHODS[] = {
    METHOD(evaluate, METH_FASTCALL,
           "evaluate(job, epoch, slots, first, stride, count, rows, out, capacity)\n--\n\n"
           "Return how many rows and samples were evaluated; see `gpusampler.permutation._native`."),
    METHOD(ranges, METH_FASTCALL,
           "ranges(first, size, n, base, k0, k1, count, out, capacity)\n--\n\n"
           "Permute rows of consecutive positions, end to end."),
    METHOD(keys, METH_FASTCALL,
           "keys(s0, s1, passes, pass, groups, count, k0, k1)\n--\n\nDerive the keys of rows."),
    METHOD(permute, METH_FASTCALL,
           "permute(x, out, count, n, k0, k1)\n--\n\nPermute positions by one permutation."),
    METHOD(look_up, METH_FASTCALL,
           "look_up(order, itemsize, order_size, positions, out, count)\n--\n\n"
           "Replace positions by the order's items."),
    METHOD(sums, METH_FASTCALL,
           "sums(order, itemsize, order_size, sums)\n--\n\nWrite the checksum of each block."),
    METHOD(verify, METH_FASTCALL,
           "verify(order, itemsize, order_size, last, sums, is_verified, positions, count)\n--\n\n"
           "Verify the blocks that positions are in."),
    METHOD(place, METH_FASTCALL,
           "place(groups, group_bytes, count, sample, next, ends, num_groups, order, order_bytes, "
           "order_size)\n--\n\nWrite samples to the next places of their groups; return how many."),
    METHOD(use, METH_O, "use(name)\n--\n\nUse a form of `forms` from now on."),
    METHOD(forms, METH_NOARGS, "forms()\n--\n\nReturn the forms this processor can run, best first."),
    METHOD(form, METH_NOARGS, "form()\n--\n\nReturn the name of the form in use."),
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
    for (u32 i = 0; i < BLOCK_BYTES / 4; ++i) factors[i] = mix(i + 1);
    for (int i = 0; form == NULL; ++i)
        if (is_supported(i)) form = &FORMS[i];
    return PyModule_AddStringConstant(module, "SOURCE_HASH", SOURCE_HASH);
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};

static PyModuleDef DEFINITION = {
    PyModuleDef_HEAD_INIT, "native", "Compiled evaluation of batches; addresses are integers.", 0,
    METHODS, SLOTS, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_native(void) { return PyModuleDef_Init(&DEFINITION); }
