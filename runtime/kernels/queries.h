// Queries over their sequence's context.

#ifndef MORPH_QUERIES_H
#define MORPH_QUERIES_H

#include "tiles.h"

#if W == 16
#define MAX_ROWS 8 // queries of a register tile
#else
#define MAX_ROWS 4
#endif
#define RANGE_ROWS (4 * MAX_ROWS) // queries that share what they read
#define SPLIT_TILES 32            // of a context: what one thread takes of a long one

// Softmax weights times V, not yet divided by the sum of the weights.
typedef struct {
    float sums[MAX_ROWS][MAX_DIM];
    float total[MAX_ROWS][W]; // of the weights: the sum over lanes
    float top[MAX_ROWS];      // the score that weighs 1, NOTHING_SEEN before the first
} mixture_t;

// `count` queries of a KV head from `first` on, up to RANGE_ROWS, into the call's results. `after`
// are the GROUP_TILES tiles that the thread reads next.
void attend_range(const call_t *call, const sequence_t *q, int64_t group, int64_t first,
                  const tile_t *after);

// All queries of a KV head, up to MAX_ROWS, over one split of the context.
void attend_split(const call_t *call, const sequence_t *q, int64_t group, int64_t split,
                  const tile_t *after, mixture_t *result);

// The results of a KV head's queries from those of every split; the first is written.
void add_splits(const call_t *call, const sequence_t *q, int64_t group, mixture_t *splits,
                int64_t count);

#endif
