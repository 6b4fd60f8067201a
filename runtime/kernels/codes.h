// What products of codes and activations of eight bits are made of.

#ifndef MORPH_CODES_H
#define MORPH_CODES_H

#include "vectors.h"

typedef uint8_t byte_vec __attribute__((vector_size(W)));
typedef uint32_t loose_vecu __attribute__((vector_size(4 * W), aligned(4), may_alias));

INLINE vecu load_words(const void *p) { return *(const loose_vecu *)p; }

INLINE vec load_bytes(const uint8_t *p) {
    byte_vec b;
    memcpy(&b, p, sizeof b);
    return __builtin_convertvector(b, vec);
}

INLINE float from_half(uint16_t h) {
    const uint32_t sign = (uint32_t)(h >> 15) << 31, rest = h & 0x7fff;
    if (rest >= 0x7c00) return rest > 0x7c00 ? NAN : h >> 15 ? -INFINITY : INFINITY;
    const float size = rest < 0x400 ? (float)rest * 0x1p-24f : 0;
    const uint32_t bits = rest < 0x400 ? 0 : (rest << 13) + 0x38000000;
    float normal;
    memcpy(&normal, &bits, 4);
    return (sign ? -1.0f : 1.0f) * (normal + size);
}

INLINE vec load_half(const uint16_t *p) {
#if W == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif W == 8 && defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#else
    vec v;
    for (int lane = 0; lane < W; lane++) v[lane] = from_half(p[lane]);
    return v;
#endif
}

#if W == 8 && defined(__AVX2__)
INLINE veci dot_bytes_16(veci sums, vecu a, vecu b) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
    return sums + (veci)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif W == 16
INLINE veci dot_bytes_16(veci sums, vecu a, vecu b) {
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)a, (__m512i)b);
    return sums + (veci)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
}
#endif

// Adds the products of four bytes, of `a` unsigned, of `b` signed, to each lane.
INLINE veci dot_bytes(veci sums, vecu a, vecu b) {
#if W == 16 && defined(__AVX512VNNI__)
    return (veci)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#elif W == 8 && defined(__AVXVNNI__)
    return (veci)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif W == 16 || (W == 8 && defined(__AVX2__))
    // Halves of a byte one after the other: two products of whole bytes overflow 16 bits.
    const veci high = dot_bytes_16((veci){}, a >> 4 & 0x0f0f0f0f, b);
    return dot_bytes_16(sums, a & 0x0f0f0f0f, b) + (high << 4);
#else
    UNROLL for (int byte = 0; byte < 4; byte++)
        sums += (veci)(a >> 8 * byte & 255) * ((veci)(b << (24 - 8 * byte)) >> 24);
    return sums;
#endif
}

INLINE veci max_int(veci a, veci b) { return (a & (a > b)) | (b & ~(a > b)); }

INLINE int32_t lane_max_int(veci v) {
#if W == 16
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int lane = 1; lane < W; lane++) most = v[lane] > most ? v[lane] : most;
    return most;
#endif
}

INLINE int32_t lane_sum_int(veci v) {
#if W == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t sum = 0;
    for (int lane = 0; lane < W; lane++) sum += v[lane];
    return sum;
#endif
}

// Lanes within a byte.
INLINE void store_bytes(int8_t *p, veci v) {
#if W == 16
    _mm_storeu_si128((void *)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int lane = 0; lane < W; lane++) p[lane] = (int8_t)v[lane];
#endif
}

#endif
