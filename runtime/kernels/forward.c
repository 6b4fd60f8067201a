// A forward pass from token ids to logits, one operation after the other.

#include "activations.h"
#include "attention.h"
#include "pointwise.h"
#include "scratch.h"

typedef struct {
    linear_t qkv, o, gate_up, down;
    const float *input_norm, *post_norm;
    const float *q_norm, *k_norm; // null where the architecture has none
} layer_t;

typedef struct {
    int64_t kind; // of the caches: F32 or BF16
    int64_t heads, kv_heads, dim, block_tokens;
    float eps; // of every norm
} shape_t;

// The layers in their order.
typedef struct {
    const layer_t *const *layers;
    void *const *caches; // of each layer
    int64_t num_layers;
    shape_t shape;
} stack_t;

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
    void *cache;
    float *qkv, *q, *mixed, *gate_up;
} buffers_t;

static buffers_t buffers(const layer_t *layer, void *cache, int64_t m) {
    const int64_t widths[] = {layer->qkv.n, layer->o.k, layer->o.k, layer->gate_up.n};
    float *parts[4], *at = scratch(STEP, 4 * m * (widths[0] + widths[1] + widths[2] + widths[3]));
    for (int i = 0; i < 4; at += m * widths[i++]) parts[i] = at;
    return (buffers_t){cache, parts[0], parts[1], parts[2], parts[3]};
}

// The layer's queries, with their keys and values written into the pages.
static void begin(const layer_t *l, const buffers_t *b, const shape_t *s, const batch_t *batch,
                  const float *cos_sin, const float *residual, int threads) {
    const normed_t input = {residual, l->input_norm, l->qkv.k, s->eps};
    linear(&l->qkv, normed_row, &input, batch->tokens, b->qkv, 0, threads);
    morph_rope_write_kv((int)s->kind, b->qkv, b->cache, b->q, batch->positions, batch->token_page,
                        batch->token_slot, cos_sin, l->q_norm, l->k_norm, s->eps, batch->tokens,
                        s->heads, s->kv_heads, s->dim, s->block_tokens, threads);
}

// What the layer adds to the residual.
static void end(const layer_t *l, const buffers_t *b, const shape_t *s, const batch_t *batch,
                float *residual, int threads) {
    const int64_t m = batch->tokens;
    const normed_t after = {residual, l->post_norm, l->gate_up.k, s->eps};
    const matrix_t mixed = {b->mixed, l->o.k}, gate_up = {b->gate_up, l->down.k};
    morph_attention((int)s->kind, b->q, b->cache, b->mixed, batch->query_start,
                    batch->context_len, batch->block_table, batch->sequences, batch->max_blocks,
                    s->heads, s->kv_heads, s->dim, s->block_tokens, threads);
    linear(&l->o, matrix_row, &mixed, m, residual, 1, threads);
    linear(&l->gate_up, normed_row, &after, m, b->gate_up, 0, threads);
    linear(&l->down, gated_row, &gate_up, m, residual, 1, threads);
}

// rows: ascending, so that a row is never written before it was read.
static void gather(float *x, int64_t width, const int64_t *rows, int64_t count) {
    for (int64_t i = 0; i < count; i++)
        memmove(x + i * width, x + rows[i] * width, 4 * (size_t)width);
}

// These rows of the batch as attention sees them, each the last token of a sequence of its own.
static batch_t single_queries(const batch_t *batch, const int64_t *rows, int64_t count) {
    const int64_t width = batch->max_blocks;
    int32_t *start = scratch(QUERIES, 4 * (2 * count + 1 + count * width));
    int32_t *context = start + count + 1, *table = context + count;
    const int32_t *owner = batch->block_table;
    for (int64_t i = 0, s = 0; i < count; i++) {
        for (; batch->query_start[s + 1] <= rows[i]; s++) owner += width;
        start[i] = (int32_t)i;
        context[i] = batch->positions[rows[i]] + 1;
        memcpy(table + i * width, owner, 4 * (size_t)width);
    }
    start[count] = (int32_t)count;
    return (batch_t){.tokens = count, .sequences = count, .max_blocks = width,
                     .query_start = start, .context_len = context, .block_table = table};
}

// residual: [M, hidden], added to in place. The last layer computes only these ascending rows of
// the batch beyond keys and values, and they come to lie at the residual's start.
void morph_layers(const stack_t *stack, const batch_t *batch, const float *cos_sin,
                  float *residual, const int64_t *rows, int64_t num_rows, int threads) {
    for (int64_t i = 0; i < stack->num_layers; i++) {
        const layer_t *layer = stack->layers[i];
        const buffers_t b = buffers(layer, stack->caches[i], batch->tokens);
        begin(layer, &b, &stack->shape, batch, cos_sin, residual, threads);
        if (i < stack->num_layers - 1 || num_rows == batch->tokens) {
            end(layer, &b, &stack->shape, batch, residual, threads);
            continue;
        }
        const batch_t last = single_queries(batch, rows, num_rows);
        gather(b.q, layer->o.k, rows, num_rows);
        gather(residual, layer->qkv.k, rows, num_rows);
        end(layer, &b, &stack->shape, &last, residual, threads);
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

// Token ids [M] to logits [num_rows, vocab] of these rows.
void morph_forward(const linear_t *embedding, const int64_t *tokens, const stack_t *stack,
                   const batch_t *batch, const float *cos_sin, const int64_t *rows,
                   int64_t num_rows, const float *norm, const linear_t *head, float *logits,
                   int threads) {
    const int64_t hidden = head->k, words = embedding->kind == F32 ? hidden : hidden / 2;
    float *residual = scratch(RESIDUAL, 4 * batch->tokens * hidden);
    const normed_t normed = {residual, norm, hidden, stack->shape.eps};
    morph_embed((int)embedding->kind, embedding->data, tokens, batch->tokens, words, residual);
    morph_layers(stack, batch, cos_sin, residual, rows, num_rows, threads);
    if (!stack->num_layers) gather(residual, hidden, rows, num_rows);
    linear(head, normed_row, &normed, num_rows, logits, 0, threads);
}
