// The decoder layers of a step, one operation after the other.

#include "activations.h"
#include "attention.h"
#include "pointwise.h"

typedef struct {
    linear_t qkv, o, gate_up, down;
    const float *input_norm, *post_norm;
    const float *q_norm, *k_norm; // null where the architecture has none
    void *cache;
} layer_t;

typedef struct {
    int64_t kind; // of the caches: F32 or BF16
    int64_t heads, kv_heads, dim, block_tokens;
    float eps; // of every norm
} shape_t;

// Where a step's tokens lie: BatchMeta of runtime/kernels/__init__.py.
typedef struct {
    int64_t tokens, sequences, max_blocks; // M, S
    const int32_t *positions, *token_page, *token_slot; // [M]
    const int32_t *query_start;                         // [S + 1]
    const int32_t *context_len;                         // [S]
    const int32_t *block_table;                         // [S, max_blocks]
} batch_t;

typedef struct {
    const float *x, *weight;
    int64_t n;
    float eps;
} normed_t;

static const float *normed_row(const void *source, int64_t row, float *space) {
    const normed_t *s = source;
    rms_norm_row(s->x + row * s->n, s->weight, s->n, s->eps, space);
    return space;
}

static const float *gated_row(const void *source, int64_t row, float *space) {
    const matrix_t *gate_up = source;
    const float *gate = gate_up->x + 2 * row * gate_up->k;
    silu_mul_row(gate, gate + gate_up->k, gate_up->k, space);
    return space;
}

typedef struct {
    float *qkv, *q, *mixed, *gate_up;
} buffers_t;

static buffers_t buffers(const layer_t *layer, int64_t m) {
    const int64_t widths[] = {layer->qkv.n, layer->o.k, layer->o.k, layer->gate_up.n};
    float *parts[4], *at = scratch(STEP, 4 * m * (widths[0] + widths[1] + widths[2] + widths[3]));
    for (int i = 0; i < 4; at += m * widths[i++]) parts[i] = at;
    return (buffers_t){parts[0], parts[1], parts[2], parts[3]};
}

static void attend(const layer_t *l, const buffers_t *b, const shape_t *s, const batch_t *batch,
                   const float *cos_sin, int threads) {
    morph_rope_write_kv((int)s->kind, b->qkv, l->cache, b->q, batch->positions, batch->token_page,
                        batch->token_slot, cos_sin, l->q_norm, l->k_norm, s->eps, batch->tokens,
                        s->heads, s->kv_heads, s->dim, s->block_tokens, threads);
    morph_attention((int)s->kind, b->q, l->cache, b->mixed, batch->query_start,
                    batch->context_len, batch->block_table, batch->sequences, batch->max_blocks,
                    s->heads, s->kv_heads, s->dim, s->block_tokens, threads);
}

// residual: [M, hidden], added to in place.
void morph_layers(const layer_t *layers, int64_t num_layers, const shape_t *shape,
                  const batch_t *batch, const float *cos_sin, float *residual, int threads) {
    const int64_t m = batch->tokens;
    for (const layer_t *layer = layers; layer < layers + num_layers; layer++) {
        const int64_t hidden = layer->qkv.k;
        const buffers_t b = buffers(layer, m);
        const normed_t input = {residual, layer->input_norm, hidden, shape->eps};
        const normed_t after = {residual, layer->post_norm, hidden, shape->eps};
        const matrix_t mixed = {b.mixed, layer->o.k}, gate_up = {b.gate_up, layer->down.k};
        linear(&layer->qkv, normed_row, &input, m, b.qkv, 0, threads);
        attend(layer, &b, shape, batch, cos_sin, threads);
        linear(&layer->o, matrix_row, &mixed, m, residual, 1, threads);
        linear(&layer->gate_up, normed_row, &after, m, b.gate_up, 0, threads);
        linear(&layer->down, gated_row, &gate_up, m, residual, 1, threads);
    }
}

// Rows of a packed table of float32 or bfloat16: out [m, n_features] of token ids [m].
void morph_embed(int kind, const void *table, const int64_t *tokens, int64_t m, int64_t words,
                 float *out) {
    for (int64_t i = 0; i < m; i++) {
        const uint32_t *word = (const uint32_t *)table + tokens[i] / STRIP * words * STRIP;
        word += tokens[i] % STRIP;
        for (int64_t w = 0; w < words; w++, word += STRIP) {
            if (kind == F32) {
                memcpy(out++, word, 4);
                continue;
            }
            *out++ = from_bf16((uint16_t)*word);
            *out++ = from_bf16((uint16_t)(*word >> 16));
        }
    }
}
