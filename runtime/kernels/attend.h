// Attention of a few queries over one chunk of their sequence's tokens, in vector registers.
//
// Every sum runs over channels, or tokens, in their order, whatever the number of queries, tiles
// and vectors that a step takes at once.

#ifndef MORPH_ATTEND_H
#define MORPH_ATTEND_H

#include "queries.h"

#include <float.h>

#define CHUNK_TILES 16 // tiles between two corrections of the running maximum
#define CHUNK (CHUNK_TILES * TILE)
#define VECS (TILE / W)
#if W == 16
#define MAX_SUMS 24 // vectors of sums: what 32 registers hold besides the factors
#else
#define MAX_SUMS 12
#endif
#define FITS(rows, vecs) ((rows) * (vecs) <= MAX_SUMS)

#define NOTHING_SEEN (-FLT_MAX) // finite: its difference to minus infinity is a number

// Queries of one KV head and sequence that go through the pages together, in order of position.
typedef struct {
    int rows;
    int64_t limit[MAX_ROWS]; // tokens that the query may see
    // Four more to a row: rows a multiple of 512 bytes apart would share a cache bank.
    unit query[MAX_ROWS][MAX_DIM + 4]; // units, scaled so that 2^score is the weight
    float scores[MAX_ROWS][CHUNK + 4]; // then units of weights in their place
    float correction[MAX_ROWS];
    mixture_t all, split; // of the splits so far, and of one split
} rows_t;

// A line that is read soon: the machine follows no stream from page to page.
INLINE void fetch(const char *line) { __builtin_prefetch(line, 0, 3); }

INLINE void hide_future(rows_t *r, int row, const tile_t *tile, float *scores) {
    int64_t visible = r->limit[row] - tile->token;
    if (visible > tile->count) visible = tile->count;
    for (int64_t t = visible > 0 ? visible : 0; t < TILE; t++) scores[t] = -INFINITY;
}

// Scores of `count` tiles of tokens; those past a query's limit are minus infinity.
INLINE void score_tiles(int kind, int rows, int count, rows_t *r, const tile_t *tiles,
                        const char *const *next, int64_t units, int64_t stride, int at) {
    vec acc[MAX_ROWS][GROUP_TILES * VECS] = {};
    const unit *k[GROUP_TILES];
    const char *ahead[GROUP_TILES];
    UNROLL for (int n = 0; n < count; n++) k[n] = tiles[n].k, ahead[n] = next[n];
    for (int64_t d = 0; d < units; d++) {
        UNROLL for (int n = 0; n < count * VECS; n++) {
            const vec keys = load((const float *)k[n / VECS] + n % VECS * W);
            UNROLL for (int i = 0; i < rows; i++)
                acc[i][n] = dot_unit(kind, acc[i][n], keys, splat_unit(r->query[i] + d));
        }
        UNROLL for (int n = 0; n < count; n++) {
            fetch(ahead[n]);
            k[n] += stride;
            ahead[n] += 64;
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int n = 0; n < count * VECS; n++)
            store(r->scores[i] + at * TILE + n * W, acc[i][n]);
    for (int i = 0; i < rows; i++)
        for (int n = 0; n < count; n++)
            if (tiles[n].count < TILE || r->limit[i] < tiles[n].token + TILE)
                hide_future(r, i, &tiles[n], r->scores[i] + (at + n) * TILE);
}

// Turns scores into weights relative to the new maximum. The total is of the weights as rounded,
// so that they add up to 1 after the division.
INLINE void weigh(int kind, rows_t *r, mixture_t *m, int tiles) {
    tiles += tiles % 2; // so that a vector of pairs is whole
    for (int i = 0; i < r->rows; i++) {
        float *s = r->scores[i];
        vec most = splat(m->top[i]), total = {};
        for (int t = 0; t < tiles * TILE; t += W) most = max_vec(load(s + t), most);
        const float top = lane_max(most);
        for (int t = 0; t < tiles * TILE; t += W) {
            const vec weight = exp2_vec(kind, load(s + t) - splat(top));
            if (kind == BF16)
                store_bf16((uint16_t *)s + t, weight);
            else
                store(s + t, weight);
        }
        const vec one = kind == BF16 ? (vec)splat_bits(ONE_PAIR) : splat(1.0f);
        for (int u = 0; u < tiles * TILE / items_per_unit(kind); u += W)
            total = dot_unit(kind, total, load(s + u), one);
        r->correction[i] = exp2_vec(F32, splat(m->top[i] - top))[0];
        store(m->total[i], fma_vec(load(m->total[i]), splat(r->correction[i]), total));
        m->top[i] = top;
    }
}

INLINE void mix_step(int kind, int rows, int vecs, vec acc[][8], const rows_t *r, int at,
                     const unit *v, uint32_t mask) {
    UNROLL for (int n = 0; n < vecs; n++) {
        const vec values = (vec)((vecu)load((const float *)v + n * W) & splat_bits(mask));
        UNROLL for (int i = 0; i < rows; i++)
            acc[i][n] = dot_unit(kind, acc[i][n], values,
                                 splat_unit((const unit *)r->scores[i] + at));
    }
}

// Adds weight times V for the `vecs` vectors of channels from `c` on.
INLINE void mix_channels(int kind, int rows, int vecs, rows_t *r, mixture_t *m,
                         const tile_t *tiles, const char *const *next, int count, int at,
                         int64_t stride, int64_t c) {
    const int n = (int)items_per_unit(kind);
    vec acc[MAX_ROWS][8];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vecs; v++) acc[i][v] = load(m->sums[i] + c + v * W);
    for (int t = 0; t < count; t++) {
        const unit *values = tiles[t].v + c;
        const int first = (at + t) * TILE / n, units = tiles[t].count / n;
        const char *ahead = next[t] + c * 4;
        for (int u = 0; u < units; u++) {
            UNROLL for (int v = 0; v < vecs; v += TILE / W) fetch(ahead + v * 4 * W);
            ahead += stride * 4;
            mix_step(kind, rows, vecs, acc, r, first + u, values + u * stride, ~0u);
        }
        if (tiles[t].count % n) // the pair's second token is not in the context: anything
            mix_step(kind, rows, vecs, acc, r, first + units, values + units * stride, 0xffff);
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vecs; v++) store(m->sums[i] + c + v * W, acc[i][v]);
}

static void correct(rows_t *r, mixture_t *m, int64_t width) {
    for (int i = 0; i < r->rows; i++)
        for (int64_t c = 0; c < width && r->correction[i] != 1.0f; c += W)
            store(m->sums[i] + c, load(m->sums[i] + c) * splat(r->correction[i]));
}

INLINE void score_group(int kind, int rows, rows_t *r, const tile_t *tiles, const char *const *next,
                        int count, int64_t units, int64_t stride, int at) {
    int t = 0;

    if (FITS(rows, 4 * VECS))
        for (; t + 4 <= count; t += 4)
            score_tiles(kind, rows, 4, r, tiles + t, next + t, units, stride, at + t);
    else if (FITS(rows, 2 * VECS))
        for (; t + 2 <= count; t += 2)
            score_tiles(kind, rows, 2, r, tiles + t, next + t, units, stride, at + t);
    for (; t < count; t++)
        score_tiles(kind, rows, 1, r, tiles + t, next + t, units, stride, at + t);
}

INLINE void mix_group(int kind, int rows, rows_t *r, mixture_t *m, const tile_t *tiles,
                      const char *const *next, int count, int at, int64_t width) {
    int64_t c = 0;
#define STEPS(V) \
    for (; c + V * W <= width; c += V * W) \
        mix_channels(kind, rows, V, r, m, tiles, next, count, at, width, c);
    if (FITS(rows, 8)) STEPS(8)
    if (FITS(rows, 4)) STEPS(4)
    if (!FITS(rows, 4)) STEPS(2)
    STEPS(1)
#undef STEPS
}

typedef void (*score_fn)(rows_t *, const tile_t *, const char *const *, int, int64_t, int64_t, int);
typedef void (*mix_fn)(rows_t *, mixture_t *, const tile_t *, const char *const *, int, int,
                       int64_t);

// Functions of their own, as small ones keep all their pointers in registers.
#define DEFINE(KIND, R)                                                                            \
    static NOINLINE void score_##KIND##_##R(rows_t *r, const tile_t *tiles,                        \
                                            const char *const *next, int count, int64_t units,    \
                                            int64_t stride, int at) {                              \
        score_group(KIND, R, r, tiles, next, count, units, stride, at);                            \
    }                                                                                              \
    static NOINLINE void mix_##KIND##_##R(rows_t *r, mixture_t *m, const tile_t *tiles,            \
                                          const char *const *next, int count, int at,             \
                                          int64_t width) {                                         \
        mix_group(KIND, R, r, m, tiles, next, count, at, width);                                   \
    }
#if W == 16
#define EACH(DO, KIND) \
    DO(KIND, 1) DO(KIND, 2) DO(KIND, 3) DO(KIND, 4) DO(KIND, 5) DO(KIND, 6) DO(KIND, 7) DO(KIND, 8)
#else
#define EACH(DO, KIND) DO(KIND, 1) DO(KIND, 2) DO(KIND, 3) DO(KIND, 4)
#endif
EACH(DEFINE, F32)
EACH(DEFINE, BF16)
#define SCORE(KIND, R) [KIND][R] = score_##KIND##_##R,
#define MIX(KIND, R) [KIND][R] = mix_##KIND##_##R,
static const score_fn score_of[2][MAX_ROWS + 1] = {EACH(SCORE, F32) EACH(SCORE, BF16)};
static const mix_fn mix_of[2][MAX_ROWS + 1] = {EACH(MIX, F32) EACH(MIX, BF16)};

#endif
