// Where keys and values lie in a page.
//
// A page of float32 is K as [G, D, B], then V as [G, B, D]: tokens, or channels, that share a
// factor lie side by side. In a page of bfloat16, pairs of channels of K and pairs of tokens of V
// lie together, K as [G, D / 2, B, 2] and V as [G, B / 2, D, 2], as a dot product of pairs wants
// them; the last token of an odd B stands alone, [D]. D is even.

#ifndef MORPH_PAGES_H
#define MORPH_PAGES_H

#include "vectors.h"

#define MAX_DIM 256

typedef struct {
    int64_t heads, kv_heads, dim, block_tokens; // H, G, D, B
} shape_t;

INLINE int64_t item_bytes(int kind) { return kind == BF16 ? 2 : 4; }

INLINE int64_t items_per_unit(int kind) { return kind == BF16 ? 2 : 1; }

INLINE int64_t head_items(const shape_t *s) { return s->dim * s->block_tokens; }

// The first key of a page's KV head; its values lie kv_heads * head_items() further on.
INLINE int64_t first_key(const shape_t *s, int64_t page, int64_t head) {
    return (page * 2 * s->kv_heads + head) * head_items(s);
}

// Items from the head's first key.
INLINE int64_t key_item(int kind, const shape_t *s, int64_t token, int64_t channel) {
    const int64_t n = items_per_unit(kind);
    return (channel / n * s->block_tokens + token) * n + channel % n;
}

// Items from the head's first value.
INLINE int64_t value_item(int kind, const shape_t *s, int64_t token, int64_t channel) {
    const int64_t n = items_per_unit(kind);
    if (token / n == s->block_tokens / n) return token * s->dim + channel;
    return (token / n * s->dim + channel) * n + token % n;
}

#endif
