// A linear's stored weight, and the product of activations with it.
//
// Outputs lie in strips of STRIP. A strip holds, word by word, STRIP words of 32 bits: word w of
// an output is feature w in float32, features 2 w and 2 w + 1 in bfloat16, 4 w to 4 w + 3 in INT8.
// INT4 has two of INT8's words in one, the first in the low halves of its bytes.

#ifndef MORPH_LINEAR_H
#define MORPH_LINEAR_H

#include <stdint.h>

#define STRIP 32

typedef struct {
    int64_t kind;          // enum kind
    const char *data;      // [strips, words, STRIP] words
    const uint16_t *scales; // INT4, INT8: float16 [strips, groups, STRIP]
    const uint8_t *zeros;  // [strips, groups, STRIP]; null: the middle code everywhere
    const int32_t *order;  // [k] input of each feature; null: in order
    const float *bias;     // [n] or null
    int64_t n, k, groups;
} linear_t;

// Row `row` of the activations, k floats: in place, or computed into `space`.
typedef const float *(*row_fn)(const void *source, int64_t row, float *space);

// y [m, n] (`add`: plus what is there) = rows [m, k] times the weight, transposed.
void linear(const linear_t *w, row_fn rows, const void *source, int64_t m, float *y, int add,
            int threads);

// Rows one after the other, [m, k].
typedef struct {
    const float *x;
    int64_t k;
} matrix_t;

const float *matrix_row(const void *source, int64_t row, float *space);

#endif
