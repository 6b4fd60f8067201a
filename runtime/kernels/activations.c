// Rounding activations to what the weights' kind is multiplied with.

#include "activations.h"

#include "pool.h"
#include "scratch.h"

#define LEAST 4e-37f // 127 divided by less is infinite

const float *matrix_row(const void *source, int64_t row, float *space) {
    const matrix_t *m = source;
    (void)space;
    return m->x + row * m->k;
}

// Words of one row of a tile.
INLINE void put_words(uint32_t *out, int rows, const void *words, int count) {
    uint32_t w[GROUP];
    memcpy(w, words, (size_t)count * 4);
    for (int i = 0; i < count; i++) out[i * rows] = w[i];
}

static void put_bf16(const float *x, int count, uint32_t *out, int rows) {
    uint16_t half[GROUP + 1];
    int i = 0;
    for (; i + W <= count; i += W) store_bf16(half + i, load(x + i));
    for (; i < count; i++) half[i] = to_bf16(x[i]);
    half[i] = 0; // of the last pair, where the number of features is odd
    put_words(out, rows, half, (count + 1) / 2);
}

// The largest magnitude becomes 127. What is not finite makes the whole group's scale NaN.
static void put_bytes(const float *x, int words, uint32_t *out, float *scale, int32_t *sum,
                      int rows) {
    const vec to_integer = splat(12582912.0f); // 1.5 * 2^23: the sum's low bits are the integer
    veci magnitudes = {}; // the bits of floats without their sign are in the floats' order
    for (int i = 0; i < 4 * words; i += W)
        magnitudes = max_int(magnitudes, (veci)load(x + i) & 0x7fffffff);
    const int32_t bits = lane_max_int(magnitudes);
    float most;
    memcpy(&most, &bits, 4);
    const int is_finite = most < INFINITY;
    const float inverse = is_finite && most > LEAST ? 127.0f / most : 0;
    int8_t bytes[GROUP];
    veci total = {};
    for (int i = 0; i < 4 * words; i += W) {
        const vec scaled = is_finite ? load(x + i) * splat(inverse) : (vec){};
        const veci rounded = (veci)(scaled + to_integer) - (veci)to_integer;
        store_bytes(bytes + i, rounded);
        total += rounded;
    }
    *scale = is_finite ? most / 127.0f : NAN;
    *sum = lane_sum_int(total);
    put_words(out, rows, bytes, words);
}

// Features from `first` on, at most GROUP of them.
static void put_group(int64_t kind, const activations_t *a, const float *x, int64_t k,
                      int64_t first, tile_t tile, int row) {
    const int count = (int)(k - first < GROUP ? k - first : GROUP);
    uint32_t *out = a->x + tile.first * a->words + row;
    if (kind == F32) {
        put_words(out + first * tile.rows, tile.rows, x + first, count);
        return;
    }
    if (kind == BF16) {
        put_bf16(x + first, count, out + first / 2 * tile.rows, tile.rows);
        return;
    }
    float padded[GROUP] = {0};
    const float *group = x + first;
    if (count < GROUP) group = memcpy(padded, group, (size_t)count * 4);
    const int64_t end = first / 4 + GROUP / 4 < a->words ? first / 4 + GROUP / 4 : a->words;
    for (int64_t word = first / 4; word < end; word += a->group_words) {
        const int64_t left = a->words - word, words = left < a->group_words ? left : a->group_words;
        const int64_t at = tile.first * a->groups + word / a->group_words * tile.rows + row;
        put_bytes(group + (4 * word - first), (int)words, out + word * tile.rows, a->scales + at,
                  a->sums + at, tile.rows);
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

// Rows are visited too briefly for the hardware to foresee the next visit.
INLINE void fetch(const float *group) {
    UNROLL for (int i = 0; i < GROUP; i += 16) __builtin_prefetch(group + i);
}

static void round_tile(void *job, int64_t t) {
    const rounding_t *r = job;
    const linear_t *w = r->w;
    const tile_t tile = row_tile(r->a, t);
    float *space = scratch(ROW, 2 * MAX_ROWS * w->k * 4);
    const float *x[MAX_ROWS];
    for (int i = 0; i < tile.rows; i++, space += 2 * w->k)
        x[i] = in_order(w, r->rows(r->source, tile.first + i, space), space + w->k);
    // All rows of a few features at a time: the tile they go to is larger than the cache.
    for (int64_t first = 0; first < w->k; first += GROUP)
        for (int i = 0; i < tile.rows; i++) {
            fetch(x[i] + first + GROUP);
            put_group(w->kind, r->a, x[i], w->k, first, tile, i);
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
