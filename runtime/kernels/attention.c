// Causal attention over the pages.
//
// Each query goes over its sequence's tokens in chunks of the same tokens, and adds up splits of
// the same chunks, whoever shares its tile: attention does not depend on the batch, on how a
// prompt was cut up, or on the threads.

#include "attend.h"
#include "pool.h"

#include <stdlib.h>

#define SPLIT_CHUNKS 4
#define SPLIT_TILES (SPLIT_CHUNKS * CHUNK_TILES) // that one thread takes of a long context
#define JOB_ROWS 4                               // rows_t that share what they read
#define PIECES 16  // per thread, so that all end at about the same time

// Copies of tiles that a block or a head fills only in part, so that no load leaves the page.
typedef struct {
    unit units[GROUP_TILES][MAX_DIM * TILE];
} padding_t;

typedef struct {
    int kind;
    const float *q;
    const char *cache;
    float *out;
    shape_t shape;
} call_t;

typedef struct {
    const int32_t *pages;
    int64_t start;   // first query in the batch
    int64_t queries; // of one KV head: the share's heads of a token are neighbours
    int64_t seen;    // tokens before the first query's
    int64_t context;
    int64_t tiles;       // of the context
    int64_t parts;       // work items of one KV head
    int split;           // whether a part is a split of the context, not a range of queries
    int64_t first_item;  // in the batch
    mixture_t *partials; // of the splits, [G, parts]
} sequence_t;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step; }

static int64_t tiles_of_block(const shape_t *s) { return whole(s->block_tokens, TILE); }

static int64_t tiles_of(const shape_t *s, int64_t tokens) {
    const int64_t last = tokens - 1;
    return last / s->block_tokens * tiles_of_block(s) + last % s->block_tokens / TILE + 1;
}

static void place_tiles(const call_t *call, const sequence_t *q, int64_t group, int64_t first,
                        int64_t end, tile_t *tiles) {
    const shape_t *s = &call->shape;
    const int64_t per_block = tiles_of_block(s), item = item_bytes(call->kind);
    const int64_t run = s->dim * TILE * item;
    int64_t block = first / per_block, in_block = first % per_block;
    for (int64_t i = first; i < end; i++, tiles++) {
        const char *k = call->cache + first_key(s, q->pages[block], group) * item;
        const char *v = k + s->kv_heads * head_items(s) * item;
        const int64_t token = in_block * TILE;
        tiles->k = (const unit *)k + token;
        tiles->v = (const unit *)v + token / items_per_unit(call->kind) * s->dim;
        tiles->k_run = k + in_block * run;
        tiles->v_run = v + in_block * run;
        tiles->token = block * s->block_tokens + token;
        tiles->count = (int)least(least(TILE, s->block_tokens - token), q->context - tiles->token);
        if (++in_block == per_block) block++, in_block = 0;
    }
}

INLINE void copy_item(int kind, unit *to, int64_t i, const unit *from, int64_t j) {
    if (kind == BF16)
        ((uint16_t *)to)[i] = ((const uint16_t *)from)[j];
    else
        to[i] = from[j];
}

// K as [units of D, TILE].
static void pad_keys(const call_t *call, const tile_t *tile, unit *to) {
    const shape_t *s = &call->shape;
    const shape_t padded = {.block_tokens = TILE};
    memset(to, 0, sizeof(unit) * (size_t)(s->dim * TILE));
    for (int64_t d = 0; d < s->dim; d++)
        for (int64_t t = 0; t < tile->count; t++)
            copy_item(call->kind, to, key_item(call->kind, &padded, t, d), tile->k,
                      key_item(call->kind, s, t, d));
}

// V as [units of TILE, width].
static void pad_values(const call_t *call, const tile_t *tile, int64_t width, unit *to) {
    const shape_t *s = &call->shape;
    const shape_t padded = {.dim = width, .block_tokens = TILE};
    const int64_t in_block = tile->token % s->block_tokens;
    const unit *v = tile->v - in_block / items_per_unit(call->kind) * s->dim;
    memset(to, 0, sizeof(unit) * (size_t)(width * TILE));
    for (int64_t t = 0; t < tile->count; t++)
        for (int64_t d = 0; d < s->dim; d++)
            copy_item(call->kind, to, value_item(call->kind, &padded, t, d), v,
                      value_item(call->kind, s, in_block + t, d));
}

static void score_chunk(const call_t *call, rows_t *r, const tile_t *tiles, int count,
                        padding_t *padding) {
    const shape_t *s = &call->shape;
    const int padded = s->block_tokens % TILE != 0;
    const int64_t units = s->dim / items_per_unit(call->kind);
    for (int t = 0; t < count; t += GROUP_TILES) {
        const int n = (int)least(GROUP_TILES, count - t);
        const char *next[GROUP_TILES];
        tile_t group[GROUP_TILES];
        for (int i = 0; i < n; i++) {
            const int ahead = t + i + GROUP_TILES;
            next[i] = ahead < count ? tiles[ahead].k_run : tiles[least(ahead - count, count - 1)].v_run;
            group[i] = tiles[t + i];
            if (padded) {
                pad_keys(call, &tiles[t + i], padding->units[i]);
                group[i].k = padding->units[i];
            }
        }
        score_of[call->kind][r->rows](r, group, next, n, units, padded ? TILE : s->block_tokens, t);
    }
    if (count % 2)
        for (int i = 0; i < r->rows; i++)
            for (int t = 0; t < TILE; t++) r->scores[i][count * TILE + t] = -INFINITY;
}

static void mix_chunk(const call_t *call, rows_t *r, mixture_t *m, const tile_t *tiles, int count,
                      padding_t *padding) {
    const shape_t *s = &call->shape;
    const int64_t width = whole(s->dim, TILE) * TILE;
    const int padded = s->dim % TILE != 0 || s->block_tokens % items_per_unit(call->kind) != 0;
    correct(r, m, width);
    for (int t = 0; t < count; t += GROUP_TILES) {
        const int n = (int)least(GROUP_TILES, count - t);
        const char *next[GROUP_TILES];
        tile_t group[GROUP_TILES];
        for (int i = 0; i < n; i++) {
            const int ahead = t + i + GROUP_TILES;
            // Tiles of the next chunk follow those of this one.
            next[i] = ahead < count ? tiles[ahead].v_run : tiles[ahead].k_run;
            group[i] = tiles[t + i];
            if (padded) {
                pad_values(call, &tiles[t + i], width, padding->units[i]);
                group[i].v = padding->units[i];
                group[i].count = TILE;
            }
        }
        mix_of[call->kind][r->rows](r, m, group, next, n, t, width);
    }
}

static void attend_chunk(const call_t *call, rows_t *r, mixture_t *m, const tile_t *tiles,
                         int count, padding_t *padding) {
    score_chunk(call, r, tiles, count, padding);
    if (call->kind == BF16)
        weigh(BF16, r, m, count);
    else
        weigh(F32, r, m, count);
    mix_chunk(call, r, m, tiles, count, padding);
}

static void clear(mixture_t *m, int rows, int64_t width) {
    for (int i = 0; i < rows; i++) {
        m->top[i] = -INFINITY;
        memset(m->total[i], 0, sizeof m->total[i]);
        memset(m->sums[i], 0, (size_t)width * sizeof **m->sums);
    }
}

// Adds `m` to `all`, both relative to the higher of the two maxima.
static void merge(mixture_t *all, const mixture_t *m, int rows, int64_t width) {
    for (int i = 0; i < rows; i++) {
        const float top = all->top[i] > m->top[i] ? all->top[i] : m->top[i];
        const vec a = splat(exp2_vec(splat(all->top[i] - top))[0]);
        const vec b = splat(exp2_vec(splat(m->top[i] - top))[0]);
        for (int64_t c = 0; c < width; c += W)
            store(all->sums[i] + c, fma_vec(load(m->sums[i] + c), b, load(all->sums[i] + c) * a));
        store(all->total[i], fma_vec(load(m->total[i]), b, load(all->total[i]) * a));
        all->top[i] = top;
    }
}

static int64_t query_offset(const call_t *call, const sequence_t *q, int64_t group, int64_t index) {
    const shape_t *s = &call->shape;
    const int64_t share = s->heads / s->kv_heads;
    return ((q->start + index / share) * s->heads + group * share + index % share) * s->dim;
}

static void scale_query(int kind, const float *q, float scale, int64_t dim, unit *to) {
    float *f = (float *)to;
    uint16_t *h = (uint16_t *)to;
    int64_t d = 0;
    for (; d + W <= dim; d += W)
        if (kind == BF16)
            store_bf16(h + d, load(q + d) * splat(scale));
        else
            store(f + d, load(q + d) * splat(scale));
    for (; d < dim; d++)
        if (kind == BF16)
            h[d] = to_bf16(q[d] * scale);
        else
            f[d] = q[d] * scale;
}

static void take_queries(const call_t *call, const sequence_t *q, int64_t group, int64_t first,
                         rows_t *r) {
    const shape_t *s = &call->shape;
    const float scale = 1.44269504f / sqrtf((float)s->dim); // 2^(1.44 x) is e^x
    r->rows = (int)least(MAX_ROWS, q->queries - first);
    for (int i = 0; i < r->rows; i++) {
        const float *from = call->q + query_offset(call, q, group, first + i);
        r->limit[i] = q->seen + (first + i) / (s->heads / s->kv_heads) + 1;
        scale_query(call->kind, from, scale, s->dim, r->query[i]);
    }
}

static void put_results(const call_t *call, const sequence_t *q, int64_t group, int64_t first,
                        int rows, const mixture_t *m) {
    for (int i = 0; i < rows; i++) {
        const float total = lane_sum(load(m->total[i]));
        float *out = call->out + query_offset(call, q, group, first + i);
        int64_t d = 0;
        for (; d + W <= call->shape.dim; d += W)
            store(out + d, load(m->sums[i] + d) / splat(total));
        for (; d < call->shape.dim; d++) out[d] = m->sums[i][d] / total;
    }
}

// Splits `from` to `to` of the context for all rows of a job, added up in all[] of each. `after`
// are the tiles that the thread reads next.
static void attend_splits(const call_t *call, const sequence_t *q, int64_t group, rows_t *r,
                          int jobs, int64_t from, int64_t to, const tile_t *after) {
    const shape_t *s = &call->shape;
    const int64_t width = whole(s->dim, TILE) * TILE;
    tile_t tiles[SPLIT_TILES + GROUP_TILES];
    padding_t padding;
    for (int64_t split = from; split < to; split++) {
        const int64_t first = split * SPLIT_TILES;
        const int64_t placed = least(SPLIT_TILES + GROUP_TILES, q->tiles - first);
        place_tiles(call, q, group, first, first + placed, tiles);
        for (int64_t i = placed; i < SPLIT_TILES + GROUP_TILES; i++)
            tiles[i] = after[(i - placed) % GROUP_TILES];
        for (int j = 0; j < jobs; j++)
            clear(split == from ? &r[j].all : &r[j].split, r[j].rows, width);
        for (int64_t t = 0; t < SPLIT_TILES; t += CHUNK_TILES)
            for (int j = 0; j < jobs; j++) {
                const int64_t left = tiles_of(s, r[j].limit[r[j].rows - 1]) - first - t;
                mixture_t *m = split == from ? &r[j].all : &r[j].split;
                if (left > 0)
                    attend_chunk(call, &r[j], m, tiles + t, (int)least(CHUNK_TILES, left), &padding);
            }
        for (int j = 0; j < jobs && split > from; j++)
            merge(&r[j].all, &r[j].split, r[j].rows, width);
    }
}

static void attend_item(const call_t *call, const sequence_t *q, int64_t item,
                        const tile_t *after) {
    const int64_t group = item / q->parts, part = item % q->parts;
    rows_t r[JOB_ROWS];
    if (q->split) {
        take_queries(call, q, group, 0, r);
        attend_splits(call, q, group, r, 1, part, part + 1, after);
        q->partials[item] = r->all;
        return;
    }
    // The last queries see most: they come first, so that short items are left for the end.
    const int64_t first = (q->parts - 1 - part) * JOB_ROWS * MAX_ROWS;
    int jobs = 0;
    for (; jobs < JOB_ROWS && first + jobs * MAX_ROWS < q->queries; jobs++)
        take_queries(call, q, group, first + jobs * MAX_ROWS, &r[jobs]);
    const int64_t seen = r[jobs - 1].limit[r[jobs - 1].rows - 1];
    attend_splits(call, q, group, r, jobs, 0, whole(tiles_of(&call->shape, seen), SPLIT_TILES),
                  after);
    for (int j = 0; j < jobs; j++)
        put_results(call, q, group, first + j * MAX_ROWS, r[j].rows, &r[j].all);
}

static void add_partials(const call_t *call, const sequence_t *q) {
    for (int64_t group = 0; group < call->shape.kv_heads; group++) {
        mixture_t *m = q->partials + group * q->parts;
        for (int64_t part = 1; part < q->parts; part++)
            merge(m, &m[part], (int)q->queries, whole(call->shape.dim, TILE) * TILE);
        put_results(call, q, group, 0, (int)q->queries, m);
    }
}

// The tiles that an item reads first.
static void first_tiles(const call_t *call, const sequence_t *q, int64_t item, tile_t *tiles) {
    const int64_t first = q->split ? item % q->parts * SPLIT_TILES : 0;
    const int64_t placed = least(GROUP_TILES, q->tiles - first);
    place_tiles(call, q, item / q->parts, first, first + placed, tiles);
    for (int64_t i = placed; i < GROUP_TILES; i++) tiles[i] = tiles[0];
}

typedef struct {
    const call_t *call;
    const sequence_t *sequences; // one more than there are: where items end
    int64_t num_sequences, pieces;
} batch_t;

static const sequence_t *sequence_with(const batch_t *b, int64_t item) {
    int64_t low = 0, high = b->num_sequences - 1; // the last that begins at or before the item
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (b->sequences[middle].first_item <= item)
            low = middle;
        else
            high = middle - 1;
    }
    return &b->sequences[low];
}

static void attend_piece(void *job, int64_t piece) {
    const batch_t *b = job;
    const int64_t items = b->sequences[b->num_sequences].first_item;
    const int64_t end = (piece + 1) * items / b->pieces;
    int64_t item = piece * items / b->pieces;
    const sequence_t *q = sequence_with(b, item);
    while (item < end) {
        const int64_t own = item++ - q->first_item;
        const sequence_t *next = item < end ? sequence_with(b, item) : q;
        tile_t after[GROUP_TILES];
        first_tiles(b->call, next, item < end ? item - next->first_item : own, after);
        attend_item(b->call, q, own, after);
        q = next;
    }
}

static sequence_t sequence_of(const call_t *call, const int32_t *query_start,
                              const int32_t *context_len, const int32_t *block_table,
                              int64_t max_blocks, int64_t i) {
    const shape_t *s = &call->shape;
    const int64_t tokens = query_start[i + 1] - query_start[i];
    const int64_t queries = tokens * (s->heads / s->kv_heads);
    return (sequence_t){
        .pages = block_table + i * max_blocks,
        .start = query_start[i],
        .queries = queries,
        .seen = context_len[i] - tokens,
        .context = context_len[i],
        .tiles = tiles_of(s, context_len[i]),
        .parts = whole(queries, JOB_ROWS * MAX_ROWS),
    };
}

// Splits of the contexts of a few queries, where whole ones would leave threads without work.
static int64_t split_contexts(const call_t *call, sequence_t *q, int64_t count, int threads) {
    int64_t partials = 0, tiles = 0;
    for (int64_t i = 0; i < count; i++) tiles += q[i].tiles * call->shape.kv_heads;
    for (int64_t i = 0; i < count; i++) {
        const int64_t splits = whole(q[i].tiles, SPLIT_TILES);
        if (q[i].queries > MAX_ROWS || splits == 1 || q[i].tiles * threads * PIECES < tiles)
            continue;
        q[i].split = 1;
        q[i].parts = splits;
        partials += splits * call->shape.kv_heads;
    }
    return partials;
}

// q, out: [M, H, D]; the last query of a sequence stands at its context's last token.
void morph_attention(int kind, const float *q, const void *cache, float *out,
                     const int32_t *query_start, const int32_t *context_len,
                     const int32_t *block_table, int64_t num_sequences, int64_t max_blocks,
                     int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_tokens,
                     int threads) {
    const call_t call = {kind, q, cache, out, {heads, kv_heads, dim, block_tokens}};
    sequence_t *sequences = malloc((size_t)(num_sequences + 1) * sizeof *sequences);
    if (!sequences) abort();
    for (int64_t i = 0; i < num_sequences; i++)
        sequences[i] = sequence_of(&call, query_start, context_len, block_table, max_blocks, i);
    mixture_t *partials = NULL;
    if (threads > 1) {
        const int64_t wanted = split_contexts(&call, sequences, num_sequences, threads);
        if (wanted && !(partials = malloc((size_t)wanted * sizeof *partials))) abort();
    }
    int64_t items = 0;
    mixture_t *free_partials = partials;
    for (int64_t i = 0; i < num_sequences; i++) {
        sequences[i].first_item = items;
        items += sequences[i].parts * kv_heads;
        if (!sequences[i].split) continue;
        sequences[i].partials = free_partials;
        free_partials += sequences[i].parts * kv_heads;
    }
    sequences[num_sequences].first_item = items;
    batch_t batch = {&call, sequences, num_sequences, threads > 1 ? least(items, threads * PIECES) : 1};
    run_pieces(attend_piece, &batch, batch.pieces, threads);
    for (int64_t i = 0; i < num_sequences; i++)
        if (sequences[i].split) add_partials(&call, &sequences[i]);
    free(partials);
    free(sequences);
}
