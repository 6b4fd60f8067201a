// Queries over their sequence's context: chunk by chunk, and split by split.

#include "queries.h"

#include "attend.h"

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

static int64_t most_seen(const rows_t *r) { return r->limit[r->rows - 1]; }

static void clear(mixture_t *m, int rows, int64_t width) {
    for (int i = 0; i < rows; i++) {
        m->top[i] = NOTHING_SEEN;
        memset(m->total[i], 0, sizeof m->total[i]);
        memset(m->sums[i], 0, (size_t)width * sizeof **m->sums);
    }
}

// Adds `m` to `all`, both relative to the higher of the two maxima.
static void merge(mixture_t *all, const mixture_t *m, int rows, int64_t width) {
    for (int i = 0; i < rows; i++) {
        const float top = all->top[i] > m->top[i] ? all->top[i] : m->top[i];
        const vec a = splat(exp2_vec(F32, splat(all->top[i] - top))[0]);
        const vec b = splat(exp2_vec(F32, splat(m->top[i] - top))[0]);
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

// Splits `from` to `to` of the context for register tiles that read them together, added up in
// all[] of each.
static void attend_splits(const call_t *call, const sequence_t *q, int64_t group, rows_t *r,
                          int count, int64_t from, int64_t to, const tile_t *after) {
    const int64_t width = whole(call->shape.dim, TILE) * TILE;
    tile_t tiles[SPLIT_TILES + GROUP_TILES];
    padding_t padding;
    for (int64_t split = from; split < to; split++) {
        const int64_t first = split * SPLIT_TILES;
        const int64_t placed = least(SPLIT_TILES + GROUP_TILES, q->tiles - first);
        place_tiles(call, q, group, first, first + placed, tiles);
        for (int64_t i = placed; i < SPLIT_TILES + GROUP_TILES; i++)
            tiles[i] = after[(i - placed) % GROUP_TILES];
        for (int j = 0; j < count; j++)
            clear(split == from ? &r[j].all : &r[j].split, r[j].rows, width);
        for (int64_t t = 0; t < SPLIT_TILES; t += CHUNK_TILES)
            for (int j = 0; j < count; j++) {
                const int64_t left = tiles_of(&call->shape, most_seen(&r[j])) - first - t;
                mixture_t *m = split == from ? &r[j].all : &r[j].split;
                if (left > 0)
                    attend_chunk(call, &r[j], m, tiles + t, (int)least(CHUNK_TILES, left), &padding);
            }
        for (int j = 0; j < count && split > from; j++)
            merge(&r[j].all, &r[j].split, r[j].rows, width);
    }
}

void attend_range(const call_t *call, const sequence_t *q, int64_t group, int64_t first,
                  const tile_t *after) {
    rows_t r[RANGE_ROWS / MAX_ROWS];
    int count = 0;
    for (int64_t i = first; i < first + RANGE_ROWS && i < q->queries; i += MAX_ROWS)
        take_queries(call, q, group, i, &r[count++]);
    const int64_t tiles = tiles_of(&call->shape, most_seen(&r[count - 1]));
    attend_splits(call, q, group, r, count, 0, whole(tiles, SPLIT_TILES), after);
    for (int j = 0; j < count; j++)
        put_results(call, q, group, first + j * MAX_ROWS, r[j].rows, &r[j].all);
}

void attend_split(const call_t *call, const sequence_t *q, int64_t group, int64_t split,
                  const tile_t *after, mixture_t *result) {
    rows_t r;
    take_queries(call, q, group, 0, &r);
    attend_splits(call, q, group, &r, 1, split, split + 1, after);
    *result = r.all;
}

void add_splits(const call_t *call, const sequence_t *q, int64_t group, mixture_t *splits,
                int64_t count) {
    for (int64_t i = 1; i < count; i++)
        merge(splits, &splits[i], (int)q->queries, whole(call->shape.dim, TILE) * TILE);
    put_results(call, q, group, 0, (int)q->queries, splits);
}
