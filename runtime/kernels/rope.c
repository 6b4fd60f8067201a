// Norm and rotation of queries and keys, and the write of keys and values into the pages.

#include "attention.h"
#include "pages.h"
#include "pool.h"

#define PIECE_TOKENS 8

typedef struct {
    int kind;
    const float *qkv;
    char *cache;
    float *q_out;
    const int32_t *positions, *token_page, *token_slot;
    const float *cos_sin, *q_norm, *k_norm;
    float eps;
    int64_t tokens;
    shape_t shape;
} rope_t;

// x scaled to unit root mean square, times the weight; the sum runs in W interleaved parts.
static void norm_head(const float *x, const float *weight, int64_t dim, float eps, float *out) {
    const int64_t whole = dim / W * W;
    vec parts = {};
    for (int64_t d = 0; d < whole; d += W) parts = fma_vec(load(x + d), load(x + d), parts);
    float sum = lane_sum(parts);
    for (int64_t d = whole; d < dim; d++) sum += x[d] * x[d];
    const float scale = 1.0f / sqrtf(sum / (float)dim + eps);
    for (int64_t d = 0; d < whole; d += W)
        store(out + d, load(x + d) * splat(scale) * load(weight + d));
    for (int64_t d = whole; d < dim; d++) out[d] = x[d] * scale * weight[d];
}

static void rotate(const float *x, const float *norm, const float *cos_sin, int64_t dim, float eps,
                   float *out) {
    const int64_t half = dim / 2, whole = half / W * W;
    const float *sines = cos_sin + half;
    float normed[MAX_DIM];
    if (norm) {
        norm_head(x, norm, dim, eps, normed);
        x = normed;
    }
    for (int64_t i = 0; i < whole; i += W) {
        const vec c = load(cos_sin + i), s = load(sines + i), a = load(x + i), b = load(x + half + i);
        store(out + i, a * c - b * s);
        store(out + half + i, b * c + a * s);
    }
    for (int64_t i = whole; i < half; i++) {
        const float c = cos_sin[i], s = sines[i], a = x[i], b = x[half + i];
        out[i] = a * c - b * s;
        out[half + i] = b * c + a * s;
    }
}

static void round_all(const float *x, int64_t n, uint16_t *out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store_bf16(out + i, load(x + i));
    for (; i < n; i++) out[i] = to_bf16(x[i]);
}

// Keys pair by pair; values item by item, as another thread may write the pair's other token.
INLINE void write_bf16(const shape_t *s, const float *key, const float *value, int64_t token,
                       uint16_t *k, uint16_t *v) {
    uint16_t rounded[MAX_DIM];
    const int64_t near = token & 1, pairs = token / 2;
    const int alone = pairs == s->block_tokens / 2;
    round_all(key, s->dim, rounded);
    for (int64_t d = 0; d < s->dim; d += 2)
        memcpy(k + d * s->block_tokens + 2 * token, rounded + d, 2 * sizeof *k);
    round_all(value, s->dim, rounded);
    v += pairs * 2 * s->dim + near;
    if (alone)
        memcpy(v, rounded, (size_t)s->dim * sizeof *v);
    else
        for (int64_t d = 0; d < s->dim; d++) v[2 * d] = rounded[d];
}

INLINE void write_f32(const shape_t *s, const float *key, const float *value, int64_t token,
                      float *k, float *v) {
    for (int64_t d = 0; d < s->dim; d++) k[d * s->block_tokens + token] = key[d];
    memcpy(v + token * s->dim, value, (size_t)s->dim * sizeof *v);
}

static void rope_token(const rope_t *r, int64_t token) {
    const shape_t *s = &r->shape;
    const int64_t dim = s->dim, values = s->kv_heads * head_items(s) * item_bytes(r->kind);
    const float *x = r->qkv + token * (s->heads + 2 * s->kv_heads) * dim;
    const float *turn = r->cos_sin + r->positions[token] * dim;
    float *q = r->q_out + token * s->heads * dim;
    for (int64_t h = 0; h < s->heads; h++)
        rotate(x + h * dim, r->q_norm, turn, dim, r->eps, q + h * dim);
    for (int64_t g = 0; g < s->kv_heads; g++) {
        char *k = r->cache + first_key(s, r->token_page[token], g) * item_bytes(r->kind);
        const float *value = x + (s->heads + s->kv_heads + g) * dim;
        float key[MAX_DIM];
        rotate(x + (s->heads + g) * dim, r->k_norm, turn, dim, r->eps, key);
        if (r->kind == BF16)
            write_bf16(s, key, value, r->token_slot[token], (void *)k, (void *)(k + values));
        else
            write_f32(s, key, value, r->token_slot[token], (void *)k, (void *)(k + values));
    }
}

static void rope_piece(void *job, int64_t piece) {
    const rope_t *r = job;
    const int64_t first = piece * PIECE_TOKENS, end = first + PIECE_TOKENS;
    for (int64_t token = first; token < end && token < r->tokens; token++) rope_token(r, token);
}

void morph_rope_write_kv(int kind, const float *qkv, void *cache, float *q_out,
                         const int32_t *positions, const int32_t *token_page,
                         const int32_t *token_slot, const float *cos_sin, const float *q_norm,
                         const float *k_norm, float eps, int64_t m, int64_t heads,
                         int64_t kv_heads, int64_t dim, int64_t block_tokens, int threads) {
    rope_t r = {kind,    qkv,    cache,  q_out, positions, token_page, token_slot,
                cos_sin, q_norm, k_norm, eps,   m,         {heads, kv_heads, dim, block_tokens}};
    run_pieces(rope_piece, &r, (m + PIECE_TOKENS - 1) / PIECE_TOKENS, threads);
}
