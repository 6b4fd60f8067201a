// Causal attention over the pages: which thread does what.
//
// Each query goes over its sequence's tokens in chunks of the same tokens, and adds up splits of
// the same chunks, whoever shares its tile: attention does not depend on the batch, on how a
// prompt was cut up, or on the threads.

#include "attention.h"

#include "pool.h"
#include "queries.h"
#include "scratch.h"

#define PIECES 16 // per thread, so that all end at about the same time

// One sequence's items: of each KV head, ranges of its queries or, where these are few and their
// context is long, splits of that.
typedef struct {
    sequence_t sequence;
    int64_t parts;        // items of one KV head
    int64_t first_item;   // in the batch
    int64_t first_result; // of [G, parts] results of splits; -1: the items are ranges
} share_t;

typedef struct {
    const call_t *call;
    share_t *shares; // one more than there are sequences: where items end
    mixture_t *results;
    int64_t num_sequences, pieces;
} batch_t;

// The tiles that an item reads first.
static void first_tiles(const call_t *call, const share_t *s, int64_t item, tile_t *tiles) {
    const int64_t first = s->first_result >= 0 ? item % s->parts * SPLIT_TILES : 0;
    const int64_t placed = least(GROUP_TILES, s->sequence.tiles - first);
    place_tiles(call, &s->sequence, item / s->parts, first, first + placed, tiles);
    for (int64_t i = placed; i < GROUP_TILES; i++) tiles[i] = tiles[0];
}

static void attend_item(const batch_t *b, const share_t *s, int64_t item, const tile_t *after) {
    const int64_t group = item / s->parts, part = item % s->parts;
    const int64_t result = s->first_result + item;
    if (s->first_result >= 0)
        attend_split(b->call, &s->sequence, group, part, after, &b->results[result]);
    else // the last queries see most: they come first, so that short items are left for the end
        attend_range(b->call, &s->sequence, group, (s->parts - 1 - part) * RANGE_ROWS, after);
}

static const share_t *share_with(const batch_t *b, int64_t item) {
    int64_t low = 0, high = b->num_sequences - 1; // the last that begins at or before the item
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (b->shares[middle].first_item <= item)
            low = middle;
        else
            high = middle - 1;
    }
    return &b->shares[low];
}

static void attend_piece(void *job, int64_t piece) {
    const batch_t *b = job;
    const int64_t items = b->shares[b->num_sequences].first_item;
    const int64_t end = (piece + 1) * items / b->pieces;
    int64_t item = piece * items / b->pieces;
    const share_t *s = share_with(b, item);
    while (item < end) {
        const int64_t own = item++ - s->first_item;
        const share_t *next = item < end ? share_with(b, item) : s;
        tile_t after[GROUP_TILES];
        first_tiles(b->call, next, item < end ? item - next->first_item : own, after);
        attend_item(b, s, own, after);
        s = next;
    }
}

static share_t share_of(const call_t *call, const int32_t *query_start,
                        const int32_t *context_len, const int32_t *pages, int64_t i) {
    const shape_t *s = &call->shape;
    const int64_t tokens = query_start[i + 1] - query_start[i];
    const int64_t queries = tokens * (s->heads / s->kv_heads);
    return (share_t){
        .sequence = {.pages = pages,
                     .start = query_start[i],
                     .queries = queries,
                     .seen = context_len[i] - tokens,
                     .context = context_len[i],
                     .tiles = tiles_of(s, context_len[i])},
        .parts = whole(queries, RANGE_ROWS),
        .first_result = -1,
    };
}

// Splits contexts that would keep one thread busy when the others have finished. Returns how many
// results there are of splits.
static int64_t split_contexts(batch_t *b, int threads) {
    int64_t tiles = 0, results = 0;
    for (int64_t i = 0; i < b->num_sequences; i++) tiles += b->shares[i].sequence.tiles;
    for (int64_t i = 0; i < b->num_sequences && threads > 1; i++) {
        const sequence_t *q = &b->shares[i].sequence;
        const int64_t splits = whole(q->tiles, SPLIT_TILES);
        if (q->queries > MAX_ROWS || splits == 1 || q->tiles * threads * PIECES < tiles) continue;
        b->shares[i].parts = splits;
        b->shares[i].first_result = results;
        results += splits * b->call->shape.kv_heads;
    }
    return results;
}

static void add_results(const batch_t *b) {
    for (int64_t i = 0; i < b->num_sequences; i++) {
        const share_t *s = &b->shares[i];
        for (int64_t g = 0; g < b->call->shape.kv_heads && s->first_result >= 0; g++)
            add_splits(b->call, &s->sequence, g, b->results + s->first_result + g * s->parts,
                       s->parts);
    }
}

void morph_attention(int kind, const float *q, const void *cache, float *out,
                     const int32_t *query_start, const int32_t *context_len,
                     const int32_t *block_table, int64_t sequences, int64_t max_blocks,
                     int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_tokens,
                     int threads) {
    const call_t call = {kind, q, cache, out, {heads, kv_heads, dim, block_tokens}};
    batch_t b = {.call = &call, .num_sequences = sequences};
    int64_t items = 0;
    b.shares = scratch(SHARES, (sequences + 1) * (int64_t)sizeof *b.shares);
    for (int64_t i = 0; i < sequences; i++)
        b.shares[i] = share_of(&call, query_start, context_len, block_table + i * max_blocks, i);
    b.results = scratch(RESULTS, split_contexts(&b, threads) * (int64_t)sizeof *b.results);
    for (int64_t i = 0; i < sequences; items += b.shares[i++].parts * kv_heads)
        b.shares[i].first_item = items;
    b.shares[sequences].first_item = items;
    b.pieces = threads > 1 ? least(items, threads * PIECES) : 1;
    run_pieces(attend_piece, &b, b.pieces, threads);
    add_results(&b);
}
