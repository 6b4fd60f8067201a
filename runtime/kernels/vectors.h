// Vectors of floats in the machine's widest size, and the dtypes that are read into them.
//
// Batch invariance: every output is a fixed sequence of operations that depends on the model's
// sizes and on its own row only. Tiles, blocks and threads decide who computes an output, never
// in which order. Hence the explicit fma_vec() and -ffp-contract=off: were contraction left to
// the compiler, it could differ between two tile shapes.

#ifndef MORPH_VECTORS_H
#define MORPH_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define W 16 // float lanes of a vector
#elif defined(__AVX__)
#define W 8
#else
#define W 4
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define NOINLINE __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t veci __attribute__((vector_size(4 * W)));
typedef uint32_t vecu __attribute__((vector_size(4 * W)));
typedef float loose_vec __attribute__((vector_size(4 * W), aligned(4), may_alias));

enum kind { F32 = 0, BF16 = 1, INT4 = 2, INT8 = 3 };

INLINE vec splat(float x) { return x - (vec){}; }

INLINE vecu splat_bits(uint32_t x) { return x - (vecu){}; }

INLINE vec load(const float *p) { return *(const loose_vec *)p; }
INLINE void store(float *p, vec v) { *(loose_vec *)p = v; }

// The next `left` floats, filled up.
INLINE vec load_up_to(const float *p, int64_t left, float fill) {
    if (left >= W) return load(p);
    float padded[W];
    for (int i = 0; i < W; i++) padded[i] = i < left ? p[i] : fill;
    return load(padded);
}

INLINE vec fma_vec(vec a, vec b, vec c) {
#if W == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif W == 8 && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE vec select_vec(veci mask, vec yes, vec no) {
    return (vec)(((veci)yes & mask) | ((veci)no & ~mask));
}

// The second where one is not a number.
INLINE vec max_vec(vec a, vec b) {
#if W == 16
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif W == 8
    return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select_vec(a > b, a, b);
#endif
}

INLINE vec min_vec(vec a, vec b) { return -max_vec(-a, -b); }

// e^x to about one unit in the last place, for x from -87 to 88, where a float's normal range ends.
INLINE vec exp_vec(vec x) {
    const vec round = splat(12582912.0f); // 1.5 * 2^23: the sum's low bits are the integer
    vec t = fma_vec(x, splat(1.44269504f), round), n = t - round;
    vec r = fma_vec(n, splat(-0.693359375f), x); // ln 2 in two parts, the first exact
    r = fma_vec(n, splat(2.12194440e-4f), r);
    vec p = splat(1.0f / 720);
    p = fma_vec(p, r, splat(1.0f / 120));
    p = fma_vec(p, r, splat(1.0f / 24));
    p = fma_vec(p, r, splat(1.0f / 6));
    p = fma_vec(p, r, splat(0.5f));
    p = fma_vec(p, r, splat(1.0f));
    p = fma_vec(p, r, splat(1.0f));
    return (vec)((vecu)p + ((vecu)t << 23));
}

// Keys, values, queries and softmax weights are read in units of four bytes: a float, or a pair of
// bfloat16 whose products are added to the same sum.
typedef uint32_t unit __attribute__((may_alias));

INLINE vec splat_unit(const unit *p) { return (vec)splat_bits(*p); }

#define ONE_PAIR 0x3f803f80u // two bfloat16 of 1

// acc + even * even + odd * odd, in float32.
INLINE vec dot_bf16(vec acc, vec a, vec b) {
#if W == 16 && defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    const vecu odd = splat_bits(0xffff0000u);
    acc = fma_vec((vec)((vecu)a & odd), (vec)((vecu)b & odd), acc);
    return fma_vec((vec)((vecu)a << 16), (vec)((vecu)b << 16), acc);
#endif
}

INLINE vec dot_unit(int kind, vec acc, vec a, vec b) {
    return kind == BF16 ? dot_bf16(acc, a, b) : fma_vec(a, b, acc);
}

INLINE void store_bf16(uint16_t *p, vec v) {
#if W == 16 && defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &half, sizeof half);
#else
    for (int lane = 0; lane < W; lane++) p[lane] = to_bf16(v[lane]);
#endif
}

INLINE float lane_sum(vec v) {
#if W == 16
    return _mm512_reduce_add_ps((__m512)v); // in the order below
#endif
    for (int half = W / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) v[lane] += v[lane + half];
    return v[0];
}

INLINE float lane_max(vec v) {
#if W == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int lane = 1; lane < W; lane++) most = v[lane] > most ? v[lane] : most;
    return most;
#endif
}

// 2^x for x up to 0, exact for 0 and -infinity; to 2^-22, or 2^-13 where a bfloat16 is made of it.
INLINE vec exp2_vec(int kind, vec x) {
#if W == 16 && defined(__AVX512DQ__)
    const vec r = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const vec round = splat(12582912.0f); // 1.5 * 2^23: the sum's low bits are the integer
    x = max_vec(splat(-127.0f), x); // x where it is not a number
    const vec t = x + round, r = x - (t - round);
#endif
    vec p;
    if (kind == BF16) {
        p = fma_vec(splat(5.5008933e-2f), r, splat(2.4221095e-1f));
        p = fma_vec(p, r, splat(6.9328290e-1f));
    } else {
        p = fma_vec(splat(1.3264727e-3f), r, splat(9.6715130e-3f));
        p = fma_vec(p, r, splat(5.5507336e-2f));
        p = fma_vec(p, r, splat(2.4022243e-1f));
        p = fma_vec(p, r, splat(6.9314700e-1f));
    }
    p = fma_vec(p, r, splat(1.0f));
#if W == 16 && defined(__AVX512DQ__)
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)(x - r));
#else
    return (vec)((vecu)p + ((vecu)t << 23));
#endif
}

#endif
