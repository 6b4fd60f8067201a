// The register tiles of the linears: rows of activations times strips of a weight.
//
// Each output is one chain of multiply-adds in the order of the features (of groups of features,
// where weights are codes), however many rows and strips are computed side by side.

#ifndef MORPH_MULTIPLY_H
#define MORPH_MULTIPLY_H

#include "activations.h"
#include "codes.h"
#include "linear.h"

#define COLS (STRIP / W) // vectors of a strip
#if W == 16
#define MAX_STRIPS 4 // side by side, for rows too few to hide the time that a multiply-add takes
#define STRIPS_OF(rows) ((rows) == 1 ? 4 : (rows) <= 4 ? 2 : 1)
#else
#define MAX_STRIPS 1
#define STRIPS_OF(rows) 1
#endif
#define MAX_VECS (MAX_STRIPS * COLS)
#define WORD_BYTES (4 * STRIP) // of all outputs of a strip
#define AHEAD 1024             // bytes; past the weight's end a prefetch does nothing

typedef struct {
    const linear_t *w;
    const activations_t *a;
    float *y;
    int add;
    int64_t strips, strip_bytes;
    int64_t block_tiles;
    int64_t pieces; // of the strips, for one block of rows
} product_t;

INLINE void fetch_ahead(const char *data) {
    UNROLL for (int line = 0; line < WORD_BYTES; line += 64)
        __builtin_prefetch(data + AHEAD + line);
}

INLINE void multiply_floats(int kind, int rows, int strips, const product_t *p, int64_t strip,
                            const tile_t *tile, vec sums[MAX_ROWS][MAX_VECS]) {
    const uint32_t *x = p->a->x + tile->first * p->a->words;
    const char *data[MAX_STRIPS];
    UNROLL for (int s = 0; s < strips; s++) data[s] = p->w->data + (strip + s) * p->strip_bytes;
    for (int64_t word = 0; word < p->a->words; word++, x += rows) {
        vec weights[MAX_VECS];
        UNROLL for (int s = 0; s < strips; s++) {
            fetch_ahead(data[s]);
            UNROLL for (int c = 0; c < COLS; c++)
                weights[s * COLS + c] = load((const float *)data[s] + W * c);
            data[s] += WORD_BYTES;
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const vec feature = (vec)splat_bits(x[r]);
            UNROLL for (int c = 0; c < strips * COLS; c++)
                sums[r][c] = dot_unit(kind, sums[r][c], weights[c], feature);
        }
    }
}

INLINE int64_t group_at(const product_t *p, int64_t strip, int64_t group, int c) {
    return ((strip + c / COLS) * p->w->groups + group) * STRIP + c % COLS * W;
}

INLINE void add_group(int rows, int strips, const product_t *p, int64_t strip, int64_t group,
                      const float *x_scales, veci products[MAX_ROWS][MAX_VECS],
                      vec sums[MAX_ROWS][MAX_VECS]) {
    UNROLL for (int c = 0; c < strips * COLS; c++) {
        const vec scale = load_half(p->w->scales + group_at(p, strip, group, c));
        UNROLL for (int r = 0; r < rows; r++)
            sums[r][c] = fma_vec(__builtin_convertvector(products[r][c], vec),
                                 scale * splat(x_scales[r]), sums[r][c]);
    }
}

// What codes lack whose zero is not the middle one.
INLINE void add_zeros(int rows, int strips, const product_t *p, int64_t strip, int64_t group,
                      int middle, const float *x_scales, const int32_t *x_sums,
                      vec sums[MAX_ROWS][MAX_VECS]) {
    UNROLL for (int c = 0; c < strips * COLS; c++) {
        const int64_t at = group_at(p, strip, group, c);
        const vec zeros = load_bytes(p->w->zeros + at);
        const vec offset = load_half(p->w->scales + at) * (splat((float)middle) - zeros);
        UNROLL for (int r = 0; r < rows; r++)
            sums[r][c] = fma_vec(offset, splat(x_scales[r] * (float)x_sums[r]), sums[r][c]);
    }
}

// Products of `words` words of the activations with codes that begin at `data`, which moves on.
INLINE void multiply_words(int kind, int rows, int strips, int64_t words, const uint32_t *x,
                           const char *data[MAX_STRIPS], veci products[MAX_ROWS][MAX_VECS]) {
    const int halves = kind == INT4 ? 2 : 1;
    for (int64_t word = 0; word < words; word += halves, x += halves * rows) {
        vecu codes[MAX_VECS];
        UNROLL for (int s = 0; s < strips; s++) {
            fetch_ahead(data[s]);
            UNROLL for (int c = 0; c < COLS; c++)
                codes[s * COLS + c] = load_words(data[s] + 4 * W * c);
            data[s] += WORD_BYTES;
        }
        UNROLL for (int half = 0; half < halves; half++) {
            vecu parts[MAX_VECS];
            UNROLL for (int c = 0; c < strips * COLS; c++)
                parts[c] = halves == 2 ? codes[c] >> 4 * half & 0x0f0f0f0f : codes[c];
            UNROLL for (int r = 0; r < rows; r++) {
                const vecu features = splat_bits(x[half * rows + r]);
                UNROLL for (int c = 0; c < strips * COLS; c++)
                    products[r][c] = dot_bytes(products[r][c], parts[c], features);
            }
        }
    }
}

INLINE void multiply_codes(int kind, int rows, int strips, const product_t *p, int64_t strip,
                           const tile_t *tile, vec sums[MAX_ROWS][MAX_VECS]) {
    const activations_t *a = p->a;
    const linear_t *w = p->w;
    const int middle = kind == INT4 ? 8 : 128;
    // Several groups have a power of two features each.
    const int shift = w->groups > 1 ? __builtin_ctzll((uint64_t)(w->k / w->groups / 4)) : 62;
    const uint32_t *x = a->x + tile->first * a->words;
    const char *data[MAX_STRIPS];
    UNROLL for (int s = 0; s < strips; s++) data[s] = w->data + (strip + s) * p->strip_bytes;
    for (int64_t word = 0, g = 0; word < a->words; word += a->group_words, g++) {
        const float *x_scales = a->scales + tile->first * a->groups + g * rows;
        const int32_t *x_sums = a->sums + tile->first * a->groups + g * rows;
        const int64_t left = a->words - word, words = left < a->group_words ? left : a->group_words;
        veci products[MAX_ROWS][MAX_VECS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int c = 0; c < strips * COLS; c++)
                products[r][c] = (veci)splat_bits((uint32_t)(-middle * x_sums[r]));
        multiply_words(kind, rows, strips, words, x + word * rows, data, products);
        add_group(rows, strips, p, strip, word >> shift, x_scales, products, sums);
        if (w->zeros)
            add_zeros(rows, strips, p, strip, word >> shift, middle, x_scales, x_sums, sums);
    }
}

INLINE void store_strip(const product_t *p, int rows, int64_t row, int64_t strip,
                        vec sums[MAX_ROWS][MAX_VECS], int at) {
    const int64_t first = strip * STRIP, left = p->w->n - first;
    const float *bias = p->w->bias ? p->w->bias + first : 0;
    UNROLL for (int r = 0; r < rows; r++) {
        float *y = p->y + (row + r) * p->w->n + first;
        float narrow[STRIP];
        UNROLL for (int c = 0; c < COLS; c++) {
            vec sum = sums[r][at + c];
            if (left < STRIP) {
                store(narrow + c * W, sum);
                continue;
            }
            if (bias) sum += load(bias + c * W);
            store(y + c * W, p->add ? load(y + c * W) + sum : sum);
        }
        for (int64_t i = 0; left < STRIP && i < left; i++) {
            const float sum = bias ? narrow[i] + bias[i] : narrow[i];
            y[i] = p->add ? y[i] + sum : sum;
        }
    }
}

INLINE void multiply(int kind, int rows, int strips, const product_t *p, const tile_t *tile,
                     int64_t strip) {
    vec sums[MAX_ROWS][MAX_VECS] = {};
    if (kind == F32 || kind == BF16)
        multiply_floats(kind, rows, strips, p, strip, tile, sums);
    else
        multiply_codes(kind, rows, strips, p, strip, tile, sums);
    UNROLL for (int s = 0; s < strips; s++)
        store_strip(p, rows, tile->first, strip + s, sums, s * COLS);
}

INLINE void multiply_tile(int kind, int rows, const product_t *p, const tile_t *tile,
                          int64_t strip, int64_t end) {
    for (; strip + STRIPS_OF(rows) <= end; strip += STRIPS_OF(rows))
        multiply(kind, rows, STRIPS_OF(rows), p, tile, strip);
    if (STRIPS_OF(rows) > 1)
        for (; strip < end; strip++) multiply(kind, rows, 1, p, tile, strip);
}

// Strips from `strip` to `end` of one tile of rows.
typedef void (*multiply_fn)(const product_t *, const tile_t *, int64_t strip, int64_t end);

// By a tile's rows, from one on.
extern const multiply_fn multiply_f32[MAX_ROWS], multiply_bf16[MAX_ROWS], multiply_int4[MAX_ROWS],
    multiply_int8[MAX_ROWS];

#if MAX_ROWS == 12
#define FOR_ROWS(DO, KIND)                                                       \
    DO(KIND, 1) DO(KIND, 2) DO(KIND, 3) DO(KIND, 4) DO(KIND, 5) DO(KIND, 6)      \
    DO(KIND, 7) DO(KIND, 8) DO(KIND, 9) DO(KIND, 10) DO(KIND, 11) DO(KIND, 12)
#elif MAX_ROWS == 3
#define FOR_ROWS(DO, KIND) DO(KIND, 1) DO(KIND, 2) DO(KIND, 3)
#else
#define FOR_ROWS(DO, KIND) DO(KIND, 1) DO(KIND, 2)
#endif

#define DEFINE(KIND, ROWS)                                                                      \
    static void multiply_##KIND##_##ROWS(const product_t *p, const tile_t *tile, int64_t strip, \
                                         int64_t end) {                                         \
        multiply_tile(KIND, ROWS, p, tile, strip, end);                                         \
    }
#define NAME(KIND, ROWS) multiply_##KIND##_##ROWS,
#define TILES_OF(KIND) FOR_ROWS(DEFINE, KIND)
#define TABLE_OF(KIND) {FOR_ROWS(NAME, KIND)}

#endif
