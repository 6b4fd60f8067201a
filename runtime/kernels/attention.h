// Rotation with the write into the pages, and attention over them.

#ifndef MORPH_ATTENTION_H
#define MORPH_ATTENTION_H

#include <stdint.h>

// qkv: [M, (H + 2 G) * D]; q_out: [M, H, D]; cos_sin: [max_position, D]; norms: [D] or null.
void morph_rope_write_kv(int kind, const float *qkv, void *cache, float *q_out,
                         const int32_t *positions, const int32_t *token_page,
                         const int32_t *token_slot, const float *cos_sin, const float *q_norm,
                         const float *k_norm, float eps, int64_t m, int64_t heads,
                         int64_t kv_heads, int64_t dim, int64_t block_tokens, int threads);

// q, out: [M, H, D]; the last query of a sequence stands at its context's last token.
void morph_attention(int kind, const float *q, const void *cache, float *out,
                     const int32_t *query_start, const int32_t *context_len,
                     const int32_t *block_table, int64_t sequences, int64_t max_blocks,
                     int64_t heads, int64_t kv_heads, int64_t dim, int64_t block_tokens,
                     int threads);

#endif
