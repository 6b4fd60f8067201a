// Rounding activations to what the weights' kind is multiplied with.

#include "activations.h"

#include <stdlib.h>

#include "pool.h"

#define ALIGNMENT 64

static _Thread_local struct {
    void *memory;
    int64_t bytes;
} spaces[NUM_USES];

void *scratch(enum scratch_use use, int64_t bytes) {
    if (spaces[use].bytes < bytes) {
        free(spaces[use].memory);
        spaces[use].bytes = bytes + bytes / 2;
        if (posix_memalign(&spaces[use].memory, ALIGNMENT, (size_t)spaces[use].bytes)) abort();
    }
    return spaces[use].memory;
}

const float *matrix_row(const void *source, int64_t row, float *space) {
    const matrix_t *m = source;
    (void)space;
    return m->x + row * m->k;
}

INLINE void put_words(uint32_t *out, int rows, const void *words, int count) {
    uint32_t w[GROUP];
    memcpy(w, words, (size_t)count * 4);
    for (int i = 0; i < count; i++) out[i * rows] = w[i];
}

static void round_to_bf16(const float *x, int64_t k, uint32_t *out, int rows) {
    int64_t i = 0;
#if W == 16 && defined(__AVX512BF16__)
    for (; i + W <= k; i += W) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512)load(x + i));
        put_words(out + i / 2 * rows, rows, &half, W / 2);
    }
#endif
    for (; i < k; i += 2) {
        const uint16_t pair[2] = {to_bf16(x[i]), i + 1 < k ? to_bf16(x[i + 1]) : 0};
        put_words(out + i / 2 * rows, rows, pair, 1);
    }
}

// The largest magnitude becomes 127. What is not finite makes the whole group's scale NaN.
static void round_group(const float *x, int count, int64_t words, uint32_t *out, float *scale,
                        int32_t *sum, int rows) {
    float most = 0, poison = 0;
    for (int i = 0; i < count; i++) {
        const float size = fabsf(x[i]);
        most = size > most ? size : most;
        poison += x[i] * 0.0f;
    }
    int8_t rounded[GROUP] = {0};
    int32_t total = 0;
    if (poison == 0 && most > 0) {
        const float inverse = 127.0f / most;
        for (int i = 0; i < count; i++) {
            const int32_t q = (int32_t)rintf(x[i] * inverse);
            rounded[i] = (int8_t)q;
            total += q;
        }
    }
    *scale = most / 127.0f + poison;
    *sum = total;
    put_words(out, rows, rounded, (int)words);
}

static void round_row(int64_t kind, const activations_t *a, const float *x, int64_t k, tile_t tile,
                      int row) {
    uint32_t *out = a->x + tile.first * a->words + row;
    if (kind == F32) {
        for (int64_t i = 0; i < k; i++) memcpy(out + i * tile.rows, x + i, 4);
        return;
    }
    if (kind == BF16) {
        round_to_bf16(x, k, out, tile.rows);
        return;
    }
    const int64_t at = tile.first * a->groups + row;
    for (int64_t g = 0; g < a->groups; g++) {
        const int64_t word = g * a->group_words, first = 4 * word, left = k - first;
        const int64_t words = a->words - word < a->group_words ? a->words - word : a->group_words;
        round_group(x + first, (int)(left < 4 * words ? left : 4 * words), words,
                    out + word * tile.rows, a->scales + at + g * tile.rows,
                    a->sums + at + g * tile.rows, tile.rows);
    }
}

typedef struct {
    const linear_t *w;
    row_fn rows;
    const void *source;
    activations_t *a;
} rounding_t;

static const float *in_order(const linear_t *w, const float *x, float *space) {
    if (!w->order) return x;
    for (int64_t i = 0; i < w->k; i++) space[i] = x[w->order[i]];
    return space;
}

static void round_tile(void *job, int64_t t) {
    const rounding_t *r = job;
    const linear_t *w = r->w;
    const tile_t tile = row_tile(r->a, t);
    float *space = scratch(ROW, 2 * w->k * 4);
    for (int i = 0; i < tile.rows; i++) {
        const float *x = r->rows(r->source, tile.first + i, space);
        round_row(w->kind, r->a, in_order(w, x, space + w->k), w->k, tile, i);
    }
}

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

activations_t prepare(const linear_t *w, row_fn rows, const void *source, int64_t m, int threads) {
    const int is_codes = w->kind == INT4 || w->kind == INT8;
    const int64_t group = w->groups > 1 && w->k / w->groups < GROUP ? 32 : GROUP;
    activations_t a = {.m = m, .tiles = (m + MAX_ROWS - 1) / MAX_ROWS};
    a.words = w->kind == F32 ? w->k : w->kind == BF16 ? (w->k + 1) / 2 : round_up(w->k, 32) / 4;
    a.group_words = group / 4;
    a.groups = is_codes ? round_up(w->k, group) / group : 0;
    const int64_t words = round_up(m * a.words, 16), scales = round_up(m * a.groups, 16);
    a.x = scratch(ACTIVATIONS, 4 * (words + 2 * scales));
    a.scales = (float *)(a.x + words);
    a.sums = (int32_t *)(a.scales + scales);
    rounding_t job = {w, rows, source, &a};
    run_pieces(round_tile, &job, a.tiles, m * w->k < 32768 ? 1 : threads);
    return a;
}
