// What a row's token is drawn from: its logits, which of them are kept, and what each weighs.

#ifndef MORPH_KEPT_H
#define MORPH_KEPT_H

#include "vectors.h"

#define LEAST 2e-38f // weight, above that of what exp_down stops at
#define PADDING 16   // floats that `rest` holds beyond a row's

// Tokens before `split` are kept if their logit is at least `floor`, later ones if it is greater.
struct row {
    const float *logits;
    int64_t vocab, split;
    int64_t equals; // tokens that top_k kept at `floor`
    float floor, greatest, rate, least;
};

// Keeps the k likeliest, of equal ones the lower id first. rest: [vocab + PADDING], scratch.
void keep_top_k(struct row *row, int64_t k, float *rest);

// Keeps, of what is kept, the fewest tokens, from the likeliest, that hold this share of its mass.
void keep_top_p(struct row *row, double share, float *rest);

#if W == 16
typedef __mmask16 lanes;
INLINE lanes at_least(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
INLINE lanes above(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
INLINE lanes equal(vec a, vec b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
INLINE vec only(lanes which, vec x) { return (vec)_mm512_maskz_mov_ps(which, (__m512)x); }
INLINE vec add_at(lanes which, vec sum, vec x) {
    return (vec)_mm512_mask_add_ps((__m512)sum, which, (__m512)sum, (__m512)x);
}
INLINE uint32_t bits_of(lanes which) { return which; }
INLINE vec greater_of(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
#else
typedef veci lanes;
INLINE lanes at_least(vec a, vec b) { return a >= b; }
INLINE lanes above(vec a, vec b) { return a > b; }
INLINE lanes equal(vec a, vec b) { return a == b; }
INLINE vec only(lanes which, vec x) { return (vec)((veci)x & which); }
INLINE vec add_at(lanes which, vec sum, vec x) { return sum + only(which, x); }
INLINE uint32_t bits_of(lanes which) {
#if W == 8
    return (uint32_t)_mm256_movemask_ps((__m256)which);
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) bits |= (uint32_t)(which[i] & 1) << i;
    return bits;
#endif
}
INLINE vec greater_of(vec a, vec b) { return max_vec(a, b); }
#endif

// The next `left` floats, filled up.
INLINE vec load_up_to(const float *p, int64_t left, float fill) {
    if (left >= W) return load(p);
    float padded[W];
    for (int i = 0; i < W; i++) padded[i] = i < left ? p[i] : fill;
    return load(padded);
}

INLINE float sum_of(vec x) {
    float lanes[W];
    store(lanes, x);
    for (int width = W / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// e^x for x <= 0, to about one unit in the last place; not less than e^-87.
INLINE vec exp_down(vec x) {
    const vec round = splat(12582912.0f); // 1.5 * 2^23: the sum's low bits are the integer
    x = greater_of(x, splat(-87.0f));
    const vec t = fma_vec(x, splat(1.44269504f), round), n = t - round;
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

// Likelihood relative to the likeliest token's; 0 if that is nearly so, or min_p rules it out.
INLINE vec weigh(const struct row *row, vec logits) {
    const vec weight = exp_down((logits - splat(row->greatest)) * splat(row->rate));
    return only(at_least(weight, splat(row->least)), weight);
}

#endif
