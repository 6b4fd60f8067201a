// RMSNorm, with or without the residual, and SiLU times up.

#include "pointwise.h"

#include "vectors.h"

#define PARTS 16 // interleaved sums of squares

void rms_norm_row(const float *x, const float *weight, int64_t n, float eps, float *y) {
    float parts[PARTS] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int p = 0; p < PARTS; p++) parts[p] += x[i + p] * x[i + p];
    for (; i < n; i++) parts[i % PARTS] += x[i] * x[i];
    for (int p = 0; p < PARTS; p++) sum += parts[p];
    const float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// x, residual, y: [m, n]; residual may be null, else x is added to it first.
void morph_rms_norm(const float *x, float *residual, const float *weight, float eps, int64_t m,
                    int64_t n, float *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < m; row++) {
        const float *input = x + row * n;
        if (residual) {
            float *sum = residual + row * n;
            for (int64_t i = 0; i < n; i++) sum[i] += input[i];
            input = sum;
        }
        rms_norm_row(input, weight, n, eps, y + row * n);
    }
}

INLINE vec silu(vec x) { return x / (splat(1.0f) + exp_vec(-x)); }

void silu_mul_row(const float *gate, const float *up, int64_t n, float *y) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(y + i, silu(load(gate + i)) * load(up + i));
    for (; i < n; i++) y[i] = silu(splat(gate[i]))[0] * up[i];
}

// gate_up: [m, 2 n]; y: [m, n].
void morph_silu_mul(const float *gate_up, int64_t m, int64_t n, float *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < m; row++)
        silu_mul_row(gate_up + 2 * row * n, gate_up + (2 * row + 1) * n, n, y + row * n);
}
