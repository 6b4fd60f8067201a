// Activations as the linears read them.

#ifndef MORPH_ACTIVATIONS_H
#define MORPH_ACTIVATIONS_H

#include "codes.h"
#include "linear.h"

#if W == 16
#define MAX_ROWS 12 // of a tile: its sums and operands fit the registers
#elif W == 8
#define MAX_ROWS 3
#else
#define MAX_ROWS 2
#endif

#define GROUP 64 // features that share a scale at most

// Rows are cut into tiles of nearly equal height, each of them word by word: [words, rows].
// Words are those of linear.h; for INT4 and INT8 weights features are rounded to eight bits.
typedef struct {
    int64_t m, tiles;
    int64_t words, groups; // of a row
    int64_t group_words;
    uint32_t *x;   // [m, words]
    float *scales; // [m, groups]: tile by tile [groups, rows]
    int32_t *sums; // [m, groups] sums of the rounded features
} activations_t;

typedef struct {
    int64_t first; // row
    int rows;
} tile_t;

INLINE tile_t row_tile(const activations_t *a, int64_t t) {
    const int64_t height = a->m / a->tiles, more = a->m % a->tiles;
    tile_t tile = {t * height + (t < more ? t : more), (int)(height + (t < more))};
    return tile;
}

// Reads the rows of `source`. The result lies in memory of the calling thread that its next call
// overwrites.
activations_t prepare(const linear_t *w, row_fn rows, const void *source, int64_t m, int threads);

#endif
