// Rotation with the write into the pages, and causal attention over them.
//
// A page is K as [G, D, B], then V as [G, B, D]. Each query goes over its sequence's tokens in
// chunks of the same tokens, whoever shares its tile: attention does not depend on the batch or
// on how a prompt was cut up.

#include "vectors.h"

#if W == 16
#define MAX_ROWS 8 // queries of a register tile
#else
#define MAX_ROWS 4
#endif
#define TILE 16 // tokens, and channels, of a register tile
#define VECS (TILE / W)
#define CHUNK_TILES 8 // tiles between two corrections of the running maximum
#define CHUNK (CHUNK_TILES * TILE)
#define MAX_DIM 256

typedef struct {
    int64_t heads, kv_heads, dim, block_tokens; // H, G, D, B
} shape_t;

typedef struct {
    const void *k, *v; // first token of the tile
    int64_t token;     // its position in the sequence
    int count;         // tokens of the tile that lie in one block and in the context
} tile_t;

// Copies for tiles that a block or a head fills only in part.
typedef struct {
    float k[MAX_DIM * TILE], v[TILE * MAX_DIM];
} padding_t;

// Queries of one KV head and sequence that go through the pages together.
typedef struct {
    const float *q[MAX_ROWS];
    float *out[MAX_ROWS];
    int64_t limit[MAX_ROWS]; // tokens that the query may see
    // Four floats more to a row: rows a multiple of 512 bytes apart would share a cache bank.
    float scaled[MAX_ROWS][MAX_DIM + 4];
    float sums[MAX_ROWS][MAX_DIM]; // of softmax weight times V
    float scores[MAX_ROWS][CHUNK + 4];
    float top[MAX_ROWS], total[MAX_ROWS], correction[MAX_ROWS];
} rows_t;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t item_bytes(int kind) { return kind == BF16 ? 2 : 4; }

INLINE float load_item(int kind, const void *p, int64_t i) {
    return kind == BF16 ? from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

INLINE void store_item(int kind, void *p, int64_t i, float x) {
    if (kind == BF16)
        ((uint16_t *)p)[i] = to_bf16(x);
    else
        ((float *)p)[i] = x;
}

// A tile of few queries has too few sums in flight: it takes two tiles of tokens, or twice the
// channels, at once.
#define PAIRED(rows) ((rows) * VECS <= 4)
#define MAX_VECS (2 * VECS)

// Scores of `count` tiles of tokens; those past a query's limit are minus infinity.
INLINE void score_tiles(int kind, int rows, int count, rows_t *r, const tile_t *tiles, int64_t dim,
                        int64_t stride, int at) {
    vec acc[MAX_ROWS][MAX_VECS] = {};
    for (int64_t d = 0; d < dim; d++)
        UNROLL for (int n = 0; n < count * VECS; n++) {
            vec keys = load_as_float(kind, tiles[n / VECS].k, d * stride + n % VECS * W);
            UNROLL for (int i = 0; i < rows; i++)
                acc[i][n] = fma_vec(splat(r->scaled[i][d]), keys, acc[i][n]);
        }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int n = 0; n < count * VECS; n++)
            store(r->scores[i] + at * TILE + n * W, acc[i][n]);
    for (int i = 0; i < rows; i++)
        for (int t = 0; t < count; t++) {
            int64_t visible = least(tiles[t].count, r->limit[i] - tiles[t].token);
            for (int64_t b = visible > 0 ? visible : 0; b < TILE; b++)
                r->scores[i][(at + t) * TILE + b] = -INFINITY;
        }
}

// Turns scores into weights relative to the new maximum. Token 0 is visible to every query, so
// the maximum is finite from the first chunk on.
static void weigh(rows_t *r, int rows, int tiles) {
    for (int i = 0; i < rows; i++) {
        float *s = r->scores[i];
        vec top = splat(r->top[i]), total = {};
        for (int t = 0; t < tiles * TILE; t += W) top = max_vec(top, load(s + t));
        float highest = top[0];
        for (int lane = 1; lane < W; lane++) highest = top[lane] > highest ? top[lane] : highest;
        for (int t = 0; t < tiles * TILE; t += W) {
            vec weight = exp_vec(load(s + t) - splat(highest));
            store(s + t, weight);
            total += weight;
        }
        float sum = 0;
        for (int lane = 0; lane < W; lane++) sum += total[lane];
        r->correction[i] = exp_vec(splat(r->top[i] - highest))[0];
        r->total[i] = r->total[i] * r->correction[i] + sum;
        r->top[i] = highest;
    }
}

// Adds weight times V for the `vecs` vectors of channels from `c` on.
INLINE void mix_channels(int kind, int rows, int vecs, rows_t *r, const tile_t *tiles,
                         int num_tiles, int64_t stride, int64_t c) {
    vec acc[MAX_ROWS][MAX_VECS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vecs; v++)
            acc[i][v] = load(r->sums[i] + c + v * W) * splat(r->correction[i]);
    for (int t = 0; t < num_tiles; t++) {
        const void *values = tiles[t].v;
        for (int64_t b = 0; b < tiles[t].count; b++)
            UNROLL for (int v = 0; v < vecs; v++) {
                vec value = load_as_float(kind, values, b * stride + c + v * W);
                UNROLL for (int i = 0; i < rows; i++)
                    acc[i][v] = fma_vec(splat(r->scores[i][t * TILE + b]), value, acc[i][v]);
            }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vecs; v++) store(r->sums[i] + c + v * W, acc[i][v]);
}

INLINE void score(int kind, int rows, rows_t *r, const tile_t *tiles, int num_tiles, int64_t dim,
                  int64_t stride) {
    int t = 0;
    if (PAIRED(rows))
        for (; t + 2 <= num_tiles; t += 2)
            score_tiles(kind, rows, 2, r, tiles + t, dim, stride, t);
    for (; t < num_tiles; t++) score_tiles(kind, rows, 1, r, tiles + t, dim, stride, t);
}

INLINE void mix(int kind, int rows, rows_t *r, const tile_t *tiles, int num_tiles, int64_t stride) {
    int64_t c = 0;
    if (PAIRED(rows))
        for (; c + 2 * TILE <= stride; c += 2 * TILE)
            mix_channels(kind, rows, 2 * VECS, r, tiles, num_tiles, stride, c);
    for (; c < stride; c += TILE)
        mix_channels(kind, rows, VECS, r, tiles, num_tiles, stride, c);
}

#define WHOLE(n) (((n) + TILE - 1) / TILE * TILE)

INLINE void attend_chunk(int kind, int rows, rows_t *r, const tile_t *tiles, int num_tiles,
                         const shape_t *s) {
    if (s->block_tokens % TILE == 0)
        score(kind, rows, r, tiles, num_tiles, s->dim, s->block_tokens);
    else
        score(F32, rows, r, tiles, num_tiles, s->dim, TILE);
    weigh(r, rows, num_tiles);
    if (s->dim % TILE == 0)
        mix(kind, rows, r, tiles, num_tiles, s->dim);
    else
        mix(F32, rows, r, tiles, num_tiles, WHOLE(s->dim));
}

static void attend_rows(int kind, int rows, rows_t *r, const tile_t *tiles, int num_tiles,
                        const shape_t *s) {
#define CASE(R)                                                     \
    case R:                                                         \
        if (kind == BF16)                                           \
            attend_chunk(BF16, R, r, tiles, num_tiles, s);          \
        else                                                        \
            attend_chunk(F32, R, r, tiles, num_tiles, s);           \
        break;
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4)
#if MAX_ROWS == 8
        CASE(5) CASE(6) CASE(7) CASE(8)
#endif
    }
#undef CASE
}

// So that no load leaves the page.
static void pad_tile(int kind, tile_t *tile, padding_t *padding, const shape_t *s) {
    if (s->block_tokens % TILE) {
        for (int64_t d = 0; d < s->dim; d++)
            for (int64_t t = 0; t < TILE; t++)
                padding->k[d * TILE + t] =
                    t < tile->count ? load_item(kind, tile->k, d * s->block_tokens + t) : 0.0f;
        tile->k = padding->k;
    }
    if (s->dim % TILE) {
        const int64_t stride = WHOLE(s->dim);
        for (int64_t t = 0; t < tile->count; t++)
            for (int64_t d = 0; d < stride; d++)
                padding->v[t * stride + d] =
                    d < s->dim ? load_item(kind, tile->v, t * s->dim + d) : 0.0f;
        tile->v = padding->v;
    }
}

static void place_tile(int kind, tile_t *tile, const char *cache, const int32_t *pages,
                       int64_t index, int64_t group, int64_t context, const shape_t *s) {
    const int64_t per_block = (s->block_tokens + TILE - 1) / TILE;
    const int64_t block = index / per_block, first = index % per_block * TILE;
    const int64_t head_items = s->dim * s->block_tokens, item = item_bytes(kind);
    const char *k = cache + (int64_t)pages[block] * 2 * s->kv_heads * head_items * item;
    k += group * head_items * item;
    tile->k = k + first * item;
    tile->v = k + (s->kv_heads * head_items + first * s->dim) * item;
    tile->token = block * s->block_tokens + first;
    tile->count = (int)least(least(TILE, s->block_tokens - first), context - tile->token);
}

static void attend(int kind, rows_t *r, int rows, const char *cache, const int32_t *pages,
                   int64_t group, const shape_t *s) {
    const int64_t context = r->limit[rows - 1]; // the last query sees most
    const int64_t per_block = (s->block_tokens + TILE - 1) / TILE;
    const int64_t last = context - 1;
    const int64_t num_tiles = last / s->block_tokens * per_block + last % s->block_tokens / TILE + 1;
    const float scale = 1.0f / sqrtf((float)s->dim);
    tile_t tiles[CHUNK_TILES];
    padding_t padding[CHUNK_TILES];
    for (int i = 0; i < rows; i++) {
        r->top[i] = -INFINITY;
        r->total[i] = 0;
        memset(r->sums[i], 0, sizeof r->sums[i]);
        for (int64_t d = 0; d < s->dim; d++) r->scaled[i][d] = r->q[i][d] * scale;
    }
    for (int64_t first = 0; first < num_tiles; first += CHUNK_TILES) {
        int count = (int)least(CHUNK_TILES, num_tiles - first);
        for (int t = 0; t < count; t++) {
            place_tile(kind, &tiles[t], cache, pages, first + t, group, context, s);
            pad_tile(kind, &tiles[t], &padding[t], s);
        }
        attend_rows(kind, rows, r, tiles, count, s);
    }
    for (int i = 0; i < rows; i++)
        for (int64_t d = 0; d < s->dim; d++) r->out[i][d] = r->sums[i][d] / r->total[i];
}

// q, out: [M, H, D]; the last query of a sequence stands at its context's last token.
void morph_attention(int kind, const float *q, const void *cache, float *out,
                     const int32_t *query_start, const int32_t *context_len,
                     const int32_t *block_table, int64_t sequences, int64_t max_blocks,
                     int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_tokens,
                     int threads) {
    const shape_t s = {heads, kv_heads, dim, block_tokens};
    const int64_t share = heads / kv_heads; // queries of a token that use one KV head
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t sequence = 0; sequence < sequences; sequence++) {
        const int64_t start = query_start[sequence], tokens = query_start[sequence + 1] - start;
        const int64_t seen = context_len[sequence] - tokens, total = tokens * share;
        const int64_t tiles = (total + MAX_ROWS - 1) / MAX_ROWS;
#pragma omp for schedule(dynamic) nowait
        for (int64_t job = 0; job < tiles * kv_heads; job++) {
            const int64_t group = job % kv_heads, first = job / kv_heads * MAX_ROWS;
            const int rows = (int)least(MAX_ROWS, total - first);
            rows_t r;
            for (int i = 0; i < rows; i++) {
                int64_t token = (first + i) / share, head = group * share + (first + i) % share;
                int64_t at = ((start + token) * heads + head) * dim;
                r.q[i] = q + at;
                r.out[i] = out + at;
                r.limit[i] = seen + token + 1;
            }
            attend(kind, &r, rows, cache, block_table + sequence * max_blocks, group, &s);
        }
    }
}

// x scaled to unit root mean square, times the weight; the sum runs in W interleaved parts.
static void norm_head(float *x, const float *weight, int64_t dim, float eps) {
    float parts[W] = {0}, sum = 0;
    for (int64_t d = 0; d < dim; d++) parts[d % W] += x[d] * x[d];
    for (int lane = 0; lane < W; lane++) sum += parts[lane];
    const float scale = 1.0f / sqrtf(sum / (float)dim + eps);
    for (int64_t d = 0; d < dim; d++) x[d] = x[d] * scale * weight[d];
}

static void rotate(const float *x, const float *norm, const float *cos_sin, int64_t dim, float eps,
                   float *out) {
    float head[MAX_DIM];
    const int64_t half = dim / 2;
    memcpy(head, x, (size_t)dim * sizeof *head);
    if (norm) norm_head(head, norm, dim, eps);
    for (int64_t i = 0; i < half; i++) {
        const float c = cos_sin[i], s = cos_sin[half + i], a = head[i], b = head[half + i];
        out[i] = a * c - b * s;
        out[half + i] = b * c + a * s;
    }
}

// qkv: [M, (H + 2 G) * D]; q_out: [M, H, D]; cos_sin: [max_position, D].
void morph_rope_write_kv(int kind, const float *qkv, void *cache, float *q_out,
                         const int32_t *positions, const int32_t *token_page,
                         const int32_t *token_slot, const float *cos_sin, const float *q_norm,
                         const float *k_norm, float eps, int64_t m, int64_t heads,
                         int64_t kv_heads, int64_t dim, int64_t block_tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t token = 0; token < m; token++) {
        const float *x = qkv + token * (heads + 2 * kv_heads) * dim;
        const float *turn = cos_sin + positions[token] * dim;
        const int64_t slot = token_slot[token], items = kv_heads * dim * block_tokens;
        char *k = (char *)cache + (int64_t)token_page[token] * 2 * items * item_bytes(kind);
        char *v = k + items * item_bytes(kind);
        for (int64_t h = 0; h < heads; h++)
            rotate(x + h * dim, q_norm, turn, dim, eps, q_out + (token * heads + h) * dim);
        for (int64_t g = 0; g < kv_heads; g++) {
            const float *values = x + (heads + kv_heads + g) * dim;
            float key[MAX_DIM];
            rotate(x + (heads + g) * dim, k_norm, turn, dim, eps, key);
            for (int64_t d = 0; d < dim; d++) {
                store_item(kind, k, (g * dim + d) * block_tokens + slot, key[d]);
                store_item(kind, v, (g * block_tokens + slot) * dim + d, values[d]);
            }
        }
    }
}
