// What a row's token is drawn from: its logits, which of them are kept, and what each weighs.

#ifndef MORPH_KEPT_H
#define MORPH_KEPT_H

#include "vectors.h"

#define PADDING 16 // floats that `rest` holds beyond a row's

// Tokens before `split` are kept if their logit is at least `floor`, later ones if it is greater.
struct row {
    const float *logits;
    int64_t vocab, split;
    int64_t equals; // tokens that top_k kept at `floor`
    float floor, greatest;
    float rate;  // of 2, by which weights grow with a logit
    float least; // weight
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
#endif

// Likelihood relative to the likeliest token's; 0 if that is nearly so, or min_p rules it out.
INLINE vec weigh(const struct row *row, vec logits) {
    const vec weight = exp2_vec(F32, (logits - splat(row->greatest)) * splat(row->rate));
    return only(at_least(weight, splat(row->least)), weight);
}

#endif
