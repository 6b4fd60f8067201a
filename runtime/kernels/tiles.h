// Tiles of a sequence's keys and values, in the pages or padded.

#ifndef MORPH_TILES_H
#define MORPH_TILES_H

#include "pages.h"

#define TILE 16       // tokens of a tile, and the multiple of channels
#define GROUP_TILES 4 // tiles that are multiplied together, and fetched ahead

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
    int64_t tiles; // of the context
} sequence_t;

// A tile lies in one block.
typedef struct {
    const unit *k, *v;     // units of its first token; a unit is defined in vectors.h
    const char *k_run, *v_run; // as many bytes of its block: tiles' runs cover the head's pages
    int64_t token;             // position of the first token in the sequence
    int count;                 // tokens of it that are in the context
} tile_t;

// Copies of tiles that a block or a head fills only in part, so that no load leaves the page.
typedef struct {
    unit units[GROUP_TILES][MAX_DIM * TILE];
} padding_t;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step; }

INLINE int64_t tiles_of_block(const shape_t *s) { return whole(s->block_tokens, TILE); }

INLINE int64_t tiles_of(const shape_t *s, int64_t tokens) {
    const int64_t last = tokens - 1;
    return last / s->block_tokens * tiles_of_block(s) + last % s->block_tokens / TILE + 1;
}

INLINE void place_tiles(const call_t *call, const sequence_t *q, int64_t group, int64_t first,
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
INLINE void pad_keys(const call_t *call, const tile_t *tile, unit *to) {
    const shape_t *s = &call->shape;
    const shape_t padded = {.block_tokens = TILE};
    memset(to, 0, sizeof(unit) * (size_t)(s->dim * TILE));
    for (int64_t d = 0; d < s->dim; d++)
        for (int64_t t = 0; t < tile->count; t++)
            copy_item(call->kind, to, key_item(call->kind, &padded, t, d), tile->k,
                      key_item(call->kind, s, t, d));
}

// V as [units of TILE, width].
INLINE void pad_values(const call_t *call, const tile_t *tile, int64_t width, unit *to) {
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

#endif
