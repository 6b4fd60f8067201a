// Operations on a row of features.

#ifndef MORPH_POINTWISE_H
#define MORPH_POINTWISE_H

#include <stdint.h>

// y = x scaled to unit root mean square, times the weight.
void rms_norm_row(const float *x, const float *weight, int64_t n, float eps, float *y);

// y = silu(gate) * up.
void silu_mul_row(const float *gate, const float *up, int64_t n, float *y);

#endif
