/* The arithmetic of the keyed permutation, version 1: `gpusampler.permutation.reference` in C.
 *
 * The host's module (`native.c`) and the CUDA kernel (`batches.cu`) both include this text. It
 * defines DEVICE and MULHI for C; CUDA defines them itself before it includes the text. All values
 * are unsigned 32-bit integers, which wrap on overflow.
 */

#ifndef DEVICE
#ifdef _MSC_VER
#define DEVICE static __forceinline
#else
#define DEVICE static inline __attribute__((always_inline))
#endif
#define MULHI(x, y) ((u32)(((unsigned long long)(x) * (y)) >> 32))
#endif
#define SPREAD 0x2C1B3C6Du
#define SMALL_N 32 /* largest n for the Fisher-Yates shuffle */

typedef unsigned int u32;
typedef long long i64;

DEVICE u32 mix(u32 h) {
    h ^= h >> 16;
    h *= 0x21F0AAADu;
    h ^= h >> 15;
    h *= 0x735A2D97u;
    return h ^ (h >> 15);
}

/* The hash of a value and a round, from their xor. */
DEVICE u32 hash(u32 h) { return (h ^ (h >> 16)) * 0x21F0AAADu; }

DEVICE void absorb(u32 *s0, u32 *s1, u32 word) {
    *s0 = mix(*s0 ^ word);
    *s1 = mix((*s1 + *s0) ^ (word * SPREAD));
}

/* Absorb a 64-bit value, low word first. */
DEVICE void absorb_pair(u32 *s0, u32 *s1, i64 value) {
    absorb(s0, s1, (u32)value);
    absorb(s0, s1, (u32)(value >> 32));
}

/* (line + hash * side / 2**32) mod side, for line < side < 2**31: again below side. */
DEVICE u32 rotate(u32 line, u32 value, u32 round_key, u32 side) {
    const u32 moved = line + MULHI(hash((value * SPREAD) ^ round_key), side);
    /* If moved < side, the difference wraps to a huge number, so the minimum is still right. */
    const u32 wrapped = moved - side;
    return moved < wrapped ? moved : wrapped;
}

/* A pair of rounds: rotate a column, then a row. The cell stays in the ragged grid. `last` is a - 1:
 * to select between two known sides takes less than to subtract. */
DEVICE void rotate_pair(u32 *line, u32 *col, u32 a, u32 last, u32 b, u32 rem, u32 key, u32 step) {
    *line = rotate(*line, *col, key, *col >= rem ? last : a);
    *col = rotate(*col, *line, key + step, *line == last ? rem : b);
}

/* Number of pairs of rounds; 0 if n is small. */
DEVICE int pairs_of(i64 n) {
    return n >= 65536 ? 3 : n >= 1024 ? 4 : n >= 128 ? 5 : n > SMALL_N ? 6 : 0;
}

/* 1 if positions 0 and 1 are swapped at the end. */
DEVICE u32 coin_of(u32 k0, u32 step) { return hash(k0 + 63u * step) >> 31; }

/* What Fisher-Yates swaps i with: j <= i. */
DEVICE u32 swap_of(u32 k0, u32 step, u32 i) {
    return MULHI(hash((i * SPREAD) ^ (k0 + i * step)), i + 1);
}
